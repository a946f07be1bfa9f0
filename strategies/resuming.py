"""A federation that was cut off goes on after its last completed round, to the same bits as one that never stopped.

Everything a later round depends on is kept after every round in one safetensors file: the global model exactly as Flower
holds it (numpy's own bytes, memory order included), what the strategy remembers, and what the caller adds. The global
random generators, from which Flower samples clients and draws noise, are seeded anew for every step of every round.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from fedattack.errors import FedattackError, must
from fedattack.seeding import derive_seed, seeded_global_generators
from fedattack.store import read_tensors, write_tensors
from strategies.fedsgd import FedSGD

REMEMBERED: dict[type[Strategy], tuple[str, ...]] = {
    FedSGD: (),
    flower.FedAvg: (),
    flower.FedProx: (),
    flower.QFedAvg: (),
    flower.FedMedian: (),
    flower.FedTrimmedAvg: (),
    flower.Krum: (),
    flower.MultiKrum: (),
    flower.Bulyan: (),
    flower.FedAvgM: ("current_arrays", "momentum_vector"),
    flower.FedAdagrad: ("m_t", "v_t"),
    flower.FedAdam: ("m_t", "v_t"),
    flower.FedYogi: ("m_t", "v_t"),
    flower.DifferentialPrivacyServerSideFixedClipping: (),
    flower.DifferentialPrivacyClientSideFixedClipping: (),
    flower.DifferentialPrivacyServerSideAdaptiveClipping: ("clipping_norm",),
    flower.DifferentialPrivacyClientSideAdaptiveClipping: ("clipping_norm",),
}
"""What each strategy of Flower 1.41 carries from one round to the next (what configure_train sets anew is not listed)."""

_BLOB = "blob/"


@dataclass(frozen=True)
class Progress:
    """Where a federation stands after round `completed`. `extra` holds the caller's own tensors, `about` its JSON."""

    completed: int
    arrays: ArrayRecord
    memory: Any
    extra: dict[str, Tensor] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)


def why_not_resumable(strategy: Strategy) -> str:
    """The reason why a strategy cannot go on in the middle, "" if it can."""
    inner: Any = strategy
    while inner is not None:
        if type(inner) not in REMEMBERED:
            return f"what {type(inner).__name__} remembers between rounds is not known"
        if getattr(inner, "accountant", None) is not None:
            return "its privacy accountant cannot be saved"
        inner = vars(inner).get("strategy")
    return ""


def save_progress(
    path: Path,
    completed: int,
    arrays: ArrayRecord,
    strategy: Strategy,
    *,
    extra: Mapping[str, Tensor] | None = None,
    about: Mapping[str, Any] | None = None,
) -> None:
    """Write where a federation stands, atomically; one file, the newest round only."""
    blobs: dict[str, Tensor] = dict(extra or {})
    memory: list[Any] = []
    inner: Any = strategy
    while inner is not None:
        memory.append({name: _pack(getattr(inner, name), blobs) for name in REMEMBERED[type(inner)]})
        inner = vars(inner).get("strategy")
    header = {
        "type": "progress",
        "completed": completed,
        "arrays": _pack(arrays, blobs),
        "memory": memory,
        "flwr": version("flwr"),
        "about": json.dumps(dict(about or {})),
    }
    write_tensors(path, blobs, header)


def load_progress(path: Path) -> Progress:
    """Read what `save_progress` wrote. Raises FedattackError where it is something else or of another Flower."""
    tensors, header = read_tensors(path)
    if header.get("type") != "progress":
        raise FedattackError(must(str(path), "a file of type 'progress'", header.get("type")))
    if header["flwr"] != version("flwr"):
        raise FedattackError(must("Flower", f"{header['flwr']}, with which it began", version("flwr")))
    extra = {name: tensor for name, tensor in tensors.items() if not name.startswith(_BLOB)}
    arrays = _unpack(header["arrays"], tensors)
    memory = [{name: _unpack(value, tensors) for name, value in layer.items()} for layer in header["memory"]]
    return Progress(header["completed"], arrays, memory, extra, json.loads(header["about"]))


def restore_memory(strategy: Strategy, progress: Progress) -> None:
    """Give a new strategy, and those it wraps, what the old ones remembered."""
    inner: Any = strategy
    for layer in progress.memory:
        for name, value in layer.items():
            setattr(inner, name, value)
        inner = vars(inner).get("strategy")


# ------------------------------------------------------------------------------------------------ rounds
class CountedRounds(Strategy):
    """Around a strategy (outermost): rounds count on from `completed`, each step of each draws from generators of its own.

    `metrics[round]` is what the strategy aggregated of the clients' training metrics, as soon as it did.
    """

    def __init__(self, strategy: Strategy, *, seed: int, completed: int = 0) -> None:
        self.strategy, self.seed, self.completed = strategy, seed, completed
        self.metrics: dict[int, MetricRecord] = {}

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        number = server_round + self.completed
        return self._seeded("configure_train", number, lambda s: list(s.configure_train(number, arrays, config, grid)))

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        number = server_round + self.completed
        found: tuple[ArrayRecord | None, MetricRecord | None] = self._seeded(
            "aggregate_train", number, lambda s: s.aggregate_train(number, replies)
        )
        if found[1] is not None:
            self.metrics[number] = found[1]
        return found

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        number = server_round + self.completed
        return self._seeded(
            "configure_evaluate", number, lambda s: list(s.configure_evaluate(number, arrays, config, grid))
        )

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        number = server_round + self.completed
        found: MetricRecord | None = self._seeded(
            "aggregate_evaluate", number, lambda s: s.aggregate_evaluate(number, replies)
        )
        return found

    def summary(self) -> None:
        self.strategy.summary()

    def _seeded(self, step: str, number: int, act: Callable[[Strategy], Any]) -> Any:
        with seeded_global_generators(derive_seed(self.seed, step, f"round-{number}")):
            return act(self.strategy)


def has_own_start(strategy: Strategy) -> bool:
    """Whether a strategy replaces Flower's `start`, whose rounds are then its own business."""
    return type(strategy).start is not Strategy.start


# ------------------------------------------------------------------------------------------------ numbers as they are
def _pack(value: Any, blobs: dict[str, Tensor]) -> Any:
    """JSON for a value; arrays go into `blobs` as bytes."""
    if value is None or isinstance(value, int | float):
        return {"plain": value}
    if isinstance(value, ArrayRecord):
        return {
            "record": [
                [name, array.dtype, list(array.shape), array.stype, _put(array.data, blobs)]
                for name, array in value.items()
            ]
        }
    if isinstance(value, np.ndarray):
        buffer = BytesIO()
        np.save(buffer, value, allow_pickle=False)
        return {"array": _put(buffer.getvalue(), blobs)}
    if isinstance(value, Mapping):
        return {"named": [[name, _pack(item, blobs)] for name, item in value.items()]}
    return {"list": [_pack(item, blobs) for item in value]}


def _unpack(packed: Any, tensors: Mapping[str, Tensor]) -> Any:
    ((kind, value),) = packed.items()
    if kind == "plain":
        return value
    if kind == "record":
        return ArrayRecord(
            {
                name: Array(dtype=dtype, shape=tuple(shape), stype=stype, data=_get(blob, tensors))
                for name, dtype, shape, stype, blob in value
            }
        )
    if kind == "array":
        return np.load(BytesIO(_get(value, tensors)), allow_pickle=False)
    if kind == "named":
        return {name: _unpack(item, tensors) for name, item in value}
    return [_unpack(item, tensors) for item in value]


def _put(data: bytes, blobs: dict[str, Tensor]) -> str:
    name = f"{_BLOB}{len(blobs)}"
    blobs[name] = torch.from_numpy(np.frombuffer(data, np.uint8).copy())
    return name


def _get(name: str, tensors: Mapping[str, Tensor]) -> bytes:
    return tensors[name].numpy().tobytes()

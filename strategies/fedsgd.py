"""FedSGD: clients send the gradient itself, the server takes one step: w ← w − η · Σ n_i g_i / Σ n_i.

Source: McMahan et al., AISTATS 2017 (arXiv 1602.05629), section 2; GIDM, Algorithm 1.
Sending the gradient instead of weights loses no digits in a float32 difference.
"""

import logging
from collections.abc import Iterable

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

from fedattack.config import FederationSettings
from fedattack.types import UpdateKind
from strategies.flower import common_options
from strategies.honest_but_curious import num_examples_of
from strategies.inspection import inspect, to_state

log = logging.getLogger("fedattack.server")


class FedSGD(FedAvg):
    """FedAvg's sampling and weighting with gradients instead of weights, and a server step of size `learning_rate`.

    Its own rule for malformed replies: they are left out of the mean.
    """

    update_kind: UpdateKind = "gradient"

    def __init__(self, learning_rate: float, **options: object) -> None:
        super().__init__(**options)  # type: ignore[arg-type]
        self.learning_rate = learning_rate
        self._arrays: ArrayRecord | None = None

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        self._arrays = arrays
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        assert self._arrays is not None
        gradient, metrics = super().aggregate_train(server_round, self._sound(list(replies), self._arrays))
        if gradient is None:
            return None, metrics
        weights, mean = to_state(self._arrays), to_state(gradient)
        stepped = {
            name: w - self.learning_rate * mean[name].to(w.dtype) if name in mean else w for name, w in weights.items()
        }
        return ArrayRecord({name: torch.as_tensor(tensor) for name, tensor in stepped.items()}), metrics

    def _sound(self, replies: list[Message], arrays: ArrayRecord) -> list[Message]:
        """Replies that hold a finite gradient of the right shapes (and error replies, which FedAvg counts)."""
        sound = []
        names: set[str] = set()
        for reply in replies:
            if not reply.has_error():
                records = list(reply.content.array_records.values())
                if len(records) != 1 or num_examples_of(reply)[1] or inspect(records[0], arrays, ())[1]:
                    log.warning("round without node %s: malformed gradient", reply.metadata.src_node_id)
                    continue
                names |= set(records[0])
            sound.append(reply)
        whole = [r for r in sound if r.has_error() or set(next(iter(r.content.array_records.values()))) == names]
        if len(whole) < len(sound):
            log.warning("round without %d replies that lack a tensor", len(sound) - len(whole))
        return whole


def fedsgd(federation: FederationSettings, fraction_train: float = 1.0) -> FedSGD:
    """Gradients in, one server step of federation.learning_rate out."""
    return FedSGD(federation.learning_rate, **common_options(federation, fraction_train))

"""The wrapper is transparent to the last bit, sees what arrived, and survives anything a client can send."""

import hashlib
import random

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import LocalDpMod, adaptiveclipping_mod, fixedclipping_mod
from flwr.serverapp import strategy as flower

from fedattack.errors import FedattackError
from fedattack.store import load_update
from fedattack.types import Update
from strategies import HonestButCurious
from strategies.fedsgd import FedSGD
from strategies.honest_but_curious import Incident, update_kind
from strategies.in_process_grid import InProcessGrid, quiet_flower

CLIENTS = 4
ALL = {
    "min_train_nodes": CLIENTS,
    "min_evaluate_nodes": CLIENTS,
    "min_available_nodes": CLIENTS,
    "fraction_evaluate": 0.0,
}


@pytest.fixture(autouse=True)
def _quiet():
    with quiet_flower():
        yield


def toy_weights(seed: int = 1) -> ArrayRecord:
    generator = torch.Generator().manual_seed(seed)
    return ArrayRecord({"a": torch.randn(3, 2, generator=generator), "b": torch.randn(5, generator=generator)})


def toy_client(mods=(), spoil=None) -> ClientApp:
    """Moves every weight a little, differently for each client and round; `spoil(partition, reply content)` may wreck it."""
    app = ClientApp()

    @app.train(mods=list(mods))
    def train(message: Message, context) -> Message:
        partition = int(context.node_config["partition-id"])
        round_number = int(message.content["config"]["server-round"])
        generator = torch.Generator().manual_seed(100 * round_number + partition)
        state = message.content["arrays"].to_torch_state_dict()
        state = {k: v + 0.1 * torch.randn(v.shape, generator=generator) for k, v in state.items()}
        metrics = {"train-loss": 1.0 + partition, "num-examples": 3 + partition, "partition-id": partition}
        content = RecordDict({"arrays": ArrayRecord(state), "metrics": MetricRecord(metrics)})
        return Message(spoil(partition, content) if spoil else content, reply_to=message)

    return app


def digest(record: ArrayRecord) -> str:
    return hashlib.sha256(b"".join(k.encode() + a.numpy().tobytes() for k, a in record.items())).hexdigest()


STRATEGIES = {
    "FedAvg": (lambda: flower.FedAvg(**ALL), ()),
    "FedAvg half": (lambda: flower.FedAvg(**{**ALL, "fraction_train": 0.5, "min_train_nodes": 2}), ()),
    "FedAvgM": (lambda: flower.FedAvgM(server_momentum=0.9, **ALL), ()),
    "FedAdam": (lambda: flower.FedAdam(**ALL), ()),
    "FedYogi": (lambda: flower.FedYogi(**ALL), ()),
    "FedProx": (lambda: flower.FedProx(proximal_mu=0.1, **ALL), ()),
    "QFedAvg": (lambda: flower.QFedAvg(client_learning_rate=0.1, train_loss_key="train-loss", **ALL), ()),
    "FedMedian": (lambda: flower.FedMedian(**ALL), ()),
    "FedTrimmedAvg": (lambda: flower.FedTrimmedAvg(beta=0.25, **ALL), ()),
    "Krum": (lambda: flower.Krum(num_malicious_nodes=1, **ALL), ()),
    "MultiKrum": (lambda: flower.MultiKrum(num_malicious_nodes=1, num_nodes_to_select=2, **ALL), ()),
    "Bulyan": (lambda: flower.Bulyan(num_malicious_nodes=0, **ALL), ()),
    "DP server fixed": (lambda: _dp("ServerSideFixed", 0.1, 0.5), ()),
    "DP server adaptive": (lambda: _dp("ServerSideAdaptive", 0.1), ()),
    "DP client fixed": (lambda: _dp("ClientSideFixed", 0.1, 0.5), (fixedclipping_mod,)),
    "DP client adaptive": (lambda: _dp("ClientSideAdaptive", 0.1), (adaptiveclipping_mod,)),
    "LocalDpMod": (lambda: flower.FedAvg(**ALL), (LocalDpMod(0.5, 0.001, 1.0, 1e-5),)),
    "FedSGD": (lambda: FedSGD(0.5, **ALL), ()),
}


def _dp(kind: str, *numbers: float) -> flower.Strategy:
    cls = getattr(flower, f"DifferentialPrivacy{kind}Clipping")
    return cls(flower.FedAvg(**ALL), *numbers, num_sampled_clients=CLIENTS)


def run(make, mods, wrap: bool) -> tuple[str, list[Update], list[str]]:
    """Final weights, what the sink got, and digests of it at the moment of the copy."""
    random.seed(7)
    np.random.seed(7)
    seen: list[Update] = []
    at_copy: list[str] = []

    def sink(update: Update) -> None:
        seen.append(update)
        at_copy.append(_digest(update))

    strategy = HonestButCurious(make(), sink) if wrap else make()
    result = strategy.start(
        InProcessGrid(toy_client(mods), CLIENTS), toy_weights(), num_rounds=3, train_config=ConfigRecord()
    )
    return digest(result.arrays), seen, at_copy


def _digest(update: Update) -> str:
    parts = [t.numpy().tobytes() for state in (update.sent, update.received) for t in state.values()]
    return hashlib.sha256(b"".join(parts)).hexdigest()


@pytest.mark.parametrize("name", STRATEGIES)
def test_training_is_bit_identical(name: str) -> None:
    make, mods = STRATEGIES[name]
    plain, _, _ = run(make, mods, wrap=False)
    wrapped, seen, at_copy = run(make, mods, wrap=True)
    assert wrapped == plain
    per_round = 2 if name == "FedAvg half" else CLIENTS
    assert len(seen) == 3 * per_round
    assert [_digest(update) for update in seen] == at_copy, "a copy changed after it was taken"
    assert all(float((u.received["a"] - u.sent["a"]).abs().max()) > 0 for u in seen), "an emptied reply was copied"


def test_copies_come_in_the_order_of_partition_ids_whatever_order_they_arrive_in() -> None:
    class Shuffled(InProcessGrid):
        def send_and_receive(self, messages, *, timeout=None):
            return list(super().send_and_receive(messages, timeout=timeout))[::-1]

    seen: list[str] = []
    strategy = HonestButCurious(flower.FedAvg(**ALL), lambda update: seen.append(update.client))
    strategy.start(Shuffled(toy_client(), CLIENTS), toy_weights(), num_rounds=2)
    assert seen == [f"client-{i}" for i in range(CLIENTS)] * 2


def test_only_the_wanted_rounds_and_clients_are_copied() -> None:
    seen: list[Update] = []
    strategy = HonestButCurious(flower.FedAvg(**ALL), seen.append, rounds=[2], clients=[0, 3])
    strategy.start(InProcessGrid(toy_client(), CLIENTS), toy_weights(), num_rounds=3)
    assert [(u.round, u.client) for u in seen] == [(2, "client-0"), (2, "client-3")]
    assert all(u.num_examples == 3 + int(u.client[-1]) for u in seen)


def test_a_sink_that_raises_changes_nothing() -> None:
    def broken(update: Update) -> None:
        raise OSError("disk full")

    incidents: list[Incident] = []
    make, _ = STRATEGIES["FedAvg"]
    plain, _, _ = run(make, (), wrap=False)
    random.seed(7)
    strategy = HonestButCurious(make(), broken, on_incident=incidents.append)
    result = strategy.start(InProcessGrid(toy_client(), CLIENTS), toy_weights(), num_rounds=3)
    assert digest(result.arrays) == plain
    assert len(incidents) == 12
    assert "disk full" in incidents[0].problems[0]


def test_a_folder_is_sink_enough(tmp_path) -> None:
    strategy = HonestButCurious(flower.FedAvg(**ALL), tmp_path / "copies")
    strategy.start(InProcessGrid(toy_client(), CLIENTS), toy_weights(), num_rounds=1)
    files = sorted((tmp_path / "copies").iterdir())
    assert [f.name for f in files] == [f"client-{i}-round-1.safetensors" for i in range(CLIENTS)]
    update, _ = load_update(files[2])
    assert update.client == "client-2"
    assert torch.equal(update.sent["a"], toy_weights().to_torch_state_dict()["a"])
    assert (tmp_path / "copies").stat().st_mode & 0o777 == 0o700


def test_methods_of_the_wrapped_strategy_stay_reachable() -> None:
    strategy = HonestButCurious(flower.FedAvg(weighted_by_key="num-examples"), lambda update: None)
    assert strategy.weighted_by_key == "num-examples"
    with pytest.raises(AttributeError):
        _ = strategy.no_such_thing
    with pytest.raises(FedattackError, match="strategy must be"):
        HonestButCurious("fedavg", lambda update: None)  # type: ignore[arg-type]


def test_the_kind_of_update_is_found_through_wrappers() -> None:
    assert update_kind(flower.FedAvg()) == "weights"
    assert update_kind(FedSGD(0.1)) == "gradient"
    assert update_kind(HonestButCurious(FedSGD(0.1), lambda u: None)) == "gradient"
    assert update_kind(_dp("ServerSideFixed", 0.1, 0.5)) == "weights"


# ------------------------------------------------------------------------------------------------ hostile replies
def _array(value: np.ndarray, **changes) -> Array:
    good = Array(value)
    fields = {"dtype": good.dtype, "shape": good.shape, "stype": good.stype, "data": good.data} | changes
    return Array(**fields)


def _with(content: RecordDict, **arrays: Array | None) -> RecordDict:
    record = dict(content["arrays"].items()) | arrays
    content["arrays"] = ArrayRecord({name: array for name, array in record.items() if array is not None})
    return content


LIE = np.zeros((3, 2), np.float32)
HOSTILE = {
    "nan": lambda c: _with(c, a=_array(np.full((3, 2), np.nan, np.float32))),
    "inf": lambda c: _with(c, b=_array(np.array([1, 2, np.inf, 4, 5], np.float32))),
    "wrong shape": lambda c: _with(c, a=_array(np.zeros((2, 3), np.float32))),
    "missing tensor": lambda c: _with(c, a=None),
    "extra tensor": lambda c: _with(c, evil=_array(np.zeros(3, np.float32))),
    "wrong dtype": lambda c: _with(c, a=_array(np.zeros((3, 2), np.int64))),
    "text": lambda c: _with(c, a=_array(np.array([["x", "y"]] * 3))),
    "huge": lambda c: _with(c, a=_array(np.zeros(10_000_000, np.float32))),
    "lies about its shape": lambda c: _with(c, a=_array(np.zeros(2, np.float32), shape=(3, 2))),
    "header claims terabytes": lambda c: _with(c, a=_array(LIE, data=_terabytes())),
    "garbage bytes": lambda c: _with(c, a=_array(LIE, data=b"\x00garbage")),
    "empty bytes": lambda c: _with(c, a=_array(LIE, data=b"")),
    "pickle": lambda c: _with(c, a=_array(LIE, data=b"cos\nsystem\n(S'true'\ntR.")),
    "other serialisation": lambda c: _with(c, a=_array(LIE, stype="torch.pickle")),
    "no arrays": lambda c: RecordDict({"metrics": c["metrics"]}),
    "two array records": lambda c: RecordDict({"arrays": c["arrays"], "more": c["arrays"], "metrics": c["metrics"]}),
    "no metrics": lambda c: RecordDict({"arrays": c["arrays"]}),
    "nan examples": lambda c: RecordDict(
        {"arrays": c["arrays"], "metrics": MetricRecord({**c["metrics"], "num-examples": float("nan")})}
    ),
}


def _terabytes() -> bytes:
    from io import BytesIO

    file = BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (10**6, 10**6)})
    return file.getvalue()


@pytest.mark.parametrize("inner", ["FedAvg", "FedSGD", "FedMedian"])
@pytest.mark.parametrize("attack", HOSTILE)
def test_no_reply_can_take_the_server_down(attack: str, inner: str) -> None:
    """One of four clients is hostile in every round: three rounds end, it is reported and never copied, the others are.

    What a NaN does to the model is the strategy's own rule: FedAvg takes it in, after which every later reply is NaN too.
    """
    seen: list[Update] = []
    incidents: list[Incident] = []
    strategy = HonestButCurious(STRATEGIES[inner][0](), seen.append, on_incident=incidents.append)

    def spoil(partition: int, content: RecordDict) -> RecordDict:
        return HOSTILE[attack](content) if partition == 1 else content

    rounds: list[int] = []
    strategy.start(
        InProcessGrid(toy_client(spoil=spoil), CLIENTS),
        toy_weights(),
        num_rounds=3,
        evaluate_fn=lambda number, arrays: rounds.append(number),
    )
    assert rounds == [0, 1, 2, 3]
    assert [u.client for u in seen if u.round == 1] == ["client-0", "client-2", "client-3"]
    assert {u.client for u in seen} == {"client-0", "client-2", "client-3"}
    assert {i.client for i in incidents if i.round == 1} - {"server"} == {
        "node-101" if "metrics" in attack else "client-1"
    }
    if inner == "FedSGD":  # its own rule leaves malformed gradients out, so the model stays sound
        assert len(seen) == 9


def test_fedsgd_leaves_a_malformed_gradient_out_of_the_mean() -> None:
    def spoil(partition: int, content: RecordDict) -> RecordDict:
        return HOSTILE["nan"](content) if partition == 1 else content

    strategy = FedSGD(0.5, **ALL)
    result = strategy.start(InProcessGrid(toy_client(spoil=spoil), CLIENTS), toy_weights(), num_rounds=1)
    start, gradients, weights = toy_weights().to_torch_state_dict(), [], []
    for partition in (0, 2, 3):
        generator = torch.Generator().manual_seed(100 + partition)
        gradients.append({k: v + 0.1 * torch.randn(v.shape, generator=generator) for k, v in start.items()})
        weights.append(3 + partition)
    for name, array in result.arrays.to_torch_state_dict().items():
        mean = sum(w * g[name] for w, g in zip(weights, gradients, strict=True)) / sum(weights)
        torch.testing.assert_close(array, start[name] - 0.5 * mean)


def test_two_nodes_with_one_partition_id_do_not_overwrite_each_other(tmp_path) -> None:
    def spoil(partition: int, content: RecordDict) -> RecordDict:
        content["metrics"]["partition-id"] = 0
        return content

    strategy = HonestButCurious(flower.FedAvg(**ALL), tmp_path)
    strategy.start(InProcessGrid(toy_client(spoil=spoil), CLIENTS), toy_weights(), num_rounds=1)
    assert len(list(tmp_path.iterdir())) == CLIENTS


def test_a_client_that_fails_is_an_incident() -> None:
    def spoil(partition: int, content: RecordDict) -> RecordDict:
        if partition == 2:
            raise RuntimeError("no such luck")
        return content

    incidents: list[Incident] = []
    strategy = HonestButCurious(flower.FedAvg(**ALL), lambda u: None, on_incident=incidents.append)
    strategy.start(InProcessGrid(toy_client(spoil=spoil), CLIENTS), toy_weights(), num_rounds=1)
    assert len(incidents) == 1
    assert "no such luck" in incidents[0].problems[0]


def test_a_node_that_is_gone_is_called_by_the_name_it_had() -> None:
    """The SuperLink answers for it, in its own name; in the first round nobody knows yet which client the node is."""

    class LosesClient2(InProcessGrid):
        def send_and_receive(self, messages, *, timeout=None):
            requests, replies = list(messages), []
            for reply in super().send_and_receive(requests, timeout=timeout):
                if reply.metadata.src_node_id == 102 and requests[0].content["config"]["server-round"] != 2:
                    reply = Message(Error(1, "Node Unavailable"), reply_to=reply)
                    reply.metadata.__dict__["_src_node_id"] = 1
                replies.append(reply)
            return replies

    incidents: list[Incident] = []
    strategy = HonestButCurious(flower.FedAvg(**ALL), lambda u: None, on_incident=incidents.append)
    strategy.start(LosesClient2(toy_client(), CLIENTS), toy_weights(), num_rounds=3)
    assert [(incident.round, incident.client) for incident in incidents] == [(1, "node-102"), (3, "client-2")]


@pytest.mark.parametrize(
    ("says", "lost", "named"),
    [
        ("which message", (101, 102, 103), "node-103"),
        ("nothing", (101, 102, 103), "unknown"),
        ("nothing", (103,), "node-103"),
    ],
)
def test_an_error_in_the_superlinks_name_is_not_laid_at_another_silent_nodes_door(says, lost, named) -> None:
    """Some nodes are silent, and the SuperLink tells of 103 only. Nodes are asked in another order each round."""

    class Loses(InProcessGrid):
        def send_and_receive(self, messages, *, timeout=None):
            replies = []
            for reply in super().send_and_receive(messages, timeout=timeout):
                if reply.metadata.src_node_id == 103:
                    message_id = reply.metadata.reply_to_message_id if says == "which message" else "?"
                    reply = Message(Error(1, "Node Unavailable"), reply_to=reply)
                    reply.metadata.__dict__.update(_src_node_id=1, _reply_to_message_id=message_id)
                elif reply.metadata.src_node_id in lost:
                    continue
                replies.append(reply)
            return replies

    incidents: list[Incident] = []
    strategy = HonestButCurious(flower.FedAvg(**ALL), lambda u: None, on_incident=incidents.append)
    strategy.start(Loses(toy_client(), CLIENTS), toy_weights(), num_rounds=6)
    assert [incident.client for incident in incidents] == [named] * 6


def test_an_error_of_the_strategy_itself_is_not_swallowed() -> None:
    class Buggy(flower.FedAvg):
        def aggregate_train(self, server_round, replies):
            raise ZeroDivisionError("a bug of its own")

    with pytest.raises(ZeroDivisionError):
        HonestButCurious(Buggy(**ALL), lambda u: None).start(
            InProcessGrid(toy_client(), CLIENTS), toy_weights(), num_rounds=1
        )


@pytest.mark.parametrize("selection", [{}, {"rounds": [1]}, {"clients": [0]}])
@pytest.mark.parametrize("attack", ["missing tensor", "wrong shape", "more metrics", "metrics of another shape"])
def test_clients_that_are_not_copied_cannot_take_the_server_down_either(attack: str, selection) -> None:
    def more_metrics(content: RecordDict) -> RecordDict:
        content["metrics"]["surprise"] = 1.0
        return content

    def longer(content: RecordDict) -> RecordDict:
        content["metrics"]["train-loss"] = [1.0, 2.0]
        return content

    wreck = {"more metrics": more_metrics, "metrics of another shape": longer} | HOSTILE

    def spoil(partition: int, content: RecordDict) -> RecordDict:
        return wreck[attack](content) if partition == 1 else content

    rounds: list[int] = []
    strategy = HonestButCurious(flower.FedAvg(**ALL), lambda u: None, **selection)
    grid = InProcessGrid(toy_client(spoil=spoil), CLIENTS)
    strategy.start(grid, toy_weights(), num_rounds=2, evaluate_fn=lambda number, arrays: rounds.append(number))
    assert rounds == [0, 1, 2]


def test_a_bad_evaluation_reply_costs_the_figures_only() -> None:
    app = toy_client()

    @app.evaluate()
    def evaluate(message: Message, context) -> Message:
        metrics = {"num-examples": 1, "loss": 1.0}
        if context.node_config["partition-id"] == 2:
            metrics = {"num-examples": 1, "los": 1.0}
        return Message(RecordDict({"metrics": MetricRecord(metrics)}), reply_to=message)

    incidents: list[Incident] = []
    inner = flower.FedAvg(**{**ALL, "fraction_evaluate": 1.0})
    strategy = HonestButCurious(inner, lambda u: None, on_incident=incidents.append)
    result = strategy.start(InProcessGrid(app, CLIENTS), toy_weights(), num_rounds=2)
    assert len(result.train_metrics_clientapp) == 2
    assert not result.evaluate_metrics_clientapp
    assert [i.client for i in incidents] == ["server", "server"]


def test_a_strategys_own_start_is_run() -> None:
    """Early stopping, saving the best model and the like live in `start`; its super() must still work."""

    class Mine(flower.FedAvg):
        started = 0

        def start(self, *args, **kwargs):
            self.started += 1
            return super().start(*args, **kwargs)

    plain, _, _ = run(STRATEGIES["FedAvg"][0], (), wrap=False)
    random.seed(7)
    seen: list[Update] = []
    mine = Mine(**ALL)
    result = HonestButCurious(mine, seen.append).start(
        InProcessGrid(toy_client(), CLIENTS), toy_weights(), num_rounds=3
    )
    assert mine.started == 1
    assert len(seen) == 12
    assert digest(result.arrays) == plain
    assert "aggregate_train" not in vars(mine), "the strategy is left as it was"

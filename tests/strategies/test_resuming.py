"""A federation that is cut off goes on to the same bits: weights, history, updates, averages, whatever the strategy keeps."""

import hashlib
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord
from flwr.serverapp import strategy as flower

from experiments.campaign import run_campaign
from fedattack.config import Experiment, parse_config
from fedattack.errors import FedattackError
from fedattack.registry import STRATEGIES
from fedattack.store import RunFolder, UpdateFolder, read_json, read_rows, read_tensors
from strategies import federation, resuming
from strategies.fedsgd import FedSGD
from strategies.resuming import CountedRounds, load_progress, save_progress, why_not_resumable

ROUNDS = 4
MLP = {"name": "mlp", "options": {"hidden": [8]}}
UNET = {"name": "unet", "options": {"block_out_channels": [4, 4], "norm_num_groups": 2, "attention_head_dim": 2}}
NEEDED = {"noise_multiplier": 0.1, "clipping_norm": 1.0}


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def experiment(federation: dict, **changes) -> Experiment:
    raw = {
        "seed": 5,
        "data": {"options": {"image_size": 8}},
        "model": MLP,
        "federation": {"clients": 3, "rounds": ROUNDS, "learning_rate": 0.05} | federation,
        "score": {"lpips": []},
        "attack": [],
    }
    return parse_config(raw | changes)


def named(strategy: str) -> dict:
    if strategy == "fedsgd":
        return {"protocol": "fedsgd", "strategy_options": {"fraction_train": 0.67}}
    options = {key: value for key, value in NEEDED.items() if STRATEGIES.parameters(strategy).get(key) is ...}
    if "fraction_train" in STRATEGIES.parameters(strategy):
        options["fraction_train"] = 0.67  # two of three clients, drawn from the global generator
    if strategy == "fedavgm":
        options |= {"server_momentum": 0.9}
    mods = {"dp-client-fixed": ["fixedclipping"], "dp-client-adaptive": ["adaptiveclipping"]}.get(strategy, [])
    return {"protocol": "fedavg", "strategy": strategy, "strategy_options": options, "mods": mods}


class Cut(BaseException):
    """Not even `except Exception` stops it, like a Ctrl-C or a kill."""


def cut_after(number: int):
    def on_round(settings, server_round, figures) -> None:
        if server_round == number:
            raise Cut

    return on_round


def left(run: RunFolder) -> dict[str, str]:
    """Digests of everything a federation leaves behind."""
    (folder,) = (run.path / "federations").iterdir()
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def straight_and_cut(config: Experiment, tmp_path: Path, number: int = 2) -> tuple[dict[str, str], dict[str, str]]:
    straight = run_campaign(config, tmp_path / "straight").run
    with pytest.raises(Cut):
        run_campaign(config, tmp_path / "cut", on_round=cut_after(number))
    rounds: list[int] = []
    resumed = run_campaign(config, tmp_path / "cut", on_round=lambda s, n, f: rounds.append(n)).run
    assert rounds == list(range(number + 1, ROUNDS + 1)), "it did not go on where it was"
    return left(straight), left(resumed)


@pytest.mark.parametrize("strategy", STRATEGIES.names())
def test_every_strategy_goes_on_to_the_same_bits(strategy: str, tmp_path) -> None:
    straight, resumed = straight_and_cut(experiment(named(strategy)), tmp_path)
    assert {"model.safetensors", "history.jsonl", "done.json"} <= straight.keys()
    assert len([name for name in straight if name.startswith("updates/")]) >= 2 * ROUNDS
    assert "progress.safetensors" not in straight
    assert resumed == straight


@pytest.mark.parametrize("strategy", ["fedavgm", "fedadam", "dp-server-adaptive"])
def test_what_a_strategy_remembers_matters(strategy: str, tmp_path, monkeypatch) -> None:
    """The test above could not fail if a strategy without its memory came out the same."""
    monkeypatch.setattr(federation, "restore_memory", lambda strategy, progress: None)
    straight, resumed = straight_and_cut(experiment(named(strategy)), tmp_path)
    assert resumed["model.safetensors"] != straight["model.safetensors"]


@pytest.mark.parametrize("protocol", ["fedsgd", "fedavg"])
def test_a_federated_ddpm_goes_on_to_the_same_checkpoints(protocol: str, tmp_path) -> None:
    config = experiment(
        {"protocol": protocol, "batch_size": 2, "clients": 2} | ({"local_steps": 2} if protocol == "fedavg" else {}),
        model=UNET,
        task={"name": "diffusion", "options": {"num_train_timesteps": 20}},
        checkpoint={"every": 1, "ema": 0.5, "samples": 2, "sample_steps": 2},
    )
    straight, resumed = straight_and_cut(config, tmp_path)
    wanted = "checkpoints/round-004/ema/unet/diffusion_pytorch_model.safetensors"
    assert straight[wanted] != straight["checkpoints/round-004/unet/diffusion_pytorch_model.safetensors"]
    assert "checkpoints/round-004/samples.png" in straight
    assert resumed == straight


def test_a_round_that_was_cut_off_in_the_middle_is_done_again(tmp_path, monkeypatch) -> None:
    config = experiment(named("fedadam"), capture={"rounds": [1, 3]})
    straight = run_campaign(config, tmp_path / "straight").run
    real, copied = UpdateFolder.__call__, []

    def dies_at_the_fourth(self, update):
        copied.append(update.round)
        if len(copied) == 4:
            raise Cut
        return real(self, update)

    monkeypatch.setattr(UpdateFolder, "__call__", dies_at_the_fourth)
    with pytest.raises(Cut):
        run_campaign(config, tmp_path / "cut")
    monkeypatch.undo()
    assert copied == [1, 1, 3, 3]
    rounds: list[int] = []
    resumed = run_campaign(config, tmp_path / "cut", on_round=lambda s, n, f: rounds.append(n)).run
    assert rounds == [3, 4]
    assert left(resumed) == left(straight)


def test_history_written_before_the_progress_is_not_doubled(tmp_path, monkeypatch) -> None:
    """The worst moment: round 3 is in the history, but what is kept is still round 2's."""
    config = experiment(named("fedavg"))
    straight = run_campaign(config, tmp_path / "straight").run
    real = federation.save_progress

    def dies_in_round_3(path, completed, *rest, **options):
        if completed == 3:
            raise Cut
        real(path, completed, *rest, **options)

    monkeypatch.setattr(federation, "save_progress", dies_in_round_3)
    with pytest.raises(Cut):
        run_campaign(config, tmp_path / "cut")
    monkeypatch.undo()
    (history,) = (tmp_path / "cut").glob("federations/*/history.jsonl")
    assert [row["round"] for row in read_rows(history)] == [0, 1, 2, 3]
    assert left(run_campaign(config, tmp_path / "cut").run) == left(straight)


def test_attacks_on_updates_of_before_and_after_are_all_there(tmp_path) -> None:
    config = experiment({"clients": 2}, attack=["linear-leak"])
    with pytest.raises(Cut):
        run_campaign(config, tmp_path / "run", on_round=cut_after(3))
    run = run_campaign(config, tmp_path / "run").run
    rows = [row for row in read_rows(run.rows) if row["kind"] == "attack"]
    assert [(row["round"], row["client"]) for row in rows] == [(n, f"client-{c}") for n in (1, 2, 3, 4) for c in (0, 1)]
    assert {row["status"] for row in rows} == {"ok"}


def test_a_copy_that_only_the_lost_round_made_is_dropped(tmp_path) -> None:
    config = experiment({"clients": 2})
    with pytest.raises(Cut):
        run_campaign(config, tmp_path / "run", on_round=cut_after(2))
    (updates,) = (tmp_path / "run").glob("federations/*/updates")
    stale = updates / "client-7-round-3.safetensors"
    stale.write_bytes((updates / "client-0-round-1.safetensors").read_bytes())
    run_campaign(config, tmp_path / "run")
    assert not stale.exists()
    assert len(list(updates.iterdir())) == 2 * ROUNDS


MINE = """
from flwr.serverapp.strategy import FedAvg


class Mine(FedAvg):
    '''A strategy of a user's own, which may remember anything.'''

    def __init__(self, federation, **options):
        super().__init__(fraction_evaluate=0.0, min_available_nodes=federation.clients, **options)


class Early(Mine):
    '''One that replaces `start`.'''

    def start(self, *args, **kwargs):
        return super().start(*args, **kwargs)
"""


@pytest.mark.parametrize("kind", ["Mine", "Early"])
def test_a_strategy_that_nobody_knows_starts_anew_and_says_so(kind: str, tmp_path, monkeypatch, caplog) -> None:
    (tmp_path / "my_strategies.py").write_text(MINE)
    monkeypatch.syspath_prepend(str(tmp_path))
    config = experiment({"protocol": "fedavg", "strategy": f"my_strategies:{kind}"})
    straight = run_campaign(config, tmp_path / "straight").run
    with pytest.raises(Cut):
        run_campaign(config, tmp_path / "cut", on_round=cut_after(2))
    rounds: list[int] = []
    with caplog.at_level(logging.WARNING, "fedattack"):
        resumed = run_campaign(config, tmp_path / "cut", on_round=lambda s, n, f: rounds.append(n)).run
    assert f"starts anew from its first round: what {kind} remembers between rounds is not known" in caplog.text
    assert rounds == [0, 1, 2, 3, 4]
    assert left(resumed) == left(straight)


def test_secure_aggregation_starts_anew_and_says_so(tmp_path, caplog) -> None:
    config = experiment({"protocol": "fedavg", "mods": ["secaggplus"]}, model={"name": "lenet"})
    with pytest.raises(Cut):
        run_campaign(config, tmp_path / "run", on_round=cut_after(1))
    with caplog.at_level(logging.WARNING, "fedattack"):
        run = run_campaign(config, tmp_path / "run").run
    assert "SecAgg+ keeps its masks in memory only" in caplog.text
    assert [row["round"] for row in read_rows(run.path / "history.jsonl") if "test_loss" in row] == [0, 1, 2, 3, 4]


def test_another_flower_starts_anew(tmp_path, monkeypatch, caplog) -> None:
    config = experiment({})
    with pytest.raises(Cut):
        run_campaign(config, tmp_path / "run", on_round=cut_after(1))
    monkeypatch.setattr(resuming, "version", lambda package: "9.9")
    with caplog.at_level(logging.WARNING, "fedattack"):
        run_campaign(config, tmp_path / "run")
    assert "starts anew" in caplog.text
    assert "got '9.9'" in caplog.text


def test_only_known_strategies_and_no_accountant() -> None:
    assert why_not_resumable(flower.FedAdam()) == ""
    assert why_not_resumable(FedSGD(0.1)) == ""
    assert "FedXgbBagging" in why_not_resumable(flower.FedXgbBagging())
    wrapped = flower.DifferentialPrivacyServerSideFixedClipping(flower.FedXgbCyclic(), 0.1, 1.0, 2)
    assert "FedXgbCyclic" in why_not_resumable(wrapped)


def test_numbers_come_back_as_they_were(tmp_path) -> None:
    """Type, shape, memory order, the order of the names and every bit, NaN included."""
    strategy = flower.FedAvgM(server_momentum=0.9)
    odd = np.array([[1.0, np.nan, -0.0], [np.inf, 5e-324, 1 / 3]])
    strategy.current_arrays = ArrayRecord({"z": Array(np.array(1.5, np.float32)), "a": Array(np.asfortranarray(odd))})
    strategy.momentum_vector = [np.asfortranarray(odd), np.array(7, np.int64)]
    average = {"w": torch.tensor([1 / 3])}
    save_progress(tmp_path / "p", 3, strategy.current_arrays, strategy, extra=average, about={"steps": 3})
    found, fresh = load_progress(tmp_path / "p"), flower.FedAvgM(server_momentum=0.9)
    resuming.restore_memory(fresh, found)
    for record in (found.arrays, fresh.current_arrays):
        assert list(record) == ["z", "a"]
        assert record["a"].data == strategy.current_arrays["a"].data
        assert record["z"].shape == ()
    for mine, theirs in zip(fresh.momentum_vector, strategy.momentum_vector, strict=True):
        assert mine.tobytes() == theirs.tobytes()
        assert (mine.dtype, mine.shape, mine.flags.f_contiguous) == (
            theirs.dtype,
            theirs.shape,
            theirs.flags.f_contiguous,
        )
    assert (found.completed, found.about) == (3, {"steps": 3})
    assert torch.equal(found.extra["w"], average["w"])
    with pytest.raises(FedattackError, match="must be an existing safetensors file"):
        load_progress(tmp_path / "none")


def test_rounds_draw_from_generators_of_their_own() -> None:
    """What a step of a round draws depends on the run's seed, the step and the round, and on nothing drawn before."""

    class Draws(flower.FedAvg):
        def __init__(self) -> None:
            super().__init__()
            self.drawn: list[float] = []

        def aggregate_train(self, server_round, replies):
            self.drawn.append(float(np.random.normal()))
            return None, None

    def drawn(seed: int, completed: int, rounds: int) -> list[float]:
        inner = Draws()
        counted = CountedRounds(inner, seed=seed, completed=completed)
        for number in range(1, rounds + 1):
            counted.aggregate_train(number, [])
        return inner.drawn

    before = np.random.get_state()[1].tolist()
    straight = drawn(1, 0, 4)
    assert drawn(1, 2, 2) == straight[2:]
    assert len(set(straight)) == 4
    assert drawn(2, 0, 4) != straight
    assert np.random.get_state()[1].tolist() == before


def test_a_finished_federation_is_not_touched_again(tmp_path) -> None:
    config = experiment({})
    run = run_campaign(config, tmp_path / "run").run
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "federations").rglob("*")}
    rounds: list[int] = []
    run_campaign(config, tmp_path / "run", on_round=lambda s, n, f: rounds.append(n))
    assert rounds == []
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    (done,) = run.path.glob("federations/*/done.json")
    assert read_json(done) == {"rounds": ROUNDS, "updates": 3 * ROUNDS, "weights": ""}
    assert read_tensors(done.parent / "model.safetensors")[1]["rounds"] == ROUNDS

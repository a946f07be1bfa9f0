"""Federated DDPM training for its own sake and as a target: it learns, it can be continued, and what is wrong is refused."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from diffusers import DDPMPipeline

from clients import client_app
from experiments.campaign import run_campaign
from fedattack.checkpoints import digest_of
from fedattack.config import load_config, parse_config
from fedattack.errors import ConfigError, FedattackError, MalformedUpdate
from fedattack.jobs import Job, attack_update, load_knowledge
from fedattack.models import build_model
from fedattack.planning import plan_jobs, updates_of
from fedattack.report import build_report
from fedattack.store import load_update, read_rows, read_tensors, save_png
from fedattack.tasks import Diffusion
from fedattack.types import Knowledge

TINY = {"block_out_channels": [4, 4], "norm_num_groups": 2, "attention_head_dim": 2}
RAW = {
    "name": "ddpm",
    "seed": 3,
    "data": {"options": {"image_size": 8}},
    "model": {"name": "unet", "options": TINY},
    "task": {"name": "diffusion"},
    "federation": {"clients": 2, "rounds": 2, "protocol": "fedavg", "batch_size": 2, "local_steps": 2},
    "score": {"lpips": []},
    "attack": [],
}


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def config(**changes):
    merged = dict(RAW)
    for key, value in changes.items():
        merged[key] = {**RAW[key], **value} if isinstance(RAW.get(key), dict) and isinstance(value, dict) else value
    return parse_config(merged)


def refused(match: str, **changes) -> None:
    with pytest.raises(ConfigError) as caught:
        config(**changes)
    assert re.search(match, str(caught.value)), str(caught.value)


def losses(run) -> list[float]:
    return [row["test_loss"] for row in read_rows(run.path / "history.jsonl") if "test_loss" in row]


# ------------------------------------------------------------------------------------------------ training
@pytest.mark.parametrize(
    ("protocol", "prediction", "federation"),
    [
        ("fedavg", "epsilon", {"local_steps": 6, "batch_size": 8, "learning_rate": 0.1}),
        ("fedsgd", "epsilon", {"local_steps": 1, "batch_size": 48, "learning_rate": 0.1, "rounds": 5}),
        pytest.param(
            "fedavg", "v_prediction", {"local_steps": 6, "batch_size": 8, "learning_rate": 0.1}, marks=pytest.mark.slow
        ),
    ],
)
def test_the_loss_falls_and_nothing_is_copied_unless_asked(protocol, prediction, federation, tmp_path) -> None:
    told: list[dict] = []
    settings = config(
        federation={"rounds": 3, "protocol": protocol} | federation,
        task={"options": {"prediction_type": prediction}},
        capture={"enabled": False},
    )
    summary = run_campaign(settings, tmp_path / "run", on_round=lambda s, n, figures: told.append(dict(figures)))
    found = losses(summary.run)
    assert found[-1] < 0.85 * found[0]
    assert [figures["test_loss"] for figures in told] == found
    assert all("train_loss" in figures for figures in told[1:])
    (folder,) = (tmp_path / "run" / "federations").iterdir()
    assert not (folder / "updates").exists()
    assert not (folder / "truth").exists()
    assert summary.statuses == {}
    page = summary.report.read_text()
    assert f"Training only, no attack: 1 federation, {len(found) - 1} rounds so far." in page
    final = folder / "checkpoints" / f"round-{len(found) - 1:03d}"
    assert [path.name for path in final.parent.iterdir()] == [final.name], "every = 0: only the last round"
    weights = DDPMPipeline.from_pretrained(final).unet.state_dict()
    trained = read_tensors(folder / "model.safetensors")[0]
    assert all(torch.equal(weights[name.removeprefix("unet.")], tensor) for name, tensor in trained.items())


def test_checkpoints_average_and_grids_are_in_the_report(tmp_path) -> None:
    settings = config(
        task={"options": {"num_train_timesteps": 50}},
        federation={"rounds": 3},
        checkpoint={"every": 2, "ema": 0.9, "samples": 3, "sample_steps": 2},
    )
    summary = run_campaign(settings, tmp_path / "run")
    (folder,) = (tmp_path / "run" / "federations").iterdir()
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["round-002", "round-003"]
    page = summary.report.read_text()
    assert "3 images drawn from the moving average of the global model by DDIM in 2 steps" in page
    assert page.index("samples after round 2") < page.index("samples after round 3")
    final = folder / "checkpoints" / "round-003"
    raw, average = (DDPMPipeline.from_pretrained(path).unet.conv_in.weight for path in (final, final / "ema"))
    assert not torch.equal(raw, average)
    save_png(final / "samples.png", torch.zeros(3, 40, 40))
    assert 'width="360" height="360"' in build_report(tmp_path / "run").read_text(), "enlarged by a whole factor"


def test_progress_and_checkpoints_change_no_bit_of_the_training(tmp_path) -> None:
    plain = run_campaign(config(capture={"enabled": False}), tmp_path / "plain").run
    busy = config(checkpoint={"every": 1, "ema": 0.5, "samples": 1, "sample_steps": 1})
    other = run_campaign(busy, tmp_path / "busy").run
    (one,), (two,) = (run.path.glob("federations/*/model.safetensors") for run in (plain, other))
    assert one.read_bytes() == two.read_bytes()
    assert losses(plain) == losses(other)


def test_clients_are_not_told_what_only_the_server_needs(tmp_path, monkeypatch) -> None:
    told: list[str] = []
    real = client_app.settings_of

    def listening(message):
        told.append(str(next(iter(message.content.config_records.values()))["fedattack"]))
        return real(message)

    monkeypatch.setattr(client_app, "settings_of", listening)
    first = run_campaign(config(federation={"rounds": 1}), tmp_path / "first").run
    (weights,) = first.path.glob("federations/*/model.safetensors")
    run_campaign(config(federation={"rounds": 1}, model={"weights": str(weights)}), tmp_path / "second")
    assert told
    assert not [text for text in told if str(tmp_path) in text or "sample_steps" in text or "prior" in text]


def test_the_recipe_is_for_training_only_and_takes_faces_of_ones_own(tmp_path) -> None:
    recipe = Path(__file__).resolve().parents[2] / "experiments/recipes/federated-ddpm.toml"
    (cell,) = load_config(recipe).cells
    assert cell.attack == ()
    assert not cell.capture.enabled
    (tmp_path / "faces.npz").write_bytes(b"")
    (cell,) = load_config(recipe, [f"data.dataset=npz:{tmp_path / 'faces.npz'}"]).cells
    assert cell.data.dataset.startswith("npz:")
    with pytest.raises(ConfigError, match="no such file or folder"):
        load_config(recipe, ["data.dataset=npz:nowhere.npz"])


# ------------------------------------------------------------------------------------------------ given weights
def test_training_starts_from_given_weights_and_rows_say_so(tmp_path) -> None:
    first = run_campaign(config(), tmp_path / "first").run
    (checkpoint,) = first.path.glob("federations/*/checkpoints/round-002")
    settings = config(
        model={"weights": str(checkpoint)},
        threat={"model": "everything-known"},
        attack=[{"name": "inverting-gradients", "iterations": 1}],
        federation={"rounds": 1},
    )
    run = run_campaign(settings, tmp_path / "second").run
    (folder,) = (run.path / "federations").iterdir()
    update, _ = load_update(updates_of(run.federation(folder.name))[0])
    trained = read_tensors(checkpoint.parents[1] / "model.safetensors")[0]
    assert update.sent.keys() == trained.keys()
    assert all(torch.equal(update.sent[name], tensor) for name, tensor in trained.items())
    assert losses(run)[0] == losses(first)[-1]
    rows = list(read_rows(run.rows))
    assert {row["weights"] for row in rows} == {str(checkpoint)}
    assert {row["round"] for row in rows} == {1}


def test_changed_weights_train_anew(tmp_path) -> None:
    def classifier(seed=3, weights=""):
        return config(
            seed=seed,
            task={"name": "classification"},
            model={"name": "mlp", "options": {"hidden": [4]}, "weights": weights},
        )

    def trained(settings, name, **options):
        run = run_campaign(settings, tmp_path / name, **options).run
        return next(run.path.glob("federations/*/model.safetensors"))

    weights = trained(classifier(), "first")
    rounds: list[int] = []
    before = digest_of(trained(classifier(weights=str(weights)), "run"))
    options = {"on_round": lambda settings, number, figures: rounds.append(number)}
    assert digest_of(trained(classifier(weights=str(weights)), "run", **options)) == before
    assert rounds == []
    weights.write_bytes(trained(classifier(seed=4), "other").read_bytes())
    assert digest_of(trained(classifier(weights=str(weights)), "run", **options)) != before
    assert rounds == [0, 1, 2]


def test_weights_that_do_not_fit_are_refused(tmp_path) -> None:
    first = run_campaign(config(federation={"rounds": 1}), tmp_path / "first").run
    (checkpoint,) = first.path.glob("federations/*/checkpoints/round-001")
    refused(
        r"model\.weights: schedule .* must be that of the task \(num_train_timesteps = 500.*got \(num_train_timesteps = 1000",
        model={"weights": str(checkpoint)},
        task={"options": {"num_train_timesteps": 500}},
    )
    refused(r"model\.weights: weights must be .* that exists", model={"weights": "no/such/folder"})
    wider = config(model={"weights": str(checkpoint), "options": {**TINY, "block_out_channels": [8, 4]}})
    with pytest.raises(
        FedattackError, match=r"'unet\.conv_in\.weight' must be of shape \(8, 3, 3, 3\), got \(4, 3, 3, 3\)"
    ):
        run_campaign(wider, tmp_path / "wider")


class Short(torch.nn.Module):
    """A model of a user's own, with a learned embedding of 100 timesteps."""

    def __init__(self, image_shape, num_classes):
        super().__init__()
        self.embedding = torch.nn.Embedding(100, 1)

    def forward(self, images, timesteps):
        return images * self.embedding(timesteps)[:, :, None, None]


def test_timesteps_that_the_model_cannot_embed_are_told_before_the_training(tmp_path) -> None:
    own = {"name": f"{__name__}:Short", "options": {}}
    with pytest.raises(
        FedattackError, match=r"num_train_timesteps must be at most the number .* Short embeds, got 1000"
    ):
        run_campaign(config(model=own), tmp_path / "run")
    fitting = {"name": "diffusion", "options": {"num_train_timesteps": 100}}
    assert len(losses(run_campaign(config(model=own, task=fitting), tmp_path / "fits").run)) == 3


# ------------------------------------------------------------------------------------------------ the attacker's prior
def test_the_final_model_becomes_the_attackers_prior_once_training_is_over(tmp_path) -> None:
    attack = [{"name": "inverting-gradients", "iterations": 1}]
    settings = config(
        threat={"prior": ["", "final"], "model": "everything-known"},
        attack=attack,
        checkpoint={"ema": 0.9},
        federation={"clients": 1},
    )
    assert len({cell.federation_id for cell in settings.cells}) == 1
    seen: list[tuple[int, set[str]]] = []

    def jobs() -> list[Job]:
        return [Job.load(path) for path in (tmp_path / "run" / "jobs").glob("*.json")]

    run = run_campaign(
        settings,
        tmp_path / "run",
        on_round=lambda s, n, f: seen.append((n, {load_knowledge(job).prior or "" for job in jobs()})),
    ).run
    assert seen[-1] == (2, {""}), "nothing may be planned before the model is there"
    (final,) = run.path.glob("federations/*/checkpoints/round-002/ema")
    assert sorted(load_knowledge(job).prior or "" for job in jobs()) == ["", "", str(final), str(final)]
    rows = [row for row in read_rows(run.rows) if row["kind"] == "attack"]
    assert sorted(row["prior"] for row in rows) == ["", "", "final", "final"]
    assert all(("prior" in row["knowledge"]) == (row["prior"] == "final") for row in rows)
    assert all("prior" not in row["oracles"] for row in rows)
    assert len({row["job"] for row in rows}) == 4
    DDPMPipeline.from_pretrained(final)


def test_a_prior_may_be_a_folder_or_a_hub_name_and_can_be_hidden(tmp_path) -> None:
    first = run_campaign(config(federation={"clients": 1, "rounds": 1}), tmp_path / "first").run
    (checkpoint,) = first.path.glob("federations/*/checkpoints/round-001")
    (update,) = first.path.glob("federations/*/updates/*")
    attack = [{"name": "inverting-gradients", "iterations": 1}]
    for prior, hide, known in (
        (str(checkpoint), [], str(checkpoint)),
        ("google/ddpm-cifar10-32", [], "google/ddpm-cifar10-32"),
        (str(checkpoint), ["prior"], None),
    ):
        settings = config(threat={"prior": prior, "hide": hide}, attack=attack).cells[0]
        (job,) = plan_jobs(settings, first, update, timeout_seconds=1.0)
        assert load_knowledge(job).prior == known
        assert job.facts["prior"] == (prior if known else "")
        assert ("prior" in job.facts["knowledge"]) == bool(known)
    refused(r"threat\.prior: must be an existing folder, a hub name org/name or 'final'", threat={"prior": "nowhere"})
    refused(r"threat\.prior: must be the folder of a diffusers pipeline", threat={"prior": str(tmp_path)})
    refused(
        r"threat\.prior: the final model of task 'classification' is no DDPM",
        threat={"prior": "final"},
        task={"name": "classification"},
        model={"name": "lenet", "options": {}},
    )


def test_attacks_with_another_prior_at_the_same_place_are_made_again(tmp_path) -> None:
    first = run_campaign(config(federation={"clients": 1, "rounds": 1}), tmp_path / "first").run
    (checkpoint,) = first.path.glob("federations/*/checkpoints/round-001")
    attack = [{"name": "inverting-gradients", "iterations": 1}]
    settings = config(federation={"clients": 1, "rounds": 1}, threat={"prior": str(checkpoint)}, attack=attack)

    def row() -> dict:
        found = read_rows(run_campaign(settings, tmp_path / "run").run.rows)
        return next(row for row in found if row["kind"] == "attack")

    before = row()
    assert row()["finished"] == before["finished"]
    DDPMPipeline(build_model("unet", image_shape=(3, 8, 8), num_classes=None, seed=9, **TINY).unet,
                 Diffusion().scheduler()).save_pretrained(checkpoint)  # fmt: skip
    after = row()
    assert after["job"] == before["job"]
    assert after["finished"] > before["finished"]
    assert after["prior_digest"] == digest_of(checkpoint) != before["prior_digest"]


# ------------------------------------------------------------------------------------------------ bad input
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"beta_schedule": "cosine"},
            r"beta_schedule must be one of laplace, linear, scaled_linear, sigmoid, squaredcos_cap_v2",
        ),
        ({"beta_start": 0.5, "beta_end": 0.1}, r"\(beta_start, beta_end\) must be 0 < beta_start <= beta_end < 1"),
        ({"beta_end": 1.5}, r"beta_end < 1, got \(0\.0001, 1\.5\)"),
        ({"num_train_timesteps": 1}, r"num_train_timesteps must be a whole number of at least 2, got 1"),
        ({"num_train_timesteps": 10.5}, r"num_train_timesteps must be a whole number of at least 2, got 10\.5"),
        ({"prediction_type": "sample"}, r"prediction_type must be one of epsilon, v_prediction"),
        ({"num_timesteps": 10}, r"num_timesteps"),
    ],
)
def test_options_of_the_diffusion_task_are_checked(options, message) -> None:
    refused(r"task\.options: .*" + message, task={"options": options})


def test_contradictions_of_the_checkpoint_section_are_refused() -> None:
    refused(r"checkpoint\.sample_steps: must be at most num_train_timesteps \(20\)",
            task={"options": {"num_train_timesteps": 20}}, checkpoint={"samples": 1})  # fmt: skip
    refused(r"checkpoint\.samples: only a DDPM can draw images",
            task={"name": "classification"}, model={"name": "lenet", "options": {}}, checkpoint={"samples": 1})  # fmt: skip
    refused(r"capture\.enabled: must be true where there are attacks", capture={"enabled": False}, attack=["dlg"])
    refused(r"checkpoint\.ema: .*less than 1", checkpoint={"ema": 1.0})


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"])
def test_every_schedule_of_diffusers_is_taken(schedule: str) -> None:
    from diffusers import DDPMScheduler

    table = config(task={"options": {"beta_schedule": schedule}}).cells[0].task.build().alphas_cumprod
    torch.testing.assert_close(
        table.float(), DDPMScheduler(beta_schedule=schedule).alphas_cumprod, rtol=1e-4, atol=1e-6
    )


@dataclass(frozen=True)
class NeverRuns:
    """An attack that must not be reached."""

    name: ClassVar[str] = "never-runs"
    needs: ClassVar[frozenset[str]] = frozenset()
    tasks: ClassVar[frozenset[str]] = frozenset({"diffusion"})

    def reconstruct(self, update, model, task, knowledge, *, generator, progress=None):
        raise AssertionError("the attack was started")


@pytest.fixture
def attempt(make_update):
    """attempt(change, **knowledge): attack an update of two images that `change` has damaged."""
    model = build_model("unet", image_shape=(3, 4, 4), num_classes=None, seed=0, **TINY)
    images = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    update = make_update(model, images, torch.zeros(2), task=Diffusion(), dtype=torch.float32)
    context = {
        "model": {"name": "unet", "options": TINY},
        "task": {"name": "diffusion", "options": {}},
        "image_shape": [3, 4, 4],
        "num_classes": None,
    }

    def attack(change=lambda update: update, context_changes=None, **known):
        facts = {"image_shape": (3, 4, 4), "batch_size": 2} | known
        generator = torch.Generator().manual_seed(0)
        told = {**context, **(context_changes or {})}
        return attack_update(NeverRuns(), change(update), told, Knowledge(**facts), generator=generator)

    with pytest.raises(AssertionError, match="was started"):
        attack(timesteps=torch.tensor([0, 999]), noise=torch.zeros(2, 3, 4, 4))
    return attack


def _without(state, name):
    return {key: value for key, value in state.items() if key != name}


@pytest.mark.parametrize("part", ["sent", "received"])
def test_an_update_that_does_not_fit_the_model_is_refused_before_any_attack(attempt, part: str) -> None:
    name = "unet.conv_in.weight"

    def damaged(state_of):
        return lambda update: replace(update, **{part: state_of(getattr(update, part))})

    with pytest.raises(
        MalformedUpdate, match=rf"what was {part} must fit .*'{name}' of shape \(4, 3, 3, 3\) is missing"
    ):
        attempt(damaged(lambda state: _without(state, name)))
    with pytest.raises(MalformedUpdate, match=rf"'{name}' must be of shape \(4, 3, 3, 3\), got \(4, 3, 5, 5\)"):
        attempt(damaged(lambda state: {**state, name: torch.zeros(4, 3, 5, 5)}))
    with pytest.raises(MalformedUpdate, match=r"'unet\.deeper' of shape \(2,\) is none of the model's"):
        attempt(damaged(lambda state: {**state, "unet.deeper": torch.zeros(2)}))


def test_a_model_that_is_not_the_updates_is_refused_with_counts(attempt) -> None:
    wider = {"model": {"name": "unet", "options": {**TINY, "block_out_channels": [8, 8]}}}
    with pytest.raises(MalformedUpdate, match=r"must be of shape \(8, 3, 3, 3\), got \(4, 3, 3, 3\).*\(and \d+ more\)"):
        attempt(context_changes=wider)


def test_known_timesteps_and_noise_that_cannot_be_are_refused(attempt) -> None:
    with pytest.raises(FedattackError, match=r"known timesteps must be in 0 … 999 .*got \[5, 1000\]"):
        attempt(timesteps=torch.tensor([5, 1000]))
    with pytest.raises(FedattackError, match=r"known timesteps must be in 0 … 999 .*got \[-1, 3\]"):
        attempt(timesteps=torch.tensor([-1, 3]))
    with pytest.raises(FedattackError, match=r"known timesteps must be in 0 … 99 .*num_train_timesteps is 100"):
        attempt(
            context_changes={"task": {"name": "diffusion", "options": {"num_train_timesteps": 100}}},
            timesteps=torch.tensor([5, 100]),
        )
    with pytest.raises(FedattackError, match=r"number of known timesteps must be 2, one for every image .*got \(3,\)"):
        attempt(timesteps=torch.tensor([1, 2, 3]))
    with pytest.raises(FedattackError, match=r"shape of the known noise must be \(2, 3, 4, 4\), got \(1, 3, 4, 4\)"):
        attempt(noise=torch.zeros(1, 3, 4, 4))
    with pytest.raises(FedattackError, match=r"number of known timesteps must be 6"):
        attempt(timesteps=torch.tensor([1, 2]), local_steps=3, learning_rate=0.1)

"""The whole road in process: from a configuration to a report, interrupted, resumed, extended and broken on the way."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from experiments.campaign import load_run, run_campaign
from fedattack.cli import app
from fedattack.config import Experiment, parse_config
from fedattack.jobs import Job, load_knowledge, outcome_path, reconstruction_path
from fedattack.planning import jobs_of, plan_jobs, read_truth
from fedattack.registry import STRATEGIES
from fedattack.report import markdown_table
from fedattack.scoring import score_run
from fedattack.store import RunFolder, load_reconstruction, load_update, read_rows, save_update

QUICK = {
    "name": "e2e",
    "seed": 3,
    "data": {"options": {"image_size": 16}},
    "federation": {"clients": 2, "rounds": 2, "learning_rate": 0.05},
    "score": {"lpips": [], "floor": "off"},
    "model": {"name": "mlp", "options": {"hidden": [32]}},
    "attack": ["linear-leak"],
}


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def experiment(**changes) -> Experiment:
    return parse_config(QUICK | changes)


def attacks(run: RunFolder) -> list[dict]:
    return [row for row in read_rows(run.rows) if row["kind"] == "attack"]


def test_from_configuration_to_report(tmp_path, one_thread) -> None:
    config = experiment(federation={**QUICK["federation"], "defense": ["none", "gaussian-noise(sigma=0.02)"]})
    summary = run_campaign(config, tmp_path / "run")
    rows = list(read_rows(summary.run.rows))
    assert summary.statuses == {"ok": 8}
    assert len(rows) == 8 + 8 * 3, "every attack row has its three baselines"
    assert [r["attack"] for r in rows[:4]] == ["linear-leak", "mean-image", "nearest-public", "noise"]
    clear = [r["psnr_db"][0] for r in attacks(summary.run) if r["defense"] == "none"]
    noisy = [r["psnr_db"][0] for r in attacks(summary.run) if r["defense"] != "none"]
    assert min(clear) > 60
    assert max(noisy) < min(clear) - 10
    for row in attacks(summary.run):
        assert row["oracles"] == []
        assert "labels" not in row["knowledge"]
        assert row["defense_facts"]["update_rms"] > 0
    noisy_row = next(r for r in attacks(summary.run) if r["defense"] != "none")
    assert noisy_row["defense_facts"]["noise_variance"] == pytest.approx(4e-4)
    page = summary.report.read_text()
    assert "linear-leak" in page
    assert "data:image/png;base64" in page
    assert (tmp_path / "run").stat().st_mode & 0o777 == 0o700
    about = json.loads(summary.run.about.read_text())
    assert about["versions"]["torch"]
    history = list(read_rows(summary.run.path / "history.jsonl"))
    assert {"test_accuracy", "train_loss"} <= {key for line in history for key in line}


def test_runs_are_reproducible_and_a_rerun_changes_nothing(tmp_path, one_thread) -> None:
    first = run_campaign(experiment(), tmp_path / "a")
    rows = list(read_rows(first.run.rows))
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "a").rglob("*") if p.is_file() and "results" in p.parts}
    again = run_campaign(experiment(), tmp_path / "a")
    assert list(read_rows(again.run.rows)) == rows
    assert {p: p.stat().st_mtime_ns for p in stamps} == stamps, "a finished job ran again"
    other = run_campaign(experiment(), tmp_path / "b")
    timeless = {"seconds", "finished"}
    assert [{k: v for k, v in r.items() if k not in timeless} for r in read_rows(other.run.rows)] == [
        {k: v for k, v in r.items() if k not in timeless} for r in rows
    ]


def test_an_interrupted_run_goes_on_where_it_was(tmp_path, one_thread, monkeypatch) -> None:
    import fedattack.jobs
    from strategies import attack_pool

    full = list(read_rows(run_campaign(experiment(), tmp_path / "full").run.rows))
    real, ran = fedattack.jobs.run_job, []

    def dies_at_the_third(job, results, **kwargs):
        if len(ran) == 2:
            raise KeyboardInterrupt
        ran.append(job.job)
        return real(job, results, **kwargs)

    for module in (fedattack.jobs, attack_pool):
        if hasattr(module, "run_job"):
            monkeypatch.setattr(module, "run_job", dies_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        run_campaign(experiment(), tmp_path / "cut")
    monkeypatch.undo()
    assert len(ran) == 2
    summary = run_campaign(experiment(), tmp_path / "cut")
    assert summary.statuses == {"ok": 4}
    scores = [[r["job"], r.get("psnr_db")] for r in read_rows(summary.run.rows)]
    assert scores == [[r["job"], r.get("psnr_db")] for r in full]


def test_a_federation_that_was_cut_off_keeps_attacks_on_the_same_copies_only(tmp_path, one_thread) -> None:
    """Its first round trains again: the copies come out the same, so outcomes stay; a copy that differs loses its outcome."""
    first = run_campaign(experiment(), tmp_path / "run")
    before = {r["job"]: r["finished"] for r in attacks(first.run)}
    (folder,) = (tmp_path / "run" / "federations").iterdir()
    (folder / "done.json").unlink()
    changed = folder / "updates" / "client-1-round-1.safetensors"
    save_update(changed, replace(load_update(changed)[0], num_examples=17), load_update(changed)[1])
    again = run_campaign(experiment(), tmp_path / "run")
    after = {r["job"]: r["finished"] for r in attacks(again.run)}
    assert before.keys() == after.keys()
    assert {job for job in before if before[job] != after[job]} == {job for job in before if "client-1-round-1" in job}


def test_a_new_attack_reuses_the_federation_and_leaves_other_cells_alone(tmp_path, one_thread) -> None:
    before = run_campaign(experiment(), tmp_path / "run")
    updates = {p: p.stat().st_mtime_ns for p in before.run.path.rglob("updates/*.safetensors")}
    old = attacks(before.run)
    after = run_campaign(experiment(attack=["linear-leak", {"name": "idlg", "iterations": 1}]), tmp_path / "run")
    assert {p: p.stat().st_mtime_ns for p in updates} == updates
    assert after.statuses == {"ok": 8}
    assert [r for r in attacks(after.run) if r["attack"] == "linear-leak"] == old


PLUGINS = """
from dataclasses import dataclass, replace
from typing import ClassVar

from attacks.inverting_gradients import InvertingGradients


@dataclass(frozen=True)
class Breaks(InvertingGradients):
    '''An attack of a user's own with a bug in it.'''

    name: ClassVar[str] = "breaks"

    def reconstruct(self, update, model, task, knowledge, *, generator, progress=None):
        return {}["no such key"]


@dataclass(frozen=True)
class TooMany(InvertingGradients):
    '''Gives several guesses for one image, of which a kind scorer would take the best.'''

    name: ClassVar[str] = "too-many"
    iterations: int = 2

    def reconstruct(self, update, model, task, knowledge, *, generator, progress=None):
        found = super().reconstruct(update, model, task, knowledge, generator=generator)
        return replace(found, images=found.images.repeat(3, 1, 1, 1))
"""


ONE = 'found.images[:1], represents="user"'


def test_an_attack_that_gives_more_images_than_the_batch_is_not_scored(tmp_path, one_thread, monkeypatch) -> None:
    (tmp_path / "many_plugins.py").write_text(PLUGINS)
    monkeypatch.syspath_prepend(str(tmp_path))
    config = experiment(model={"name": "lenet"}, attack=["many_plugins:TooMany"])
    rows = attacks(run_campaign(config, tmp_path / "run").run)
    assert {row["status"] for row in rows} == {"failed"}
    assert "3 images for a batch of 1" in rows[0]["error"]
    assert "psnr_db" not in rows[0]


def test_one_image_may_stand_for_a_batch_if_it_says_so(tmp_path, one_thread, monkeypatch) -> None:
    """Scored against every image; the batch's mean, which bounds it, stands beside it in that cell only."""
    (tmp_path / "single_plugins.py").write_text(PLUGINS.replace("found.images.repeat(3, 1, 1, 1)", ONE))
    monkeypatch.syspath_prepend(str(tmp_path))
    config = experiment(
        model={"name": "lenet"},
        federation={**QUICK["federation"], "rounds": 1, "batch_size": 3},
        case=[
            {"title": "one", "attack": ["single_plugins:TooMany", "dlg(iterations=1)"]},
            {"title": "each", "attack": ["dlg(iterations=1)"]},
        ],
    )
    run = run_campaign(config, tmp_path / "run").run
    rows = list(read_rows(run.rows))
    one = next(row for row in rows if row["attack"] == "single_plugins:TooMany")
    assert (one["status"], one["represents"]) == ("ok", "user")
    assert len(one["psnr_db"]) == 3
    assert len(one["images"]["truth"]) == 3
    assert len(one["images"]["reconstruction"]) == 1
    assert one["representative"]["nearest_psnr_db"] == pytest.approx(max(one["psnr_db"]))
    bounds = [row for row in rows if row["attack"] == "batch-mean"]
    assert {row["case"] for row in bounds} == {"one"}
    assert bounds[0]["kind"] == "baseline"
    assert sum(bounds[0]["mse"]) < sum(one["mse"])
    joint = [row for row in rows if row["attack"] == "dlg"]
    assert all("represents" not in row and "representative" not in row for row in joint)


def test_editing_an_attack_of_ones_own_runs_it_again(tmp_path, one_thread, monkeypatch) -> None:
    plugin = tmp_path / "edited_plugins.py"
    plugin.write_text(PLUGINS)
    monkeypatch.syspath_prepend(str(tmp_path))
    config = experiment(model={"name": "lenet"}, attack=["edited_plugins:Breaks"])
    first = {row["job"] for row in attacks(run_campaign(config, tmp_path / "run").run)}
    plugin.write_text(PLUGINS + "# mended")
    second = {row["job"] for row in attacks(run_campaign(config, tmp_path / "run").run)}
    assert not first & second


@pytest.mark.parametrize("strategy", sorted(set(STRATEGIES.names()) - {"fedsgd"}))
def test_every_named_strategy_runs_and_is_reproducible(strategy: str, tmp_path, one_thread) -> None:
    needed = {"noise_multiplier": 0.1, "clipping_norm": 1.0}
    options = {key: value for key, value in needed.items() if STRATEGIES.parameters(strategy).get(key) is ...}
    mods = {"dp-client-fixed": ["fixedclipping"], "dp-client-adaptive": ["adaptiveclipping"]}.get(strategy, [])
    federation = {"clients": 4, "rounds": 2, "protocol": "fedavg", "strategy": strategy, "strategy_options": options}
    config = experiment(federation=federation | {"mods": mods})
    runs = [run_campaign(config, tmp_path / name).run for name in ("a", "b")]
    found = [[(row["client"], row["round"], row["psnr_db"]) for row in attacks(run)] for run in runs]
    assert len(found[0]) == 8
    assert found[0] == found[1], "Flower's own noise and sampling must follow the run's seed"


def test_capture_selects_rounds_of_a_secret_aggregate_too(tmp_path, one_thread) -> None:
    config = experiment(
        model={"name": "lenet"},
        federation={"clients": 3, "rounds": 2, "protocol": "fedavg", "mods": ["secaggplus"]},
        capture={"rounds": [2]},
        attack=[{"name": "inverting-gradients", "iterations": 1}],
    )
    rows = attacks(run_campaign(config, tmp_path / "run").run)
    assert [(row["client"], row["round"]) for row in rows] == [("aggregate", 2)]


def test_baselines_follow_the_public_images_of_their_own_case(tmp_path, one_thread) -> None:
    config = experiment(threat={"public_images": [3, 150]}, federation={"clients": 1, "rounds": 1})
    rows = list(read_rows(run_campaign(config, tmp_path / "run").run.rows))
    nearest = [row["psnr_db"][0] for row in rows if row["attack"] == "nearest-public"]
    assert nearest[0] < nearest[1], "three public images cannot be as near as a hundred and fifty"


def test_an_oracle_left_behind_is_given_to_nobody(tmp_path, one_thread) -> None:
    """A knowledge file of an earlier run is no knowledge: where no truth is there to reveal, the job gets none."""
    config = experiment(threat={"model": "labels-known"}, federation={"clients": 1, "rounds": 1})
    run = run_campaign(config, tmp_path / "run").run
    (update,) = run.path.glob("federations/*/updates/*.safetensors")
    (told,) = plan_jobs(config.cells[0], run, update, timeout_seconds=1.0)
    assert load_knowledge(told).labels is not None
    for truth in run.path.glob("federations/*/truth/*"):
        truth.unlink()
    (job,) = plan_jobs(config.cells[0], run, update, timeout_seconds=1.0)
    assert load_knowledge(job).labels is None
    assert job.facts["oracles"] == []


def test_public_images_are_as_many_as_the_row_says(tmp_path, one_thread) -> None:
    config = experiment(threat={"public_images": [5, 50]}, federation={"clients": 1, "rounds": 1})
    run = run_campaign(config, tmp_path / "run").run
    jobs = [Job.load(run.jobs / f"{row['job']}.json") for row in attacks(run)]
    assert [len(load_knowledge(job).public_images) for job in jobs] == [5, 50]


def test_what_has_not_run_is_in_the_report(tmp_path, one_thread) -> None:
    run = run_campaign(experiment(), tmp_path / "run").run
    gone = attacks(run)[1]["job"]
    outcome_path(run.results, gone).unlink()
    rows = score_run(run, experiment())
    (row,) = [row for row in rows if row.get("job") == gone]
    assert row["status"] == "pending"
    assert sum(r["status"] == "ok" and r["kind"] == "attack" for r in rows) == 3


def test_a_federation_whose_clients_all_fail_says_so(tmp_path, one_thread) -> None:
    summary = run_campaign(experiment(federation={"clients": 9999, "rounds": 1}), tmp_path / "run")
    assert summary.statuses == {"failed": 1}
    assert "no update was copied" in attacks(summary.run)[0]["error"]
    assert "no update was copied" in summary.report.read_text()


def test_failures_stay_as_rows_with_their_reason_and_are_retried_on_request(tmp_path, one_thread, monkeypatch) -> None:
    (tmp_path / "broken_plugins.py").write_text(PLUGINS)
    monkeypatch.syspath_prepend(str(tmp_path))
    config = experiment(model={"name": "lenet"}, attack=["linear-leak", "broken_plugins:Breaks"])
    summary = run_campaign(config, tmp_path / "run")
    assert summary.statuses == {"not-applicable": 4, "failed": 4}
    reasons = {r["status"]: r["error"] for r in attacks(summary.run)}
    assert "no dense layer with a bias sees the image" in reasons["not-applicable"]
    assert "KeyError: 'no such key'" in reasons["failed"]
    page = summary.report.read_text()
    assert "no dense layer with a bias sees the image" in page
    first = {r["job"]: r["finished"] for r in attacks(summary.run)}
    kept = run_campaign(config, tmp_path / "run")
    assert {r["job"]: r["finished"] for r in attacks(kept.run)} == first
    retried = run_campaign(config, tmp_path / "run", retry_failed=True)
    assert {r["status"] for r in attacks(retried.run) if r["finished"] != first[r["job"]]} == {"failed"}


def test_oracles_are_named_in_every_row(tmp_path, one_thread) -> None:
    config = experiment(
        threat={"model": "labels-known", "hide": ["public_images"]},
        attack=[{"name": "dlg", "iterations": 1}],
        model={"name": "lenet"},
    )
    summary = run_campaign(config, tmp_path / "run")
    for row in attacks(summary.run):
        assert row["oracles"] == ["labels"]
        assert "labels" in row["knowledge"]
        assert "public_images" not in row["knowledge"]


def test_fedavg_with_several_local_steps(tmp_path, one_thread) -> None:
    config = experiment(
        model={"name": "convnet-small", "options": {"width": 8, "activation": "sigmoid"}},
        federation={"clients": 1, "rounds": 1, "protocol": "fedavg", "batch_size": 2, "local_steps": 3, "examples": 4},
        attack=[{"name": "inverting-gradients", "iterations": 20}],
    )
    summary = run_campaign(config, tmp_path / "run")
    (row,) = attacks(summary.run)
    assert row["status"] == "ok", row["error"]
    assert len(row["psnr_db"]) == 4
    assert row["losses"][-1] < row["losses"][0]


def test_a_diffusion_federation_is_attacked_too(tmp_path, one_thread) -> None:
    config = experiment(
        data={"options": {"image_size": 16}},
        model={"name": "unet", "options": {"block_out_channels": [8, 8], "norm_num_groups": 4}},
        task={"name": "diffusion"},
        federation={"clients": 2, "rounds": 1},
        threat={"model": "everything-known"},
        attack=[{"name": "inverting-gradients", "iterations": 5}],
    )
    summary = run_campaign(config, tmp_path / "run")
    for row in attacks(summary.run):
        assert row["status"] == "ok", row["error"]
        assert set(row["oracles"]) >= {"noise", "timesteps"}


def test_timesteps_are_told_in_rows_report_and_on_the_command_line(tmp_path, one_thread) -> None:
    """A batch of two: found without noise; the share stands beside every attack that says what t was."""
    config = experiment(
        data={"options": {"image_size": 8}},
        model={"name": "unet", "options": {"block_out_channels": [16], "attention": [], "mid_attention": False}},
        task={"name": "diffusion"},
        federation={"clients": 2, "rounds": 1, "batch_size": 2},
        score={"lpips": [], "floor": "off", "recognise": ["face"]},
        attack=["timestep-leak", {"name": "inverting-gradients", "iterations": 2}],
    )
    summary = run_campaign(config, tmp_path / "run")
    run = summary.run
    rows = attacks(run)
    assert [row["attack"] for row in rows] == ["timestep-leak", "inverting-gradients"] * 2
    for row in rows:
        truth = read_truth(run.federation(row["federation"]), next(iter(updates_of(run, row))))
        assert row["timestep_accuracy"] == 1.0
        assert sorted(row["timesteps_found"]) == sorted(truth["timesteps"].tolist())
    leak = rows[0]
    assert leak["psnr_db"] is None
    assert leak["images"]["reconstruction"] == [None, None]
    assert leak["diagnostics"]["exact"] == 1.0
    assert leak["missing"]["recognise face"] == leak["missing"]["psnr_db"]
    posterior = load_reconstruction(reconstruction_path(run.results, leak["job"])).timestep_posterior
    assert posterior.argmax(1).tolist() == leak["timesteps_found"]
    page = summary.report.read_text()
    assert "timesteps only: 100 % found" in page
    assert "Timesteps<small>found</small>" in page
    table = markdown_table(read_rows(run.rows))
    head, line = table.splitlines()[0].split(" | "), next(li for li in table.splitlines() if "timestep-leak" in li)
    assert line.split(" | ")[head.index("timesteps found")] == "100 %"

    update = next(iter(updates_of(run, leak)))
    truth = run.federation(leak["federation"]).truth / update.name
    command = ["attack", str(update), "-a", "timestep-leak", "-k", "batch_size=2", "-o", str(tmp_path / "out")]
    done = CliRunner().invoke(app, [*command, "--truth", str(truth)])
    assert done.exit_code == 0, done.output
    assert "timestep-leak: timesteps only" in done.output
    assert f"t: {', '.join(map(str, leak['timesteps_found']))}" in done.output
    assert "timesteps found: 100 %" in done.output
    assert not list((tmp_path / "out").glob("*.png"))
    known = CliRunner().invoke(app, [*command, "-k", "timesteps=[1, 2]"])
    assert known.exit_code == 1
    assert "known already" in known.output


def updates_of(run: RunFolder, row: dict) -> list[Path]:
    return list(run.federation(row["federation"]).updates.glob(f"{row['client']}-round-{row['round']}.safetensors"))


def test_given_timesteps_are_not_counted_and_classifiers_have_no_such_column(tmp_path, one_thread) -> None:
    config = experiment(
        data={"options": {"image_size": 8}},
        model={"name": "unet", "options": {"block_out_channels": [8], "attention": [], "norm_num_groups": 4}},
        task={"name": "diffusion"},
        federation={"clients": 1, "rounds": 1},
        threat={"model": "everything-known"},
        attack=["timestep-leak", {"name": "inverting-gradients", "iterations": 2}],
    )
    run = run_campaign(config, tmp_path / "diffusion").run
    leak, given = attacks(run)
    assert leak["status"] == "not-applicable"
    assert given["timestep_accuracy"] is None
    assert given["missing"]["timestep_accuracy"] == "the timesteps were given"
    assert "timesteps_found" not in given
    assert "timesteps found" not in markdown_table(read_rows(run.rows))
    classifier = run_campaign(experiment(), tmp_path / "classifier")
    assert "imesteps<" not in classifier.report.read_text()
    assert "timesteps found" not in markdown_table(read_rows(classifier.run.rows))
    assert not any("timestep" in key for row in read_rows(classifier.run.rows) for key in {**row, **row["missing"]})


def test_secure_aggregation_leaves_one_update_a_round(tmp_path, one_thread) -> None:
    config = experiment(
        model={"name": "lenet"},
        federation={"clients": 4, "rounds": 2, "protocol": "fedavg", "mods": ["secaggplus"], "learning_rate": 0.1},
        attack=[{"name": "inverting-gradients", "iterations": 5}],
    )
    summary = run_campaign(config, tmp_path / "run")
    rows = attacks(summary.run)
    assert [(r["client"], r["round"]) for r in rows] == [("aggregate", 1), ("aggregate", 2)]
    assert all(len(r["psnr_db"]) == 4 for r in rows), "the truth of an aggregate is that of all its clients"


def test_a_run_folder_knows_its_own_configuration(tmp_path, one_thread) -> None:
    config = experiment(federation={**QUICK["federation"], "rounds": 1})
    run = run_campaign(config, tmp_path / "run").run
    again = load_run(run.path)
    assert again.cells == config.cells
    assert [job for cell in again.cells for _, job in jobs_of(cell, run)] == [r["job"] for r in attacks(run)]

"""Controls of attacks that an update leads, and a prior that was trained on the very images under attack: both are said."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from attacks.gg_cdm import GGCDM
from experiments.campaign import run_campaign
from fedattack.config import UNRELATED, ConfigError, controls_left_out, load_config, parse_config, to_toml
from fedattack.data import load_dataset
from fedattack.jobs import Job
from fedattack.metrics import psnr_db
from fedattack.planning import job_id
from fedattack.prior_training import PriorSettings, train_prior
from fedattack.registry import format_spec
from fedattack.scoring import SCORED, score_run
from fedattack.store import (
    RunFolder,
    load_reconstruction,
    read_json,
    read_rows,
    read_tensors,
    save_reconstruction,
    write_json,
)
from fedattack.types import Control

SETTINGS = {"guidance": "posterior", "sampling_steps": 4, "linearisations": 1}


@pytest.fixture(scope="module")
def prior(tmp_path_factory):
    """Trained on the clients' own images: no attacker would have it."""
    folder = tmp_path_factory.mktemp("priors") / "overlapping"
    settings = PriorSettings("patches", split="private", size=8, channels=(8, 16), steps=2, batch=4, timesteps=20)
    train_prior(settings, folder, samples=0)
    return folder


def config(prior, **changes):
    raw = {
        "name": "controls",
        "data": {"options": {"image_size": 8}},
        "federation": {"clients": 3, "rounds": 1},
        "score": {"lpips": [], "floor": "off"},
        "model": {"name": "mlp", "options": {"hidden": [16], "activation": "sigmoid"}},
        "threat": {"prior": str(prior)},
        "attack": [{"name": "gg-cdm", "controls": True, **SETTINGS}],
    }
    return parse_config(raw | changes)


@pytest.fixture(scope="module")
def finished(prior, tmp_path_factory):
    """(run, rows, page) of three clients that are attacked with controls, gradient matching cut short."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    made = config(prior)
    *attacks, matching, statistical = made.cells[0].attack
    short = type(matching)(**matching.model_dump() | {"iterations": 4})
    attacks += [short, statistical]
    made = made.model_copy(update={"cells": (made.cells[0].model_copy(update={"attack": tuple(attacks)}),)})
    summary = run_campaign(made, tmp_path_factory.mktemp("runs") / "run")
    torch.set_num_threads(threads)
    return summary.run, list(read_rows(summary.run.rows)), summary.report.read_text()


def test_one_setting_adds_both_controls_and_survives_a_round_trip(prior, tmp_path):
    made = config(prior)
    (cell,) = made.cells
    assert [(attack.shown, attack.parameters) for attack in cell.attack] == [
        ("gg-cdm", SETTINGS),
        ("gg-cdm, prior-alone", {"sampling_steps": 4, "guidance": "none"}),
        ("gg-cdm, unrelated-update", SETTINGS),
        ("linear-leak", {}),
        ("inverting-gradients", {}),
        ("gaussian-map", {}),
    ]
    of = format_spec("gg-cdm", SETTINGS)
    assert [attack.control_of for attack in cell.attack] == [(), *[(of,)] * 5]
    (tmp_path / "c.toml").write_text(to_toml(made))
    assert load_config(tmp_path / "c.toml").cells == made.cells
    assert len(config(prior, attack=[{"name": "gg-cdm", "controls": False}]).cells[0].attack) == 1


def test_controls_are_the_default_and_equal_ones_run_once(prior, tmp_path):
    """Three guidances in two chains: two priors alone, three other updates; `linear-leak` is listed, so it is not added."""
    attacks = [
        {"name": "gg-cdm", "sampling_steps": 4},
        "linear-leak",
        {"name": "gg-cdm", "sampling_steps": 4, "guidance": "dps", "eta": 1.0},
        {"name": "gg-cdm", "sampling_steps": 2, "restarts": 2, "guidance": "dps"},
        {"name": "gg-cdm", "sampling_steps": 3, "controls": False},
        {"name": "dlg", "iterations": 2},
    ]
    (cell,) = config(prior, attack=attacks).cells
    assert [attack.control for attack in cell.attack] == [
        *[""] * 6,
        "prior-alone", "unrelated-update", "peer", "peer", "unrelated-update", "prior-alone", "unrelated-update",
    ]  # fmt: skip
    first, leak, second, third = (cell.attack[number] for number in (0, 1, 2, 3))
    alone, _, peer, statistical, *_, other_alone, _ = cell.attack[6:]
    assert statistical.spec == "gaussian-map"
    assert leak.control_of == peer.control_of == statistical.control_of == (first.spec, second.spec, third.spec)
    assert peer.spec == "inverting-gradients(iterations=4)"
    assert alone.control_of == (first.spec, second.spec)
    assert other_alone.control_of == (third.spec,)
    (tmp_path / "c.toml").write_text(to_toml(config(prior, attack=attacks)))
    assert load_config(tmp_path / "c.toml").cells == (cell,)


def test_a_run_that_was_resolved_without_controls_gets_none_afterwards(prior):
    """Its folder says control = "": a report of it must not list jobs that were never planned."""
    (cell,) = config(prior, attack=[{"name": "gg-cdm", "control": "", **SETTINGS}]).cells
    assert [attack.control for attack in cell.attack] == [""]


def test_jobs_without_controls_keep_their_names(prior):
    """What is attacked how decides, not what stands beside it: nothing is attacked twice because of a control."""
    path = Path("client-0-round-1.safetensors")

    def jobs(attacks):
        (cell,) = config(prior, attack=attacks).cells
        return {attack.shown: job_id(cell, path, attack) for attack in cell.attack}

    bare = jobs([{"name": "gg-cdm", "controls": False, **SETTINGS}, "linear-leak"])
    full = jobs([{"name": "gg-cdm", **SETTINGS}])
    assert {name: full[name] for name in bare} == bare
    assert len(set(full.values())) == 6


@pytest.mark.parametrize(
    "changes",
    [
        {"federation": {"clients": 1, "rounds": 1}},
        {"capture": {"clients": [1]}},
        {"federation": {"clients": 2, "rounds": 1, "protocol": "fedavg", "mods": ["secaggplus"]}},
    ],
    ids=["one client", "one copied", "secure aggregation"],
)
def test_by_default_a_control_that_cannot_be_is_left_out_and_said(prior, changes):
    (cell,) = config(prior, attack=[{"name": "gg-cdm", **SETTINGS}], **changes).cells
    assert [attack.control for attack in cell.attack] == ["", "prior-alone", "peer", "peer", "peer"]
    ((kind, reason),) = controls_left_out(cell, cell.attack[0]).items()
    assert kind == UNRELATED
    assert "controls" in reason
    (bare,) = config(prior, attack=[{"name": "gg-cdm", "controls": False, **SETTINGS}]).cells
    peers = ("linear-leak", "inverting-gradients", "gaussian-map")
    left_out = dict.fromkeys(("prior-alone", UNRELATED, *peers), "controls = false")
    assert controls_left_out(bare, bare.attack[0]) == left_out


def test_controls_that_cannot_be_are_refused(prior):
    with pytest.raises(ConfigError, match="controls need another client's update"):
        config(prior, federation={"clients": 1, "rounds": 1})
    with pytest.raises(ConfigError, match=r"config: capture\.clients: must name at least two .* \(controls\)"):
        config(prior, capture={"clients": [0, 7]})
    with pytest.raises(ConfigError, match=r"config: federation\.mods: must be without secaggplus .* \(controls\)"):
        config(prior, federation={"clients": 3, "rounds": 1, "protocol": "fedavg", "mods": ["secaggplus"]})
    assert len(config(prior, capture={"clients": [0, 2]}).cells[0].attack) == 6
    for bare in ({"name": "dlg"}, {"name": "gg-cdm", "guidance": "none"}):
        with pytest.raises(ConfigError, match=rf"attack\[0\]: {bare['name']} names no controls with these settings"):
            config(prior, attack=[{**bare, "controls": True}])


@pytest.mark.parametrize("written", ["yes", 1, 0])
def test_only_true_and_false_say_something_of_controls(prior, written):
    with pytest.raises(ConfigError, match=r"attack\.0\.controls: Input should be a valid boolean"):
        config(prior, attack=[{"name": "gg-cdm", "controls": written}])


@pytest.mark.parametrize("asked", [{}, {"controls": True}], ids=["by default", "asked"])
def test_what_is_wrong_with_controls_is_listed_with_all_else(prior, monkeypatch, asked):
    """An unknown peer, wrong parameters of another, an error of the attack's own; without controls none of them matters."""
    bad = {"name": "gg-cdm", **asked}
    others = [{"name": "dlg", "no_such": 1}]
    peers = (Control("peer", "linear-leek", {}), Control("peer", "linear-leak", {"agremeent": 1.0}))
    monkeypatch.setattr(GGCDM, "controls", lambda _: peers)
    with pytest.raises(ConfigError) as found:
        config(prior, attack=[bad, *others])
    listed = str(found.value).splitlines()
    assert len(listed) == 3
    assert "config: attack[0]: controls of gg-cdm: attack must be" in listed[0]
    assert "did you mean 'linear-leak'" in listed[0]
    assert "attack[1]: unknown parameter 'no_such'" in listed[1]
    assert "attack[2]: unknown parameter 'agremeent'" in listed[2]
    (cell,) = config(prior, attack=[{"name": "gg-cdm", "controls": False}]).cells
    assert controls_left_out(cell, cell.attack[0]) == {"linear-leak": "controls = false"}

    def broken(_):
        raise KeyError("no such table")

    monkeypatch.setattr(GGCDM, "controls", broken)
    with pytest.raises(ConfigError) as found:
        config(prior, attack=[bad, *others])
    assert "config: attack[0]: controls of gg-cdm: KeyError: 'no such table'" in str(found.value).splitlines()
    assert "attack[1]: unknown parameter 'no_such'" in str(found.value)
    assert len(config(prior, attack=[{"name": "gg-cdm", "controls": False}]).cells[0].attack) == 1


def test_every_update_has_both_controls_as_baselines(finished):
    _, rows, page = finished
    kinds = {(row["attack"], row["kind"], row["status"]) for row in rows if row["attack"].startswith("gg-cdm")}
    names = ("gg-cdm, prior-alone", "gg-cdm, unrelated-update")
    assert kinds == {("gg-cdm", "attack", "ok"), *((name, "baseline", "ok") for name in names)}
    for name in ("gg-cdm", *names):
        assert sorted(row["client"] for row in rows if row["attack"] == name) == ["client-0", "client-1", "client-2"]
        assert name in page
    mean = {name: sum(row["psnr_db"][0] for row in rows if row["attack"] == name) / 3 for name in ("gg-cdm", *names)}
    assert mean["gg-cdm"] > 60.0
    assert max(mean[name] for name in names) < 25.0


def test_rows_say_what_they_are_controls_of(finished):
    """Other attacks on the same update are attacks, not yardsticks; the analytic estimate is exact where the net is dense."""
    _, rows, page = finished
    of = [format_spec("gg-cdm", SETTINGS)]
    told = {(row["attack"], row["kind"], row.get("control")) for row in rows if row.get("control_of") == of}
    assert told == {
        ("gg-cdm, prior-alone", "baseline", "prior-alone"),
        ("gg-cdm, unrelated-update", "baseline", "unrelated-update"),
        ("linear-leak", "attack", "peer"),
        ("inverting-gradients", "attack", "peer"),
        ("gaussian-map", "attack", "peer"),
    }
    assert min(row["psnr_db"][0] for row in rows if row["attack"] == "linear-leak") > 60.0
    left_out = {row["attack"]: row["controls_left_out"] for row in rows if "controls_left_out" in row}
    assert left_out == {"gg-cdm": {"inverting-gradients": "not planned in this run"}}  # that one was cut short
    assert "control of gg-cdm" in page


def test_the_way_is_scored_and_shown(finished):
    run, rows, page = finished
    for row in (row for row in rows if row["attack"] == "gg-cdm"):
        way = row["trajectory"]
        assert way["steps"] == [0, 1, 2, 3, 4]
        assert way["psnr_db"][-1] == row["psnr_db"]
        assert way["ssim"][-1] == row["ssim"] if "ssim" in way else "ssim" in row["missing"]
        found = load_reconstruction(run.results / row["job"] / "reconstruction.safetensors")
        truth = read_tensors(run.federation(row["federation"]).truth / f"{row['client']}-round-1.safetensors")[0][
            "images"
        ]
        assert found.trajectory is not None
        for images, psnr in zip(found.trajectory, way["psnr_db"], strict=True):
            assert psnr == pytest.approx(psnr_db(images, truth).tolist())
        assert all((run.path / path).is_file() for path in way["images"])
    assert "image 1 on its way, by step" in page
    assert ">PSNR, dB<small>mean of 3 jobs, taken at 5 of the steps up to 4</small>" in page
    assert (">SSIM<small>mean of" in page) == any("ssim" in row.get("trajectory", {}) for row in rows)


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (
            {"trajectory": torch.rand(5, 1, 3, 7, 8)},
            r"trajectory must be images .*\(1, 3, 8, 8\), got .*\(5, 1, 3, 7, 8\)",
        ),
        ({"trajectory": torch.rand(5, 8, 8)}, "trajectory must be images"),
        ({"trajectory": torch.ones(5, 1, 3, 8, 8, dtype=torch.uint8)}, "trajectory must be floating-point"),
        ({"trajectory": torch.full((5, 1, 3, 8, 8), torch.nan)}, r"trajectory must be in \[0, 1\]"),
        ({"trajectory": torch.full((5, 1, 3, 8, 8), 255.0)}, r"trajectory must be in \[0, 1\]"),
        ({"trajectory": torch.rand(0, 1, 3, 8, 8), "trajectory_steps": ()}, "trajectory must be images"),
        ({"trajectory_steps": (0, 4)}, "trajectory_steps must be 5 numbers, one for each of its images, got 2"),
    ],
)
def test_a_malformed_way_costs_no_scores(finished, tmp_path, broken, reason):
    """It is left out and said why; everything else of the row, and all other rows, are as they were."""
    run = RunFolder(shutil.copytree(finished[0].path, tmp_path / "run"))
    before = {row["job"]: row for row in finished[1] if row["kind"] == "attack" and "trajectory" in row}
    job, whole = next(iter(before.items()))
    path = run.results / job / "reconstruction.safetensors"
    save_reconstruction(path, replace(load_reconstruction(path), **broken))
    (run.scores / f"{job}.json").unlink()
    score_run(run, load_config(run.config))
    after = {row.get("job"): row for row in read_rows(run.rows)}
    assert re.match(reason, after[job]["missing"].pop("trajectory"))
    assert after[job] == {name: value for name, value in whole.items() if name != "trajectory"}
    assert all(after[other] == row for other, row in before.items() if other != job)


def test_scores_that_an_earlier_version_kept_are_taken_again(finished, tmp_path):
    """They lack what it did not know of; those of this version are kept as they are."""
    run = RunFolder(shutil.copytree(finished[0].path, tmp_path / "run"))
    job, other = [row["job"] for row in finished[1] if row["kind"] == "attack" and row["status"] == "ok"][:2]
    for name, version in ((job, {}), (other, {"scored": SCORED})):
        kept = read_json(run.scores / f"{name}.json")
        kept.pop("scored")
        write_json(run.scores / f"{name}.json", {**kept, **version, "psnr_db": [-1.0]})
    score_run(run, load_config(run.config))
    after = {row["job"]: row["psnr_db"] for row in read_rows(run.rows) if row.get("job") in (job, other)}
    assert after[other] == [-1.0]
    assert after[job] != [-1.0]


def test_the_unrelated_update_is_another_clients_of_the_same_round(finished):
    """What the control shows is that other client's image, scored against the target's truth."""
    run, rows, _ = finished
    for row in (row for row in rows if row["attack"] == f"gg-cdm, {UNRELATED}"):
        job = Job.load(run.jobs / f"{row['job']}.json")
        other = job.update.rpartition("/")[2]
        assert other != f"{row['client']}-round-1.safetensors"
        assert other.endswith("-round-1.safetensors")
        truth = read_tensors(run.federation(row["federation"]).truth / other)[0]["images"]
        found = load_reconstruction(run.results / row["job"] / "reconstruction.safetensors")
        assert float(psnr_db(found.images, truth)) > 60.0


def test_a_control_without_a_second_update_is_not_applicable(finished, tmp_path):
    """Not pending, once the federation has ended: no further start of the run brings the update that is lacking."""
    run = RunFolder(shutil.copytree(finished[0].path, tmp_path / "run"))
    experiment = load_config(run.config)
    folder = run.federation(experiment.cells[0].federation_id)
    for client in (1, 2):
        (folder.updates / f"client-{client}-round-1.safetensors").unlink()
    shutil.rmtree(run.results)
    controls = [row for row in score_run(run, experiment) if row.get("attack") == f"gg-cdm, {UNRELATED}"]
    assert [(row["client"], row["status"]) for row in controls] == [("client-0", "not-applicable")]
    assert "no other client's update of this round" in controls[0]["error"]
    folder.done.unlink()
    statuses = {row["attack"]: row["status"] for row in score_run(run, experiment) if "attack" in row}
    assert statuses[f"gg-cdm, {UNRELATED}"] == statuses["gg-cdm"] == "pending"


def test_a_prior_that_saw_the_attacked_images_is_reported(finished, prior):
    _, rows, page = finished
    for row in (row for row in rows if row["attack"] == "gg-cdm"):
        assert row["prior_data"]["split"] == "private"
        assert row["prior_data"]["steps"] == 2
        assert row["prior_overlap"]["same"] == row["prior_overlap"]["compared"] == 1
    assert "3 of 3 attacked images are among its training images" in page
    assert f"Prior {prior}: dataset patches, split private" in page


def test_a_prior_kept_apart_is_reported_too(tmp_path):
    settings = PriorSettings("patches", size=8, channels=(8, 16), steps=2, batch=4, timesteps=20)
    train_prior(settings, tmp_path / "prior", samples=0)
    federation = {"clients": 2, "rounds": 1}
    attack = [{"name": "gg-cdm", "controls": False, **SETTINGS}]
    summary = run_campaign(config(tmp_path / "prior", federation=federation, attack=attack), tmp_path / "run")
    rows = [row for row in read_rows(summary.run.rows) if row["attack"] == "gg-cdm"]
    assert [row["prior_overlap"]["same"] for row in rows] == [0, 0]
    assert [len(row["controls_left_out"]) for row in rows] == [5, 5]
    assert rows[0]["prior_data"]["images"] == len(load_dataset("patches", image_size=8).public)
    assert "0 of 2 attacked images are among its training images" in summary.report.read_text()

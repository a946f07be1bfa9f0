"""Several updates of the same images: which copies a job names, and that they reach the attack."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from typer.testing import CliRunner

from experiments.campaign import run_campaign
from fedattack.cli import app
from fedattack.config import parse_config
from fedattack.errors import NotApplicable
from fedattack.flooring import Protection, target_of
from fedattack.jobs import Job, load_knowledge
from fedattack.planning import earlier_updates, updates_of
from fedattack.store import RunFolder, load_update, read_rows, save_update
from fedattack.types import Reconstruction, Update

CONFIG = {
    "data": {"dataset": "patches", "options": {"image_size": 8}},
    "model": {"name": "mlp", "options": {"hidden": [8]}},
    "federation": {"clients": 2, "rounds": 3, "same_examples": True, "learning_rate": 0.05},
    "threat": {"history": 2},
    "score": {"lpips": [], "floor": "off"},
    "attack": ["test_history:Counting"],
}


@dataclass(frozen=True)
class Counting:
    """Says how many further updates it was given."""

    name: ClassVar[str] = "counting"
    needs: ClassVar[frozenset[str]] = frozenset({"image_shape", "batch_size"})
    tasks: ClassVar[frozenset[str]] = frozenset({"classification"})

    def reconstruct(self, update, model, task, knowledge, *, generator, progress=None) -> Reconstruction:
        seen = knowledge.history or ()
        assert all(other.client == update.client and other.round < update.round for other in seen)
        images = torch.full((knowledge.batch_size, *knowledge.image_shape), 0.5)
        return Reconstruction(images=images, diagnostics={"seen": float(len(seen))})


def test_a_job_names_the_earlier_copies_of_its_client(tmp_path):
    updates = {}
    for client in ("client-0", "client-1"):
        for number in (1, 2, 4):
            update = Update(number, client, {"w": torch.ones(2)}, {"w": torch.ones(2)}, "gradient", 1)
            updates[client, number] = tmp_path / f"{client}-round-{number}.safetensors"
            save_update(updates[client, number], update)
    last = load_update(updates["client-0", 4])[0]
    path = updates["client-0", 4]
    assert earlier_updates(path, last, 0) == []
    assert earlier_updates(path, last, 1) == [updates["client-0", 2]]
    assert earlier_updates(path, last, 9) == [updates["client-0", 2], updates["client-0", 1]]


def test_the_history_reaches_the_attack_and_the_row(tmp_path: Path):
    summary = run_campaign(parse_config(CONFIG), tmp_path / "run")
    rows = [row for row in read_rows(summary.run.rows) if row["kind"] == "attack"]
    assert {(row["round"], row["diagnostics"]["seen"]) for row in rows} == {(1, 0.0), (2, 1.0), (3, 2.0)}
    assert all(("history" in row["knowledge"]) == (row["round"] > 1) for row in rows)
    hidden = parse_config(CONFIG | {"threat": {"history": 2, "hide": ["history"]}})
    summary = run_campaign(hidden, tmp_path / "hidden")
    assert all(row["diagnostics"]["seen"] == 0 for row in read_rows(summary.run.rows) if row["kind"] == "attack")


def floors_of(wanted, folder: Path) -> dict[tuple[str, int], dict]:
    """By client and round."""
    rows = [row for row in read_rows(run_campaign(wanted, folder).run.rows) if row["kind"] == "attack"]
    return {(row["client"], row["round"]): row["floor"] for row in rows}


def test_beside_an_attack_on_several_updates_stands_the_floor_of_all(tmp_path: Path):
    config = CONFIG | {"score": {"lpips": []}}
    joint = floors_of(parse_config(config), tmp_path / "joint")
    alone = floors_of(parse_config(config | {"threat": {"history": 2, "hide": ["history"]}}), tmp_path / "alone")
    for (client, number), floor in joint.items():
        assert floor["status"] == "exact"
        assert floor["updates"] == number
        assert floor["equations"] == number * alone[client, number]["equations"]
        if number == 1:
            assert floor == alone[client, number]
        else:
            assert floor["rms_per_sigma"] < alone[client, number]["rms_per_sigma"]
            assert "rv" not in floor
            assert floor["update_rms"] == alone[client, number]["update_rms"]


def test_earlier_updates_of_other_images_leave_the_floor_as_it_is(tmp_path: Path):
    config = CONFIG | {"score": {"lpips": []}, "federation": {**CONFIG["federation"], "same_examples": False}}
    told = floors_of(parse_config(config), tmp_path / "told")
    alone = floors_of(parse_config(config | {"threat": {"history": 0}}), tmp_path / "alone")
    assert told == alone


def test_floors_are_kept_by_what_the_attacker_has(tmp_path: Path):
    """How σ compares between the updates counts only where there are several, and how loud it is not at all."""
    wanted = parse_config(CONFIG | {"attack": []})
    run = run_campaign(wanted, tmp_path / "run").run
    (settings,) = wanted.cells
    (*_, path) = updates_of(run.federation(settings.federation_id))

    def key(history: int, **protection: float) -> str:
        threat = settings.threat.model_copy(update={"history": history})
        target = target_of(run, settings.model_copy(update={"threat": threat}), path)
        return replace(target, protection=Protection(**protection)).key

    assert len({key(0), key(1), key(2)}) == 3
    assert key(2) == key(3) == key(2, noise_std=0.1)
    assert key(0) == key(0, relative_std=0.3)
    assert key(1) != key(1, relative_std=0.3) == key(1, relative_std=0.1)
    assert key(1, relative_std=0.3) != key(1, relative_std=0.3, noise_std=0.1)


def test_the_command_says_that_a_floor_is_of_several_updates(tmp_path: Path):
    wanted = parse_config(CONFIG | {"attack": [], "case": [{"threat": {"history": n}} for n in (0, 2)]})
    run = run_campaign(wanted, tmp_path / "run").run
    done = CliRunner().invoke(app, ["floor", "--run", str(run.path), "--json", str(tmp_path / "f.json")])
    assert done.exit_code == 0, done.output
    assert "client-0, round 3: of 3 updates together" in done.output
    lines = json.loads((tmp_path / "f.json").read_text())
    assert [line["floor"]["updates"] for line in lines] == [1] * 6 + [1, 1, 2, 2, 3, 3]


def test_an_earlier_update_without_a_truth_leaves_no_floor(tmp_path: Path):
    wanted = parse_config(CONFIG | {"attack": []})
    run = run_campaign(wanted, tmp_path / "run").run
    (settings,) = wanted.cells
    folder = run.federation(settings.federation_id)
    (folder.truth / "client-0-round-1.safetensors").unlink()
    with pytest.raises(NotApplicable, match=r"client-0-round-1 too, of which no truth"):
        target_of(run, settings, folder.updates / "client-0-round-2.safetensors")


def test_the_same_images_come_every_round(tmp_path: Path):
    run = RunFolder(tmp_path / "run")
    run_campaign(parse_config(CONFIG | {"attack": []}), run.path)
    (folder,) = (run.path / "federations").iterdir()
    from fedattack.store import read_tensors

    first, *others = [
        read_tensors(folder / "truth" / f"client-0-round-{n}.safetensors")[0]["images"] for n in (1, 2, 3)
    ]
    assert all(torch.equal(first, other) for other in others)


def test_a_job_file_carries_paths_only(tmp_path):
    update = Update(1, "client-0", {"w": torch.ones(2)}, {"w": torch.zeros(2)}, "gradient", 1)
    save_update(tmp_path / "u.safetensors", update)
    job = Job(job="j", update="x", attack="dlg", history=[str(tmp_path / "u.safetensors")])
    job.save(tmp_path)
    (seen,) = load_knowledge(Job.load(tmp_path / "j.json")).history or ()
    assert torch.equal(seen.received["w"], update.received["w"])

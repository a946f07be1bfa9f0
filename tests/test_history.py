"""Several updates of the same images: which copies a job names, and that they reach the attack."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from experiments.campaign import run_campaign
from fedattack.config import parse_config
from fedattack.jobs import Job, load_knowledge
from fedattack.planning import earlier_updates
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


def test_the_floor_of_one_update_is_not_set_beside_an_attack_on_several(tmp_path: Path):
    wanted = parse_config(CONFIG | {"score": {"lpips": []}})
    rows = [row for row in read_rows(run_campaign(wanted, tmp_path / "run").run.rows) if row["kind"] == "attack"]
    assert all((row["floor"]["status"] == "exact") == (row["round"] == 1) for row in rows)
    assert all("earlier ones" in row["missing"]["floor"] for row in rows if row["round"] > 1)


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

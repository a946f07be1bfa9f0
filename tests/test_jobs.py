"""A job is data: saved, loaded, run once, and whatever the attack raises becomes its outcome."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

import fedattack.jobs
from fedattack.errors import AttackTimeout, FedattackError, MalformedUpdate, MissingKnowledge, NotApplicable
from fedattack.jobs import (
    Job,
    Outcome,
    attack_update,
    load_knowledge,
    load_outcome,
    outcome_path,
    reconstruction_path,
    run_job,
    save_knowledge,
    save_outcome,
    torch_threads,
)
from fedattack.metrics import psnr_db
from fedattack.models import build_model
from fedattack.registry import ATTACKS
from fedattack.seeding import derive_generator
from fedattack.store import load_reconstruction, save_update, write_tensors
from fedattack.tasks import Diffusion
from fedattack.types import Knowledge, Reconstruction, Update, silent

SHAPE = (1, 7, 5)
CONTEXT = {
    "model": {"name": "mlp", "options": {"hidden": [8], "activation": "sigmoid"}},
    "image_shape": list(SHAPE),
    "num_classes": 3,
    "task": {"name": "classification"},
}
KNOWN = {"image_shape": list(SHAPE), "batch_size": 1, "num_classes": 3}


@dataclasses.dataclass(frozen=True)
class Toy:
    """An attack that does what its parameter says and counts how often it is run."""

    name: ClassVar[str] = "toy"
    needs: ClassVar[frozenset[str]] = frozenset({"image_shape"})
    tasks: ClassVar[frozenset[str]] = frozenset({"classification"})
    runs: ClassVar[list[str]] = []
    errors: ClassVar[dict[str, BaseException]] = {
        "not-applicable": NotApplicable("nothing to say"),
        "hidden": MissingKnowledge("labels are hidden"),
        "house": MalformedUpdate("w must be finite"),
        "bug": ZeroDivisionError("oops"),
        "timeout": AttackTimeout("late"),
        "interrupt": KeyboardInterrupt(),
        "exit": SystemExit(3),
    }

    does: str = "ok"

    def reconstruct(
        self,
        update: Update,
        model: torch.nn.Module,
        task: Any,
        knowledge: Knowledge,
        *,
        generator: torch.Generator,
        progress: Any = silent,
    ) -> Reconstruction:
        self.runs.append(self.does)
        if self.does in self.errors:
            raise self.errors[self.does]
        if self.does == "mode":
            return Reconstruction(images=torch.full((1, *SHAPE), float(model.training)))
        for iteration in range(3):
            progress(iteration + 1, 3, 0.5)
        return Reconstruction(images=torch.rand((1, *SHAPE), generator=generator))


@pytest.fixture(autouse=True)
def _no_runs_yet():
    Toy.runs.clear()


@pytest.fixture
def make_job(tmp_path, make_update, random_images):
    """make_job(attack, **fields): a job on the update of one image, whose file is in tmp_path."""
    model = build_model("mlp", image_shape=SHAPE, num_classes=3, seed=1, hidden=(8,), activation="sigmoid")
    image, path = random_images((1, *SHAPE)), tmp_path / "updates" / "0-round-1.safetensors"
    save_update(path, make_update(model, image, torch.tensor([2])), CONTEXT)

    def made(attack: str = f"{__name__}:Toy", **changes: Any) -> Job:
        settings = {"job": "j", "knowledge": KNOWN, "device": "cpu", **changes}
        return Job(update=str(path), attack=attack, **settings)

    return made


# ------------------------------------------------------------------------------------------------ jobs as files
def test_jobs_and_outcomes_come_back_as_they_were(tmp_path, make_job):
    job = make_job("dlg", parameters={"iterations": 3}, facts={"cell": "a"}, seed=2**62, timeout_seconds=0.5)
    assert Job.load(job.save(tmp_path / "jobs")) == job
    assert job.spec == "dlg(iterations=3)"
    outcome = Outcome(job="j", status="ok", seconds=1.5, pid=3, finished=9.0)
    save_outcome(tmp_path, outcome)
    assert load_outcome(tmp_path, "j") == outcome
    assert load_outcome(tmp_path, "other") is None


@pytest.mark.parametrize("content", ['{"job": "j"}', "[]", '{"job": 1, "update": "", "attack": "", "extra": 1}', "3"])
def test_what_is_no_job_is_refused(tmp_path, content):
    (tmp_path / "j.json").write_text(content)
    with pytest.raises(FedattackError, match=r"j\.json"):
        Job.load(tmp_path / "j.json")


def test_knowledge_travels_in_parts(tmp_path, make_job):
    knowledge = Knowledge(
        image_shape=SHAPE,
        batch_size=1,
        learning_rate=0.1,
        labels=torch.tensor([2]),
        noise=torch.rand(1, *SHAPE, dtype=torch.float64),
        public_images=torch.rand(4, *SHAPE),
    )
    scalars = save_knowledge(tmp_path / "k.safetensors", knowledge)
    assert set(scalars) == {"image_shape", "batch_size", "learning_rate"}
    write_tensors(tmp_path / "p.safetensors", {"images": knowledge.public_images}, {})
    job = make_job(
        knowledge=json.loads(json.dumps(scalars)),
        tensors=str(tmp_path / "k.safetensors"),
        public_images=str(tmp_path / "p.safetensors"),
    )
    found = load_knowledge(job)
    assert found.known() == knowledge.known()
    assert found.image_shape == SHAPE
    for name in ("labels", "noise", "public_images"):
        assert torch.equal(getattr(found, name), getattr(knowledge, name))


def test_no_oracle_no_file(tmp_path):
    save_knowledge(tmp_path / "k.safetensors", Knowledge(batch_size=1, public_images=torch.rand(1, 1, 1, 1)))
    assert not (tmp_path / "k.safetensors").exists()


# ------------------------------------------------------------------------------------------------ running
def test_a_real_attack_end_to_end(tmp_path, make_job, random_images):
    outcome = run_job(make_job("linear-leak"), tmp_path / "results")
    assert outcome.status == "ok", outcome.error
    found = load_reconstruction(reconstruction_path(tmp_path / "results", "j"))
    assert float(psnr_db(found.images, random_images((1, *SHAPE)))) > 100


@pytest.mark.parametrize(
    ("does", "status", "text"),
    [
        ("ok", "ok", ""),
        ("not-applicable", "not-applicable", "nothing to say"),
        ("hidden", "not-applicable", "labels are hidden"),
        ("house", "failed", "MalformedUpdate: w must be finite"),
        ("bug", "failed", "ZeroDivisionError: oops"),
        ("timeout", "timeout", "late"),
    ],
)
def test_whatever_the_attack_raises_becomes_the_outcome(tmp_path, make_job, does, status, text):
    outcome = run_job(make_job(parameters={"does": does}), tmp_path)
    assert outcome.status == status
    assert outcome.error.startswith(text)
    assert ("Traceback" in outcome.error) == (does == "bug")
    assert load_outcome(tmp_path, "j") == outcome
    assert reconstruction_path(tmp_path, "j").exists() == (status == "ok")
    assert outcome.seconds >= 0
    assert outcome.pid > 0


@pytest.mark.parametrize(("does", "error"), [("interrupt", KeyboardInterrupt), ("exit", SystemExit)])
def test_interrupts_pass_and_leave_the_job_to_be_done(tmp_path, make_job, does, error):
    with pytest.raises(error):
        run_job(make_job(parameters={"does": does}), tmp_path)
    assert load_outcome(tmp_path, "j") is None


def test_a_job_is_never_run_twice(tmp_path, make_job):
    first = run_job(make_job(), tmp_path)
    assert run_job(make_job(), tmp_path) == first
    assert run_job(make_job(parameters={"does": "bug"}), tmp_path) == first
    assert Toy.runs == ["ok"]
    outcome_path(tmp_path, "j").unlink()
    run_job(make_job(), tmp_path)
    assert Toy.runs == ["ok", "ok"]


def test_a_result_depends_on_seed_attack_client_and_round_and_not_on_the_jobs_name(tmp_path, make_job):
    def images(name: str, **changes: Any) -> torch.Tensor:
        assert run_job(make_job(job=name, **changes), tmp_path).status == "ok"
        return load_reconstruction(reconstruction_path(tmp_path, name)).images

    first = images("a", seed=1)
    assert torch.equal(first, images("b", seed=1))
    assert not torch.equal(first, images("c", seed=2))


def test_a_deadline_stops_the_attack_at_its_next_sign_of_progress(tmp_path, make_job):
    outcome = run_job(make_job(timeout_seconds=0.0), tmp_path)
    assert outcome.status == "timeout"
    assert "0 seconds" in outcome.error
    assert not reconstruction_path(tmp_path, "j").exists()


def test_progress_is_passed_on_and_may_stop_the_job(tmp_path, make_job):
    calls: list[tuple[int, int, float]] = []
    run_job(make_job(), tmp_path, progress=lambda *call: calls.append(call))
    assert calls == [(1, 3, 0.5), (2, 3, 0.5), (3, 3, 0.5)]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"attack": "dgl"}, "did you mean 'dlg'"),
        ({"attack": "dlg", "parameters": {"iteratons": 1}}, "did you mean 'iterations'"),
        ({"attack": "no_such_module:X"}, "cannot be imported"),
        ({"context": {"task": {"name": "classifikation"}}}, "did you mean 'classification'"),
        ({"context": {"model": {"name": "mpl"}}}, "did you mean 'mlp'"),
        ({"tensors": "/nowhere/k.safetensors"}, "no such file"),
        ({"knowledge": {**KNOWN, "unheard_of": 1}}, "unheard_of"),
    ],
)
def test_what_is_wrong_with_a_job_is_said_in_its_outcome(tmp_path, make_job, changes, text):
    outcome = run_job(make_job(**changes), tmp_path)
    assert outcome.status == "failed"
    assert text in outcome.error


def test_an_update_that_does_not_say_its_model_needs_it_from_the_job(tmp_path, make_job, make_update, random_images):
    model = build_model("mlp", image_shape=SHAPE, num_classes=3, seed=1, hidden=(8,), activation="sigmoid")
    path = tmp_path / "bare.safetensors"
    save_update(path, make_update(model, random_images((1, *SHAPE)), torch.tensor([2])))
    bare = dataclasses.replace(make_job("linear-leak"), update=str(path))
    outcome = run_job(bare, tmp_path / "one")
    assert outcome.status == "failed"
    assert "image_shape, model, num_classes, task" in outcome.error
    assert run_job(dataclasses.replace(bare, context=CONTEXT), tmp_path / "two").status == "ok"


def test_a_cut_update_file_is_a_failed_job(tmp_path, make_job):
    job = make_job()
    path = Path(job.update)
    path.write_bytes(path.read_bytes()[:-7])
    outcome = run_job(job, tmp_path / "results")
    assert outcome.status == "failed"
    assert "safetensors" in outcome.error
    assert Toy.runs == []


# ------------------------------------------------------------------------------------------------ attack_update
@pytest.mark.parametrize(("mode", "training"), [("train", True), ("eval", False), (None, True)])
def test_the_model_is_in_the_clients_mode(tmp_path, make_job, mode, training):
    context = {"mode": mode} if mode else {}
    assert run_job(make_job(parameters={"does": "mode"}, context=context), tmp_path).status == "ok"
    found = load_reconstruction(reconstruction_path(tmp_path, "j"))
    assert float(found.images.mean()) == float(training)


def test_needs_are_checked_before_the_model_is_built(monkeypatch, make_update, random_images):
    def no_compute(*_: object, **__: object) -> None:
        raise AssertionError("compute before the check")

    monkeypatch.setattr(fedattack.jobs, "build_model", no_compute)
    update = Update(round=1, client="0", sent={}, received={}, kind="gradient")
    generator = derive_generator(0, "x")
    with pytest.raises(MissingKnowledge, match="toy needs image_shape"):
        attack_update(Toy(), update, CONTEXT, Knowledge(batch_size=1), generator=generator)
    other = {**CONTEXT, "task": {"name": "diffusion", "options": {"num_train_timesteps": 5}}}
    with pytest.raises(NotApplicable, match="'diffusion'"):
        attack_update(Toy(), update, other, Knowledge(image_shape=SHAPE), generator=generator)
    assert Toy.runs == []


class Learned(torch.nn.Module):
    """A model of a user's own, with a learned embedding of so many timesteps."""

    def __init__(self, image_shape, num_classes, embedded):
        super().__init__()
        self.embedding = torch.nn.Embedding(embedded, 1)

    def forward(self, images, timesteps):
        return images * self.embedding(timesteps)[:, :, None, None]


@pytest.mark.parametrize(("embedded", "fits"), [(1000, True), (999, False)])
def test_timesteps_that_the_model_cannot_embed_are_told_before_the_attack(embedded, fits, monkeypatch):
    """A bare IndexError from inside an embedding helps nobody."""
    sent = dict(Learned(SHAPE, 1, embedded).state_dict())
    update = Update(round=1, client="0", sent=sent, received=sent, kind="gradient")
    model = {"name": f"{__name__}:Learned", "options": {"embedded": embedded}}
    context = {"model": model, "image_shape": SHAPE, "num_classes": 1, "task": {"name": "diffusion"}}
    begun = []
    attack = ATTACKS.create("dlg-dm", iterations=1)
    reached = lambda *_, **__: begun.append(1) or Reconstruction(torch.zeros(1, *SHAPE))  # noqa: E731
    monkeypatch.setattr(type(attack), "reconstruct", reached)

    def run():
        knowledge = Knowledge(image_shape=SHAPE, batch_size=1)
        attack_update(attack, update, context, knowledge, generator=derive_generator(0, "x"))

    if fits:
        run()
    else:
        with pytest.raises(FedattackError, match=r"num_train_timesteps must be at most the number .* embeds, got 1000"):
            run()
    assert bool(begun) == fits


class Normed(Learned):
    """Cannot be called with one image in training mode."""

    def __init__(self, image_shape, num_classes):
        super().__init__(image_shape, num_classes, 1000)
        self.norm = torch.nn.BatchNorm1d(1)

    def forward(self, images, timesteps):
        return images * self.norm(self.embedding(timesteps))[:, :, None, None]


class Broken(Learned):
    """Has an IndexError of its own at every timestep."""

    def forward(self, images, timesteps):
        return images[:, [7]]


def test_only_what_is_about_timesteps_is_blamed_on_them():
    for model in (Normed(SHAPE, 1), Broken(SHAPE, 1, 5)):
        model.train()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        Diffusion().check_model(model, SHAPE)
        assert model.training
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_torch_threads_are_put_back():
    before = torch.get_num_threads()
    with torch_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
    try:
        with torch_threads(before + 1):
            raise RuntimeError
    except RuntimeError:
        pass
    assert torch.get_num_threads() == before


def test_the_toy_is_found_under_this_modules_name():
    assert sys.modules[__name__].Toy is Toy

"""One attack on one update as data: written to disk, run anywhere (this process, a Ray actor, a GPU machine), never twice.

A job names files; its result is a file. Nothing here needs flwr or ray, and nothing of the truth can reach an attack: a job
carries an update, how to rebuild model and task, and a `Knowledge`.
"""

import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedattack.errors import AttackTimeout, FedattackError, MalformedUpdate, MissingKnowledge, NotApplicable, must
from fedattack.knowledge import ORACLES
from fedattack.models import build_model, misfits
from fedattack.registry import ATTACKS, format_spec
from fedattack.seeding import derive_generator
from fedattack.store import (
    load_update,
    read_json,
    read_tensors,
    save_reconstruction,
    write_json,
    write_tensors,
)
from fedattack.tasks import Diffusion, build_task, parameter_names
from fedattack.types import Attack, Knowledge, Progress, Reconstruction, Update, silent


@dataclass(frozen=True)
class Job:
    """An attack on the update at `update`. Paths are absolute; `knowledge` holds scalars, `tensors` a file with the rest.

    `public_images` is a file of its own since many jobs share it; the first `public_count` of it are known (0: all).
    `history` names further updates, see Knowledge. `context` overrides what the update's own file says about model and
    task. `facts` are carried into the result row unread.
    """

    job: str
    update: str
    attack: str
    parameters: dict[str, Any] = field(default_factory=dict)
    knowledge: dict[str, Any] = field(default_factory=dict)
    tensors: str = ""
    public_images: str = ""
    public_count: int = 0
    history: list[str] = field(default_factory=list)
    context: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    timeout_seconds: float = 3600.0
    device: str = "auto"
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def spec(self) -> str:
        return format_spec(self.attack, self.parameters)

    def save(self, folder: Path) -> Path:
        path = folder / f"{self.job}.json"
        write_json(path, asdict(self))
        return path

    @staticmethod
    def load(path: Path) -> "Job":
        raw = read_json(path)
        names = {f.name for f in fields(Job)}
        if not isinstance(raw, dict) or not {"job", "update", "attack"} <= set(raw) <= names:
            raise FedattackError(must(str(path), "a job of fedattack", type(raw).__name__))
        return Job(**raw)


@dataclass(frozen=True)
class Outcome:
    """How a job ended: status "ok", "not-applicable", "failed" or "timeout", the error's text, seconds, attempts."""

    job: str
    status: str
    error: str = ""
    seconds: float = 0.0
    pid: int = 0
    device: str = "cpu"
    finished: float = 0.0


def outcome_path(results: Path, job: str) -> Path:
    return results / job / "outcome.json"


def reconstruction_path(results: Path, job: str) -> Path:
    return results / job / "reconstruction.safetensors"


def load_outcome(results: Path, job: str) -> Outcome | None:
    """The outcome of a job, or None while it has none."""
    path = outcome_path(results, job)
    return Outcome(**read_json(path)) if path.exists() else None


def save_outcome(results: Path, outcome: Outcome) -> None:
    write_json(outcome_path(results, outcome.job), asdict(outcome))


def save_knowledge(path: Path, knowledge: Knowledge) -> dict[str, Any]:
    """Write the oracle tensors to `path` (if there are any) and give the scalars, both for a `Job`."""
    tensors = {name: getattr(knowledge, name) for name in sorted(ORACLES) if getattr(knowledge, name) is not None}
    if tensors:
        write_tensors(path, tensors, {"type": "knowledge"})
    scalars = {
        f.name: getattr(knowledge, f.name)
        for f in fields(Knowledge)
        if f.name not in {*ORACLES, "public_images", "history"}
    }
    return {name: value for name, value in scalars.items() if value is not None}


def load_knowledge(job: Job) -> Knowledge:
    values = dict(job.knowledge)
    if "image_shape" in values:
        values["image_shape"] = tuple(values["image_shape"])
    if job.tensors:
        values |= read_tensors(Path(job.tensors))[0]
    if job.public_images:
        values["public_images"] = read_tensors(Path(job.public_images))[0]["images"][: job.public_count or None]
    if job.history:
        values["history"] = tuple(load_update(Path(path))[0] for path in job.history)
    return Knowledge(**values)


def run_job(job: Job, results: Path, *, progress: Progress = silent) -> Outcome:
    """Run a job to its outcome, which is on disk when this returns. A job that has one already is not run again.

    Whatever the attack raises becomes the outcome; only KeyboardInterrupt and SystemExit pass.
    """
    import os

    if (done := load_outcome(results, job.job)) is not None:
        return done
    begun = time.perf_counter()
    device = _device(job.device)
    status, error = "ok", ""
    try:
        found = _reconstruct(job, device, _with_deadline(progress, begun, job.timeout_seconds))
        save_reconstruction(reconstruction_path(results, job.job), found)
    except (NotApplicable, MissingKnowledge) as reason:
        status, error = "not-applicable", str(reason)
    except AttackTimeout as reason:
        status, error = "timeout", str(reason)
    except FedattackError as reason:
        status, error = "failed", f"{type(reason).__name__}: {reason}"
    except Exception as reason:
        status, error = "failed", f"{type(reason).__name__}: {reason}\n{traceback.format_exc(limit=-4)}"
    outcome = Outcome(
        job=job.job,
        status=status,
        error=error,
        seconds=time.perf_counter() - begun,
        pid=os.getpid(),
        device=str(device),
        finished=time.time(),
    )
    save_outcome(results, outcome)
    return outcome


def attack_update(
    attack: Attack,
    update: Update,
    context: Mapping[str, Any],
    knowledge: Knowledge,
    *,
    generator: torch.Generator,
    device: torch.device | str = "cpu",
    progress: Progress = silent,
) -> Reconstruction:
    """Rebuild model and task from `context` and run the attack; its needs are checked before any compute.

    context: {"model": {"name", "options"}, "image_shape", "num_classes", "mode", "task": {"name", "options"}}.
    Raises NotApplicable or MissingKnowledge where the attack cannot start, MalformedUpdate where the update is not the
    model's, FedattackError where known timesteps or noise cannot be the task's, or the task's timesteps the model's.
    """
    task = build_task(context["task"]["name"], context["task"].get("options"))
    if task.name not in attack.tasks:
        raise NotApplicable(must("the task", "one of " + ", ".join(sorted(attack.tasks)), task.name))
    if missing := attack.needs - knowledge.known():
        raise MissingKnowledge(f"{attack.name} needs {', '.join(sorted(missing))}, which this threat model hides")
    model = build_model(
        context["model"]["name"],
        image_shape=context["image_shape"],
        num_classes=context["num_classes"],
        seed=0,
        **context["model"].get("options", {}),
    )
    if isinstance(task, Diffusion):
        task.check_model(model, context["image_shape"])
    model.train(context.get("mode", "train") == "train").to(device)
    for seen in (update, *(knowledge.history or ())):
        check_update(seen, model)
    with suppress(MissingKnowledge):  # not every attack needs to know how large the unknowns are
        task.variables(knowledge)
    found = attack.reconstruct(
        _moved(update, device), model, task, _moved_knowledge(knowledge, device), generator=generator, progress=progress
    )
    return replace(found, **{f.name: _to_cpu(getattr(found, f.name)) for f in fields(found)})


def check_update(update: Update, model: nn.Module) -> None:
    """Raise MalformedUpdate, naming tensors and shapes, where sent or received tensors are not those of the model."""
    trained = parameter_names(model)
    for part, state in (("sent", update.sent), ("received", update.received)):
        if wrong := misfits(model, state, trained):
            more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
            raise MalformedUpdate(
                f"what was {part} must fit the model {type(model).__name__}: {'; '.join(wrong[:3])}{more}"
            )


def _reconstruct(job: Job, device: torch.device, progress: Progress) -> Reconstruction:
    update, context = load_update(Path(job.update))
    attack: Attack = ATTACKS.create(job.attack, **job.parameters)
    generator = derive_generator(job.seed, "attack", job.attack, update.client, f"round-{update.round}")
    context = {**context, **job.context}
    if missing := {"model", "task", "image_shape", "num_classes"} - set(context):
        raise FedattackError(f"the update does not say its {', '.join(sorted(missing))}: give them with the job")
    return attack_update(
        attack, update, context, load_knowledge(job), generator=generator, device=device, progress=progress
    )


def _with_deadline(progress: Progress, begun: float, limit: float) -> Progress:
    def checked(iteration: int, iterations: int, loss: float) -> None:
        if time.perf_counter() - begun > limit:
            raise AttackTimeout(f"stopped after {limit:g} seconds at iteration {iteration} of {iterations}")
        progress(iteration, iterations, loss)

    return checked


def _device(wanted: str) -> torch.device:
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(wanted)


def _to_cpu(value: Any) -> Any:
    return value.cpu() if isinstance(value, Tensor) else value


def _moved(update: Update, device: torch.device | str) -> Update:
    return replace(
        update,
        sent={name: tensor.to(device) for name, tensor in update.sent.items()},
        received={name: tensor.to(device) for name, tensor in update.received.items()},
    )


def _moved_knowledge(knowledge: Knowledge, device: torch.device | str) -> Knowledge:
    def moved(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(device)

    return replace(
        knowledge,
        labels=moved(knowledge.labels),
        timesteps=moved(knowledge.timesteps),
        noise=moved(knowledge.noise),
        public_images=moved(knowledge.public_images),
        history=tuple(_moved(seen, device) for seen in knowledge.history) if knowledge.history else None,
    )


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Torch on so many threads inside, put back afterwards: sums then do not depend on where code runs."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)

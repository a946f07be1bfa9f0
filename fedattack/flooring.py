"""The error floors of the updates that a run copied: computed from their truths, once for each, and kept in the run folder.

Part of scoring: attacks never see any of it. Updates that are equal to the last bit (the first round with and without a
defense, say) share one floor.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from dataclasses import fields as dataclass_fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedattack.config import Experiment, Settings
from fedattack.errors import NotApplicable
from fedattack.floor import SKIPPED, Earlier, Floor, error_floor, jacobian_norm, sharing
from fedattack.jobs import torch_threads
from fedattack.models import build_model
from fedattack.planning import earlier_updates, read_truth, server_facts, updates_of
from fedattack.registry import DEFENSES
from fedattack.seeding import derive_generator
from fedattack.store import RunFolder, finite, load_update, read_json, write_json
from fedattack.tasks import STATISTICS, Task, build_task
from fedattack.types import Defense, Knowledge, Progress, Update, silent
from fedattack.vulnerability import Vulnerability, vulnerability

FloorRow = dict[str, Any]

UNAVAILABLE = "not available"
RV_FACTS = ("jacobian_norm", "jacobian_error", "update_rms")
"""Of a floor, or alone where there is none."""

ORDER = (UNAVAILABLE, "at least", "estimate", "exact")
"""How much is known of a floor, least first: what a later and better computation may replace."""


@dataclass(frozen=True)
class Protection:
    """What stands between the gradient and the wire: clipping to a norm, then Gaussian noise; `unmodelled` names the rest.

    noise_std is σ on every coordinate of what is sent, relative_std in multiples of its root mean square.
    """

    clip_norm: float | None = None
    noise_std: float = 0.0
    relative_std: float = 0.0
    unmodelled: tuple[str, ...] = ()

    @staticmethod
    def of(settings: Settings) -> "Protection":
        """The cell's defenses and mods. Raises NotApplicable where a defense changes the images themselves."""
        federation, found = settings.federation, Protection()
        others = [mod for mod in federation.mods if not mod.startswith("secaggplus")]
        for name, parameters in federation.defenses():
            defense: Defense = DEFENSES.create(name, **parameters)
            if type(defense).on_batch is not Defense.on_batch:
                raise NotApplicable(f"{name} changes the images, and the witness has them as they were")
            noisy = found.noise_std > 0 or found.relative_std > 0
            facts = defense.describe()
            if others:
                others.append(name)
            elif name == "norm-clipping" and not noisy:
                found = replace(found, clip_norm=min(facts["clip_norm"], found.clip_norm or math.inf))
            elif name == "gaussian-noise" and "noise_std" in facts:
                found = replace(found, noise_std=math.hypot(found.noise_std, facts["noise_std"]))
            elif name == "gaussian-noise" and not noisy:
                found = replace(found, relative_std=facts["noise_std_over_update_rms"])
            else:
                others.append(name)
        return replace(found, unmodelled=tuple(others))

    def sigma(self, update_rms: float) -> float:
        return math.hypot(self.noise_std, self.relative_std * update_rms)

    @property
    def mixture(self) -> float:
        """What decides how the σ of several updates compare: 0 where noise is relative alone, infinite where they are equal."""
        return self.noise_std / self.relative_std if self.relative_std > 0 else math.inf


@dataclass(frozen=True)
class Target:
    """One update whose floor is wanted, under one protection and one answer to whether the noise is known.

    earlier: what the attacker has beside it of the same images.
    """

    settings: Settings
    path: Path
    update: Update
    context: Mapping[str, Any]
    truth: Mapping[str, Tensor]
    protection: Protection
    noise_known: bool
    earlier: tuple[Earlier, ...] = ()

    @property
    def key(self) -> str:
        """A digest of everything that the floor depends on."""
        digest = hashlib.sha256()
        _take(digest, self.update, self.truth)
        names = sorted(self.update.received)
        how = (dict(self.context), self.update.kind, names, self.noise_known, self.protection.clip_norm)
        digest.update(json.dumps(how, sort_keys=True, default=str).encode())
        for other in self.earlier:
            _take(digest, other.update, other.truth)
            digest.update(json.dumps((other.update.kind, sorted(other.update.received))).encode())
        if self.earlier:
            digest.update(repr(self.protection.mixture).encode())
        return digest.hexdigest()[:16]

    def compute(self, method: str, seconds: float, progress: Progress) -> Floor:
        """Rebuild model and task as an attack would, and take the floor at the truth."""
        with torch_threads(1):
            return error_floor(
                *self._posed(),
                earlier=self.earlier,
                sigma=self.protection.sigma,
                method=method,
                seconds=seconds,
                progress=progress,
                **self._how(),
            )

    def jacobian_norm(self, seconds: float) -> dict[str, float]:
        """What a floor says of its Jacobian's size, where there is no floor."""
        with torch_threads(1):
            return jacobian_norm(*self._posed(), seconds=seconds, **self._how())

    def _how(self) -> dict[str, Any]:
        generator = derive_generator(self.settings.seed, "floor", self.path.stem)
        return {"clip_norm": self.protection.clip_norm, "generator": generator}

    def _posed(self) -> tuple[Update, nn.Module, Task, Knowledge, dict[str, Tensor]]:
        if self.path.stem.startswith("aggregate-") and (self.context.get("local_steps") or 1) > 1:
            raise NotApplicable(
                "several local steps of several clients, of which only the mean was seen, are not modelled"
            )
        model, task = self._built()
        knowledge = Knowledge(**server_facts(self.update, dict(self.context)))
        if self.noise_known:
            knowledge = replace(knowledge, noise=self.truth.get("noise"))
        return self.update, model, task, knowledge, self._private(task)

    def vulnerability(self) -> Vulnerability:
        """RV at the truth, labels, timesteps and noise being known, of the gradient before any defense.

        Raises NotApplicable where something else than the gradient of one client was sent.
        """
        if self.update.kind != "gradient" or self.path.stem.startswith("aggregate-"):
            raise NotApplicable("RV is that of one client's gradient")
        model, task = self._built()
        sent = {name: t.double() if t.is_floating_point() else t for name, t in self.update.sent.items()}
        private = {name: t.double() if t.is_floating_point() else t for name, t in self._private(task).items()}
        generator = derive_generator(self.settings.seed, "vulnerability", self.path.stem)
        with torch_threads(1):
            return vulnerability(model, sent, task, [private], generator=generator)

    def _private(self, task: Task) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in self.truth.items() if name in {"images", "labels", *task.drawn}}

    def _built(self) -> tuple[nn.Module, Task]:
        context = self.context
        model = build_model(
            context["model"]["name"],
            image_shape=context["image_shape"],
            num_classes=context["num_classes"],
            seed=0,
            **context["model"].get("options", {}),
        ).double()
        model.train(context.get("mode", "train") == "train")
        return model, build_task(context["task"]["name"], context["task"].get("options"))


def _take(digest: Any, update: Update, truth: Mapping[str, Tensor]) -> None:
    """Into the digest: the weights that were sent, and the truth."""
    for part in (update.sent, truth):
        for name, tensor in sorted(part.items()):
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().double().contiguous().numpy().tobytes())


def target_of(run: RunFolder, settings: Settings, path: Path) -> Target:
    """Raises NotApplicable where there is no truth, or a defense that has no floor (beside a mean of several clients)."""
    folder = run.federation(settings.federation_id)
    truth = read_truth(folder, path)
    if truth is None:
        raise NotApplicable("no truth was recorded (a deployment has no witness)")
    update, context = load_update(path)
    known = settings.task.name == "diffusion" and "noise" in settings.threat.visible()
    protection = Protection.of(settings)
    own = protection.clip_norm is not None or protection.relative_std > 0
    if own and path.stem.startswith("aggregate-"):
        raise NotApplicable("clipping and noise went by each client's own update, and only their mean was seen")
    others = []
    for other in earlier_updates(path, update, settings.threat.earlier):
        if (theirs := read_truth(folder, other)) is None:
            raise NotApplicable(f"the attacker has {other.stem} too, of which no truth was recorded")
        others.append(Earlier(load_update(other)[0], theirs))
    return Target(settings, path, update, context, truth, protection, known, sharing(truth, others))


class Floors:
    """The floors of a run. Each distinct update gets an even share of score.floor_seconds, or `seconds_each`."""

    def __init__(
        self, run: RunFolder, experiment: Experiment, *, method: str | None = None, seconds_each: float | None = None
    ) -> None:
        self._run = run
        self._method = method or experiment.score.floor
        self._db, self._rv = experiment.score.floor_db, experiment.score.rv
        self._keys: dict[tuple[str, str], str] = {}
        for settings, path in _updates(run, experiment) if self._method != "off" else ():
            with suppress(NotApplicable):
                self._keys[_identity(settings, path)] = target_of(run, settings, path).key
        self._seconds = seconds_each or experiment.score.floor_seconds / max(1, len(set(self._keys.values())))

    def row(self, settings: Settings, path: Path, progress: Progress = silent) -> FloorRow | None:
        """What a result row says of the floor, None where floors are off."""
        if self._method == "off":
            return None
        try:
            target = target_of(self._run, settings, path)
        except NotApplicable as reason:
            return {"status": UNAVAILABLE, "reason": str(reason)}
        kept = self._run.floors / f"{self._keys.get(_identity(settings, path)) or target.key}.json"
        found: FloorRow = read_json(kept) if kept.exists() else {}
        if not self._settled(found):
            computed = self._computed(target, progress)
            found = _better(found, computed)
            write_json(kept, finite(found))
        return _with_noise(found, target, self._db, self._rv)

    def _computed(self, target: Target, progress: Progress) -> FloorRow:
        facts: FloorRow = {"asked": self._method, "seconds": self._seconds}
        try:
            return facts | asdict(target.compute(self._method, self._seconds, progress)) | {"reason": ""}
        except NotApplicable as reason:
            facts |= {"status": UNAVAILABLE, "reason": str(reason)}
        if self._rv:
            facts["jacobian_norm"] = None
            if facts["reason"].startswith(SKIPPED) and not target.earlier:  # RV is that of one update
                with suppress(NotApplicable):
                    facts |= target.jacobian_norm(self._seconds)
        return facts

    def _settled(self, found: FloorRow) -> bool:
        """Whether what is kept is as good as what would be computed now."""
        if not found or (self._rv and "jacobian_norm" not in found):  # kept by a version that did not take it
            return False
        if found["status"] == "exact" or (found["status"] == "estimate" and self._method in ("auto", found["method"])):
            return True
        same = found["asked"] == self._method
        spent = math.inf if found["seconds"] is None else found["seconds"]  # JSON knows no infinity
        return same and (self._method in ("exact", "sketch") or spent >= self._seconds * (1 - 1e-9))


def _better(kept: FloorRow, computed: FloorRow) -> FloorRow:
    """What is kept where it is a floor as good as the one computed; and RV of the other one where it has none."""
    first, second = (kept, computed) if _worth(kept) >= max(_worth(computed), 1) else (computed, kept)
    if first.get("jacobian_norm") is not None:
        return first
    return first | {name: second[name] for name in RV_FACTS if name in second}


def _worth(found: FloorRow) -> int:
    return ORDER.index(found["status"]) if found else -1


def _updates(run: RunFolder, experiment: Experiment) -> Iterator[tuple[Settings, Path]]:
    for settings in experiment.cells:
        for path in updates_of(run.federation(settings.federation_id)):
            yield settings, path


def _identity(settings: Settings, path: Path) -> tuple[str, str]:
    threat = settings.threat
    return f"{settings.federation_id}:{'noise' in threat.visible()}:{threat.earlier}", path.stem


def _with_noise(kept: FloorRow, target: Target, db: float, rv: bool) -> FloorRow:
    """The floor at the noise of the cell: the defense's, or else the rounding of its precision; and RV of what was sent.

    relative_rv: RV where the update has unit root mean square, what noise in units of that has to compete with. RV is that of
    one update: where the attacker has more there is none.
    """
    found = {name: value for name, value in kept.items() if name not in ("asked", "seconds")}
    if rv and not target.earlier and (norm := found.get("jacobian_norm")) and (rms := found.get("update_rms")):
        found |= {"rv": norm, "relative_rv": norm / rms, "rv_error": found["jacobian_error"]}
    if found["status"] == UNAVAILABLE:
        return found
    fields = {name: found[name] for name in (field.name for field in dataclass_fields(Floor)) if name in found}
    floor = Floor(**fields | {"per_image": tuple(fields["per_image"])})
    aggregate = target.path.stem.startswith("aggregate-")
    protection = target.protection
    sigma = protection.sigma(floor.update_rms)
    if aggregate:
        sigma /= math.sqrt(target.settings.federation.clients)  # a mean of independent noises
    rounding = floor.rounding_sigma
    if target.settings.precision == "float64":
        rounding *= torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    notes = []
    if protection.unmodelled:
        notes.append(f"without {', '.join(protection.unmodelled)}, which the floor does not model")
    if target.update.kind == "weights" and any(name.endswith(STATISTICS) for name in target.update.received):
        notes.append("running statistics, which travel without noise, are not counted")
    modelled = sigma > 0 and not protection.unmodelled
    return found | {
        "noise_std": sigma if modelled else None,
        "floor_rms": floor.rms(sigma) if modelled else None,
        "floor_psnr_db": floor.psnr_db(sigma) if modelled else None,
        "rounding_psnr_db": None if aggregate or protection.unmodelled else floor.psnr_db(rounding),
        "target_db": db,
        "sigma_at_target_db": floor.sigma_at(db) if floor.identifiable is not False else 0.0,
        "note": "; ".join(notes),
    }

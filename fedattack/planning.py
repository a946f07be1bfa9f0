"""Which attack jobs a cell makes of a copied update, and the facts that its result rows carry.

Job ids are a function of what is attacked and how, so planning twice gives the same jobs and a rerun skips what is done.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from inspect import getsourcefile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedattack import provenance
from fedattack.checkpoints import best_weights, digest_of
from fedattack.config import FINAL, UNRELATED, AttackSettings, Settings
from fedattack.errors import MissingDependency
from fedattack.jobs import Job, save_knowledge
from fedattack.knowledge import ORACLES, build_knowledge
from fedattack.priors import folder_of, unet_in
from fedattack.registry import ATTACKS, DEFENSES
from fedattack.store import (
    FederationFolder,
    RunFolder,
    load_update,
    read_tensors,
    update_name,
    write_json,
    write_tensors,
)
from fedattack.types import Update


def update_context(settings: Settings, image_shape: tuple[int, int, int], num_classes: int) -> dict[str, Any]:
    """What every copied update of a cell says about itself: enough to rebuild model and task, nothing private."""
    federation = settings.federation
    several = federation.protocol == "fedavg"
    behind = federation.clients if federation.secure_aggregation else 1  # clients behind one visible update
    return {
        "model": settings.model.model_dump(mode="json", include={"name", "options"}),
        "mode": settings.model.mode,
        "task": settings.task.model_dump(mode="json"),
        "image_shape": list(image_shape),
        "num_classes": num_classes,
        "images_per_round": behind * federation.images_per_round,
        "learning_rate": federation.learning_rate if several else None,
        "local_steps": federation.local_steps if several else 1,
        "local_batch_size": behind * federation.batch_size,
        "proximal_mu": federation.strategy_options.get("proximal_mu") if several else None,
    }


def server_facts(update: Update, context: dict[str, Any], defense: str | None = None) -> dict[str, Any]:
    """What an honest-but-curious server knows of an update, by `Knowledge` field.

    A client may understate its number of examples, never overstate it past what the server asked for.
    """
    asked, said = context.get("images_per_round"), update.num_examples
    sizes = [size for size in (asked, said) if size]
    facts = {
        "image_shape": tuple(context["image_shape"]),
        "num_classes": context["num_classes"],
        "batch_size": min(sizes) if sizes else None,
        "learning_rate": context.get("learning_rate"),
        "local_steps": context.get("local_steps"),
        "local_batch_size": context.get("local_batch_size"),
        "proximal_mu": context.get("proximal_mu"),
        "defense": defense,
    }
    return {name: value for name, value in facts.items() if value is not None}


def prepare_federation(settings: Settings, folder: FederationFolder, public_images: Any) -> None:
    """Write what later steps need to know of a federation: its settings, and the public images of the attacker."""
    write_json(folder.settings, settings.model_dump(mode="json", exclude={"attack", "threat", "title"}))
    if not folder.public_images.exists():
        write_tensors(folder.public_images, {"images": public_images}, {"type": "public-images"})


def updates_of(folder: FederationFolder) -> list[Path]:
    """Copied updates in order of round, then client."""
    found = []
    for path in folder.updates.glob("*-round-*.safetensors"):
        head, _, server_round = path.stem.rpartition("-round-")
        if not server_round.isdigit():
            continue
        number = head.rpartition("-")[2]
        found.append((int(server_round), int(number) if number.isdigit() else 0, head, path))
    return [item[-1] for item in sorted(found)]


def read_truth(folder: FederationFolder, update_path: Path) -> dict[str, Tensor] | None:
    """What the witness wrote of the clients behind an update: one client, or all of a round for an aggregate.

    For metrics and, through `plan_jobs`, for the oracles that a threat model names. None where there was no witness.
    """
    own = folder.truth / update_path.name
    if own.exists():
        return read_tensors(own)[0]
    if not update_path.stem.startswith("aggregate-round-"):
        return None
    behind = sorted(folder.truth.glob(f"*-{update_path.stem.removeprefix('aggregate-')}.safetensors"))
    parts = [read_tensors(path)[0] for path in behind]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]} if parts else None


def prior_of(settings: Settings, folder: FederationFolder) -> str:
    """threat.prior as an attack can load it: an absolute folder or a hub name, "" for none."""
    prior = settings.threat.prior
    if prior == FINAL:
        return str(best_weights(folder.checkpoint(settings.federation.rounds)).resolve())
    return str(path.resolve()) if prior and (path := Path(prior).expanduser()).exists() else prior


def plan_jobs(settings: Settings, run: RunFolder, update_path: Path, *, timeout_seconds: float) -> list[Job]:
    """One job for every attack of the cell on one update; the oracles of the threat model are looked up here, by name.

    A control led by another client's update is planned once both are there, that of the first client of a round with the
    second's.
    """
    unrelated = [attack for attack in settings.attack if attack.control == UNRELATED]
    others = [attack for attack in settings.attack if attack.control != UNRELATED]
    jobs = _jobs(settings, run, others, update_path, update_path, timeout_seconds)
    if unrelated:
        for target, other in _strangers(run.federation(settings.federation_id), update_path):
            jobs += _jobs(settings, run, unrelated, other, target, timeout_seconds)
    return jobs


def _strangers(folder: FederationFolder, path: Path) -> list[tuple[Path, Path]]:
    """(update, another client's of the same round) that can be paired now that `path` is there: each with the one before it."""
    behind = path.stem.rpartition("-round-")[2]
    same = [other for other in updates_of(folder) if other.stem.rpartition("-round-")[2] == behind]
    place = next((i for i, other in enumerate(same) if other.name == path.name), 0)
    if place == 0:
        return []
    return [(path, same[place - 1]), *([(same[0], path)] if place == 1 else [])]


def why_not_planned(folder: FederationFolder, attack: AttackSettings, path: Path) -> str:
    """Why an attack on a copied update will never have a job, "" where it has one or may still get it."""
    if attack.control != UNRELATED or not folder.done.exists():
        return ""
    number = path.stem.rpartition("-round-")[2]
    same = [other for other in updates_of(folder) if other.stem.rpartition("-round-")[2] == number]
    return "" if len(same) > 1 else "no other client's update of this round was copied"


def _jobs(
    settings: Settings,
    run: RunFolder,
    attacks: Sequence[AttackSettings],
    update_path: Path,
    target: Path,
    timeout_seconds: float,
) -> list[Job]:
    """Jobs on the update at `update_path` that are scored against the truth behind `target`."""
    folder = run.federation(settings.federation_id)
    update, context = load_update(update_path)
    visible = settings.threat.visible()
    facts = server_facts(update, context, settings.federation.defense)
    if prior := prior_of(settings, folder):
        facts["prior"] = prior

    def truth() -> dict[str, Any]:
        return read_truth(folder, update_path) or {}

    knowledge = build_knowledge(visible, facts, truth)
    tensors_path = (
        run.path
        / "knowledge"
        / f"{_digest([str(update_path.name), settings.federation_id, sorted(visible)])}.safetensors"
    )
    scalars = save_knowledge(tensors_path, knowledge)
    shows_public = "public_images" in visible and settings.threat.public_images > 0 and folder.public_images.exists()
    history = earlier_updates(update_path, update, settings.threat.earlier)
    files = {"public_images": shows_public, "history": bool(history)}
    weights = _prior_digest(knowledge.prior)
    known = sorted(knowledge.known() | {name for name, given in files.items() if given})
    return [
        Job(
            job=job_id(settings, target, attack),
            update=str(update_path.resolve()),
            attack=attack.name,
            parameters=attack.parameters,
            knowledge=scalars,
            tensors=str(tensors_path.resolve()) if set(known) & ORACLES else "",
            public_images=str(folder.public_images.resolve()) if shows_public else "",
            public_count=settings.threat.public_images,
            history=[str(path.resolve()) for path in history],
            seed=settings.seed,
            timeout_seconds=timeout_seconds,
            facts={
                **row_facts(settings, update if target == update_path else load_update(target)[0]),
                "attack": attack.shown,
                "attack_spec": attack.spec,
                "knowledge": known,
                "oracles": sorted(set(known) & ORACLES),
                "prior_digest": weights,
                "prior_data": _prior_data(settings, knowledge.prior),
            },
        )
        for attack in attacks
    ]


def _prior_digest(prior: str | None) -> str:
    """Of its U-Net's weights, "" where there are none on this machine: planning never waits for the hub."""
    if not prior:
        return ""
    try:
        folder = folder_of(prior, fetch=False)
    except MissingDependency:
        return ""
    return digest_of(unet_in(folder) or folder)


def _prior_data(settings: Settings, prior: str | None) -> dict[str, Any]:
    """What a prior was trained on, as far as it says; the federation's own final model on the very data under attack."""
    if prior and settings.threat.prior == FINAL:
        return {
            "dataset": settings.data.dataset,
            "split": "private",
            "steps": settings.federation.rounds,
            "seed": settings.seed,
        }
    return provenance.summary(prior or "")


def earlier_updates(path: Path, update: Update, most: int) -> list[Path]:
    """The last `most` copies of the same client before this one, latest first."""
    rounds = range(update.round - 1, 0, -1)
    found = [path.with_name(f"{update_name(update.client, number)}{path.suffix}") for number in rounds]
    return [copy for copy in found if copy.exists()][:most]


def job_id(settings: Settings, update_path: Path, attack: AttackSettings) -> str:
    """A name that says what is attacked, with a digest of how."""
    how = [attack.parameters, sorted(settings.threat.visible()), settings.threat.public_images, settings.title]
    if settings.threat.prior:
        how.append(settings.threat.prior)
    if settings.threat.history:
        how.append(["history", settings.threat.history])
    if attack.yardstick:
        how.append(["control", attack.control])
    digest = _digest([*how, _own_source(attack.name)])
    return f"{settings.federation_id}--{update_path.stem}--{attack.name.replace(':', '.')}-{digest}"


def row_facts(settings: Settings, update: Update) -> dict[str, Any]:
    """The fields of a result row that do not depend on the attack."""
    facts = cell_facts(settings)
    if update.kind == "gradient":
        total = sum(float(tensor.double().square().sum()) for tensor in update.received.values())
        count = sum(tensor.numel() for tensor in update.received.values())
        facts["defense_facts"]["update_rms"] = (total / max(count, 1)) ** 0.5
    return facts | {"client": update.client, "round": update.round}


def cell_facts(settings: Settings) -> dict[str, Any]:
    """The fields of a result row that a whole cell shares. A figure of a second defense of a chain gets a number."""
    federation = settings.federation
    figures: dict[str, Any] = {}
    for name, parameters in federation.defenses():
        for key, value in DEFENSES.create(name, **parameters).describe().items():
            taken = sum(known == key or known.startswith(f"{key}_of_") for known in figures)
            figures[f"{key}_of_{taken + 1}" if taken else key] = value
    return {
        "case": settings.title,
        "federation": settings.federation_id,
        "model": settings.model.name,
        "weights": settings.model.weights or "untrained",
        "dataset": settings.data.dataset,
        "task": settings.task.name,
        "protocol": federation.protocol,
        "strategy": federation.strategy_name,
        "mods": list(federation.mods),
        "defense": federation.defense,
        "defense_facts": figures,
        "batch_size": federation.batch_size,
        "local_steps": federation.local_steps,
        "precision": settings.precision,
        "threat_model": settings.threat.model,
        "history": settings.threat.earlier,
        "same_examples": federation.same_examples,
        "prior": settings.threat.prior if "prior" in settings.threat.visible() else "",
        "seed": settings.seed,
    }


def jobs_of(settings: Settings, run: RunFolder) -> Iterator[tuple[Path, str]]:
    """(update file, job id) of every planned job of a cell, in report order."""
    for path in updates_of(run.federation(settings.federation_id)):
        for attack in settings.attack:
            yield path, job_id(settings, path, attack)


def _own_source(name: str) -> str:
    """A digest of the source of an attack of one's own ("module:Class"), so that editing it makes new jobs."""
    if ":" not in name:
        return ""
    source = getsourcefile(ATTACKS.get(name))
    return hashlib.sha256(Path(source).read_bytes()).hexdigest() if source else ""


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:8]

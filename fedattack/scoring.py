"""From results and truths to rows: the one place, beside oracles, that opens `truth/`. Then everything a report needs.

Scores are computed once a job and kept; the rows file is written anew from them, so it never holds a job twice.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from fedattack.config import AttackSettings, Experiment, Settings, controls_left_out
from fedattack.errors import FedattackError, MissingDependency, NotApplicable, must
from fedattack.flooring import UNAVAILABLE, FloorRow, Floors
from fedattack.jobs import Job, load_outcome, reconstruction_path
from fedattack.metrics import NO_IMAGES, baselines, batch_mean, matched_images, psnr_db, score, ssim
from fedattack.metrics import lpips as lpips_distance
from fedattack.planning import cell_facts, job_id, read_truth, row_facts, updates_of, why_not_planned
from fedattack.provenance import overlap
from fedattack.recognition import Recognitions
from fedattack.seeding import derive_generator
from fedattack.store import (
    FederationFolder,
    RunFolder,
    finite,
    load_reconstruction,
    load_update,
    read_json,
    read_rows,
    read_tensors,
    save_png,
    write_json,
    write_rows,
)
from fedattack.types import Reconstruction

Row = dict[str, Any]
SCORED = 2
"""Grows whenever a score's row gets a field that rows kept by earlier versions lack: those are scored again."""

NO_TRUTH = "no truth was recorded (a deployment has no witness)"


def score_run(run: RunFolder, experiment: Experiment) -> list[Row]:
    """Score every finished job of the experiment and its baselines; writes rows.jsonl, history.jsonl and incidents.jsonl."""
    rows: list[Row] = []
    floors, recognitions = Floors(run, experiment), Recognitions(run, experiment)
    for settings in experiment.cells:
        rows += _cell_rows(run, settings, experiment.score.lpips, floors, recognitions)
    write_rows(run.rows, rows)
    _gather(run, experiment, "history")
    _gather(run, experiment, "incidents")
    return rows


def _cell_rows(
    run: RunFolder, settings: Settings, lpips: Sequence[str], floors: Floors, recognitions: Recognitions
) -> Iterator[Row]:
    folder = run.federation(settings.federation_id)
    updates = updates_of(folder)
    told = [_about_controls(settings, attack) for attack in settings.attack]
    if not updates:
        nothing = "no update was copied" + (": see the incidents" if folder.incidents.exists() else " yet")
        facts = cell_facts(settings) | {"kind": "attack", "status": "failed", "error": nothing, "oracles": []}
        yield from (facts | {"attack": attack.shown, "attack_spec": attack.spec} for attack in settings.attack)
    for update_path in updates:
        truth = read_truth(folder, update_path)
        floor = floors.row(settings, update_path) if settings.attack else None
        one_for_all = False
        for attack, about in zip(settings.attack, told, strict=True):
            row = _attack_row(run, settings, attack, update_path, truth, lpips)
            one_for_all |= row.get("represents") == "user"
            row |= about | recognitions.beside(row, settings, truth)
            yield row if floor is None else row | _floored(row, floor)
        if truth is not None and folder.public_images.exists() and settings.attack:
            for row, images in _baseline_rows(run, settings, folder, update_path, truth, lpips, one_for_all):
                yield row | recognitions.beside(row, settings, truth, images, one_for_all=one_for_all)


def _about_controls(settings: Settings, attack: AttackSettings) -> Row:
    """control: the kind of control that the row is; control_of: of which attacks; controls_left_out: of its own, each why."""
    facts: Row = {"control": attack.control, "control_of": list(attack.control_of)}
    facts["controls_left_out"] = controls_left_out(settings, attack)
    return {name: value for name, value in facts.items() if value}


def _floored(row: Row, floor: FloorRow) -> Row:
    """The floor beside an attack's figures, and why where there is none."""
    why = floor["reason"] if floor["status"] == UNAVAILABLE else floor["note"]
    facts: Row = {"floor": floor} | {name: floor[name] for name in ("rv", "relative_rv") if name in floor}
    return facts | ({"missing": {**row.get("missing", {}), "floor": why}} if why else {})


def _attack_row(
    run: RunFolder,
    settings: Settings,
    attack: AttackSettings,
    update_path: Path,
    truth: dict[str, Tensor] | None,
    lpips: Sequence[str],
) -> Row:
    """The row of an attack on an update: "pending" while its job has no outcome, "not-applicable" if it cannot have one."""
    job_name = job_id(settings, update_path, attack)
    kind = "baseline" if attack.yardstick else "attack"
    outcome = load_outcome(run.results, job_name)
    if outcome is None:
        client, _, number = update_path.stem.rpartition("-round-")
        who = {
            "client": client,
            "round": int(number),
            "attack": attack.shown,
            "attack_spec": attack.spec,
            "oracles": [],
        }
        if never := why_not_planned(run.federation(settings.federation_id), attack, update_path):
            status, error = "not-applicable", never
        else:
            status, error = "pending", "not run yet: start the run again"
        return cell_facts(settings) | who | {"job": job_name, "kind": kind, "status": status, "error": error}
    kept = run.scores / f"{job_name}.json"
    if (
        kept.exists()
        and (row := read_json(kept)).get("finished") == outcome.finished
        and row["lpips_nets"] == list(lpips)
        and row.get("scored") == SCORED
    ):
        return dict(row)
    job = Job.load(run.jobs / f"{job_name}.json")
    row = {
        **job.facts,
        "job": job_name,
        "kind": kind,
        "status": outcome.status,
        "error": outcome.error,
        "seconds": outcome.seconds,
        "device": outcome.device,
        "finished": outcome.finished,
        "lpips_nets": list(lpips),
        "scored": SCORED,
    }
    if outcome.status == "ok":
        found = load_reconstruction(reconstruction_path(run.results, job_name))
        row |= {
            "steps": found.steps,
            "losses": _thinned(found.losses),
            "diagnostics": found.diagnostics,
        }
        if found.represents != "images":
            row["represents"] = found.represents
        row |= _scored(run, job_name, found, truth, lpips)
        if truth is not None and row["status"] == "ok" and found.trajectory is not None:
            if wrong := _malformed(found):
                row["missing"] = row["missing"] | {"trajectory": wrong}
            else:
                row["trajectory"] = _along_the_way(run, job_name, found, row["assignment"], truth["images"], lpips)
        if truth is not None and (shared := overlap(truth["images"], str(job.knowledge.get("prior", "")))):
            row["prior_overlap"] = shared
        for given, accuracy in (("labels", "label_accuracy"), ("timesteps", "timestep_accuracy")):
            if given in row["oracles"]:
                row.pop(f"{given}_found", None)
                row |= {accuracy: None, "missing": row["missing"] | {accuracy: f"the {given} were given"}}
    missing = row.get("missing", {})
    # a backbone of LPIPS may appear later
    if not any(metric.startswith("lpips") and why != NO_IMAGES for metric, why in missing.items()):
        write_json(kept, finite(row))
    return row


def _baseline_rows(
    run: RunFolder,
    settings: Settings,
    folder: FederationFolder,
    update_path: Path,
    truth: dict[str, Tensor],
    lpips: Sequence[str],
    one_for_all: bool,
) -> Iterator[tuple[Row, Tensor]]:
    """Rows with their images. one_for_all: an attack gives one image for the batch, so its own mean stands beside it."""
    update, _ = load_update(update_path)
    count = settings.threat.public_images  # what the attacker has; the auditor's yardstick is all where it has none
    public = read_tensors(folder.public_images)[0]["images"][: count or None]
    generator = derive_generator(settings.seed, "baseline", settings.federation_id, update_path.stem)
    found = baselines(public.float(), truth["images"].float(), generator=generator)
    if one_for_all:
        found["batch-mean"] = batch_mean(truth["images"])
    for name, images in found.items():
        job = f"{settings.federation_id}--{update_path.stem}--{name}-of-{count}"
        kept = run.scores / f"{job}.json"
        if kept.exists() and read_json(kept)["lpips_nets"] == list(lpips):
            scored = read_json(kept)
        else:
            scored = _scored(run, job, Reconstruction(images=images), truth, lpips) | {"lpips_nets": list(lpips)}
            if not any(metric.startswith("lpips") for metric in scored.get("missing", {})):
                write_json(kept, finite(scored))
        facts = row_facts(settings, update) | {"knowledge": [], "oracles": []}
        who = {"job": job, "kind": "baseline", "attack": name, "attack_spec": name, "status": "ok"}
        yield {**facts, **who, **scored}, images


def _scored(
    run: RunFolder, job: str, found: Reconstruction, truth: dict[str, Tensor] | None, lpips: Sequence[str]
) -> Row:
    said: Row = {} if found.timesteps is None else {"timesteps_found": found.timesteps.tolist()}
    if truth is None:
        unknown = ("psnr_db", "ssim", "mse", "lpips", *(("timestep_accuracy",) if said else ()))
        shown = [] if found.represents == "timesteps" else list(found.images)
        return said | {
            "missing": dict.fromkeys(unknown, NO_TRUTH),
            "images": {"reconstruction": _pictures(run, job, shown)},
        }
    images = truth["images"]
    expected = 1 if found.represents == "user" else len(images)
    if len(found.images) != expected:
        counts = f"{len(found.images)} images for a batch of {len(images)}"
        counts += " that one image should represent" if found.represents == "user" else ""
        return {"status": "failed", "error": f"the attack returned {counts}: scores would flatter it", "missing": {}}
    try:
        labels, timesteps = truth.get("labels"), truth.get("timesteps")
        scores = score(found, images, labels, truth_timesteps=timesteps, lpips_nets=tuple(lpips))
    except FedattackError as error:
        return {"status": "failed", "error": f"result cannot be scored: {error}", "missing": {}}
    shown = [found.images[0]] if found.represents == "user" else matched_images(found.images, scores.assignment)
    pictures = {
        "truth": _pictures(run, _truth_name(job), list(images)),
        "reconstruction": _pictures(run, job, shown),
    }
    return said | scores.as_row() | {"images": pictures}


def _malformed(found: Reconstruction) -> str:
    """What is wrong with the images that the attack kept of its way, "" for nothing."""
    way, steps, shape = found.trajectory, found.trajectory_steps, tuple(found.images.shape)
    assert way is not None
    if tuple(way.shape[1:]) != shape or not len(way):
        return must("trajectory", f"images of several steps, each of shape {shape}", tuple(way.shape))
    if not way.is_floating_point():
        return must("trajectory", "floating-point", way.dtype)
    if not bool(((way >= 0) & (way <= 1)).all()):
        return must("trajectory", "in [0, 1]", f"{float(way.min())} to {float(way.max())}")
    if len(steps) != len(way):
        return must("trajectory_steps", f"{len(way)} numbers, one for each of its images", len(steps))
    return ""


def _along_the_way(
    run: RunFolder, job: str, found: Reconstruction, assignment: Sequence[int], truth: Tensor, lpips_nets: Sequence[str]
) -> Row:
    """Scores of the images that the attack kept of its way: steps, and by metric a list a step, a number for each true image.

    Every snapshot is compared with the true images that the result is compared with; true images without a result are left
    out. LPIPS only with the last network of `lpips_nets`, as {net: lists}. images: the way of the first of them, as files.
    """
    assert found.trajectory is not None
    pairs = [(place, chosen) for place, chosen in enumerate(assignment) if chosen >= 0]
    if not pairs:
        return {}
    places, chosen = (list(part) for part in zip(*pairs, strict=True))
    film = [images[chosen[0]] for images in found.trajectory]
    row: Row = {
        "steps": list(found.trajectory_steps),
        "image": places[0],
        "images": _pictures(run, f"{job}--way", film),
    }
    metrics: dict[str, Callable[[Tensor, Tensor], Tensor]]
    metrics = {"psnr_db": psnr_db, "ssim": ssim, **{net: partial(lpips_distance, net=net) for net in lpips_nets[-1:]}}
    for name, metric in metrics.items():
        with suppress(NotApplicable, MissingDependency):  # the result's own row says why
            values = [metric(images[chosen], truth[places]).tolist() for images in found.trajectory]
            row |= {"lpips": {name: values}} if name in lpips_nets else {name: values}
    return row


def _pictures(run: RunFolder, name: str, images: Sequence[Tensor | None]) -> list[str | None]:
    """PNG files of images in the truth's order, as paths below the run folder; None where there is no image."""
    paths: list[str | None] = []
    for number, image in enumerate(images):
        path = run.images / f"{name}-{number}.png"
        if image is not None and not (path.exists() and name.endswith("--truth")):
            save_png(path, image)
        paths.append(None if image is None else str(path.relative_to(run.path)))
    return paths


def _truth_name(job: str) -> str:
    federation, update, *_ = job.split("--")
    return f"{federation}--{update}--truth"


def _thinned(losses: Sequence[float], most: int = 200) -> list[float]:
    """At most `most` of the losses, evenly spaced, the first and the last among them."""
    if len(losses) <= most:
        return list(losses)
    return [losses[round(i * (len(losses) - 1) / (most - 1))] for i in range(most)]


def _gather(run: RunFolder, experiment: Experiment, name: str) -> None:
    """Put the federations' own histories (or incidents) together, each line with its case and defense."""
    lines = []
    for settings in {cell.federation_id: cell for cell in experiment.cells}.values():
        facts = {"case": settings.title, "federation": settings.federation_id, "defense": settings.federation.defense}
        lines += [facts | row for row in read_rows(getattr(run.federation(settings.federation_id), name))]
    write_rows(run.path / f"{name}.jsonl", lines)

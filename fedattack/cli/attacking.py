"""`fedattack attack`: one copied update, offline."""

import json
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedattack.cli.shared import image_shape_of
from fedattack.errors import FedattackError, UnknownName

if TYPE_CHECKING:
    from fedattack.types import Knowledge


def attack(
    update: Annotated[
        Path, typer.Argument(help="A copied update, e.g. runs/demo/federations/…/updates/client-0-round-1.safetensors.")
    ],
    attack: Annotated[
        list[str],
        typer.Option("--attack", "-a", help='An attack, with parameters if wanted: "dlg" or "dlg(iterations=100)".'),
    ],
    know: Annotated[
        list[str] | None,
        typer.Option("--know", "-k", help="A fact the attacker has, e.g. labels=[3,5] batch_size=2 learning_rate=0.1."),
    ] = None,
    model: Annotated[
        str, typer.Option(help='Model, if the file does not say: "lenet" or "package.module:Class(width=8)".')
    ] = "",
    task: Annotated[str, typer.Option(help='Task, if the file does not say: "classification" or "diffusion(…)".')] = "",
    image_shape: Annotated[str, typer.Option(help='Image shape, if the file does not say: "3,32,32".')] = "",
    num_classes: Annotated[int, typer.Option(help="Number of classes, if the file does not say.")] = 0,
    override: Annotated[
        bool,
        typer.Option("--override", help="Let --model, --task, --image-shape and --num-classes contradict the file."),
    ] = False,
    public: Annotated[
        str, typer.Option(help="Public images for the attacker: a data set, npz:PATH or images:FOLDER.")
    ] = "",
    truth: Annotated[
        Path | None, typer.Option(help="Truth file, only to score the result: the attack never sees it.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Where pictures and results go.")] = Path("reconstruction"),
    seed: Annotated[int, typer.Option(help="Root seed.")] = 0,
    timeout: Annotated[float, typer.Option(help="Seconds an attack may take.")] = 3600.0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")] = "auto",
    threads: Annotated[int, typer.Option(help="CPU threads; small models are fastest with one.")] = 1,
) -> None:
    """Attack one copied update offline. Needs neither Flower nor Ray, so it runs on any machine with torch.

    UPDATE is a file that the curious server wrote, such as copies/client-0-round-1.safetensors.
    """
    from fedattack.config import toml_value
    from fedattack.jobs import Job, outcome_path, reconstruction_path, run_job, save_knowledge, torch_threads
    from fedattack.planning import server_facts
    from fedattack.registry import parse_spec
    from fedattack.store import load_reconstruction, load_update, save_png

    copied, saved = load_update(update)
    context = _told_context(dict(saved), model, task, image_shape, num_classes, override)
    facts = server_facts(copied, context)
    said = dict(item.partition("=")[::2] for item in know or [])
    facts |= {key.strip(): toml_value(value.strip()) for key, value in said.items()}
    if "batch_size" not in facts:
        typer.echo("batch_size not given: assumed 1", err=True)
        facts["batch_size"] = 1
    if copied.num_examples not in (None, facts["batch_size"]):
        typer.echo(
            f"note: the client reported {copied.num_examples} examples, batch_size is {facts['batch_size']}", err=True
        )
    if copied.kind == "weights" and "local_steps" not in facts:
        typer.echo("local_steps not given: assumed 1 (one SGD step on the whole batch)", err=True)
    knowledge = _knowledge(facts)
    tensors = out / "knowledge.safetensors"
    tensors.unlink(missing_ok=True)
    scalars = save_knowledge(tensors, knowledge)
    images = _save_public(public, out, context["image_shape"]) if public else ""
    results, failed = out / "results", 0
    for spec in attack:
        name, parameters = parse_spec(spec)
        job = Job(
            job=f"{update.stem}--{name.replace(':', '.')}",
            update=str(update.resolve()),
            attack=name,
            parameters=parameters,
            knowledge=scalars,
            tensors=str(tensors.resolve()) if tensors.exists() else "",
            public_images=images,
            context=context,
            seed=seed,
            timeout_seconds=timeout,
            device=device,
        )
        outcome_path(results, job.job).unlink(missing_ok=True)  # this command always runs what it is asked to
        with torch_threads(threads):
            outcome = _run_with_bar(run_job, job, results)
        if outcome.status != "ok":
            typer.secho(f"{spec}: {outcome.status}: {outcome.error}", fg=typer.colors.YELLOW, err=True)
            failed += 1
            continue
        found = load_reconstruction(reconstruction_path(results, job.job))
        pictures = found.images if found.represents != "timesteps" else ()
        for number, image in enumerate(pictures):
            save_png(out / f"{job.job}-{number}.png", image)
        what = f"{len(pictures)} images" if len(pictures) or found.timesteps is None else "timesteps only"
        typer.echo(f"{spec}: {what} in {found.seconds:.1f} s, loss {_last(found.losses)}, in {out}")
        if found.timesteps is not None and knowledge.timesteps is None:
            typer.echo(f"    t: {_listed(found.timesteps.tolist())}")
        if found.diagnostics:
            typer.echo("    " + ", ".join(f"{key} {value:.4g}" for key, value in found.diagnostics.items()))
        if truth is not None:
            _print_scores(found, truth, given=knowledge.known())
    if failed:
        raise typer.Exit(1)


def _told_context(
    context: dict[str, Any], model: str, task: str, image_shape: str, num_classes: int, override: bool
) -> dict[str, Any]:
    """How to rebuild model and task: what the update's file says, what the command line adds to it, and nothing missing.

    A file leaves out options of which it was trained with the defaults, so these are stated, too. What the command line says
    otherwise is an error, under `override` a note; options that it does not name stay those of the file.
    """
    from fedattack.registry import parse_spec

    told: dict[str, Any] = {}
    for part, text in (("model", model), ("task", task)):
        if text:
            name, parameters = parse_spec(text)
            told[part] = {"name": name, "options": parameters}
    if image_shape:
        told["image_shape"] = list(image_shape_of(image_shape))
    if num_classes:
        told["num_classes"] = num_classes
    differing = []
    for part, here in told.items():
        there = context.get(part)
        if part not in ("model", "task"):
            pairs = [(str(there), str(here))] if there and there != here else []
        elif there:
            pairs, told[part] = _specs_compared(part, there, here)
        else:
            pairs = []
        flag = "--" + part.replace("_", "-")
        differing += [f"{flag} must be what the update says, {said}, got {given}" for said, given in pairs]
    if differing and not override:
        raise FedattackError("; ".join(differing) + " (--override insists on the command line)")
    for problem in differing:
        typer.echo(f"overridden: {problem}", err=True)
    context |= told
    context.setdefault("task", {"name": "classification", "options": {}})
    if missing := [key for key in ("model", "image_shape", "num_classes") if not context.get(key)]:
        flags = ", ".join("--" + key.replace("_", "-") for key in missing)
        raise FedattackError(f"the update does not say its {', '.join(missing)}: give {flags}")
    return context


def _specs_compared(
    part: str, there: dict[str, Any], here: dict[str, Any]
) -> tuple[list[tuple[str, str]], dict[str, Any]]:
    """What an update says of its model or task and the command line says otherwise, a pair each; and both put together.

    The command line goes first. Of another model or task the file says nothing, so its options stay away.
    """
    if not _same_object(part, there["name"], here["name"]):
        return [(there["name"], here["name"])], here
    stated = dict(there.get("options") or {})
    defaults = _defaults(part, here["name"])
    pairs = []
    for name, value in here["options"].items():
        known, note = (stated.get(name), "") if name in stated else (defaults.get(name, ...), " (the default)")
        if known is not ... and _as_saved(known) != _as_saved(value):
            pairs.append((f"{name}={known!r}{note}", f"{name}={value!r}"))
    return pairs, {"name": here["name"], "options": stated | here["options"]}


def _same_object(part: str, one: str, other: str) -> bool:
    """Whether both names, or a name and "module:Class", are the same model or task."""
    from fedattack.registry import MODELS

    if one == other or part == "task":
        return one == other
    with suppress(UnknownName):  # the file's own class need not be on this machine
        return MODELS.get(one) is MODELS.get(other)
    return False


def _defaults(part: str, name: str) -> dict[str, Any]:
    """Options that a model or task has where none are given, {} for an unknown one: whoever builds it says so."""
    from fedattack.registry import MODELS, parameters_of
    from fedattack.tasks import TASKS

    if part == "task":
        return parameters_of(TASKS[name]) if name in TASKS else {}
    with suppress(UnknownName):
        return MODELS.parameters(name)
    return {}


def _as_saved(value: Any) -> Any:
    """As a file gives it back: tuples are lists there."""
    return json.loads(json.dumps(value, default=str))


def _save_public(public: str, out: Path, image_shape: list[int], most: int = 256) -> str:
    """Public images of the victim's size in a file, as a job wants them."""
    from fedattack.data import load_dataset
    from fedattack.store import write_tensors

    data = load_dataset(public, image_size=image_shape[1]).public
    path = (out / "public.safetensors").resolve()
    write_tensors(path, {"images": data.images(range(min(most, len(data))))}, {"type": "public-images"})
    return str(path)


def _knowledge(facts: dict[str, Any]) -> "Knowledge":
    import torch

    from fedattack.errors import must, one_of
    from fedattack.knowledge import FIELDS
    from fedattack.types import Knowledge

    for name in facts:
        if name not in FIELDS:
            raise FedattackError(one_of("knowledge field", FIELDS, name))
    for name, value in facts.items():
        if name in ("noise", "public_images", "history"):
            raise FedattackError(
                f"{name} cannot be told on the command line" + (": use --public" if name == "public_images" else "")
            )
        if name in ("labels", "timesteps"):
            items = value if isinstance(value, list) else [value]
            if not items or not all(isinstance(item, int) for item in items):
                raise FedattackError(must(name, "whole numbers such as [3, 5]", value))
            facts[name] = torch.tensor(items, dtype=torch.long)
        elif name in ("learning_rate", "proximal_mu"):
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise FedattackError(must(name, "a number", value))
        elif name in ("batch_size", "num_classes", "local_steps", "local_batch_size") and (
            isinstance(value, bool) or not isinstance(value, int) or value < 1
        ):
            raise FedattackError(must(name, "a whole number of at least 1", value))
    return Knowledge(**facts)


def _run_with_bar(run_job: Any, job: Any, results: Path) -> Any:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[loss]}"),
    )
    with Progress(*columns, transient=True) as bar:
        task = bar.add_task(job.spec, total=None, loss="")
        return run_job(
            job,
            results,
            progress=lambda i, n, loss: bar.update(task, completed=i, total=n, loss=f"loss {loss:.3e}"),
        )


def _print_scores(found: Any, truth: Path, given: frozenset[str]) -> None:
    from fedattack.metrics import score
    from fedattack.store import read_tensors

    true = read_tensors(truth)[0]
    timesteps = None if "timesteps" in given else true.get("timesteps")
    scores = score(found, true["images"], true.get("labels"), truth_timesteps=timesteps, lpips_nets=("squeeze",))
    for name, values in (("PSNR (dB)", scores.psnr_db), ("SSIM", scores.ssim), ("MSE", scores.mse)):
        if values:
            typer.echo(f"    {name}: " + ", ".join("–" if value is None else f"{value:.4g}" for value in values))
    if scores.timestep_accuracy is not None:
        typer.echo(f"    timesteps found: {100 * scores.timestep_accuracy:.0f} %")


def _listed(values: list[int], most: int = 32) -> str:
    more = f" and {len(values) - most} more" if len(values) > most else ""
    return ", ".join(str(value) for value in values[:most]) + more


def _last(losses: tuple[float, ...]) -> str:
    return f"{losses[-1]:.3e}" if losses else "–"

"""The command line: one function a command. Heavy imports are inside the commands."""

import logging
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedattack import __version__
from fedattack.errors import FedattackError

if TYPE_CHECKING:
    from fedattack.analysis import Analysis
    from fedattack.types import Knowledge

app = typer.Typer(
    name="fedattack",
    help="How much does a federated-learning client's update leak? Train a Flower federation with an honest-but-curious "
    "server, attack the updates that it copied, and read the report.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


pool_app = typer.Typer(help="The attack pool of a run.", no_args_is_help=True)
app.add_typer(pool_app, name="pool")


class Kind(StrEnum):
    """What `fedattack list` can list."""

    attacks = "attacks"
    defenses = "defenses"
    models = "models"
    datasets = "datasets"
    strategies = "strategies"
    mods = "mods"


def main() -> None:
    """Entry point: errors of the package end as one readable message and exit code 2.

    Plugins in the current folder can be named as "module:Class", after everything that is installed.
    """
    sys.path.append(str(Path.cwd()))
    try:
        app()
    except FedattackError as error:
        typer.secho(f"{type(error).__name__}: {error}", fg=typer.colors.RED, err=True)
        raise SystemExit(2) from None


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show the log of fedattack.")] = False,
) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit
    level = logging.INFO if verbose else logging.WARNING
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("fedattack").setLevel(level)


@app.command()
def run(
    config: Annotated[Path, typer.Argument(help="A TOML configuration, e.g. experiments/recipes/demo.toml.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help='Changes as key=value, e.g. federation.rounds=5 model.name=\'["mlp", "lenet"]\'.'),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Run folder (default: runs/<name>).")] = None,
    retry_failed: Annotated[bool, typer.Option(help="Run failed and timed-out attacks again.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Check the configuration, say what would run, and stop.")] = False,
) -> None:
    """Train, attack, score, and write the report. A rerun goes on where an earlier one stopped.

    CONFIG is a TOML file such as experiments/recipes/demo.toml; OVERRIDES are changes to it as key=value, for example
    federation.rounds=5 or 'model.name=["mlp", "lenet"]'. A list where one value is expected multiplies.
    """
    from fedattack.config import load_config

    experiment = load_config(config, overrides or [])
    campaign = _by_name("experiments.campaign")
    for line in campaign.describe(experiment):
        typer.echo(line)
    if dry_run:
        return
    display = _by_name("strategies.pool_display").PoolDisplay()
    summary = campaign.run_campaign(
        experiment,
        out or Path("runs") / experiment.name,
        retry_failed=retry_failed,
        on_round=_say_round,
        on_status=display,
    )
    display.close()
    _print_summary(summary)
    if summary.statuses and not summary.statuses.get("ok"):
        raise typer.Exit(1)


@app.command()
def deploy(
    config: Annotated[Path, typer.Argument(help="A TOML configuration, e.g. experiments/recipes/quick.toml.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Changes as key=value, e.g. federation.rounds=5 pool.workers=2."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Run folder (default: runs/<name>).")] = None,
    retry_failed: Annotated[bool, typer.Option(help="Run failed and timed-out attacks again.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Check the configuration, say what would run, and stop.")] = False,
    witness: Annotated[
        bool | None,
        typer.Option(
            "--witness/--no-witness",
            help="Clients write the truth into the run folder, for scores; never about data of a node's own. On with "
            "processes of its own, off with --superlink (nodes must say so in their node config, too).",
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Folder with client-0, client-1, … (images): each node trains on its own instead of a share of the "
            "configuration's data set, and never writes the truth."
        ),
    ] = None,
    superlink: Annotated[
        str,
        typer.Option(help="host:port of a SuperLink that is up already, e.g. that of docker/; else one is started."),
    ] = "",
    root_certificates: Annotated[
        Path | None, typer.Option(help="With --superlink: certificate of the authority that signed the SuperLink's.")
    ] = None,
    ray_address: Annotated[
        str, typer.Option(help="With --superlink: host:port of the attacks' Ray head, as the ServerApp reaches it.")
    ] = "",
    wait: Annotated[float, typer.Option(help="With --superlink: seconds to wait for it and its nodes.")] = 120.0,
) -> None:
    """Run a campaign on a Flower deployment: SuperLink, SuperNodes and the rest as processes of their own, TLS and keys.

    All of it is started on 127.0.0.1 for this run and taken down at its end, or --superlink names one that is up. Rows are
    those of `fedattack run`. A rerun goes on where an earlier one stopped. Exit code 1: the run failed, or lost something.
    """
    from fedattack.config import load_config
    from fedattack.store import RunFolder

    if bool(superlink) != bool(root_certificates):
        raise FedattackError("--superlink and --root-certificates must be given together")
    if superlink and data:
        raise FedattackError("--data is for nodes that are started here; those of --superlink have their own already")
    experiment = load_config(config, overrides or [])
    _by_name("strategies.server_app").require_deployable(experiment)
    for line in _by_name("experiments.campaign").describe(experiment):
        typer.echo(line)
    if dry_run:
        return
    deployment = _by_name("experiments.deployment")
    target, display = out or Path("runs") / experiment.name, _by_name("strategies.pool_display").PoolDisplay()
    told = {"retry_failed": retry_failed, "on_round": _say_round, "on_status": display}
    try:
        if superlink:
            with deployment.existing(superlink, root_certificates, experiment, wait_seconds=wait) as flower:
                run_folder = RunFolder(target.resolve())
                summary = deployment.run_deployed(
                    experiment, run_folder, flower, ray_address=ray_address, witness=bool(witness), **told
                )
        else:
            summary = deployment.deploy(
                experiment,
                target,
                witness=witness is not False,
                data=data,
                on_line=lambda line: typer.echo(line, err=True),
                **told,
            )
    except deployment.DeploymentError as error:
        display.close()
        typer.secho(f"{error}", fg=typer.colors.RED, err=True)
        typer.echo(f"nothing that is in {target} is lost: run the same command again to go on", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        display.close()
        typer.echo(f"interrupted; run the same command again to go on in {target}", err=True)
        raise typer.Exit(130) from None
    display.close()
    _print_summary(summary)
    for line in summary.lost:
        typer.secho(f"lost: {line}", fg=typer.colors.YELLOW, err=True)
    attacked = any(cell.attack for cell in experiment.cells)
    if summary.lost or (attacked and not summary.statuses.get("ok")):
        raise typer.Exit(1)


@app.command()
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
    context = _told_context(dict(saved), model, task, image_shape, num_classes)
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
        for number, image in enumerate(found.images):
            save_png(out / f"{job.job}-{number}.png", image)
        typer.echo(f"{spec}: {len(found.images)} images in {found.seconds:.1f} s, loss {_last(found.losses)}, in {out}")
        if found.diagnostics:
            typer.echo("    " + ", ".join(f"{key} {value:.4g}" for key, value in found.diagnostics.items()))
        if truth is not None:
            _print_scores(found, truth)
    if failed:
        raise typer.Exit(1)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="A run folder.")],
    csv: Annotated[Path | None, typer.Option(help="Also write the rows as CSV.")] = None,
    parquet: Annotated[Path | None, typer.Option(help="Also write the rows as Parquet.")] = None,
    montage: Annotated[Path | None, typer.Option(help="Also write one picture (PNG) of all cases.")] = None,
    markdown: Annotated[bool, typer.Option(help="Also print the table as Markdown.")] = False,
) -> None:
    """Score what a run has so far and write its report again. FOLDER is a run folder, such as runs/demo."""
    from fedattack.finishing import finish_run, reopen_run
    from fedattack.report import markdown_table, write_montage, write_table
    from fedattack.store import RunFolder, read_rows

    target = RunFolder(folder)
    if not target.config.exists():
        raise FedattackError(
            f"run folder must be one that `fedattack run` made (with a config.toml), got {str(folder)!r}"
        )
    experiment = _by_name("experiments.campaign").load_run(folder)
    page = finish_run(target, experiment, reopen_run(target))
    rows = list(read_rows(target.rows))
    for path in (csv, parquet):
        if path is not None:
            write_table(rows, path)
            typer.echo(f"rows: {path}")
    if montage is not None:
        typer.echo(f"picture: {write_montage(target.path, rows, montage)}")
    if markdown:
        typer.echo(markdown_table(rows))
    typer.secho(f"report: {page}", bold=True)


@app.command()
def floor(
    config: Annotated[
        Path | None,
        typer.Argument(help="A TOML configuration, e.g. experiments/recipes/demo.toml; not needed with --run."),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Changes as key=value, e.g. federation.rounds=1 model.name=lenet.")
    ] = None,
    run: Annotated[
        Path | None,
        typer.Option("--run", help="A finished run folder: its updates are measured, its report can show it."),
    ] = None,
    sigma: Annotated[
        str, typer.Option(help="Noise to state the floor at, e.g. 1e-3,1e-2; the defense's own comes first.")
    ] = "1e-3,1e-2",
    db: Annotated[float, typer.Option(help="The PSNR whose least noise σ* is stated.")] = 20.0,
    method: Annotated[
        str, typer.Option(help="auto, exact, sketch (close to exact, less memory) or probes (least, a bound at worst).")
    ] = "auto",
    seconds: Annotated[
        float, typer.Option(help="Under auto and probes, seconds an update may take, estimated by counting operations.")
    ] = 600.0,
    rv: Annotated[
        bool, typer.Option("--rv", help="Also state RV = ‖∂gradient/∂images‖_F of every update, which ranks models.")
    ] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write everything as JSON.")] = None,
) -> None:
    """How well could any unbiased attack do? The Cramér-Rao floor of every update, before any attack is run.

    CONFIG is trained in a temporary folder (its attacks are left out), or --run names a folder that was. For each update:
    how many of the unknowns (pixels, and DDPM noise where hidden) it tells, the condition number, rms pixel error per unit of
    noise σ on every coordinate, the update's own rms, the PSNR that σ leaves, and σ*, the noise from which on no unbiased
    attack without a prior reaches --db. Noise-free updates are limited by the rounding of what is sent. Labels and timesteps
    count as known.
    """
    from tempfile import TemporaryDirectory

    from fedattack.config import load_config
    from fedattack.errors import must, one_of
    from fedattack.floor import METHODS
    from fedattack.store import RunFolder, finite, write_json

    if method not in METHODS:
        raise FedattackError(one_of("--method", METHODS, method))
    sigmas = _sigmas(sigma)
    if config is None and run is None:
        raise FedattackError("floor needs a configuration, or --run with a run folder")
    if run is not None and not RunFolder(run).config.exists():
        raise FedattackError(must("--run", "a folder that `fedattack run` made (with a config.toml)", str(run)))
    experiment = load_config(config or RunFolder(run or Path()).config, overrides or [])
    if run is not None:
        lines = _floor_lines(RunFolder(run.resolve()), experiment, method, seconds, db, rv)
    else:
        with TemporaryDirectory(prefix="fedattack-floor-") as folder:
            target = RunFolder(Path(folder) / "run")
            plain = [cell.model_copy(update={"attack": ()}) for cell in experiment.cells]
            pool = experiment.pool.model_copy(update={"workers": 0})
            trained = experiment.model_copy(update={"cells": tuple(plain), "pool": pool})
            _by_name("experiments.engines").run_in_process(trained, target, on_round=_say_round)
            lines = _floor_lines(target, experiment, method, seconds, db, rv)
    _print_floors(lines, sigmas, db)
    if json_file is not None:
        write_json(json_file, finite(lines))
        typer.echo(f"floors: {json_file}")
    if not any("rms_per_sigma" in line["floor"] for line in lines):
        raise typer.Exit(1)


@pool_app.command("status")
def pool_status(
    folder: Annotated[Path, typer.Argument(help="A run folder, such as runs/demo.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """How the attack jobs of a run stand: done, failed, running, waiting. Reads the folder, from any machine that sees it."""
    from dataclasses import asdict

    from fedattack.jobs import load_outcome
    from fedattack.store import RunFolder, finite

    run = RunFolder(folder)
    if not run.path.is_dir():
        raise FedattackError(f"FOLDER must be a run folder, got {str(folder)!r}")
    status = _by_name("strategies.attack_pool").pool_status(run)
    if as_json:
        import json

        typer.echo(json.dumps(finite(asdict(status)), indent=1))
        return
    counts = f"{status.done} done, {status.failed} failed, {len(status.running)} running, {status.waiting} waiting"
    typer.secho(f"{status.total} jobs: {counts}", bold=True)
    for item in status.running:
        loss = "" if item.loss is None else f", loss {item.loss:.3e}"
        typer.echo(
            f"running  {item.job}: {item.iteration} of {item.iterations or '?'}{loss}, {item.seconds:.0f} s, "
            f"worker {item.worker}"
        )
    for path in sorted(run.jobs.glob("*.json")) if status.failed else ():
        outcome = load_outcome(run.results, path.stem)
        if outcome is not None and outcome.status in ("failed", "timeout"):
            first = outcome.error.strip().splitlines()[0] if outcome.error.strip() else ""
            typer.secho(f"{outcome.status:8} {path.stem}: {first}", fg=typer.colors.YELLOW)


@app.command()
def analyse(
    model: Annotated[
        str,
        typer.Argument(
            help='A model: "lenet", "conv-chain(architecture=\'letnet-o\')", "package.module:Class(width=8)".'
        ),
    ],
    image_shape: Annotated[str, typer.Option(help="Shape of its images.")] = "3,32,32",
    num_classes: Annotated[int, typer.Option(help="Number of classes.")] = 10,
    batch: Annotated[int, typer.Option(help="Images of one gradient.")] = 1,
    probes: Annotated[int, typer.Option(help="Clients to play, each with initial weights of its own.")] = 5,
    data: Annotated[
        str, typer.Option(help="Public images to play with: a data set, npz:PATH or images:FOLDER.")
    ] = "patches",
    weights: Annotated[
        Path | None, typer.Option(help="The model's weights (safetensors), instead of initial ones.")
    ] = None,
    evaluation: Annotated[
        bool, typer.Option("--evaluation", help="Clients compute gradients in evaluation mode.")
    ] = False,
    precision: Annotated[str, typer.Option(help="In which the update is sent: float32 or float64.")] = "float32",
    seed: Annotated[int, typer.Option(help="Root seed.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write everything as JSON.")] = None,
) -> None:
    """Which layers of MODEL could be inverted in closed form, and what would close the gap: before any data is seen.

    MODEL is a name with options if wanted, "conv-chain(architecture='letnet-o')", or "package.module:Class(width=8)".

    For every convolution: unknowns of its input, gradient constraints (the entries of its weight's gradient), and the number of
    filters from which gradient constraints, or its outputs alone, are as many as the unknowns. Then clients are played with
    public images and their updates inverted by r-conv: rank and condition number of each layer's equations, and what came out.
    """
    from fedattack.analysis import analyse as analysed
    from fedattack.analysis import as_records, probe_images
    from fedattack.cells import DTYPES
    from fedattack.errors import must, one_of
    from fedattack.registry import parse_spec
    from fedattack.store import finite, read_tensors, write_json

    if precision not in DTYPES:
        raise FedattackError(one_of("--precision", DTYPES, precision))
    for option, count in (("--batch", batch), ("--probes", probes), ("--num-classes", num_classes)):
        if count < 1:
            raise FedattackError(must(option, "a whole number of at least 1", count))
    name, options = parse_spec(model)
    found = analysed(
        name,
        options,
        probe_images(data, _shape(image_shape), probes * batch),
        num_classes,
        batch=batch,
        seed=seed,
        training=not evaluation,
        weights=read_tensors(weights)[0] if weights else None,
        dtype=DTYPES[precision],
    )
    _print_analysis(found, model)
    if json_file is not None:
        write_json(json_file, finite(as_records(found)))
        typer.echo(f"analysis: {json_file}")


@app.command("train-prior")
def train_prior(
    data: Annotated[str, typer.Argument(help="A data set: a registered name, npz:PATH or images:FOLDER.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The prior's folder: a diffusers pipeline.")],
    preset: Annotated[
        str, typer.Option(help="cpu (32 px), gpu-64 or gpu-128; every option below changes one thing of it.")
    ] = "cpu",
    split: Annotated[str | None, typer.Option(help="public (default), private, test or all.")] = None,
    options: Annotated[
        list[str] | None, typer.Option("--option", help="Of the data set's loader, e.g. limit=5000.")
    ] = None,
    size: Annotated[int | None, typer.Option(help="Side of the images in pixels.")] = None,
    channels: Annotated[str | None, typer.Option(help="Of the U-Net's levels, e.g. 32,64,64.")] = None,
    layers: Annotated[int | None, typer.Option(help="Blocks of a level.")] = None,
    attention: Annotated[str | None, typer.Option(help="Levels with attention beside the bottom, e.g. 1,2.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of Adam.")] = None,
    batch: Annotated[int | None, typer.Option(help="Images of a step.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Its peak; it falls linearly to zero.")] = None,
    ema: Annotated[float | None, typer.Option(help="Decay of the weights' moving average.")] = None,
    flips: Annotated[bool | None, typer.Option(help="Mirror images at random.")] = None,
    prediction: Annotated[str | None, typer.Option(help="epsilon or v_prediction.")] = None,
    schedule: Annotated[str | None, typer.Option(help="linear, squaredcos_cap_v2, … of diffusers.")] = None,
    seed: Annotated[int, typer.Option(help="Of the weights and of every draw.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")] = "auto",
    threads: Annotated[int, typer.Option(help="CPU threads; 0: all cores.")] = 0,
    samples: Annotated[int, typer.Option(help="Images of the sample grid; 0: none.")] = 36,
    save_every: Annotated[
        int, typer.Option(help="Steps between the files that an interrupted training goes on from.")
    ] = 500,
) -> None:
    """Train a diffusion model to be an attacker's prior: an unconditional DDPM on public images, in diffusers' format.

    Interrupted, it goes on where it was, to the same bits; a folder trained with the same settings on the same images is
    used as it is. provenance.json says what the prior was trained on; give the folder as threat.prior. The preset cpu
    takes 20 to 30 minutes on two cores; gpu-64 and gpu-128 want one GPU of 24 GB.
    """
    from contextlib import nullcontext

    import torch

    from fedattack.config import toml_value
    from fedattack.jobs import torch_threads
    from fedattack.prior_training import prior_settings
    from fedattack.prior_training import train_prior as train

    said = dict(item.partition("=")[::2] for item in options or [])
    settings = prior_settings(
        data,
        preset,
        options={key.strip(): toml_value(value.strip()) for key, value in said.items()},
        split=split,
        size=size,
        channels=_whole_numbers("--channels", channels),
        layers=layers,
        attention=_whole_numbers("--attention", attention),
        steps=steps,
        batch=batch,
        learning_rate=learning_rate,
        ema=ema,
        flips=flips,
        prediction=prediction,
        schedule=schedule,
        seed=seed,
    )
    where = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    with torch_threads(threads) if threads else nullcontext(), _training_bar() as told:
        about = train(settings, out, device=where, samples=samples, save_every=save_every, progress=told)
    loss, seen = about["loss"], about["data"]
    typer.echo(f"{seen['images']:,} images ({seen['split']} of {seen['dataset']}), {about['steps']:,} steps")
    average = f"loss {loss['last']:.4f}; of the moving average {loss['average_on_trained']:.4f}"
    if (held_out := loss["average_on_held_out"]) is not None:
        average += f", on the test split {held_out:.4f}"
    typer.echo(average)
    typer.secho(f"prior: {out}", bold=True)


@app.command("list")
def list_plugins(kind: Annotated[Kind, typer.Argument(help="What to list.")]) -> None:
    """List what is registered, with parameters and their defaults: attacks, defenses, models, datasets, strategies, mods."""
    from fedattack import registry

    found: registry.Registry = getattr(registry, kind.name.upper())
    for name in found.names():
        typer.secho(name, bold=True)
        typer.echo(f"    {found.summary(name)}")
        parameters = [
            key if default is ... else f"{key}={default!r}"
            for key, default in found.parameters(name).items()
            if key not in ("federation", "image_shape", "num_classes")
        ]
        if parameters:
            typer.echo(f"    {', '.join(parameters)}")


def _print_summary(summary: Any) -> None:
    counts = ", ".join(f"{number} {status}" for status, number in sorted(summary.statuses.items())) or "none"
    typer.echo(f"attacks: {counts}")
    if summary.statuses:
        _print_table(summary.run.rows)
    typer.secho(f"report: {summary.report}", bold=True)


def _whole_numbers(option: str, text: str | None) -> tuple[int, ...] | None:
    from fedattack.errors import must

    parts = None if text is None else [part.strip() for part in text.split(",") if part.strip()]
    if parts and not all(part.isdigit() for part in parts):
        raise FedattackError(must(option, "whole numbers such as 32,64", text))
    return None if parts is None else tuple(int(part) for part in parts)


@contextmanager
def _training_bar() -> Iterator[Any]:
    """A progress for a training, with its loss; it starts where the training does."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[loss]}"),
    )
    with Progress(*columns) as bar:
        task = bar.add_task("training", total=None, loss="")
        yield lambda i, n, loss: bar.update(task, completed=i, total=n, loss=f"loss {loss:.4f}")


def _sigmas(text: str) -> list[float]:
    from fedattack.errors import must

    try:
        found = [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        found = []
    if not found or min(found) <= 0:
        raise FedattackError(must("--sigma", "positive numbers such as 1e-3,1e-2", text))
    return found


def _vulnerability_of(run: Any, cell: Any, path: Path) -> dict[str, Any]:
    """RV of an update: rv, rv_over_update_rms, relative_error; or the reason why there is none."""
    from fedattack.flooring import target_of

    try:
        found = target_of(run, cell, path).vulnerability()
    except FedattackError as reason:
        return {"reason": str(reason)}
    return {"rv": found.rv, "rv_over_update_rms": found.relative, "relative_error": found.relative_error}


def _floor_lines(run: Any, experiment: Any, method: str, seconds: float, db: float, rv: bool) -> list[dict[str, Any]]:
    """One line an update of every cell that differs in more than its attacks, with a bar that counts derivatives."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from fedattack.flooring import Floors
    from fedattack.planning import cell_facts, updates_of

    cells = {(cell.federation_id, "noise" in cell.threat.visible()): cell for cell in reversed(experiment.cells)}
    score = experiment.score.model_copy(update={"floor_db": db})
    experiment = experiment.model_copy(update={"cells": tuple(reversed(cells.values())), "score": score})
    floors = Floors(run, experiment, method=method, seconds_each=seconds)
    targets = [(cell, path) for cell in experiment.cells for path in updates_of(run.federation(cell.federation_id))]
    if not targets:
        raise FedattackError("there is no copied update to measure: did the run finish?")
    lines = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True) as bar:
        whole, one = bar.add_task("updates", total=len(targets)), bar.add_task("", total=None)
        for cell, path in targets:
            bar.reset(one, description=f"{cell.title}: {path.stem}")
            row = floors.row(cell, path, lambda done, total, _: bar.update(one, completed=done, total=total))
            client, _, number = path.stem.rpartition("-round-")
            line = cell_facts(cell) | {"client": client, "round": int(number), "floor": row}
            lines.append(line | ({"vulnerability": _vulnerability_of(run, cell, path)} if rv else {}))
            bar.advance(whole)
    return lines


def _vulnerability_words(about: dict[str, Any]) -> str:
    from fedattack.report.summary import small_number

    if "rv" not in about:
        return f"no RV: {about['reason']}"
    error = f" ± {100 * about['relative_error']:.1f} %" if about["relative_error"] else ""
    return (
        f"RV {small_number(about['rv'])}{error}, {small_number(about['rv_over_update_rms'])} times the gradient's rms"
    )


def _print_floors(lines: list[dict[str, Any]], sigmas: list[float], db: float) -> None:
    from rich.console import Console
    from rich.table import Table

    from fedattack.report.summary import defense_label, plain_number, small_number

    def decibel(floor: dict[str, Any], noise: float) -> str:
        if floor["hidden"]:
            return "–"
        value = -20.0 * math.log10(noise * floor["rms_per_sigma"])
        return ("≤ " if floor["status"] == "at least" else "") + plain_number(value)

    console = Console(width=None if sys.stdout.isatty() else 180)
    for title, defense in dict.fromkeys((line["case"], line["defense"]) for line in lines):
        table = Table(title=f"{title} · {defense_label(defense)}", title_justify="left")
        own = "rounding" if defense == "none" else "defense's σ"
        heads = ["update", "method", "rank / unknowns", "condition", "rms per σ", "update rms", f"dB at {own}"]
        for head in [*heads, *(f"dB at σ={s:g}" for s in sigmas), f"σ* ({db:g} dB)", "σ*/update rms"]:
            table.add_column(head, justify="left" if head in ("update", "method") else "right", no_wrap=True)
        notes = []
        for line in (item for item in lines if (item["case"], item["defense"]) == (title, defense)):
            floor, name = line["floor"], f"{line['client']}, round {line['round']}"
            if about := line.get("vulnerability"):
                notes.append(f"{name}: {_vulnerability_words(about)}")
            if "rms_per_sigma" not in floor:
                notes.append(f"{name}: {floor['reason']}")
                table.add_row(name, "not available")
                continue
            if floor["note"]:
                notes.append(f"{name}: {floor['note']}")
            if floor["hidden"]:
                hidden = f"{floor['hidden']:,} of {floor['pixels']:,} image directions"
                notes.append(f"{name}: not identifiable: {hidden}; rms per σ is over the others")
            at_own = floor["floor_psnr_db"] if floor["noise_std"] else floor["rounding_psnr_db"]
            error = f" ± {100 * floor['relative_error']:.1f} %" if floor["relative_error"] else ""
            bound = "≥ " if floor["status"] == "at least" else ""
            star = floor["sigma_at_target_db"]
            table.add_row(
                name,
                floor["method"],
                f"{'?' if floor['rank'] is None else format(floor['rank'], ',')} / {floor['unknowns']:,}",
                small_number(floor["condition"]),
                f"{bound}{small_number(floor['rms_per_sigma'])}{error}",
                small_number(floor["update_rms"]),
                plain_number(at_own),
                *(decibel(floor, s) for s in sigmas),
                small_number(star) if star else "–",
                small_number(star / floor["update_rms"]) if star and floor["update_rms"] else "–",
            )
        console.print(table)
        for note in dict.fromkeys(notes):
            typer.echo(f"  {note}")


def _print_analysis(found: "Analysis", model: str) -> None:
    from rich.console import Console
    from rich.table import Table

    from fedattack.report.summary import plain_number, small_number

    console = Console(width=None if sys.stdout.isatty() else 180)
    table = Table(title=f"{model} · batches of {found.batch}", title_justify="left")
    numbers = ("unknowns", "gradient constraints", "rank", "condition", "filters for gradients", "filters for outputs")
    for head in ("layer", "filters, kernel, stride", "input", *numbers, "verdict"):
        table.add_column(head, justify="right" if head in numbers else "left")
    for layer in found.layers:
        shape = layer.shape
        reached = [probe for probe in found.probes if probe.of(layer.name, "rank") is not None]
        ranks = [int(probe.of(layer.name, "rank") or 0) for probe in reached]
        conditions = [probe.of(layer.name, "condition") or math.inf for probe in reached]
        table.add_row(
            layer.name,
            f"{shape.filters}, {shape.kernel[0]}×{shape.kernel[1]}, {shape.stride[0]}",
            f"{shape.channels}×{shape.height}×{shape.width}",
            f"{found.batch * shape.unknowns:,}",
            f"{shape.gradient_constraints * shape.channels:,}",
            _range(ranks, lambda rank: f"{rank:,}"),
            _range(conditions, small_number),
            "never" if layer.filters_for_gradients is None else str(layer.filters_for_gradients),
            str(layer.filters_for_weights),
            found.verdict(layer),
        )
    console.print(table)
    for refusal in dict.fromkeys(probe.refusal for probe in found.probes if probe.refusal):
        typer.echo(f"  r-conv is not applicable: {refusal}")
    if psnrs := sorted(value for probe in found.probes for value in probe.psnr_db):
        middle, low, high = (plain_number(psnrs[k]) for k in (len(psnrs) // 2, 0, -1))
        typer.echo(
            f"  r-conv on {len(found.probes)} played clients with public images: median {middle} dB ({low} to {high})"
        )


def _range(values: Sequence[Any], text: Any) -> str:
    """Least and largest."""
    if not values:
        return "–"
    low, high = text(min(values)), text(max(values))
    return str(low) if low == high else f"{low} to {high}"


def _say_round(settings: Any, number: int, figures: Mapping[str, float]) -> None:
    if number:
        federation = settings.federation
        said = "".join(f", {name.replace('_', ' ')} {value:.4g}" for name, value in figures.items())
        typer.echo(f"  {settings.title} [{federation.defense}]: round {number} of {federation.rounds} over{said}")


def _by_name(module: str) -> Any:
    """A room above this one (experiments, strategies), reached by name so that the shared language does not depend on it."""
    from importlib import import_module

    return import_module(module)


def _shape(text: str) -> tuple[int, int, int]:
    """An --image-shape."""
    from fedattack.errors import must

    sides = text.split(",")
    if len(sides) != 3 or not all(side.strip().isdigit() and int(side) for side in sides):
        raise FedattackError(must("--image-shape", 'three whole numbers such as "3,32,32"', text))
    return int(sides[0]), int(sides[1]), int(sides[2])


def _told_context(context: dict[str, Any], model: str, task: str, image_shape: str, num_classes: int) -> dict[str, Any]:
    """How to rebuild model and task: what the update's file says, what the command line says over it, and nothing missing."""
    from fedattack.registry import parse_spec

    for part, text in (("model", model), ("task", task)):
        if text:
            name, parameters = parse_spec(text)
            context[part] = {"name": name, "options": parameters}
    if image_shape:
        context["image_shape"] = list(_shape(image_shape))
    if num_classes:
        context["num_classes"] = num_classes
    context.setdefault("task", {"name": "classification", "options": {}})
    if missing := [key for key in ("model", "image_shape", "num_classes") if not context.get(key)]:
        flags = ", ".join("--" + key.replace("_", "-") for key in missing)
        raise FedattackError(f"the update does not say its {', '.join(missing)}: give {flags}")
    return context


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


def _print_scores(found: Any, truth: Path) -> None:
    from fedattack.metrics import score
    from fedattack.store import read_tensors

    true = read_tensors(truth)[0]
    scores = score(found, true["images"], true.get("labels"), lpips_nets=("squeeze",))
    for name, values in (("PSNR (dB)", scores.psnr_db), ("SSIM", scores.ssim), ("MSE", scores.mse)):
        if values:
            typer.echo(f"    {name}: " + ", ".join("–" if value is None else f"{value:.4g}" for value in values))


def _print_table(rows: Path) -> None:
    from fedattack.report import markdown_table
    from fedattack.store import read_rows

    typer.echo(markdown_table(list(read_rows(rows))))


def _last(losses: tuple[float, ...]) -> str:
    return f"{losses[-1]:.3e}" if losses else "–"


if __name__ == "__main__":
    main()

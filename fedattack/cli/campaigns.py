"""Commands on whole runs: train and attack, in process or deployed, report, the pool's state."""

from pathlib import Path
from typing import Annotated, Any

import typer

from fedattack.cli.shared import by_name, say_round
from fedattack.errors import FedattackError


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
    campaign = by_name("experiments.campaign")
    for line in campaign.describe(experiment):
        typer.echo(line)
    if dry_run:
        return
    display = by_name("strategies.pool_display").PoolDisplay()
    summary = campaign.run_campaign(
        experiment,
        out or Path("runs") / experiment.name,
        retry_failed=retry_failed,
        on_round=say_round,
        on_status=display,
    )
    display.close()
    _print_summary(summary)
    if summary.statuses and not summary.statuses.get("ok"):
        raise typer.Exit(1)


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
    by_name("strategies.server_app").require_deployable(experiment)
    for line in by_name("experiments.campaign").describe(experiment):
        typer.echo(line)
    if dry_run:
        return
    deployment = by_name("experiments.deployment")
    target, display = out or Path("runs") / experiment.name, by_name("strategies.pool_display").PoolDisplay()
    told = {"retry_failed": retry_failed, "on_round": say_round, "on_status": display}
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
    experiment = by_name("experiments.campaign").load_run(folder)
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
    _print_figures(target)
    typer.secho(f"report: {page}", bold=True)


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
    status = by_name("strategies.attack_pool").pool_status(run)
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


def _print_summary(summary: Any) -> None:
    counts = ", ".join(f"{number} {status}" for status, number in sorted(summary.statuses.items())) or "none"
    typer.echo(f"attacks: {counts}")
    if summary.statuses:
        _print_table(summary.run.rows)
    _print_figures(summary.run)
    typer.secho(f"report: {summary.report}", bold=True)


def _print_table(rows: Path) -> None:
    from fedattack.report import markdown_table
    from fedattack.store import read_rows

    typer.echo(markdown_table(list(read_rows(rows))))


def _print_figures(run: Any) -> None:
    """The files of the recipe's figures, and what could not be drawn."""
    from fedattack.store import read_rows

    for figure in read_rows(run.drawn):
        for file in figure["files"]:
            typer.echo(f"figure: {run.path / file}")
        for problem in figure["problems"]:
            typer.secho(f"figure not drawn in full ({figure['title']}): {problem}", fg=typer.colors.YELLOW, err=True)

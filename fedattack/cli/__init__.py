"""The command line. Here are its commands; each stands in a module of its own, with its heavy imports inside."""

import logging
import sys
from pathlib import Path
from typing import Annotated

import typer

from fedattack import __version__
from fedattack.cli.analysing import analyse
from fedattack.cli.attacking import attack
from fedattack.cli.campaigns import deploy, pool_status, report, run
from fedattack.cli.floors import floor
from fedattack.cli.plugins import Kind, list_plugins
from fedattack.cli.priors import train_prior
from fedattack.errors import FedattackError

__all__ = ["Kind", "app", "main"]

app = typer.Typer(
    name="fedattack",
    help="How much does a federated-learning client's update leak? Train a Flower federation with an honest-but-curious "
    "server, attack the updates that it copied, and read the report.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


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


for command in (run, deploy, attack, report, floor, analyse):
    app.command()(command)
app.command("train-prior")(train_prior)
app.command("list")(list_plugins)

pool = typer.Typer(help="The attack pool of a run.", no_args_is_help=True)
pool.command("status")(pool_status)
app.add_typer(pool, name="pool")


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

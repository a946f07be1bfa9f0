"""`fedattack list`."""

from enum import StrEnum
from typing import Annotated

import typer


class Kind(StrEnum):
    """What `fedattack list` can list."""

    attacks = "attacks"
    defenses = "defenses"
    models = "models"
    datasets = "datasets"
    strategies = "strategies"
    mods = "mods"


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

"""What several commands use."""

from collections.abc import Mapping
from typing import Any

import typer

from fedattack.errors import FedattackError


def by_name(module: str) -> Any:
    """A room above this one (experiments, strategies), reached by name so that the shared language does not depend on it."""
    from importlib import import_module

    return import_module(module)


def whole_numbers(option: str, text: str | None) -> tuple[int, ...] | None:
    from fedattack.errors import must

    parts = None if text is None else [part.strip() for part in text.split(",") if part.strip()]
    if parts and not all(part.isdigit() for part in parts):
        raise FedattackError(must(option, "whole numbers such as 32,64", text))
    return None if parts is None else tuple(int(part) for part in parts)


def image_shape_of(text: str) -> tuple[int, int, int]:
    """An --image-shape."""
    from fedattack.errors import must

    sides = text.split(",")
    if len(sides) != 3 or not all(side.strip().isdigit() and int(side) for side in sides):
        raise FedattackError(must("--image-shape", 'three whole numbers such as "3,32,32"', text))
    return int(sides[0]), int(sides[1]), int(sides[2])


def say_round(settings: Any, number: int, figures: Mapping[str, float]) -> None:
    if number:
        federation = settings.federation
        said = "".join(f", {name.replace('_', ' ')} {value:.4g}" for name, value in figures.items())
        typer.echo(f"  {settings.title} [{federation.defense}]: round {number} of {federation.rounds} over{said}")

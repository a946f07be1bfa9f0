"""`fedattack analyse`: what a model gives away by linear algebra, before any data."""

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedattack.cli.shared import image_shape_of
from fedattack.errors import FedattackError

if TYPE_CHECKING:
    from fedattack.analysis import Analysis


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
        probe_images(data, image_shape_of(image_shape), probes * batch),
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

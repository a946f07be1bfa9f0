"""`fedattack train-prior`: an attacker's diffusion prior."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from fedattack.cli.shared import whole_numbers


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
        channels=whole_numbers("--channels", channels),
        layers=layers,
        attention=whole_numbers("--attention", attention),
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

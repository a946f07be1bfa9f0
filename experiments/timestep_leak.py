"""How surely the timesteps of a DDPM client's batch can be read off its update, as two Markdown tables.

    python -m experiments.timestep_leak [--widths 32 64 128] [--batches 1 … 32] [--repeats 10] [--out ROWS.jsonl]

Every cell draws `repeats` batches of patches with t uniform in 0 … 999, lets the client compute its gradient in float32 or
float64 on an untrained U-Net or one trained for `--training-steps` Adam steps, and runs `attacks.timesteps.infer_timesteps`
with the noise level unknown (first table) or known (second). set: rate of batches whose distinct timesteps are all found.
all: rate of batches found with multiplicity. no twins: rate of batches without a repeated timestep, which is what `all` would
be if repetition could not be guessed and the set were always found. hits: share of the multiset found; MUSIC hits: the same
for the B smallest residuals of the first layer's span test alone. exact: how often the attack itself was sure. 99 % set: rate
of timesteps inside their member's own (members in ascending order; conditional on the others, so too small for batches).
σ is relative to the rms of the first layer's own weight gradient. ms: median of a call, one thread.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from attacks.timesteps import infer_timesteps, timestep_table
from fedattack.data import load_dataset
from fedattack.jobs import torch_threads
from fedattack.models import build_model
from fedattack.seeding import derive_generator
from fedattack.tasks import Diffusion, simulate_gradient
from fedattack.types import Knowledge, Update

SIZE = 8
LAYER = "unet.time_embedding.linear_1"
SIGMAS = (1e-3, 1e-2, 1e-1, 0.3, 1.0, 3.0, 10.0)
DTYPES = {"float32": torch.float32, "float64": torch.float64}


def victim(width: int, training_steps: int, images: Tensor) -> nn.Module:
    """A U-Net whose time embedding has `width` dimensions, trained with Adam on batches of 16."""
    channels = (width, 2 * width) if width < 128 else (width,)
    options = {"block_out_channels": channels, "attention": (), "mid_attention": False}
    model = build_model("unet", image_shape=tuple(images.shape[1:]), num_classes=None, seed=0, **options)
    generator = derive_generator(0, "victim", width)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(training_steps):
        rows = torch.randint(0, len(images), (16,), generator=generator)
        optimizer.zero_grad()
        Diffusion().loss(model, Diffusion().draw(images[rows], rows, generator=generator)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return model


def music(update: Update, table: Tensor, members: int) -> list[int]:
    """Plain MUSIC: the timesteps nearest to the span of the first singular vectors."""
    basis = torch.linalg.svd(update.received[f"{LAYER}.weight"].double(), full_matrices=False).Vh[:members]
    unit = table / table.norm(dim=1, keepdim=True)
    nearest: list[int] = (unit @ basis.T).square().sum(1).argsort(descending=True)[:members].tolist()
    return nearest


def cell(
    model: nn.Module, images: Tensor, *, batch: int, dtype: str, sigma: float, known: bool, repeats: int, seed: int
) -> dict[str, Any]:
    """Rates over `repeats` batches. sigma is relative to the layer's own rms."""
    task, precision = Diffusion(), DTYPES[dtype]
    state = {name: tensor.detach().to(precision) for name, tensor in model.state_dict().items()}
    knowledge = Knowledge(image_shape=(3, SIZE, SIZE), batch_size=batch)
    _, table = timestep_table(model, state, set(state), (3, SIZE, SIZE), task.num_train_timesteps)
    draws: list[dict[str, float]] = []
    for repeat in range(repeats):
        generator = derive_generator(seed, "batch", batch, repeat)
        rows = torch.randint(0, len(images), (batch,), generator=generator)
        private = task.draw(images[rows].to(precision), rows, generator=generator)
        gradient = simulate_gradient(model, state, task, [private])
        noise = sigma * float(gradient[f"{LAYER}.weight"].square().mean().sqrt())
        sent = {n: g + noise * torch.randn(g.shape, generator=generator, dtype=precision) for n, g in gradient.items()}
        update = Update(1, "0", state, sent if sigma else gradient, "gradient", batch)
        begun = perf_counter()
        found = infer_timesteps(update, model, task, knowledge, sigma=noise if known else None)
        seconds = perf_counter() - begun
        truth = Counter(private["timesteps"].tolist())
        guess = Counter(found.timesteps.tolist())
        draws.append(
            {
                "set": set(truth) == set(guess),
                "all": truth == guess,
                "hits": (truth & guess).total() / batch,
                "music_hits": (truth & Counter(music(update, table, batch))).total() / batch,
                "no_twins": len(truth) == batch,
                "exact": found.exact,
                "inside": mean(t in found.credible_set(k).tolist() for k, t in enumerate(sorted(truth.elements()))),
                "milliseconds": 1e3 * seconds,
                "median_distance": float((private["timesteps"].sort().values - found.timesteps).abs().median()),
            }
        )
    rates = {key: mean(float(draw[key]) for draw in draws) for key in draws[0] if key != "milliseconds"}
    return {**rates, "milliseconds": median(draw["milliseconds"] for draw in draws)}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.timestep_leak", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument(
        "--noise-batches", type=int, nargs="*", default=[1, 4, 16], help="batch sizes of the second table"
    )
    parser.add_argument("--noise-dtype", choices=sorted(DTYPES), default="float32")
    parser.add_argument("--sigmas", type=float, nargs="+", default=list(SIGMAS), help="relative to the layer's rms")
    parser.add_argument("--dtypes", nargs="+", choices=sorted(DTYPES), default=["float32", "float64"])
    parser.add_argument("--training-steps", type=int, nargs="+", default=[0, 150])
    parser.add_argument("--repeats", type=int, default=10, help="random batches a cell")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSONL file for the rows")
    given = parser.parse_args(arguments)
    images = load_dataset("patches", image_size=SIZE).private.images()
    rates = {"set": "set", "all": "all", "no_twins": "no twins", "hits": "hits", "music_hits": "MUSIC hits"}
    rates |= {"exact": "exact", "inside": "99 % set"}
    head = f"| width | trained | B | dtype | σ/rms | {' | '.join(rates.values())} | median distance | ms |"
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text("")
    with torch_threads(1):
        victims = {
            (width, steps): victim(width, steps, images) for width in given.widths for steps in given.training_steps
        }
        clean = [(b, dtype, 0.0) for dtype in given.dtypes for b in given.batches]
        noisy = [(b, given.noise_dtype, sigma) for b in given.noise_batches for sigma in given.sigmas]
        for settings in (clean, noisy):
            print(f"{head}\n{'|---' * 14}|")
            for (width, steps), model in victims.items():
                for batch, dtype, sigma in settings:
                    shared = {"batch": batch, "dtype": dtype, "sigma": sigma}
                    found = cell(model, images, **shared, known=sigma > 0, repeats=given.repeats, seed=given.seed)
                    row = {"width": width, "training_steps": steps, **shared, "repeats": given.repeats, **found}
                    if given.out:  # row by row: an interrupted run keeps what it has
                        with given.out.open("a") as file:
                            file.write(json.dumps(row) + "\n")
                    figures = " | ".join(f"{found[key]:.2f}" for key in rates)
                    ends = f"{found['median_distance']:.1f} | {found['milliseconds']:.0f}"
                    print(f"| {width} | {steps} | {batch} | {dtype} | {sigma:g} | {figures} | {ends} |", flush=True)
            print()
    return 0


if __name__ == "__main__":
    sys.exit(main())

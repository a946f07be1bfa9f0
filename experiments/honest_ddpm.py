"""A DDPM client under the server's own threat model: image, noise and timestep unknown, t uniform in 0 … 999.

    python -m experiments.honest_ddpm [--size 8] [--images 10] [--channels 16 32] [--sigma 0 0.01 0.1] [--out ROWS.jsonl]

For each image (or batch) a new draw of t and ε, and an untrained U-Net of a new seed (or the one that `--training-steps` of
Adam on public images make of seed 0's); the update is a gradient (weights, images and gradient in `--precision`) with
Gaussian noise of `sigma` times its own rms. Rows and a Markdown table: PSNR of the attack (given σ where there is noise),
whether it was certified, starts and steps it took, and the error floor (Cramér-Rao, unbiased and without a prior). PSNR has
peak 1 on [0, 1], in a batch that of the worst image; seconds are wall clock beside the load average and, in rows, CPU time.
Trials are told on standard error.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from fedattack.data import load_dataset
from fedattack.errors import NotApplicable
from fedattack.floor import error_floor
from fedattack.jobs import torch_threads
from fedattack.metrics import match_batch, psnr_db
from fedattack.models import build_model
from fedattack.registry import ATTACKS, parse_spec
from fedattack.seeding import derive_generator
from fedattack.store import append_row
from fedattack.tasks import Task, build_task, simulate
from fedattack.types import Knowledge, State, Update

CIFAR = Path(__file__).resolve().parents[2] / "shared/data/cifar10_subset.npz"
UNET = {"block_out_channels": (16,), "attention": (), "mid_attention": False, "norm_num_groups": 4}
PRECISIONS = {"float64": torch.float64, "float32": torch.float32}


def untrained(arguments: argparse.Namespace, seed: int) -> tuple[Task, nn.Module]:
    """The task and a new U-Net."""
    options = UNET | {"block_out_channels": tuple(arguments.channels), "attention": (0,) if arguments.attention else ()}
    shape = (3, arguments.size, arguments.size)
    model = build_model("unet", image_shape=shape, num_classes=None, seed=seed, **options)
    return build_task("diffusion", {"prediction_type": arguments.prediction}), model


def trained(arguments: argparse.Namespace, public: Tensor) -> State:
    """Weights after Adam (0.001, batches of 64) on public images; the mean loss of the last hundred steps is told."""
    (task, model), generator = untrained(arguments, 0), derive_generator(0, "training")
    optimizer, losses = torch.optim.Adam(model.parameters(), 1e-3), []
    for _ in range(arguments.training_steps):
        images = public[torch.randint(len(public), (64,), generator=generator)]
        loss = task.loss(model, task.draw(images, torch.zeros(len(images)), generator=generator))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    print(f"trained: loss {sum(losses[-100:]) / len(losses[-100:]):.4f}", file=sys.stderr)
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def run(
    images: Tensor,
    labels: Tensor,
    public: Tensor,
    seed: int,
    sigma: float,
    arguments: argparse.Namespace,
    weights: State | None,
) -> dict[str, Any]:
    """One client, one attack, as a row."""
    task, model = untrained(arguments, seed)
    shape = (images.shape[1], images.shape[2], images.shape[3])
    if weights is not None:
        model.load_state_dict(weights)
    model, images = model.to(PRECISIONS[arguments.precision]), images.to(PRECISIONS[arguments.precision])
    private = dict(task.draw(images, labels, generator=derive_generator(seed, "client")))
    if arguments.timestep is not None:
        private["timesteps"] = torch.full_like(private["timesteps"], arguments.timestep)
    sent = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    received = {n: t.detach() for n, t in simulate(model, sent, task, [private], kind="gradient").items()}
    rms = (sum(float(t.square().sum()) for t in received.values()) / sum(t.numel() for t in received.values())) ** 0.5
    noise = derive_generator(seed, "defense")
    clean = Update(round=1, client="0", sent=sent, received=received, kind="gradient", num_examples=len(images))
    noisy = {n: t + sigma * rms * torch.randn(t.shape, generator=noise, dtype=t.dtype) for n, t in received.items()}
    update = replace(clean, received=noisy if sigma > 0 else received)
    knowledge = Knowledge(image_shape=shape, batch_size=len(images), public_images=public)
    told = replace(knowledge, defense=f"gaussian-noise(sigma={sigma * rms!r})") if sigma > 0 else knowledge
    name, options = parse_spec(arguments.attack)
    attack = ATTACKS.create(name, **options)
    begun, used = perf_counter(), process_time()

    def said(iteration: int, iterations: int, cost: float) -> None:
        seconds = perf_counter() - begun
        print(f"seed {seed}: trial {iteration} of {iterations}, cost {cost:.3e}, {seconds:.0f} s", file=sys.stderr)

    source = derive_generator(seed, "attack")
    found = attack.reconstruct(update, model, task, told, generator=source, progress=said)
    assert found.timesteps is not None
    order = match_batch(found.images, images.float())
    row = {
        "size": images.shape[-1],
        "batch": len(images),
        "channels": arguments.channels,
        "attention": arguments.attention,
        "training_steps": arguments.training_steps,
        "precision": arguments.precision,
        "attack": arguments.attack,
        "seed": seed,
        "sigma": sigma,
        "timesteps": sorted(private["timesteps"].tolist()),
        "timesteps_found": sorted(found.timesteps.tolist()),
        "psnr_db": min(float(psnr_db(found.images[order].double(), images.double()).min()), 200.0),
        "mean_image_psnr_db": float(psnr_db(public.mean(0, keepdim=True).expand_as(images), images.float()).min()),
        "steps": found.steps,
        "seconds": found.seconds,
        "cpu_seconds": process_time() - used,
        "load": os.getloadavg()[0],
        **found.diagnostics,
    }
    try:
        floor = error_floor(
            clean,
            model,
            task,
            knowledge,
            private,
            seconds=arguments.floor_seconds,
            generator=derive_generator(seed, "floor"),
        )
        row |= {"floor_rms_per_sigma": floor.rms_per_sigma, "floor_condition": floor.condition, "update_rms": rms}
    except NotApplicable as reason:
        row["floor_missing"] = str(reason)
    return row


def line(sigma: float, rows: Sequence[dict[str, Any]]) -> str:
    psnrs = sorted(row["psnr_db"] for row in rows)
    floors = [
        -20.0 * torch.tensor(row["floor_rms_per_sigma"] * sigma * row["update_rms"]).log10().item()
        for row in rows
        if sigma > 0 and row.get("floor_rms_per_sigma")
    ]
    cells = [
        f"{sigma:g}",
        f"{sum(row['timesteps'] == row['timesteps_found'] for row in rows)}/{len(rows)}",
        f"{sum(psnr > 40 for psnr in psnrs)}/{len(rows)}",
        f"{sum(row['certified'] for row in rows):.0f}",
        f"{median(psnrs):.1f} ({psnrs[0]:.1f} to {psnrs[-1]:.1f})",
        f"{median(floors):.1f} ({min(floors):.1f} to {max(floors):.1f})" if floors else "–",
        f"{median(row['starts'] for row in rows):.0f}",
        f"{median(row['steps'] for row in rows):.0f}",
        f"{median(row['seconds'] for row in rows):.0f}",
        f"{median(row['load'] for row in rows):.1f}",
    ]
    return "| " + " | ".join(cells) + " |"


HEADER = (
    "| σ / rms | t exact | > 40 dB | certified | PSNR, dB: median (range) | floor, dB | starts | steps | seconds | load |\n"
    "|---|---|---|---|---|---|---|---|---|---|"
)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--size", type=int, default=8)
    parser.add_argument("--first", type=int, default=0, help="seed and index of the first image or batch")
    parser.add_argument("--images", type=int, default=10, help="how many, or how many batches")
    parser.add_argument("--batch", type=int, default=1, help="images in one update")
    parser.add_argument("--split", choices=("test", "private"), default="test", help="private: for choosing options")
    parser.add_argument("--sigma", type=float, nargs="+", default=[0.0])
    parser.add_argument("--timestep", type=int, help="of every image; default: drawn")
    parser.add_argument("--prediction", choices=("epsilon", "v_prediction"), default="epsilon")
    parser.add_argument("--channels", type=int, nargs="+", default=[16], help="of each level of the U-Net")
    parser.add_argument("--attention", action="store_true", help="attention at full size")
    parser.add_argument("--training-steps", type=int, default=0, help="before the attacked round; 0: untrained")
    parser.add_argument("--precision", choices=tuple(PRECISIONS), default="float64", help="of the client's training")
    parser.add_argument("--attack", default="second-order(restarts=16, iterations=60)", help="its options")
    parser.add_argument("--floor-seconds", type=float, default=60.0)
    parser.add_argument("--out", type=Path, help="a JSON line for every image")
    chosen = parser.parse_args(arguments)
    if parse_spec(chosen.attack)[0] != "second-order":
        parser.error('--attack takes "second-order" with its options: no other certifies itself')
    data = load_dataset(f"npz:{CIFAR}" if CIFAR.is_file() else "patches")
    part = getattr(data, chosen.split)
    everything = interpolate(data.public.images(range(len(data.public))), chosen.size, mode="area")
    public = everything[:256]
    print(HEADER, flush=True)
    with torch_threads(1):
        weights = trained(chosen, everything) if chosen.training_steps else None
        for sigma in chosen.sigma:
            rows = []
            for seed in range(chosen.first, chosen.first + chosen.images):
                indices = list(range(seed * chosen.batch, (seed + 1) * chosen.batch))
                images = interpolate(part.images(indices).double(), chosen.size, mode="area")
                rows.append(run(images, part.labels[indices], public, seed, sigma, chosen, weights))
                if chosen.out:
                    append_row(chosen.out, rows[-1])
            print(line(sigma, rows), flush=True)


if __name__ == "__main__":
    main()

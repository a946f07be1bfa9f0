"""How many images of a batch come back exactly from the dense layer that sees them: spear, unmixing, cocktail-party.

    python -m experiments.batches [--table relu|smooth|approximate|noise] [--batches 2 4 8 …] [--only TEXT] [--runs 5]

Victims are dense networks on 32×32 CIFAR-10, one seed, one set of test images and one search a run; "trained" ones had 300
steps of Adam on the private split first. Nothing but the batch size is known. Exact means above 60 dB against the truth;
claimed is what the attack itself certifies, wrong what of that is below 40 dB. One thread, seconds of CPU time; the load
average stands beside them.
"""

import argparse
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from time import process_time
from typing import Any

import torch
from torch import Tensor, nn

from fedattack.data import ImageData, load_dataset
from fedattack.errors import NotApplicable
from fedattack.jobs import torch_threads
from fedattack.metrics import match_batch, psnr_db
from fedattack.models import build_model
from fedattack.registry import ATTACKS
from fedattack.seeding import derive_generator
from fedattack.store import append_row
from fedattack.tasks import build_task, simulate
from fedattack.types import Knowledge, Update

CIFAR = Path(__file__).resolve().parents[2] / "shared/data/cifar10_subset.npz"
DTYPES = {"float64": torch.float64, "float32": torch.float32}
RELU = {"hidden": (256, 128), "activation": "relu"}


@dataclass(frozen=True)
class Setting:
    """An attack on a dense network's update. steps: of Adam before it; noise: relative to the update's size, per tensor."""

    attack: str
    options: Mapping[str, Any] = field(default_factory=lambda: RELU)
    steps: int = 0
    dtype: str = "float64"
    noise: float = 0.0
    parameters: Mapping[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        hidden = self.options["hidden"]
        widths = "-".join(map(str, (3072, *hidden, 10)))
        chosen = " ".join(f"{name}={value}" for name, value in self.parameters.items())
        state = "trained" if self.steps else "untrained"
        noise = [f"noise {self.noise:g}"] if self.noise else []
        parts = [self.attack, chosen, widths, str(self.options["activation"]), state, self.dtype, *noise]
        return " ".join(part for part in parts if part)


EDGES = {"search": "fixed-point", "signals": "edges", "iterations": 300}
SMOOTH = [{"hidden": (), "activation": "relu"}] + [{"hidden": (64,), "activation": a} for a in ("sigmoid", "gelu")]
TABLES: dict[str, list[Setting]] = {
    "relu": [
        Setting(attack, steps=steps, dtype=dtype)
        for attack in ("spear", "unmixing")
        for steps in (0, 300)
        for dtype in ("float64", "float32")
    ]
    + [Setting("unmixing", {"hidden": (1024, 128), "activation": "relu"}, steps) for steps in (0, 300)],
    "smooth": [Setting("unmixing", options, steps) for options in SMOOTH for steps in (0, 300)],
    "approximate": [
        Setting(attack, options, steps, parameters=parameters)
        for steps in (0, 300)
        for options in (RELU, {"hidden": (256,), "activation": "sigmoid"})
        for attack, parameters in (
            ("linear-leak", {}),
            ("cocktail-party", {"iterations": 5000}),
            ("cocktail-party", {"search": "fixed-point", "iterations": 300}),
            ("cocktail-party", EDGES),
        )
    ],
    "noise": [Setting("unmixing", steps=300, noise=noise) for noise in (1e-8, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)],
}


def trained(model: nn.Module, steps: int, private: ImageData, generator: torch.Generator) -> None:
    """Adam on batches of 64, in place."""
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(steps):
        indices = torch.randint(len(private), (64,), generator=generator).tolist()
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(private.images(indices)), private.labels[indices]).backward()
        optimizer.step()


def attacked(setting: Setting, model: nn.Module, images: Tensor, labels: Tensor, run: int) -> dict[str, Any]:
    """One attack: PSNR (B,) of the matched images, what it claims, and seconds of CPU time."""
    dtype = DTYPES[setting.dtype]
    model, images = model.to(dtype), images.to(dtype)
    task = build_task("classification")
    sent = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    received = simulate(model, sent, task, [{"images": images, "labels": labels}], kind="gradient", learning_rate=None)
    generator = derive_generator(run, "noise")
    if setting.noise:
        received = {
            name: t + setting.noise * t.square().mean().sqrt() * torch.randn(t.shape, generator=generator, dtype=dtype)
            for name, t in received.items()
        }
    update = Update(1, "0", sent, {name: t.detach() for name, t in received.items()}, "gradient", len(images))
    shape = (images.shape[1], images.shape[2], images.shape[3])
    knowledge = Knowledge(image_shape=shape, batch_size=len(images), num_classes=10)
    attack = ATTACKS.create(setting.attack, **dict(setting.parameters))
    begun = process_time()
    try:
        found = attack.reconstruct(update, model, task, knowledge, generator=derive_generator(run, "attack"))
    except NotApplicable as reason:
        return {"refused": str(reason)}
    seconds = process_time() - begun
    images = images.float()
    scores = psnr_db(found.images[match_batch(found.images, images)], images)
    claimed = int(found.diagnostics.get("exact_images", 0))
    best = torch.stack(
        [psnr_db(image.expand_as(images), images).max() for image in found.images[:claimed]] or [torch.tensor([])]
    )
    return {
        "psnr_db": scores.tolist(),
        "claimed": claimed,
        "wrong": int((best < 40).sum()),
        "seconds": seconds,
    }


def summary(rows: list[dict[str, Any]]) -> str:
    """What of all images of all runs came back."""
    done = [row for row in rows if "psnr_db" in row]
    if not done:
        return f"refused: {rows[0]['refused']}"
    scores = [score for row in done for score in row["psnr_db"]]
    refused = len(rows) - len(done)
    exact = sum(score > 60 for score in scores) / (len(scores) * len(rows) / len(done))
    claimed, wrong = sum(row["claimed"] for row in done), sum(row["wrong"] for row in done)
    times = [row["seconds"] for row in done]
    whole = sum(all(score > 60 for score in row["psnr_db"]) for row in done)
    left_out = f" ({refused} of {len(rows)} refused)" if refused else ""
    return (
        f"exact {exact:6.1%}{left_out}, whole batches {whole}/{len(rows)}, claimed {claimed}, wrong {wrong}, "
        f"PSNR mean {sum(scores) / len(scores):.1f} median {median(scores):.1f} min {min(scores):.1f} dB, "
        f"{median(times):.1f} s ({min(times):.1f} … {max(times):.1f})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", choices=TABLES, default="relu")
    parser.add_argument("--batches", type=int, nargs="+", default=[2, 4, 8, 16, 24, 32])
    parser.add_argument("--only", default="", help="settings whose label contains this")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    data = load_dataset(f"npz:{CIFAR}")
    victims: dict[str, nn.Module] = {}
    with torch_threads(1):
        for setting in TABLES[arguments.table]:
            if arguments.only not in setting.label:
                continue
            for batch in arguments.batches:
                rows = []
                for run in range(arguments.runs):
                    key = f"{setting.options} {setting.steps} {run}"
                    if key not in victims:
                        model = build_model(
                            "mlp", image_shape=(3, 32, 32), num_classes=10, seed=run, **dict(setting.options)
                        )
                        trained(model, setting.steps, data.private, derive_generator(run, "training"))
                        victims[key] = model
                    picked = torch.randperm(len(data.test), generator=derive_generator(run, "batch", str(batch)))
                    indices = picked[:batch].tolist()
                    labels = data.test.labels[indices]
                    model = build_model(
                        "mlp", image_shape=(3, 32, 32), num_classes=10, seed=run, **dict(setting.options)
                    )
                    model.load_state_dict(victims[key].state_dict())
                    row = attacked(setting, model, data.test.images(indices), labels, run)
                    row |= {"setting": setting.label, "batch": batch, "run": run, "load": os.getloadavg()[0]}
                    rows.append(row)
                    if arguments.out:
                        append_row(arguments.out, row)
                print(f"{setting.label}, B={batch}: {summary(rows)}; load {os.getloadavg()[0]:.1f}", flush=True)


if __name__ == "__main__":
    main()

"""Where second-order inversion is exact and where it fails: PSNR, seconds and certificates beside idlg, on real images.

    python -m experiments.second_order [--table classifiers] [--only TEXT …] [--images 5] [--baseline] [--out FILE.jsonl]

Victims are untrained unless a setting says otherwise (a new seed for each image; Adam on the private split first, accuracy
on the test split), labels and timesteps are known, updates are float64 gradients of test images in evaluation mode, on one
thread. Baselines start from grey and go to their own end, on the same updates in the same run: idlg, and in the table of
classifiers inverting-gradients too. Seconds are wall clock and CPU time; the load average stands beside them. PSNR has
peak 1 on [0, 1] and is cut at 157 dB by float32 pictures.
"""

import argparse
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from time import process_time
from typing import Any

import torch
from torch import Tensor

from fedattack.data import ImageData, load_dataset
from fedattack.jobs import torch_threads
from fedattack.metrics import match_batch, psnr_db
from fedattack.models import build_model
from fedattack.registry import ATTACKS, parse_spec
from fedattack.seeding import derive_generator
from fedattack.store import append_row
from fedattack.tasks import build_task, simulate
from fedattack.types import Knowledge, State, Update

CIFAR = Path(__file__).resolve().parents[2] / "shared/data/cifar10_subset.npz"
OURS = "second-order"
PUBLIC = 256
"""Images that the attacker has; second-order looks at them under noise only."""

SMOOTH = {"init": "default", "activation": "gelu"}
UNET = {"block_out_channels": (16,), "attention": (), "mid_attention": False, "norm_num_groups": 4}


@dataclass(frozen=True)
class Setting:
    """A victim, its images, and for a diffusion model the timestep of all of them and whether the noise is shown.

    steps: of Adam on batches of 64 private images before the attacked round.
    """

    model: str
    options: Mapping[str, Any] = field(default_factory=dict)
    size: int = 16
    batch: int = 1
    timestep: int | None = None
    noise_known: bool = False
    steps: int = 0
    parameters: Mapping[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        chosen = [str(v) for k, v in self.options.items() if k in ("init", "activation", "hidden", "norm", "width")]
        if self.steps:
            chosen.append(f"{self.steps} steps")
        if self.timestep is not None:
            chosen = [f"t={self.timestep}", "noise known" if self.noise_known else "noise unknown"]
        return " ".join([self.model, *chosen, f"{self.size}×{self.size}×3", f"B={self.batch}"])


SETTINGS = [
    Setting("lenet", {"activation": "sigmoid"}, size=8),
    Setting("lenet", SMOOTH, size=8),
    Setting("lenet", {"activation": "relu", "init": "default"}, size=8),
    Setting("mlp", {"hidden": (64,), "activation": "sigmoid"}, size=8),
    Setting("mlp", {"hidden": (64,), "activation": "relu"}, size=8),
    Setting("convnet-small", {"activation": "sigmoid"}, size=8),
    Setting("convnet-small", {"activation": "gelu"}, size=8),
    Setting("convnet-small", {"activation": "relu"}, size=8),
    Setting("lenet", {"activation": "sigmoid"}),
    Setting("lenet", SMOOTH),
    Setting("lenet", {"activation": "sigmoid"}, batch=2),
    Setting("lenet", SMOOTH, batch=2),
    Setting("lenet", SMOOTH, batch=4, size=8),
    Setting("convnet-small", {"activation": "gelu"}),
    Setting("lenet", {"activation": "sigmoid"}, size=32),
    Setting("lenet", SMOOTH, size=32),
    *(Setting("unet", UNET, size=6, timestep=t) for t in (20, 100, 300, 500, 900)),
    *(Setting("unet", UNET, size=8, timestep=t) for t in (20, 100, 300, 500, 900)),
    *(Setting("unet", UNET, size=8, timestep=t, noise_known=True) for t in (100, 900)),
]

RELU = {"init": "default", "activation": "relu"}
SMALL = {"width": 8}
CLASSIFIERS = [
    Setting("lenet", {"activation": "sigmoid"}, size=16, batch=4),
    Setting("lenet", {"activation": "sigmoid"}, size=16, batch=4, steps=300),
    Setting("lenet", {"activation": "sigmoid"}, size=32),
    Setting("lenet", {"activation": "sigmoid"}, size=32, batch=4),
    Setting("lenet", {"activation": "sigmoid"}, size=32, steps=300),
    Setting("lenet", {"activation": "sigmoid"}, size=32, batch=4, steps=300),
    Setting("lenet", RELU, size=8),
    Setting("lenet", RELU, size=16),
    Setting("lenet", RELU, size=16, steps=300),
    Setting("mlp", {"hidden": (64,), "activation": "relu"}, size=16),
    Setting("convnet-small", {"activation": "gelu"}, size=16),
    Setting("convnet-small", {"activation": "gelu"}, size=16, steps=300),
    Setting("convnet-small", {"activation": "gelu"}, size=8, batch=4),
    Setting("convnet-small", {"activation": "relu"}, size=8),
    Setting("convnet-small", {"activation": "relu"}, size=8, steps=300),
    Setting("convnet-small", {"activation": "relu"}, size=8, batch=4),
    Setting("convnet-small", {"activation": "relu"}, size=16),
    Setting("convnet", SMALL | {"activation": "relu"}, size=8),
    Setting("convnet", SMALL | {"activation": "gelu"}, size=16),
    Setting("convnet", SMALL | {"activation": "gelu"}, size=16, steps=300),
    Setting("convnet", SMALL | {"activation": "gelu"}, size=16, batch=4),
    Setting("convnet", SMALL | {"activation": "relu"}, size=16),
    *(
        Setting("resnet18", SMALL | {"activation": activation, "norm": norm}, size=16)
        for norm in ("batch", "group")
        for activation in ("gelu", "relu")
    ),
    Setting("resnet18", SMALL | {"activation": "gelu", "norm": "batch"}, size=16, steps=300),
    Setting("resnet18", SMALL | {"activation": "gelu", "norm": "batch"}, size=16, batch=4),
    *(
        Setting(model, SMALL | {"activation": "gelu"} | options, size=32, **more)
        for model, options in (("convnet", {}), ("resnet18", {"norm": "batch"}), ("resnet18", {"norm": "group"}))
        for more in ({}, {"steps": 300}, {"batch": 4})
    ),
]
"""Unlike the first table's, these stand beside both baselines, and some victims are trained first."""

TABLES = {"all": SETTINGS, "classifiers": CLASSIFIERS}


def trained(model: torch.nn.Module, setting: Setting, private: ImageData, generator: torch.Generator) -> None:
    """`steps` of Adam on batches of 64, in training mode and in place."""
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    model.train()
    for _ in range(setting.steps):
        indices = torch.randint(len(private), (64,), generator=generator).tolist()
        images, labels = resized(private, indices, setting.size)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()


def accuracy(model: torch.nn.Module, setting: Setting, test: ImageData, count: int = 500) -> float:
    images, labels = resized(test, list(range(min(count, len(test)))), setting.size)
    with torch.no_grad():
        return float((model.eval()(images).argmax(1) == labels).double().mean())


def resized(data: ImageData, indices: list[int], size: int) -> tuple[Tensor, Tensor]:
    """Images in float64, averaged down to size×size, and their labels."""
    images = data.images(indices).double()
    return torch.nn.functional.interpolate(images, size, mode="area"), data.labels[indices]


def victim(
    setting: Setting,
    images: Tensor,
    labels: Tensor,
    seed: int,
    state: State | None = None,
    public: Tensor | None = None,
) -> tuple[Any, Any, Update, Knowledge]:
    """Model, task, the client's update and what the attacker knows. state: of a model that was trained. public: images."""
    task = build_task("classification" if setting.timestep is None else "diffusion")
    shape = (images.shape[1], images.shape[2], images.shape[3])
    model = build_model(setting.model, image_shape=shape, num_classes=10, seed=seed, **setting.options).double()
    model.eval()  # running statistics of batch normalisation are the server's own
    if state is not None:
        model.load_state_dict(state)
    private = dict(task.draw(images, labels, generator=derive_generator(seed, "client")))
    oracles: dict[str, Tensor] = {"labels": labels}
    if setting.timestep is not None:
        private["timesteps"] = torch.full_like(private["timesteps"], setting.timestep)
        oracles = {"timesteps": private["timesteps"]} | ({"noise": private["noise"]} if setting.noise_known else {})
    sent = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    received = {n: t.detach() for n, t in simulate(model, sent, task, [private], kind="gradient").items()}
    update = Update(round=1, client="0", sent=sent, received=received, kind="gradient", num_examples=len(images))
    knowledge = Knowledge(image_shape=shape, batch_size=len(images), num_classes=10, public_images=public, **oracles)
    return model, task, update, knowledge


def run(
    setting: Setting,
    images: Tensor,
    labels: Tensor,
    name: str,
    seed: int,
    state: State | None = None,
    public: Tensor | None = None,
    **parameters: Any,
) -> dict[str, Any]:
    """One attack on one batch, as a row."""
    model, task, update, knowledge = victim(setting, images, labels, seed, state, public)
    attack = ATTACKS.create(name, **parameters)
    begun = process_time()
    found = attack.reconstruct(update, model, task, knowledge, generator=derive_generator(seed, "attack", name))
    order = match_batch(found.images, images.float())
    worst = float(psnr_db(found.images[order].double(), images).min())
    return {
        "setting": setting.label,
        "attack": name,
        "seed": seed,
        "psnr_db": min(worst, 200.0),
        "seconds": found.seconds,
        "cpu_seconds": process_time() - begun,
        "steps": found.steps,
        "load": os.getloadavg()[0],
        "loss": found.losses[-1],
        **found.diagnostics,
    }


def line(rows: Sequence[Mapping[str, Any]]) -> str:
    psnrs, seconds = [r["psnr_db"] for r in rows], [r["seconds"] for r in rows]
    sure = sum(r.get("certified", 0.0) for r in rows)
    cells = [
        rows[0]["setting"],
        rows[0]["attack"],
        f"{sum(p > 40 for p in psnrs)}/{len(rows)}",
        f"{sure:.0f}" if "certified" in rows[0] else "-",
        f"{median(psnrs):.1f} ({min(psnrs):.1f} to {max(psnrs):.1f})",
        f"{median(r.get('iterations', r['steps']) for r in rows):.0f}",
        f"{median(seconds):.1f} ({min(seconds):.1f} to {max(seconds):.1f})",
        f"{median(r['loss'] for r in rows):.0e}",
        f"{median(r['condition'] for r in rows):.0f}" if all("condition" in r for r in rows) else "-",
        f"{median(r['load'] for r in rows):.1f}",
        f"{rows[0]['accuracy']:.2f}" if "accuracy" in rows[0] else "-",
    ]
    return "| " + " | ".join(cells) + " |"


HEADER = (
    "| setting | attack | > 40 dB | certified | worst image of a batch, dB: median (range) | iterations | seconds "
    "| cost | condition | load | accuracy |\n|---|---|---|---|---|---|---|---|---|---|---|"
)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--table", choices=tuple(TABLES), default="all")
    parser.add_argument("--only", nargs="*", default=[], help="settings whose label holds one of these texts")
    parser.add_argument("--images", type=int, default=5, help="batches a setting")
    parser.add_argument("--split", choices=("test", "private"), default="test")
    parser.add_argument("--baseline", action="store_true", help="idlg (and inverting-gradients) on the same updates")
    parser.add_argument("--attack", default=OURS, help="one of classifiers with options, as in a configuration")
    parser.add_argument("--out", type=Path, help="a JSON line for every attack on every batch")
    chosen = parser.parse_args(arguments)
    name, options = parse_spec(chosen.attack)
    splits = load_dataset(f"npz:{CIFAR}" if CIFAR.is_file() else "patches")
    data = getattr(splits, chosen.split)
    settings = [s for s in TABLES[chosen.table] if not chosen.only or any(text in s.label for text in chosen.only)]
    if not settings:
        parser.error("--only names none of: " + "; ".join(setting.label for setting in TABLES[chosen.table]))
    if chosen.baseline and name in ("idlg", "inverting-gradients"):
        parser.error(f"{name} is a baseline already")
    print(HEADER, flush=True)
    with torch_threads(1):
        for setting in settings:
            attacks: list[tuple[str, dict[str, Any]]] = [
                (name, {**(setting.parameters if name == OURS else {}), **options})
            ]
            if chosen.baseline and setting.timestep is None:
                attacks.append(("idlg", {"start": "grey"}))
            if chosen.baseline and chosen.table == "classifiers":
                attacks.append(("inverting-gradients", {"start": "grey"}))
            rows: dict[str, list[dict[str, Any]]] = {attack: [] for attack, _ in attacks}
            state, score = None, math.nan
            if setting.timestep is None and setting.steps:
                shape = (3, setting.size, setting.size)
                model = build_model(
                    setting.model, image_shape=shape, num_classes=10, seed=0, **setting.options
                ).double()
                trained(model, setting, splits.private, derive_generator(0, "training"))
                state, score = dict(model.state_dict()), accuracy(model, setting, splits.test)
            known = range(min(PUBLIC, len(splits.public)))
            public = resized(splits.public, list(known), setting.size)[0].float()
            for seed in range(chosen.images):
                indices = list(range(seed * setting.batch, (seed + 1) * setting.batch))
                images, labels = resized(data, indices, setting.size)
                for attack, parameters in attacks:
                    rows[attack].append(run(setting, images, labels, attack, seed, state, public, **parameters))
                    if state is not None:
                        rows[attack][-1]["accuracy"] = score
                    if chosen.out:
                        append_row(chosen.out, rows[attack][-1])
            for some in rows.values():
                print(line(some), flush=True)


if __name__ == "__main__":
    main()

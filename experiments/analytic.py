"""Analytic inversion on real images: how often exact, what it costs, which batches it takes apart, what noise leaves of it.

    python -m experiments.analytic --table architectures|cost|batches|noise [--seeds 10] [--images 5] [--out FILE.jsonl]

architectures: r-conv on the five networks of R-CONV's published code, untrained and after Adam steps on the private split,
float64 and float32 updates. cost: r-conv beside r-gap, dlg and inverting-gradients on the same updates in one run. batches:
one gradient of several images of a convolutional network (dense ones: experiments.batches). noise: Gaussian, in units of the
update's rms; r-conv alone, as the start of second-order and inverting-gradients, these alone, and the error floor. Every seed
has weights of its own, every image is one of the test split (CIFAR-10 where it is there, else patches); labels are hidden. An
image is exact where its MSE is below 1e-8; PSNR has peak 1. One thread; seconds are CPU time.
"""

import argparse
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from statistics import mean, median, stdev
from time import process_time
from typing import Any

import torch
from torch import Tensor

from experiments.second_order import CIFAR, resized
from fedattack.data import ImageData, load_dataset
from fedattack.errors import NotApplicable
from fedattack.floor import error_floor
from fedattack.jobs import torch_threads
from fedattack.metrics import match_batch, psnr_db
from fedattack.models import build_model
from fedattack.models.conv_chain import ARCHITECTURES
from fedattack.registry import ATTACKS, parse_spec
from fedattack.seeding import derive_generator
from fedattack.store import append_row
from fedattack.tasks import Classification, simulate
from fedattack.types import Knowledge, State, Update

CLASSES = 10
EXACT_MSE = 1e-8
DTYPES = {"float64": torch.float64, "float32": torch.float32}


@dataclass(frozen=True)
class Victim:
    """A model on images of one size; steps: of Adam on batches of 64 private images before the attacked round."""

    name: str
    model: str
    options: Mapping[str, Any] = field(default_factory=dict)
    size: int = 32
    steps: int = 0

    @property
    def title(self) -> str:
        return f"{self.name}, {self.steps} steps" if self.steps else self.name

    def build(self, seed: int, private: ImageData) -> torch.nn.Module:
        """Weights that are a function of the seed."""
        shape = (3, self.size, self.size)
        model = build_model(self.model, image_shape=shape, num_classes=CLASSES, seed=seed, **self.options)
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        generator = derive_generator(seed, "training")
        for _ in range(self.steps):
            chosen = torch.randint(len(private), (64,), generator=generator).tolist()
            images, labels = resized(private, chosen, self.size)
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(images.float()), labels).backward()
            optimizer.step()
        return model


@dataclass(frozen=True)
class Plan:
    """One line of a table: a victim, its updates and the attacks on them."""

    victim: Victim
    attacks: Sequence[str]
    batch: int = 1
    precision: str = "float64"
    sigma: float = 0.0
    floor: bool = False


# ------------------------------------------------------------------------------------------------ the tables
CHAIN = {"filters": (12, 16, 12), "strides": (2, 2, 1), "activation": ("leaky-relu", "leaky-relu", "relu")}
TAKEN_APART = {"filters": (12, 48), "strides": (2, 2), "activation": "leaky-relu", "dense": (256,)}


def architectures(training: int) -> Iterator[Plan]:
    for name, steps, precision in product(ARCHITECTURES, (0, training), DTYPES):
        victim = Victim(name, "conv-chain", {"architecture": name}, steps=steps)
        yield Plan(victim, ("r-conv",), precision=precision)


def cost(training: int) -> Iterator[Plan]:
    attacks = ("r-conv", "r-gap", "dlg", "inverting-gradients")
    for name in ("letnet", "letnet-o"):
        leaky = {"architecture": name, "activation": ["leaky-relu"] * len(ARCHITECTURES[name].filters)}
        yield Plan(Victim(f"{name}, all LeakyReLU", "conv-chain", leaky), attacks)
    yield Plan(Victim("letnet", "conv-chain", {"architecture": "letnet"}), attacks)


def batches(training: int) -> Iterator[Plan]:
    for batch in (2, 4, 8, 16):
        yield Plan(Victim("2 convolutions, dense 256", "conv-chain", TAKEN_APART), ("r-conv",), batch=batch)


def noise(training: int) -> Iterator[Plan]:
    searches = [f'second-order(restarts=2, start="{start}")' for start in ("r-conv", "grey")]
    searches += [
        f'inverting-gradients(iterations=1200, learning_rate={rate}, tv_weight={weight}, start="{start}")'
        for start, rate, weight in (("r-conv", 0.001, 0.001), ("grey", 0.05, 0.001), ("grey", 0.05, 0.01))
    ]
    victim = Victim("3 convolutions, LeakyReLU and ReLU", "conv-chain", CHAIN | {"init": "default"}, size=8)
    for sigma in (1e-8, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1):
        yield Plan(victim, ("r-conv", *searches), sigma=sigma, floor=True)


TABLES = {"architectures": architectures, "cost": cost, "batches": batches, "noise": noise}


# ------------------------------------------------------------------------------------------------ one client
def client(plan: Plan, model: torch.nn.Module, images: Tensor, labels: Tensor, seed: int) -> tuple[Update, Knowledge]:
    """The gradient that a client sends, and what an informed server knows."""
    dtype = DTYPES[plan.precision]
    sent = {name: tensor.detach().to(dtype).clone() for name, tensor in model.state_dict().items()}
    private = {"images": images.to(dtype), "labels": labels}
    received = simulate(model, sent, Classification(), [private], kind="gradient")
    received = {name: tensor.detach() for name, tensor in received.items()}
    defense = None
    if plan.sigma > 0:
        received = noisy(received, plan.sigma, seed)
        defense = f"gaussian-noise(sigma={plan.sigma}, relative=True)"
    update = Update(round=1, client="0", sent=sent, received=received, kind="gradient", num_examples=len(images))
    shape = (images.shape[1], images.shape[2], images.shape[3])
    return update, Knowledge(image_shape=shape, batch_size=len(images), num_classes=CLASSES, defense=defense)


def noisy(gradient: State, sigma: float, seed: int) -> State:
    """With Gaussian noise of sigma times the rms of all entries."""
    squares = sum(float(tensor.square().sum()) for tensor in gradient.values())
    rms = (squares / sum(tensor.numel() for tensor in gradient.values())) ** 0.5
    generator = derive_generator(seed, "noise")
    return {
        name: tensor + sigma * rms * torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
        for name, tensor in gradient.items()
    }


def attacked(
    plan: Plan, spec: str, model: torch.nn.Module, update: Update, known: Knowledge, images: Tensor, seed: int
) -> dict[str, Any]:
    """One attack on one update, as a row. PSNR of every image of the batch, in the order of the truth."""
    name, parameters = parse_spec(spec)
    attack = ATTACKS.create(name, **parameters)
    begun, row = process_time(), {"attack": spec, "refusal": ""}
    try:
        generator = derive_generator(seed, "attack", name)
        found = attack.reconstruct(update, model, Classification(), known, generator=generator)
    except NotApplicable as refusal:
        row["refusal"] = str(refusal)
        return row | {"cpu_seconds": process_time() - begun}
    seconds = process_time() - begun
    order = match_batch(found.images, images.float())
    psnrs = psnr_db(found.images[order].double(), images).clamp(max=200.0).tolist()
    return row | {"psnr_db": psnrs, "cpu_seconds": seconds, **found.diagnostics}


def run(plan: Plan, seeds: int, count: int, splits: Any, out: Path | None) -> list[dict[str, Any]]:
    """Every attack of a plan on every batch of every seed."""
    rows = []
    for seed in range(seeds):
        model = plan.victim.build(seed, splits.private)
        for number in range(count):
            first = number * plan.batch
            images, labels = resized(splits.test, list(range(first, first + plan.batch)), plan.victim.size)
            identity = 1000 * seed + number
            update, known = client(plan, model, images, labels, identity)
            facts = {"victim": plan.victim.title, "precision": plan.precision, "batch": plan.batch, "sigma": plan.sigma}
            facts |= {"seed": seed, "image": number, "load": os.getloadavg()[0]}
            if plan.floor:
                truth = {"images": images, "labels": labels}
                floor = error_floor(
                    update, model, Classification(), known, truth, generator=derive_generator(identity, "floor")
                )
                rms = floor.update_rms / (1.0 + plan.sigma**2) ** 0.5
                facts["floor_db"] = floor.psnr_db(plan.sigma * rms)
            for spec in plan.attacks:
                rows.append(facts | attacked(plan, spec, model, update, known, images, identity))
                if out is not None:
                    append_row(out, rows[-1])
    return rows


def line(plan: Plan, spec: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """A line of the table, over all images of all seeds."""
    done = [row for row in rows if not row["refusal"]]
    psnrs = [value for row in done for value in row["psnr_db"]]
    refused = len(rows) - len(done)
    whole = plan.batch * len(rows)
    cells = [plan.victim.title, str(plan.batch), plan.precision, f"{plan.sigma:g}" if plan.sigma else "–", spec]
    exact = sum(value > 80.0 for value in psnrs)
    cells.append(f"{exact} of {whole}" + (f" ({refused} refused)" if refused else ""))
    if psnrs:
        spread = f" ± {stdev(psnrs):.1f}" if len(psnrs) > 1 else ""
        cells.append(f"{mean(psnrs):.1f}{spread} ({min(psnrs):.1f} to {max(psnrs):.1f})")
        cells.append(f"{median(10 ** (-value / 10) for value in psnrs):.0e}")
    else:
        cells += ["–", "–"]
    cells.append(f"{median(row['cpu_seconds'] for row in rows):.2f}")
    floors = [row["floor_db"] for row in rows if row.get("floor_db") is not None]
    cells.append(f"{mean(floors):.1f}" if floors else "–")
    return "| " + " | ".join(cells) + " |"


HEADER = (
    "| victim | batch | update | σ / rms | attack | MSE < 1e-8 | PSNR, dB: mean ± std (range) | median MSE | CPU s | floor |\n"
    "|---|---|---|---|---|---|---|---|---|---|"
)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--table", choices=tuple(TABLES), required=True)
    parser.add_argument("--seeds", type=int, default=10, help="initialisations of every network")
    parser.add_argument("--images", type=int, default=5, help="batches for every initialisation")
    parser.add_argument("--training-steps", type=int, default=300, help="of Adam, for the trained victims")
    parser.add_argument("--only", nargs="*", default=[], help="victims whose title holds one of these texts")
    parser.add_argument("--split", choices=("test", "private"), default="test", help="private: for choosing options")
    parser.add_argument("--out", type=Path, help="a JSON line for every attack on every update")
    chosen = parser.parse_args(arguments)
    splits = load_dataset(f"npz:{CIFAR}" if CIFAR.is_file() else "patches")
    if chosen.split == "private":
        splits = type(splits)(private=splits.private, public=splits.public, test=splits.private)
    print(HEADER, flush=True)
    with torch_threads(1):
        for plan in TABLES[chosen.table](chosen.training_steps):
            if chosen.only and not any(text in plan.victim.title for text in chosen.only):
                continue
            rows = run(plan, chosen.seeds, chosen.images, splits, chosen.out)
            for spec in plan.attacks:
                print(line(plan, spec, [row for row in rows if row["attack"] == spec]), flush=True)


if __name__ == "__main__":
    main()

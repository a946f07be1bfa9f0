"""What one representative image tells of a user's whole batch: the published attack beside its controls, batch by batch.

    python -m experiments.user_level --prior runs/faces32 [--batches 10 30 100] [--similarity person gender random]
        [--attack SPEC …] [--joint 10] [--model SPEC] [--label male] [--train 0] [--users 5] [--split private]

LFW's people are cut into three parts: private, reported on; test, to choose settings on (--split test); public, of which the
attacker's mean face and the images that the victim is trained on are taken. A batch is images of one person ("person", 20
at most), of people of one gender ("gender"), or of anybody ("random"). Every attack gets the same float32 gradients.

psnr is the mean over all images of the batch (peak 1). "batch-mean" is the batch's own mean, of all single images the one of
least mean MSE. "to mean": PSNR to that mean, which one image can reach. "best of B" picks the nearest true image with the
truth in hand. rank: share of the other batches whose mean is nearer to the result than that of the attacked one, ties by half;
0.5 by chance for pixels that know nothing of the batch ("gender": an image of the right one already does better).
Controls: the prior alone; the same attack led by another batch's gradient, of the same gender where batches are of one; the
mean public face; one image without a prior, found by --joint-attack; up to --joint images, joint inversion of the whole batch
and the mean of what it finds. Attacks on one batch draw from the same seed, on different batches not. Seconds are CPU time.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from time import process_time
from typing import Any

import torch
from torch import Tensor, nn

from fedattack.data import ImageData, Splits, load_dataset
from fedattack.jobs import torch_threads
from fedattack.metrics import batch_mean, mse, psnr_db, score
from fedattack.models import build_model
from fedattack.registry import ATTACKS, format_spec, parse_spec
from fedattack.seeding import derive_generator
from fedattack.store import append_row, save_png
from fedattack.tasks import Classification, simulate
from fedattack.types import Control, Knowledge, Reconstruction, Update

LFW = Path(__file__).resolve().parents[2] / "shared/data/lfw64.npz"
SIMILARITIES = ("person", "gender", "random")
RANKED = 20
"""Batches among which a result's own is looked for, where they are not one person's each."""

ATTACK = "user-level"

JOINT = "inverting-gradients"
LEAST = 300
"""Iterations of --joint-attack, unless one of the attacks evaluates the gradient more often."""


@dataclass(frozen=True)
class Batch:
    """One user's images and their labels."""

    images: Tensor
    labels: Tensor
    name: str

    def update(self, model: nn.Module) -> Update:
        """The gradient that the user sends."""
        sent = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        private = {"images": self.images, "labels": self.labels}
        received = simulate(model, sent, Classification(), [private], kind="gradient")
        gradient = {name: tensor.detach() for name, tensor in received.items()}
        return Update(1, self.name, sent, gradient, "gradient", len(self.images))


def groups(data: ImageData, count: int, similarity: str, users: int, seed: int) -> Iterator[tuple[str, Tensor]]:
    """`users` batches of `count` indices into `data`, fewer where so many people or images are not there."""
    assert data.users is not None
    generator = derive_generator(seed, "groups", similarity, str(count))
    if similarity == "person":
        people, sizes = data.users.unique(return_counts=True)
        enough = people[sizes >= count]
        for person in enough[torch.randperm(len(enough), generator=generator)][:users].tolist():
            yield f"person {person}", (data.users == person).nonzero().flatten()[:count]
        return
    for number in range(users):
        pool = torch.arange(len(data))
        if similarity == "gender":
            pool = (data.labels == number % data.num_classes).nonzero().flatten()
        if len(pool) >= count:
            yield f"{similarity} {number}", pool[torch.randperm(len(pool), generator=generator)[:count]]


def trained(model: nn.Module, data: ImageData, steps: int, generator: torch.Generator) -> None:
    """Adam on batches of 64, in place."""
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(steps):
        rows = torch.randint(len(data), (64,), generator=generator)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(data.images(rows)), data.labels[rows]).backward()
        optimizer.step()


def batches(data: ImageData, count: int, similarity: str, users: int, seed: int) -> list[Batch]:
    found = groups(data, count, similarity, users, seed)
    return [Batch(data.images(rows), data.labels[rows], name) for name, rows in found]


def told(found: Reconstruction, number: int, all_batches: Sequence[Batch], lpips: Sequence[str]) -> dict[str, Any]:
    """The row of a result against batch `number`."""
    truth = all_batches[number].images
    row = score(found, truth, None, lpips_nets=lpips).as_row()
    to_mean = rank = None
    if found.represents == "user":
        distances = [float(mse(found.images.double(), batch_mean(b.images)[:1].double())) for b in all_batches]
        own, others = distances[number], distances[:number] + distances[number + 1 :]
        to_mean = float(psnr_db(found.images.double(), batch_mean(truth)[:1].double()))
        rank = fmean((d < own) + (d == own) / 2 for d in others) if others else None
    return {
        "psnr_db": row["psnr_db"],
        "lpips": row["lpips"],
        "to_mean_db": to_mean,
        "best_of_batch_db": max(row["psnr_db"]),
        "rank": rank,
    }


def another(everyone: Sequence[Batch], number: int, similarity: str) -> Batch | None:
    """The next batch after `number`, of the same label where batches are of one gender; None where there is none."""
    label = everyone[number].labels[0]
    others = [*everyone[number + 1 :], *everyone[:number]]
    return next((batch for batch in others if similarity != "gender" or batch.labels[0] == label), None)


def run(
    spec: str,
    by: Batch,
    target: Batch,
    model: nn.Module,
    num_classes: int,
    public: Tensor,
    prior: str,
    seed: int,
    size: int | None = None,
) -> tuple[Reconstruction, float]:
    """One attack on `target`, led by the update of `by`, and its CPU seconds. Labels are hidden.

    Its random numbers are those of the target. size: 1 tells it that there is one image.
    """
    name, parameters = parse_spec(spec)
    attack = ATTACKS.create(name, **parameters)
    shape = (by.images.shape[1], by.images.shape[2], by.images.shape[3])
    count = size or len(by.images)
    knowledge = Knowledge(
        image_shape=shape, batch_size=count, num_classes=num_classes, prior=prior, public_images=public
    )
    update, task = by.update(model), Classification()
    begun = process_time()
    generator = derive_generator(seed, "attack", name, target.name)
    found = attack.reconstruct(update, model, task, knowledge, generator=generator)
    seconds = process_time() - begun
    return (replace(found, represents="user") if size == 1 else found), seconds


def controls_of(spec: str) -> tuple[str, Sequence[Control]]:
    """An attack's name and its own controls, none for many."""
    name, parameters = parse_spec(spec)
    attack: Any = ATTACKS.create(name, **parameters)
    return name, attack.controls() if hasattr(attack, "controls") else ()


def prior_alone(spec: str) -> str | None:
    """The attack's own control without guidance."""
    name, controls = controls_of(spec)
    found = (format_spec(c.attack or name, c.parameters or {}) for c in controls if c.kind == "prior-alone")
    return next(found, None)


def evaluations(spec: str) -> int:
    """What the attack says that joint inversion beside it may spend; 0 if nothing."""
    _, controls = controls_of(spec)
    return max((int((c.parameters or {}).get("iterations", 0)) for c in controls if c.attack == JOINT), default=0)


def table(chosen: argparse.Namespace, splits: Splits, count: int, similarity: str) -> Iterator[dict[str, Any]]:
    """All rows of one batch size and similarity."""
    data: ImageData = getattr(splits, chosen.split)
    name, options = parse_spec(chosen.model)
    public = splits.public.images()
    for seed in chosen.seeds:
        model = build_model(name, image_shape=data.image_shape, num_classes=data.num_classes, seed=seed + 1, **options)
        trained(model, splits.public, chosen.train, derive_generator(seed, "training"))
        model.eval()
        others = len(data) if similarity == "person" else RANKED
        everyone = batches(data, count, similarity, max(chosen.users, others), seed)
        facts = {"batch": count, "similarity": similarity, "seed": seed, "model": chosen.model, "train": chosen.train}
        for number, target in enumerate(everyone[: chosen.users]):
            other = another(everyone, number, similarity)
            mean = public.double().mean(0, keepdim=True).float()
            fixed = {
                "mean public face": Reconstruction(images=mean, represents="user"),
                "batch-mean": Reconstruction(images=batch_mean(target.images)[:1], represents="user"),
            }
            for label, found in fixed.items():
                yield {**facts, "attack": label, "user": target.name, **told(found, number, everyone, chosen.lpips)}
            todo: dict[str, tuple[str, Batch, int | None]] = {spec: (spec, target, None) for spec in chosen.attack}
            if chosen.controls:
                alone = [control for spec in chosen.attack if (control := prior_alone(spec))]
                todo |= {f"{spec}, prior alone": (spec, target, None) for spec in alone}
                if other:
                    todo |= {f"{spec}, unrelated": (spec, other, None) for spec in chosen.attack}
                todo[f"one image without a prior: {chosen.joint_attack}"] = (chosen.joint_attack, target, 1)
            if count <= chosen.joint:
                todo[f"jointly: {chosen.joint_attack}"] = (chosen.joint_attack, target, None)
            for place, (label, (spec, by, size)) in enumerate(todo.items()):
                found, seconds = run(spec, by, target, model, data.num_classes, public, chosen.prior, seed, size)
                more = {
                    "seconds": seconds,
                    "steps": found.steps,
                    "loss": found.losses[-1],
                    "diagnostics": found.diagnostics,
                }
                results = {label: found}
                if len(found.images) > 1:
                    results[f"mean of {label}"] = replace(found, images=batch_mean(found.images)[:1], represents="user")
                for shown, result in results.items():
                    row = told(result, number, everyone, chosen.lpips)
                    yield {**facts, "attack": shown, "user": target.name, **row, **more}
                if chosen.pictures:
                    stem = f"{similarity}-{count}-{seed}-{number}"
                    one = found.images.mean(0)
                    pictures = {"first": target.images[0], "mean": batch_mean(target.images)[0], f"attack-{place}": one}
                    for what, picture in pictures.items():
                        save_png(chosen.pictures / f"{stem}-{what}.png", picture)


def line(rows: Sequence[Mapping[str, Any]]) -> str:
    def spread(values: Sequence[float], digits: int = 2) -> str:
        if not values:
            return "–"
        off = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
        return f"{fmean(values):.{digits}f}{off}"

    nets = sorted(rows[0]["lpips"])
    lpips = [f"{net} {spread([fmean(row['lpips'][net]) for row in rows], 3)}" for net in nets]
    cells = [
        str(rows[0]["similarity"]),
        str(rows[0]["batch"]),
        str(rows[0]["attack"]),
        str(len(rows)),
        spread([fmean(row["psnr_db"]) for row in rows]),
        spread([row["to_mean_db"] for row in rows if row["to_mean_db"] is not None]),
        spread([row["best_of_batch_db"] for row in rows]),
        spread([row["rank"] for row in rows if row["rank"] is not None]),
        ", ".join(lpips) or "–",
        f"{fmean(row['loss'] for row in rows):.3g}" if rows[0].get("loss") is not None else "–",
        f"{fmean(row['seconds'] for row in rows):.1f}" if "seconds" in rows[0] else "–",
    ]
    return "| " + " | ".join(cells) + " |"


HEADER = (
    "| batch of | B | attack | batches | psnr, dB | to mean, dB | best of B, dB | rank | LPIPS | loss | CPU s |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|"
)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--prior", required=True, help="folder or hub name of a prior of the images' size")
    parser.add_argument("--data", default=f"npz:{LFW}")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--label", default="male")
    parser.add_argument("--batches", type=int, nargs="+", default=[10])
    parser.add_argument("--similarity", choices=SIMILARITIES, nargs="+", default=["person"])
    parser.add_argument("--attack", nargs="+", default=[ATTACK], help="as in a recipe: name(option=value, …)")
    parser.add_argument("--no-controls", dest="controls", action="store_false")
    parser.add_argument("--joint", type=int, default=0, help="largest batch that joint inversion is tried on")
    parser.add_argument(
        "--joint-attack",
        help="one that needs no prior (default: inverting-gradients, no fewer iterations than any --attack has)",
    )
    parser.add_argument("--model", default="lenet")
    parser.add_argument("--train", type=int, default=0, help="Adam steps of the victim on public images")
    parser.add_argument("--users", type=int, default=5, help="batches attacked for each seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="each has a victim and users of its own")
    parser.add_argument("--split", choices=("private", "test"), default="private")
    parser.add_argument("--lpips", nargs="*", default=[])
    parser.add_argument("--out", type=Path, help="a JSON line for every attack on every batch")
    parser.add_argument("--pictures", type=Path, help="a folder for the images found")
    chosen = parser.parse_args(arguments)
    if chosen.joint_attack is None:
        iterations = max(LEAST, *map(evaluations, chosen.attack))
        chosen.joint_attack = format_spec(JOINT, {"iterations": iterations, "start": "grey", "learning_rate": 0.02})
    splits = load_dataset(chosen.data, image_size=chosen.size, label=chosen.label, by_user=True)
    print(HEADER, flush=True)
    with torch_threads(1):
        for similarity in chosen.similarity:
            for count in chosen.batches:
                rows: dict[str, list[dict[str, Any]]] = {}
                for row in table(chosen, splits, count, similarity):
                    rows.setdefault(row["attack"], []).append(row)
                    if chosen.out:
                        append_row(chosen.out, row)
                for some in rows.values():
                    print(line(some), flush=True)


if __name__ == "__main__":
    main()

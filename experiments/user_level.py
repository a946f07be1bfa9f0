"""What one representative image tells of a user's whole batch: the published attack beside its controls, batch by batch.

    python -m experiments.user_level --prior runs/faces32 [--batches 10 30 100] [--similarity person gender random]
        [--attack SPEC …] [--joint 10] [--model SPEC] [--label male] [--train 0] [--users 5] [--split private]

LFW's people are cut into three parts: private, reported on; test, to choose settings on (--split test); public, of which the
attacker's mean face and the images that the victim is trained on are taken. A batch is images of one person ("person", 20
at most), of people of one gender ("gender"), or of anybody ("random"). Every attack gets the same float32 gradients.

psnr is the mean over all images of the batch (peak 1); its bound is what the batch's own mean has ("batch-mean").
"to mean": PSNR to that mean, which one image can reach. "best of B" picks the nearest true image with the truth in hand.
rank: share of the other batches whose mean is nearer to the result than that of the attacked one, 0.5 by chance.
Controls: the prior alone; the same attack led by another batch's gradient; the mean public face; one image without a prior,
found by --joint-attack; up to --joint images, joint inversion of the whole batch and the mean of what it finds. Seconds are
CPU time.
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
from fedattack.registry import ATTACKS, parse_spec
from fedattack.seeding import derive_generator
from fedattack.store import append_row, save_png
from fedattack.tasks import Classification, simulate
from fedattack.types import Knowledge, Reconstruction, Update

LFW = Path(__file__).resolve().parents[2] / "shared/data/lfw64.npz"
SIMILARITIES = ("person", "gender", "random")
RANKED = 20
"""Batches among which a result's own is looked for, where they are not one person's each."""

ATTACK = "user-level"


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
    one = found.images.double().mean(0, keepdim=True)
    distances = [float(mse(one, batch_mean(other.images)[:1].double())) for other in all_batches]
    nearer = sum(d < distances[number] for i, d in enumerate(distances) if i != number)
    return {
        "psnr_db": row["psnr_db"],
        "lpips": row["lpips"],
        "to_mean_db": float(psnr_db(one, batch_mean(truth)[:1].double())),
        "best_of_batch_db": max(row["psnr_db"]),
        "rank": nearer / max(len(all_batches) - 1, 1),
    }


def run(
    spec: str,
    by: Batch,
    model: nn.Module,
    num_classes: int,
    public: Tensor,
    prior: str,
    seed: int,
    size: int | None = None,
) -> tuple[Reconstruction, float]:
    """One attack on one batch's update; its CPU seconds. Labels are hidden. size: 1 tells it that there is one image."""
    name, parameters = parse_spec(spec)
    attack = ATTACKS.create(name, **parameters)
    shape = (by.images.shape[1], by.images.shape[2], by.images.shape[3])
    count = size or len(by.images)
    knowledge = Knowledge(
        image_shape=shape, batch_size=count, num_classes=num_classes, prior=prior, public_images=public
    )
    update, task = by.update(model), Classification()
    begun = process_time()
    generator = derive_generator(seed, "attack", name)
    found = attack.reconstruct(update, model, task, knowledge, generator=generator)
    seconds = process_time() - begun
    return (replace(found, represents="user") if size == 1 else found), seconds


def prior_alone(spec: str) -> str:
    """The attack's own control without guidance."""
    name, parameters = parse_spec(spec)
    attack: Any = ATTACKS.create(name, **parameters)
    control = next(control for control in attack.controls() if control.kind == "prior-alone")
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in (control.parameters or {}).items())})"


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
            other = everyone[(number + 1) % len(everyone)]
            mean = public.double().mean(0, keepdim=True).float()
            fixed = {
                "mean public face": Reconstruction(images=mean, represents="user"),
                "batch-mean (bound)": Reconstruction(images=batch_mean(target.images)[:1], represents="user"),
            }
            for label, found in fixed.items():
                yield {**facts, "attack": label, "user": target.name, **told(found, number, everyone, chosen.lpips)}
            todo = {spec: (spec, target, None) for spec in chosen.attack}
            if chosen.controls:
                todo |= {f"{spec}, prior alone": (spec, target, None) for spec in map(prior_alone, chosen.attack)}
                todo |= {f"{spec}, unrelated": (spec, other, None) for spec in chosen.attack if other is not target}
                todo[f"one image without a prior: {chosen.joint_attack}"] = (chosen.joint_attack, target, 1)
            if count <= chosen.joint:
                todo[f"jointly: {chosen.joint_attack}"] = (chosen.joint_attack, target, None)
            for place, (label, (spec, by, size)) in enumerate(todo.items()):
                found, seconds = run(spec, by, model, data.num_classes, public, chosen.prior, seed, size)
                more = {
                    "seconds": seconds,
                    "steps": found.steps,
                    "loss": found.losses[-1],
                    "diagnostics": found.diagnostics,
                }
                results = {label: found}
                if len(found.images) > 1:
                    results["mean of these"] = replace(found, images=batch_mean(found.images)[:1], represents="user")
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
        spread([row["to_mean_db"] for row in rows]),
        spread([row["best_of_batch_db"] for row in rows]),
        spread([row["rank"] for row in rows]),
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
        "--joint-attack", default="inverting-gradients(iterations=300, start='grey', learning_rate=0.02)"
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

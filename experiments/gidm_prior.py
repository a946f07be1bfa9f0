"""Does GIDM's generative phase help? Untrained and trained weights attacked, their own or a public model as the prior.

    python -m experiments.gidm_prior [--images 5] [--training-steps 1500] [--prior FOLDER] [--out FILE.jsonl]

A small U-Net is first trained on public faces (CelebA; the attacked ones are LFW's), as `fedattack train-prior` does. Then one
gradient a face is attacked: t drawn at random, ε and t known, or ε unknown and t read off the update. dlg-dm and gidm
without a prior ("none") have as many iterations as gidm's two phases together; generative is the first of them alone.
PSNR has peak 1 on [0, 1].
"""

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor

from fedattack.data import load_dataset
from fedattack.jobs import torch_threads
from fedattack.metrics import psnr_db
from fedattack.models import build_model
from fedattack.prior_training import PriorSettings, train_prior
from fedattack.priors import load_prior
from fedattack.registry import ATTACKS
from fedattack.seeding import derive_generator
from fedattack.store import append_row
from fedattack.tasks import Diffusion, simulate
from fedattack.types import Knowledge, Update

SHARED = Path(__file__).resolve().parents[2] / "shared/data"


def build(size: int, channels: Sequence[int], seed: int) -> Any:
    """A U-Net with attention at the bottom only."""
    options = {"block_out_channels": tuple(channels), "attention": (), "mid_attention": True, "norm_num_groups": 8}
    return build_model("unet", image_shape=(3, size, size), num_classes=None, seed=seed, **options)


def public_prior(chosen: argparse.Namespace) -> PriorSettings:
    """A DDPM of public faces (CelebA), of the victims' own architecture."""
    return PriorSettings(
        f"npz:{SHARED / 'celeba10k_jpeg.npz'}",
        size=chosen.size,
        channels=tuple(chosen.channels),
        steps=chosen.training_steps,
        batch=64,
        learning_rate=2e-3,
        ema=0.99,
    )


def say(step: int, steps: int, loss: float) -> None:
    if step % 100 == 0:
        print(f"training: step {step} of {steps}, loss {loss:.4f}", flush=True)


def victim(model: Any, number: int, image: Tensor, hidden: bool) -> tuple[Update, Knowledge]:
    """A client's float32 gradient of one face, and what the attacker knows."""
    task = Diffusion()
    private = task.draw(image[None], torch.zeros(1), generator=derive_generator(number, "client"))
    sent = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    received = {n: t.detach() for n, t in simulate(model, sent, task, [private], kind="gradient").items()}
    oracles = {} if hidden else {"noise": private["noise"], "timesteps": private["timesteps"]}
    shape = (image.shape[0], image.shape[1], image.shape[2])
    knowledge = Knowledge(image_shape=shape, batch_size=1, **oracles)
    return Update(1, "0", sent, received, "gradient", 1), knowledge


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--images", type=int, default=5, help="faces attacked")
    parser.add_argument("--size", type=int, default=16)
    parser.add_argument("--channels", type=int, nargs="+", default=[16, 32], help="of the U-Net's levels")
    parser.add_argument("--training-steps", type=int, default=1500)
    parser.add_argument("--generative", type=int, default=200, help="iterations of the generative phase")
    parser.add_argument("--fine-tuning", type=int, default=400, help="iterations of the fine-tuning phase")
    parser.add_argument("--sampling-steps", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=0.01, help="the paper's; of the generative phase too")
    parser.add_argument("--prior", type=Path, default=Path("runs/gidm-prior"), help="trained there where it is not yet")
    parser.add_argument("--only", nargs="*", default=[], help="settings that hold one of these texts")
    parser.add_argument("--out", type=Path, help="a JSON line for every attack on every image")
    chosen = parser.parse_args(arguments)
    with torch_threads(1):
        train_prior(public_prior(chosen), chosen.prior, progress=say)
        weights = load_prior(str(chosen.prior)).network.state_dict()
        faces = load_dataset(f"npz:{SHARED / 'lfw64.npz'}", image_size=chosen.size).private.images(range(chosen.images))
        print(
            "| attacked weights | ε, t | attack | prior | PSNR, dB: mean ± std (each) | own loss ÷ silence (each) |\n"
            "|---|---|---|---|---|---|"
        )
        for trained, hidden, (name, prior, options) in itertools.product((False, True), (False, True), attacks(chosen)):
            setting = ["trained" if trained else "untrained", "unknown" if hidden else "known", name, prior or "-"]
            if trained and prior == "public":
                continue  # the same weights
            if chosen.only and not any(text in " " + " ".join(setting) for text in chosen.only):
                continue
            found = []
            for number, face in enumerate(faces):
                model = build(chosen.size, chosen.channels, 1000 + number)
                if trained:
                    model.load_state_dict(weights)
                update, knowledge = victim(model, number, face, hidden)
                if prior == "public":
                    knowledge = replace(knowledge, prior=str(chosen.prior))
                generator = derive_generator(number, "attack")
                attack = ATTACKS.create(name, **options)
                result = attack.reconstruct(update, model, Diffusion(), knowledge, generator=generator)
                facts = {"image": number, "psnr_db": float(psnr_db(result.images, face[None])), **result.diagnostics}
                found.append({"weights": setting[0], "hidden": hidden, "attack": name, "prior": prior, **facts})
                if chosen.out:
                    append_row(chosen.out, found[-1])
            print(line(setting, found), flush=True)


def attacks(chosen: argparse.Namespace) -> list[tuple[str, str, dict[str, Any]]]:
    """(attack, prior, options): matching alone, gidm without its first phase, that phase alone and both with either prior."""
    both = {"sampling_steps": chosen.sampling_steps, "learning_rate": chosen.learning_rate}
    generative = {**both, "generative_iterations": chosen.generative}
    gidm = {**generative, "fine_tuning_iterations": chosen.fine_tuning}
    total = chosen.generative + chosen.fine_tuning
    matching = ("dlg-dm", "", {"iterations": total, "learning_rate": chosen.learning_rate})
    phases = [[("generative", prior, generative), ("gidm", prior, gidm)] for prior in ("sent", "public")]
    pixels = ("gidm", "none", {**gidm, "generative_iterations": 0, "fine_tuning_iterations": total})
    return [matching, pixels, *itertools.chain.from_iterable(phases)]


def line(setting: Sequence[str], rows: Sequence[dict[str, Any]]) -> str:
    """A line of the table."""
    psnrs = [row["psnr_db"] for row in rows]
    spread = f"{mean(psnrs):.1f} ± {stdev(psnrs) if len(psnrs) > 1 else 0.0:.1f}"
    each = " ".join(f"{value:.1f}" for value in psnrs)
    losses = " ".join(f"{row['relative_loss']:.0e}" for row in rows)
    return f"| {' | '.join(setting)} | {spread} ({each}) | {losses} |"


if __name__ == "__main__":
    main()

"""Our gradient matching beside the field's tool `breaching`: milliseconds an iteration and PSNR, in one run on one thread.

    python -m experiments.benchmark [--images 5] [--iterations 2000] [--methods NAME …] [--data npz:PATH] [--out FOLDER]

Both sides get the same victim (DLG's LeNet, sigmoid, weights U(−0.5, 0.5)), the same image, the same float32 gradient and
the same knowledge of the label, one image after another and turn about, so that a busy machine slows both. An iteration
is one evaluation of the matching objective with its gradient (an Adam step; an L-BFGS step or line-search trial), timed from
one forward pass of the victim to the next; the median over them is reported, wall clock and CPU. The truth is used for PSNR
only (peak 1, images in [0, 1]) and no setting was chosen on these images: ours are the attacks' defaults or those of
recipes/demo.toml, breaching's are those it ships. Its L-BFGS runs in float32, ours in float64 by default.

Source of the other side: Geiping, Fowl, `breaching` 0.1.2 (PyPI), attacks `invertinggradients` and `deepleakage`. It normalises
images itself, so it is handed the same network with the first layer (x − 0.5)/0.5 taken off and mean = std = 0.5 beside
it. `--iterations` cuts every method off alike, with its step decay; 0 lets each go to its own end (breaching: 24,000 steps).
Reported for breaching earlier elsewhere: 3.6 to 5.4 ms of CPU an iteration; `invertinggradients` ends at 13 dB, at 18 dB with
its best TV weight; `deepleakage` at 40 to 50 dB after 40 to 90 s for four seeds of five.
"""

import argparse
import sys
import tomllib
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from io import StringIO
from itertools import pairwise
from pathlib import Path
from statistics import mean, median, pstdev
from time import perf_counter, process_time
from typing import Any

import torch
from torch import Tensor, nn

from fedattack.data import ImageData, load_dataset
from fedattack.errors import FedattackError, must, one_of
from fedattack.jobs import torch_threads
from fedattack.metrics import psnr_db
from fedattack.models import build_model
from fedattack.registry import ATTACKS, format_spec
from fedattack.seeding import derive_generator, derive_seed, seeded_default_generator
from fedattack.store import write_atomically, write_rows
from fedattack.tasks import Classification, simulate
from fedattack.types import Knowledge, Update

CIFAR = Path(__file__).resolve().parents[2] / "shared/data/cifar10_subset.npz"
DEMO = Path(__file__).parent / "recipes/demo.toml"
NOT_INSTALLED = "breaching is not installed: pip install '.[benchmark]'"
LBFGS_STEPS = 20
"""Evaluations in one outer iteration of L-BFGS, on both sides, without line-search trials."""


@dataclass
class Clock:
    """Wall and CPU time of every forward pass of the victim it hooks: one pass is one evaluation of the objective."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def watch(self, model: nn.Module) -> None:
        """A function, not a method, is hooked: copies of the model then report to the same clock."""

        def stamp(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            self.wall.append(perf_counter())
            self.cpu.append(process_time())

        model.register_forward_pre_hook(stamp)


@dataclass(frozen=True)
class Victim:
    """One client with one image (1,C,H,W): what it was sent, what it sent back, and the truth that only PSNR sees."""

    number: int
    image: Tensor
    label: Tensor
    model: nn.Sequential
    update: Update
    num_classes: int

    def knowledge(self, shows_label: bool) -> Knowledge:
        channels, height, width = self.image.shape[1:]
        return Knowledge(
            image_shape=(channels, height, width),
            batch_size=1,
            num_classes=self.num_classes,
            labels=self.label if shows_label else None,
        )


Run = Callable[[Victim, int, torch.Generator], Tensor]
"""run(victim, iteration limit or 0, generator) -> images (1,C,H,W) in [0, 1]."""


@dataclass(frozen=True)
class Method:
    """A way to attack a victim. `rival` names the method of breaching whose time an iteration it is divided by."""

    settings: str
    run: Run
    rival: str = ""
    restarts: int = 1


# ------------------------------------------------------------------------------------------------------ the two sides
def ours(attack: str, rival: str, *, shows_label: bool = False, demo: bool = False, **parameters: Any) -> Method:
    """An attack of this project; `demo` takes the settings of the demo recipe."""
    if demo:
        parameters = demo_settings("dlg" if attack == "idlg" else attack) | parameters
    run = partial(_run_ours, attack, parameters, shows_label)
    return Method(format_spec(attack, parameters), run, rival, int(parameters.get("restarts", 1)))


def demo_settings(attack: str) -> dict[str, Any]:
    """The parameters of the first attack of that name in recipes/demo.toml."""
    cases = tomllib.loads(DEMO.read_text())["case"]
    listed = [entry for case in cases for entry in case["attack"] if isinstance(entry, dict)]
    found = next(entry for entry in listed if entry["name"] == attack)
    return {name: value for name, value in found.items() if name != "name"}


def _run_ours(
    name: str, parameters: Mapping[str, Any], shows_label: bool, victim: Victim, limit: int, generator: torch.Generator
) -> Tensor:
    attack = ATTACKS.create(name, **parameters)
    if limit:
        steps = min(attack.iterations, _outer(limit) if hasattr(attack, "history_size") else limit)
        attack = ATTACKS.create(name, **{**parameters, "iterations": steps})
    found = attack.reconstruct(
        victim.update, victim.model, Classification(), victim.knowledge(shows_label), generator=generator
    )
    images: Tensor = found.images
    return images


def theirs(attack: str, *overrides: str, shows_label: bool = False) -> Method:
    """An attack of breaching as it ships it, with Hydra overrides."""
    run = partial(_run_breaching, attack, overrides, shows_label)
    return Method(" ".join(("breaching:", attack, *overrides)), run)


def _run_breaching(
    attack: str, overrides: Sequence[str], shows_label: bool, victim: Victim, limit: int, generator: torch.Generator
) -> Tensor:
    with warnings.catch_warnings(), redirect_stdout(StringIO()):
        warnings.simplefilter("ignore")
        import breaching  # type: ignore[import-not-found, import-untyped, unused-ignore]
        from omegaconf import OmegaConf

        config = breaching.get_attack_config(attack, list(overrides))
        if limit:
            steps = _outer(limit) if config.optim.optimizer == "L-BFGS" else limit
            config.optim.max_iterations = min(config.optim.max_iterations, steps)
        normalize, network = victim.model[0], victim.model[1:]
        network._forward_pre_hooks.update(victim.model._forward_pre_hooks)
        pixel_mean, pixel_std = (b.flatten().tolist() for b in (normalize.mean, normalize.std))
        public = OmegaConf.create(
            {
                "modality": "vision",
                "task": "classification",
                "shape": list(victim.image.shape[1:]),
                "classes": victim.num_classes,
                "mean": pixel_mean,
                "std": pixel_std,
            }
        )
        names = [name for name, _ in victim.model.named_parameters()]
        payload = [{"parameters": [victim.update.sent[n] for n in names], "buffers": None, "metadata": public}]
        shared = {
            "gradients": [victim.update.received[name].clone() for name in names],
            "buffers": None,
            "metadata": {
                "num_data_points": 1,
                "labels": victim.label if shows_label else None,
                "local_hyperparams": None,
            },
        }
        setup = {"dtype": torch.float32, "device": torch.device("cpu")}
        with seeded_default_generator(generator.initial_seed()):
            attacker = breaching.attacks.prepare_attack(network, nn.CrossEntropyLoss(), config, setup)
            found, _ = attacker.reconstruct(payload, [shared], {})
    images: Tensor = found["data"].detach() * normalize.std + normalize.mean
    return images


def _outer(limit: int) -> int:
    return -(-limit // LBFGS_STEPS)


METHODS: dict[str, Method] = {
    "inverting-gradients": ours("inverting-gradients", "breaching-ig", shows_label=True),
    "breaching-ig": theirs("invertinggradients", shows_label=True),
    "inverting-gradients-demo": ours("inverting-gradients", "breaching-ig", shows_label=True, demo=True),
    "dlg": ours("dlg", "breaching-dlg"),
    "breaching-dlg": theirs("deepleakage"),
    "dlg-demo": ours("dlg", "breaching-dlg", demo=True),
    "idlg": ours("idlg", "breaching-idlg"),
    "breaching-idlg": theirs("deepleakage", "attack_type=optimization", "label_strategy=iDLG"),
    "idlg-demo": ours("idlg", "breaching-idlg", demo=True),
    "inverting-gradients-x8": ours("inverting-gradients", "breaching-ig", shows_label=True, demo=True, restarts=8),
}


# ------------------------------------------------------------------------------------------------------------ one case
def make_victim(data: ImageData, row: int, number: int, seed: int) -> Victim:
    """A client that holds image `row`, and its gradient on a LeNet with weights of its own."""
    image, label = data.images([row]), data.labels[row : row + 1]
    model = build_model(
        "lenet",
        image_shape=data.image_shape,
        num_classes=data.num_classes,
        seed=derive_seed(seed, "benchmark", "model", number),
    )
    assert isinstance(model, nn.Sequential)
    sent = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    received = simulate(model, sent, Classification(), [{"images": image, "labels": label}], kind="gradient")
    received = {name: tensor.detach().clone() for name, tensor in received.items()}
    update = Update(round=1, client=str(number), sent=sent, received=received, kind="gradient", num_examples=1)
    return Victim(number, image, label, model, update, data.num_classes)


def measure(name: str, victim: Victim, limit: int, seed: int) -> dict[str, Any]:
    """One row: what the method found and how long an iteration of one restart took. An error becomes its text."""
    method, clock = METHODS[name], Clock()
    row: dict[str, Any] = {"method": name, "settings": method.settings, "image": victim.number, "limit": limit}
    row |= {"restarts": method.restarts, "seed": seed, "status": "ok", "error": ""}
    hooks = victim.model._forward_pre_hooks
    clock.watch(victim.model)
    begun = perf_counter()
    try:
        found = method.run(victim, limit, derive_generator(seed, "benchmark", name, victim.number))
    except Exception as error:
        return row | {"status": "failed", "error": f"{type(error).__name__}: {error}"}
    finally:
        hooks.clear()
    row["seconds"] = perf_counter() - begun
    row["psnr_db"] = float(psnr_db(found.clamp(0.0, 1.0).nan_to_num(0.5), victim.image)[0])
    row["iterations"] = len(clock.wall)
    for unit, stamps in (("wall", clock.wall), ("cpu", clock.cpu)):
        row[f"{unit}_ms"] = 1e3 * _median_step(stamps) / method.restarts
    return row


def _median_step(stamps: Sequence[float]) -> float:
    steps = [after - before for before, after in pairwise(stamps)]
    return median(steps) if steps else float("nan")


# ------------------------------------------------------------------------------------------------------------ the table
HEADER = (
    "method",
    "restarts",
    "iterations",
    "ms an iteration, wall (CPU)",
    "seconds an image",
    "PSNR dB, mean ± std",
    "every image",
    "time ÷ breaching's, wall (CPU)",
)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown, a line a method: medians of times over images, PSNR of every image, ratio of times image by image."""
    lines = [" | ".join(HEADER), " | ".join("---" for _ in HEADER)]
    for name in dict.fromkeys(row["method"] for row in rows):
        good = [row for row in rows if row["method"] == name and row["status"] == "ok"]
        if not good:
            failed = next(row["error"] for row in rows if row["method"] == name)
            lines.append(" | ".join([name, "failed: " + failed.splitlines()[0].replace("|", "/"), *[""] * 6]))
            continue
        psnr = [row["psnr_db"] for row in good]
        cells = (
            name,
            str(good[0]["restarts"]),
            f"{median(row['iterations'] for row in good):.0f}",
            f"{median(row['wall_ms'] for row in good):.2f} ({median(row['cpu_ms'] for row in good):.2f})",
            f"{median(row['seconds'] for row in good):.1f}",
            f"{mean(psnr):.1f} ± {pstdev(psnr):.1f}",
            " ".join(f"{value:.1f}" for value in psnr),
            _ratio(good, rows),
        )
        lines.append(" | ".join(cells))
    return "".join(f"| {line} |\n" for line in lines)


def _ratio(good: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]) -> str:
    rival = METHODS[good[0]["method"]].rival
    base = {row["image"]: row for row in rows if row["method"] == rival and row["status"] == "ok"}
    pairs = [(row, base[row["image"]]) for row in good if row["image"] in base]
    if not pairs:
        return "–"
    wall, cpu = (median(row[unit] / other[unit] for row, other in pairs) for unit in ("wall_ms", "cpu_ms"))
    return f"{wall:.2f} ({cpu:.2f})"


# ------------------------------------------------------------------------------------------------------- the command
def load_images(name: str | None) -> ImageData:
    """The test part of a data set: the shared CIFAR-10 copy where it lies beside the checkout, else embedded patches."""
    return load_dataset(name or (f"npz:{CIFAR}" if CIFAR.is_file() else "patches")).test


def benchmark(
    *,
    images: int = 5,
    iterations: int = 2000,
    methods: Sequence[str] = (),
    data: str | None = None,
    out: Path | None = None,
    seed: int = 0,
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Every method on every image; the rows, which are written to `out` as they come. Raises FedattackError."""
    for name in methods:
        if name not in METHODS:
            raise FedattackError(one_of("method", METHODS, name))
    if images < 1 or iterations < 0:
        raise FedattackError(must("images and iterations", "at least 1 and 0", (images, iterations)))
    chosen = list(methods or METHODS)
    if find_spec("breaching") is None:
        say(NOT_INSTALLED)
        chosen = [name for name in chosen if not name.startswith("breaching-")]
    source = load_images(data)
    if images > len(source):
        raise FedattackError(must("images", f"at most {len(source)}, the test images of {source.name}", images))
    picks = torch.randperm(len(source), generator=derive_generator(seed, "benchmark", "images"))[:images].tolist()
    rows: list[dict[str, Any]] = []
    with torch_threads(1):
        for number, pick in enumerate(picks):
            for name in chosen:
                rows.append(measure(name, make_victim(source, pick, number, seed), iterations, seed) | {"pick": pick})
                say(f"image {number + 1}/{images}  {name}: {_result(rows[-1])}")
                if out is not None:
                    write_rows(out / "rows.jsonl", rows)
    if out is not None:
        write_atomically(out / "table.md", table(rows).encode())
    return rows


def _result(row: Mapping[str, Any]) -> str:
    if row["status"] != "ok":
        return str(row["error"])
    spent = f"{row['seconds']:.1f} s, {row['wall_ms']:.2f} ms each"
    return f"{row['psnr_db']:.1f} dB after {row['iterations']} iterations in {spent}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments.benchmark", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--images", type=int, default=5, help="how many images, one victim each (default 5)")
    parser.add_argument(
        "--iterations", type=int, default=2000, help="at most so many for every method; 0: its own number"
    )
    parser.add_argument("--methods", nargs="+", default=[], metavar="NAME", help="any of " + ", ".join(METHODS))
    parser.add_argument("--data", help='"npz:PATH", "patches", … (default: the shared CIFAR-10 copy, else patches)')
    parser.add_argument("--out", type=Path, help="folder for rows.jsonl and table.md")
    parser.add_argument("--seed", type=int, default=0)
    given = vars(parser.parse_args(arguments))
    try:
        rows = benchmark(**given, say=partial(print, flush=True))
    except FedattackError as error:
        print(error, file=sys.stderr)
        return 2
    print("\n" + table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())

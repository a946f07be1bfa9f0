"""Train an attacker's prior: an unconditional DDPM on public images, saved as a diffusers pipeline with its provenance.

    runs/prior/  model_index.json  unet/  scheduler/    the weights' moving average: DDPMPipeline.from_pretrained loads it
                 provenance.json  images.safetensors    what it was trained on and how, see fedattack.provenance
                 samples.png                            drawn by deterministic DDIM
                 training.safetensors                   only until all of that is written: where training stands

Training draws step n from a generator of its own, so that an interrupted one goes on to the same bits. A folder that was
trained with the same settings on the same images is used as it is.
Source: Ho et al., DDPM, arXiv 2006.11239, Algorithm 1; the moving average is diffusers' EMAModel.
"""

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from fedattack.checkpoints import draw_samples, image_grid, save_weights
from fedattack.data import ImageData, load_dataset
from fedattack.errors import FedattackError, must, one_of
from fedattack.models import build_model
from fedattack.provenance import PROVENANCE, fingerprint, read_provenance, same_settings, save_thumbnails
from fedattack.seeding import derive_generator, derive_seed
from fedattack.store import finite, private_folder, read_tensors, save_png, write_json, write_tensors
from fedattack.tasks import Diffusion
from fedattack.types import Progress, State, silent

SPLITS = ("public", "private", "test", "all")
TRAINING = "training.safetensors"
HELD_OUT = 256
"""Images of the test split at most on which the finished prior's loss is stated."""

WINDOW = 200
"""Steps whose mean loss is called the loss."""


@dataclass(frozen=True)
class PriorSettings:
    """What makes a prior the one it is; the same settings on the same images give the same weights on the same device.

    dataset, options: as `load_dataset` takes them; split: "public" (an attacker's own, the default), "private", "test" or
    "all". size: side in pixels. channels: of the U-Net's levels, each of which halves the sides; layers: blocks of a level;
    attention: levels that have it beside the bottom. steps: of Adam on batches of `batch`; the rate rises over `warmup`
    steps and falls linearly to zero. ema: most decay of the weights' moving average. flips: images are mirrored at random.
    prediction: "epsilon" or "v_prediction"; schedule: a beta schedule of diffusers; timesteps: T. bf16: forward passes
    in bfloat16 (GPUs).
    """

    dataset: str
    options: Mapping[str, Any] = field(default_factory=dict)
    split: str = "public"
    size: int = 32
    channels: tuple[int, ...] = (32, 64, 64)
    layers: int = 1
    attention: tuple[int, ...] = ()
    steps: int = 3000
    batch: int = 32
    learning_rate: float = 1e-3
    warmup: int = 100
    ema: float = 0.999
    flips: bool = True
    prediction: str = "epsilon"
    schedule: str = "linear"
    timesteps: int = 1000
    bf16: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise FedattackError(one_of("split", SPLITS, self.split))
        for name in ("size", "layers", "steps", "batch"):
            if getattr(self, name) < 1:
                raise FedattackError(must(name, "a whole number of at least 1", getattr(self, name)))
        if "image_size" in self.options:
            raise FedattackError(must("options", "without image_size, which is size", self.options["image_size"]))
        if not self.learning_rate > 0:
            raise FedattackError(must("learning_rate", "above zero", self.learning_rate))
        if not 0 <= self.ema < 1:
            raise FedattackError(must("ema", "a decay in [0, 1)", self.ema))
        _ = self.task

    @property
    def task(self) -> Diffusion:
        return Diffusion(
            num_train_timesteps=self.timesteps, beta_schedule=self.schedule, prediction_type=cast(Any, self.prediction)
        )

    def build(self, image_shape: tuple[int, int, int]) -> nn.Module:
        """The untrained U-Net."""
        return build_model(
            "unet",
            image_shape=image_shape,
            num_classes=None,
            seed=derive_seed(self.seed, "prior", "weights"),
            block_out_channels=self.channels,
            layers_per_block=self.layers,
            attention=self.attention,
            mid_attention=True,
            norm_num_groups=min(8, *self.channels),
        )


PRESETS: dict[str, dict[str, Any]] = {
    "cpu": {},
    "gpu-64": {
        "size": 64,
        "channels": (64, 128, 128, 256),
        "layers": 2,
        "attention": (2,),
        "steps": 50_000,
        "batch": 128,
        "learning_rate": 2e-4,
        "warmup": 1000,
        "ema": 0.9999,
        "bf16": True,
    },
    "gpu-128": {
        "size": 128,
        "channels": (64, 128, 128, 256, 256),
        "layers": 2,
        "attention": (3,),
        "steps": 100_000,
        "batch": 64,
        "learning_rate": 1e-4,
        "warmup": 1000,
        "ema": 0.9999,
        "bf16": True,
    },
}
"""cpu: 20 to 30 minutes on two cores at 32 pixels. gpu-64, gpu-128: for one GPU of 24 GB or more."""


def prior_settings(dataset: str, preset: str = "cpu", **chosen: Any) -> PriorSettings:
    """A preset with some settings chosen; those that are None are the preset's. Raises FedattackError on an unknown name."""
    if preset not in PRESETS:
        raise FedattackError(one_of("preset", PRESETS, preset))
    given = {name: value for name, value in chosen.items() if value is not None}
    names = {f.name for f in fields(PriorSettings)}
    for name in given:
        if name not in names:
            raise FedattackError(one_of("setting of a prior", names, name))
    return PriorSettings(dataset, **{**PRESETS[preset], **given})


@torch.enable_grad()
def train_prior(
    settings: PriorSettings,
    folder: Path,
    *,
    device: torch.device | str = "cpu",
    samples: int = 36,
    sample_steps: int = 50,
    save_every: int = 500,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Train a prior into `folder`, or go on with an interrupted training, or take what is there; gives its provenance.

    progress is told of every step, or of none where the prior was there. save_every: steps between the files from which
    an interrupted training goes on. samples: images of the grid, by DDIM in `sample_steps` steps.
    Raises FedattackError where the folder holds something else, or a prior of other settings or other images, and as soon
    as a loss is not finite; nothing of such a training is saved.
    """
    if save_every < 1:
        raise FedattackError(must("save_every", "a whole number of at least 1", save_every))
    if samples < 0:
        raise FedattackError(must("samples", "a whole number, or 0 for none", samples))
    images, held_out = _images(settings)
    identity = _identity(settings, images)
    if done := read_provenance(str(folder)):
        _same(identity, done, folder)
        for name in ("last", "average_on_trained"):
            _finite_loss(f"{name!r} of prior {str(folder)!r}", done["loss"][name])
        return done
    trained = _Training(settings, images, torch.device(device))
    if (folder / TRAINING).is_file():
        tensors, about = read_tensors(folder / TRAINING)
        _same(identity, about, folder)
        trained.restore(tensors, about)
    elif folder.exists() and any(folder.iterdir()):
        raise FedattackError(must("folder of a prior", "empty, or one that train-prior wrote", str(folder)))
    private_folder(folder)
    begun = time.perf_counter()
    while trained.done < settings.steps:
        loss = trained.step()
        _finite_loss(f"of step {trained.done}", loss)
        if trained.done % save_every == 0 and trained.done < settings.steps:
            trained.seconds += time.perf_counter() - begun
            begun = time.perf_counter()
            _save(folder, identity, *trained.saved())
        progress(trained.done, settings.steps, loss)
    trained.seconds += time.perf_counter() - begun
    end = trained.saved()
    model, state = trained.average()
    average = _finite_loss("of the moving average", _loss(settings, model, images))
    _save(folder, identity, *end)
    save_weights(folder, model, settings.task, state)
    save_thumbnails(folder, images.pixels)
    if samples:
        steps = min(sample_steps, settings.timesteps)
        drawn = draw_samples(model, state, settings.task, images.image_shape, samples, steps=steps, seed=settings.seed)
        save_png(folder / "samples.png", image_grid(drawn))
    provenance = {
        **identity,
        "loss": {
            "first": _mean(trained.losses[:WINDOW]),
            "last": _mean(trained.losses[-WINDOW:]),
            "average_on_trained": average,
            "average_on_held_out": _loss(settings, model, held_out) if len(held_out) else None,
            "curve": [_mean(part.tolist()) for part in torch.tensor(trained.losses).chunk(100)],
        },
        "seconds": trained.seconds,
        "device": str(device),
        "versions": _versions(),
    }
    write_json(folder / PROVENANCE, finite(provenance))
    (folder / TRAINING).unlink(missing_ok=True)
    return dict(finite(provenance))


# ------------------------------------------------------------------------------------------------ the training
class _Training:
    """Weights, Adam's moments and the moving average after `done` steps."""

    def __init__(self, settings: PriorSettings, images: ImageData, device: torch.device) -> None:
        from diffusers.training_utils import EMAModel

        self.settings, self.images, self.device = settings, images, device
        self.task = settings.task
        self.model = settings.build(images.image_shape).to(device).train()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(self.parameters, lr=settings.learning_rate)
        self.ema = EMAModel(self.parameters, decay=settings.ema)
        self.done, self.seconds = 0, 0.0
        self.losses: list[float] = []

    def step(self) -> float:
        """One step of Adam; its loss."""
        settings, number = self.settings, self.done
        generator = derive_generator(settings.seed, "prior", "step", number)
        rows = torch.randint(len(self.images), (settings.batch,), generator=generator)
        images = self.images.images(rows)
        if settings.flips:
            mirrored = torch.rand(len(images), generator=generator) < 0.5
            images[mirrored] = images[mirrored].flip(-1)
        private = self.task.draw(images, torch.zeros(len(images)), generator=generator)
        private = {name: tensor.to(self.device, non_blocking=True) for name, tensor in private.items()}
        rate = min(1.0, (number + 1) / max(settings.warmup, 1)) * (1.0 - number / settings.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate * rate
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=settings.bf16):
            loss = self.task.loss(self.model, private)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.ema.step(self.parameters)
        self.done += 1
        self.losses.append(float(loss.detach()))
        return self.losses[-1]

    def saved(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Where training stands; the weights are copies, which `average` leaves as they are."""
        tensors: dict[str, Tensor] = {f"weights/{i}": p.detach().clone() for i, p in enumerate(self.parameters)}
        tensors |= {f"average/{i}": p for i, p in enumerate(self.ema.shadow_params)}
        for i, parameter in enumerate(self.parameters):
            tensors |= {f"{name}/{i}": self.optimizer.state[parameter][name] for name in _MOMENTS}
        tensors["losses"] = torch.tensor(self.losses, dtype=torch.float64)
        return tensors, {"done": self.done, "seconds_so_far": self.seconds}

    def restore(self, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        with torch.no_grad():
            for i, parameter in enumerate(self.parameters):
                parameter.copy_(tensors[f"weights/{i}"])
                moments = {name: tensors[f"{name}/{i}"].to(parameter.device) for name in _MOMENTS[:2]}
                self.optimizer.state[parameter] = {"step": tensors[f"step/{i}"], **moments}
        self.ema.shadow_params = [tensors[f"average/{i}"].to(self.device) for i in range(len(self.parameters))]
        self.ema.optimization_step = self.done = int(about["done"])
        self.losses, self.seconds = tensors["losses"].tolist(), float(about["seconds_so_far"])

    def average(self) -> tuple[nn.Module, State]:
        """The model on the CPU with the averaged weights, and these weights."""
        self.ema.copy_to(self.parameters)
        self.model.cpu().eval().requires_grad_(False)
        return self.model, {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}


_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


@torch.no_grad()
def _loss(settings: PriorSettings, model: nn.Module, images: ImageData) -> float:
    """The task's loss on up to HELD_OUT images, four draws of noise and timestep each."""
    generator = derive_generator(settings.seed, "prior", "loss")
    some = images.images(range(min(HELD_OUT, len(images))))
    losses = [
        float(settings.task.loss(model, settings.task.draw(part, torch.zeros(len(part)), generator=generator)))
        * len(part)
        for _ in range(4)
        for part in torch.split(some, 64)
    ]
    return sum(losses) / (4 * len(some))


# ------------------------------------------------------------------------------------------------ data and identity
def _images(settings: PriorSettings) -> tuple[ImageData, ImageData]:
    """The images to train on, and those of the test split that are not among them."""
    splits = load_dataset(settings.dataset, image_size=settings.size, **settings.options)
    parts = {"public": splits.public, "private": splits.private, "test": splits.test}
    if settings.split == "all":
        pixels = torch.cat([part.pixels for part in parts.values()])
        chosen = ImageData(pixels, torch.zeros(len(pixels), dtype=torch.int64), ("all",), None, splits.private.name)
    else:
        chosen = parts[settings.split]
    if not len(chosen):
        raise FedattackError(must(f"images of split {settings.split!r} of {settings.dataset!r}", "at least one", 0))
    return chosen, splits.test.subset([]) if settings.split in ("test", "all") else splits.test


def _identity(settings: PriorSettings, images: ImageData) -> dict[str, Any]:
    """The settings as provenance states them, with what the images are."""
    stated = asdict(replace(settings, options=dict(settings.options)))
    data = {name: stated.pop(name) for name in ("dataset", "options", "split")}
    data |= {"images": len(images), "image_shape": list(images.image_shape), "sha256": fingerprint(images.pixels)}
    return {"type": "prior", "data": data, **stated}


def _same(wanted: Mapping[str, Any], found: Mapping[str, Any], folder: Path) -> None:
    """The dataset's name may differ (a file may have moved) as long as the images are the same."""
    here, there = ({**about, "data": {**about.get("data", {}), "dataset": ""}} for about in (wanted, found))
    if differing := same_settings(here, {name: there.get(name) for name in here}):
        raise FedattackError(f"prior {str(folder)!r} was trained with other settings: {'; '.join(differing)}")


def _save(folder: Path, identity: Mapping[str, Any], tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    write_tensors(folder / TRAINING, tensors, {**identity, **about})


def _finite_loss(of: str, loss: float | None) -> float:
    """The loss. Raises FedattackError where training diverged (a file says null where a number was not finite)."""
    if loss is None or not math.isfinite(loss):
        raise FedattackError(f"{must(f'loss {of}', 'finite', loss)}: training diverged, lower learning_rate")
    return loss


def _mean(values: list[float]) -> float:
    return sum(values) / max(len(values), 1)


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "diffusers")}

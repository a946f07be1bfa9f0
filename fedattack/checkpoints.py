"""What training leaves behind for later use: checkpoints, moving averages, sample grids; and weights to start from.

A DDPM is saved as a diffusers pipeline, so that `diffusers.DDPMPipeline.from_pretrained(folder)` loads it anywhere; any other
model as one safetensors file. A checkpoint is a folder that appears whole or not at all:

    round-012/  model_index.json  unet/  scheduler/       the global model after round 12 (else: model.safetensors)
                ema/                                      the same for its moving average, where one is kept
                samples.png                               images drawn from the average (from the model without one)
                about.json                                round, decay of the average, how the samples were drawn
"""

import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fedattack.errors import FedattackError, must
from fedattack.models import misfits
from fedattack.seeding import derive_generator, seeded_default_generator
from fedattack.store import FederationFolder, finite, private_folder, read_tensors, save_png, write_json, write_tensors
from fedattack.tasks import Diffusion, Task, bind, parameter_names
from fedattack.types import Progress, State, silent

if TYPE_CHECKING:
    from fedattack.config import CheckpointSettings

log = logging.getLogger("fedattack.checkpoints")

EMA = "ema"
SAMPLES = "samples.png"
MODEL = "model.safetensors"

_IGNORED = frozenset({"sample_size", "dropout"})
"""Entries of a U-Net's configuration that do not change which function its weights are (beside names with an underscore)."""


# ------------------------------------------------------------------------------------------------ saving
def save_checkpoint(
    folder: Path,
    model: nn.Module,
    task: Task,
    state: State,
    *,
    average: State | None = None,
    samples: Tensor | None = None,
    about: Mapping[str, Any] | None = None,
) -> Path:
    """Write weights, their average and samples (N,C,H,W) in [0, 1] into `folder` (mode 0700), replacing what was there."""
    private_folder(folder.parent)
    beside = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    shutil.rmtree(beside, ignore_errors=True)
    private_folder(beside)
    save_weights(beside, model, task, state)
    if average is not None:
        save_weights(private_folder(beside / EMA), model, task, average)
    if samples is not None:
        save_png(beside / SAMPLES, image_grid(samples))
    write_json(beside / "about.json", finite(about or {}))
    for inner in beside.rglob("*"):
        inner.chmod(0o700 if inner.is_dir() else 0o600)
    if folder.exists():
        shutil.rmtree(folder)
    beside.rename(folder)
    return folder


def best_weights(folder: Path) -> Path:
    """The folder to use a checkpoint from: its moving average where there is one."""
    return folder / EMA if (folder / EMA).is_dir() else folder


def is_pipeline(folder: Path) -> bool:
    """Whether `DDPMPipeline.from_pretrained` can load this folder."""
    return (folder / "model_index.json").is_file()


def save_weights(folder: Path, model: nn.Module, task: Task, state: State) -> None:
    """A DDPM's weights as a diffusers pipeline, any other model's as model.safetensors, into a folder that exists."""
    unet = _diffusers_unet(model)
    if not isinstance(task, Diffusion) or unet is None:
        write_tensors(folder / MODEL, state, {"type": "model"})
        return
    from diffusers import DDPMPipeline

    with seeded_default_generator(0):  # the constructor draws initial weights
        plain = type(unet).from_config(unet.config)
    plain.load_state_dict({name.removeprefix("unet."): tensor.float() for name, tensor in state.items()})
    DDPMPipeline(plain, task.scheduler()).save_pretrained(folder, safe_serialization=True)


def _diffusers_unet(model: nn.Module) -> Any:
    """The UNet2DModel inside a model of the house, None in any other model."""
    from diffusers import UNet2DModel

    inner = getattr(model, "unet", None)
    return inner if isinstance(inner, UNet2DModel) and len(list(model.children())) == 1 else None


# ------------------------------------------------------------------------------------------------ loading
def load_weights(path: Path, model: nn.Module, task: Task) -> State:
    """Parameters and floating-point buffers for `model`, in its precision, from what is at `path`.

    path: a diffusers pipeline, the `unet` folder of one, a safetensors file with the names of the model's state_dict, or a
    folder with such a file called model.safetensors. Raises FedattackError where schedule, configuration or a tensor does
    not fit, naming both sides.
    """
    path = path.expanduser()
    if problems := weights_problems(path, task):
        raise FedattackError("; ".join(problems))
    folder = _unet_folder(path)
    found = _read_unet(folder, model) if folder is not None else _read_state(path)
    own = {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    found = {name: tensor for name, tensor in found.items() if tensor.is_floating_point() or name in own}
    if wrong := misfits(model, found, own):
        more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
        raise FedattackError(f"weights {str(path)!r} do not fit {type(model).__name__}: {'; '.join(wrong[:3])}{more}")
    return {name: found[name].to(tensor.dtype) for name, tensor in own.items()}


def weights_problems(path: Path, task: Task) -> list[str]:
    """What is wrong with starting weights as far as it shows before they are read; one line a problem."""
    path = path.expanduser()
    kinds = "a diffusers pipeline or U-Net folder, or a safetensors file (model.safetensors)"
    if not path.exists():
        return [must("weights", f"{kinds} that exists", str(path))]
    folder = _unet_folder(path)
    if folder is None:
        fits = path.suffix == ".safetensors" if path.is_file() else (path / MODEL).is_file()
        return [] if fits else [must("weights", kinds, str(path))]
    if not isinstance(task, Diffusion):
        return [must("task of weights that are a diffusers pipeline", "'diffusion'", task.name)]
    schedule = next((p for p in (path / "scheduler", path.parent / "scheduler") if (p / _SCHEDULE).is_file()), None)
    return schedule_problems(schedule, task) if schedule else []


_SCHEDULE = "scheduler_config.json"


def schedule_problems(folder: Path, task: Diffusion) -> list[str]:
    """Whether the scheduler saved in `folder` adds noise as the task does and its model predicts what the task's does."""
    from diffusers import DDPMScheduler

    config = json.loads((folder / _SCHEDULE).read_text())
    names = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "prediction_type")
    more = ("trained_betas", "rescale_betas_zero_snr")  # which the task does not have
    other = DDPMScheduler.from_config({key: config[key] for key in (*names, *more) if key in config})
    same = (
        other.config.prediction_type == task.prediction_type
        and len(other.betas) == task.num_train_timesteps
        and torch.allclose(torch.cumprod(1.0 - other.betas.double(), 0), task.alphas_cumprod, rtol=1e-4, atol=1e-7)
    )
    if same:
        return []
    shown = (*names, *(name for name in more if other.config[name]))
    saved = ", ".join(f"{name} = {other.config[name]!r}" for name in shown)
    ours = ", ".join(f"{name} = {getattr(task, name)!r}" for name in names)
    return [f"schedule of {str(folder)!r} must be that of the task ({ours}), got ({saved})"]


def digest_of(path: Path) -> str:
    """SHA-256 of the weights at `path`, "" where there is nothing: names and contents of its safetensors, else .bin files."""
    path = path.expanduser()
    files = [path] if path.is_file() else sorted(path.rglob("*.safetensors")) or sorted(path.rglob("*.bin"))
    found = hashlib.sha256()
    for file in files:
        stat = file.stat()
        found.update(f"{file.name}\0".encode() + _sha256(file, stat.st_ino, stat.st_size, stat.st_mtime_ns))
    return found.hexdigest() if files else ""


@lru_cache(maxsize=256)
def _sha256(file: Path, *_unchanged: int) -> bytes:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").digest()


def _unet_folder(path: Path) -> Path | None:
    """The folder of a UNet2DModel at or below `path`."""
    for folder in (path, path / "unet"):
        if (file := folder / "config.json").is_file() and "UNet" in json.loads(file.read_text()).get("_class_name", ""):
            return folder
    return None


def _read_unet(folder: Path, model: nn.Module) -> dict[str, Tensor]:
    unet = _diffusers_unet(model)
    if unet is None:
        raise FedattackError(must("model of weights that are a diffusers U-Net", "'unet'", type(model).__name__))
    from diffusers import UNet2DModel

    with seeded_default_generator(0):
        try:
            loaded = UNet2DModel.from_pretrained(
                folder, use_safetensors=True, local_files_only=True, low_cpu_mem_usage=False
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise FedattackError(must(str(folder), "a U-Net that diffusers can load", str(error)[:500])) from error
    state = {f"unet.{name}": tensor for name, tensor in loaded.state_dict().items()}
    if not misfits(model, state, parameter_names(model)):  # the same tensors may still make another function
        differing = [
            f"{key} must be {unet.config[key]!r}, got {value!r}"
            for key, value in loaded.config.items()
            if not key.startswith("_") and key not in _IGNORED and _plain(unet.config.get(key)) != _plain(value)
        ]
        if differing:
            raise FedattackError(f"U-Net {str(folder)!r} is not the configured one: {'; '.join(differing)}")
    return state


def _read_state(path: Path) -> dict[str, Tensor]:
    return read_tensors(path if path.is_file() else path / MODEL)[0]


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


# ------------------------------------------------------------------------------------------------ moving average
class MovingAverage:
    """Exponential moving average of a model's parameters over rounds; buffers are taken as they are.

    diffusers' EMAModel with its default warm-up: after the n-th step the decay is min(decay, n / (9 + n)), and 0 after the
    first, so the random initial weights are forgotten at once.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        from diffusers.training_utils import EMAModel

        self._model = model
        self._average = EMAModel(self._trained(), decay=decay)
        self.state: State = {}

    @property
    def about(self) -> dict[str, Any]:
        """How the average was made so far: its decay, the decay of the last step, the number of steps."""
        average = self._average
        return {
            "decay": average.decay,
            "last_decay": average.cur_decay_value,
            "warmup": "min(decay, n / (9 + n)), 0 at n = 1",
            "steps": average.optimization_step,
        }

    def step(self, state: State) -> None:
        """Take in the weights after one more round."""
        self._load(state)
        self._average.step(self._trained())
        trained = dict(zip(parameter_names(self._model), self._average.shadow_params, strict=True))
        self.state = {name: trained.get(name, tensor).detach().clone() for name, tensor in state.items()}

    def restore(self, state: State, steps: int) -> None:
        """Go on from the average that `state` and `about["steps"]` told of."""
        self._average.shadow_params = [state[name].clone() for name in parameter_names(self._model)]
        self._average.optimization_step = steps
        self._average.cur_decay_value = self._average.get_decay(steps) if steps else None
        self.state = dict(state)

    def _load(self, state: State) -> None:
        self._model.load_state_dict(state, strict=False)

    def _trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self._model.parameters() if parameter.requires_grad]


# ------------------------------------------------------------------------------------------------ samples
@torch.no_grad()
def draw_samples(
    model: nn.Module,
    state: State,
    task: Diffusion,
    image_shape: Sequence[int],
    count: int,
    *,
    steps: int,
    seed: int,
    progress: Progress = silent,
) -> Tensor:
    """`count` images (N,C,H,W) in [0, 1] by deterministic DDIM in `steps` steps, from latents that only `seed` decides.

    Source: Song et al., DDIM, arXiv 2010.02502, as diffusers' DDIMScheduler (η = 0, predicted images clipped to [−1, 1]).
    """
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(
        num_train_timesteps=task.num_train_timesteps,
        trained_betas=task.scheduler().betas.numpy(),  # DDIMScheduler knows fewer schedules by name
        prediction_type=task.prediction_type,
        timestep_spacing="trailing",  # from T − 1 on, where training ends: what it is given is noise there
    )
    scheduler.set_timesteps(steps)
    timesteps = scheduler.timesteps[:steps]  # rounding adds a timestep −1 for some numbers, such as 61 of 1000
    before = model.training
    dtype = next(model.parameters()).dtype
    images = torch.randn((count, *image_shape), generator=derive_generator(seed, "samples")).to(dtype)
    model.eval()
    try:
        predict = bind(model, {name: tensor.to(dtype) for name, tensor in state.items()})
        for number, timestep in enumerate(timesteps):
            output = predict(images, timestep.expand(count))
            images = scheduler.step(output, int(timestep), images).prev_sample
            progress(number + 1, steps, 0.0)
    finally:
        model.train(before)
    return (images.float() / 2 + 0.5).clamp(0, 1)


def image_grid(images: Tensor, gap: int = 1) -> Tensor:
    """Images (N,C,H,W) in rows of about √N as one image (C,·,·), white between them; no pixel is changed."""
    count, channels, height, width = images.shape
    columns = math.ceil(math.sqrt(count))
    rows = -(-count // columns)
    grid = torch.ones(channels, rows * (height + gap) - gap, columns * (width + gap) - gap, dtype=images.dtype)
    for number, image in enumerate(images):
        top, left = number // columns * (height + gap), number % columns * (width + gap)
        grid[:, top : top + height, left : left + width] = image
    return grid


# ------------------------------------------------------------------------------------------------ during training
class Checkpointer:
    """Called after every round: keeps the average, and writes a checkpoint where the settings ask for one."""

    def __init__(
        self,
        settings: "CheckpointSettings",
        folder: FederationFolder,
        model: nn.Module,
        task: Task,
        image_shape: Sequence[int],
        *,
        rounds: int,
        seed: int,
    ) -> None:
        self.settings, self.folder, self.model, self.task = settings, folder, model, task
        self.image_shape, self.rounds, self.seed = image_shape, rounds, seed
        self.average = MovingAverage(model, settings.ema) if settings.ema else None

    def due(self, server_round: int) -> bool:
        """Whether a round leaves a checkpoint; the last one of a classifier only where one was asked for."""
        every = self.settings.every
        if server_round == self.rounds:
            return isinstance(self.task, Diffusion) or bool(every or self.settings.ema)
        return bool(every and server_round and server_round % every == 0)

    def after_round(self, server_round: int, state: State, *, progress: Progress = silent) -> Path | None:
        """Take in the weights after a round; gives the checkpoint's folder if one was written."""
        if self.average is not None and server_round:
            self.average.step(state)
        if not self.due(server_round):
            return None
        average = self.average.state if self.average is not None else None
        about: dict[str, Any] = {"round": server_round, "ema": self.average.about if self.average is not None else None}
        samples = None
        if self.settings.samples and isinstance(self.task, Diffusion):
            log.info("round %d: drawing %d samples", server_round, self.settings.samples)
            shown = state if average is None else average
            count, steps = self.settings.samples, self.settings.sample_steps
            samples = draw_samples(
                self.model, shown, self.task, self.image_shape, count, steps=steps, seed=self.seed, progress=progress
            )
            drawn_from = "model" if average is None else "average"
            about["samples"] = {"count": count, "sampler": "DDIM", "steps": steps, "drawn_from": drawn_from}
            about["samples"] |= {"mean": float(samples.mean()), "std": float(samples.std())}
        return save_checkpoint(
            self.folder.checkpoint(server_round),
            self.model,
            self.task,
            state,
            average=average,
            samples=samples,
            about=about,
        )

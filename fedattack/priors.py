"""Diffusion models as priors: where one comes from, and images drawn from it, differentiable from the latent.

    images = sample(prior, latent)          latent ~ N(0, 1), images in the model's range of about [−1, 1]

A prior is a public model (a diffusers checkpoint) or the model under attack itself, which the server owns anyway.
Sources: Ho et al., DDPM, arXiv 2006.11239; Song et al., DDIM, arXiv 2010.02502, Eq. 12 and 16.
"""

from collections.abc import Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fedattack.errors import FedattackError, MissingDependency, must, one_of
from fedattack.models.unet import twice_differentiable
from fedattack.tasks import Diffusion, Task
from fedattack.types import State, Update

SPACINGS = ("leading", "trailing")

Noises = Sequence[Tensor | None]
"""What a sampler adds after each of its steps, (B,C,H,W) ~ N(0, 1) each; None where it adds nothing."""


@dataclass(frozen=True)
class Prior:
    """A trained diffusion model: what it predicts, the task it was trained on, the images (C,H,W) that it makes.

    The network is a copy of its own, frozen, in eval mode: nothing done with a prior reaches the model it came from.
    source: "sent" for the attacked weights themselves, else the folder or the hub's name.
    """

    network: nn.Module
    task: Diffusion
    image_shape: tuple[int, int, int]
    source: str

    def predict(self, noisy: Tensor, timesteps: Tensor) -> Tensor:
        """The model's output (B,C,H,W) for noisy images (B,C,H,W) in its own range and timesteps (B,)."""
        output: Tensor = self.network(noisy, timesteps)
        return output

    def to(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> "Prior":
        """The prior in another precision, on another device."""
        return replace(self, network=deepcopy(self.network).to(device, dtype))

    def fitting(self, image_shape: tuple[int, int, int] | None) -> "Prior":
        """Itself. Raises FedattackError, naming both sides, where its images are not the victim's."""
        if self.image_shape != image_shape:
            rule = f"of shape {image_shape}"
            raise FedattackError(must(f"images of prior {self.source!r}", rule, self.image_shape))
        return self


class _Output(nn.Module):
    """A diffusers U-Net called as (images, timesteps) -> tensor."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, images: Tensor, timesteps: Tensor) -> Tensor:
        output: Tensor = self.unet(images, timesteps, return_dict=False)[0]
        return output


# ------------------------------------------------------------------------------------------------ where priors come from
def prior_of(update: Update, model: nn.Module, task: Task, image_shape: tuple[int, int, int]) -> Prior:
    """The weights that the server itself sent, as a prior: no external model is needed."""
    if not isinstance(task, Diffusion):
        raise FedattackError(must("the task of a prior", "diffusion", task.name))
    some = next(t for t in update.sent.values() if t.is_floating_point())
    network = deepcopy(model).to(some.device, some.dtype)
    state: State = dict(network.state_dict())
    network.load_state_dict({**state, **{name: t for name, t in update.sent.items() if name in state}})
    return Prior(_frozen(network), task, image_shape, "sent")


def load_prior(spec: str) -> Prior:
    """A prior from a diffusers folder or the hub: a DDPMPipeline, or a UNet2DModel with its scheduler's configuration.

    The folder is what `save_pretrained` writes: model_index.json, unet/ and scheduler/; or config.json with
    scheduler_config.json beside it or in scheduler/, as in `google/ddpm-celebahq-256`. Weights are read from safetensors or,
    where there are none, from a .bin, by torch's own reader of nothing but tensors, which executes nothing.
    Raises MissingDependency where nothing is found, FedattackError where it cannot serve as a prior.
    """
    unet, scheduler = _read(folder_of(spec), spec)
    config = unet.config
    size = config.sample_size
    if size is None:
        raise FedattackError(must(f"sample_size of prior {spec!r}", "a size in pixels", size))
    height, width = (size, size) if isinstance(size, int) else size
    if config.in_channels != config.out_channels:
        rule = f"as many as its in_channels ({config.in_channels})"
        raise FedattackError(must(f"out_channels of prior {spec!r}", rule, config.out_channels))
    network = _Output(twice_differentiable(unet))
    return Prior(_frozen(network), _task_of(scheduler, spec), (config.in_channels, height, width), spec)


def folder_of(spec: str, *, fetch: bool = True) -> Path:
    """Where the files of a prior are: the folder itself, or the hub's snapshot of them.

    fetch: from the hub where they are not in its cache yet. Raises MissingDependency where there are none.
    """
    folder = Path(spec).expanduser()
    if folder.is_dir():
        return folder
    if not on_hub(spec):
        raise MissingDependency(must("prior", "a diffusers folder or a name on the hub (owner/model)", spec))
    try:
        return _fetched(spec) if fetch else _snapshot(spec, fetch=False)
    except Exception as error:
        raise MissingDependency(f"prior {spec!r} is no local folder and cannot be had from the hub: {error}") from error


def on_hub(spec: str) -> bool:
    """Whether it can only be a name on the hub."""
    return spec.count("/") == 1 and "://" not in spec and spec[0] not in "./~" and not Path(spec).is_dir()


def unet_in(folder: Path) -> Path | None:
    """Where in a prior's folder the U-Net's configuration and weights are."""
    return next((path for path in (folder / "unet", folder) if (path / "config.json").is_file()), None)


@cache
def _fetched(name: str) -> Path:
    """One revision for as long as the process lives."""
    return _snapshot(name, fetch=True)


def _snapshot(name: str, *, fetch: bool) -> Path:
    """The hub's folder of one revision, named by its commit, with the files that a prior needs and no others.

    Offline it is what an earlier call fetched. Raises what the hub raises where one of them is to be had under no name.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    commit: str | None = None

    def first_of(*files: str) -> Path:
        for file in files[:-1]:
            with suppress(EntryNotFoundError):
                return Path(hf_hub_download(name, file, revision=commit, local_files_only=not fetch))
        return Path(hf_hub_download(name, files[-1], revision=commit, local_files_only=not fetch))

    config = first_of("unet/config.json", "config.json")
    inside = "unet/" if config.parent.name == "unet" else ""
    folder = config.parent.parent if inside else config.parent
    commit = folder.name
    first_of("scheduler/scheduler_config.json", "scheduler_config.json")
    first_of(*(f"{inside}diffusion_pytorch_model.{kind}" for kind in ("safetensors", "bin")))
    return folder


def _read(folder: Path, spec: str) -> tuple[Any, dict[str, Any]]:
    """The U-Net and its scheduler's configuration in a folder."""
    from diffusers import DDPMScheduler, UNet2DModel

    root = unet_in(folder)
    if root is None:
        raise MissingDependency(must("prior", "a diffusers folder with unet/config.json or config.json", spec))
    holders = [path for path in (folder / "scheduler", folder) if (path / "scheduler_config.json").is_file()]
    if not holders:
        raise FedattackError(f"prior {spec!r} holds no scheduler_config.json: its noise schedule is unknown")
    try:
        unet = UNet2DModel.from_pretrained(root, local_files_only=True, low_cpu_mem_usage=False)
    except Exception as error:
        raise FedattackError(f"prior {spec!r} cannot be read as a UNet2DModel: {error}") from error
    return unet, dict(DDPMScheduler.load_config(holders[0]))


def _task_of(scheduler: dict[str, Any], spec: str) -> Diffusion:
    """The diffusion task of a scheduler's configuration; missing keys have the values of diffusers' DDPMScheduler."""
    if scheduler.get("trained_betas") is not None:
        raise FedattackError(must(f"trained_betas of prior {spec!r}", "none: give a named beta_schedule", "a table"))
    if scheduler.get("rescale_betas_zero_snr"):
        raise FedattackError(must(f"rescale_betas_zero_snr of prior {spec!r}", "off", True))
    predicts = scheduler.get("prediction_type", "epsilon")
    try:
        return Diffusion(
            num_train_timesteps=scheduler.get("num_train_timesteps", 1000),
            beta_start=scheduler.get("beta_start", 1e-4),
            beta_end=scheduler.get("beta_end", 0.02),
            beta_schedule=scheduler.get("beta_schedule", "linear"),
            prediction_type=predicts,
        )
    except (FedattackError, NotImplementedError) as error:
        raise FedattackError(f"the schedule of prior {spec!r} is not supported: {error}") from error


def _frozen(network: nn.Module) -> nn.Module:
    return network.eval().requires_grad_(False)


# ------------------------------------------------------------------------------------------------ sampling
def sampling_timesteps(task: Diffusion, steps: int, spacing: str = "trailing") -> list[int]:
    """The timesteps that a sampler of `steps` steps visits, from noise to image; diffusers' "leading" or "trailing"."""
    total = task.num_train_timesteps
    if spacing not in SPACINGS:
        raise FedattackError(one_of("spacing", SPACINGS, spacing))
    if not 1 <= steps <= total:
        raise FedattackError(must("sampling steps", f"between 1 and the {total} of the training", steps))
    if spacing == "leading":
        return [step * (total // steps) for step in reversed(range(steps))]
    return [round(total - step * total / steps) - 1 for step in range(steps)]


def draw_noises(
    task: Diffusion, like: Tensor, generator: torch.Generator, *, steps: int, eta: float, spacing: str = "trailing"
) -> list[Tensor | None]:
    """Noise for every step of `sample` but the last, drawn once: `sample` is then a function of the latent alone."""
    times = sampling_timesteps(task, steps, spacing)
    if eta == 0:
        return [None] * steps
    drawn = [torch.randn(like.shape, generator=generator, dtype=like.dtype).to(like.device) for _ in times[1:]]
    return [*drawn, None]


def sample(
    prior: Prior,
    latent: Tensor,
    *,
    steps: int,
    eta: float = 0.0,
    noises: Noises | None = None,
    clip: bool = False,
    spacing: str = "trailing",
    keep: int = 0,
) -> Tensor:
    """Images (B,C,H,W) in the model's range from latents (B,C,H,W) ~ N(0, 1), differentiable in them.

    eta: 0 is DDIM, deterministic; 1 with all T steps is DDPM's own sampler; between them Eq. 16 of DDIM. Above 0 it needs
    `noises` (`draw_noises`). clip: each step's estimate of the clean image is cut to [−1, 1], which passes no gradient where
    it cuts. keep: how many of the last steps keep their activations for the way back; of every other one only its input is
    kept and it is run again (torch's checkpointing), so that 0 needs the memory of a single step.
    """
    times = sampling_timesteps(prior.task, steps, spacing)
    if eta > 0 and noises is None:
        raise FedattackError(must("noises", "given where eta is above zero", noises))
    x = latent
    for number, (now, then) in enumerate(zip(times, [*times[1:], -1], strict=True)):
        noise = noises[number] if noises is not None else None
        if number < steps - keep and torch.is_grad_enabled():
            x = checkpoint(
                ddim_step, prior, x, now, then, eta, noise, clip, use_reentrant=False, preserve_rng_state=False
            )
        else:
            x = ddim_step(prior, x, now, then, eta, noise, clip)
    return x


def step_bytes(prior: Prior, latent: Tensor) -> int:
    """How many bytes one step of `sample` keeps for the way back, its weights aside; measured on a real step."""
    weights = {t.untyped_storage().data_ptr() for t in prior.network.state_dict().values()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        ddim_step(prior, latent.detach().requires_grad_(), prior.task.num_train_timesteps - 1, -1)
    return sum(kept.values())


def ddim_step(
    prior: Prior, x: Tensor, now: int, then: int, eta: float = 0.0, noise: Tensor | None = None, clip: bool = False
) -> Tensor:
    """x at timestep `then` from x at timestep `now` > `then` (−1: the image itself). DDIM, Eq. 12 and 16."""
    a, b = signal_shares(prior.task, now, then)
    clean, drift = denoise(prior, x, now)
    if clip:
        clean = clean.clamp(-1.0, 1.0)
    sigma = step_noise(a, b, eta)
    moved = b**0.5 * clean + max(1 - b - sigma**2, 0.0) ** 0.5 * drift
    following: Tensor = moved if noise is None or sigma == 0 else moved + sigma * noise
    return following


def denoise(prior: Prior, x: Tensor, now: int) -> tuple[Tensor, Tensor]:
    """The model's estimates of the clean images and of the noise in x (B,C,H,W) at timestep `now`."""
    a = float(prior.task.alphas_cumprod[now])
    output = prior.predict(x, torch.full((len(x),), now, device=x.device))
    if prior.task.prediction_type == "epsilon":
        return (x - (1 - a) ** 0.5 * output) / a**0.5, output
    return a**0.5 * x - (1 - a) ** 0.5 * output, a**0.5 * output + (1 - a) ** 0.5 * x


def signal_shares(task: Diffusion, now: int, then: int) -> tuple[float, float]:
    """ᾱ at timesteps `now` and `then` (−1: the image itself, 1)."""
    table = task.alphas_cumprod
    return float(table[now]), float(table[then]) if then >= 0 else 1.0


def step_noise(a: float, b: float, eta: float) -> float:
    """Standard deviation of what a step from ᾱ = a to ᾱ = b adds: DDIM, Eq. 16."""
    return float(eta * ((1 - b) / (1 - a) * (1 - a / b)) ** 0.5)

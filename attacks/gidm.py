"""GIDM: gradient matching through a diffusion model's sampler, then on the pixels; images, noise and timesteps together.

Source: Huang, Hong, Roos, Chen, "GIDM: Gradient Inversion of Federated Diffusion Models", ARES 2025 (arXiv 2405.20380),
Eq. 2, sections 3.3 and 3.4. Generative phase: the latent x' of x = D(x'), D the whole sampler of the trained model.
Fine-tuning phase: the pixels, from there. Triple optimisation: three Adam optimisers at 0.01 for x, t and ε; after every S
iterations of {x, t} come S of {x, t, ε}.
Differs from it: t is read off the update (timesteps = "leak"), because the paper's own search, the argmax of a softmax
(timesteps = "argmax"), passes no gradient: its t stays where it was drawn. D is DDIM with `sampling_steps` steps; the paper's,
a thousand for each of 5,000 iterations, is sampling_steps = 1000, eta = 1.0. The latent starts from N(0, 1), as in
its figures 7 to 9; U(0, 2^p) is U(0, 1) on [0, 1] pixels and is the start where there is no generative phase. Every phase hands
on its iterate with the lowest loss, not its last, and each has optimisers of its own. Losses are relative to the distance
of a zero update, which changes nothing for Adam but its epsilon. Restarts run together. A trained model that is
not the attacked one is used only where the attacker knows one (`Knowledge.prior`); the published code always does, with
ε known up to 1e-4, t fixed, and an untrained network attacked.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from attacks.controls import changed, prior_alone
from attacks.matching import (
    DISTANCES,
    Distance,
    Match,
    Problem,
    check_options,
    objective,
    pose,
    reconstruction,
    silence_cost,
)
from attacks.timestep_sources import SOURCES, check_source, settle_timesteps
from fedattack.errors import FedattackError, must, one_of
from fedattack.priors import Noises, Prior, draw_noises, load_prior, prior_of, sample, step_bytes
from fedattack.tasks import Task
from fedattack.types import Control, Knowledge, Progress, Reconstruction, Update, silent

GUIDANCES = ("matching", "none")

MATCHING = "invg-dm"
"""The peer that matches gradients without a prior: the paper's own baseline."""

Decode = Callable[[Tensor], Tensor]
"""Images (R,B,C,H,W) in [0, 1] from what a phase searches in, differentiable in it."""


@dataclass(frozen=True)
class GIDM:
    """Diffusion clients: latent of a prior's sampler first, pixels after; the attacked weights are the prior if none is known.

    learning_rate: of the latent (in its unit variance) and of pixels in [0, 1]; timestep_learning_rate: of relaxed timesteps,
    in timesteps. interval: S, iterations before the noise starts or stops moving; noise_optimised False leaves it as drawn.
    timesteps: "leak", "relaxed" (real numbers) or "argmax". eta: 0 DDIM, 1 DDPM, its noise drawn once. clip: the sampler cuts
    its estimates of the image to [−1, 1], as diffusers does by default (without it small models sample nothing like images).
    boxed: pixels are projected to [0, 1] in the fine-tuning phase. start: of the pixels where there is no generative phase.
    memory_mib: what the sampler may keep for the way back; steps past it run twice. guidance: "matching", or "none": what the
    sampler makes of the first latent, without a look at the update.
    """

    name: ClassVar[str] = "gidm"
    needs: ClassVar[frozenset[str]] = frozenset({"image_shape", "batch_size"})
    tasks: ClassVar[frozenset[str]] = frozenset({"diffusion"})

    generative_iterations: int = 5000
    fine_tuning_iterations: int = 1500
    learning_rate: float = 0.01
    noise_learning_rate: float = 0.01
    timestep_learning_rate: float = 1.0
    interval: int = 50
    noise_optimised: bool = True
    timesteps: str = "leak"
    distance: str = "l2"
    sampling_steps: int = 20
    eta: float = 0.0
    clip: bool = True
    boxed: bool = False
    start: str = "uniform"
    restarts: int = 1
    memory_mib: float = 1024.0
    guidance: str = "matching"
    precision: str | None = None

    def __post_init__(self) -> None:
        if self.guidance not in GUIDANCES:
            raise FedattackError(one_of("guidance", GUIDANCES, self.guidance))
        check_options(self.distance, self.start, self.generative_iterations + self.fine_tuning_iterations)
        check_source(self.timesteps, (*SOURCES, "argmax"))
        least = {"generative_iterations": 0, "fine_tuning_iterations": 0, "interval": 1, "sampling_steps": 1, "eta": 0}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise FedattackError(must(name, f"at least {value}", getattr(self, name)))

    @property
    def iterations(self) -> tuple[int, int]:
        """Of the generative and of the fine-tuning phase."""
        return (0, 0) if self.guidance == "none" else (self.generative_iterations, self.fine_tuning_iterations)

    def controls(self) -> Sequence[Control]:
        """What the prior makes without the update and of another client's, and matching without a prior, as many iterations."""
        if self.guidance == "none" or not self.generative_iterations:
            return ()
        peer: dict[str, Any] = {"iterations": sum(self.iterations)}
        peer |= changed(self, ("learning_rate", "restarts", "timesteps", "boxed", "precision"))
        if self.timesteps == "argmax":
            peer["timesteps"] = "relaxed"
        return (
            prior_alone(self, ("sampling_steps", "eta", "clip", "precision"), {"guidance": "none"}),
            Control("unrelated-update"),
            Control("peer", MATCHING, peer),
        )

    def reconstruct(
        self,
        update: Update,
        model: nn.Module,
        task: Task,
        knowledge: Knowledge,
        *,
        generator: torch.Generator,
        progress: Progress = silent,
    ) -> Reconstruction:
        begun = perf_counter()
        knowledge, diagnostics = settle_timesteps(update, model, task, knowledge, self.timesteps)
        scale_free = self.distance == "cosine"
        problem = pose(update, model, task, knowledge, precision=self.precision, scale_free=scale_free)
        values = problem.start(self.restarts, generator, self.start)
        if self.timesteps == "argmax" and "timesteps" in values:
            shape = (*values["timesteps"].shape, int(problem.unknown["timesteps"].high) + 1)
            values["timesteps"] = torch.rand(shape, generator=generator, dtype=problem.dtype).to(
                values["images"].device
            )
        phases = Phases(problem, DISTANCES[self.distance], self, progress)
        pixels = values.pop("images")
        losses: list[Tensor] = []
        generative, fine_tuning = self.iterations
        if generative or self.guidance == "none":
            prior = _prior(update, model, task, knowledge, pixels)
            diagnostics["prior_is_sent"] = float(prior.source == "sent")
            latent = torch.randn(pixels.shape, generator=generator, dtype=problem.dtype).to(pixels.device)
            decode = sampler_of(self, prior, latent, generator)
            latent, values, history = phases.search(latent, values, decode, generative, False)
            with torch.no_grad():
                pixels = decode(latent)
            losses.append(history)
            diagnostics["generative_loss"] = float(history[-1].min())
        if fine_tuning:
            pixels, values, history = phases.search(pixels, values, None, fine_tuning, self.boxed)
            losses.append(history)
            diagnostics["fine_tuning_loss"] = float(history[-1].min())
        final = losses[-1][-1]
        best = 0 if self.guidance == "none" else int(final.argmin())
        guess = {"images": pixels, **{name: as_private(name, value) for name, value in values.items()}}
        match = Match(
            guess={name: value[best].detach() for name, value in guess.items()},
            losses=tuple(torch.cat(losses)[:, best].tolist()),
            steps=generative + fine_tuning,
            restart_losses=tuple(final.tolist()),
        )
        found = reconstruction(problem, match, perf_counter() - begun)
        found.diagnostics.update(diagnostics, silence=phases.silence, relative_loss=found.diagnostics["loss"])
        return found


@dataclass(frozen=True)
class Generative(GIDM):
    """GIDM's generative phase alone: what the prior's sampler can express of the update. Parameters as for gidm."""

    name: ClassVar[str] = "generative"
    fine_tuning_iterations: int = 0


# ------------------------------------------------------------------------------------------------ the triple optimisation
class Phases:
    """Adam on what is searched, on relaxed timesteps, and every other interval on the noise: one `search` a phase."""

    def __init__(self, problem: Problem, distance: Distance, options: GIDM, progress: Progress) -> None:
        self.silence = silence_cost(problem, distance)
        self._scale = 1.0 / self.silence if self.silence > 0 else 1.0
        self._losses_of = objective(problem, distance)
        self._timesteps = problem.unknown.get("timesteps")
        self._options = options
        self._progress = progress
        self._done = 0

    def moving(self, iteration: int, unknown: set[str]) -> list[str]:
        """The names among `unknown` (noise, timesteps) that move beside x in an iteration of a phase, counted from 0."""
        with_noise = self._options.noise_optimised and (iteration // self._options.interval) % 2 == 1
        return [name for name in ("timesteps", "noise") if name in unknown and (name != "noise" or with_noise)]

    def search(
        self, x: Tensor, others: dict[str, Tensor], decode: Decode | None, iterations: int, boxed: bool
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """One phase: x (R,…) and the other unknowns at their lowest loss, and losses (iterations + 1, R), that one last."""
        options = self._options
        rates = {"noise": options.noise_learning_rate, "timesteps": options.timestep_learning_rate}
        leaves = {"x": x} | others
        leaves = {name: value.detach().clone().requires_grad_() for name, value in leaves.items()}
        optimizers = {
            name: torch.optim.Adam([leaf], lr=rates.get(name, options.learning_rate)) for name, leaf in leaves.items()
        }
        best = {name: leaf.detach().clone() for name, leaf in leaves.items()}
        lowest = x.new_full((len(x),), float("inf"))
        history: list[Tensor] = []
        for iteration in range(iterations):
            images = decode(leaves["x"]) if decode else leaves["x"]
            at = images.detach().requires_grad_() if decode else leaves["x"]
            names = self.moving(iteration, set(others))
            losses = self._losses(at, {name: leaves[name] for name in others})
            lowest = _keep(losses, lowest, leaves, best)
            wanted = [at, *(leaves[name] for name in names)]
            slopes = torch.autograd.grad(losses.sum(), wanted, allow_unused=True)
            leaves["x"].grad = torch.autograd.grad(images, leaves["x"], slopes[0])[0] if decode else slopes[0]
            for name, slope in zip(names, slopes[1:], strict=True):
                leaves[name].grad = slope
            for name in ("x", *names):
                optimizers[name].step()
            self._box(leaves, boxed)
            history.append(losses.detach())
            self._done += 1
            self._progress(
                self._done, options.generative_iterations + options.fine_tuning_iterations, float(lowest.min())
            )
        with torch.no_grad():
            images = decode(leaves["x"]) if decode else leaves["x"]
            losses = self._losses(images, {name: leaves[name] for name in others})
            history.append(_keep(losses, lowest, leaves, best))
        return best.pop("x"), best, torch.stack(history)

    def _losses(self, images: Tensor, others: dict[str, Tensor]) -> Tensor:
        """Distances (R,) relative to a zero update's."""
        guess = {"images": images, **{name: as_private(name, value) for name, value in others.items()}}
        losses: Tensor = self._scale * self._losses_of(guess)
        return losses

    def _box(self, leaves: dict[str, Tensor], boxed: bool) -> None:
        with torch.no_grad():
            if boxed:
                leaves["x"].clamp_(0.0, 1.0)
            if self._timesteps is not None and leaves["timesteps"].ndim == 2:
                leaves["timesteps"].clamp_(self._timesteps.low, self._timesteps.high)


def as_private(name: str, value: Tensor) -> Tensor:
    """An unknown (R,…) as the task takes it: of timesteps with one more axis, (R,K,T), the argmax of its softmax."""
    return value.softmax(-1).argmax(-1) if name == "timesteps" and value.ndim == 3 else value


def _keep(losses: Tensor, lowest: Tensor, leaves: dict[str, Tensor], best: dict[str, Tensor]) -> Tensor:
    """Copy what has the lowest loss so far into `best`, restart by restart; the lowest losses (R,)."""
    losses = losses.detach()
    better = losses < lowest
    for name, leaf in leaves.items():
        best[name][better] = leaf.detach()[better]
    return torch.where(better, losses, lowest)


# ------------------------------------------------------------------------------------------------ the generative phase
def _prior(update: Update, model: nn.Module, task: Task, knowledge: Knowledge, pixels: Tensor) -> Prior:
    """The prior that the attacker knows, else the attacked weights, in the precision and on the device of `pixels`."""
    shape = (pixels.shape[-3], pixels.shape[-2], pixels.shape[-1])
    prior = load_prior(knowledge.prior) if knowledge.prior else prior_of(update, model, task, shape)
    return prior.fitting(shape).to(pixels.dtype, pixels.device)


def sampler_of(attack: GIDM, prior: Prior, latent: Tensor, generator: torch.Generator) -> Decode:
    """latent (R,B,C,H,W) -> images in [0, 1], with the sampler's own noise drawn once."""
    flat = latent.flatten(0, 1)
    steps = min(attack.sampling_steps, prior.task.num_train_timesteps)
    noises: Noises = draw_noises(prior.task, flat, generator, steps=steps, eta=attack.eta)
    keep = min(steps, int(attack.memory_mib * 2**20 / max(step_bytes(prior, flat), 1)))

    def decode(at: Tensor) -> Tensor:
        images = sample(
            prior, at.flatten(0, 1), steps=steps, eta=attack.eta, noises=noises, clip=attack.clip, keep=keep
        )
        return 0.5 + 0.5 * images.reshape(at.shape)

    return decode

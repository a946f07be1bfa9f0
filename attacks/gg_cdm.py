"""GG-CDM: the reverse chain of a diffusion prior, led by how far the gradient of its clean estimate is from the noisy one.

Source: Meng, Huang, Chen, Hou, Zheng, "Enhanced Privacy Leakage from Noise-Perturbed Gradients via Gradient-Guided Conditional
Diffusion Models", arXiv 2511.10423 (guidance = "spherical", the step of DSG: Yang et al., ICML 2024, arXiv 2402.03201, as its
code has it), and Huang, Meng, Chen, Zheng, Yang, Yi, Wang, arXiv 2411.03053 (guidance = "dps", the step of DPS: Chung et al.,
ICLR 2023, arXiv 2209.14687, Algorithm 1).
Differs from it: neither paper's step could be read in its own words; both are those of the methods that they name. The label
is inferred where it is hidden (the published operator has class 0). Several chains run together and the one whose images match
the update best is kept. Samplers are DDIM with η ≥ 0 (η = 1 with all steps is DDPM with the posterior's variance), and the
noise estimate is taken again from the clipped image, as guided-diffusion does. Distances are relative to that of a zero update,
so that one step_size serves every model. The prior runs in float32.
guidance = "posterior" is our own: no step along the distance's gradient; instead the clean estimate x̂0 of each step is replaced
by the mean of p(x0 | x_t, y) for p(x0 | x_t) = N(x̂0, C_t) and the update's likelihood, linearised (attacks/posterior.py).
Relatives are ΠGDM (Song et al., ICLR 2023) and DiffPIR (Zhu et al., CVPRW 2023); here C_t is no schedule, but how far the
prior's x̂0 is off on public images, cosine by cosine (on its own samples where there are none). The mean of all chains is the
result: it errs less than a single sample of the posterior.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from attacks.coefficients import Cosines, Equations
from attacks.controls import STATISTICAL, changed, snapshot_steps, usual_controls
from attacks.image_statistics import Gaussian
from attacks.labels import infer_labels
from attacks.matching import DISTANCES, Match, Problem, objective, pose, reconstruction, silence_cost
from attacks.most_probable import Search
from attacks.noise import noise_level
from attacks.posterior import Likelihood, linearise
from attacks.starting import first_guess, random_start
from fedattack.errors import FedattackError, NotApplicable, must, one_of
from fedattack.priors import Prior, denoise, load_prior, sample, sampling_timesteps, signal_shares, step_noise
from fedattack.registry import parse_spec
from fedattack.tasks import Task
from fedattack.types import Control, Knowledge, Progress, Reconstruction, Update, silent

GUIDANCES = ("spherical", "dps", "posterior", "none")
MIXINGS = ("constant", "linear")
NOISE = "noise"

SMALLEST = 1e-8
"""Added to norms that are divided by, as in DSG's code."""

OWN_STEPS = 100
"""Of the sampler that makes images where no public ones are known."""

MEASURED = 64
"""Images on which the prior's errors are measured."""

LEAST = 1e-7
"""Of such an error, squared: a thousandth of a level of 255."""


@dataclass(frozen=True)
class GGCDM:
    """Classifiers: a diffusion prior's images whose gradient is the update's; guidance spherical, dps, posterior or none.

    sampling_steps: of the chain, at most the prior's own number; eta: 1 DDPM, below it DDIM with less noise (0 leaves the
    spherical guidance no room). mixing: m_r of the spherical guidance, how much of each step's noise is turned against
    the gradient; mixing_schedule: "constant", or "linear" down to 0 at the end. step_size: ζ of DPS, whose step is
    ζ/distance times the gradient of the squared distance. distance: "l2", "cosine" or "relative-l2". clip: x̂0 is cut to
    [−1, 1]. restarts: chains in one batch. start_from: "noise", or an attack such as "second-order", whose images are noised to
    the share `start_at` of the timesteps (SDEdit). guidance "none" is the prior alone, whose first chain is the result.

    For guidance "posterior": sigma: standard deviation of the noise on every entry of the (pseudo-)gradient; None: what
    the known defense says, else read off the residuals. linearisations: along the chain, first where up to `iterations` trial
    steps lead, the others at the mean of the chains. descent_iterations, smoothing_steps: of the search before those steps, see
    `gaussian-map`; no iterations: none. dense_limit: pixels beyond which conjugate gradients of up to inner_steps
    iterations replace the Jacobian. trust: in the prior, whose measured errors C_t are divided by it. average: the mean of
    the chains is the result, not the one with the least distance; None: for this guidance only.
    """

    name: ClassVar[str] = "gg-cdm"
    needs: ClassVar[frozenset[str]] = frozenset({"image_shape", "batch_size", "num_classes", "prior"})
    tasks: ClassVar[frozenset[str]] = frozenset({"classification"})

    guidance: str = "spherical"
    distance: str = "l2"
    sampling_steps: int = 1000
    eta: float = 1.0
    mixing: float = 0.2
    mixing_schedule: str = "constant"
    step_size: float = 1.0
    clip: bool = True
    restarts: int = 1
    start_from: str = NOISE
    start_at: float = 0.3
    sigma: float | None = None
    linearisations: int = 4
    descent_iterations: int = 100
    smoothing_steps: int = 9
    iterations: int = 24
    inner_steps: int = 100
    dense_limit: int = 4096
    trust: float = 1.0
    average: bool | None = None
    precision: str | None = None

    def __post_init__(self) -> None:
        named = (
            ("guidance", GUIDANCES, self.guidance),
            ("distance", DISTANCES, self.distance),
            ("mixing_schedule", MIXINGS, self.mixing_schedule),
        )
        for what, table, got in named:
            if got not in table:
                raise FedattackError(one_of(what, table, got))
        if self.start_from != NOISE and random_start(self.start_from) == self.start_from:
            raise FedattackError(must("start_from", f"{NOISE!r} or an attack such as 'r-conv'", self.start_from))
        for name in ("sampling_steps", "restarts", "linearisations", "iterations", "inner_steps"):
            if getattr(self, name) < 1:
                raise FedattackError(must(name, "a whole number of at least 1", getattr(self, name)))
        for name in ("descent_iterations", "smoothing_steps"):
            if getattr(self, name) < 0:
                raise FedattackError(must(name, "a whole number of at least 0", getattr(self, name)))
        for name in ("eta", "mixing", "start_at"):
            if not 0 <= getattr(self, name) <= 1:
                raise FedattackError(must(name, "in [0, 1]", getattr(self, name)))
        if not self.trust > 0:
            raise FedattackError(must("trust", "above zero", self.trust))
        for name in ("step_size", "sigma"):
            if (value := getattr(self, name)) is not None and not value >= 0:
                raise FedattackError(must(name, "zero or positive", value))
        if self.guidance == "spherical" and self.eta == 0:
            raise FedattackError(must("eta of the spherical guidance", "above 0, or the guidance vanishes", self.eta))
        if self.guidance == "posterior" and self.distance != "l2":
            raise FedattackError(
                must("distance of the posterior guidance", "'l2', that of Gaussian noise", self.distance)
            )

    @property
    def averages(self) -> bool:
        """Whether the mean of several chains is the result."""
        return self.restarts > 1 and (self.guidance == "posterior" if self.average is None else self.average)

    def controls(self) -> Sequence[Control]:
        """None for guidance "none", which is one. Where chains are averaged, so are those of the prior alone; the attack that
        they start from is a peer, and so is what a Gaussian of public images finds. The posterior's Jacobians are not counted,
        but gradient matching gets its own default at least.
        """
        if self.guidance == "none":
            return ()
        shared = ("sampling_steps", "eta", "clip", "precision")
        alone: dict[str, Any] = {"guidance": "none"}
        if self.averages:
            alone |= {"restarts": self.restarts, "average": True}
        evaluations, jacobians = self.sampling_steps * self.restarts, self.guidance == "posterior"
        made = usual_controls(self, shared=shared, alone=alone, evaluations=evaluations, jacobians=jacobians)
        made.append(Control("peer", STATISTICAL, changed(self, ("sigma", "smoothing_steps", "precision"))))
        if self.start_from != NOISE:
            made.append(Control("peer", *parse_spec(self.start_from)))
        return made

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
        assert knowledge.prior is not None
        prior = load_prior(knowledge.prior).fitting(knowledge.image_shape)
        first = None
        if self.start_from != NOISE:
            first, knowledge = first_guess(self.start_from, update, model, task, knowledge, generator, progress)
        if knowledge.labels is None:
            knowledge = replace(knowledge, labels=infer_labels(update, model, knowledge, generator=generator))
        precision = "float64" if self.precision is None and self.guidance == "posterior" else self.precision
        scale_free = self.distance == "cosine"
        problem = pose(update, model, task, knowledge, precision=precision, scale_free=scale_free)
        chain = Chain(self, problem, prior, generator, progress, first)
        if self.guidance == "posterior":
            known = None if knowledge.defense is None else noise_level(update, knowledge)
            sigma = known if self.sigma is None else self.sigma
            images, diagnostics = by_posterior(chain, Equations.of(problem, update), sigma, knowledge.public_images)
        else:
            images, diagnostics = by_gradient(chain)
        if self.restarts > 1:
            diagnostics["chain_spread_rms"] = float(images.var(0).mean().sqrt())
        snapshots = chain.kept()
        if self.averages:
            images = images.mean(0, keepdim=True)
        images = images.clamp(0.0, 1.0)
        final = chain.distances(images)
        best = 0 if self.guidance == "none" else int(final.nan_to_num(math.inf).argmin())
        history = torch.stack([*chain.history, final])
        match = Match(
            guess={"images": images[best]},
            losses=tuple(history[:, best].tolist()),
            steps=len(chain.history),
            restart_losses=tuple(final.tolist()),
        )
        found = reconstruction(problem, match, perf_counter() - begun)
        found.diagnostics.update(diagnostics, silence=chain.silence, restarts=float(self.restarts))
        trajectory = torch.cat([snapshots[:, best], found.images[None].to(snapshots)])
        return replace(found, trajectory=trajectory, trajectory_steps=(*chain.due, len(chain.times)))


# ------------------------------------------------------------------------------------------------ the chain
class Chain:
    """R reverse chains in one batch: what a step needs, whatever leads it. Images are (R,B,C,H,W), in [−1, 1] inside."""

    def __init__(
        self,
        attack: GGCDM,
        problem: Problem,
        prior: Prior,
        generator: torch.Generator,
        progress: Progress,
        first: Tensor | None,
    ) -> None:
        self.attack, self.problem, self.generator, self._progress = attack, problem, generator, progress
        self.shape = (attack.restarts, *problem.unknown["images"].shape)
        self.device = next(iter(problem.observed.values())).device
        self.prior = prior.to(torch.float32, self.device)
        distance = DISTANCES[attack.distance]
        self.silence = silence_cost(problem, distance)
        self._losses_of = objective(problem, distance)
        self.times = self._times(first is not None)
        self.history: list[Tensor] = []
        self.due = snapshot_steps(len(self.times))
        self._snapshots: list[Tensor] = []
        self.start = self.noise()
        if first is not None:
            a = signal_shares(prior.task, self.times[0], -1)[0]
            self.start = a**0.5 * (2.0 * first.to(self.start) - 1.0) + (1 - a) ** 0.5 * self.start

    def _times(self, late: bool) -> list[int]:
        task = self.prior.task
        times = sampling_timesteps(task, min(self.attack.sampling_steps, task.num_train_timesteps))
        latest = self.attack.start_at * (task.num_train_timesteps - 1)
        return [t for t in times if t <= latest] or times[-1:] if late else times

    def steps(self) -> Iterator[tuple[int, int, int]]:
        """(number, timestep, the next one or −1)."""
        yield from zip(range(len(self.times)), self.times, [*self.times[1:], -1], strict=True)

    def noise(self) -> Tensor:
        """N(0, 1), drawn on the CPU."""
        return torch.randn(self.shape, generator=self.generator).to(self.device)

    def clean(self, x: Tensor, now: int) -> Tensor:
        """x̂0, clipped where the attack clips."""
        found = denoise(self.prior, x.flatten(0, -4), now)[0].reshape(x.shape)
        return found.clamp(-1.0, 1.0) if self.attack.clip else found

    def distances(self, images: Tensor) -> Tensor:
        """(R,) of images (R,…) in [0, 1], relative to a zero update's; L2 as a norm, the cosine as it is."""
        losses: Tensor = self._losses_of({"images": images.clamp(0, 1)})
        return losses.detach() / self.silence if self.attack.distance == "cosine" else self._norms(losses.detach())

    def led(self, clean: Tensor) -> Tensor:
        """`distances` of images in [−1, 1], differentiable."""
        losses: Tensor = self._losses_of({"images": 0.5 + 0.5 * clean.to(self.problem.dtype)})
        return losses / self.silence if self.attack.distance == "cosine" else self._norms(losses)

    def _norms(self, losses: Tensor) -> Tensor:
        return (losses / self.silence + torch.finfo(losses.dtype).tiny).sqrt()

    def told(self, number: int, clean: Tensor, losses: Tensor | None = None) -> None:
        """The clean images (R,…) of a step, in [−1, 1], and their distances (R,) where known; of an average, their mean's."""
        images = 0.5 + 0.5 * clean.detach()
        if self.attack.averages:
            images, losses = images.mean(0, keepdim=True), None
        self.history.append(self.distances(images.to(self.problem.dtype)) if losses is None else losses.detach())
        if number in self.due:
            self._snapshots.append(images.float().clamp(0.0, 1.0))
        self._progress(number + 1, len(self.times), float(self.history[-1].min()))

    def searching(self, done: int, total: int, cost: float) -> None:
        """Something before the first step is at work: the chain stands still."""
        self._progress(0, len(self.times), cost)

    def kept(self) -> Tensor:
        """(S,R,B,C,H,W): the clean images of the steps `due`, in [0, 1]; of an average, their mean (S,1,…)."""
        return torch.stack(self._snapshots)

    def moved(self, x: Tensor, clean: Tensor, now: int, then: int) -> tuple[Tensor, float]:
        """The mean of the next x and the standard deviation of its noise: DDIM, Eq. 12 and 16, ε from the clean images."""
        a, b = signal_shares(self.prior.task, now, then)
        sigma = step_noise(a, b, self.attack.eta)
        epsilon = (x - a**0.5 * clean) / (1 - a) ** 0.5
        mean: Tensor = b**0.5 * clean + max(1 - b - sigma**2, 0.0) ** 0.5 * epsilon
        return mean, sigma


# ------------------------------------------------------------------------------------------------ published guidance
def by_gradient(chain: Chain) -> tuple[Tensor, dict[str, float]]:
    """Images (R,B,C,H,W), about in [0, 1], of chains led by the gradient of the distance, or by nothing."""
    attack, x = chain.attack, chain.start
    if not chain.silence > 0:
        raise NotApplicable("the update is zero: there is nothing to be led by")
    for number, now, then in chain.steps():
        x = x.detach().requires_grad_(attack.guidance != "none")
        with torch.set_grad_enabled(attack.guidance != "none"):
            clean = chain.clean(x, now)
            distance = chain.led(clean)
        mean, sigma = chain.moved(x.detach(), clean.detach(), now, then)
        if attack.guidance == "none":
            x = mean + sigma * chain.noise()
        else:
            slope = torch.autograd.grad(distance.sum(), x)[0]
            if attack.guidance == "dps":  # ζ/‖r‖ · ∇‖r‖² = 2ζ·∇‖r‖
                x = mean + sigma * chain.noise() - 2.0 * attack.step_size * slope
            else:
                left = 1.0 - number / len(chain.times)
                share = attack.mixing * (left if attack.mixing_schedule == "linear" else 1.0)
                x = mean + on_the_sphere(sigma * chain.noise(), slope, sigma, share)
        chain.told(number, clean, distance)
    return 0.5 + 0.5 * x.detach().to(chain.problem.dtype), {}


def on_the_sphere(drawn: Tensor, slope: Tensor, sigma: float, share: float) -> Tensor:
    """DSG's step: the sampled noise turned by `share` against the slope, both of length σ√n; image by image (…,C,H,W)."""
    radius: float = sigma * math.prod(drawn.shape[-3:]) ** 0.5
    best = -radius * slope / (_norm(slope) + torch.finfo(slope.dtype).tiny)
    mixed = drawn + share * (best - drawn)
    turned: Tensor = radius * mixed / (_norm(mixed) + SMALLEST)
    return turned


def _norm(images: Tensor) -> Tensor:
    found: Tensor = images.flatten(-3).norm(dim=-1)[..., None, None, None]
    return found


# ------------------------------------------------------------------------------------------------ the posterior's mean
def by_posterior(
    chain: Chain, equations: Equations, sigma: float | None, public: Tensor | None
) -> tuple[Tensor, dict[str, float]]:
    """Images (R,B,C,H,W), about in [0, 1], of chains led by the posterior's mean; and what is known about the noise."""
    attack, basis = chain.attack, equations.basis
    total = len(chain.times)
    due = {round(i * (total - 1) / max(attack.linearisations - 1, 1)) for i in range(attack.linearisations)}
    variances = errors(chain, public, basis) / attack.trust
    x, likelihood, trials = chain.start, None, 0
    means = torch.zeros(0)
    for number, now, then in chain.steps():
        with torch.no_grad():
            guess = chain.clean(x, now).to(chain.problem.dtype)
        anchors, spread = basis.forward(guess).flatten(1), variances[number].repeat(chain.shape[1])
        if number in due or likelihood is None:
            likelihood = _renewed(chain, equations, likelihood, anchors.mean(0), means, spread, sigma)
            trials += likelihood.trials
        means = likelihood.mean(anchors, spread)
        clean = basis.back(means.reshape(x.shape))
        clean = clean.clamp(-1.0, 1.0) if attack.clip else clean
        mean, noise = chain.moved(x, clean.to(x.dtype), now, then)
        x = mean + noise * chain.noise()
        chain.told(number, clean)
    assert likelihood is not None
    images = 0.5 + 0.5 * basis.back(means.reshape(x.shape))
    diagnostics = {"noise_std": likelihood.sigma, "trials": float(trials)}
    if sigma is not None:  # noise that is read off the residuals always explains them
        diagnostics["chi_square"] = likelihood.misfit / (likelihood.sigma**2 * len(equations.observed))
    return images, diagnostics


@torch.no_grad()
def errors(chain: Chain, public: Tensor | None, basis: Cosines) -> Tensor:
    """(steps, C·H·W) mean squares of x̂0 − x0 at every timestep of the chain, coefficient by coefficient, images in [−1, 1].

    public (N,C,H,W) in [0, 1]; None: of images that the prior itself makes.
    """
    prior, shape = chain.prior, chain.shape[2:]
    if public is None or not len(public):
        latent = torch.randn((MEASURED, *shape), generator=chain.generator).to(chain.device)
        steps = min(OWN_STEPS, prior.task.num_train_timesteps)
        images = sample(prior, latent, steps=steps, clip=True).clamp(-1.0, 1.0)
    else:
        images = 2.0 * public[:MEASURED].to(chain.device, torch.float32) - 1.0
    rows = []
    for now in chain.times:
        a = signal_shares(prior.task, now, -1)[0]
        noise = torch.randn(images.shape, generator=chain.generator).to(chain.device)
        off = chain.clean(a**0.5 * images + (1 - a) ** 0.5 * noise, now) - images
        rows.append(basis.forward(off.to(chain.problem.dtype)).square().mean(0).reshape(-1))
        chain.searching(len(rows), len(chain.times), math.inf)
    return torch.stack(rows).clamp_min(LEAST)


def _renewed(
    chain: Chain,
    equations: Equations,
    before: Likelihood | None,
    anchor: Tensor,
    means: Tensor,
    variances: Tensor,
    sigma: float | None,
) -> Likelihood:
    attack, descent = chain.attack, None
    if before is None and attack.descent_iterations:
        prior = Gaussian.diagonal(*(vector.reshape(chain.shape[1], -1) for vector in (anchor, variances.sqrt())))
        descent = Search.of(
            equations,
            prior,
            sigma=sigma,
            iterations=attack.descent_iterations,
            smoothing_steps=attack.smoothing_steps,
            generator=chain.generator,
            progress=chain.searching,
        )
    return linearise(
        equations,
        anchor if before is None else means.mean(0),
        anchor,
        variances,
        sigma=sigma,
        before=before,
        descent=descent,
        told=lambda trial, cost: chain.searching(trial, attack.iterations, cost),
        iterations=attack.iterations if before is None else 0,
        inner=attack.inner_steps,
        dense_limit=attack.dense_limit,
    )

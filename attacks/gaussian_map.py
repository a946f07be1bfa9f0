"""Maximum a posteriori under Gaussian noise and a Gaussian prior: what means and covariances of public images give, no network.

    argmin over images u  ‖y − A(u)‖²/σ²  +  (u − µ)ᵀ·C⁻¹·(u − µ)

y: the update, σ: its noise, A: the simulated client; µ, C: of public images (attacks/image_statistics.py). It is what any
attack with a learned prior has to beat.
Source: Tarantola, Inverse Problem Theory, SIAM 2005, section 3.2, for the estimator.
Differs from it: the clients' updates are ours, and so is the way through activations (attacks/most_probable.py).
"""

import math
from dataclasses import dataclass, replace
from time import perf_counter
from typing import ClassVar

import torch
from torch import nn

from attacks.coefficients import Equations
from attacks.image_statistics import Gaussian
from attacks.labels import infer_labels
from attacks.matching import DTYPES, pose
from attacks.most_probable import NUDGE, End, Search
from attacks.noise import noise_level
from fedattack.errors import FedattackError, must, one_of
from fedattack.tasks import Task
from fedattack.types import Knowledge, Progress, Reconstruction, Update, silent

FINEST = 3e-5
"""Of the update's rms: noise that nobody told of is not taken for less, or a clean update would be fitted for many minutes,
down to rounding, which second-order does faster."""


@dataclass(frozen=True)
class GaussianMAP:
    """Classifiers: the most probable images under the noise and a Gaussian of public ones; no network, no training.

    sigma: standard deviation of the noise on every entry of the (pseudo-)gradient; None: what the known defense says, else
    read off the residuals. Where no noise is told of, it is not taken for less than 3e-5 of the update's rms: second-order,
    with this as its start, fits clean updates to their rounding sooner. iterations: outer steps of L-BFGS (up to 20 steps
    each), at most, for each model and noise level. smoothing_steps: smoothed copies of a model whose modules include ReLUs,
    GELUs or SiLUs; 0: none. restarts: starts, the prior's mean first, then draws from it, until one explains the update down to
    its noise; where that is unknown all of them are made, and the one that needs the least noise is taken. Where known noise is
    as loud as the update, two ways lead from each start, and the end with the larger evidence is taken (Laplace).
    """

    name: ClassVar[str] = "gaussian-map"
    needs: ClassVar[frozenset[str]] = frozenset({"image_shape", "batch_size"})
    tasks: ClassVar[frozenset[str]] = frozenset({"classification"})

    sigma: float | None = None
    iterations: int = 100
    smoothing_steps: int = 9
    restarts: int = 1
    precision: str = "float64"

    def __post_init__(self) -> None:
        for name, least in (("iterations", 1), ("smoothing_steps", 0), ("restarts", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise FedattackError(must(name, f"a whole number of at least {least}", value))
        if self.sigma is not None and not self.sigma >= 0:
            raise FedattackError(must("sigma", "zero or positive", self.sigma))
        if self.precision not in DTYPES:
            raise FedattackError(one_of("precision", DTYPES, self.precision))

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
        if knowledge.labels is None:
            knowledge = replace(knowledge, labels=infer_labels(update, model, knowledge, generator=generator))
        problem = pose(update, model, task, knowledge, precision=self.precision)
        equations = Equations.of(problem, update)
        known = None if knowledge.defense is None else noise_level(update, knowledge)
        if self.sigma is None and not known:
            finest = FINEST * float(equations.observed.square().mean().sqrt())
            equations = replace(equations, rounding=max(equations.rounding, finest))
        shape = problem.unknown["images"].shape
        prior = Gaussian.of((shape[1], shape[2], shape[3]), equations.basis, knowledge.public_images)
        sigma = known if self.sigma is None else self.sigma
        search = Search.of(
            equations,
            prior,
            sigma=sigma,
            iterations=self.iterations,
            smoothing_steps=self.smoothing_steps,
            generator=generator,
            progress=progress,
            runs=self.restarts,
        )
        ends: list[End] = []
        while len(ends) < self.restarts and not (ends and ends[-1].explained):
            drawn = torch.randn(shape[0], math.prod(shape[1:]), generator=generator, dtype=torch.float64)
            size = 1.0 if ends else (NUDGE if shape[0] > 1 else 0.0)
            ends.append(search.run(size * drawn.to(equations.observed)))
        best = min(ends, key=lambda end: end.rank)
        images = 0.5 + 0.5 * equations.basis.back(prior.coefficients(best.w).reshape(shape))
        found = problem.estimate({"images": images})
        return Reconstruction(
            images=found["images"].clamp(0.0, 1.0).float(),
            labels=found.get("labels"),
            losses=tuple(best.costs),
            steps=sum(len(end.costs) - 1 for end in ends),
            seconds=perf_counter() - begun,
            diagnostics={
                "noise_std": best.sigma,
                **({} if sigma is None else {"chi_square": best.chi_square}),
                "starts": float(len(ends)),
                "diagonal_share": prior.share,
            },
        )

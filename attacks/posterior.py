"""What a noisy update says about the images, as a Gaussian that can be multiplied with another: its likelihood, linearised.

    −2·log p(y | z)  ≈  ‖y − A(z₀) − J·(z − z₀)‖²/σ²         z: images in [−1, 1] as one vector, A: their simulated update
    mean of z under it and N(z; anchor, r²·I):  (JᵀJ/σ² + I/r²)·z = Jᵀ(y − A(z₀) + J·z₀)/σ² + anchor/r²

Every direction of the images is weighted by what the noise leaves of it: the update decides where its information JᵀJ/σ²
exceeds the anchor's 1/r², the anchor decides elsewhere. J is formed whole and JᵀJ decomposed once, so that the mean costs
two small products for any anchor and r; or conjugate gradients on products with J, for large images and models.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from attacks.least_squares import Dense, MatrixFree, Point, conjugate_gradients, levenberg_marquardt
from attacks.matching import Problem
from fedattack.errors import NotApplicable
from fedattack.jacobians import Linearised, jacobian_transposed
from fedattack.types import State

JACOBIAN = 1 << 27
"""How many numbers a whole Jacobian may hold."""

ENTRIES = 1 << 24
"""How many numbers one chunk of its rows may hold."""

ROUNDING = 4.0
"""Least noise, in units in the last place of the update's own rms."""

GUESSES = 3
"""Times that an unknown noise level is read off the residuals at the first linearisation, once at each later one."""


@dataclass(frozen=True)
class Equations:
    """A(z) for one update: `of(z, transformable)` flattens the simulated update of images z, a vector in [−1, 1]."""

    problem: Problem
    observed: Tensor
    rounding: float

    @staticmethod
    def of_problem(problem: Problem, sent: torch.dtype) -> "Equations":
        """`sent`: the precision in which the update came, whose rounding is noise. Raises NotApplicable for silence."""
        observed = _flat(problem.observed, list(problem.observed))
        rms = float(observed.square().mean().sqrt())
        if not 0.0 < rms < math.inf:
            raise NotApplicable("the update is zero or not finite: there is nothing to solve for")
        return Equations(problem, observed, ROUNDING * torch.finfo(sent).eps * rms)

    def simulated(self, z: Tensor, transformable: bool = True) -> Tensor:
        images = (0.5 + 0.5 * z).reshape(self.problem.unknown["images"].shape)
        state = self.problem.simulated({"images": images}, transformable=transformable)
        return _flat(state, list(self.problem.observed))


def _flat(state: State, names: list[str]) -> Tensor:
    return torch.cat([state[name].reshape(-1) for name in names])


@dataclass(frozen=True)
class Likelihood:
    """The update's likelihood around one point. mean(anchors, r2): posterior means (R,n) for anchors (R,n) and variance r2.

    point: where it is linearised; sigma: the noise it assumes; misfit: ‖y − A(point)‖²; trials: of the search for the point.
    """

    point: Tensor
    sigma: float
    misfit: float
    trials: int
    mean: Callable[[Tensor, float], Tensor]


def linearise(
    equations: Equations,
    start: Tensor,
    anchor: Tensor,
    r2: float,
    *,
    sigma: float | None,
    assumed: float | None,
    iterations: int,
    inner: int,
    dense_limit: int,
) -> Likelihood:
    """The likelihood around the maximum a posteriori under N(anchor, r2·I), searched from `start` in so many trial steps.

    start, anchor (n,). sigma: of the noise, None where it must be read off the residuals, `assumed` then being the last
    such reading (None: the first).
    """
    count, unknowns = len(equations.observed), len(start)
    dense = unknowns <= dense_limit and unknowns * count <= JACOBIAN
    chunk = max(1, min(64, ENTRIES // count))
    rms = float(equations.observed.square().mean().sqrt())
    level = sigma if sigma is not None else (assumed or rms)
    level = max(level, equations.rounding)
    point, trials = start, 0
    spread = math.sqrt(r2)

    def stacked(z: Tensor) -> Tensor:
        off = equations.simulated(z, transformable=dense) - equations.observed
        return torch.cat([off / level, (z - anchor) / spread])

    def at(z: Tensor) -> Point:
        return Dense.at(stacked, z, chunk) if dense else MatrixFree.at(stacked, z, inner)

    for _ in range(1 if sigma is not None or assumed is not None else GUESSES):
        found = levenberg_marquardt(at, point, iterations=iterations, tolerance=0.0)
        point, trials = found.x, trials + len(found.costs) - 1
        with torch.no_grad():
            misfit = float((equations.simulated(point) - equations.observed).square().sum())
        if sigma is None:
            free = max(count - unknowns, count // 4, 1)
            level = max(math.sqrt(misfit / free), equations.rounding)
    product = _dense if dense else _free
    return Likelihood(point, level, misfit, trials, product(equations, point, level, chunk if dense else inner))


def _dense(equations: Equations, point: Tensor, sigma: float, chunk: int) -> Callable[[Tensor, float], Tensor]:
    with torch.no_grad():
        left = equations.observed - equations.simulated(point)
        transposed = jacobian_transposed(equations.simulated, point, chunk)
        if not bool(transposed.isfinite().all()):
            raise NotApplicable("the update's derivative is not finite")
        values, vectors = torch.linalg.eigh(transposed @ transposed.T)
        values = values.clamp_min(0.0) / sigma**2
        told = vectors.T @ (transposed @ left) / sigma**2 + values * (vectors.T @ point)

    def mean(anchors: Tensor, r2: float) -> Tensor:
        found: Tensor = ((told + (anchors @ vectors) / r2) / (values + 1.0 / r2)) @ vectors.T
        return found

    return mean


def _free(equations: Equations, point: Tensor, sigma: float, inner: int) -> Callable[[Tensor, float], Tensor]:
    local = Linearised.at(lambda z: equations.simulated(z, transformable=False), point)
    left = equations.observed - local.value

    def mean(anchors: Tensor, r2: float) -> Tensor:
        spread = math.sqrt(r2)

        def times(z: Tensor) -> Tensor:
            return torch.cat([local.times(z) / sigma, z / spread])

        def back(vector: Tensor) -> Tensor:
            return local.back(vector[: len(left)]) / sigma + vector[len(left) :] / spread

        solved = []
        for anchor in anchors:
            residual = torch.cat([(local.times(anchor - point) - left) / sigma, torch.zeros_like(anchor)])
            solved.append(anchor + conjugate_gradients(times, back, residual, inner, 1e-4)[0])
        return torch.stack(solved)

    return mean

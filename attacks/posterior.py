"""What a noisy update says about the images, as a Gaussian that can be multiplied with another: its likelihood, linearised.

    −2·log p(y | u)  ≈  ‖y − A(u₀) − J·(u − u₀)‖²/σ²         u: coefficients of the images, A: their simulated update
    mean of u under it and N(anchor, diag(c)):  (JᵀJ/σ² + diag(1/c))·u = Jᵀ(y − A(u₀) + J·u₀)/σ² + anchor/c

Every direction of the images is weighted by what the noise leaves of it: the update decides where its information JᵀJ/σ²
exceeds the anchor's 1/c, the anchor decides elsewhere. u are coefficients of cosines over the picture and of brightness and
two colour differences, in which the errors of a guess at natural images are nearly uncorrelated, and very unequal: c is
large for the coarse and small for the fine. J is formed whole, or conjugate gradients use products with it.
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
"""Times that an unknown noise level is read off the residuals at the first linearisation; once at each later one."""

SIGNIFICANT = 1.0
"""What a step must promise in units of the noise, or the search for the point of linearisation ends."""

CONVERGED = 1e-4
"""How exactly conjugate gradients solve."""


# ------------------------------------------------------------------------------------------------ coefficients
@dataclass(frozen=True)
class Cosines:
    """Orthonormal: images (…,C,H,W) to coefficients of the same shape and back; DCT-II of both sides, and of the channels."""

    channels: Tensor
    rows: Tensor
    columns: Tensor

    @staticmethod
    def of(shape: tuple[int, int, int], like: Tensor) -> "Cosines":
        return Cosines(*(dct(size).to(like) for size in shape))

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = torch.einsum("ij,...jkl->...ikl", self.channels, self.rows @ images @ self.columns.T)
        return found

    def back(self, coefficients: Tensor) -> Tensor:
        found: Tensor = torch.einsum("ji,...jkl->...ikl", self.channels, self.rows.T @ coefficients @ self.columns)
        return found


def dct(size: int) -> Tensor:
    """The orthonormal DCT-II, (size, size) float64; of three channels: brightness, red − blue, green − magenta."""
    k, n = torch.arange(size, dtype=torch.float64)[:, None], torch.arange(size, dtype=torch.float64)
    matrix = (math.pi / size * (n + 0.5) * k).cos() * math.sqrt(2.0 / size)
    matrix[0] /= math.sqrt(2.0)
    return matrix


# ------------------------------------------------------------------------------------------------ the update
@dataclass(frozen=True)
class Equations:
    """A(u) = y + noise for one update, u the coefficients of its images (B,C,H,W), in [−1, 1], as one vector."""

    problem: Problem
    basis: Cosines
    observed: Tensor
    rounding: float

    @staticmethod
    def of(problem: Problem, sent: torch.dtype) -> "Equations":
        """`sent`: the precision in which the update came, whose rounding is noise. Raises NotApplicable for silence."""
        observed = _flat(problem.observed, list(problem.observed))
        rms = float(observed.square().mean().sqrt())
        if not 0.0 < rms < math.inf:
            raise NotApplicable("the update is zero or not finite: there is nothing to solve for")
        channels, height, width = problem.unknown["images"].shape[1:]
        basis = Cosines.of((channels, height, width), observed)
        return Equations(problem, basis, observed, ROUNDING * torch.finfo(sent).eps * rms)

    def simulated(self, u: Tensor, transformable: bool = True) -> Tensor:
        images = 0.5 + 0.5 * self.basis.back(u.reshape(self.problem.unknown["images"].shape))
        state = self.problem.simulated({"images": images}, transformable=transformable)
        return _flat(state, list(self.problem.observed))


def _flat(state: State, names: list[str]) -> Tensor:
    return torch.cat([state[name].reshape(-1) for name in names])


@dataclass(frozen=True)
class Likelihood:
    """The update's likelihood around one point. mean(anchors, c): posterior means (R,n) for anchors (R,n), variances c (n,).

    point: where it is linearised; sigma: the noise it assumes; misfit: ‖y − A(point)‖²; trials: of the search for the point.
    """

    point: Tensor
    sigma: float
    misfit: float
    trials: int
    mean: Callable[[Tensor, Tensor], Tensor]


def linearise(
    equations: Equations,
    start: Tensor,
    anchor: Tensor,
    variances: Tensor,
    *,
    sigma: float | None,
    assumed: float | None,
    iterations: int,
    inner: int,
    dense_limit: int,
) -> Likelihood:
    """The likelihood around the maximum a posteriori under N(anchor, diag(variances)), searched from `start`.

    start, anchor, variances (n,). iterations: trial steps, 0 to stay at `start`. sigma: of the noise, None where it must be
    read off the residuals, `assumed` then being the last such reading (None: the first).
    """
    count, unknowns = len(equations.observed), len(start)
    dense = unknowns <= dense_limit and unknowns * count <= JACOBIAN
    chunk = max(1, min(64, ENTRIES // count))
    rms = float(equations.observed.square().mean().sqrt())
    level = max(sigma if sigma is not None else (assumed or rms), equations.rounding)
    point, trials, misfit = start, 0, math.inf
    spread = variances.sqrt()

    def stacked(w: Tensor) -> Tensor:
        off = equations.simulated(anchor + spread * w, transformable=dense) - equations.observed
        return torch.cat([off / level, w])

    def at(w: Tensor) -> Point:
        return Dense.at(stacked, w, chunk) if dense else MatrixFree.at(stacked, w, inner)

    for _ in range(1 if sigma is not None or assumed is not None else GUESSES):
        if iterations:
            begin = (point - anchor) / spread
            found = levenberg_marquardt(at, begin, iterations=iterations, tolerance=0.0, significant=SIGNIFICANT)
            point, trials = anchor + spread * found.x, trials + len(found.costs) - 1
        with torch.no_grad():
            misfit = float((equations.simulated(point) - equations.observed).square().sum())
        if sigma is None:
            free = max(count - unknowns, count // 4, 1)
            level = max(math.sqrt(misfit / free), equations.rounding)
    made = _dense(equations, point, level, chunk) if dense else _free(equations, point, level, inner)
    return Likelihood(point, level, misfit, trials, made)


def _dense(equations: Equations, point: Tensor, sigma: float, chunk: int) -> Callable[[Tensor, Tensor], Tensor]:
    with torch.no_grad():
        left = equations.observed - equations.simulated(point)
        transposed = jacobian_transposed(equations.simulated, point, chunk)
        if not bool(transposed.isfinite().all()):
            raise NotApplicable("the update's derivative is not finite")
        told = transposed @ transposed.T / sigma**2
        right = transposed @ left / sigma**2 + told @ point

    def mean(anchors: Tensor, variances: Tensor) -> Tensor:
        # in units of the anchor's spread, where the smallest eigenvalue is 1
        spread = variances.sqrt()
        matrix = spread[:, None] * told * spread + torch.eye(len(spread)).to(spread)
        wanted = (right - anchors @ told) * spread
        found: Tensor = torch.cholesky_solve(wanted.T, torch.linalg.cholesky(matrix)).T
        return anchors + spread * found

    return mean


def _free(equations: Equations, point: Tensor, sigma: float, inner: int) -> Callable[[Tensor, Tensor], Tensor]:
    local = Linearised.at(lambda u: equations.simulated(u, transformable=False), point)
    left = equations.observed - local.value

    def mean(anchors: Tensor, variances: Tensor) -> Tensor:
        spread = variances.sqrt()

        def times(w: Tensor) -> Tensor:
            return torch.cat([local.times(spread * w) / sigma, w])

        def back(vector: Tensor) -> Tensor:
            return spread * local.back(vector[: len(left)]) / sigma + vector[len(left) :]

        solved = []
        for anchor in anchors:
            residual = torch.cat([(local.times(anchor - point) - left) / sigma, torch.zeros_like(anchor)])
            solved.append(anchor + spread * conjugate_gradients(times, back, residual, inner, CONVERGED)[0])
        return torch.stack(solved)

    return mean

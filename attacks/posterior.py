"""What a noisy update says about the images, as a Gaussian that can be multiplied with another: its likelihood, linearised.

    −2·log p(y | u)  ≈  ‖y − A(u₀) − J·(u − u₀)‖²/σ²         u: coefficients of the images, A: their simulated update
    mean of u under it and N(anchor, diag(c)):  (JᵀJ/σ² + diag(1/c))·u = Jᵀ(y − A(u₀) + J·u₀)/σ² + anchor/c

Every direction of the images is weighted by what the noise leaves of it: the update decides where its information JᵀJ/σ²
exceeds the anchor's 1/c, the anchor decides elsewhere. u are coefficients of cosines (attacks/coefficients.py). J is formed
whole, or conjugate gradients use products with it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attacks.coefficients import Equations
from attacks.conjugate_gradients import conjugate_gradients
from attacks.least_squares import Dense, MatrixFree, Point, levenberg_marquardt
from attacks.most_probable import DOUBT, Search
from fedattack.errors import NotApplicable
from fedattack.jacobians import Linearised, jacobian_transposed

JACOBIAN = 3 << 30
"""How many bytes a whole Jacobian may take; where it is formed for every step of a search, each number counts for six."""

STORED = 4
"""Bytes of a number in a Jacobian that is kept."""

PIECE = 8192
"""Its columns that are multiplied at once, in full precision."""

ENTRIES = 1 << 24
"""How many numbers one chunk of its rows may hold."""

GUESSES = 3
"""Times that an unknown noise level is read off the residuals at the first linearisation; once at each later one."""

SIGNIFICANT = 1.0
"""What a step must promise in units of the noise, or the search for the point of linearisation ends."""

CONVERGED = 1e-4
"""How exactly conjugate gradients solve."""


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
    before: Likelihood | None,
    descent: Search | None,
    iterations: int,
    inner: int,
    dense_limit: int,
    told: Callable[[int, float], None] = lambda trial, cost: None,
) -> Likelihood:
    """The likelihood around the maximum a posteriori under N(anchor, diag(variances)), searched from `start`.

    start, anchor, variances (n,). descent: a search under this prior, far cheaper than the trial steps of Levenberg-Marquardt
    that follow (iterations; none of both: stay at `start`). sigma: of the noise, None where it must be read off the residuals.
    before: the last linearisation, whose noise level is the first guess; it stays where `start` explains the update neither
    better than its point nor down to the noise (where gradients jump, one step away is another world). told(trial, cost) hears
    of every trial.
    """
    count, unknowns = len(equations.observed), len(start)
    dense, whole = (unknowns <= dense_limit and unknowns * count * size <= JACOBIAN for size in (STORED, 6 * STORED))
    chunk = max(1, min(64, ENTRIES // count))
    rms = float(equations.observed.square().mean().sqrt())
    assumed = before.sigma if before is not None else rms
    level = max(sigma if sigma is not None else assumed, equations.rounding)
    point, trials, misfit = start, 0, _misfit(equations, start)
    if before is not None and misfit > max(before.misfit, level**2 * (count + DOUBT * math.sqrt(2.0 * count))):
        return replace(before, trials=0)
    spread = variances.sqrt()

    def stacked(w: Tensor) -> Tensor:
        off = equations.simulated(anchor + spread * w, transformable=whole) - equations.observed
        return torch.cat([off / level, w])

    def at(w: Tensor) -> Point:
        return Dense.at(stacked, w, chunk) if whole else MatrixFree.at(stacked, w, inner)

    if descent is not None:
        end = descent.run(((point - anchor) / spread).reshape(descent.prior.mean.shape))
        point, level = anchor + spread * end.w.reshape(-1), end.sigma
    for _ in range(1 if sigma is not None or before is not None else GUESSES):
        if iterations:
            begin = (point - anchor) / spread
            found = levenberg_marquardt(
                at, begin, iterations=iterations, tolerance=0.0, significant=SIGNIFICANT, told=told
            )
            point, trials = anchor + spread * found.x, trials + len(found.costs) - 1
        misfit = _misfit(equations, point)
        if sigma is None:
            free = max(count - unknowns, count // 4, 1)
            level = max(math.sqrt(misfit / free), equations.rounding)
    made = _dense(equations, point, level, chunk) if dense else _free(equations, point, level, inner)
    return Likelihood(point, level, misfit, trials, made)


@torch.no_grad()
def _misfit(equations: Equations, point: Tensor) -> float:
    found = float((equations.simulated(point) - equations.observed).square().sum())
    return found if math.isfinite(found) else math.inf


def _dense(equations: Equations, point: Tensor, sigma: float, chunk: int) -> Callable[[Tensor, Tensor], Tensor]:
    with torch.no_grad():
        left = (equations.observed - equations.simulated(point)) / sigma
        # kept in float32, whose rounding is that of a slightly different J; what is summed over its entries is not
        transposed = jacobian_transposed(lambda u: (equations.simulated(u) / sigma).float(), point, chunk)
        if not bool(transposed.isfinite().all()):
            raise NotApplicable("the update's derivative is not finite")
        information, right = point.new_zeros(len(point), len(point)), torch.zeros_like(point)
        pieces = (torch.split(tensor, PIECE, dim=-1) for tensor in (transposed, left))
        for rows, some in zip(*pieces, strict=True):
            rows = rows.to(point)
            information, right = information.addmm_(rows, rows.T), right + rows @ some
        right = right + information @ point

    def mean(anchors: Tensor, variances: Tensor) -> Tensor:
        # in units of the anchor's spread, where the smallest eigenvalue is 1
        spread = variances.sqrt()
        matrix = spread[:, None] * information * spread + torch.eye(len(spread)).to(spread)
        wanted = (right - anchors @ information) * spread
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

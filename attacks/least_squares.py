"""Levenberg-Marquardt for small and large non-linear least squares, with unknowns that enter linearly projected out.

    x̂ = argmin over x  ‖ρ(x)‖²

A `Point` is ρ at one x; it can linearise itself, and the `Linear` model solves damped steps. There are four kinds: `Dense`
(Jacobian by vmapped forward mode, normal equations by Cholesky with iterative refinement), `MatrixFree` (conjugate
gradients on products with J and Jᵀ, which a sketch of JᵀJ may precondition), `Recycled` (the same, preconditioned by a
Jacobian that is formed now and then, whole or in blocks), and `Projected` (variable projection: ρ = A(x)·y − b(x) with the
best y for each x).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from attacks.conjugate_gradients import Damped, conjugate_gradients, ritz, squared
from attacks.preconditioners import RANK, Formed, Inverse, Nystrom, plain, solved
from attacks.spectra import SMALL, SURE, Spectrum, column_space, numerical_rank, roots, spectrum_of
from fedattack.jacobians import Function, Linearised, jacobian_transposed

PROJECTION = 1e-3
"""How exactly matrix-free searches solve for the linear unknowns."""

PATIENCE, STALLED = 8, 0.97
"""A search is given up where the last so many trials together have not lowered ‖ρ‖² to this share; those before the first
accepted one, which look for the damping, may be twice as many."""

SETTLED = 1e-6
"""And has ended where the last accepted step was not even expected to lower ‖ρ‖² by this share: the rest is noise."""


class Linear(Protocol):
    """ρ(x + d) ≈ ρ + J·d."""

    @property
    def scale(self) -> float:
        """The size of JᵀJ, in whose units the damping is."""
        ...

    def solve(self, damping: float) -> Tensor | None:
        """argmin ‖ρ + J·d‖² + damping·‖d‖², or None where that is not to be had at this damping."""
        ...

    def predicted(self, step: Tensor) -> float:
        """‖ρ + J·d‖²."""
        ...

    def spectrum(self) -> Spectrum | None:
        """Singular values of J, or None where there are too many."""
        ...


class Point(Protocol):
    @property
    def residual(self) -> Tensor: ...

    def linear(self) -> Linear: ...


# ---------------------------------------------------------------------------------------------------- the search
@dataclass(frozen=True, kw_only=True)
class End:
    """Where a search ended: x, ‖ρ‖² along the way, and why it ended.

    searches: how many there were where this is the best of several; costs are then those of all of them, one after another.
    """

    x: Tensor
    costs: tuple[float, ...]
    reason: str
    searches: int = 1


@dataclass(frozen=True, kw_only=True)
class Solution(End):
    """Where a search by Levenberg-Marquardt ended, with the point there and the linear model of its last step."""

    point: Point
    linear: Linear


def levenberg_marquardt(
    at: Callable[[Tensor], Point],
    start: Tensor,
    *,
    iterations: int,
    tolerance: float,
    significant: float = 0.0,
    damping: float = 1e-3,
    box: tuple[Tensor, Tensor] | None = None,
    told: Callable[[int, float], None] = lambda iteration, cost: None,
) -> Solution:
    """Damped Gauss-Newton steps from `start` until ‖ρ‖² ≤ tolerance, or it stalls, or `iterations` trials are made.

    Source: Levenberg 1944, Marquardt 1963; the damping follows the gain ratio as in Nielsen, IMM-REP-1999-05.
    significant: a step that promises less than this ends the search: where ρ is in units of the noise, 1 says that no more than
    noise is left to gain. damping: of the first step, in units of the largest diagonal entry of JᵀJ. box: every trial is
    clamped into it. `told(iteration, cost)` hears of every trial, accepted or not.
    """
    x, point = start, at(start)
    cost = squared(point.residual)
    linear, costs = point.linear(), [cost]
    mu, factor, reason, first = damping * linear.scale, 2.0, "iterations", 0
    for iteration in range(1, iterations + 1):
        if not (math.isfinite(cost) and math.isfinite(mu) and mu > 0):
            reason = "not finite" if not math.isfinite(cost) else "flat"
            break
        step = linear.solve(mu)
        gain, expected, new, trial, after = -1.0, math.inf, point, x, math.inf
        if step is not None and bool(step.isfinite().all()):
            trial = x + step
            if box is not None:
                trial = trial.clamp(*box)
                step = trial - x
            new = at(trial)
            after = squared(new.residual)
            expected = cost - linear.predicted(step)
            gain = (cost - after) / expected if math.isfinite(after) and expected > 0 else -1.0
            if after < cost and gain <= 0:  # the clamped step was not the model's best, but it is better
                gain = 0.1
        if gain > 0:
            x, point, cost, first = trial, new, after, first or iteration
            mu, factor = mu * max(1.0 / 3.0, 1.0 - (2.0 * gain - 1.0) ** 3), 2.0
            if gain > 0.9:
                mu *= 0.1  # a smooth problem near its end: let the convergence be quadratic
        else:
            mu, factor = mu * factor, 2.0 * factor
        costs.append(cost)
        told(iteration, cost)
        if cost <= tolerance:
            reason = "tolerance"
            break
        if gain > 0 and expected <= max(SETTLED * cost, significant):
            reason = "settled"
            break
        before = PATIENCE if first and iteration - first >= PATIENCE else 2 * PATIENCE
        if len(costs) > before and cost > STALLED * costs[-1 - before]:
            reason = "stalled"
            break
        if gain > 0 and iteration < iterations:
            linear = point.linear()
            mu = max(mu, 1e-18 * linear.scale)
    return Solution(x=x, point=point, linear=linear, costs=tuple(costs), reason=reason)


# ---------------------------------------------------------------------------------------------------- dense
@dataclass(frozen=True)
class DenseLinear:
    """J as its transpose, (unknowns, equations), which is how forward mode writes it."""

    residual: Tensor
    transposed: Tensor
    gram: Tensor
    gradient: Tensor
    linear_rank: int

    @staticmethod
    def of(residual: Tensor, transposed: Tensor, linear_rank: int = 0) -> "DenseLinear":
        gram, gradient = transposed @ transposed.T, transposed @ residual
        return DenseLinear(residual, transposed, gram, gradient, linear_rank)

    @property
    def scale(self) -> float:
        return float(self.gram.diagonal().max())

    def solve(self, damping: float) -> Tensor | None:
        damped = self.gram.clone()
        damped.diagonal().add_(damping)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if int(failed):
            return None
        step = solved(factor, -self.gradient)
        for _ in range(2):  # refinement with J itself: as good as QR, at the cost of products
            error = self.transposed @ (self.residual + step @ self.transposed) + damping * step
            step = step - solved(factor, error)
        return step

    def predicted(self, step: Tensor) -> float:
        return squared(self.residual + step @ self.transposed)

    def spectrum(self) -> Spectrum | None:
        return spectrum_of(self.transposed, self.linear_rank)


@dataclass(frozen=True)
class Dense:
    """ρ at x, with a Jacobian that is formed whole."""

    function: Function
    x: Tensor
    residual: Tensor
    chunk: int

    @staticmethod
    def at(function: Function, x: Tensor, chunk: int) -> "Dense":
        with torch.no_grad():
            return Dense(function, x, function(x), chunk)

    def linear(self) -> DenseLinear:
        return DenseLinear.of(self.residual, jacobian_transposed(self.function, self.x, self.chunk))


# ---------------------------------------------------------------------------------------------------- matrix-free
@dataclass
class MatrixFreeLinear:
    """Products with J and Jᵀ only. solve() is CGLS of `inner` steps at most, stopped at a relative slope of `precision`.

    sketch: preconditions it; it is made (anew) once twice as many steps were taken since the last time as it costs products.
    extremes: estimates of the largest and smallest singular value of J from the search's latest solve that nothing
    preconditioned; the true ones lie outside, by as much as that solve was cut short.
    """

    local: Linearised
    gradient: Tensor
    inner: int
    precision: float
    x: Tensor
    sketch: Nystrom | None = None
    extremes: tuple[float, float] = (0.0, 0.0)

    @property
    def scale(self) -> float:
        norm = float(self.gradient.norm())
        return squared(self.local.times(self.gradient / norm)) if norm > 0 else 0.0

    def solve(self, damping: float) -> Tensor | None:
        step: Tensor | None = None
        inverse: Inverse
        left, sketch = self.inner, self.sketch
        while left > 0:
            most, inverse = left, plain
            if sketch is not None:
                if sketch.place is not self.x and sketch.spent >= 2 * RANK:
                    sketch.form(self.local, self.x)
                if sketch.place is not self.x:
                    most = min(left, 2 * RANK - sketch.spent)
                inverse = sketch.inverse(damping)
            enough = self.precision**2 * float(self.gradient @ inverse(self.gradient))
            found = Damped.of(self.local, self.gradient, damping, most, enough, inverse, step)
            if inverse is plain and step is None:
                self.extremes = ritz(found.lengths, found.ratios, damping)
                if sketch is not None:
                    sketch.extremes = self.extremes
            step, left = found.step, left - max(1, len(found.lengths))
            if sketch is not None:
                sketch.spent += len(found.lengths)
            if found.finished or not found.lengths:
                break
        return step

    def nearly_inverse(self) -> tuple[Inverse | None, float]:
        """About (JᵀJ)⁻¹ here, as far as it is known, and so little damping that it only keeps JᵀJ from being singular."""
        damping = 10 * torch.finfo(self.x.dtype).eps * self.scale
        if self.sketch is not None:
            self.sketch.form(self.local, self.x)
        return (plain if self.sketch is None else self.sketch.inverse(damping)), damping

    def predicted(self, step: Tensor) -> float:
        return squared(self.local.value + self.local.times(step))

    def spectrum(self) -> Spectrum | None:
        return None


@dataclass(frozen=True)
class MatrixFree:
    """ρ at x, written in plain autograd; J is never formed. Each step takes up to `inner` conjugate gradients.

    sketch: of the whole search, preconditions them; None: nothing does.
    """

    function: Function
    x: Tensor
    residual: Tensor
    inner: int
    sketch: Nystrom | None = None

    @staticmethod
    def at(function: Function, x: Tensor, inner: int, sketch: Nystrom | None = None) -> "MatrixFree":
        with torch.no_grad():
            return MatrixFree(function, x, function(x), inner, sketch)

    def linear(self) -> MatrixFreeLinear:
        local = Linearised.at(self.function, self.x)
        # the inner problem is solved more exactly as the outer one converges (Eisenstat and Walker 1996)
        precision = max(min(0.1, float(local.value.norm())), 1e-8, 10 * torch.finfo(self.x.dtype).eps)
        extremes = (0.0, 0.0) if self.sketch is None else self.sketch.extremes
        return MatrixFreeLinear(local, local.back(local.value), self.inner, precision, self.x, self.sketch, extremes)


# ---------------------------------------------------------------------------------------------------- recycled
@dataclass(frozen=True)
class Recycled:
    """ρ at x with every equation; J, of a few random sums of them, is formed at some points only.

    Between these points JᵀJ changes little, and conjugate gradients need a few products with the J of today: Gauss-Newton
    steps for a small share of the price. whole: ρ in plain autograd. sketched: sums of it for forward mode, in float32 too.
    """

    whole: Function
    sketched: Function
    x: Tensor
    residual: Tensor
    chunk: int
    formed: Formed

    @staticmethod
    def at(whole: Function, sketched: Function, x: Tensor, chunk: int, formed: Formed) -> "Recycled":
        with torch.no_grad():
            return Recycled(whole, sketched, x, whole(x), chunk, formed)

    def form(self) -> None:
        self.formed.form(self.sketched, self.x, self.chunk)

    def linear(self) -> "RecycledLinear":
        if not self.formed.grams:
            self.form()
        local = Linearised.at(self.whole, self.x)
        return RecycledLinear(self, local, local.back(local.value), self.formed.scale)


@dataclass(frozen=True)
class RecycledLinear:
    """Steps by preconditioned conjugate gradients; where they take too many, J is formed here first."""

    point: Recycled
    local: Linearised
    gradient: Tensor
    scale: float

    def solve(self, damping: float) -> Tensor | None:
        return self.point.formed.solve(self.local, self.gradient, damping, self.point.x, self.point.form)

    def predicted(self, step: Tensor) -> float:
        return squared(self.local.value + self.local.times(step))

    def nearly_inverse(self) -> tuple[Inverse | None, float]:
        """About (JᵀJ)⁻¹ here, and so little damping that it only keeps JᵀJ from being singular."""
        formed = self.point.formed
        if formed.place is not self.point.x:
            self.point.form()
        return formed.inverse(formed.least), formed.least

    def spectrum(self) -> Spectrum | None:
        return self.spectra()[0] if self.point.formed.whole else None

    def spectra(self) -> list[Spectrum | None]:
        """Of the columns of each group of unknowns; None where they are not finite.

        Of many unknowns from JᵀJ as it is formed in float32 here, if that is enough to tell the rank.
        """
        point, formed = self.point, self.point.formed
        if len(point.x) > SMALL and point.x.dtype == torch.float64:
            if formed.place is not point.x:
                point.form()
            told = [roots(gram) for gram in formed.grams]
            if told and all(bool(values[-1] > SURE * values[0]) for values in told):
                return [Spectrum(values, len(values)) for values in told]
        return [spectrum_of(rows) for rows in formed.jacobians(point.sketched, point.x, point.chunk)]


# ---------------------------------------------------------------------------------------------------- projected
@dataclass(frozen=True)
class Projected:
    """ρ(x, y) = A(x)·y − b(x) with y = A(x)⁺·b(x), so that x alone is left to search for.

    Source: Golub and Pereyra 1973; the Jacobian is Kaufman's (BIT 15, 1975): ∂ρ/∂x at fixed y, projected off the range
    of A. `matrix` gives Aᵀ(x), (linear unknowns, equations); `function(x, y)` is ρ.
    """

    function: Callable[[Tensor, Tensor], Tensor]
    x: Tensor
    basis: Tensor
    linear_unknowns: Tensor
    linear_rank: int
    residual: Tensor
    chunk: int

    @staticmethod
    def at(
        matrix: Callable[[Tensor], Tensor], function: Callable[[Tensor, Tensor], Tensor], x: Tensor, chunk: int
    ) -> "Projected":
        with torch.no_grad():
            transposed = matrix(x)
            wanted = -function(x, x.new_zeros(len(transposed)))
            basis, linear_unknowns, rank = _least_squares(transposed.T, wanted)
            inside = basis @ (basis.T @ wanted)
            return Projected(function, x, basis, linear_unknowns, rank, inside - wanted, chunk)

    def linear(self) -> DenseLinear:
        moved = jacobian_transposed(lambda x: self.function(x, self.linear_unknowns), self.x, self.chunk)
        return DenseLinear.of(self.residual, moved - (moved @ self.basis) @ self.basis.T, self.linear_rank)


@dataclass
class Latest:
    """The linear unknowns found last: where the next search for them starts."""

    y: Tensor


@dataclass(frozen=True)
class ProjectedFree:
    """ρ(x, y) = A(x)·y − b(x) with the best y, found by conjugate gradients: A is never formed.

    `whole` and `sketched` take x and y in one vector, as in `Recycled`; with no `formed` no Jacobian is formed.
    inner: most iterations of one solve for y, and of one step where no Jacobian is formed.
    """

    whole: Function
    sketched: Function
    x: Tensor
    linear_unknowns: Tensor
    residual: Tensor
    chunk: int
    inner: int
    latest: Latest
    formed: Formed | None

    @staticmethod
    def at(
        whole: Function,
        sketched: Function,
        x: Tensor,
        chunk: int,
        inner: int,
        latest: Latest,
        formed: Formed | None,
    ) -> "ProjectedFree":
        known = len(x)
        z = torch.cat([x, latest.y])
        local = Linearised.at(whole, z)

        def times(y: Tensor) -> Tensor:
            return local.times(torch.cat([torch.zeros_like(x), y]))

        def back(vector: Tensor) -> Tensor:
            return local.back(vector)[known:]

        used = formed
        if formed is not None and not formed.grams:
            used = Formed(formed.groups)  # not to be kept: where y is 0, x changes nothing
            used.form(sketched, z, chunk)
        inverse = None if used is None else used.inverse(used.least, known)
        if used is None or inverse is None:
            change, residual = conjugate_gradients(times, back, local.value, inner, PROJECTION)
        else:
            inside = Linearised(local.value, times, back)
            enough = PROJECTION**2 * squared(local.value)
            found = Damped.of(inside, back(local.value), 0.0, inner, enough, inverse)
            used.spent += len(found.lengths)
            change, residual = found.step, local.value + times(found.step)
        return ProjectedFree(whole, sketched, x, latest.y + change, residual, chunk, inner, latest, formed)

    @cached_property
    def both(self) -> Tensor:
        return torch.cat([self.x, self.linear_unknowns])

    def linear(self) -> "ProjectedFreeLinear":
        local = Linearised.at(self.whole, self.both)
        searched = torch.cat([torch.ones_like(self.x), torch.zeros_like(self.linear_unknowns)])
        return ProjectedFreeLinear(self, local, _scale(local, searched), _scale(local, 1.0 - searched))


def _scale(local: Linearised, block: Tensor) -> float:
    """About the largest eigenvalue of JᵀJ on the unknowns where `block` is 1, by two power iterations."""
    vector = block
    for _ in range(2):
        vector = block * local.back(local.times(vector / vector.norm()))
    return float(vector.norm())


@dataclass
class ProjectedFreeLinear:
    """Damped steps in x with y free, both at once. scale, linear_scale: the largest eigenvalues of the two blocks of JᵀJ."""

    point: ProjectedFree
    local: Linearised
    scale: float
    linear_scale: float
    left: float = math.nan

    def solve(self, damping: float) -> Tensor | None:
        known = len(self.point.x)
        step = self._free(damping) if self.point.formed is None else self._preconditioned(damping, self.point.formed)
        if step is None:
            return None
        self.left = squared(self.local.value + self.local.times(step))
        self.point.latest.y = self.point.linear_unknowns + step[known:]
        return step[:known]

    def _preconditioned(self, damping: float, formed: Formed) -> Tensor | None:
        point = self.point

        def form() -> None:
            formed.form(point.sketched, point.both, point.chunk)

        if not formed.grams:
            form()
        dampings = torch.cat([torch.full_like(point.x, damping), torch.full_like(point.linear_unknowns, formed.least)])
        return formed.solve(self.local, self.local.back(self.local.value), dampings, point.both, form)

    def _free(self, damping: float) -> Tensor:
        known, rows = len(self.point.x), len(self.local.value)
        sizes = torch.cat(
            [
                torch.full_like(self.point.x, self.scale**-0.5),
                torch.full_like(self.point.linear_unknowns, self.linear_scale**-0.5),
            ]
        )
        weight = math.sqrt(damping)

        def times(z: Tensor) -> Tensor:
            z = sizes * z
            return torch.cat([self.local.times(z), weight * z[:known]])

        def back(vector: Tensor) -> Tensor:
            product = self.local.back(vector[:rows])
            product[:known] += weight * vector[rows:]
            return sizes * product

        right = torch.cat([self.local.value, torch.zeros_like(self.point.x)])
        precision = max(1e-8, min(PROJECTION, 0.1 * float(self.local.value.norm())))
        return sizes * conjugate_gradients(times, back, right, self.point.inner, precision)[0]

    def predicted(self, step: Tensor) -> float:
        return self.left

    def spectrum(self) -> Spectrum | None:
        """Of J for x with y projected out, formed whole this once; None where no Jacobian is to be formed whole."""
        point = self.point
        if point.formed is None or not point.formed.whole:
            return None
        transposed = jacobian_transposed(point.sketched, point.both, point.chunk)
        if not bool(transposed.isfinite().all()):
            return None
        moved, linear = transposed[: len(point.x)], transposed[len(point.x) :]
        basis, values = column_space(linear.T)
        basis = basis[:, : (rank := numerical_rank(values, max(linear.shape)))]
        return spectrum_of(moved - (moved @ basis) @ basis.T, rank)


def _least_squares(matrix: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor, int]:
    """An orthonormal basis of the range of a tall matrix, the least-norm y of min ‖A·y − b‖, and the numerical rank."""
    if not bool(matrix.isfinite().all()):
        nowhere = torch.full_like(wanted, math.nan)
        return matrix[:, :0], nowhere[: matrix.shape[1]], 0
    q, r = torch.linalg.qr(matrix)
    u, values, vh = torch.linalg.svd(r)
    rank = numerical_rank(values, max(matrix.shape))
    basis = q @ u[:, :rank]
    return basis, vh[:rank].T @ ((basis.T @ wanted) / values[:rank]), rank

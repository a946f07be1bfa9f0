"""Conjugate gradients on least squares, by products with J and Jᵀ; what they tell of singular values."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fedattack.jacobians import Linearised


@dataclass(frozen=True)
class Damped:
    """What conjugate gradients found: argmin ‖ρ + J·d‖² + Σ damping·d², or as near as they came. finished: near enough.

    lengths, ratios: of their steps, by which `ritz` estimates singular values.
    """

    step: Tensor
    finished: bool
    lengths: list[float]
    ratios: list[float]

    @staticmethod
    def of(
        local: Linearised,
        gradient: Tensor,
        damping: float | Tensor,
        most: int,
        enough: float,
        inverse: Callable[[Tensor], Tensor] = lambda vector: vector,
        step: Tensor | None = None,
    ) -> "Damped":
        """CGLS (Hestenes and Stiefel 1952), from `step` or 0, until s·inverse(s) ≤ enough for the slope s that is left.

        inverse: about (JᵀJ + damping)⁻¹; s·inverse(s) then is about what ‖ρ + J·d‖² + Σ damping·d² can still fall by.
        gradient: Jᵀ·ρ.
        """
        if step is None:
            step, left, slope = torch.zeros_like(gradient), -local.value, -gradient
        else:
            left = -local.value - local.times(step)
            slope = local.back(left) - damping * step
        direction = inverse(slope)
        size = float(slope @ direction)
        lengths: list[float] = []
        ratios: list[float] = []
        while enough < size < math.inf and len(lengths) < most:
            image = local.times(direction)
            curvature = squared(image) + float((damping * direction.square()).sum())
            if not 0 < curvature < math.inf:
                break
            length = size / curvature
            step = step + length * direction
            left = left - length * image
            slope = local.back(left) - damping * step
            ahead = inverse(slope)
            before, size = size, float(slope @ ahead)
            direction = ahead + (size / before) * direction
            lengths.append(length)
            ratios.append(size / before)
        return Damped(step, size <= enough, lengths, ratios)


def ritz(lengths: list[float], ratios: list[float], damping: float) -> tuple[float, float]:
    """Extreme singular values of J from conjugate gradients on JᵀJ + damping, which is Lanczos' method in disguise.

    Source: Golub and Van Loan, Matrix Computations, 4th ed., section 11.3: T_kk = 1/α_k + β_{k−1}/α_{k−1},
    T_{k,k+1} = √β_k/α_k.
    """
    if not lengths or not all(map(math.isfinite, (*lengths, *ratios))):
        return 0.0, 0.0
    inverse = 1.0 / torch.tensor(lengths, dtype=torch.float64)
    beta = torch.tensor(ratios[:-1], dtype=torch.float64)
    diagonal = inverse.clone()
    diagonal[1:] += beta * inverse[:-1]
    beside = beta.sqrt() * inverse[:-1]
    values = torch.linalg.eigvalsh(torch.diag(diagonal) + torch.diag(beside, 1) + torch.diag(beside, -1)) - damping
    return float(values[-1].clamp_min(0.0).sqrt()), float(values[0].clamp_min(0.0).sqrt())


def conjugate_gradients(
    times: Callable[[Tensor], Tensor],
    back: Callable[[Tensor], Tensor],
    residual: Tensor,
    most: int,
    precision: float,
) -> tuple[Tensor, Tensor]:
    """(z, residual + J·z) that minimises ‖residual + J·z‖, by CGLS (Hestenes and Stiefel 1952), from z = 0.

    Ends where ‖Jᵀ·r‖ ≤ precision·‖J‖·‖r‖ (the rule of LSQR, Paige and Saunders 1982), or after `most` iterations.
    """
    left = -residual
    slope = back(left)
    z, direction, size, norm = torch.zeros_like(slope), slope, squared(slope), 0.0
    for _ in range(most):
        if size == 0 or not math.isfinite(size):
            break
        image = times(direction)
        length = squared(image)
        norm = max(norm, math.sqrt(length / squared(direction)))
        z = z + (size / length) * direction
        left = left - (size / length) * image
        slope = back(left)
        before, size = size, squared(slope)
        if math.sqrt(size) <= precision * norm * float(left.norm()):
            break
        direction = slope + (size / before) * direction
    return z, -left


def squared(vector: Tensor) -> float:
    """‖v‖²."""
    return float(vector.square().sum())

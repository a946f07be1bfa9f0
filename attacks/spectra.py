"""Singular values and numerical ranks, as exact as a verdict on independence demands."""

from dataclasses import dataclass

import torch
from torch import Tensor

SMALL, SURE, ROOTS = 1024, 1e-4, 1e-5
"""So few unknowns have their singular values by SVD of a Jacobian in full precision. More of them from JᵀJ, where the smallest
is at least this share of the largest: the second of a Jacobian in float32, the last in float64, ten times and more what
rounding does to it; else by SVD all the same, which takes minutes."""


@dataclass(frozen=True)
class Spectrum:
    """Singular values, descending, of a matrix with so many rows or columns, whichever are more.

    linear_rank: of the unknowns that were projected out of it.
    """

    values: Tensor
    size: int
    linear_rank: int = 0

    @property
    def rank(self) -> int:
        return numerical_rank(self.values, self.size)


def spectrum_of(transposed: Tensor, linear_rank: int = 0) -> Spectrum | None:
    """As exact as the rank demands (see SMALL); None where the matrix is not finite."""
    if not bool(transposed.isfinite().all()):
        return None
    size = max(transposed.shape)
    if len(transposed) > SMALL:
        values = roots(transposed.double() @ transposed.double().T)
        if bool(values[-1] > ROOTS * values[0]):
            return Spectrum(values.to(transposed), size, linear_rank)
    return Spectrum(torch.linalg.svdvals(transposed), size, linear_rank)


def roots(gram: Tensor) -> Tensor:
    """Singular values of J, descending, from JᵀJ."""
    values: Tensor = torch.linalg.eigvalsh(gram)
    return values.clamp_min(0.0).sqrt().flip(0)


def numerical_rank(values: Tensor, size: int, precision: float | None = None) -> int:
    """How many singular values stand above the rounding of a matrix with so many rows."""
    if len(values) == 0:
        return 0
    precision = torch.finfo(values.dtype).eps * size if precision is None else precision
    return int((values > precision * values[0]).sum())


def column_space(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Left singular vectors of a tall matrix, and its singular values, descending."""
    q, r = torch.linalg.qr(matrix)
    u, values, _ = torch.linalg.svd(r)
    return q @ u, values

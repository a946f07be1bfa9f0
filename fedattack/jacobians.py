"""Jacobians formed whole, for attacks by least squares and for the error floor: many directions in one vmapped pass."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import jvp, vmap

Function = Callable[[Tensor], Tensor]
"""A vector to a vector, usable under torch.func."""


def jacobian_transposed(
    function: Function, x: Tensor, chunk: int, told: Callable[[int], None] = lambda rows: None
) -> Tensor:
    """(unknowns, equations): row i is ∂function/∂x_i by forward mode, `chunk` rows at a time; told(rows) after each chunk."""

    def column(direction: Tensor) -> Tensor:
        derivative: Tensor = jvp(function, (x,), (direction,))[1]
        return derivative

    return by_rows(column, len(x), chunk, x, told)


def by_rows(
    row: Function, count: int, chunk: int, like: Tensor, told: Callable[[int], None] = lambda rows: None
) -> Tensor:
    """row(e_i) for every unit vector e_i of so many entries, stacked; vmapped over `chunk` of them where the model can."""
    parts: list[Tensor] = []
    with torch.no_grad():
        try:
            for start in range(0, count, chunk):
                parts.append(vmap(row)(_units(start, min(start + chunk, count), count, like)))
                told(min(start + chunk, count))
        except (RuntimeError, ValueError) as reason:
            if "vmap" not in str(reason) and "batch" not in str(reason):
                raise
            parts = []
            for i in range(count):
                parts.append(row(_units(i, i + 1, count, like)[0])[None])
                told(i + 1)
    return torch.cat(parts)


def _units(start: int, stop: int, count: int, like: Tensor) -> Tensor:
    """Rows start … stop of the identity, which is never formed whole."""
    units = torch.zeros(stop - start, count, dtype=like.dtype, device=like.device)
    units[torch.arange(stop - start), torch.arange(start, stop)] = 1.0
    return units

"""Jacobians formed whole, for attacks by least squares and for the error floor: many directions in one vmapped pass."""

from collections.abc import Callable
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Linearised:
    """A function's value at one point, and products with its Jacobian J there, each for the price of a backward pass."""

    value: Tensor
    times: Callable[[Tensor], Tensor]
    back: Callable[[Tensor], Tensor]

    @staticmethod
    def at(function: Function, x: Tensor) -> "Linearised":
        """times(u) = J·u, back(v) = Jᵀ·v. `function` must be written in plain autograd, to third derivatives.

        J·u is the derivative of v ↦ Jᵀ·v, which is linear: its graph is built once (the double-backward trick).
        """
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            value = function(x)
            dummy = torch.zeros_like(value, requires_grad=True)
            (pulled,) = torch.autograd.grad(value, x, dummy, create_graph=True)

        def times(direction: Tensor) -> Tensor:
            return torch.autograd.grad(pulled, dummy, direction, retain_graph=True)[0]

        def back(vector: Tensor) -> Tensor:
            return torch.autograd.grad(value, x, vector, retain_graph=True)[0]

        return Linearised(value.detach(), times, back)

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
    rows: Function = vmap(row)
    with torch.no_grad():
        try:
            first = rows(_units(0, min(chunk, count), count, like))
        except (RuntimeError, ValueError) as reason:
            if "vmap" not in str(reason) and "batch" not in str(reason):
                raise
            rows, chunk = (lambda unit: row(unit[0])[None]), 1
            first = rows(_units(0, 1, count, like))
        found = first.new_empty(count, first.shape[1])  # filled in place: a list of parts would take the memory twice
        found[: len(first)] = first
        told(len(first))
        for start in range(len(first), count, chunk):
            stop = min(start + chunk, count)
            found[start:stop] = rows(_units(start, stop, count, like))
            told(stop)
    return found


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

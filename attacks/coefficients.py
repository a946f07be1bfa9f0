"""Images as coefficients of cosines, and an update as equations in them.

Cosines over the picture (DCT-II), of brightness and two colour differences: there the pixels of natural images, and the errors
of a guess at them, are nearly uncorrelated, and very unequal: large where they are coarse, small where they are fine.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from attacks.matching import Problem
from fedattack.errors import NotApplicable
from fedattack.types import State, Update

ROUNDING = 4.0
"""Least noise, in units in the last place of the update's own rms."""


ROUNDED = 0.25
"""Standard deviation of a number's own rounding, in units in its last place (of numbers between 1 and 2: 1/√12)."""


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


@dataclass(frozen=True)
class Equations:
    """A(u) = y + noise for one update, u the coefficients of its images (B,C,H,W), in [−1, 1], as one vector."""

    problem: Problem
    basis: Cosines
    observed: Tensor
    rounding: float

    @staticmethod
    def of(problem: Problem, update: Update) -> "Equations":
        """Rounding to floats counts as noise: of what was sent, at every local step, and of this computer. (What a secure
        aggregation rounds to is not counted.) Raises NotApplicable for silence.
        """
        observed = _flat(problem.observed, list(problem.observed))
        rms = _rms(observed)
        if not 0.0 < rms < math.inf:
            raise NotApplicable("the update is zero or not finite: there is nothing to solve for")
        channels, height, width = problem.unknown["images"].shape[1:]
        basis = Cosines.of((channels, height, width), observed)
        sent = next((t.dtype for t in update.received.values() if t.is_floating_point()), torch.float32)
        rounding = ROUNDING * max(torch.finfo(dtype).eps for dtype in (sent, problem.dtype)) * rms
        if update.kind == "weights":  # a difference of two that were rounded
            weights = _flat(update.received, list(problem.observed))
            step = ROUNDED * torch.finfo(sent).eps * _rms(weights) / (problem.learning_rate or 1.0)
            rounding = max(rounding, step * math.sqrt(len(problem.steps)))
        return Equations(problem, basis, observed, rounding)

    def simulated(self, u: Tensor, transformable: bool = True) -> Tensor:
        images = 0.5 + 0.5 * self.basis.back(u.reshape(self.problem.unknown["images"].shape))
        state = self.problem.simulated({"images": images}, transformable=transformable)
        return _flat(state, list(self.problem.observed))


def _flat(state: State, names: list[str]) -> Tensor:
    return torch.cat([state[name].reshape(-1) for name in names])


def _rms(vector: Tensor) -> float:
    return float(vector.double().square().mean().sqrt())

"""A client's gradient as equations: one for each weight, scaled layer by layer, and random sums of them.

Source: the sketch is CountSketch, Charikar, Chen, Farach-Colton, ICALP 2002.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attacks.matching import Problem
from fedattack.errors import NotApplicable
from fedattack.types import State, Update


@dataclass(frozen=True)
class Equations:
    """One equation for each observed weight, scaled so that the sum of squares is the relative cost.

    buckets, signs: a sparse random sketch that adds every equation, with a random sign, to one of a few sums; None keeps all.
    """

    weights: State
    wanted: Tensor
    buckets: Tensor | None = None
    signs: Tensor | None = None
    count: int = 0

    @staticmethod
    def of(problem: Problem, update: Update, power: float = 1.0) -> "Equations":
        """Each layer divided by its norm to this power; 1: the cost is the mean over layers of their relative errors.

        Zero layers, and those that are the rounding of zero (the bias of attention's keys), are measured by the largest.
        """
        norms = {name: float(tensor.norm()) for name, tensor in problem.observed.items()}
        largest = max(norms.values())
        if not (0.0 < largest < math.inf):
            raise NotApplicable("the update is zero or not finite: there is nothing to solve for")
        sent = next((t.dtype for t in update.received.values() if t.is_floating_point()), torch.float32)
        floor = 100 * torch.finfo(sent).eps * largest
        scales = {name: (norm if norm > floor else largest) ** power for name, norm in norms.items()}
        total = math.sqrt(sum((norms[name] / scale) ** 2 for name, scale in scales.items()))
        weights = {
            name: torch.full((), 1.0 / (scale * total)).to(problem.observed[name]) for name, scale in scales.items()
        }
        wanted = torch.cat([(weights[name] * tensor).reshape(-1) for name, tensor in problem.observed.items()])
        return Equations(weights, wanted, count=len(wanted))

    def sketched(self, count: int, generator: torch.Generator) -> "Equations":
        """At most `count` equations."""
        total = len(self.wanted)
        if count <= 0 or count >= total:
            return self
        device = self.wanted.device
        buckets = torch.randint(count, (total,), generator=generator).to(device)
        signs = (2.0 * torch.randint(2, (total,), generator=generator) - 1.0).to(self.wanted)
        return replace(self, buckets=buckets, signs=signs, count=count)

    @property
    def whole(self) -> "Equations":
        """Without any sketch."""
        return replace(self, buckets=None, signs=None, count=len(self.wanted))

    def to(self, dtype: torch.dtype) -> "Equations":
        signs = None if self.signs is None else self.signs.to(dtype)
        weights = {name: weight.to(dtype) for name, weight in self.weights.items()}
        return replace(self, weights=weights, wanted=self.wanted.to(dtype), signs=signs)

    def pressed(self, vector: Tensor) -> Tensor:
        if self.buckets is None or self.signs is None:
            return vector
        return vector.new_zeros(self.count).index_add(0, self.buckets, self.signs * vector)

    def left(self, simulated: State) -> Tensor:
        return torch.cat([(weight * simulated[name]).reshape(-1) for name, weight in self.weights.items()])

    def residual(self, simulated: State) -> Tensor:
        return self.pressed(self.left(simulated) - self.wanted)

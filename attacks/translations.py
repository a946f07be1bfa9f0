"""Translated images: the local minima in which searches of convolutional networks get stuck, and the way out of them.

A convolutional network's gradient is a sum over positions, so an image moved by a pixel or two has nearly the same one: only
what lies at the borders, and what strides skip, tells where the image is. A search from afar often settles on the right image
in the wrong place, with a cost far from zero; moved by the right step it lies in the basin of the solution.

Source: our own measurement. Translations are an ambiguity of phase retrieval too, another inverse problem in which positions
are summed over: Fienup, Wackerman, J. Opt. Soc. Am. A 3, 1897 (1986).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Generic, TypeVar

import torch
from torch import Tensor

from attacks.least_squares import End

STRIDES = (1, 2, 4, 8)
"""Pixels by which an image is moved along one axis, as far as they are at most a quarter of it, or 1."""

BLIND, SHORTLIST, NEAR = 10.0, 6, 2.0
"""A model is nearly blind to translations where the cheapest move multiplies the cost by less than the first: a U-Net of three
levels to moves by four pixels. So many moves are then looked at closely, and those are tried that multiply it by less than the
last."""

FAILURES, GAIN = 3, 0.99
"""Given up after so many moved images in a row whose search did not end below this share of the lowest verdict."""

Found = TypeVar("Found", bound=End)

Move = tuple[int, int, int]
"""Which image of a batch, and by how many pixels down and right."""


def moves(shape: Sequence[int]) -> list[Move]:
    """Of one image of a batch of this shape (B,C,H,W), the shortest first: by 1 or 2 pixels along each axis, or one stride."""
    batch, _, height, width = shape
    found = set[tuple[int, int]]()
    for stride in STRIDES:
        found |= set(product(_along(height, stride), _along(width, stride)))
    steps = sorted(found - {(0, 0)}, key=lambda step: (_length((0, *step)), step))
    return [(number, *step) for step in steps for number in range(batch)]


def _along(side: int, stride: int) -> list[int]:
    farthest = max(1, side // 4) if side > 2 else 0
    return [step for step in (range(-2, 3) if stride == 2 else (-stride, 0, stride)) if abs(step) <= farthest]


def moved(images: Tensor, move: Move) -> Tensor:
    """The batch (B,C,H,W) with one image moved, wrapped around."""
    number, down, right = move
    batch = images.clone()
    batch[number] = torch.roll(images[number], (down, right), (-2, -1))
    return batch


@dataclass(frozen=True)
class Translating(Generic[Found]):
    """A search and, where it stalls, more of them from its end with one image of the batch moved.

    search: of one or several blocks of unknowns, each of the batch's shape (B,C,H,W), which move together; it is also told how
    many trials were made before. unknown: these blocks of a solution, flat. verdict: what a solution is judged by, enough
    below `success`. rough_cost, close_cost: ‖ρ‖² at a place, the second better and dearer. most: searches of moved images.
    slack: how many times as much as otherwise a move may cost.
    """

    search: Callable[[Tensor, int], Found]
    unknown: Callable[[Found], Tensor]
    shape: Sequence[int]
    verdict: Callable[[Found], float]
    rough_cost: Callable[[Tensor], float]
    close_cost: Callable[[Tensor], float]
    success: float
    most: int
    slack: float = 1.0

    def search_from(self, start: Tensor) -> Found:
        """The best of all searches; its costs are theirs, one after another."""
        best = self.search(start, 0)
        lowest, trials, searches, failures = self.verdict(best), list(best.costs), 1, 0
        ahead: list[Tensor] = []
        while searches <= self.most and self.success < lowest < math.inf:
            if failures == 0:
                ahead = self._ahead(best) if best.reason in ("stalled", "settled") else []
            if failures == min(len(ahead), FAILURES):
                break
            found = self.search(ahead[failures], len(trials) - 1)
            verdict = self.verdict(found)
            trials, searches = [*trials, *found.costs[1:]], searches + 1
            if verdict < GAIN * lowest:
                best, lowest, failures = found, verdict, 0
            else:
                failures += 1
        return replace(best, costs=tuple(trials), searches=searches)

    def _ahead(self, found: Found) -> list[Tensor]:
        """Places that are worth a search, the most promising first."""
        blocks, here = self.unknown(found).reshape(-1, *self.shape), found.costs[-1]

        places = [torch.stack([moved(block, move) for block in blocks]).reshape(-1) for move in moves(self.shape)]
        best = sorted(((self.rough_cost(place), place) for place in places), key=_cost)[:SHORTLIST]
        if not best or best[0][0] > BLIND * here:
            return []
        ranked = sorted(((self.close_cost(place), place) for _, place in best), key=_cost)
        return [place for cost, place in ranked if cost < self.slack * NEAR * here]


def _length(move: Move) -> int:
    return max(abs(move[1]), abs(move[2]))


def _cost(pair: tuple[float, Tensor]) -> float:
    return pair[0]

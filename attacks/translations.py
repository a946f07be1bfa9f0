"""Translated images: the local minima in which searches of convolutional networks get stuck, and the way out of them.

A convolutional network's gradient is a sum over positions, so an image moved by a pixel or two has nearly the same one: only
what lies at the borders, and what strides skip, tells where the image is. A search from afar often settles on the right image
in the wrong place, with a cost far from zero; moved by the right step it lies in the basin of the solution.

Source: our own measurement. Translations are an ambiguity of phase retrieval too, another inverse problem in which positions
are summed over: Fienup, Wackerman, J. Opt. Soc. Am. A 3, 1897 (1986).
"""

from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor

STRIDES = (1, 2, 4, 8)
"""Pixels by which an image is moved in either direction, those that are at most a quarter of it."""


Move = tuple[int, int, int]
"""Which image of a batch, and by how many pixels down and right."""


def moves(shape: Sequence[int]) -> list[Move]:
    """Of one image of a batch of this shape (B,C,H,W): by up to two pixels in either direction, or by a longer stride."""
    batch, _, height, width = shape
    found = set[tuple[int, int]]()
    for stride in STRIDES:
        if stride <= max(1, min(height, width) // 4):
            steps = range(-2, 3) if stride == 2 else (-stride, 0, stride)
            found |= set(product(steps, steps))
    return [(number, *step) for number in range(batch) for step in sorted(found - {(0, 0)})]


def moved(images: Tensor, move: Move) -> Tensor:
    """The batch (B,C,H,W) with one image moved, wrapped around."""
    number, down, right = move
    batch = images.clone()
    batch[number] = torch.roll(images[number], (down, right), (-2, -1))
    return batch

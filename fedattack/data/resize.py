"""Bring pictures to one size: centre crop to the aspect ratio, then shrink by averaging."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fedattack.errors import FedattackError, must

ImageSize = int | Sequence[int]
"""A side length (square) or (height, width)."""

CHUNK = 1024  # images at a time in float32


def height_and_width(image_size: ImageSize) -> tuple[int, int]:
    """(H, W) of an image_size parameter."""
    sides = [image_size, image_size] if isinstance(image_size, int) else list(image_size)
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise FedattackError(must("image_size", "a positive integer or (height, width)", image_size))
    return sides[0], sides[1]


def fit(pixels: Tensor, image_size: ImageSize | None) -> Tensor:
    """(N,C,H,W) uint8 of another size: the largest centred window of the wanted aspect ratio, resized.

    Whole-number shrinking is the area average, everything else antialiased bilinear; half values round to even.
    """
    if image_size is None:
        return pixels
    height, width = height_and_width(image_size)
    rows, columns = pixels.shape[-2:]
    if (rows, columns) == (height, width):
        return pixels
    cut_rows = min(rows, max(1, columns * height // width))
    cut_columns = min(columns, max(1, rows * width // height))
    top, left = (rows - cut_rows) // 2, (columns - cut_columns) // 2
    window = pixels[..., top : top + cut_rows, left : left + cut_columns]
    if (cut_rows, cut_columns) == (height, width):
        return window.contiguous()
    whole = cut_rows % height == 0 and cut_columns % width == 0
    how: dict[str, Any] = {"mode": "area"} if whole else {"mode": "bilinear", "antialias": True}
    chunks = [F.interpolate(part.float(), (height, width), **how) for part in torch.split(window, CHUNK)]
    return torch.cat(chunks).round().clamp(0, 255).to(torch.uint8)

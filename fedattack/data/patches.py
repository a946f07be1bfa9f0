"""Patches of the photographs that scikit-image ships: real colour images with no download.

Source: scikit-image, `skimage.data` (public-domain and CC0 pictures; the motorcycle is Middlebury stereo 2014).
"""

import numpy as np
import torch
from torch import Tensor

from fedattack.data.splitting import limited, split_one
from fedattack.data.types import ImageData, Splits
from fedattack.errors import FedattackError, MissingDependency, must

PICTURES = (
    "astronaut",
    "chelsea",
    "coffee",
    "rocket",
    "stereo_motorcycle",
    "retina",
    "hubble_deep_field",
    "immunohistochemistry",
)

FLAT_STD = 0.04
"""Patches whose grey values (mean of R, G, B in [0, 1]) deviate less than this are sky or background: dropped."""

MIN_CUT = 32


def patches(
    image_size: int = 32,
    max_per_picture: int = 120,
    seed: int = 0,
    public_fraction: float = 0.2,
    test_fraction: float = 0.2,
) -> Splits:
    """Non-overlapping square patches, label = source picture, 3 channels.

    Patches are cut at the smallest multiple of `image_size` that is at least 32 and area-averaged down to
    it, so that small images still show something; at 32 and above the pixels are the photograph's own. Flat ones
    (FLAT_STD) are dropped and at most `max_per_picture` of each picture, drawn by the seed, are kept.
    """
    if image_size < 1:
        raise FedattackError(must("image_size", "a positive integer", image_size))
    factor = -(-MIN_CUT // image_size)
    pixels, labels = [], []
    for label, name in enumerate(PICTURES):
        cut = _shrink(_grid(_picture(name), image_size * factor), factor)
        textured = cut[_grey_std(cut) >= FLAT_STD]
        kept = textured[limited(len(textured), max_per_picture, seed=seed, name=name)]
        pixels.append(kept)
        labels.append(torch.full((len(kept),), label, dtype=torch.int64))
    names = tuple(name.replace("_", "-") for name in PICTURES)
    data = ImageData(torch.cat(pixels), torch.cat(labels), names, name="patches")
    return split_one(data, seed=seed, public_fraction=public_fraction, test_fraction=test_fraction)


def _picture(name: str) -> Tensor:
    """(3,H,W) uint8."""
    from skimage import data

    try:
        loaded = getattr(data, name)()
    except (OSError, ImportError, ValueError) as error:
        raise MissingDependency(f"scikit-image's picture {name!r} cannot be loaded: {error}") from error
    array = loaded[0] if isinstance(loaded, tuple) else loaded
    return torch.from_numpy(np.ascontiguousarray(array[..., :3])).permute(2, 0, 1)


def _grid(picture: Tensor, side: int) -> Tensor:
    """(N,3,side,side), row by row; the remainder at the right and at the bottom is left out."""
    rows = picture.unfold(1, side, side).unfold(2, side, side)
    return rows.permute(1, 2, 0, 3, 4).reshape(-1, 3, side, side)


def _shrink(cut: Tensor, factor: int) -> Tensor:
    if factor == 1:
        return cut
    return torch.nn.functional.avg_pool2d(cut.float(), factor).round().to(torch.uint8)


def _grey_std(cut: Tensor) -> Tensor:
    """(N,) standard deviation of the grey values in [0, 1]."""
    return cut.float().div(255).mean(1).flatten(1).std(1, correction=0)

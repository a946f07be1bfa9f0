"""Where a prior comes from: what it was trained on, and whether the images under attack were among that.

    provenance.json       beside the weights: data set, split, SHA-256 of the images, seed, steps, losses, settings
    images.safetensors    thumbnails of the images used, SIDE×SIDE uint8, so that an overlap shows at any size

Two images count as the same where the root mean square difference of their thumbnails (exact area averages of the largest
centred square) is at most SAME levels of 255. That survives resizing to 16 pixels or more and JPEG, not another crop
or a change of contrast; very flat pictures can be taken for one another. Mirrored copies count where training mirrored.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fedattack.store import read_json, read_tensors, write_tensors

PROVENANCE = "provenance.json"
IMAGES = "images.safetensors"

SIDE = 4
"""Pixels of a thumbnail's side."""

SAME = 3.0
"""Levels of 255. Measured on LFW, CelebA, Imagenette and CIFAR-10: copies resized to 16 to 64 pixels are within 3.5 (nearly all
within 2); 99 in a hundred images have their nearest different one of 1,500 more than 12 away (dark patches: 3.4)."""

COPY = 10.0
"""Levels of 255: JPEG at quality 75 changes small photographs by less."""

CHUNK = 1 << 26
"""How many numbers a table of differences may hold at a time."""

PAIRS = 512
"""How many pairs of whole images are compared at a time."""

POOLED = 1 << 24
"""How many numbers the images that are pooled at a time may take, at SIDE² times their pixels."""


def thumbnails(pixels: Tensor) -> Tensor:
    """(N,C,SIDE,SIDE) uint8 of images (N,C,H,W), uint8 or in [0, 1]: every thumbnail pixel the mean of the area it covers."""
    side = min(pixels.shape[-2:])
    top, left = (pixels.shape[-2] - side) // 2, (pixels.shape[-1] - side) // 2
    square = pixels.detach()[..., top : top + side, left : left + side]
    rows = max(1, POOLED // max(1, pixels.shape[1] * (SIDE * side) ** 2))
    return torch.cat([_pooled(part, side) for part in torch.split(square, rows)])


def _pooled(square: Tensor, side: int) -> Tensor:
    levels = square.cpu().float() * (1.0 if square.dtype == torch.uint8 else 255.0)
    finer = levels.repeat_interleave(SIDE, -1).repeat_interleave(SIDE, -2)
    return F.avg_pool2d(finer, side).round().clamp(0, 255).to(torch.uint8)


def fingerprint(pixels: Tensor) -> str:
    """SHA-256 of images (N,C,H,W) uint8, their order included."""
    digest = hashlib.sha256(repr(tuple(pixels.shape)).encode())
    digest.update(pixels.contiguous().reshape(-1).numpy().data)
    return digest.hexdigest()


def save_thumbnails(folder: Path, pixels: Tensor) -> None:
    """Thumbnails of the images that a prior was trained on, beside its weights."""
    write_tensors(folder / IMAGES, {"thumbnails": thumbnails(pixels)}, {"type": "thumbnails"})


def read_provenance(prior: str) -> dict[str, Any]:
    """What `prior` (a folder, a hub's name, "") says about its training; {} where it says nothing."""
    path = Path(prior).expanduser() / PROVENANCE
    found = read_json(path) if prior and path.is_file() else {}
    return found if isinstance(found, dict) else {}


def summary(prior: str) -> dict[str, Any]:
    """The provenance as rows carry it: data set, split, number and hash of the images, seed, steps; {} where unknown."""
    about = read_provenance(prior)
    data = about.get("data", {})
    told = {name: data.get(name) for name in ("dataset", "options", "split", "images", "sha256")}
    return {**told, "seed": about.get("seed"), "steps": about.get("steps")} if about else {}


def overlap(images: Tensor, prior: str) -> dict[str, Any]:
    """How many of the images (B,C,H,W) in [0, 1] the prior was trained on, {} where it does not say what it was trained on.

    compared: B. same: how many have a thumbnail like theirs among the prior's. mirrored: whether mirror images were compared
    too, as they are where training mirrored at random. nearest_levels: the least root mean square difference of thumbnails,
    in levels of 255. With another number of channels nothing is compared: same is None, and there is a reason.
    """
    path = Path(prior).expanduser() / IMAGES
    if not prior or not path.is_file():
        return {}
    known = read_tensors(path)[0]["thumbnails"]
    if not len(known):
        return {}
    if known.shape[1] != images.shape[1]:
        reason = f"it was trained on images of {known.shape[1]} channels, those under attack have {images.shape[1]}"
        return {"compared": 0, "same": None, "reason": reason}
    mirrored = read_provenance(prior).get("flips") is True
    nearest = _nearest(thumbnails(images), known)
    if mirrored:
        nearest = torch.minimum(nearest, _nearest(thumbnails(images.flip(-1)), known))
    return {
        "compared": len(images),
        "same": int((nearest <= SAME).sum()),
        "mirrored": mirrored,
        "nearest_levels": float(nearest.min()),
        "tolerance_levels": SAME,
    }


def copies(pixels: Tensor, others: Tensor) -> Tensor:
    """(N,) bool: which images (N,C,H,W) uint8 are, up to recompression and mirroring, among `others` (M,C,H,W) uint8:
    thumbnails within SAME and whole images within COPY levels, both root mean square."""
    return _copies(pixels, others) | _copies(pixels.flip(-1), others)


def _copies(pixels: Tensor, others: Tensor) -> Tensor:
    found = torch.zeros(len(pixels), dtype=torch.bool)
    if not len(pixels) or not len(others):
        return found
    a, b = thumbnails(pixels).flatten(1).float(), thumbnails(others).flatten(1).float()
    limit = SAME * a.shape[1] ** 0.5
    for start in range(0, len(a), PAIRS):
        near = torch.cdist(a[start : start + PAIRS], b, compute_mode="donot_use_mm_for_euclid_dist") <= limit
        for pairs in torch.split(near.nonzero(), PAIRS):
            rows, columns = pairs[:, 0] + start, pairs[:, 1]
            levels = (pixels[rows].float() - others[columns].float()).flatten(1).square().mean(1).sqrt()
            found[rows[levels <= COPY]] = True
    return found


def _nearest(some: Tensor, known: Tensor) -> Tensor:
    """(B,) least root mean square difference from any of the known thumbnails, in levels."""
    a, b = some.flatten(1).float(), known.flatten(1).float()
    rows = max(1, CHUNK // max(len(b), 1))
    least = [torch.cdist(part, b, compute_mode="donot_use_mm_for_euclid_dist").amin(1) for part in torch.split(a, rows)]
    nearest: Tensor = torch.cat(least) / a.shape[1] ** 0.5
    return nearest


def same_settings(wanted: Mapping[str, Any], found: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What differs between two nested settings, one line a value: "steps must be 100, got 200"."""
    lines: list[str] = []
    for name in dict.fromkeys((*wanted, *found)):
        a, b, path = wanted.get(name), found.get(name), f"{prefix}{name}"
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            lines += same_settings(a, b, f"{path}.")
        elif _plain(a) != _plain(b):
            lines.append(f"{path} is {b!r} there, asked for {a!r}")
    return lines


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value

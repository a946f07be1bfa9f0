"""Labelled images in memory, and the three disjoint parts a campaign needs."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedattack.errors import FedattackError, must

Indices = Tensor | Sequence[int]


@dataclass(frozen=True, eq=False)
class ImageData:
    """pixels (N,C,H,W) uint8 · labels (N,) int64 in 0 … K−1 · class_names K of them · users (N,) int64 or None."""

    pixels: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    users: Tensor | None = None
    name: str = "images"

    def __post_init__(self) -> None:
        if self.pixels.dtype != torch.uint8 or self.pixels.ndim != 4:
            got = (self.pixels.dtype, tuple(self.pixels.shape))
            raise FedattackError(must(f"pixels of {self.name}", "uint8 of shape (N,C,H,W)", got))
        for what, tensor in (("labels", self.labels), ("users", self.users)):
            if tensor is not None and (tensor.dtype != torch.int64 or tensor.shape != (len(self),)):
                got = (tensor.dtype, tuple(tensor.shape))
                raise FedattackError(must(f"{what} of {self.name}", f"int64 of shape ({len(self)},)", got))
        if len(self) and (int(self.labels.min()) < 0 or int(self.labels.max()) >= self.num_classes):
            span = (int(self.labels.min()), int(self.labels.max()))
            raise FedattackError(must(f"labels of {self.name}", f"in 0 … {self.num_classes - 1} (class_names)", span))

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        channels, height, width = self.pixels.shape[1:]
        return channels, height, width

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def images(self, indices: Indices | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        """(B,C,H,W) in [0, 1]: all of them, or those at `indices`."""
        chosen = self.pixels if indices is None else self.pixels[torch.as_tensor(indices, dtype=torch.int64)]
        return chosen.to(dtype) / 255

    def digest(self) -> str:
        """SHA-256 of the pixels: a number that only one who has the images can compute."""
        return hashlib.sha256(self.pixels.contiguous().numpy().tobytes()).hexdigest()

    def subset(self, indices: Indices) -> "ImageData":
        """The images at `indices`, in that order."""
        rows = torch.as_tensor(indices, dtype=torch.int64)
        users = None if self.users is None else self.users[rows]
        return ImageData(self.pixels[rows], self.labels[rows], self.class_names, users, self.name)


@dataclass(frozen=True, eq=False)
class Splits:
    """Three disjoint sets of one kind of image.

    `private` goes to the clients; `public` is what an attacker may know (baselines, priors); `test` measures utility.
    """

    private: ImageData
    public: ImageData
    test: ImageData

    def __post_init__(self) -> None:
        for part in ("public", "test"):
            data = getattr(self, part)
            same = (self.private.image_shape, self.private.class_names)
            if (data.image_shape, data.class_names) != same:
                got = (data.image_shape, data.class_names)
                raise FedattackError(must(f"image_shape and class_names of {part}", f"those of private, {same}", got))
        if not len(self.private):
            raise FedattackError(must(f"private images of {self.private.name}", "at least one", 0))

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.private.image_shape

    @property
    def num_classes(self) -> int:
        return self.private.num_classes

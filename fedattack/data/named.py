"""Research sets by name: CIFAR, Fashion-MNIST and CelebA through torchvision, LSUN from its LMDB folders.

Where they cannot be fetched the error says what to put where; "npz:PATH" and "images:FOLDER" read your own copy.
"""

import io
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedattack.data.resize import ImageSize, fit
from fedattack.data.splitting import limited, split_one, split_train_test
from fedattack.data.types import ImageData, Splits
from fedattack.errors import FedattackError, MissingDependency, one_of

CONNECT_SECONDS = 20.0
CELEBA_SIDE = 148
"""The usual centre crop of CelebA's aligned 178×218 pictures."""


def default_root() -> Path:
    """$FEDATTACK_DATA, else the user's cache folder ($XDG_CACHE_HOME or ~/.cache)/fedattack."""
    if chosen := os.environ.get("FEDATTACK_DATA"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedattack"


def cifar10(
    root: str | None = None,
    image_size: ImageSize | None = None,
    limit: int | None = None,
    seed: int = 0,
    public_fraction: float = 0.2,
    download: bool = True,
) -> Splits:
    """CIFAR-10: 50,000 + 10,000 colour images 32×32, 10 classes (Krizhevsky 2009)."""
    return _train_and_test("CIFAR10", "cifar10", root, image_size, limit, seed, public_fraction, download)


def cifar100(
    root: str | None = None,
    image_size: ImageSize | None = None,
    limit: int | None = None,
    seed: int = 0,
    public_fraction: float = 0.2,
    download: bool = True,
) -> Splits:
    """CIFAR-100: 50,000 + 10,000 colour images 32×32, 100 classes (Krizhevsky 2009)."""
    return _train_and_test("CIFAR100", "cifar100", root, image_size, limit, seed, public_fraction, download)


def fashion_mnist(
    root: str | None = None,
    image_size: ImageSize | None = None,
    limit: int | None = None,
    seed: int = 0,
    public_fraction: float = 0.2,
    download: bool = True,
) -> Splits:
    """Fashion-MNIST: 60,000 + 10,000 grey images 28×28, 10 classes (Xiao et al. 2017)."""
    return _train_and_test("FashionMNIST", "fashion-mnist", root, image_size, limit, seed, public_fraction, download)


def celeba(
    root: str | None = None,
    image_size: ImageSize = 64,
    label: str = "Male",
    limit: int | None = 20_000,
    seed: int = 0,
    public_fraction: float = 0.2,
    by_user: bool = False,
    test_fraction: float = 0.2,
    download: bool = True,
) -> Splits:
    """CelebA faces (Liu et al. 2015), centre-cropped at 148; label = one of the 40 attributes, users = identities.

    `limit` of the 202,599 pictures are drawn by the seed and cut into three (with `by_user` no person is in two parts).
    """
    from_torchvision = _torchvision("CelebA", "celeba", root)
    faces = from_torchvision(split="all", target_type=["attr", "identity"], download=download)
    names = [name for name in faces.attr_names if name]
    if label not in names:
        raise FedattackError(one_of("label of celeba", names, label))
    rows = limited(len(faces), limit, seed=seed, name="celeba")
    column = faces.attr_names.index(label)
    pixels = torch.cat([fit(_centre(_to_pixels(faces[row][0]), CELEBA_SIDE), image_size) for row in rows.tolist()])
    labels, users = faces.attr[rows, column].long(), faces.identity[rows, 0].long()
    data = ImageData(pixels, labels, (f"not {label}", label), users, "celeba")
    return split_one(data, seed=seed, public_fraction=public_fraction, test_fraction=test_fraction, by_user=by_user)


def lsun(
    root: str | None = None,
    image_size: ImageSize = 64,
    categories: Sequence[str] = ("bedroom", "church_outdoor"),
    limit: int | None = 5_000,
    seed: int = 0,
    public_fraction: float = 0.2,
    test_fraction: float = 0.2,
) -> Splits:
    """LSUN scenes (Yu et al. 2015), label = category; the first `limit` pictures of each, in the database's key order.

    Read from `root`/CATEGORY_train_lmdb. torchvision cannot fetch LSUN, and its reader leaves pickled key lists in the
    working folder, so the LMDB is read directly.
    """
    from PIL import Image

    try:
        lmdb = import_module("lmdb")
    except ImportError as error:
        raise MissingDependency("dataset 'lsun' needs the lmdb package: pip install lmdb") from error
    folder = Path(root).expanduser() if root else default_root() / "lsun"
    pixels, labels = [], []
    for label, category in enumerate(categories):
        database = folder / f"{category}_train_lmdb"
        if not database.is_dir():
            raise MissingDependency(
                f"dataset 'lsun' is not there: put {database.name} (github.com/fyu/lsun) into "
                f"{folder}, or use images:FOLDER"
            )
        with lmdb.open(str(database), readonly=True, lock=False) as env, env.begin() as transaction:
            for count, (_, blob) in enumerate(transaction.cursor()):
                if limit is not None and count >= limit:
                    break
                with Image.open(io.BytesIO(blob)) as picture:
                    pixels.append(fit(_to_pixels(picture.convert("RGB")), image_size))
                labels.append(label)
    data = ImageData(torch.cat(pixels), torch.tensor(labels), tuple(categories), name="lsun")
    return split_one(data, seed=seed, public_fraction=public_fraction, test_fraction=test_fraction)


def _train_and_test(
    class_name: str,
    name: str,
    root: str | None,
    image_size: ImageSize | None,
    limit: int | None,
    seed: int,
    public_fraction: float,
    download: bool,
) -> Splits:
    load = _torchvision(class_name, name, root)
    parts = []
    for part, train in (("train", True), ("test", False)):
        source = load(train=train, download=download)
        rows = limited(len(source), limit, seed=seed, name=f"{name} {part}")
        array = torch.as_tensor(source.data)[rows]
        pixels = array.unsqueeze(1) if array.ndim == 3 else array.permute(0, 3, 1, 2).contiguous()
        labels = torch.as_tensor(source.targets)[rows].long()
        parts.append(ImageData(fit(pixels, image_size), labels, tuple(source.classes), name=name))
    return split_train_test(*parts, seed=seed, public_fraction=public_fraction)


def _torchvision(class_name: str, name: str, root: str | None) -> Callable[..., Any]:
    """The data set's class with its root bound and its failures reworded."""
    import torchvision.datasets

    folder = Path(root).expanduser() if root else default_root()

    def load(**arguments: Any) -> Any:
        try:
            with _socket_timeout(CONNECT_SECONDS):
                return getattr(torchvision.datasets, class_name)(root=str(folder), **arguments)
        except (RuntimeError, OSError, ImportError) as error:
            raise MissingDependency(
                f"dataset {name!r} is not in {folder} and cannot be downloaded ({type(error).__name__}: {error}); "
                f"put torchvision's files of {class_name} there (or set root, or FEDATTACK_DATA), or use npz:PATH"
            ) from error

    return load


@contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    """torchvision opens its connections with the default timeout, which is none."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _to_pixels(picture: Any) -> torch.Tensor:
    """(1,3,H,W) uint8 of a PIL picture."""
    return torch.from_numpy(np.array(picture.convert("RGB"), dtype=np.uint8)).permute(2, 0, 1).unsqueeze(0)


def _centre(pixels: torch.Tensor, side: int) -> torch.Tensor:
    top, left = max(0, (pixels.shape[-2] - side) // 2), max(0, (pixels.shape[-1] - side) // 2)
    return pixels[..., top : top + side, left : left + side]

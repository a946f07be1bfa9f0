"""Image sets and how they are dealt out to clients. Every loader gives `Splits`: private, public, test."""

from typing import Any

from fedattack.data.partition import partition
from fedattack.data.splitting import split_one, split_train_test
from fedattack.data.types import ImageData, Splits
from fedattack.errors import FedattackError, must

__all__ = ["DATASETS", "ImageData", "Splits", "load_dataset", "partition", "split_one", "split_train_test"]

DATASETS: dict[str, str] = {
    "patches": "fedattack.data.patches:patches",
    "npz": "fedattack.data.npz:npz",
    "images": "fedattack.data.folder:images",
    "cifar10": "fedattack.data.named:cifar10",
    "cifar100": "fedattack.data.named:cifar100",
    "fashion-mnist": "fedattack.data.named:fashion_mnist",
    "celeba": "fedattack.data.named:celeba",
    "lsun": "fedattack.data.named:lsun",
}

_TAKES_PATH = ("npz", "images")


def load_dataset(name: str, **parameters: Any) -> Splits:
    """A data set by name: "patches", "cifar10", …, "npz:PATH", "images:FOLDER", or "module:function" of your own.

    Raises UnknownName (with the closest name), MissingDependency (file or download not there) or FedattackError.
    """
    from fedattack.registry import DATASETS as REGISTRY

    kind, colon, path = name.partition(":")
    if colon and kind in _TAKES_PATH:
        if "path" in parameters:
            raise FedattackError(must(f"path of dataset {name!r}", "given once", parameters["path"]))
        name, parameters = kind, {"path": path, **parameters}
    splits = REGISTRY.create(name, **parameters)
    if not isinstance(splits, Splits):
        raise FedattackError(must(f"what dataset {name!r} returns", "fedattack.data.Splits", type(splits).__name__))
    return splits

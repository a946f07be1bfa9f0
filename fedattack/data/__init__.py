"""Image sets and how they are dealt out to clients. Every loader gives `Splits`: private, public, test."""

from dataclasses import replace
from typing import Any

import torch

from fedattack.data.partition import partition
from fedattack.data.splitting import split_one, split_train_test
from fedattack.data.types import ImageData, Splits
from fedattack.errors import FedattackError, must, one_of

__all__ = [
    "DATASETS",
    "ImageData",
    "Splits",
    "label_columns",
    "load_dataset",
    "partition",
    "split_one",
    "split_train_test",
    "with_label",
]

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


OWN_LABEL = "class"
"""Stands for the classes that a data set was loaded with."""


def label_columns(name: str, /, **parameters: Any) -> tuple[str, ...] | None:
    """What `with_label` finds in a data set, as far as that shows before its images are read; None where only reading tells."""
    from fedattack.data.npz import columns
    from fedattack.registry import DATASETS as REGISTRY
    from fedattack.registry import parameters_of

    kind, _, path = name.partition(":")
    if kind == "npz":
        return tuple(dict.fromkeys((*columns(path or str(parameters.get("path", ""))), OWN_LABEL)))
    loader = REGISTRY.get(kind if kind in _TAKES_PATH else name)
    return None if "label" in parameters_of(loader) else (OWN_LABEL,)


def with_label(splits: Splits, column: str, name: str, /, **parameters: Any) -> Splits:
    """The same images in the same order, labelled by another column: "identity" is who is on them (`users`), "class" what they
    are labelled by already; anything else the loader is asked for. name, parameters: what `splits` was loaded with.

    Raises FedattackError where the data set has no such column.
    """
    if column == OWN_LABEL:
        return splits
    if column == "identity" and (by_user := _by_user(splits)):
        return by_user
    columns = label_columns(name, **parameters)
    if columns is not None and column not in columns:
        raise FedattackError(one_of(f"label of {splits.private.name}", columns, column))
    found = load_dataset(name, **{**parameters, "label": column})
    for part in ("private", "public", "test"):
        if not torch.equal(getattr(found, part).pixels, getattr(splits, part).pixels):
            raise FedattackError(must(f"{part} images of {name}", "the same for every label", f"others for {column}"))
    return found


def _by_user(splits: Splits) -> Splits | None:
    """People numbered alike in all three parts, None where the data set does not say who is who."""
    parts = (splits.private, splits.public, splits.test)
    users = [part.users for part in parts if part.users is not None]
    if len(users) < len(parts):
        return None
    people, numbers = torch.unique(torch.cat(users), return_inverse=True)
    names = tuple(f"identity-{value}" for value in people.tolist())
    labels = numbers.split([len(part) for part in parts])
    return Splits(*(replace(part, labels=own, class_names=names) for part, own in zip(parts, labels, strict=True)))

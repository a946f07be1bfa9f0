"""Image sets in one NumPy archive; never a pickled object.

Three layouts are read (images uint8, HWC or HW; integers for everything else):

    x_train y_train x_test y_test [class_names]             the set's own test part is kept
    x [y] [identity] [any other column] [class_names]       cut into three by the seed
    jpeg offset [identity] [attributes attribute_names]     JPEG files end to end, split at offset[0] … offset[N]
"""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from fedattack.data.resize import ImageSize, fit
from fedattack.data.splitting import limited, split_one, split_train_test
from fedattack.data.types import ImageData, Splits
from fedattack.errors import FedattackError, MissingDependency, must, one_of

CELEBA_BOX = (7, 18, 81, 92)
"""The face in CelebA's aligned pictures at half size (89×109), as PIL's left, top, right, bottom."""


def npz(
    path: str,
    image_size: ImageSize | None = None,
    label: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    public_fraction: float = 0.2,
    test_fraction: float = 0.2,
    by_user: bool = False,
    crop: Sequence[int] = CELEBA_BOX,
) -> Splits:
    """`label` names the column (or attribute) to classify: "y", else "identity"; "Male" where there are attributes.

    `identity`, where there is one, becomes `users`; `by_user` keeps a user's images in one part. `limit` reads at
    most that many images of each part, drawn by the seed. `crop` (left, top, right, bottom) is for the JPEG layout.
    Raises MissingDependency where the file is not there and FedattackError where its keys fit none of the layouts.
    """
    file, archive = Path(path).expanduser(), _open(path)
    name = file.stem
    with archive:
        keys = set(archive.files)
        if "x_train" in keys:
            if by_user:
                raise FedattackError(must("by_user", f"off, because {file.name} brings its own test part", by_user))
            parts = [
                _arrays(archive, keys, f"_{part}", image_size, label, limit, seed, name) for part in ("train", "test")
            ]
            return split_train_test(*_same_classes(*parts), seed=seed, public_fraction=public_fraction)
        if "x" in keys:
            data = _arrays(archive, keys, "", image_size, label, limit, seed, name)
        elif "jpeg" in keys:
            data = _jpegs(archive, keys, image_size, label or "Male", limit, seed, name, crop)
        else:
            raise FedattackError(must(f"keys of {file.name}", "x_train …, x … or jpeg …", sorted(keys)))
    return split_one(data, seed=seed, public_fraction=public_fraction, test_fraction=test_fraction, by_user=by_user)


def columns(path: str) -> tuple[str, ...]:
    """What `label` may name in an archive. Raises as `npz` does."""
    with _open(path) as archive:
        keys = set(archive.files)
        if "jpeg" in keys:
            names = archive["attribute_names"].tolist() if "attribute_names" in keys else []
            return tuple(str(name) for name in names) + (("identity",) if "identity" in keys else ())
    suffix = "_train" if "x_train" in keys else ""
    found = {key.removesuffix(suffix) for key in keys if key.endswith(suffix)} - {"x", "class_names"}
    return tuple(sorted(found))


def _open(path: str) -> Any:
    file = Path(path).expanduser()
    if not file.is_file():
        raise MissingDependency(must("path of the npz data set", "an existing .npz file", path))
    try:
        archive = np.load(file, allow_pickle=False)
    except (ValueError, OSError, EOFError, BadZipFile) as error:
        raise FedattackError(f"{file.name} cannot be read as .npz: {error}") from error
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise FedattackError(must("path of the npz data set", "an .npz archive with named arrays", path))
    return archive


def _arrays(
    archive: Any,
    keys: set[str],
    suffix: str,
    image_size: ImageSize | None,
    label: str | None,
    limit: int | None,
    seed: int,
    name: str,
) -> ImageData:
    """One part: x{suffix} with its columns."""
    _need(keys, {f"x{suffix}"}, name)
    stacked = _read(archive, f"x{suffix}", name)
    if stacked.dtype != np.uint8 or stacked.ndim not in (3, 4):
        raise FedattackError(must(f"x{suffix} of {name}", "uint8 (N,H,W) or (N,H,W,C)", (stacked.dtype, stacked.shape)))
    rows = limited(len(stacked), limit, seed=seed, name=name + suffix)
    chosen = torch.from_numpy(stacked[rows.numpy()])
    pixels = chosen.unsqueeze(1) if chosen.ndim == 3 else chosen.permute(0, 3, 1, 2).contiguous()
    columns = {key.removesuffix(suffix) for key in keys if key.endswith(suffix)} - {"x", "class_names"}
    column = label or next((key for key in ("y", "identity") if key in columns), None)
    users = _column(archive, f"identity{suffix}", name, rows, len(stacked)) if "identity" in columns else None
    if column is None:
        return ImageData(fit(pixels, image_size), torch.zeros(len(pixels), dtype=torch.int64), ("all",), users, name)
    if column not in columns:
        raise FedattackError(one_of(f"label of {name}", columns, column))
    values = _column(archive, column + suffix, name, rows, len(stacked))
    if column == "y" and "class_names" in keys:
        class_names = tuple(str(entry) for entry in _read(archive, "class_names", name))
        return ImageData(fit(pixels, image_size), values, class_names, users, name)
    found, labels = torch.unique(values, return_inverse=True)
    return ImageData(
        fit(pixels, image_size), labels, tuple(f"{column}-{value}" for value in found.tolist()), users, name
    )


def _jpegs(
    archive: Any,
    keys: set[str],
    image_size: ImageSize | None,
    label: str,
    limit: int | None,
    seed: int,
    name: str,
    crop: Sequence[int],
) -> ImageData:
    from PIL import Image

    _need(keys, {"jpeg", "offset"}, name)
    blob, offset = _read(archive, "jpeg", name), _read(archive, "offset", name)
    total = len(offset) - 1
    rows = limited(total, limit, seed=seed, name=name)
    box = tuple(crop)
    decoded = []
    for row in rows.tolist():
        with Image.open(io.BytesIO(blob[offset[row] : offset[row + 1]].tobytes())) as picture:
            decoded.append(np.asarray(picture.convert("RGB").crop(box)))
    pixels = fit(torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2).contiguous(), image_size)
    users = _column(archive, "identity", name, rows, total) if "identity" in keys else None
    if label == "identity" and users is not None:
        found, labels = torch.unique(users, return_inverse=True)
        return ImageData(pixels, labels, tuple(f"identity-{value}" for value in found.tolist()), users, name)
    _need(keys, {"attributes", "attribute_names"}, name)
    names = [str(entry) for entry in _read(archive, "attribute_names", name)]
    if label not in names:
        raise FedattackError(one_of(f"label of {name}", [*names, "identity"], label))
    labels = torch.from_numpy(_read(archive, "attributes", name)[rows.numpy(), names.index(label)] > 0).long()
    return ImageData(pixels, labels, (f"not {label}", label), users, name)


def _same_classes(train: ImageData, test: ImageData) -> tuple[ImageData, ImageData]:
    """Where the names came from the values found in each part, number both parts alike."""
    if train.class_names == test.class_names:
        return train, test
    names = tuple(dict.fromkeys((*train.class_names, *test.class_names)))
    return _renumber(train, names), _renumber(test, names)


def _renumber(data: ImageData, names: tuple[str, ...]) -> ImageData:
    table = torch.tensor([names.index(name) for name in data.class_names])
    return ImageData(data.pixels, table[data.labels], names, data.users, data.name)


def _column(archive: Any, key: str, name: str, rows: Tensor, total: int) -> Tensor:
    """(len(rows),) int64."""
    values = _read(archive, key, name)
    if values.shape != (total,) or values.dtype.kind not in "iub":
        raise FedattackError(must(f"{key} of {name}", f"integers of shape ({total},)", (values.dtype, values.shape)))
    return torch.from_numpy(values.astype(np.int64))[rows]


def _read(archive: Mapping[str, Any], key: str, name: str) -> Any:
    try:
        return archive[key]
    except (ValueError, BadZipFile) as error:
        raise FedattackError(f"{key} of {name} cannot be read without pickle or is damaged: {error}") from error


def _need(keys: set[str], wanted: set[str], name: str) -> None:
    if missing := sorted(wanted - keys):
        raise FedattackError(must(f"keys of {name}", "complete: missing " + ", ".join(missing), sorted(keys)))

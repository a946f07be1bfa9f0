"""A folder of pictures: the sub-folder's name is the label."""

from pathlib import Path

import numpy as np
import torch

from fedattack.data.resize import ImageSize, fit
from fedattack.data.splitting import limited, split_one
from fedattack.data.types import ImageData, Splits
from fedattack.errors import FedattackError, MissingDependency, must

EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


def images(
    path: str,
    image_size: ImageSize | None = None,
    grey: bool = False,
    limit: int | None = None,
    seed: int = 0,
    public_fraction: float = 0.2,
    test_fraction: float = 0.2,
) -> Splits:
    """Every picture below `path` in sorted order, centre-cropped and resized; one class where there are no sub-folders.

    Without `image_size` all pictures must be of one size already. `grey` gives one channel instead of three.
    """
    from PIL import Image, UnidentifiedImageError

    root = Path(path).expanduser()
    if not root.is_dir():
        raise MissingDependency(must("path of the images data set", "an existing folder", path))
    found = [file for file in root.rglob("*") if file.suffix.lower() in EXTENSIONS and file.is_file()]
    files = sorted((file.relative_to(root) for file in found), key=lambda file: file.parts)
    if not files:
        raise MissingDependency(must(f"folder {root.name}", "holding pictures (" + " ".join(EXTENSIONS) + ")", path))
    classes = tuple(sorted({_label(file) for file in files}))
    chosen = [files[row] for row in limited(len(files), limit, seed=seed, name=root.name).tolist()]
    pixels = []
    for file in chosen:
        try:
            with Image.open(root / file) as picture:
                array = np.array(picture.convert("L" if grey else "RGB"), dtype=np.uint8)
        except (UnidentifiedImageError, OSError) as error:
            raise FedattackError(f"picture {file.as_posix()!r} cannot be read: {error}") from error
        tensor = torch.from_numpy(array if array.ndim == 3 else array[..., None]).permute(2, 0, 1)
        pixels.append(fit(tensor.unsqueeze(0), image_size))
        if pixels[-1].shape != pixels[0].shape:
            got = (file.as_posix(), tuple(pixels[-1].shape[-2:]))
            rule = f"given, or every picture {tuple(pixels[0].shape[-2:])} like the first"
            raise FedattackError(must("image_size", rule, got))
    labels = torch.tensor([classes.index(_label(file)) for file in chosen])
    data = ImageData(torch.cat(pixels), labels, classes, name=root.name)
    return split_one(data, seed=seed, public_fraction=public_fraction, test_fraction=test_fraction)


def _label(file: Path) -> str:
    return file.parts[0] if len(file.parts) > 1 else "all"

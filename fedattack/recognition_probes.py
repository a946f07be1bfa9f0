"""What can be recognised in a picture: a face, an attribute, a person. Pure functions of images, which `recognition` uses.

    face        scikit-image's cascade of local binary patterns finds one or not
    attribute   the class of the linear discriminant, trained on public images
    person      nearest of a public gallery: every person stands at the mean embedding of his or her public images and their
                degraded copies, by the angle in the discriminant's space

A probe knows nothing of attacks. Since reconstructions are noisy or blurred, it is trained on every public image three times:
as it is, with Gaussian noise, and blurred; otherwise noise of 0.1 hides most people from it who are plain to see. What a
probe does not recognise may be recognisable all the same; what it finds on clean images says how much its silence means.

Images are (B,C,H,W) floats in [0, 1] of any size; other channels than three are averaged to grey.

Sources: Viola and Jones, CVPR 2001, with the features of Liao et al., ICB 2007 (the cascade is OpenCV's); principal components,
then Fisher's discriminant: Belhumeur, Hespanha and Kriegman, TPAMI 1997; activations of SqueezeNet 1.1 (Iandola et al.,
arXiv:1602.07360) as LPIPS compares them (arXiv:1801.03924).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fedattack.errors import FedattackError, MissingDependency, NotApplicable, must, one_of
from fedattack.metrics import perceptual_features

# The constants were chosen on LFW's public parts (lfw64.npz; for faces the default split at 64, 32 and 16 pixels; for probes a
# split with half of the file public, 70 % of it for training and 30 % for trying). Private images of other splits of the same
# file are among those, so on LFW the probes may do a little better than on images that nothing was chosen by.

FACE_SIDE = 96
"""Pixels to which an image's shorter side is scaled before faces are looked for: of 48 to 192 the one that finds most faces and
fewest in noise."""

FACE_MARGIN = 0.25
"""Of the side: the border's pixels are repeated outwards, since the cascade looks for a whole head."""

FACE_MIN_SIDE = 16
"""Below, noise is taken for a face too often."""

FACE_STEP = 1.1
"""Factor between the sizes at which a face is looked for, from FACE_LEAST of the side on."""

FACE_LEAST = 0.4

PROBE_SIDE = 64
"""Pixels a side of the images that features are taken from."""

COMPONENTS = 800
"""Principal components that the discriminant sees at most."""

SHRINKAGE = 0.1
"""Share of a multiple of the identity in the covariance within classes."""

NOISE = 0.1
"""Standard deviation of the noise on the second copy of the training images."""

CHUNK = 64
"""Images that are enlarged, and whose activations are held, at a time."""

KINDS = ("face", "attribute", "identity")

Kind = Literal["squeezenet", "pixels"]

BEST: Kind = "squeezenet"
"""Features that no others improve on."""


def parse_task(text: str) -> tuple[str, str]:
    """("face", ""), ("attribute", column) or ("identity", column) of "face", "attribute:COLUMN", "identity[:COLUMN]"."""
    kind, _, column = text.partition(":")
    if kind not in KINDS:
        raise FedattackError(one_of("what to recognise", KINDS, text))
    if kind == "face" and column:
        raise FedattackError(must("what to recognise", "face alone", text))
    if kind == "attribute" and not column:
        raise FedattackError(must("what to recognise", "attribute:COLUMN", text))
    return kind, column or ("identity" if kind == "identity" else "")


# ------------------------------------------------------------------------------------------------ faces
def detect_faces(images: Tensor) -> Tensor:
    """(B,) bool: whether a frontal face is found that fills at least FACE_LEAST of the image.

    Raises NotApplicable for images below FACE_MIN_SIDE and MissingDependency where the cascade's file is not there.
    """
    height, width = images.shape[-2:]
    if min(height, width) < FACE_MIN_SIDE:
        raise NotApplicable(must("image sides for faces", f"at least {FACE_MIN_SIDE} pixels", f"{height}x{width}"))
    found: list[bool] = []
    detector, scale = _detector(_cascade_file()), FACE_SIDE / min(height, width)
    size = (max(FACE_SIDE, round(height * scale)), max(FACE_SIDE, round(width * scale)))
    margin, least = round(FACE_MARGIN * FACE_SIDE), round(FACE_LEAST * FACE_SIDE)
    for image in _rgb(images):
        larger = F.pad(_resized(image.unsqueeze(0), size), (margin,) * 4, mode="replicate")
        pixels = (larger[0].clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
        whole = (min(pixels.shape[:2]),) * 2
        hits = detector.detect_multi_scale(
            img=pixels, scale_factor=FACE_STEP, step_ratio=1.0, min_size=(least, least), max_size=whole
        )
        found.append(len(hits) > 0)
    return torch.tensor(found, dtype=torch.bool)


def _cascade_file() -> Path:
    """The cascade that scikit-image ships; never downloaded."""
    try:
        import skimage.data
    except ImportError as error:
        raise MissingDependency(f"faces are found by scikit-image: {error}") from error
    path = Path(str(skimage.data.__file__)).parent / "lbpcascade_frontalface_opencv.xml"
    if not path.is_file():
        raise MissingDependency(f"scikit-image's face cascade is not there: {path.name}")
    return path


@lru_cache(maxsize=1)
def _detector(path: Path) -> Any:
    from skimage.feature import Cascade

    return Cascade(str(path))


# ------------------------------------------------------------------------------------------------ features
def available_features() -> Kind:
    """ "squeezenet" where LPIPS's backbone is on this machine, else "pixels" (with gradient histograms), which need no file."""
    try:
        perceptual_features(torch.zeros(1, 3, PROBE_SIDE, PROBE_SIDE))
    except MissingDependency:
        return "pixels"
    return "squeezenet"


def raw_features(images: Tensor, kind: Kind) -> list[Tensor]:
    """Blocks (B,D_i) float32. squeezenet: its second and third activations, averaged to 4×4. pixels: 32×32 pixels, and
    histograms of oriented gradients (Dalal and Triggs, CVPR 2005). CHUNK images at a time, only the averages are kept.
    """
    chunks = [_blocks(part, kind) for part in torch.split(images, CHUNK)]
    return [torch.cat(block) for block in zip(*chunks, strict=True)]


def _blocks(images: Tensor, kind: Kind) -> list[Tensor]:
    pictures = _resized(_rgb(images), (PROBE_SIDE, PROBE_SIDE))
    if kind == "squeezenet":
        layers = perceptual_features(pictures)[1:3]
        return [F.adaptive_avg_pool2d(layer, 4).flatten(1) for layer in layers]
    from skimage.feature import hog

    def histograms(picture: Tensor) -> Tensor:
        grey = picture.mean(0).numpy()
        return torch.from_numpy(hog(grey, orientations=8, pixels_per_cell=(8, 8), cells_per_block=(2, 2))).float()

    small = _resized(pictures, (PROBE_SIDE // 2, PROBE_SIDE // 2))
    return [small.flatten(1), torch.stack([histograms(picture) for picture in pictures])]


def degraded(images: Tensor, *, generator: torch.Generator) -> list[Tensor]:
    """Two further copies of training images: with Gaussian noise of NOISE, and blurred (binomial, wider on larger images)."""
    noise = torch.randn(images.shape, generator=generator)
    channels, side = images.shape[1], min(images.shape[-2:])
    row = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
    kernel = torch.outer(row, row).expand(channels, 1, 5, 5)
    blurred = images.float()
    for _ in range(max(1, round(side / 16))):
        blurred = F.conv2d(F.pad(blurred, (2,) * 4, mode="replicate"), kernel, groups=channels)
    return [(images.float() + NOISE * noise).clamp(0, 1), blurred.clamp(0, 1)]


@dataclass(frozen=True, eq=False)
class Features:
    """Principal components of public images: (B,C,H,W) to (B,r) float64, r at most COMPONENTS."""

    kind: Kind
    scales: tuple[float, ...]
    centre: Tensor
    directions: Tensor

    @staticmethod
    def fit(images: Tensor, kind: Kind) -> "Features":
        """Blocks are brought to equal variance first. Raises NotApplicable for fewer than 2 images."""
        if len(images) < 2:
            raise NotApplicable(must("public images for a probe", "at least 2", len(images)))
        blocks = raw_features(images, kind)
        scales = tuple(_scale(block) for block in blocks)
        joined = _joined(blocks, scales)
        centre = joined.mean(0)
        centred = joined - centre
        values, vectors = torch.linalg.eigh(centred @ centred.T)  # N×N: there are fewer images than numbers in each
        values, vectors = values.flip(0)[:COMPONENTS], vectors.flip(1)[:, :COMPONENTS]
        kept = values > 1e-9 * values[0].clamp(min=1e-12)
        return Features(kind, scales, centre, centred.T @ (vectors[:, kept] / values[kept].sqrt()))

    def __call__(self, images: Tensor) -> Tensor:
        return (_joined(raw_features(images, self.kind), self.scales) - self.centre) @ self.directions


def _scale(block: Tensor) -> float:
    deviation = float(block.double().std(0, correction=0).square().mean().sqrt())
    return 1.0 / (max(deviation, 1e-12) * math.sqrt(block.shape[1]))


def _joined(blocks: Sequence[Tensor], scales: Sequence[float]) -> Tensor:
    return torch.cat([block.double() * scale for block, scale in zip(blocks, scales, strict=True)], dim=1)


# ------------------------------------------------------------------------------------------------ probes
@dataclass(frozen=True, eq=False)
class Probe:
    """Fisher's linear discriminant among K classes."""

    whitening: Tensor
    means: Tensor
    shares: Tensor

    @staticmethod
    def fit(points: Tensor, labels: Tensor, classes: int) -> "Probe":
        """points (N,r), labels (N,) in 0 … classes−1. The covariance is that within classes, and where every class has one
        point only, that of all points about the origin (of `Features`, the mean of the images these were fitted to)."""
        counts = torch.bincount(labels, minlength=classes).double()
        means = torch.zeros(classes, points.shape[1], dtype=torch.float64).index_add_(0, labels, points)
        means = means / counts.clamp(min=1).unsqueeze(1)
        within = points - means[labels]
        freedom = len(points) - int((counts > 0).sum())
        spread = within if freedom > 0 else points
        covariance = spread.T @ spread / max(1, freedom)
        size = float(covariance.diagonal().mean()) if len(covariance) else 0.0
        unit = torch.eye(len(covariance), dtype=torch.float64)
        covariance = (1 - SHRINKAGE) * covariance + SHRINKAGE * (size if size > 1e-12 else 1.0) * unit
        whitening = torch.linalg.cholesky(torch.linalg.inv(covariance)) if len(covariance) else covariance
        return Probe(whitening, means @ whitening, counts / counts.sum())

    @property
    def known(self) -> Tensor:
        """(K,) bool: which classes had training images."""
        return self.shares > 0

    def classify(self, points: Tensor) -> Tensor:
        """(B,) int64: the likeliest class, the shares among the training images being the prior."""
        distances = torch.cdist(points @ self.whitening, self.means).square() / 2
        return (self.shares.log() - distances).argmax(1)

    def ranks(self, points: Tensor) -> Tensor:
        """(B,K) float64: the place 1 … of every class by angle to its mean, nearest first; equals share the mean of their
        places, so that a picture that says nothing gets (K+1)/2. NaN for classes without training images."""
        people = F.normalize(self.means[self.known], dim=1)
        angles = F.normalize(points @ self.whitening, dim=1) @ people.T
        in_order = angles.sort(dim=1).values
        at_least = angles.shape[1] - torch.searchsorted(in_order, angles, right=False)
        nearer = angles.shape[1] - torch.searchsorted(in_order, angles, right=True)
        places = torch.full((len(points), len(self.known)), float("nan"), dtype=torch.float64)
        places[:, self.known] = (nearer + at_least + 1).double() / 2
        return places


# ------------------------------------------------------------------------------------------------ helpers
def _rgb(images: Tensor) -> Tensor:
    """(B,3,H,W) float32."""
    images = images.detach().cpu().float()
    return images if images.shape[1] == 3 else images.mean(1, keepdim=True).expand(-1, 3, -1, -1)


def _resized(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear, averaging where it shrinks."""
    if images.shape[-2:] == size:
        return images
    return F.interpolate(images, size=size, mode="bilinear", align_corners=False, antialias=True)

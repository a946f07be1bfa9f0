"""How close a reconstruction is to the truth: one number per image, batch matching, and the baselines to beat.

Images are (B,C,H,W) floats in [0, 1]. Every image metric gives (B,) float64, never a mean. A metric that cannot be
computed raises NotApplicable or MissingDependency; `score` turns these into `missing` with the reason.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedattack.errors import FedattackError, MissingDependency, NotApplicable, must, one_of
from fedattack.seeding import seeded_default_generator
from fedattack.types import Reconstruction

MSE_FLOOR = 1e-20
"""PSNR is computed from max(mse, this), so identical images score 200 dB, which JSON can hold, and not infinity."""

SSIM_WINDOW = 11
"""Side in pixels of the Gaussian window of sigma 1.5, cut at 3.5 sigma (Wang et al. 2004)."""

LPIPS_MIN_SIDE = {"alex": 31, "squeeze": 17, "vgg": 16}
"""Smallest image side in pixels that the strides and pools of each LPIPS backbone leave a pixel of."""

LPIPS_CHUNK = 64

NO_IMAGES = "the attack finds timesteps and makes no images"


# ------------------------------------------------------------------------------------------------ one number per image
def mse(reconstruction: Tensor, truth: Tensor) -> Tensor:
    """Mean squared error over channels and pixels, (B,) float64 in [0, 1]."""
    reconstruction, truth = _pair(reconstruction, truth)
    return (reconstruction - truth).square().flatten(1).mean(dim=1)


def psnr_db(reconstruction: Tensor, truth: Tensor) -> Tensor:
    """Peak signal-to-noise ratio with peak 1, (B,) in dB in [0, 200]: an offset of 0.1 is 20 dB. See MSE_FLOOR."""
    return -10.0 * mse(reconstruction, truth).clamp(min=MSE_FLOOR).log10()


def ssim(reconstruction: Tensor, truth: Tensor) -> Tensor:
    """Structural similarity, (B,) in [-1, 1], mean over channels.

    Source: Wang et al., "Image quality assessment: from error visibility to structural similarity", IEEE TIP 2004, as
    scikit-image computes it with the paper's settings (Gaussian window of sigma 1.5, biased covariance, data range 1).
    Raises NotApplicable where a side is shorter than the window (11 pixels).
    """
    reconstruction, truth = _pair(reconstruction, truth)
    height, width = truth.shape[-2:]
    if min(height, width) < SSIM_WINDOW:
        raise NotApplicable(must("image sides for SSIM", f"at least {SSIM_WINDOW} pixels", f"{height}x{width}"))
    from skimage.metrics import structural_similarity

    values = [
        structural_similarity(
            b,
            a,
            channel_axis=0,
            data_range=1.0,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        for a, b in zip(reconstruction.numpy(), truth.numpy(), strict=True)
    ]
    return torch.tensor(values, dtype=torch.float64)


def lpips(reconstruction: Tensor, truth: Tensor, net: str = "alex") -> Tensor:
    """Learned perceptual distance, (B,), 0 is identical. `net` is alex, vgg or squeeze; grey is repeated to RGB.

    Source: Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", CVPR 2018,
    arXiv:1801.03924, version 0.1 weights of the lpips package; images are scaled to [-1, 1] and never resized.
    Raises NotApplicable for images that are too small or have neither 1 nor 3 channels, and MissingDependency where the
    backbone's file is not on this machine: nothing is ever downloaded.
    """
    if net not in LPIPS_MIN_SIDE:
        raise FedattackError(one_of("net", LPIPS_MIN_SIDE, net))
    reconstruction, truth = _pair(reconstruction, truth)
    channels, height, width = truth.shape[1:]
    if min(height, width) < LPIPS_MIN_SIDE[net]:
        rule = f"at least {LPIPS_MIN_SIDE[net]} pixels"
        raise NotApplicable(must(f"image sides for LPIPS-{net}", rule, f"{height}x{width}"))
    if channels not in (1, 3):
        raise NotApplicable(must("channels for LPIPS", "1 or 3", channels))
    model = _lpips_model(net, _backbone(net))
    scaled = [(2.0 * images.float() - 1.0).expand(-1, 3, -1, -1) for images in (reconstruction, truth)]
    pairs = zip(*(torch.split(images, LPIPS_CHUNK) for images in scaled), strict=True)
    with torch.no_grad():
        chunks = [model(a, b).flatten().double() for a, b in pairs]
    return torch.cat(chunks) if chunks else torch.zeros(0, dtype=torch.float64)


def perceptual_features(images: Tensor) -> tuple[Tensor, ...]:
    """Activations of the SqueezeNet behind LPIPS, first to seventh, (B,C_i,H_i,W_i) float32, of images (B,3,H,W).

    Raises as `lpips` does.
    """
    if min(images.shape[-2:]) < LPIPS_MIN_SIDE["squeeze"] or images.shape[1] != 3:
        rule = f"(B,3,H,W) with sides of at least {LPIPS_MIN_SIDE['squeeze']} pixels"
        raise NotApplicable(must("images for SqueezeNet", rule, tuple(images.shape)))
    model = _lpips_model("squeeze", _backbone("squeeze"))
    scale, layers = model.get_submodule("scaling_layer"), model.get_submodule("net")
    with torch.no_grad():
        chunks = [layers(scale(2.0 * part.float() - 1.0)) for part in torch.split(images, LPIPS_CHUNK)]
    return tuple(torch.cat(layer) for layer in zip(*chunks, strict=True))


def label_accuracy(estimated: Tensor, truth: Tensor) -> float:
    """Fraction of the true labels that were found, in [0, 1], both as multisets: the order inside a batch leaves no
    trace in a gradient. One estimate counts for one true label, and where there are more estimates than true labels the
    fraction is that of the estimates.
    """
    return _found_of(estimated, truth, "labels")


def timestep_accuracy(estimated: Tensor, truth: Tensor) -> float:
    """Fraction of the true timesteps of a diffusion client (those of all its local steps) that were found, in [0, 1].

    As multisets, which is how `label_accuracy` counts: which image a timestep belonged to does not matter. A miss by one
    counts as a miss.
    """
    return _found_of(estimated, truth, "timesteps")


def _found_of(estimated: Tensor, truth: Tensor, what: str) -> float:
    guesses, wanted = Counter(estimated.flatten().tolist()), Counter(truth.flatten().tolist())
    if not wanted:
        raise NotApplicable(f"there are no true {what} to compare with")
    return (guesses & wanted).total() / max(guesses.total(), wanted.total())


# ------------------------------------------------------------------------------------------------ matching
def match_batch(reconstruction: Tensor, truth: Tensor) -> Tensor:
    """Which reconstruction belongs to which true image, (B,) int64, B = len(truth): the assignment of least MSE.

    reconstruction[match] corresponds to truth. With more reconstructions than true images the best-fitting ones are
    taken (a favour to the attack, so an attack that returns more must say so); with fewer, -1 stands at the true images
    that nothing was assigned to. Both batches may have any size, the images must have one shape.
    """
    from scipy.optimize import linear_sum_assignment

    _same_shape(reconstruction, truth)
    match = torch.full((len(truth),), -1, dtype=torch.int64)
    if len(reconstruction) and len(truth):
        rows, columns = linear_sum_assignment(_distances(truth, reconstruction).numpy())
        match[torch.from_numpy(rows)] = torch.from_numpy(columns)
    return match


def matched_images(images: Tensor, assignment: Sequence[int]) -> list[Tensor | None]:
    """The images (C,H,W) in the order of the truth, None where `match_batch` gave -1: the figures' order."""
    return [images[index] if index >= 0 else None for index in assignment]


# ------------------------------------------------------------------------------------------------ all of it
PerImage = tuple[float | None, ...]


@dataclass(frozen=True, slots=True)
class Scores:
    """All numbers of one reconstruction. Per-image tuples follow the truth's order, None where it has no counterpart.

    A metric that could not be computed is None (or not in `lpips`) and its reason is in `missing`, under "psnr_db",
    "mse", "ssim", "lpips-<net>", "label_accuracy" or "timestep_accuracy"; the last is in no row of a task without timesteps.
    `missing["images"]` counts true images without a counterpart, or says that the attack makes no images.

    One image that stands for a batch is compared with every true image: `assignment` is 0 throughout, nothing is selected.
    `representative` (None for all other reconstructions) then holds `nearest`, the index of the true image of least MSE,
    `nearest_psnr_db`, a choice made with the truth in hand, and `batch_mean_psnr_db`, to the mean of the true images.
    """

    mse: PerImage | None
    psnr_db: PerImage | None
    ssim: PerImage | None
    lpips: dict[str, PerImage]
    label_accuracy: float | None
    assignment: tuple[int, ...]
    missing: dict[str, str] = field(default_factory=dict)
    representative: dict[str, float] | None = None
    timestep_accuracy: float | None = None

    def as_row(self) -> dict[str, Any]:
        """The fields of a result row, ready for JSON; those of some tasks and attacks only where they say something."""
        row = asdict(self)
        silent = {name for name in ("representative", "timestep_accuracy") if row[name] is None}
        if "timestep_accuracy" in self.missing:
            silent -= {"timestep_accuracy"}
        return {key: row[key] for key in row if key not in silent}


def score(
    reconstruction: Reconstruction,
    truth_images: Tensor,
    truth_labels: Tensor | None,
    *,
    truth_timesteps: Tensor | None = None,
    lpips_nets: Sequence[str] = ("squeeze",),
) -> Scores:
    """Match the reconstruction (R,C,H,W) to the truth (B,C,H,W) and compute every metric that can be computed.

    truth_timesteps: those of all local steps of a diffusion client. Raises FedattackError for pixels that are not finite or not
    in [0, 1], and for images of another shape: such a reconstruction breaks the attack's contract, and no number would mean
    anything.
    """
    images, truth = _checked("reconstruction", reconstruction.images), _checked("truth", truth_images)
    if one_for_all := reconstruction.represents == "user":
        if len(images) != 1:
            raise FedattackError(must("images that represent a user", "exactly one", len(images)))
        _same_shape(images, truth)
        assignment = torch.zeros(len(truth), dtype=torch.int64)
    else:
        assignment = match_batch(images, truth)
    missing: dict[str, str] = {}
    if placeholders := reconstruction.represents == "timesteps":
        assignment = torch.full_like(assignment, -1)
    found = (assignment >= 0).nonzero().flatten()
    if placeholders:
        missing["images"] = NO_IMAGES
    elif len(found) < len(truth):
        missing["images"] = f"{len(truth) - len(found)} of {len(truth)} true images have no reconstruction"

    def per_image(name: str, metric: Callable[[Tensor, Tensor], Tensor]) -> PerImage | None:
        if len(found) == 0:
            missing[name] = NO_IMAGES if placeholders else "there is no pair of images to compare"
            return None
        try:
            values = metric(images[assignment[found]], truth[found])
        except (NotApplicable, MissingDependency) as reason:
            missing[name] = str(reason)
            return None
        if not bool(values.isfinite().all()):
            missing[name] = "the metric gave a value that is not finite"
            return None
        numbers: list[float | None] = [None] * len(truth)
        for position, value in zip(found.tolist(), values.tolist(), strict=True):
            numbers[position] = value
        return tuple(numbers)

    accuracy = None
    if one_for_all:
        missing["label_accuracy"] = "one image stands for the batch"
    elif reconstruction.labels is None:
        missing["label_accuracy"] = "the attack estimates no labels"
    elif truth_labels is None or len(truth_labels) == 0:
        missing["label_accuracy"] = "there are no true labels to compare with"
    else:
        accuracy = label_accuracy(reconstruction.labels, truth_labels)
    timesteps = None
    if truth_timesteps is not None and len(truth_timesteps):
        if reconstruction.timesteps is None:
            missing["timestep_accuracy"] = "the attack estimates no timesteps"
        else:
            timesteps = timestep_accuracy(reconstruction.timesteps, truth_timesteps)
    perceptual = {net: per_image(f"lpips-{net}", lambda a, b, net=net: lpips(a, b, net)) for net in lpips_nets}  # type: ignore[misc]
    return Scores(
        mse=per_image("mse", mse),
        psnr_db=per_image("psnr_db", psnr_db),
        ssim=per_image("ssim", ssim),
        lpips={net: values for net, values in perceptual.items() if values is not None},
        label_accuracy=accuracy,
        assignment=tuple(assignment.tolist()),
        missing=missing,
        representative=_representative(images, truth) if one_for_all and len(truth) else None,
        timestep_accuracy=timesteps,
    )


def _representative(image: Tensor, truth: Tensor) -> dict[str, float]:
    """What `Scores.representative` says of one image (1,C,H,W)."""
    each = psnr_db(image.expand(truth.shape), truth)
    return {
        "nearest": int(each.argmax()),
        "nearest_psnr_db": float(each.max()),
        "batch_mean_psnr_db": float(psnr_db(image, batch_mean(truth)[:1])),
    }


def batch_mean(truth: Tensor) -> Tensor:
    """The mean of the true images in place of each, (B,C,H,W) float32: no single image has a smaller mean MSE to them."""
    return truth.detach().cpu().double().mean(dim=0).float().clamp(0.0, 1.0).expand(truth.shape).clone()


def baselines(public_images: Tensor, truth: Tensor, *, generator: torch.Generator) -> dict[str, Tensor]:
    """What costs no attack, as (B,C,H,W) float32 in the truth's order; an attack that scores no better learned nothing.

    mean-image: the pixelwise mean of public_images (N,C,H,W). nearest-public: the public image of least MSE to each
    true image, an oracle retrieval that looks at the truth: a strict bar, not an attack. noise: uniform pixels.
    """
    _same_shape(public_images, truth)
    public, private = _checked("public_images", public_images), _checked("truth", truth)
    if len(public) == 0:
        raise FedattackError(must("public_images", "at least one image", 0))
    nearest = _distances(private, public).argmin(dim=1)
    return {
        "mean-image": public.double().mean(dim=0).float().clamp(0.0, 1.0).expand(private.shape).clone(),
        "nearest-public": public[nearest].float(),
        "noise": torch.rand(private.shape, generator=generator),
    }


# ------------------------------------------------------------------------------------------------ helpers
def _distances(a: Tensor, b: Tensor) -> Tensor:
    """MSE of every pair, (len(a), len(b)) float64."""
    a, b = a.detach().cpu().double(), b.detach().cpu().double()
    if len(a) == 0:
        return torch.zeros(0, len(b), dtype=torch.float64)
    return torch.stack([(b - image).square().flatten(1).mean(dim=1) for image in a])


def _same_shape(reconstruction: Tensor, truth: Tensor) -> None:
    if reconstruction.ndim != 4 or truth.ndim != 4 or reconstruction.shape[1:] != truth.shape[1:]:
        raise FedattackError(must("images", f"(B,C,H,W) like {tuple(truth.shape)}", tuple(reconstruction.shape)))


def _pair(reconstruction: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    if reconstruction.shape != truth.shape or truth.ndim != 4:
        raise FedattackError(
            must("reconstruction", f"of the truth's shape {tuple(truth.shape)}", tuple(reconstruction.shape))
        )
    return reconstruction.detach().cpu().double(), truth.detach().cpu().double()


def _checked(what: str, images: Tensor) -> Tensor:
    images = images.detach().cpu()
    if images.numel() == 0:
        return images
    if not bool(images.isfinite().all()):
        raise FedattackError(must(f"pixels of {what}", "finite", f"{int((~images.isfinite()).sum())} that are not"))
    low, high = float(images.min()), float(images.max())
    if low < 0.0 or high > 1.0:
        raise FedattackError(must(f"pixels of {what}", "in [0, 1]", f"{low:.6g} to {high:.6g}"))
    return images


def _backbone(net: str) -> Path:
    """The torchvision weights that lpips would download, which must be there already."""
    try:
        from torchvision import models
    except ImportError as error:
        raise MissingDependency(f"LPIPS needs torchvision: {error}") from error
    weights = {"alex": models.AlexNet_Weights, "squeeze": models.SqueezeNet1_1_Weights, "vgg": models.VGG16_Weights}
    path = Path(torch.hub.get_dir()) / "checkpoints" / str(weights[net].IMAGENET1K_V1.url).rsplit("/", 1)[-1]
    if not path.is_file():
        raise MissingDependency(
            f"LPIPS-{net} needs torchvision's {path.name}: put it in $TORCH_HOME/hub/checkpoints, or set TORCH_HOME"
        )
    return path


@lru_cache(maxsize=8)
def _lpips_model(net: str, backbone: Path) -> nn.Module:
    """The network in eval mode. Its layers draw weights that are then overwritten: the global generator is kept."""
    try:
        from lpips import LPIPS
    except ImportError as error:
        raise MissingDependency(f"LPIPS needs the package lpips: {error}") from error
    with warnings.catch_warnings(), seeded_default_generator(0):
        warnings.simplefilter("ignore")
        model: nn.Module = LPIPS(net=net, verbose=False)
    return model.eval().requires_grad_(False)

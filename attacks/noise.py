"""What an attacker who knows the noise on an update, and that pictures are smooth, may add to a least-squares problem.

Maximum a posteriori for Gaussian noise: with weights that are the same for all entries the data term is already whitened,

    ‖simulated − observed‖²/σ²  +  Σ 2·|d_i|/b          d: differences of neighbouring pixels, Laplace of mean size b

Source: Rudin, Osher, Fatemi, Physica D 60 (1992) for total variation; b is no free weight but read off public images.
"""

import math

import torch
from torch import Tensor

from fedattack.errors import FedattackError
from fedattack.registry import parse_spec
from fedattack.tasks import STATISTICS
from fedattack.types import Knowledge, Update

MEAN_DIFFERENCE = 0.05
"""b where no public images are known: between that of 32×32 photographs (0.03 to 0.06) and of thumbnails (0.08)."""

KINK = 0.2
"""|d| is rounded below this share of b, so that a least-squares solver can differentiate it."""


def noise_level(update: Update, knowledge: Knowledge) -> float:
    """Standard deviation of the Gaussian noise on every entry of the (pseudo-)gradient, as the known defense says it; else 0.

    What is said relative to the update's own rms is turned into units by the rms that was observed, noise included. Where
    weights were sent, the noise was on their difference, and the learning rate must be known to say what that means.
    """
    parts = [] if knowledge.defense is None else [parse_spec(part) for part in knowledge.defense.split(" + ")]
    variance = 0.0
    for name, parameters in parts:
        if name != "gaussian-noise":
            continue
        sigma = float(parameters.get("sigma", 0.0))
        if parameters.get("relative"):
            noisy = [tensor for name, tensor in update.gradient(None).items() if not name.endswith(STATISTICS)]
            squares = sum(float(tensor.double().square().sum()) for tensor in noisy)
            count = sum(tensor.numel() for tensor in noisy)
            sigma *= math.sqrt(squares / count / (1.0 + sigma**2))
        variance += sigma**2
    scale = 1.0
    if update.kind == "weights" and variance > 0:
        if knowledge.learning_rate is None:
            raise FedattackError("learning_rate must be known to turn noise on weights into noise on a gradient")
        scale = 1.0 / knowledge.learning_rate
    return scale * math.sqrt(variance)


def clip_norm(update: Update, knowledge: Knowledge) -> float | None:
    """The norm to which the known defense clips the (pseudo-)gradient before any noise, None where it does not."""
    parts = [] if knowledge.defense is None else [parse_spec(part) for part in knowledge.defense.split(" + ")]
    found: float | None = None
    for name, parameters in parts:
        if name == "gaussian-noise":
            break
        if name == "norm-clipping":
            most = float(parameters["max_norm"])
            found = most if found is None else min(found, most)
    if found is None or update.kind == "gradient":
        return found
    if knowledge.learning_rate is None:
        raise FedattackError("learning_rate must be known to turn a clipped difference of weights into a gradient")
    return found / knowledge.learning_rate


def differences(images: Tensor) -> Tensor:
    """All differences of neighbouring pixels, down then right, in one vector; images (…,H,W)."""
    down, right = images[..., 1:, :] - images[..., :-1, :], images[..., 1:] - images[..., :-1]
    return torch.cat([down.reshape(-1), right.reshape(-1)])


def mean_difference(knowledge: Knowledge) -> float:
    """b: the mean |difference| of neighbouring pixels of the public images, or a constant where there are none."""
    if knowledge.public_images is None or len(knowledge.public_images) == 0:
        return MEAN_DIFFERENCE
    found = differences(knowledge.public_images.double())
    return max(float(found.abs().mean()), 1e-3) if len(found) else MEAN_DIFFERENCE


def variation_rows(images: Tensor, size: float) -> Tensor:
    """Residuals whose sum of squares is Σ |d|/size, rounded near zero."""
    found = differences(images)
    return found * _slopes(found, size)


def variation_slopes(images: Tensor, size: float) -> Tensor:
    """Factors w of the quadratic bound Σ (w·d)² that touches Σ |d|/size at these images (iteratively reweighted)."""
    return _slopes(differences(images), size)


def _slopes(found: Tensor, size: float) -> Tensor:
    return (size * (found.square() + (KINK * size) ** 2).sqrt()).rsqrt()

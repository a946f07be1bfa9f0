"""Independent component analysis: linear mixtures of signals taken apart by how little Gaussian each part is.

Source: Hyvärinen, Fast and robust fixed-point algorithms for independent component analysis, IEEE TNN 10, 1999 (symmetric
decorrelation, g = tanh).
"""

import torch
from torch import Tensor


def unmix(mixtures: Tensor, *, iterations: int, tolerance: float, generator: torch.Generator) -> Tensor:
    """Unmixing matrix (r, r) of mixtures (r, N); the rows of unmixing @ mixtures have unit variance.

    Mixtures must be linearly independent after their means are taken off. Order and signs of the components are arbitrary.
    """
    rank, length = mixtures.shape
    centred = mixtures - mixtures.mean(1, keepdim=True)
    left, singular, right = torch.linalg.svd(centred, full_matrices=False)
    white = right * length**0.5
    whitening = (left / singular.clamp_min(torch.finfo(singular.dtype).tiny)).T * length**0.5
    start = torch.randn(rank, rank, generator=generator, dtype=torch.float64).to(mixtures)
    rotation: Tensor = torch.linalg.qr(start).Q
    for _ in range(iterations):
        bent = torch.tanh(rotation @ white)
        update = bent @ white.T / length - (1.0 - bent.square()).mean(1, keepdim=True) * rotation
        u, _, v = torch.linalg.svd(update)
        turned = u @ v
        moved = float(((turned * rotation).sum(1).abs() - 1.0).abs().max())
        rotation = turned
        if moved < tolerance:
            break
    unmixing: Tensor = rotation @ whitening
    return unmixing


def differences(pictures: Tensor) -> Tensor:
    """Horizontal and vertical differences of neighbouring pixels, (…, C, H, W) -> (…, n).

    Photographs depend on one another (all are brighter above); their edges hardly do, and are far less Gaussian.
    """
    across = (pictures[..., 1:] - pictures[..., :-1]).flatten(-3)
    down = (pictures[..., 1:, :] - pictures[..., :-1, :]).flatten(-3)
    return torch.cat([across, down], -1)

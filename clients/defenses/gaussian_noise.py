"""Gaussian noise: every coordinate of the update gets independent N(0, σ²).

Source: the additive-noise defense of Zhu et al., DLG (arXiv 1906.08935), section 5.1, who quote the VARIANCE, as GG-CDM does.
Differs from it: both are written down here and in every result row: `sigma` is the standard deviation, its square the
variance ("variance 0.01" of those papers is sigma = 0.1). There is no clipping, hence no differential-privacy guarantee:
put norm-clipping before it and account for the pair.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from fedattack.errors import FedattackError, must
from fedattack.types import Defense, State


@dataclass(frozen=True)
class GaussianNoise(Defense):
    """Adds N(0, sigma²) to every coordinate of the gradient (fedsgd) or of the weight difference (fedavg).

    relative: sigma is then a multiple of the update's own root mean square over all coordinates.
    """

    name: ClassVar[str] = "gaussian-noise"

    sigma: float
    relative: bool = False

    def __post_init__(self) -> None:
        if not self.sigma >= 0:
            raise FedattackError(must("sigma", "at least 0", self.sigma))

    def on_update(self, update: State, *, sent: State, generator: torch.Generator) -> State:
        scale = self.sigma * (root_mean_square(update) if self.relative else 1.0)
        return {
            name: tensor + scale * torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype).to(tensor.device)
            for name, tensor in update.items()
        }

    def describe(self) -> dict[str, Any]:
        if self.relative:
            return {"noise_std_over_update_rms": self.sigma}
        return {"noise_std": self.sigma, "noise_variance": self.sigma**2}


def root_mean_square(update: State) -> float:
    """Over all coordinates of all tensors."""
    total = sum(float(tensor.double().square().sum()) for tensor in update.values())
    return float((total / sum(tensor.numel() for tensor in update.values())) ** 0.5)

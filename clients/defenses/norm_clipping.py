"""Norm clipping: the whole update is scaled down to a Euclidean norm of at most C.

Source: Abadi et al., "Deep Learning with Differential Privacy", CCS 2016 (arXiv 1607.00133), Algorithm 1; per client as in
McMahan et al. 2018 (arXiv 1710.06963).
Differs from it: one norm over all tensors of one client's update (not per example), which is what a server receives.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from fedattack.errors import FedattackError, must
from fedattack.types import Defense, State


@dataclass(frozen=True)
class NormClipping(Defense):
    """update · min(1, max_norm / ‖update‖₂)."""

    name: ClassVar[str] = "norm-clipping"

    max_norm: float

    def __post_init__(self) -> None:
        if not self.max_norm > 0:
            raise FedattackError(must("max_norm", "above 0", self.max_norm))

    def on_update(self, update: State, *, sent: State, generator: torch.Generator) -> State:
        norm = sum(float(tensor.double().square().sum()) for tensor in update.values()) ** 0.5
        factor = min(1.0, self.max_norm / norm) if norm > 0 else 1.0
        return {name: tensor * factor for name, tensor in update.items()}

    def describe(self) -> dict[str, Any]:
        return {"clip_norm": self.max_norm}

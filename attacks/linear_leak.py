"""Linear leak: the first dense layer's weight gradient divided by its bias gradient is the image itself.

Source: Phong et al., "Privacy-Preserving Deep Learning via Additively Homomorphic Encryption", IEEE TIFS 2018 (Eq. 3-4);
Geiping et al. 2020 (arXiv 2003.14053), Proposition 3.1.
Differs from it: all rows are used in one least-squares estimate, x̂ = Σ_i g_i ∇W_i / Σ_i g_i² with g = ∂L/∂b, which is exact
without noise and the best unbiased linear estimate where the noise of ∇W dominates; whatever elementwise map (the
normalisation) lies between image and layer is measured by three probes and inverted; in batches, rows that agree with one
another belong to one image alone and give it exactly, other rows are mixtures and are labelled as such.
"""

from dataclasses import dataclass
from time import perf_counter
from typing import ClassVar

import torch
from torch import Tensor, nn

from attacks.image_layer import image_layer
from fedattack.errors import NotApplicable
from fedattack.tasks import Task
from fedattack.types import Knowledge, Progress, Reconstruction, Update, silent


@dataclass(frozen=True)
class LinearLeak:
    """Closed form for one image behind a dense layer that sees it; exclusive rows for batches.

    agreement: relative distance below which two rows of a batch count as the same image.
    """

    name: ClassVar[str] = "linear-leak"
    needs: ClassVar[frozenset[str]] = frozenset({"image_shape", "batch_size"})
    tasks: ClassVar[frozenset[str]] = frozenset({"classification"})

    agreement: float = 1e-5

    def reconstruct(
        self,
        update: Update,
        model: nn.Module,
        task: Task,
        knowledge: Knowledge,
        *,
        generator: torch.Generator,
        progress: Progress = silent,
    ) -> Reconstruction:
        begun = perf_counter()
        assert knowledge.image_shape is not None
        assert knowledge.batch_size is not None
        found = image_layer(model, update.sent, knowledge.image_shape, generator)
        layer = found.name
        gradient = update.gradient(knowledge.learning_rate)
        if missing := {f"{layer}.weight", f"{layer}.bias"} - set(gradient):
            raise NotApplicable(f"the update does not hold {' and '.join(sorted(missing))}")
        weight, bias = gradient[f"{layer}.weight"].double(), gradient[f"{layer}.bias"].double()
        if not bias.abs().max() > 0:
            raise NotApplicable(f"the bias gradient of layer {layer!r} is zero: no row of it saw the image")
        if knowledge.batch_size == 1:
            inputs = (bias @ weight / bias.square().sum())[None]
            residual = weight - bias[:, None] * inputs
            diagnostics = {"relative_residual": float(residual.norm() / weight.norm()), "exclusive_images": 1.0}
        else:
            inputs, exclusive = _exclusive_rows(weight, bias, knowledge.batch_size, self.agreement)
            if found.outputs < 3:
                exclusive = 0  # with two classes every row mixes two images in one proportion: agreement proves nothing
            diagnostics = {"exclusive_images": float(exclusive)}
        images = ((inputs - found.offset) / found.slope).reshape(-1, *knowledge.image_shape).clamp(0.0, 1.0)
        progress(1, 1, diagnostics.get("relative_residual", 0.0))
        return Reconstruction(images=images, steps=1, seconds=perf_counter() - begun, diagnostics=diagnostics)


def _exclusive_rows(weight: Tensor, bias: Tensor, batch: int, agreement: float) -> tuple[Tensor, int]:
    """Layer inputs (batch, D): groups of agreeing rows first (each is one image), then the strongest other rows."""
    active = bias.abs() > 1e-12 * bias.abs().max()
    rows, strength = weight[active] / bias[active, None], bias[active].abs()
    close = torch.cdist(rows, rows) < agreement * rows.norm(dim=1, keepdim=True)
    left = strength.clone()
    groups: list[tuple[int, Tensor]] = []
    while len(groups) < len(rows) and left.max() > 0:
        strongest = int(left.argmax())
        members = close[strongest] & (left > 0)
        members[strongest] = True
        groups.append((int(members.sum()), (strength[members, None] * rows[members]).sum(0) / strength[members].sum()))
        left[members] = 0.0
    groups.sort(key=lambda group: -group[0])  # stable: among equals the strongest row stays first
    chosen = groups[:batch]
    exclusive = sum(count > 1 for count, _ in chosen)
    fill = [chosen[i % len(chosen)] for i in range(batch)]
    return torch.stack([row for _, row in fill]), exclusive

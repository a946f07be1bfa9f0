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

from fedattack.errors import NotApplicable
from fedattack.seeding import seeded_default_generator
from fedattack.tasks import Task, bind
from fedattack.types import Knowledge, Progress, Reconstruction, State, Update, silent


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


@dataclass(frozen=True)
class ImageLayer:
    """A dense layer that sees slope·image + offset, pixel by pixel, (D,) each, in a model with so many outputs."""

    name: str
    slope: Tensor
    offset: Tensor
    outputs: int


def whole_state(model: nn.Module, sent: State) -> State:
    """Copies of `sent` and of the buffers it lacks, in float64: running a model on them in any mode changes neither."""
    some = next(t for t in sent.values() if t.is_floating_point())
    state = {name: tensor.detach().to(some.device) for name, tensor in model.named_buffers()} | dict(sent)
    return {name: t.to(torch.float64, copy=True) if t.is_floating_point() else t.clone() for name, t in state.items()}


def image_layer(model: nn.Module, sent: State, shape: tuple[int, int, int], generator: torch.Generator) -> ImageLayer:
    """The first dense layer whose input is an elementwise affine map of the image.

    The map is read off a black and a white image and checked on a random one. Raises NotApplicable where no layer is such.
    """
    pixels = shape[0] * shape[1] * shape[2]
    some = next(t for t in sent.values() if t.is_floating_point())
    probes = torch.stack([torch.zeros(shape), torch.ones(shape), torch.rand(shape, generator=generator)])
    state = whole_state(model, sent)
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or module.bias is None or module.in_features != pixels:
            continue
        seen: list[Tensor] = []
        handle = module.register_forward_pre_hook(lambda _module, inputs, seen=seen: seen.append(inputs[0].detach()))
        try:
            with torch.no_grad(), seeded_default_generator(0):
                outputs = bind(model, state)(probes.to(some.device, torch.float64)).shape[-1]
        finally:
            handle.remove()
        black, white, random = seen[0].reshape(3, -1)
        slope, offset = white - black, black
        predicted = slope * probes[2].reshape(-1).to(slope) + offset
        if slope.abs().min() > 0 and torch.allclose(predicted, random, rtol=1e-6, atol=1e-6):
            return ImageLayer(name, slope, offset, outputs)
    raise NotApplicable("no dense layer with a bias sees the image itself (only through convolutions or not at all)")


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

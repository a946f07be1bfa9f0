"""The dense layer that sees the image itself, pixel by pixel: whatever elementwise map lies before it is measured."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedattack.errors import NotApplicable
from fedattack.seeding import seeded_default_generator
from fedattack.tasks import bind
from fedattack.types import State


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

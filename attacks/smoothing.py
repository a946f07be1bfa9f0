"""Smooth copies of models with ReLUs: what a continuation starts from where a gradient jumps.

A client's gradient jumps wherever a unit of a piecewise linear activation switches, and a Newton step sees nothing of a
jump. Averaged over Gaussian noise of standard deviation w on its input, the same activation is smooth:

    E[relu(z + w·n)] = z·Φ(z/w) + w·φ(z/w)

Source: graduated optimisation (Blake and Zisserman, Visual Reconstruction, 1987; Mobahi and Fisher, AAAI 2015).
Differs from it: the activations are smoothed one by one, not the whole cost.
"""

import copy
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fedattack.tasks import bind
from fedattack.types import State

SMALLEST = 1e-12
"""A width below this share of one is that of a unit which never sees anything: it is left sharp."""


class SmoothReLU(nn.Module):
    """(Leaky) ReLU averaged over N(0, width²) on its input; width > 0."""

    def __init__(self, width: float, negative_slope: float = 0.0) -> None:
        super().__init__()
        self.width, self.negative_slope = width, negative_slope

    def forward(self, input: Tensor) -> Tensor:
        z = input / self.width
        density = torch.exp(-0.5 * z * z) / math.sqrt(2.0 * math.pi)
        mean = input * torch.special.ndtr(z) + self.width * density
        out: Tensor = self.negative_slope * input + (1.0 - self.negative_slope) * mean
        return out


def kinks(model: nn.Module) -> list[str]:
    """Names of the modules that `smoothed` can replace, empty for a smooth model; all names of one at several places.

    ReLUs called as functions are not seen.
    """
    modules = model.named_modules(remove_duplicate=False)
    return [name for name, module in modules if name and isinstance(module, nn.ReLU | nn.LeakyReLU)]


def spreads(model: nn.Module, state: State, images: Tensor) -> dict[str, float]:
    """Standard deviation of what each of the `kinks` is given for images (B,C,H,W): the scale of its widths."""
    twin = copy.deepcopy(model)
    seen: dict[str, list[float]] = {name: [] for name in kinks(twin)}

    def listen(name: str) -> None:
        def heard(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen[name].append(float(inputs[0].var(correction=0)))

        twin.get_submodule(name).register_forward_pre_hook(heard)

    for name in seen:
        listen(name)
    with torch.no_grad():
        bind(twin, {name: tensor.clone() for name, tensor in state.items()})(images)
    return {name: math.sqrt(sum(found) / len(found)) for name, found in seen.items() if found}


def smoothed(model: nn.Module, widths: Mapping[str, float]) -> nn.Module:
    """A copy with these of its `kinks` smoothed, same parameters and buffers by the same names; the model is untouched."""
    twin = copy.deepcopy(model)
    for name, width in widths.items():
        if not width > SMALLEST:
            continue
        old = twin.get_submodule(name)
        slope = old.negative_slope if isinstance(old, nn.LeakyReLU) else 0.0
        parent, _, leaf = name.rpartition(".")
        setattr(twin.get_submodule(parent), leaf, SmoothReLU(width, slope))
    return twin

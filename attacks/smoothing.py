"""Smoother copies of models with ReLUs, GELUs or SiLUs: what a continuation starts from where a gradient jumps, or turns soon.

A client's gradient jumps wherever a unit of a piecewise linear activation switches, and a Newton step sees nothing of a
jump. Averaged over Gaussian noise of standard deviation w on its input, the same activation is smooth:

    E[f(z + w·n)] = z·Φ(z/s) + w²/s·φ(z/s),  s² = c² + w²        f(z) = z·Φ(z/c): ReLU (c = 0), GELU (1), nearly SiLU (1.702)

Source: graduated optimisation (Blake and Zisserman, Visual Reconstruction, 1987; Mobahi and Fisher, AAAI 2015).
Differs from it: the activations are smoothed one by one, not the whole cost.
"""

import copy
import math
from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedattack.tasks import bind
from fedattack.types import State

SMALLEST = 1e-12
"""A width below this share of one is that of a unit which never sees anything: it is left sharp."""


CURVED: dict[type[nn.Module], float] = {nn.GELU: 1.0, nn.SiLU: 1.702}
"""c of smooth activations. A logistic function is within 0.01 of a normal one that is as much wider; the rest is added."""


class Averaged(nn.Module):
    """An activation z·Φ(z/curve) averaged over N(0, width²) on its input; curve 0: (leaky) ReLU, where width > 0.

    own: an activation that this nearly is: the same is added to it as to z·Φ(z/curve).
    """

    def __init__(
        self,
        width: float,
        negative_slope: float = 0.0,
        curve: float = 0.0,
        own: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.width, self.negative_slope, self.curve, self.own = width, negative_slope, curve, own

    def forward(self, input: Tensor) -> Tensor:
        size = math.hypot(self.curve, self.width)
        z = input / size
        density = torch.exp(-0.5 * z * z) / math.sqrt(2.0 * math.pi)
        mean = input * torch.special.ndtr(z) + self.width**2 / size * density
        if self.own is not None:
            mean = self.own(input) + (mean - input * torch.special.ndtr(input / self.curve))
        out: Tensor = self.negative_slope * input + (1.0 - self.negative_slope) * mean
        return out


def kinks(model: nn.Module) -> list[str]:
    """Names of the modules at which gradients jump, empty for a smooth model; all names of one at several places.

    ReLUs called as functions are not seen.
    """
    return _named(model, (nn.ReLU, nn.LeakyReLU))


def bends(model: nn.Module) -> list[str]:
    """Names of the modules that `smoothed` can replace: kinks, GELUs and SiLUs."""
    return _named(model, (nn.ReLU, nn.LeakyReLU, *CURVED))


def _named(model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> list[str]:
    modules = model.named_modules(remove_duplicate=False)
    return [name for name, module in modules if name and isinstance(module, kinds)]


def spreads(model: nn.Module, state: State, images: Tensor) -> dict[str, float]:
    """Standard deviation of what each of the `bends` is given for images (B,C,H,W): the scale of its widths."""
    twin = copy.deepcopy(model)
    seen: dict[str, list[float]] = {name: [] for name in bends(twin)}

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
    """A copy with these of its `bends` smoothed, same parameters and buffers by the same names; the model is untouched."""
    twin = copy.deepcopy(model)
    for name, width in widths.items():
        if not width > SMALLEST:
            continue
        old = twin.get_submodule(name)
        slope = old.negative_slope if isinstance(old, nn.LeakyReLU) else 0.0
        curve = next((curve for kind, curve in CURVED.items() if isinstance(old, kind)), 0.0)
        parent, _, leaf = name.rpartition(".")
        setattr(twin.get_submodule(parent), leaf, Averaged(width, slope, curve, _own(old)))
    return twin


def _own(activation: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """It, not in place; None where z·Φ(z/c) is the same."""
    if isinstance(activation, nn.SiLU):
        return F.silu
    if isinstance(activation, nn.GELU) and activation.approximate != "none":
        return partial(F.gelu, approximate=activation.approximate)
    return None

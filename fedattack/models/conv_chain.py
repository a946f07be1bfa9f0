"""Chains of convolutions and activations before a dense layer: the victims of analytic inversion.

Source: Eltaras et al., R-CONV, arXiv 2406.04227 (the five networks of its published code: 5×5 kernels, padding 2, LeakyReLU
slope 0.2, weights and biases U(−0.5, 0.5), one dense layer).
Differs from it: normalises inside the model (mean 0 and std 1 leave images as they are, as there); any image size and number
of classes; filters, strides, kernels, activations, dense layers, batch normalisation and initialisation can be chosen.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from fedattack.errors import FedattackError, must
from fedattack.models.layers import Normalize, PerChannel, activation_layer, classes, known, norm_layer, shape3

INITS = {"r-conv": "all weights and biases U(−0.5, 0.5)", "default": "PyTorch's own"}


@dataclass(frozen=True)
class Architecture:
    """Filters, strides and activations of the convolutions, first to last."""

    filters: tuple[int, ...]
    strides: tuple[int, ...]
    activation: tuple[str, ...]


LEAKY, RELU = "leaky-relu", "relu"
ARCHITECTURES = {
    "letnet": Architecture((12, 16, 12, 12), (2, 2, 1, 1), (LEAKY, LEAKY, RELU, RELU)),
    "letnet-o": Architecture((12, 16, 3, 3), (2, 2, 1, 1), (LEAKY, LEAKY, RELU, RELU)),
    "o-cnn6": Architecture((12, 16, 3, 3, 3, 3), (2, 2, 1, 1, 1, 1), (LEAKY, LEAKY, RELU, RELU, RELU, RELU)),
    "letnet-4-relu": Architecture((12, 22, 3, 3), (2, 2, 1, 1), (LEAKY, RELU, RELU, RELU)),
    "letnet-all-relu": Architecture((77, 22, 3, 3), (2, 2, 1, 1), (RELU, RELU, RELU, RELU)),
}
"""LetNet, LetNet_O, O_CNN6, LetNet-4-Relu and LetNet-All-Relu of the published code."""

PerLayer = int | Sequence[int]


def conv_chain(
    image_shape: Sequence[int],
    num_classes: int | None,
    architecture: str = "letnet",
    filters: Sequence[int] | None = None,
    strides: PerLayer | None = None,
    activation: str | Sequence[str] | None = None,
    kernels: PerLayer = 5,
    paddings: PerLayer | None = None,
    dense: Sequence[int] = (),
    norm: str = "none",
    slope: float = 0.2,
    init: str = "r-conv",
    mean: PerChannel = 0.5,
    std: PerChannel = 0.5,
) -> nn.Sequential:
    """Convolutions by the name of an architecture, or by lists of one's own; `dense` are widths of ReLU layers behind them.

    filters: replaces the architecture; strides (default 1) and activation (default "relu") are then one for all or one per
    convolution, as kernels and paddings (default: kernel // 2) always are. slope: of LeakyReLUs.
    init: "r-conv" (U(−0.5, 0.5)) or "default" (PyTorch's).
    """
    channels, height, width = shape3(image_shape)
    known("init", INITS, init)
    plan: Architecture = ARCHITECTURES[known("architecture", ARCHITECTURES, architecture)]
    if filters is None:
        filters, strides, activation = plan.filters, strides or plan.strides, activation or plan.activation
    count = len(filters)
    names = [activation or RELU] * count if activation is None or isinstance(activation, str) else list(activation)
    steps = per_layer("strides", strides or 1, count)
    sides = per_layer("kernels", kernels, count)
    around = per_layer("paddings", [side // 2 for side in sides] if paddings is None else paddings, count)
    if len(names) != count:
        raise FedattackError(must("activation", f"one name or {count} (one per convolution)", activation))
    layers: list[tuple[str, nn.Module]] = [("normalize", Normalize(channels, mean, std))]
    before = channels
    for i, (out, stride, name, side, padding) in enumerate(zip(filters, steps, names, sides, around, strict=True)):
        layers.append((f"conv{i}", nn.Conv2d(before, out, side, stride=stride, padding=padding)))
        if norm != "none":
            layers.append((f"norm{i}", norm_layer(norm, out)))
        layers.append((f"act{i}", nn.LeakyReLU(slope) if name == LEAKY else activation_layer(name)))
        height, width = ((size + 2 * padding - side) // stride + 1 for size in (height, width))
        if min(height, width) < 1:
            raise FedattackError(must("the image", f"larger than the kernel of conv{i}", tuple(image_shape)))
        before = out
    layers.append(("flatten", nn.Flatten()))
    features = before * height * width
    for i, size in enumerate(dense):
        layers += [(f"linear{i}", nn.Linear(features, size)), (f"relu{i}", activation_layer(RELU))]
        features = size
    layers.append(("head", nn.Linear(features, classes(num_classes))))
    model = nn.Sequential(OrderedDict(layers))
    if init == "r-conv":
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                for parameter in module.parameters():
                    nn.init.uniform_(parameter, -0.5, 0.5)
    return model


def per_layer(what: str, value: PerLayer, count: int) -> list[int]:
    """One whole number for each of `count` layers."""
    values = [value] * count if isinstance(value, int) else list(value)
    if len(values) != count:
        raise FedattackError(must(what, f"one number or {count} (one per convolution)", value))
    return values

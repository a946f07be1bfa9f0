"""Fully connected network: the model whose first layer gives its inputs away.

Source: the victim of analytic attacks, e.g. Geiping et al., Inverting Gradients, NeurIPS 2020, arXiv 2003.14053,
Proposition 3.1 (∂L/∂W divided by ∂L/∂b is the layer's input).
"""

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

from fedattack.models.layers import Normalize, PerChannel, activation_layer, classes, shape3


def mlp(
    image_shape: Sequence[int],
    num_classes: int | None,
    hidden: Sequence[int] = (256, 128),
    activation: str = "relu",
    bias: bool = True,
    mean: PerChannel = 0.5,
    std: PerChannel = 0.5,
) -> nn.Sequential:
    """Normalize, Flatten, then Linear and activation in turn; `hidden=()` is one linear layer."""
    channels, height, width = shape3(image_shape)
    layers: list[tuple[str, nn.Module]] = [("normalize", Normalize(channels, mean, std)), ("flatten", nn.Flatten())]
    before = channels * height * width
    for i, size in enumerate(hidden):
        layers += [(f"linear{i}", nn.Linear(before, size, bias)), (f"act{i}", activation_layer(activation))]
        before = size
    layers.append(("head", nn.Linear(before, classes(num_classes), bias)))
    return nn.Sequential(OrderedDict(layers))

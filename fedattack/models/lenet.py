"""The LeNet of gradient-inversion papers: three 5×5 convolutions and one linear layer, smooth all through.

Source: Zhu, Liu, Han, Deep Leakage from Gradients, NeurIPS 2019, arXiv 1906.08935 (LeNet of its published code).
Differs from it: normalises inside the model; any image size; activation and initialisation can be chosen.
"""

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

from fedattack.models.layers import Normalize, PerChannel, activation_layer, classes, known, shape3

INITS = {"dlg": "all weights and biases U(−0.5, 0.5)", "default": "PyTorch's own"}


def lenet(
    image_shape: Sequence[int],
    num_classes: int | None,
    channels: int = 12,
    activation: str = "sigmoid",
    init: str = "dlg",
    mean: PerChannel = 0.5,
    std: PerChannel = 0.5,
) -> nn.Sequential:
    """Strides 2, 2, 1 with padding 2; `init` "dlg" (weights and biases U(−0.5, 0.5)) or "default" (PyTorch's)."""
    colours, height, width = shape3(image_shape)
    known("init", INITS, init)
    layers: list[tuple[str, nn.Module]] = [("normalize", Normalize(colours, mean, std))]
    before = colours
    for i, stride in enumerate((2, 2, 1)):
        layers.append((f"conv{i}", nn.Conv2d(before, channels, 5, stride=stride, padding=2)))
        layers.append((f"act{i}", activation_layer(activation)))
        before = channels
    features = channels * -(-height // 4) * -(-width // 4)
    layers += [("flatten", nn.Flatten()), ("head", nn.Linear(features, classes(num_classes)))]
    model = nn.Sequential(OrderedDict(layers))
    if init == "dlg":
        for parameter in model.parameters():
            nn.init.uniform_(parameter, -0.5, 0.5)
    return model

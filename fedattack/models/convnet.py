"""Plain stacks of 3×3 convolutions: the ConvNet of Inverting Gradients, and a small one that is quick on a CPU.

Source: Geiping, Bauermeister, Dröge, Moeller, Inverting Gradients, NeurIPS 2020, arXiv 2003.14053 (class ConvNet of its
published code: eight convolutions, two poolings of 3; width 64 in the paper's tables).
Differs from it: average pooling and no batch normalisation by default (both can be chosen); any image size.
"""

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

from fedattack.models.layers import (
    Normalize,
    PerChannel,
    activation_layer,
    classes,
    norm_layer,
    pool_layer,
    shape3,
)

POOL = 0


def convnet(
    image_shape: Sequence[int],
    num_classes: int | None,
    width: int = 64,
    activation: str = "relu",
    norm: str = "none",
    pool: str = "average",
    mean: PerChannel = 0.5,
    std: PerChannel = 0.5,
) -> nn.Sequential:
    """Eight convolutions of width·(1, 2, 2, 4, 4, 4, 4, 4) channels, pooled by 3 after the sixth and the eighth."""
    plan = (1, 2, 2, 4, 4, 4, POOL, 4, 4, POOL)
    return _stack(plan, 3, image_shape, classes(num_classes), width, activation, norm, pool, mean, std)


def convnet_small(
    image_shape: Sequence[int],
    num_classes: int | None,
    width: int = 16,
    activation: str = "relu",
    norm: str = "none",
    pool: str = "average",
    mean: PerChannel = 0.5,
    std: PerChannel = 0.5,
) -> nn.Sequential:
    """Three convolutions of width·(1, 2, 2) channels, pooled by 2 after the first and the second."""
    plan = (1, POOL, 2, POOL, 2)
    return _stack(plan, 2, image_shape, classes(num_classes), width, activation, norm, pool, mean, std)


def _stack(
    plan: tuple[int, ...],
    window: int,
    image_shape: Sequence[int],
    num_classes: int,
    width: int,
    activation: str,
    norm: str,
    pool: str,
    mean: PerChannel,
    std: PerChannel,
) -> nn.Sequential:
    """Sides are floored by the pooling, and a side shorter than the window is pooled to one."""
    channels, height, columns = shape3(image_shape)
    layers: list[tuple[str, nn.Module]] = [("normalize", Normalize(channels, mean, std))]
    convs = pools = 0
    for factor in plan:
        if factor == POOL:
            kernel = (min(window, height), min(window, columns))
            layers.append((f"pool{pools}", pool_layer(pool, kernel_size=kernel)))
            height, columns, pools = height // kernel[0], columns // kernel[1], pools + 1
            continue
        layers.append((f"conv{convs}", nn.Conv2d(channels, factor * width, 3, padding=1, bias=norm != "batch")))
        channels = factor * width
        if norm != "none":
            layers.append((f"norm{convs}", norm_layer(norm, channels)))
        layers.append((f"act{convs}", activation_layer(activation)))
        convs += 1
    layers += [("flatten", nn.Flatten()), ("head", nn.Linear(channels * height * columns, num_classes))]
    return nn.Sequential(OrderedDict(layers))

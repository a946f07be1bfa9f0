"""VGG-11 for small images: eight 3×3 convolutions, five poolings, one linear layer.

Source: Simonyan, Zisserman, Very Deep Convolutional Networks, ICLR 2015, arXiv 1409.1556, configuration A.
Differs from it: one linear layer instead of three (usual at 32×32); average pooling by default (max pooling has kinks).
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
PLAN = (1, POOL, 2, POOL, 4, 4, POOL, 8, 8, POOL, 8, 8, POOL)


def vgg(
    image_shape: Sequence[int],
    num_classes: int | None,
    width: int = 64,
    activation: str = "relu",
    norm: str = "none",
    pool: str = "average",
    mean: PerChannel = 0.5,
    std: PerChannel = 0.5,
) -> nn.Sequential:
    """Channels width·(1, 2, 4, 4, 8, 8, 8, 8). Sides are halved, rounding up; what is left is averaged."""
    channels, _, _ = shape3(image_shape)
    layers: list[tuple[str, nn.Module]] = [("normalize", Normalize(channels, mean, std))]
    convs = pools = 0
    for factor in PLAN:
        if factor == POOL:
            layers.append((f"pool{pools}", pool_layer(pool, kernel_size=2, ceil_mode=True)))
            pools += 1
            continue
        layers.append((f"conv{convs}", nn.Conv2d(channels, factor * width, 3, padding=1, bias=norm != "batch")))
        channels = factor * width
        if norm != "none":
            layers.append((f"norm{convs}", norm_layer(norm, channels)))
        layers.append((f"act{convs}", activation_layer(activation)))
        convs += 1
    layers += [("average", nn.AdaptiveAvgPool2d(1)), ("flatten", nn.Flatten())]
    layers.append(("head", nn.Linear(channels, classes(num_classes))))
    return nn.Sequential(OrderedDict(layers))

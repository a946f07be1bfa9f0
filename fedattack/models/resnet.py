"""ResNet-18 without in-place operations, for small images (stem "cifar") or large ones (stem "imagenet").

Source: He, Zhang, Ren, Sun, Deep Residual Learning, CVPR 2016, arXiv 1512.03385, Table 1. Parameter names and
arithmetic are torchvision's resnet18, whose weights load as they are with stem="imagenet", norm="batch", width=64.
Differs from it: stem "cifar" is one 3×3 convolution without pooling; norm can be "group" or "none".
"""

from collections.abc import Sequence

from torch import Tensor, nn

from fedattack.models.layers import Normalize, PerChannel, activation_layer, classes, known, norm_layer, shape3

STEMS = {"cifar": "3×3 convolution, stride 1", "imagenet": "7×7 convolution, stride 2, then 3×3 max pooling, stride 2"}


class BasicBlock(nn.Module):
    """Two 3×3 convolutions beside a shortcut."""

    def __init__(self, before: int, channels: int, stride: int, norm: str, activation: str) -> None:
        super().__init__()
        bias = norm == "none"
        self.conv1 = nn.Conv2d(before, channels, 3, stride=stride, padding=1, bias=bias)
        self.bn1 = norm_layer(norm, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=bias)
        self.bn2 = norm_layer(norm, channels)
        self.act = activation_layer(activation)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or before != channels:
            shortcut = nn.Conv2d(before, channels, 1, stride=stride, bias=bias)
            self.downsample = nn.Sequential(shortcut, norm_layer(norm, channels))

    def forward(self, x: Tensor) -> Tensor:
        inner = self.bn2(self.conv2(self.act(self.bn1(self.conv1(x)))))
        output: Tensor = self.act(inner + self.downsample(x))
        return output


class ResNet18(nn.Module):
    """Four stages of two blocks with width·(1, 2, 4, 8) channels; (B,C,H,W) in [0, 1] -> logits (B,K)."""

    def __init__(
        self,
        image_shape: Sequence[int],
        num_classes: int | None,
        width: int = 64,
        norm: str = "batch",
        stem: str = "cifar",
        activation: str = "relu",
        mean: PerChannel = 0.5,
        std: PerChannel = 0.5,
    ) -> None:
        super().__init__()
        channels, _, _ = shape3(image_shape)
        bias = norm == "none"
        self.normalize = Normalize(channels, mean, std)
        self.maxpool: nn.Module = nn.Identity()
        if known("stem", STEMS, stem) == "cifar":
            self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=bias)
        else:
            self.conv1 = nn.Conv2d(channels, width, 7, stride=2, padding=3, bias=bias)
            self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.bn1 = norm_layer(norm, width)
        self.act = activation_layer(activation)
        self.layer1 = self._stage(width, width, 1, norm, activation)
        self.layer2 = self._stage(width, 2 * width, 2, norm, activation)
        self.layer3 = self._stage(2 * width, 4 * width, 2, norm, activation)
        self.layer4 = self._stage(4 * width, 8 * width, 2, norm, activation)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8 * width, classes(num_classes))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @staticmethod
    def _stage(before: int, channels: int, stride: int, norm: str, activation: str) -> nn.Sequential:
        first = BasicBlock(before, channels, stride, norm, activation)
        return nn.Sequential(first, BasicBlock(channels, channels, 1, norm, activation))

    def forward(self, images: Tensor) -> Tensor:
        x = self.maxpool(self.act(self.bn1(self.conv1(self.normalize(images)))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.fc(self.avgpool(x).flatten(1))
        return logits

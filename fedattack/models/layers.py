"""Layers that the victim models share: all out of place, twice differentiable and usable under torch.func."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedattack.errors import FedattackError, must, one_of

PerChannel = float | Sequence[float]


class Normalize(nn.Module):
    """(images − mean) / std, one value for all channels or one per channel. Its buffers are not in the state_dict."""

    mean: Tensor
    std: Tensor

    def __init__(self, channels: int, mean: PerChannel = 0.5, std: PerChannel = 0.5) -> None:
        super().__init__()
        for name, value in (("mean", mean), ("std", std)):
            values = [float(value)] * channels if isinstance(value, int | float) else [float(entry) for entry in value]
            if len(values) != channels:
                raise FedattackError(must(name, f"one number or {channels} (one per channel)", value))
            if name == "std" and min(values) <= 0:
                raise FedattackError(must(name, "positive", value))
            self.register_buffer(name, torch.tensor(values).reshape(1, -1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std


class BatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d that torch.func accepts in training mode.

    The stock layer counts its batches in place, which `torch.func.grad` refuses; the count is read only where momentum
    is None, so it is left at 0 here. Running statistics are updated in place as ever (hand in clones by the state).
    Under `torch.func.vmap` there is no one batch to take them from: every sample is normalised by its own batch and
    they stay as they are.
    """

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        assert self.momentum is not None
        running = (self.running_mean, self.running_var)
        try:
            return F.batch_norm(input, *running, self.weight, self.bias, self.training, self.momentum, self.eps)
        except RuntimeError as error:
            if "batched tensor" not in str(error) or not self.training:
                raise
            return F.batch_norm(input, None, None, self.weight, self.bias, True, self.momentum, self.eps)


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky-relu": nn.LeakyReLU,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "elu": nn.ELU,
    "softplus": nn.Softplus,
}

NORMS: dict[str, Callable[[int, int], nn.Module]] = {
    "none": lambda channels, groups: nn.Identity(),
    "batch": lambda channels, groups: BatchNorm2d(channels),
    "group": lambda channels, groups: nn.GroupNorm(_divisor(channels, groups), channels),
}

POOLS: dict[str, Callable[..., nn.Module]] = {"average": nn.AvgPool2d, "max": nn.MaxPool2d}


def activation_layer(name: str) -> nn.Module:
    """A fresh activation by name; ReLU-like ones have no curvature, which second-order attacks need."""
    return ACTIVATIONS[known("activation", ACTIVATIONS, name)]()


def norm_layer(name: str, channels: int, groups: int = 8) -> nn.Module:
    """A fresh normalisation by name; "group" has at most `groups` groups, of two channels at least."""
    return NORMS[known("norm", NORMS, name)](channels, groups)


def pool_layer(name: str, **options: Any) -> nn.Module:
    """Average or max pooling; max pooling has kinks where the largest pixel changes."""
    return POOLS[known("pool", POOLS, name)](**options)


def known(what: str, table: dict[str, Any], name: str) -> str:
    """The name itself, or the house error with the closest match."""
    if name not in table:
        raise FedattackError(one_of(what, table, name))
    return name


def classes(num_classes: int | None) -> int:
    """The number of outputs of a classifier."""
    if num_classes is None or num_classes < 1:
        raise FedattackError(must("num_classes of a classifier", "at least 1", num_classes))
    return num_classes


def shape3(image_shape: Sequence[int]) -> tuple[int, int, int]:
    """(C, H, W), all positive."""
    if len(image_shape) != 3 or min(image_shape) < 1:
        raise FedattackError(must("image_shape", "(channels, height, width)", image_shape))
    channels, height, width = image_shape
    return channels, height, width


def _divisor(channels: int, groups: int) -> int:
    return max(g for g in range(1, max(1, min(groups, channels // 2)) + 1) if channels % g == 0)

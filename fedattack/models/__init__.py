"""Victim models: images (B,C,H,W) in [0, 1] in, logits out; twice differentiable and usable under torch.func."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from fedattack.errors import FedattackError, must
from fedattack.models.layers import Normalize
from fedattack.seeding import seeded_default_generator

__all__ = ["MODELS", "Normalize", "build_model", "misfits", "parameter_count"]

MODELS: dict[str, str] = {
    "mlp": "fedattack.models.mlp:mlp",
    "lenet": "fedattack.models.lenet:lenet",
    "convnet": "fedattack.models.convnet:convnet",
    "convnet-small": "fedattack.models.convnet:convnet_small",
    "conv-chain": "fedattack.models.conv_chain:conv_chain",
    "vgg": "fedattack.models.vgg:vgg",
    "resnet18": "fedattack.models.resnet:ResNet18",
    "unet": "fedattack.models.unet:UNet",
}


def build_model(
    name: str, *, image_shape: Sequence[int], num_classes: int | None, seed: int, **options: Any
) -> nn.Module:
    """A model by name, or "module:Class" of your own that takes image_shape (C,H,W) and num_classes.

    Its initial weights are a function of `seed`; the global random state is left alone.
    """
    from fedattack.registry import MODELS as REGISTRY

    with seeded_default_generator(seed):
        model = REGISTRY.create(name, image_shape=tuple(image_shape), num_classes=num_classes, **options)
    if not isinstance(model, nn.Module):
        raise FedattackError(must(f"what model {name!r} builds", "a torch.nn.Module", type(model).__name__))
    return model


def parameter_count(model: nn.Module) -> int:
    """How many numbers training changes."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def misfits(model: nn.Module, state: Mapping[str, Tensor], needed: Iterable[str]) -> list[str]:
    """Why these tensors cannot be the model's, a line each: one of `needed` lacks, another is unknown or of another shape."""
    own = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    own |= {name: tuple(tensor.shape) for name, tensor in model.named_buffers()}
    found = [f"tensor {name!r} of shape {own[name]} is missing" for name in needed if name not in state]
    for name, tensor in state.items():
        if name not in own:
            found.append(f"tensor {name!r} of shape {tuple(tensor.shape)} is none of the model's")
        elif tuple(tensor.shape) != own[name]:
            found.append(f"tensor {name!r} must be of shape {own[name]}, got {tuple(tensor.shape)}")
    return found

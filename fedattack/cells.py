"""From the settings of a cell to the objects that clients and server both need: data, shares, victim, utility."""

import json
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from fedattack.checkpoints import load_weights
from fedattack.config import Settings
from fedattack.data import ImageData, Splits, load_dataset
from fedattack.data.partition import partition
from fedattack.models import build_model
from fedattack.seeding import derive_generator, derive_seed
from fedattack.tasks import bind
from fedattack.types import State

DTYPES = {"float32": torch.float32, "float64": torch.float64}


def load_splits(settings: Settings) -> Splits:
    """The cell's data set in its three parts; kept in memory, so that neighbours in a campaign share it."""
    return _splits(settings.data.dataset, json.dumps(settings.data.options, sort_keys=True))


def client_shares(settings: Settings) -> list[Tensor]:
    """Indices into the private part, one tensor a client."""
    return _shares(settings.model_dump_json(include={"data", "seed", "federation"}))


def build_victim(settings: Settings, image_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """The model of a cell with its initial weights, in the cell's precision and training mode."""
    model = build_model(
        settings.model.name,
        image_shape=image_shape,
        num_classes=num_classes,
        seed=derive_seed(settings.seed, "model"),
        **settings.model.options,
    )
    return model.to(DTYPES[settings.precision]).train(settings.model.mode == "train")


def initial_state(model: nn.Module) -> State:
    """What the server sends first: parameters and floating-point buffers, no counters."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items() if tensor.is_floating_point()}


def starting_weights(settings: Settings, model: nn.Module) -> State:
    """What a federation begins with: the weights that the settings name, else the model's own."""
    if not settings.model.weights:
        return initial_state(model)
    return load_weights(Path(settings.model.weights), model, settings.task.build())


@torch.no_grad()
def evaluate(settings: Settings, state: State, data: ImageData, *, limit: int = 512) -> dict[str, float]:
    """Mean loss, and accuracy in [0, 1] for a classifier, on the first `limit` images, in evaluation mode.

    Under FedSGD, BatchNorm that trained on batch statistics is evaluated on them too, 64 images at a time.
    """
    task, dtype = settings.task.build(), DTYPES[settings.precision]
    state = {name: tensor.to(dtype) for name, tensor in state.items()}  # some strategies aggregate in another precision
    model = build_victim(settings, data.image_shape, data.num_classes).eval()
    if settings.federation.protocol == "fedsgd" and settings.model.mode == "train":
        for module in model.modules():  # gradients carry no running statistics: normalise by the batch, as in training
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.train()
    predict = bind(model, state)
    generator = derive_generator(settings.seed, "evaluate")
    total, correct, count = 0.0, 0, min(limit, len(data))
    for start in range(0, count, 64):
        indices = list(range(start, min(start + 64, count)))
        images, labels = data.images(indices, dtype), data.labels[indices]
        total += float(task.loss(predict, task.draw(images, labels, generator=generator))) * len(indices)
        if task.name == "classification":
            correct += int((predict(images).argmax(1) == labels).sum())
    figures = {"loss": total / max(count, 1)}
    if task.name == "classification":
        figures["accuracy"] = correct / max(count, 1)
    return figures


@lru_cache(maxsize=4)
def _splits(dataset: str, options: str) -> Splits:
    return load_dataset(dataset, **json.loads(options))


@lru_cache(maxsize=16)
def _shares(key: str) -> list[Tensor]:
    settings = Settings.model_validate_json(key)
    return partition(
        load_splits(settings).private,
        settings.federation.clients,
        settings.data.partition,
        seed=derive_seed(settings.seed, "partition"),
        **settings.data.partition_options,
    )

"""Helpers that many tests share: a client's update from a model and images, and small natural images."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedattack.seeding import derive_generator
from fedattack.tasks import Classification, Task, batch_indices, simulate, split_steps
from fedattack.types import Update

torch.set_num_threads(1)


def state_of(model: nn.Module, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """What a server sends: the state dict as copies, floating-point tensors in `dtype`."""
    return {
        name: tensor.detach().clone().to(dtype) if dtype and tensor.is_floating_point() else tensor.detach().clone()
        for name, tensor in model.state_dict().items()
    }


def update_from(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    task: Task | None = None,
    kind: str = "gradient",
    dtype: torch.dtype = torch.float64,
    learning_rate: float = 0.1,
    local_steps: int = 1,
    local_batch_size: int | None = None,
    proximal_mu: float = 0.0,
    seed: int = 0,
) -> Update:
    """An undefended client's update of `model`'s present weights, computed and sent in `dtype`."""
    task = task or Classification()
    sent = state_of(model, dtype)
    steps = batch_indices(len(images), local_batch_size or len(images), local_steps)
    generator = derive_generator(seed, "client")
    images = images.to(dtype)
    if task.drawn:
        batches = [task.draw(images[i], labels[i], generator=generator) for i in steps]
    else:
        batches = split_steps(task, task.draw(images, labels, generator=generator), steps)
    received = simulate(model, sent, task, batches, kind=kind, learning_rate=learning_rate, proximal_mu=proximal_mu)
    received = {name: tensor.detach().clone() for name, tensor in received.items()}
    return Update(round=1, client="0", sent=sent, received=received, kind=kind, num_examples=len(images))


@pytest.fixture(scope="session")
def make_state() -> Callable[..., dict[str, Tensor]]:
    """make_state(model, dtype=None): what a server sends."""
    return state_of


@pytest.fixture(scope="session")
def make_update() -> Callable[..., Update]:
    """make_update(model, images, labels, **settings): see `update_from`."""
    return update_from


@pytest.fixture(scope="session")
def patches() -> Any:
    """Natural 8×8 colour patches as `Splits`."""
    from fedattack.data import load_dataset

    return load_dataset("patches", image_size=8)


@pytest.fixture(scope="session")
def random_images() -> Callable[[Sequence[int], int], Tensor]:
    """random_images(shape, seed): uniform float64 in [0, 1]."""

    def made(shape: Sequence[int], seed: int = 0) -> Tensor:
        return torch.rand(tuple(shape), generator=derive_generator(seed, "images"), dtype=torch.float64)

    return made

"""What is found out about a dense layer by running the model leaves everything as it was."""

from collections import OrderedDict

import pytest
import torch
from torch import nn

from attacks.dense_layers import behind
from attacks.image_layer import image_layer
from fedattack.seeding import derive_generator, seeded_default_generator

SHAPE = (2, 4, 3)


def trained(*, buffers):
    """A model in training mode with dropout and batch normalisation, and what a client is sent of it."""
    with seeded_default_generator(0):
        layers = {
            "flat": nn.Flatten(),
            "first": nn.Linear(24, 9),
            "norm": nn.BatchNorm1d(9),
            "act": nn.ReLU(),
            "drop": nn.Dropout(0.5),
            "last": nn.Linear(9, 4),
        }
    model = nn.Sequential(OrderedDict(layers)).double().train()
    named = model.state_dict() if buffers else dict(model.named_parameters())
    return model, {name: tensor.detach().clone() for name, tensor in named.items()}


def probe_behind(model, sent):
    probes = torch.rand((3, *SHAPE), generator=derive_generator(0, "probes"), dtype=torch.float64)
    assert behind(model, sent, "first", probes).head is None


def probe_image(model, sent):
    assert image_layer(model, sent, SHAPE, derive_generator(0, "probes")).name == "first"


@pytest.mark.parametrize("buffers", [False, True], ids=["parameters", "all"])
@pytest.mark.parametrize("look", [probe_behind, probe_image])
def test_weights_buffers_and_randomness_are_left_alone(look, buffers):
    model, sent = trained(buffers=buffers)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    received = {name: tensor.clone() for name, tensor in sent.items()}
    random = torch.get_rng_state()
    look(model, sent)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(torch.equal(tensor, received[name]) for name, tensor in sent.items())

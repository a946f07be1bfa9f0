"""R-GAP: exact where all activations can be inverted, a refusal with the layer's name where not."""

from dataclasses import replace

import pytest
import torch

from attacks.r_gap import RGAP
from fedattack.errors import NotApplicable
from fedattack.metrics import psnr_db
from fedattack.models import build_model
from fedattack.seeding import derive_generator
from fedattack.tasks import Classification
from fedattack.types import Knowledge

SHAPE = (3, 8, 8)
KNOWN = Knowledge(image_shape=SHAPE, batch_size=1, num_classes=4)


def chain(**options):
    options = {"filters": (12, 20), "strides": (2, 1), "activation": "leaky-relu", **options}
    return build_model("conv-chain", image_shape=SHAPE, num_classes=4, seed=1, **options).double()


def attack(update, model, known=KNOWN):
    return RGAP().reconstruct(update, model, Classification(), known, generator=derive_generator(0, "r-gap"))


@pytest.mark.parametrize("activation", ["leaky-relu", "sigmoid", "tanh", "elu"])
def test_invertible_activations_give_the_image(activation, make_update, random_images):
    model, images = chain(activation=activation), random_images((1, *SHAPE))
    found = attack(make_update(model, images, torch.tensor([2])), model)
    assert float(psnr_db(found.images, images.float())) > 100
    assert found.labels.tolist() == [2]
    assert found.diagnostics["conv0.hybrid"] == 1.0


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_activations_that_lose_their_input_are_refused_by_name(activation, make_update, random_images):
    model = chain(activation=("leaky-relu", activation))
    update = make_update(model, random_images((1, *SHAPE)), torch.tensor([2]))
    with pytest.raises(NotApplicable, match=rf"layer 'act1' \({activation}\) cannot be inverted"):
        attack(update, model)


def test_batches_are_refused(make_update, random_images):
    model = chain()
    update = make_update(model, random_images((2, *SHAPE)), torch.tensor([2, 1]))
    with pytest.raises(NotApplicable, match="one image"):
        attack(update, model, replace(KNOWN, batch_size=2))

"""SPEAR on small ReLU networks: exact batches, and what it refuses."""

import math

import pytest
import torch
from torch import nn

from attacks.spear import Spear, expected_proposals
from fedattack.errors import FedattackError, NotApplicable
from fedattack.metrics import match_batch, psnr_db
from fedattack.models import build_model
from fedattack.seeding import derive_generator, seeded_default_generator
from fedattack.tasks import Classification
from fedattack.types import Knowledge

CLASSES = 5
SHAPE = (3, 7, 5)


def mlp(hidden=(64, 32), shape=SHAPE, seed=0, **options):
    return build_model("mlp", image_shape=shape, num_classes=CLASSES, seed=seed, hidden=hidden, **options)


def spear(update, model, batch, shape=SHAPE, progress=None, **options):
    knowledge = Knowledge(image_shape=shape, batch_size=batch, num_classes=CLASSES)
    told = {} if progress is None else {"progress": progress}
    generator = derive_generator(0, "spear")
    return Spear(**options).reconstruct(update, model, Classification(), knowledge, generator=generator, **told)


def scores(found, images):
    return psnr_db(found.images[match_batch(found.images, images.float())], images.float())


@pytest.mark.parametrize("batch", [2, 4, 6])
@pytest.mark.parametrize(("dtype", "wanted_db"), [(torch.float64, 120.0), (torch.float32, 60.0)])
def test_whole_batches_come_back(make_update, random_images, batch, dtype, wanted_db):
    model, images = mlp(seed=batch), random_images((batch, *SHAPE), batch).round()
    found = spear(make_update(model, images, torch.arange(batch) % CLASSES, dtype=dtype), model, batch, proposals=5000)
    assert found.images.shape == (batch, *SHAPE)
    assert found.images.dtype == torch.float32
    assert found.diagnostics["exact_images"] == batch
    assert float(scores(found, images).min()) > wanted_db


def test_what_is_called_exact_is_exact(make_update, random_images):
    """Too few proposals for the whole batch: whatever is claimed must still be right."""
    batch, model = 6, mlp()
    images = random_images((batch, *SHAPE)).round()
    update = make_update(model, images, torch.arange(batch) % CLASSES)
    claims = 0
    for proposals in (20, 60, 200, 600, 2000):
        found = spear(update, model, batch, proposals=proposals, rounds=1, patience=math.inf)
        claimed = int(found.diagnostics["exact_images"])
        claims += claimed
        for image in found.images[:claimed]:
            assert float(psnr_db(image.expand(batch, *SHAPE), images.float()).max()) > 60
    assert claims > 0


def test_any_normalisation_and_an_identity_between(make_update, random_images):
    with seeded_default_generator(0):
        model = nn.Sequential(nn.Flatten(), nn.Linear(105, 64), nn.Identity(), nn.ReLU(), nn.Linear(64, CLASSES))
    images = random_images((3, *SHAPE)).round()
    found = spear(make_update(model, images, torch.arange(3)), model, 3, proposals=5000)
    assert float(scores(found, images).min()) > 100


def test_one_image_needs_no_relu(make_update, random_images):
    model, images = mlp(activation="sigmoid"), random_images((1, *SHAPE))
    assert float(scores(spear(make_update(model, images, torch.tensor([2])), model, 1), images)) > 100


def test_one_local_step_of_fedavg(make_update, random_images):
    model, images = mlp(), random_images((3, *SHAPE)).round()
    update = make_update(model, images, torch.arange(3), kind="weights", learning_rate=0.1, local_steps=1)
    assert float(scores(spear(update, model, 3, proposals=5000), images).min()) > 80


# ------------------------------------------------------------------------------------------------ refusals
@pytest.mark.parametrize("activation", ["sigmoid", "tanh", "gelu"])
def test_no_relu_behind_the_layer(make_update, random_images, activation):
    model, images = mlp(activation=activation), random_images((3, *SHAPE))
    with pytest.raises(NotApplicable, match=f"{activation}, no ReLU"):
        spear(make_update(model, images, torch.arange(3)), model, 3)


def test_the_last_layer_has_no_relu(make_update, random_images):
    model, images = mlp(hidden=()), random_images((3, *SHAPE))
    with pytest.raises(NotApplicable, match="softmax, no ReLU"):
        spear(make_update(model, images, torch.arange(3)), model, 3)


def test_a_hopeless_batch_is_refused_with_its_price(make_update, random_images):
    model, images = mlp(), random_images((30, *SHAPE))
    with pytest.raises(NotApplicable, match="random sets of 29 of 64 neurons"):
        spear(make_update(model, images, torch.arange(30) % CLASSES), model, 30)


def test_convolutions_and_missing_biases(make_update, random_images):
    images = random_images((2, *SHAPE))
    for model in (mlp(bias=False), build_model("lenet", image_shape=SHAPE, num_classes=CLASSES, seed=0, channels=3)):
        with pytest.raises(NotApplicable, match="no dense layer with a bias"):
            spear(make_update(model, images, torch.arange(2)), model, 2)


def test_several_local_steps_on_a_batch(make_update, random_images):
    model, images = mlp(), random_images((2, *SHAPE))
    update = make_update(model, images, torch.arange(2), kind="weights", learning_rate=0.1, local_steps=3)
    knowledge = Knowledge(image_shape=SHAPE, batch_size=2, num_classes=CLASSES, learning_rate=0.1, local_steps=3)
    with pytest.raises(NotApplicable, match="several local steps"):
        Spear().reconstruct(update, model, Classification(), knowledge, generator=derive_generator(0, "s"))


def test_a_wrong_batch_size(make_update, random_images):
    model, images = mlp(), random_images((5, *SHAPE))
    with pytest.raises(NotApplicable, match="rank of 5"):
        spear(make_update(model, images, torch.arange(5)), model, 3)


@pytest.mark.parametrize("options", [{"proposals": 0}, {"rounds": 0}, {"rounds": 1.5}])
def test_options_that_cannot_be(options):
    with pytest.raises(FedattackError, match="whole number"):
        Spear(**options)


# ------------------------------------------------------------------------------------------------ the price
def test_the_price_of_a_proposal():
    """Two neurons of four are off: one row of one sample's zeros has chance 1/2, with two samples there is one hit a draw."""
    assert expected_proposals(4, 2) == pytest.approx(1.0)
    assert expected_proposals(1000, 1) == 1.0
    assert expected_proposals(10, 9) == math.inf
    assert expected_proposals(256, 16) == pytest.approx(math.comb(256, 15) / math.comb(128, 15) / 16)


def test_the_price_is_what_is_paid():
    from attacks.sparse_columns import sample

    generator = derive_generator(0, "price")
    gradients = torch.randn(64, 6, generator=generator, dtype=torch.float64)
    for column in gradients.T:
        column[torch.randperm(64, generator=generator)[:32]] = 0.0
    basis = torch.linalg.qr(gradients).Q
    q = sample(basis, 4000, generator)
    hits = int((((basis @ q.T).abs() < 1e-9).sum(0) >= 25).sum())
    assert hits == pytest.approx(4000 / expected_proposals(64, 6), rel=0.3)

"""Closed form: dW/db of a dense layer is exactly its input."""

from collections import OrderedDict

import pytest
import torch
from torch import nn

from attacks.image_layer import image_layer
from attacks.linear_leak import LinearLeak
from fedattack.errors import NotApplicable
from fedattack.metrics import psnr_db
from fedattack.models import Normalize, build_model
from fedattack.seeding import derive_generator, seeded_default_generator
from fedattack.tasks import Classification
from fedattack.types import Knowledge

CLASSES = 5
SHAPE = (3, 7, 5)


def mlp(shape=SHAPE, seed=0, classes=CLASSES, **options):
    return build_model("mlp", image_shape=shape, num_classes=classes, seed=seed, **options)


def leak(update, model, shape, batch=1, attack=None, **facts):
    knowledge = Knowledge(image_shape=tuple(shape), batch_size=batch, num_classes=CLASSES, **facts)
    generator = derive_generator(0, "leak")
    return (attack or LinearLeak()).reconstruct(update, model, Classification(), knowledge, generator=generator)


# ------------------------------------------------------------------------------------------------ one image, exact
@pytest.mark.parametrize(("dtype", "wanted_db"), [(torch.float64, 100.0), (torch.float32, 60.0)])
@pytest.mark.parametrize("options", [{}, {"hidden": ()}, {"activation": "sigmoid", "hidden": (20,)}])
def test_one_image_is_its_own_gradient(make_update, random_images, dtype, wanted_db, options):
    model, images = mlp(hidden=options.pop("hidden", (64, 32)), **options), random_images((1, *SHAPE))
    found = leak(make_update(model, images, torch.tensor([2]), dtype=dtype), model, SHAPE)
    assert found.images.shape == (1, *SHAPE)
    assert float(psnr_db(found.images, images)) > wanted_db
    assert found.diagnostics["relative_residual"] < (1e-10 if dtype is torch.float64 else 1e-4)


@pytest.mark.parametrize("shape", [(1, 7, 5), (3, 5, 7), (3, 1, 1), (1, 1, 9), (4, 6, 6)])
def test_any_image_size(make_update, random_images, shape):
    model, images = mlp(shape), random_images((1, *shape))
    found = leak(make_update(model, images, torch.tensor([0])), model, shape)
    assert float(psnr_db(found.images, images)) > 100


@pytest.mark.parametrize(
    ("mean", "std"),
    [
        (0.0, 1.0),
        (0.5, 0.5),
        ((0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)),
        ((-2.0, 0.0, 3.0), (0.01, 1.0, 50.0)),
    ],
)
def test_any_normalisation_is_measured_and_inverted(make_update, random_images, mean, std):
    model, images = mlp(mean=mean, std=std), random_images((1, *SHAPE))
    found = leak(make_update(model, images, torch.tensor([1])), model, SHAPE)
    assert float(psnr_db(found.images, images)) > 100


def test_black_and_white_pixels_stay_in_the_box(make_update):
    model, images = mlp(), torch.zeros(1, *SHAPE, dtype=torch.float64)
    images[..., ::2] = 1.0
    found = leak(make_update(model, images, torch.tensor([1])), model, SHAPE)
    assert float(found.images.min()) >= 0.0
    assert float(found.images.max()) <= 1.0
    assert float(psnr_db(found.images, images)) > 100


@pytest.mark.parametrize("local_steps", [1, 4])
@pytest.mark.parametrize("known_rate", [True, False])
@pytest.mark.parametrize("proximal_mu", [0.0, 0.5])
def test_weights_after_several_local_steps_on_one_image(
    make_update, random_images, local_steps, known_rate, proximal_mu
):
    """Every step adds a multiple of the same input to each row, and the same multiple of 1 to its bias."""
    model, images = mlp(), random_images((1, *SHAPE))
    settings = {"kind": "weights", "learning_rate": 0.05, "local_steps": local_steps, "proximal_mu": proximal_mu}
    update = make_update(model, images, torch.tensor([3]), **settings)
    facts = {"learning_rate": 0.05, "local_steps": local_steps} if known_rate else {}
    assert float(psnr_db(leak(update, model, SHAPE, **facts).images, images)) > 100


def test_float32_weights_lose_digits_but_not_the_image(make_update, random_images):
    """A float32 difference of weights keeps some five digits of it."""
    model, images = mlp(), random_images((1, *SHAPE))
    update = make_update(
        model, images, torch.tensor([3]), kind="weights", learning_rate=0.1, local_steps=2, dtype=torch.float32
    )
    assert float(psnr_db(leak(update, model, SHAPE, learning_rate=0.1, local_steps=2).images, images)) > 40


def test_the_estimate_averages_noise_over_rows(make_update, random_images):
    """With noise of one standard deviation on dW only, the least-squares estimate beats the best single row."""
    model, images = mlp(hidden=(256,)), random_images((1, *SHAPE))
    update = make_update(model, images, torch.tensor([3]))
    weight, bias = update.received["linear0.weight"], update.received["linear0.bias"]
    noise = torch.randn(weight.shape, generator=derive_generator(0, "noise"), dtype=weight.dtype)
    update.received["linear0.weight"] = noisy = weight + 0.3 * bias.abs().max() * noise
    best = int(bias.abs().argmax())
    single = ((noisy[best] / bias[best]) * 0.5 + 0.5).reshape(1, *SHAPE).clamp(0, 1)
    found = leak(update, model, SHAPE)
    assert float(psnr_db(found.images, images)) > float(psnr_db(single, images)) + 3
    assert found.diagnostics["relative_residual"] > 0.01


# ------------------------------------------------------------------------------------------------ where it cannot work
@pytest.mark.parametrize("name", ["convnet", "convnet-small", "lenet", "vgg", "resnet18"])
def test_models_whose_dense_layer_sees_no_image(make_update, random_images, name):
    options = {"channels": 3} if name == "lenet" else {"width": 2}
    model = build_model(name, image_shape=(3, 9, 9), num_classes=CLASSES, seed=0, **options).double()
    update = make_update(model, random_images((1, 3, 9, 9)), torch.tensor([0]))
    with pytest.raises(NotApplicable, match="no dense layer"):
        leak(update, model, (3, 9, 9))


def test_a_dense_layer_of_the_right_width_behind_a_convolution_is_no_image_layer(make_update, random_images):
    with seeded_default_generator(0):
        model = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.Flatten(), nn.Linear(3 * 35, CLASSES))
    update = make_update(model, random_images((1, *SHAPE)), torch.tensor([0]))
    with pytest.raises(NotApplicable, match="no dense layer"):
        leak(update, model, SHAPE)


def test_a_squashed_input_is_no_affine_map(make_update, random_images):
    with seeded_default_generator(0):
        model = nn.Sequential(nn.Tanh(), nn.Flatten(), nn.Linear(3 * 35, CLASSES))
    update = make_update(model, random_images((1, *SHAPE)), torch.tensor([0]))
    with pytest.raises(NotApplicable, match="no dense layer"):
        leak(update, model, SHAPE)


def test_a_model_without_bias(make_update, random_images):
    model = mlp(bias=False)
    with pytest.raises(NotApplicable, match="bias"):
        leak(make_update(model, random_images((1, *SHAPE)), torch.tensor([0])), model, SHAPE)


@pytest.mark.parametrize("batch", [1, 2])
def test_a_zero_bias_gradient(make_update, random_images, batch):
    model = mlp()
    update = make_update(model, random_images((batch, *SHAPE)), torch.zeros(batch, dtype=torch.int64))
    for tensor in update.received.values():
        tensor.zero_()
    with pytest.raises(NotApplicable, match="zero"):
        leak(update, model, SHAPE, batch)


def test_dead_units_say_nothing(make_update, random_images):
    """A first layer whose ReLUs are all off: the gradient of its bias is exactly zero."""
    model = mlp()
    with torch.no_grad():
        model.linear0.bias.fill_(-1e3)
    with pytest.raises(NotApplicable, match="zero"):
        leak(make_update(model, random_images((1, *SHAPE)), torch.tensor([0])), model, SHAPE)


def test_a_frozen_image_layer_is_not_in_the_update(make_update, random_images):
    """A client that trains only the head sends no gradient of the layer that sees the image."""
    model = mlp()
    model.linear0.weight.requires_grad_(False)
    model.linear0.bias.requires_grad_(False)
    update = make_update(model, random_images((1, *SHAPE)), torch.tensor([0]))
    assert "linear0.weight" not in update.received
    with pytest.raises(NotApplicable):
        leak(update, model, SHAPE)


def test_image_layer_finds_the_layer_and_its_map(make_state):
    with seeded_default_generator(0):
        layers = [("n", Normalize(3, (0.1, 0.2, 0.3), (2.0, 4.0, 8.0))), ("f", nn.Flatten()), ("d", nn.Linear(105, 4))]
    model = nn.Sequential(OrderedDict(layers))
    found = image_layer(model, make_state(model, torch.float64), SHAPE, derive_generator(0, "p"))
    assert (found.name, found.outputs) == ("d", 4)
    wanted = torch.tensor([0.5, 0.25, 0.125], dtype=torch.float64).repeat_interleave(35)
    torch.testing.assert_close(found.slope, wanted, rtol=1e-6, atol=1e-7)
    mean = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64).repeat_interleave(35)
    torch.testing.assert_close(found.offset, -mean * wanted, rtol=1e-6, atol=1e-7)


# ------------------------------------------------------------------------------------------------ batches
def exclusive_owners(model, images) -> dict[int, int]:
    """Image -> number of first-layer ReLUs that it alone switches on."""
    with torch.no_grad():
        inputs = images.float().flatten(1) * 2 - 1
        on = (inputs @ model.linear0.weight.T + model.linear0.bias) > 0
    alone = on[:, on.sum(0) == 1]
    return {image: int(count) for image, count in enumerate(alone.sum(1)) if count}


@pytest.mark.parametrize("batch", [2, 3, 4])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_rows_that_agree_give_exact_images(make_update, random_images, batch, seed):
    shape = (1, 8, 8)
    model = mlp(shape, seed=seed, hidden=(128,))
    images = random_images((batch, *shape), seed).round()  # black and white: many units fire for one image only
    owners = exclusive_owners(model, images)
    certain = {image for image, rows in owners.items() if rows >= 2}
    assert certain, "the case must have something to find"
    found = leak(make_update(model, images, torch.arange(batch) % CLASSES), model, shape, batch)
    assert found.images.shape == (batch, *shape)
    claimed = int(found.diagnostics["exclusive_images"])
    assert claimed == len(certain)
    matched = set()
    for reconstruction in found.images[:claimed]:
        scores = psnr_db(reconstruction.expand(batch, *shape), images)
        assert float(scores.max()) > 80
        matched.add(int(scores.argmax()))
    assert matched == certain


def test_images_that_own_no_row_are_not_claimed(make_update, random_images):
    """A sigmoid network: every row is a mixture of all images."""
    shape = (1, 8, 8)
    model = mlp(shape, hidden=(128,), activation="sigmoid")
    found = leak(make_update(model, random_images((3, *shape)), torch.arange(3)), model, shape, 3)
    assert found.images.shape == (3, *shape)
    assert found.diagnostics["exclusive_images"] == 0


def test_mixtures_of_two_classes_are_not_taken_for_images(make_update, random_images):
    """With two classes behind one hidden layer all mixed rows agree: p − y is (a, −a), so their ratio is the same in all.

    They agree with one another and still are no image; a claim of an exclusive image must be true.
    """
    shape = (1, 8, 8)
    model = mlp(shape, classes=2, hidden=(128,))
    images = random_images((2, *shape)) * 0.2 + 0.4  # alike: most units fire for both
    found = leak(make_update(model, images, torch.tensor([0, 1])), model, shape, 2)
    for reconstruction in found.images[: int(found.diagnostics["exclusive_images"])]:
        assert float(psnr_db(reconstruction.expand(2, *shape), images).max()) > 60


def test_the_same_image_twice_is_found_once_and_fills_the_batch(make_update, random_images):
    model, images = mlp(), random_images((1, *SHAPE)).repeat(2, 1, 1, 1)
    found = leak(make_update(model, images, torch.tensor([1, 1])), model, SHAPE, 2)
    assert found.images.shape == (2, *SHAPE)
    assert float(psnr_db(found.images, images).max()) > 100

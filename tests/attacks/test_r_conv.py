"""Exact inversion of convolutional chains, what stops it, and what it says about itself."""

from collections import OrderedDict

import pytest
import torch
from torch import nn

from attacks.chain import Pool
from attacks.r_conv import MARGIN, Observed, RConv, _Total, mismatch, pooled, settle, threshold
from fedattack.constraints import (
    Convolution,
    GradientConstraints,
    WeightConstraints,
    hybrid_system,
    output,
    weight_gradient,
)
from fedattack.errors import FedattackError, NotApplicable
from fedattack.metrics import match_batch, psnr_db
from fedattack.models import build_model
from fedattack.seeding import derive_generator, seeded_default_generator
from fedattack.tasks import Classification
from fedattack.types import Knowledge

CLASSES = 4
SMALL = {"filters": (8, 12, 6), "strides": (2, 1, 1), "kernels": 3, "activation": ("leaky-relu", "relu", "relu")}


def chain(shape=(3, 8, 8), seed=0, **options):
    options = {**SMALL, **options}
    return build_model("conv-chain", image_shape=shape, num_classes=CLASSES, seed=seed, **options).eval()


def sequence(*layers, seed=0):
    with seeded_default_generator(seed):
        return nn.Sequential(OrderedDict((f"l{i}", layer()) for i, layer in enumerate(layers))).eval()


def attack(update, model, shape, batch=1, settings=None, **facts):
    knowledge = Knowledge(image_shape=tuple(shape), batch_size=batch, num_classes=CLASSES, **facts)
    generator = derive_generator(0, "r-conv")
    return RConv(**(settings or {})).reconstruct(update, model, Classification(), knowledge, generator=generator)


def exactly(found, images, wanted_db=100.0):
    assert found.images.shape == images.shape
    assert float(psnr_db(found.images, images).min()) > wanted_db


# ------------------------------------------------------------------------------------------------ one image, exact
@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 7, 5), (3, 9, 7)])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_mixed_chain(make_update, random_images, shape, seed):
    model, images = chain(shape, seed, filters=(12, 16, 10)), random_images((1, *shape), seed)
    found = attack(make_update(model, images, torch.tensor([seed])), model, shape)
    exactly(found, images)
    assert found.labels.tolist() == [seed]
    assert found.losses[0] < 1e-20


@pytest.mark.parametrize("activation", ["relu", "leaky-relu", "sigmoid", "tanh", "elu", "softplus"])
@pytest.mark.parametrize("constraints", ["auto", "gradient", "hybrid"])
def test_every_activation_by_every_kind_of_constraint(make_update, random_images, activation, constraints):
    shape = (2, 7, 6)
    options = {"filters": (12, 8), "strides": (1, 1), "activation": activation, "init": "default"}
    model, images = chain(shape, **options), random_images((1, *shape))
    found = attack(make_update(model, images, torch.tensor([1])), model, shape, settings={"constraints": constraints})
    exactly(found, images)
    kinds = {found.diagnostics[f"conv{i}.hybrid"] for i in (0, 1)}
    assert kinds == {"gradient": {0.0}, "hybrid": {1.0}}.get(constraints, kinds)


@pytest.mark.parametrize("activation", ["leaky-relu", "tanh"])
def test_weight_constraints_alone(make_update, random_images, activation):
    """D ≥ C·s² filters and an invertible activation: what R-GAP inverts."""
    options = {"filters": (16, 24), "strides": (2, 1), "activation": activation, "init": "default"}
    model, images = chain(**options), random_images((1, 3, 8, 8))
    update = make_update(model, images, torch.tensor([1]))
    exactly(attack(update, model, (3, 8, 8), settings={"constraints": "weights"}), images, 80)


def test_gradient_constraints_invert_what_weight_constraints_cannot(make_update, random_images):
    """Few ReLUs are active at a position: too few equalities for the pixels, but the gradient determines them all."""
    options = {"filters": (10,), "strides": 1, "activation": "relu"}
    model, images = chain((8, 6, 6), **options), random_images((1, 8, 6, 6))
    update = make_update(model, images, torch.tensor([1]))
    found = attack(update, model, (8, 6, 6), settings={"constraints": "weights"})
    assert found.diagnostics["conv0.weight_constraints"] < found.diagnostics["conv0.unknowns"]
    assert float(psnr_db(found.images, images)) < 40
    exactly(attack(update, model, (8, 6, 6), settings={"constraints": "gradient"}), images)


def test_several_dense_layers_and_a_normalisation(make_update, random_images):
    model = chain(dense=(20, 10), mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))
    images = random_images((1, 3, 8, 8))
    found = attack(make_update(model, images, torch.tensor([2])), model, (3, 8, 8))
    exactly(found, images)


@pytest.mark.parametrize(
    "options", [{"kernels": 4, "paddings": 0, "strides": 4}, {"kernels": (4, 3, 3), "strides": (2, 1, 1)}]
)
def test_strides_kernels_and_paddings(make_update, random_images, options):
    model = chain((3, 16, 16), filters=(48,) if options["strides"] == 4 else (24, 16, 8), activation="relu", **options)
    images = random_images((1, 3, 16, 16))
    exactly(attack(make_update(model, images, torch.tensor([2])), model, (3, 16, 16)), images)


def test_batch_normalisation_by_known_statistics(make_update, random_images):
    model = chain(norm="batch")
    with torch.no_grad():
        for i in range(3):
            norm = model.get_submodule(f"norm{i}")
            norm.running_mean.uniform_(-0.5, 0.5, generator=derive_generator(i, "mean"))
            norm.running_var.uniform_(0.5, 2.0, generator=derive_generator(i, "variance"))
            norm.weight.uniform_(-1.0, 1.0, generator=derive_generator(i, "scale"))
    images = random_images((1, 3, 8, 8))
    exactly(attack(make_update(model.eval(), images, torch.tensor([2])), model, (3, 8, 8)), images)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
def test_average_pooling_before_the_activation(make_update, random_images, activation):
    """The pooled sensitivity is the one at every pixel, and a pooled output an equation with a larger kernel."""
    layers = [lambda: nn.Conv2d(2, 24, 3, padding=1), lambda: nn.AvgPool2d(2), activation]
    model = sequence(
        *layers, lambda: nn.Conv2d(24, 4, 3, padding=1), activation, nn.Flatten, lambda: nn.Linear(36, CLASSES)
    )
    images = random_images((1, 2, 6, 6))
    found = attack(make_update(model, images, torch.tensor([2])), model, (2, 6, 6))
    exactly(found, images)
    assert found.diagnostics["l0.weight_constraints"] > 0


def test_a_convolution_in_groups(make_update, random_images):
    model = sequence(
        lambda: nn.Conv2d(4, 16, 3, padding=1, groups=2), nn.ReLU, nn.Flatten, lambda: nn.Linear(16 * 36, CLASSES)
    )
    images = random_images((1, 4, 6, 6))
    exactly(attack(make_update(model, images, torch.tensor([2])), model, (4, 6, 6)), images)


def test_a_multilayer_perceptron_is_a_chain_without_convolutions(make_update, random_images):
    model = build_model("mlp", image_shape=(3, 7, 5), num_classes=CLASSES, seed=0)
    images = random_images((1, 3, 7, 5))
    exactly(attack(make_update(model, images, torch.tensor([2])), model, (3, 7, 5)), images)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_float32_updates(make_update, random_images, seed):
    model, images = chain(seed=seed, filters=(14, 12, 8)), random_images((1, 3, 8, 8), seed)
    update = make_update(model, images, torch.tensor([2]), dtype=torch.float32)
    exactly(attack(update, model, (3, 8, 8)), images, 70)


@pytest.mark.parametrize("rate", [0.05, None])
def test_one_step_of_fedavg(make_update, random_images, rate):
    """A positive factor on the gradient changes no equation, so the learning rate need not be known."""
    model, images = chain(), random_images((1, 3, 8, 8))
    update = make_update(model, images, torch.tensor([2]), kind="weights", learning_rate=0.05)
    exactly(attack(update, model, (3, 8, 8), learning_rate=rate, local_steps=1), images, 80)


def test_after_training(make_update, random_images):
    model = chain(init="default", filters=(14, 16, 12))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    images, labels = random_images((32, 3, 8, 8), 1).float(), torch.arange(32) % CLASSES
    for _ in range(60):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 1.2
    image = random_images((1, 3, 8, 8), 2)
    exactly(attack(make_update(model, image, torch.tensor([2])), model, (3, 8, 8)), image)


@pytest.mark.parametrize("name", ["silu", "gelu"])
def test_folded_activations_are_exact_or_refused(make_update, random_images, name):
    """Where no input lies left of the minimum the output determines the slope; else the bias gradient tells."""
    options = {"filters": (12, 8), "strides": (1, 1), "activation": name, "init": "default"}
    model, images = chain((2, 6, 6), **options), random_images((1, 2, 6, 6))
    with torch.no_grad():
        model.conv1.weight.mul_(0.5)
    update = make_update(model, images, torch.tensor([1]))
    exactly(attack(update, model, (2, 6, 6)), images, 80)
    with torch.no_grad():
        model.conv1.weight.mul_(40)
    update = make_update(model, images, torch.tensor([1]))
    with pytest.raises(NotApplicable, match=r"'act1'.*left of its minimum"):
        attack(update, model, (2, 6, 6))


@pytest.mark.parametrize("layer", [nn.SiLU, nn.GELU])
def test_folded_activations_without_a_bias_gradient_are_refused(make_update, random_images, layer):
    """Behind a convolution without a bias nothing says which of two inputs an output below zero comes from."""
    layers = lambda: nn.Conv2d(2, 12, 3, padding=1, bias=False), lambda: nn.BatchNorm2d(12), layer
    model = sequence(*layers, nn.Flatten, lambda: nn.Linear(12 * 36, CLASSES))
    images = random_images((1, 2, 6, 6))
    update = make_update(model, images, torch.tensor([1]))
    with pytest.raises(NotApplicable, match=r"'l2' \((silu|gelu)\).*no bias gradient"):
        attack(update, model, (2, 6, 6))
    with torch.no_grad():
        model.l1.bias.fill_(50.0)  # then no output is below zero, and none needs a choice
    exactly(attack(make_update(model, images, torch.tensor([1])), model, (2, 6, 6)), images, 80)


# ------------------------------------------------------------------------------------------------ several images
@pytest.mark.parametrize("batch", [2, 3])
def test_a_batch_behind_a_relu_layer(make_update, random_images, batch):
    """One dense layer takes the batch apart; all convolutions are solved for all images together."""
    model = chain((1, 8, 8), filters=(12, 12), strides=(1, 1), activation="leaky-relu", dense=(160,), seed=1)
    images = random_images((batch, 1, 8, 8)).round()
    found = attack(make_update(model, images, torch.arange(batch)), model, (1, 8, 8), batch)
    assert float(psnr_db(found.images[match_batch(found.images, images)], images).min()) > 80
    assert found.diagnostics["dense.exact"] == batch
    assert found.diagnostics["conv0.unknowns"] == batch * 64


def test_a_step_uses_the_local_batch_only(make_update, random_images):
    model, images = chain(), random_images((2, 3, 8, 8))
    update = make_update(model, images[:1], torch.tensor([1]), kind="weights")
    found = attack(update, model, (3, 8, 8), 2, local_steps=1, local_batch_size=1)
    exactly(found, images[[0, 0]], 80)


# ------------------------------------------------------------------------------------------------ what it says
def test_diagnostics_of_every_layer(make_update, random_images):
    model, images = chain(filters=(12, 16, 10)), random_images((1, 3, 8, 8))
    said = attack(make_update(model, images, torch.tensor([2])), model, (3, 8, 8)).diagnostics
    assert said["conv2.unknowns"] == said["conv2.rank"] == 16 * 16
    assert said["conv2.gradient_constraints"] == 16 * 10 * 9
    assert said["conv0.unknowns"] == said["conv0.rank"] == 192
    assert said["conv0.weight_constraints"] == 12 * 16, "all outputs of a LeakyReLU are known"
    assert 0 < said["conv1.weight_constraints"] < 16 * 16, "only the active ones of a ReLU are"
    assert said["conv2.share_of_r_gap"] == 2 / 16
    for i in range(3):
        assert said[f"conv{i}.bias_residual"] < 1e-10
        assert said[f"conv{i}.gradient_residual"] < 1e-8
        assert said[f"conv{i}.condition"] == pytest.approx(said[f"conv{i}.sigma_max"] / said[f"conv{i}.sigma_min"])
    assert all(isinstance(value, float) for value in said.values())


def test_the_cost_tells_success_from_failure(make_update, random_images):
    model, images = chain(), random_images((1, 3, 8, 8))
    update = make_update(model, images, torch.tensor([2]))
    assert mismatch(update, model, Classification(), images, torch.tensor([2])) < 1e-25
    assert mismatch(update, model, Classification(), 1 - images, torch.tensor([2])) > 1e-3


def test_noise_is_amplified_and_shows(make_update, random_images):
    model, images = chain(), random_images((1, 3, 8, 8))
    update = make_update(model, images, torch.tensor([2]))
    generator = derive_generator(0, "noise")
    for tensor in update.received.values():
        noise = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
        tensor += 1e-3 * tensor.square().mean().sqrt() * noise
    found = attack(update, model, (3, 8, 8), settings={"deficient": "everywhere"})
    assert bool(found.images.isfinite().all())
    assert found.diagnostics["dense.residual"] > 1e-4
    assert found.losses[0] > 1e-8


# ------------------------------------------------------------------------------------------------ what stops it
def test_too_few_filters(make_update, random_images):
    model, images = chain(filters=(12, 12, 1)), random_images((1, 3, 8, 8))
    update = make_update(model, images, torch.tensor([2]))
    with pytest.raises(NotApplicable, match=r"layer 'conv2' \(Conv2d\).*rank \d+ for 192 unknowns.*2 active filters"):
        attack(update, model, (3, 8, 8))
    found = attack(update, model, (3, 8, 8), settings={"deficient": "everywhere"})
    assert found.diagnostics["conv2.rank"] < 192
    assert found.losses[0] > 1e-6


def test_too_few_filters_at_the_image_are_counted_or_refused(make_update, random_images):
    model, images = chain(filters=(3, 12, 8)), random_images((1, 3, 8, 8))
    update = make_update(model, images, torch.tensor([2]))
    found = attack(update, model, (3, 8, 8))
    assert found.diagnostics["conv0.rank"] < found.diagnostics["conv0.unknowns"]
    with pytest.raises(NotApplicable, match="'conv0'"):
        attack(update, model, (3, 8, 8), settings={"deficient": "refuse"})


def test_too_few_filters_give_the_part_of_the_image_that_they_see(make_update, random_images):
    """The least-norm solution: the image's projection onto the rows of both kinds of constraints, clamped."""
    model, images = chain(filters=(3, 12, 8)).double(), random_images((1, 3, 8, 8))
    label = torch.tensor([2])
    found = attack(make_update(model, images, label), model, (3, 8, 8))
    seen = []
    handle = model.conv0.register_forward_hook(lambda _module, _inputs, outputs: seen.append(outputs))
    loss = nn.functional.cross_entropy(model(images), label)
    handle.remove()
    (sensitivity,) = torch.autograd.grad(loss, seen)
    shape, weight = Convolution.of(model.conv0, 8, 8), model.conv0.weight.detach()
    inputs = 2.0 * images - 1.0  # as the model normalises them
    target = output(shape, weight, inputs)
    matrix, right = hybrid_system(
        GradientConstraints(shape, sensitivity, weight_gradient(shape, inputs, sensitivity)),
        WeightConstraints(shape, weight, target, torch.ones_like(target)),
    )
    assert int(torch.linalg.matrix_rank(matrix)) == int(found.diagnostics["conv0.rank"])
    wanted = (torch.linalg.pinv(matrix, rtol=1e-12) @ right).reshape(images.shape)
    torch.testing.assert_close(found.images.double(), (0.5 * wanted + 0.5).clamp(0.0, 1.0), rtol=0, atol=1e-6)


def test_dead_filters_are_counted(make_update, random_images):
    model, images = chain(filters=(12, 16, 3)), random_images((1, 3, 8, 8))
    with torch.no_grad():
        model.conv2.bias[1:] = -1e3
    with pytest.raises(NotApplicable, match="3 filters, 1 of them active"):
        attack(make_update(model, images, torch.tensor([2])), model, (3, 8, 8))


def test_several_local_steps(make_update, random_images):
    model, images = chain(), random_images((1, 3, 8, 8))
    update = make_update(model, images, torch.tensor([2]), kind="weights", local_steps=3)
    with pytest.raises(NotApplicable, match="3 local steps"):
        attack(update, model, (3, 8, 8), learning_rate=0.1, local_steps=3)


def test_a_frozen_layer_is_named(make_update, random_images):
    model, images = chain(), random_images((1, 3, 8, 8))
    model.conv1.weight.requires_grad_(False)
    with pytest.raises(NotApplicable, match="no gradient of layer 'conv1'"):
        attack(make_update(model, images, torch.tensor([2])), model, (3, 8, 8))


def test_a_layer_that_is_no_chain_is_named(make_update, random_images):
    model = build_model("convnet-small", image_shape=(3, 8, 8), num_classes=CLASSES, seed=0)
    with pytest.raises(NotApplicable, match="'pool0'"):
        attack(make_update(model, random_images((1, 3, 8, 8)), torch.tensor([2])), model, (3, 8, 8))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"constraints": "gradients"}, "did you mean 'gradient'"),
        ({"deficient": "refused"}, "did you mean 'refuse'"),
        ({"condition": 0.5}, "at least 1"),
    ],
)
def test_wrong_settings(settings, words):
    with pytest.raises(FedattackError, match=words):
        RConv(**settings)


# ------------------------------------------------------------------------------------------------ parts
def test_a_pooled_convolution_is_one_with_a_larger_kernel():
    shape = Convolution(2, 11, 9, 4, (3, 2), (2, 1), (1, 0), (1, 2))
    pool = Pool("p", (2, 3), (2, 1), (4, *shape.output))
    generator = derive_generator(0, "pooled")
    weight = torch.randn(shape.weight_shape, generator=generator, dtype=torch.float64)
    inputs = torch.randn(2, 2, 11, 9, generator=generator, dtype=torch.float64)
    joined, wide = pooled(shape, weight, pool)
    torch.testing.assert_close(output(joined, wide, inputs), pool.apply(output(shape, weight, inputs)))
    gradient = torch.randn(2, 4, *joined.output, generator=generator, dtype=torch.float64)
    left = (pool.apply(output(shape, weight, inputs)) * gradient).sum()
    torch.testing.assert_close(left, (output(shape, weight, inputs) * pool.adjoint(gradient)).sum())


def test_zeros_of_a_relu_are_told_by_the_errors_below_zero():
    outputs = torch.tensor([2.0, 1e-9, -2e-9, 0.5, 5e-9], dtype=torch.float64)
    assert 2e-9 < threshold(outputs, 1e-16) < 1e-8
    assert threshold(outputs.clamp_min(0), 1e-12) == 2e-12


def test_bias_gradients_settle_slopes_in_doubt():
    generator = derive_generator(0, "settle")
    true = (torch.rand(1, 3, 4, 4, generator=generator) < 0.5).double()
    gradient = torch.randn(1, 3, 4, 4, generator=generator, dtype=torch.float64)
    total = _Total(torch.full((3, 1, 1), 2.0, dtype=torch.float64), (2 * gradient * true).sum((0, 2, 3)))
    wrong, order = true.clone(), torch.rand(1, 3, 4, 4, generator=generator, dtype=torch.float64)
    for channel, places in ((0, (3,)), (2, (1, 14))):
        for place in places:
            wrong[0, channel].view(-1)[place] = 1 - true[0, channel].view(-1)[place]
    fixed, flipped, left = settle(wrong, 1 - wrong, gradient, total, order, MARGIN)
    assert torch.equal(fixed, true)
    assert int(flipped.sum()) == 3
    assert left < 1e-12
    unchanged, flipped, left = settle(true, 1 - true, gradient, total, order, MARGIN)
    assert torch.equal(unchanged, true)
    assert not bool(flipped.any())


def test_noise_settles_nothing():
    generator = derive_generator(0, "settle")
    slope = (torch.rand(1, 3, 4, 4, generator=generator) < 0.5).double()
    gradient = torch.randn(1, 3, 4, 4, generator=generator, dtype=torch.float64)
    sums = (gradient * slope).sum((0, 2, 3)) + torch.randn(3, generator=generator, dtype=torch.float64)
    total = _Total(torch.ones(3, 1, 1, dtype=torch.float64), sums)
    kept, flipped, _ = settle(slope, 1 - slope, gradient, total, slope, MARGIN)
    assert torch.equal(kept, slope)
    assert not bool(flipped.any())


def test_the_accuracy_of_a_difference_of_weights(make_update, random_images):
    model, images = chain(), random_images((1, 3, 8, 8))
    label = torch.tensor([1])
    exact = Observed.of(make_update(model, images, label, dtype=torch.float32))
    difference = Observed.of(make_update(model, images, label, kind="weights", learning_rate=1e-3, dtype=torch.float32))
    assert set(exact.accuracy.values()) == {torch.finfo(torch.float32).eps}
    assert min(difference.accuracy.values()) > torch.finfo(torch.float32).eps
    assert max(difference.accuracy.values()) > 1e-5

"""Smoothed activations against averages over noise; copies that leave the model alone; a ReLU net inverted exactly."""

import copy
import math

import pytest
import torch
from torch import nn

from attacks.second_order import SecondOrder
from attacks.smoothing import Averaged, bends, kinks, smoothed, spreads
from fedattack.metrics import psnr_db
from fedattack.models import build_model
from fedattack.seeding import derive_generator
from fedattack.tasks import Classification
from fedattack.types import Knowledge


@pytest.mark.parametrize(("width", "slope"), [(0.7, 0.0), (0.2, 0.0), (0.5, 0.1)])
def test_a_smooth_relu_is_the_mean_over_noise(width, slope):
    """Against quadrature: ∫ f(z + w·n)·φ(n) dn."""
    n = torch.linspace(-9.0, 9.0, 20001, dtype=torch.float64)
    density = torch.exp(-0.5 * n * n) / math.sqrt(2.0 * math.pi)
    z = torch.tensor([-2.0, -0.3, 0.0, 0.4, 3.0], dtype=torch.float64)
    noisy = z[:, None] + width * n
    mean = torch.trapezoid(torch.nn.functional.leaky_relu(noisy, slope) * density, n)
    torch.testing.assert_close(Averaged(width, slope)(z), mean, rtol=0, atol=1e-7)
    assert torch.autograd.gradgradcheck(Averaged(width, slope), (z.clone().requires_grad_(),))


@pytest.mark.parametrize("width", [0.2, 1.0, 4.0])
@pytest.mark.parametrize(
    ("activation", "error"),
    [(nn.GELU(), 1e-7), (nn.GELU(approximate="tanh"), 1e-3), (nn.SiLU(inplace=True), 0.03)],
    ids=["gelu", "tanh-gelu", "silu"],
)
def test_smooth_activations_are_averaged_too(width, activation, error):
    """A GELU exactly; a SiLU nearly, by the normal distribution that its logistic one resembles, but its limit is a SiLU."""
    n = torch.linspace(-9.0, 9.0, 20001, dtype=torch.float64)
    density = torch.exp(-0.5 * n * n) / math.sqrt(2.0 * math.pi)
    z = torch.tensor([-2.0, -0.3, 0.0, 0.4, 3.0], dtype=torch.float64)
    given = z.clone()
    mean = torch.trapezoid(activation(z[:, None] + width * n) * density, n)
    model = nn.Sequential(activation)
    assert kinks(model) == []
    assert bends(model) == ["0"]
    averaged, narrow = (smoothed(model, {"0": size}) for size in (width, 1e-6))
    torch.testing.assert_close(averaged(z), mean, rtol=0, atol=error)
    torch.testing.assert_close(narrow(z), activation(z.clone()), rtol=0, atol=1e-11)
    assert torch.equal(z, given)
    assert bends(averaged) == []


def test_the_model_is_left_alone_and_its_copy_tends_to_it(random_images):
    model = build_model("resnet18", image_shape=(3, 8, 8), num_classes=3, seed=0, width=2, norm="group").double()
    before, images = copy.deepcopy(model), random_images((2, 3, 8, 8)).double()
    names = kinks(model)
    assert len(names) == 9
    assert bends(build_model("lenet", image_shape=(3, 8, 8), num_classes=3, seed=0)) == []
    spread = spreads(model, dict(model.state_dict()), images)
    assert set(spread) == set(names)
    far, near = (smoothed(model, {name: width * s for name, s in spread.items()}) for width in (0.5, 1e-5))
    with torch.no_grad():
        errors = [float((twin(images) - model(images)).abs().max()) for twin in (far, near)]
    assert errors[0] > 1e-3 > 1e-4 > errors[1] > 0
    assert list(far.state_dict()) == list(model.state_dict())
    assert kinks(far) == []
    assert kinks(model) == names
    assert not any(module._forward_pre_hooks for module in model.modules())
    for (name, tensor), old in zip(model.state_dict().items(), before.state_dict().values(), strict=True):
        assert torch.equal(tensor, old), name


def test_a_spread_is_the_standard_deviation_of_what_comes_in(random_images):
    model, images = nn.Sequential(nn.Flatten(), nn.ReLU()), random_images((2, 3, 8, 8)).double()
    assert spreads(model, {}, images) == {"1": pytest.approx(float(images.var(correction=0).sqrt()))}


def test_a_relu_lenet_gives_the_image_exactly(make_update):
    """Without the continuation the same start stops short of it."""
    rows, columns = torch.meshgrid(torch.arange(8) / 8, torch.arange(8) / 8, indexing="ij")
    images = torch.stack([0.5 + 0.3 * torch.sin(6 * rows + c) * torch.cos(5 * columns - c) for c in range(3)])[None]
    labels = torch.tensor([2])
    model = build_model("lenet", image_shape=(3, 8, 8), num_classes=10, seed=0, activation="relu", init="default")
    update = make_update(model, images, labels)
    knowledge = Knowledge(image_shape=(3, 8, 8), batch_size=1, num_classes=10)

    def found(**options: float):
        attack = SecondOrder(restarts=1, **options)
        calls: list[tuple[int, int, float]] = []
        end = attack.reconstruct(
            update,
            model,
            Classification(),
            knowledge,
            generator=derive_generator(0, "smoothing"),
            progress=lambda *call: calls.append(call),
        )
        assert [call[0] for call in calls] == sorted({call[0] for call in calls})
        assert all(1 <= i <= n for i, n, _ in calls)
        return end

    sharp, smooth = found(smoothing_iterations=0, switching_iterations=0, sketch=0), found(switching_iterations=0)
    assert smooth.diagnostics["certified"] == 1.0
    assert float(psnr_db(smooth.images, images)) > 100
    assert sharp.diagnostics["certified"] == 0.0

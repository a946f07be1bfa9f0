"""Reading a model as a chain of layers: what is taken, what is refused and by which name."""

from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from attacks.chain import (
    Activate,
    Affine,
    Convolve,
    Pool,
    Reshape,
    activation_of,
    backward,
    forward,
    read_chain,
)
from fedattack.errors import NotApplicable
from fedattack.models import Normalize, build_model
from fedattack.models.layers import ACTIVATIONS
from fedattack.seeding import derive_generator, seeded_default_generator

SHAPE = (3, 7, 5)


def sequence(*layers, **named):
    """Layers made of classes and arguments, so that their weights come from one seed."""
    with seeded_default_generator(0):
        made = [(f"l{i}", layer()) for i, layer in enumerate(layers)]
    return nn.Sequential(OrderedDict(made + list(named.items())))


def conv(before, after, kernel=3, **options):
    return lambda: nn.Conv2d(before, after, kernel, **{"padding": 1, **options})


def dense(features, **options):
    return lambda: nn.Linear(features, 4, **options)


def read(model, shape=SHAPE):
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    return read_chain(model, state, shape, derive_generator(0, "chain"))


def kinds(chain):
    return [type(step) for step in chain.steps]


# ------------------------------------------------------------------------------------------------ what is read
def test_a_chain_is_read_in_order():
    model = sequence(
        lambda: Normalize(3, 0.5, 0.25),
        conv(3, 6, stride=2),
        nn.ReLU,
        lambda: nn.AvgPool2d(1),
        conv(6, 4),
        lambda: nn.AvgPool2d(2),
        lambda: nn.LeakyReLU(0.1),
        nn.Flatten,
        dense(8),
        nn.ReLU,
        dense(4),
    )
    chain = read(model)
    assert kinds(chain) == [Affine, Convolve, Activate, Reshape, Convolve, Pool, Activate, Reshape]
    assert [step.name for step in chain.convolutions] == ["l1", "l4"]
    assert (chain.dense.name, chain.dense.after, chain.outputs) == ("l8", "relu", 4)
    images = torch.rand(2, *SHAPE, generator=derive_generator(1, "images"), dtype=torch.float64)
    torch.testing.assert_close(chain.forward(images), model.double()[:8](images))


def test_what_follows_the_dense_layer():
    assert read(sequence(nn.Flatten, dense(105))).dense.after == "output"
    assert read(sequence(nn.Flatten, dense(105), nn.Tanh, dense(4))).dense.after == "tanh"
    assert read(sequence(nn.Flatten, dense(105), lambda: nn.LayerNorm(4))).dense.after == "other"


@pytest.mark.parametrize("name", ["mlp", "lenet", "conv-chain"])
def test_own_models_that_are_chains(name):
    model = build_model(name, image_shape=(3, 9, 8), num_classes=4, seed=0)
    assert isinstance(read(model, (3, 9, 8)).steps[0], Affine)


def test_batch_normalisation_in_evaluation_is_an_affine_map():
    model = sequence(conv(3, 4), lambda: nn.BatchNorm2d(4), nn.ReLU, nn.Flatten, dense(140)).eval()
    with torch.no_grad():
        model.l1.running_mean.copy_(torch.tensor([1.0, -2.0, 0.5, 0.0]))
        model.l1.running_var.copy_(torch.tensor([1.0, 4.0, 0.25, 9.0]))
        model.l1.weight.copy_(torch.tensor([1.0, -1.0, 2.0, 0.5]))
    chain = read(model)
    assert kinds(chain) == [Convolve, Affine, Activate, Reshape]
    inputs = torch.randn(2, 4, 7, 5, generator=derive_generator(0, "x"), dtype=torch.float64)
    torch.testing.assert_close(forward(chain.steps[1], inputs), model.double().l1(inputs))


def test_an_affine_layer_of_ones_own_is_measured():
    class Scale(nn.Module):
        def forward(self, x):
            return 3 * x - 1

    chain = read(sequence(conv(3, 4), Scale, nn.Flatten, dense(140)))
    assert kinds(chain) == [Convolve, Affine, Reshape]
    assert float((chain.steps[1].slope - 3).abs().max()) < 1e-9


def test_a_normalisation_outside_any_layer_is_measured():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 2, 3), nn.Linear(30, 4)

        def forward(self, x):
            return self.head(torch.flatten(self.conv((x - 0.4) / 0.2), 1))

    with seeded_default_generator(0):
        chain = read(Net())
    assert kinds(chain) == [Affine, Convolve, Reshape]
    assert float((chain.steps[0].slope - 5).abs().max()) < 1e-9


def test_dropout_in_evaluation_and_identity_change_nothing():
    model = sequence(conv(3, 4), lambda: nn.Dropout2d(0.5), nn.Identity, nn.Flatten, dense(140))
    assert kinds(read(model.eval())) == [Convolve, Reshape, Reshape, Reshape]


def test_pooling_over_single_pixels_changes_nothing():
    model = sequence(
        conv(3, 4), lambda: nn.AvgPool2d(1), nn.ReLU, lambda: nn.AdaptiveAvgPool2d((7, 5)), nn.Flatten, dense(140)
    )
    assert kinds(read(model)) == [Convolve, Reshape, Activate, Reshape, Reshape]


def test_layers_that_work_in_place():
    model = sequence(conv(3, 4), lambda: nn.ReLU(inplace=True), conv(4, 2), nn.Flatten, dense(70))
    assert kinds(read(model)) == [Convolve, Activate, Convolve, Reshape]


@pytest.mark.parametrize(
    "options",
    [{"padding": "same"}, {"padding": "valid"}, {"dilation": 2, "padding": 2}, {"groups": 3}, {"stride": (1, 2)}],
    ids=str,
)
def test_convolutions_of_all_kinds(options):
    with seeded_default_generator(0):
        layer = nn.Conv2d(3, 6, 3, **options)
    features = layer(torch.zeros(1, *SHAPE)).numel()
    chain = read(sequence(lambda: layer, nn.ReLU, nn.Flatten, dense(features)))
    inputs = torch.randn(2, *SHAPE, generator=derive_generator(0, "x"), dtype=torch.float64, requires_grad=True)
    found = forward(chain.steps[0], inputs)
    torch.testing.assert_close(found, layer.double()(inputs))
    gradient = torch.randn(found.shape, generator=derive_generator(1, "x"), dtype=torch.float64)
    (wanted,) = torch.autograd.grad(found, inputs, gradient)
    torch.testing.assert_close(backward(chain.steps[0], inputs, gradient), wanted)


def test_nothing_is_asked_of_what_comes_behind_the_first_dense_layer():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.first, self.second = nn.Conv2d(3, 2, 3), nn.Linear(30, 4), nn.Linear(4, 4)

        def forward(self, x):
            hidden = F.silu(self.first(self.conv(x).flatten(1)))
            return hidden + self.second(hidden)

    with seeded_default_generator(0):
        assert read(Net()).dense.name == "first"


# ------------------------------------------------------------------------------------------------ activations
@pytest.mark.parametrize("name", [*sorted(ACTIVATIONS), "elu-2", "celu", "softplus-3"])
def test_derivatives_and_inverses_as_functions_of_the_output(name):
    more = {"elu-2": lambda: nn.ELU(2.0), "celu": lambda: nn.CELU(0.7), "softplus-3": lambda: nn.Softplus(3.0)}
    module = (more | ACTIVATIONS)[name]()
    activation = activation_of(module)
    inputs = torch.linspace(-3, 3, 61, dtype=torch.float64).requires_grad_()
    outputs = module(inputs)
    (slope,) = torch.autograd.grad(outputs.sum(), inputs)
    outputs, inputs = outputs.detach(), inputs.detach()
    torch.testing.assert_close(activation.forward(inputs), outputs)
    bottom = {"silu": -1.2784, "gelu": -0.7518}.get(name, -9.0)
    right = (inputs > bottom) & (inputs != 0)
    torch.testing.assert_close(activation.derivative(outputs)[right], slope[right], rtol=1e-6, atol=1e-6)
    known = activation.determined(outputs)
    assert bool(known.any())
    torch.testing.assert_close(activation.inverse(outputs)[known], inputs[known], rtol=1e-7, atol=1e-7)
    assert bool((outputs >= activation.low).all())
    assert bool((outputs <= activation.high).all())
    if activation.folded:
        left = inputs < bottom
        torch.testing.assert_close(activation.other(outputs)[left], slope[left], rtol=1e-6, atol=1e-6)
        assert not bool(known[inputs < 0].any())


def test_a_relu_determines_only_what_is_active():
    activation = activation_of(nn.ReLU())
    assert activation.determined(torch.tensor([0.0, 1.0])).tolist() == [False, True]


# ------------------------------------------------------------------------------------------------ what is refused
class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1), nn.Linear(105, 4)
        self.act = nn.Tanh()

    def forward(self, x):
        x = self.a(x)
        return self.head(torch.flatten(self.act(self.b(x) + x), 1))


class Hidden(Residual):
    """A skip that ends behind the last convolution, where every value fits and only the gradient tells."""

    def forward(self, x):
        x = self.a(x)
        return self.head(torch.flatten(self.b(x), 1)) + x.mean((2, 3))[:, :1]


class Branches(Residual):
    def forward(self, x):
        return self.head(torch.flatten(self.a(x), 1)) + self.b(x).flatten(1)[:, :4]


class Functional(Residual):
    def forward(self, x):
        return self.head(torch.flatten(self.b(F.softplus(self.a(x))), 1))


class Concatenation(Residual):
    def __init__(self):
        super().__init__()
        self.b = nn.Conv2d(6, 3, 3, padding=1)

    def forward(self, x):
        x = self.a(x)
        return self.head(torch.flatten(self.b(torch.cat([x, x * 2], 1)), 1))


class Tied(Residual):
    def __init__(self):
        super().__init__()
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.head(torch.flatten(self.b(self.a(x)), 1))


class Twice(Residual):
    def forward(self, x):
        return self.head(torch.flatten(self.a(self.a(x)), 1))


class ClampedScale(nn.Module):
    def forward(self, x):
        return (3 * x - 1).clamp(-50, 50)


REFUSED = {
    "residual": (Residual, "'act'.*residual sum of 'a' and 'b'"),
    "hidden-skip": (Hidden, "'a'.*used elsewhere"),
    "functional": (Functional, "between 'a' and layer 'b'.*no layer of its own"),
    "concatenation": (Concatenation, "'b'.*concatenation"),
    "shared-weight": (Tied, "used in other layers too"),
    "layer-twice": (Twice, "'a'.*more than once"),
    "batch-norm-training": (
        lambda: sequence(conv(3, 4), lambda: nn.BatchNorm2d(4), nn.Flatten, dense(140)),
        "'l1'.*batch",
    ),
    "batch-norm-without-statistics": (
        lambda: sequence(
            conv(3, 4), lambda: nn.BatchNorm2d(4, track_running_stats=False), nn.Flatten, dense(140)
        ).eval(),
        "'l1'.*batch",
    ),
    "group-norm": (
        lambda: sequence(conv(3, 4), lambda: nn.GroupNorm(2, 4), nn.Flatten, dense(140)),
        "'l1'.*image itself",
    ),
    "instance-norm": (
        lambda: sequence(conv(3, 4), lambda: nn.InstanceNorm2d(4), nn.Flatten, dense(140)),
        "'l1'.*image",
    ),
    "max-pool": (lambda: sequence(conv(3, 4), lambda: nn.MaxPool2d(2), nn.Flatten, dense(24)), "'l1'.*largest"),
    "dropout": (lambda: sequence(conv(3, 4), nn.Dropout, nn.Flatten, dense(140)), "'l1'.*at random"),
    "pool-behind-activation": (
        lambda: sequence(conv(3, 4), nn.ReLU, lambda: nn.AvgPool2d(2), nn.Flatten, dense(24)),
        "'l2'.*activation 'l1'",
    ),
    "pool-of-the-image": (
        lambda: sequence(lambda: nn.AvgPool2d(2), conv(3, 4), nn.Flatten, dense(24)),
        "image itself before any convolution",
    ),
    "padded-pool": (
        lambda: sequence(conv(3, 4), lambda: nn.AvgPool2d(2, padding=1), nn.Flatten, dense(48)),
        "'l1'.*pads",
    ),
    "uneven-adaptive-pool": (
        lambda: sequence(conv(3, 4), lambda: nn.AdaptiveAvgPool2d(2), nn.Flatten, dense(16)),
        "'l1'.*different sizes",
    ),
    "reflecting-padding": (
        lambda: sequence(conv(3, 4, padding_mode="reflect"), nn.Flatten, dense(140)),
        "'l0'.*'reflect'",
    ),
    "lopsided-padding": (
        lambda: sequence(lambda: nn.Conv2d(3, 4, 4, padding="same"), nn.Flatten, dense(140)),
        "'l0'.*padding must be as wide on one side",
    ),
    "no-bias": (lambda: sequence(conv(3, 4), nn.Flatten, dense(140, bias=False)), "'l2'.*no bias"),
    "no-dense-layer": (lambda: sequence(conv(3, 4), nn.Flatten), "no dense layer"),
    "dense-on-pixels": (lambda: sequence(lambda: nn.Linear(5, 4), nn.Flatten), "'l0'.*many vectors"),
    "unknown-layer": (
        lambda: sequence(conv(3, 4), lambda: nn.Softmax2d(), nn.Flatten, dense(140)),
        r"'l1' \(Softmax2d\).*cannot be run backwards",
    ),
    "clamp-far-outside": (
        lambda: sequence(conv(3, 4), lambda: nn.Hardtanh(-100, 100), nn.Flatten, dense(140)),
        r"'l1' \(Hardtanh\).*cannot be run backwards",
    ),
    "clamp-of-small-values": (
        lambda: sequence(lambda: nn.ReLU6(), conv(3, 4), nn.Flatten, dense(140)),
        r"'l0' \(ReLU6\).*cannot be run backwards",
    ),
    "clamped-scale": (
        lambda: sequence(conv(3, 4), ClampedScale, nn.Flatten, dense(140)),
        r"'l1' \(ClampedScale\).*cannot be run backwards",
    ),
    "transposed-convolution": (
        lambda: sequence(lambda: nn.ConvTranspose2d(3, 2, 3), nn.Flatten, dense(126)),
        "'l0'.*cannot be run backwards",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_the_layer_and_the_reason(name):
    build, words = REFUSED[name]
    with seeded_default_generator(0):
        model = build()
    with pytest.raises(NotApplicable, match=words):
        read(model)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("convnet-small", {"pool": "max"}, "'pool0'"),
        ("convnet-small", {}, "'pool0'.*'act0'"),
        ("convnet-small", {"norm": "group", "width": 4}, "'norm0'"),
        ("resnet18", {"width": 2, "norm": "group"}, "'bn1'"),
    ],
)
def test_refusals_of_own_models(name, options, words):
    model = build_model(name, image_shape=(3, 9, 9), num_classes=4, seed=0, **options)
    with pytest.raises(NotApplicable, match=words):
        read(model, (3, 9, 9))


def test_a_branch_behind_the_dense_layer_from_the_image_is_allowed():
    """It does not touch the layers that are run backwards."""
    with seeded_default_generator(0):
        assert read(Branches()).dense.name == "head"


def test_hooks_and_randomness_are_left_alone():
    model = sequence(conv(3, 4), lambda: nn.Dropout(0.5), nn.Flatten, dense(140))
    before = torch.get_rng_state()
    with pytest.raises(NotApplicable):
        read(model)
    assert torch.equal(before, torch.get_rng_state())
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())

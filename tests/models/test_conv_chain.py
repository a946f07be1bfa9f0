"""The five published networks by name, and chains of one's own."""

import pytest
import torch
from torch import nn

from fedattack.errors import FedattackError
from fedattack.models import build_model, parameter_count
from fedattack.models.conv_chain import ARCHITECTURES


def built(shape=(3, 32, 32), classes=100, **options):
    return build_model("conv-chain", image_shape=shape, num_classes=classes, seed=0, **options)


@pytest.mark.parametrize(
    ("architecture", "features"),
    [("letnet", 768), ("letnet-o", 192), ("o-cnn6", 192), ("letnet-4-relu", 192), ("letnet-all-relu", 192)],
)
def test_the_published_networks(architecture, features):
    model = built(architecture=architecture)
    assert model.head.in_features == features
    plan = ARCHITECTURES[architecture]
    convolutions = [m for m in model if isinstance(m, nn.Conv2d)]
    assert tuple(m.out_channels for m in convolutions) == plan.filters
    assert all(m.kernel_size == (5, 5) and m.padding == (2, 2) for m in convolutions)
    slopes = [m.negative_slope for m in model if isinstance(m, nn.LeakyReLU)]
    assert slopes == [0.2] * plan.activation.count("leaky-relu")
    assert model(torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))).shape == (2, 100)
    values = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert -0.5 <= float(values.min()) < -0.49
    assert 0.49 < float(values.max()) <= 0.5


def test_parameter_count():
    before, total = 3, 0
    for filters in (12, 16, 12, 12):
        total += 25 * before * filters + filters
        before = filters
    assert parameter_count(built()) == total + 768 * 100 + 100


def test_a_chain_of_ones_own():
    options = {"filters": (4, 6), "strides": 2, "kernels": (4, 3), "paddings": (0, 1), "activation": ("tanh", "relu")}
    model = built((1, 9, 7), 5, **options, dense=(11,), norm="batch", init="default")
    assert [type(m) for m in model][1:7] == [
        nn.Conv2d,
        type(model.norm0),
        nn.Tanh,
        nn.Conv2d,
        type(model.norm1),
        nn.ReLU,
    ]
    assert (model.conv0.kernel_size, model.conv0.padding, model.conv1.padding) == ((4, 4), (0, 0), (1, 1))
    assert model.linear0.in_features == 6 * 2 * 1
    assert (model.linear0.out_features, model.head.in_features, model.head.out_features) == (11, 11, 5)
    assert model.eval()(torch.rand(1, 1, 9, 7)).shape == (1, 5)
    assert float(model.head.weight.abs().max()) < 0.4, "PyTorch's own start"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"architecture": "letnet_o"}, "did you mean 'letnet-o'"),
        ({"init": "rconv"}, "did you mean 'r-conv'"),
        ({"filters": (3, 3), "strides": (1, 1, 1)}, "strides must be one number or 2"),
        ({"filters": (3, 3), "activation": ("relu",)}, "activation must be one name or 2"),
        ({"filters": (3,), "activation": "rellu"}, "did you mean 'relu'"),
        ({"filters": (3,), "kernels": 40, "paddings": 0}, "larger than the kernel of conv0"),
    ],
)
def test_wrong_requests(options, words):
    with pytest.raises(FedattackError, match=words):
        built(**options)

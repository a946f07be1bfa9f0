"""Classifiers: sizes by arithmetic, second derivatives, torch.func, seeds, odd image sizes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, jvp, vmap

from fedattack.errors import FedattackError, UnknownName
from fedattack.models import MODELS, Normalize, build_model, parameter_count
from fedattack.models.layers import ACTIVATIONS, BatchNorm2d
from fedattack.tasks import Classification, simulate, simulate_gradient

CLASSIFIERS = [name for name in MODELS if name != "unet"]
SMALL: dict[str, dict[str, object]] = {
    "mlp": {"hidden": (16, 12)},
    "lenet": {"channels": 3},
    "convnet": {"width": 2},
    "convnet-small": {"width": 3},
    "vgg": {"width": 2},
    "resnet18": {"width": 2},
    "conv-chain": {"filters": (4, 3), "strides": (2, 1), "kernels": 3},
}
NORMED = ["convnet", "convnet-small", "vgg", "resnet18"]


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def small(name, image_shape=(3, 8, 8), num_classes=4, seed=0, **options):
    return build_model(name, image_shape=image_shape, num_classes=num_classes, seed=seed, **{**SMALL[name], **options})


def uniform(*shape, seed=0, dtype=torch.float32):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def state_of(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def batch(count=3, shape=(3, 8, 8), num_classes=4, dtype=torch.float32):
    return {"images": uniform(count, *shape, dtype=dtype), "labels": torch.arange(count) % num_classes}


# ------------------------------------------------------------------------------------------------ sizes
def conv(before, after, side, bias=True):
    return side * side * before * after + (after if bias else 0)


def linear(before, after):
    return before * after + after


def resnet18_count(colours, stem, num_classes):
    """Per stage: four 3×3 convolutions with a scale and a shift after each; a 1×1 shortcut in stages 2 to 4."""
    total = conv(colours, 64, stem, bias=False) + 2 * 64
    for before, after in ((64, 64), (64, 128), (128, 256), (256, 512)):
        total += conv(before, after, 3, bias=False) + 3 * conv(after, after, 3, bias=False) + 4 * 2 * after
        if before != after:
            total += conv(before, after, 1, bias=False) + 2 * after
    return total + linear(512, num_classes)


@pytest.mark.parametrize(
    ("name", "image_shape", "num_classes", "options", "expected"),
    [
        # 105·256 + 256, 256·128 + 128, 128·4 + 4
        ("mlp", (3, 7, 5), 4, {}, 27_136 + 32_896 + 516),
        ("mlp", (1, 7, 5), 4, {"hidden": (), "bias": False}, 35 * 4),
        # 25·3·12 + 12, twice 25·12·12 + 12, 12·8·8 = 768 features
        ("lenet", (3, 32, 32), 10, {}, 912 + 2 * 3_612 + 7_690),
        # sides 7 → 4 → 2 → 2 and 5 → 3 → 2 → 2
        ("lenet", (1, 7, 5), 10, {}, 312 + 2 * 3_612 + 48 * 10 + 10),
        # sides 32 → 10 → 3, so 9·256 features
        (
            "convnet",
            (3, 32, 32),
            10,
            {},
            conv(3, 64, 3)
            + conv(64, 128, 3)
            + conv(128, 128, 3)
            + conv(128, 256, 3)
            + 4 * conv(256, 256, 3)
            + linear(9 * 256, 10),
        ),
        # sides 32 → 16 → 8, so 64·32 features
        ("convnet-small", (3, 32, 32), 10, {}, 448 + 4_640 + 9_248 + 20_490),
        # sides 7 → 3 → 1 and 5 → 2 → 1; a batch norm's scale and shift replace one bias
        ("convnet-small", (3, 7, 5), 10, {"norm": "batch"}, 448 + 4_640 + 9_248 + (16 + 32 + 32) + 330),
        (
            "vgg",
            (3, 32, 32),
            10,
            {},
            conv(3, 64, 3)
            + conv(64, 128, 3)
            + conv(128, 256, 3)
            + conv(256, 256, 3)
            + conv(256, 512, 3)
            + 3 * conv(512, 512, 3)
            + linear(512, 10),
        ),
        ("resnet18", (3, 32, 32), 10, {}, resnet18_count(3, 3, 10)),
        ("resnet18", (3, 32, 32), 10, {"norm": "group"}, resnet18_count(3, 3, 10)),
        ("resnet18", (3, 224, 224), 1000, {"stem": "imagenet"}, resnet18_count(3, 7, 1000)),
    ],
)
def test_parameter_counts(name, image_shape, num_classes, options, expected):
    model = build_model(name, image_shape=image_shape, num_classes=num_classes, seed=0, **options)
    assert parameter_count(model) == expected
    assert sum(t.numel() for n, t in model.state_dict().items() if "running" not in n and "num_b" not in n) == expected


def test_published_sizes():
    """LeNet of DLG has 15,826 weights (second_order experiments); torchvision's resnet18 says 11,689,512."""
    assert 912 + 2 * 3_612 + 7_690 == 15_826
    assert resnet18_count(3, 7, 1000) == 11_689_512


def test_resnet18_equals_torchvision_with_its_weights():
    from torchvision.models import resnet18

    ours = build_model("resnet18", image_shape=(3, 64, 64), num_classes=7, seed=0, stem="imagenet", mean=0.4, std=0.2)
    theirs = resnet18(num_classes=7)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    images = uniform(3, 3, 64, 64)
    for mode in (True, False):
        ours.train(mode)
        theirs.train(mode)
        assert torch.allclose(ours(images), theirs((images - 0.4) / 0.2), atol=1e-5)
    assert torch.allclose(ours.bn1.running_var, theirs.bn1.running_var)


# ------------------------------------------------------------------------------------------------ normalisation
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_the_first_layer_normalises(name):
    model = small(name)
    first = next(iter(model.children()))
    assert isinstance(first, Normalize)
    assert (first(torch.full((2, 3, 8, 8), 0.5)) == 0).all()
    assert not any("normalize" in key for key in model.state_dict())
    seen = []
    first.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    images = uniform(2, 3, 8, 8)
    model(images)
    assert seen[0] is images


def test_mean_and_std_can_be_given_per_channel():
    layer = Normalize(3, mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 4.0))
    out = layer(torch.full((1, 3, 1, 1), 0.5)).flatten()
    assert torch.allclose(out, torch.tensor([0.4, 0.15, 0.05]))
    for bad in ({"mean": (0.1, 0.2)}, {"std": 0.0}, {"std": (1.0, 1.0, -1.0)}):
        with pytest.raises(FedattackError, match="must be"):
            Normalize(3, **bad)


# ------------------------------------------------------------------------------------------------ derivatives
@pytest.mark.parametrize("name", CLASSIFIERS)
@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 7, 5)])
def test_double_backward_is_finite_and_every_parameter_has_a_gradient(name, shape):
    model = small(name, shape)
    private = batch(shape=shape)
    private["images"].requires_grad_()
    gradient = simulate_gradient(model, state_of(model), Classification(), [private])
    assert set(gradient) == {key for key, _ in model.named_parameters()}
    for key, tensor in gradient.items():
        assert tensor.isfinite().all(), key
        assert tensor.abs().max() > 0, key
    (second,) = torch.autograd.grad(sum(t.square().sum() for t in gradient.values()), private["images"])
    assert second.isfinite().all()
    assert (second.flatten(1).abs().max(1).values > 0).all()


@pytest.mark.parametrize(
    ("name", "norm"),
    [(name, "none") for name in CLASSIFIERS] + [(name, norm) for name in NORMED for norm in ("batch", "group")],
)
def test_second_derivatives_are_right(name, norm):
    """gradcheck, float64, of three random projections of the gradient as functions of the images."""
    shape = (1, 9, 6) if name == "resnet18" else (1, 4, 3)
    options = {"norm": norm} if name in NORMED else {}
    model = small(name, shape, num_classes=2, activation="tanh", **options).double()
    state = state_of(model)
    labels = torch.tensor([0, 1])
    weights = {
        key: uniform(3, *tensor.shape, seed=i, dtype=torch.float64) for i, (key, tensor) in enumerate(state.items())
    }

    def projected(images):
        private = {"images": images, "labels": labels}
        gradient = simulate_gradient(model, dict(state), Classification(), [private])
        return sum((weights[key] * tensor).flatten(1).sum(1) for key, tensor in gradient.items())

    images = uniform(2, *shape, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(projected, (images,))


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_torch_func_composes(name):
    """jvp and vmap over the gradient agree with a loop over plain autograd."""
    model = small(name, activation="tanh").double()
    state = state_of(model)
    labels = torch.tensor([0, 3])

    def gradient(images):
        return simulate_gradient(model, dict(state), Classification(), [{"images": images, "labels": labels}])

    many = uniform(3, 2, 3, 8, 8, dtype=torch.float64)
    at_once = vmap(gradient)(many)
    one_by_one = [gradient(images) for images in many]
    for key in at_once:
        assert torch.allclose(at_once[key], torch.stack([g[key] for g in one_by_one]), atol=1e-12), key
    direction = uniform(2, 3, 8, 8, seed=5, dtype=torch.float64)
    _, forward = jvp(gradient, (many[0],), (direction,))
    step = 1e-5
    above, below = gradient(many[0] + step * direction), gradient(many[0] - step * direction)
    for key in forward:
        assert torch.allclose(forward[key], (above[key] - below[key]) / (2 * step), atol=1e-5), key
    tangents = vmap(lambda d: jvp(gradient, (many[0],), (d,))[1])(torch.stack([direction, 2 * direction]))
    for key in forward:
        assert torch.allclose(tangents[key][1], 2 * forward[key], atol=1e-12), key


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_every_activation_is_twice_differentiable_under_torch_func(activation):
    model = small("mlp", activation=activation)
    state = state_of(model)

    def gradient(images):
        private = {"images": images, "labels": torch.tensor([1, 2])}
        return simulate_gradient(model, state, Classification(), [private])["linear0.weight"]

    images = uniform(2, 3, 8, 8)
    _, tangent = jvp(gradient, (images,), (images,))
    assert tangent.isfinite().all()
    assert tangent.abs().max() > 0


# ------------------------------------------------------------------------------------------------ purity
@pytest.mark.parametrize("name", CLASSIFIERS)
@pytest.mark.parametrize("kind", ["gradient", "weights"])
def test_simulation_leaves_the_model_untouched(name, kind):
    model = small(name)
    before = state_of(model)
    sent = state_of(model)
    batches = [batch()] if kind == "gradient" else [batch(), batch()]
    simulate(model, sent, Classification(), batches, kind=kind, learning_rate=0.1)
    assert model.training
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_the_seed_alone_decides_the_weights(name):
    shape = (3, 8, 8)
    options = SMALL.get(name, {"block_out_channels": (8, 8)})
    state = torch.get_rng_state()
    models = [build_model(name, image_shape=shape, num_classes=4, seed=seed, **options) for seed in (5, 5, 6)]
    assert torch.equal(state, torch.get_rng_state())
    first, same, other = [torch.cat([p.detach().flatten() for p in m.parameters()]) for m in models]
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert first.dtype == torch.float32


def test_dlg_initialisation_is_uniform_from_minus_to_plus_one_half():
    """U(−½, ½) over 15,826 draws: standard deviation 1/√12 to about a hundredth, extremes near ±½."""
    model = build_model("lenet", image_shape=(3, 32, 32), num_classes=10, seed=0)
    values = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert values.abs().max() <= 0.5
    assert values.abs().max() > 0.499
    assert abs(float(values.std()) - 12**-0.5) < 0.005
    default = build_model("lenet", image_shape=(3, 32, 32), num_classes=10, seed=0, init="default")
    assert default.conv0.weight.abs().max() <= 75**-0.5


@pytest.mark.parametrize("name", CLASSIFIERS)
@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 7, 5), (3, 16, 9), (3, 1, 1)])
def test_any_image_size_and_float64(name, shape):
    model = small(name, shape, num_classes=3).eval()
    images = uniform(2, *shape)
    logits = model(images)
    assert logits.shape == (2, 3)
    precise = functional_call(copy.deepcopy(model).double(), {}, (images.double(),))
    assert precise.dtype == torch.float64
    assert torch.allclose(precise.float(), logits, atol=1e-4)


# ------------------------------------------------------------------------------------------------ batch norm
def net(norm):
    layers = [nn.Conv2d(3, 4, 3), norm(4), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)]
    return nn.Sequential(*layers).train()


def test_batch_norm_in_training_is_plain_sgd_running_statistics_included():
    ours, plain = net(BatchNorm2d), net(nn.BatchNorm2d)
    plain.load_state_dict(ours.state_dict())
    batches = [batch(num_classes=3, count=5), {"images": uniform(5, 3, 8, 8, seed=9), "labels": torch.ones(5).long()}]
    sent = state_of(ours)
    received = simulate(ours, sent, Classification(), batches, kind="weights", learning_rate=0.3)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.3)
    for private in batches:
        optimizer.zero_grad()
        F.cross_entropy(plain(private["images"]), private["labels"]).backward()
        optimizer.step()
    for key, tensor in plain.state_dict().items():
        if key != "1.num_batches_tracked":
            assert torch.allclose(received[key], tensor, atol=1e-6), key
    assert not torch.equal(received["1.running_mean"], sent["1.running_mean"])


def test_batch_norm_under_vmap_normalises_each_sample_by_its_own_batch():
    layer = BatchNorm2d(3).train()
    before = layer.running_mean.clone()
    many = uniform(4, 5, 3, 2, 2)
    mapped = vmap(lambda images: functional_call(layer, {}, (images,)))(many)
    assert torch.equal(layer.running_mean, before)
    assert torch.allclose(mapped.mean((1, 3, 4)), torch.zeros(4, 3), atol=1e-6)
    scale = grad(lambda w: functional_call(layer, {"weight": w}, (many[0],)).square().sum())(torch.ones(3))
    assert torch.allclose(scale, torch.full((3,), 2 * 5 * 2 * 2.0), rtol=1e-3)


def test_batch_norm_in_eval_mode_uses_and_keeps_the_running_statistics():
    layer = BatchNorm2d(2).eval()
    layer.running_mean.copy_(torch.tensor([1.0, 2.0]))
    out = layer(torch.zeros(1, 2, 1, 1)).flatten()
    assert torch.allclose(out, torch.tensor([-1.0, -2.0]), atol=1e-4)
    assert layer.running_mean.tolist() == [1.0, 2.0]


# ------------------------------------------------------------------------------------------------ names
@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("mlp", {"activation": "rellu"}, "did you mean 'relu'"),
        ("mlp", {"hiden": (3,)}, "did you mean 'hidden'"),
        ("convnet", {"norm": "bach"}, "did you mean 'batch'"),
        ("vgg", {"pool": "averag"}, "did you mean 'average'"),
        ("lenet", {"init": "dlgg"}, "did you mean 'dlg'"),
        ("resnet18", {"stem": "cifra"}, "did you mean 'cifar'"),
    ],
)
def test_typos(name, options, text):
    with pytest.raises(FedattackError, match=text):
        build_model(name, image_shape=(3, 8, 8), num_classes=4, seed=0, **options)


def test_wrong_requests():
    with pytest.raises(UnknownName, match="did you mean 'lenet'"):
        build_model("lenett", image_shape=(3, 8, 8), num_classes=4, seed=0)
    with pytest.raises(FedattackError, match="num_classes"):
        build_model("mlp", image_shape=(3, 8, 8), num_classes=None, seed=0)
    with pytest.raises(FedattackError, match="image_shape"):
        build_model("mlp", image_shape=(8, 8), num_classes=4, seed=0)


def test_a_model_of_the_users_own(monkeypatch):
    import fedattack

    def own(image_shape, num_classes, scale=1.0):
        return nn.Sequential(nn.Flatten(), nn.Linear(image_shape[0] * image_shape[1] * image_shape[2], num_classes))

    monkeypatch.setattr(fedattack, "own", own, raising=False)
    model = build_model("fedattack:own", image_shape=(1, 7, 5), num_classes=2, seed=0, scale=2.0)
    assert parameter_count(model) == 72
    monkeypatch.setattr(fedattack, "own", lambda image_shape, num_classes: "no model")
    with pytest.raises(FedattackError, match=r"torch\.nn\.Module"):
        build_model("fedattack:own", image_shape=(1, 7, 5), num_classes=2, seed=0)

"""Cocktail Party: independent images are found in their mixtures, to a good approximation."""

import pytest
import torch

from attacks.cocktail_party import CocktailParty, correlation
from attacks.dense_layers import behind
from attacks.linear_leak import LinearLeak
from attacks.unmixing import Unmixing
from fedattack.errors import FedattackError, NotApplicable
from fedattack.metrics import match_batch, psnr_db
from fedattack.models import build_model
from fedattack.seeding import derive_generator
from fedattack.tasks import Classification
from fedattack.types import Knowledge

CLASSES = 5
SHAPE = (3, 16, 16)


def mlp(hidden=(64,), shape=SHAPE, **options):
    return build_model("mlp", image_shape=shape, num_classes=CLASSES, seed=0, hidden=hidden, **options)


def run(attack, update, model, batch, shape=SHAPE, **facts):
    knowledge = Knowledge(image_shape=shape, batch_size=batch, num_classes=CLASSES, **facts)
    return attack.reconstruct(update, model, Classification(), knowledge, generator=derive_generator(0, "cpa"))


def scores(found, images):
    return psnr_db(found.images[match_batch(found.images, images.float())], images.float())


def pictures(batch: int) -> torch.Tensor:
    """Black shapes on grey, alone in their neighbourhoods: independent, sparse edges."""
    images = torch.full((batch, *SHAPE), 0.5, dtype=torch.float64)
    generator = derive_generator(0, "shapes")
    for image in images:
        for _ in range(4):
            y, x = torch.randint(0, 12, (2,), generator=generator).tolist()
            image[:, y : y + 4, x : x + 4] = torch.rand(3, 1, 1, generator=generator, dtype=torch.float64)
    return images


@pytest.mark.parametrize("activation", ["sigmoid", "relu"])
def test_edges_part_what_the_linear_leak_cannot(make_update, activation):
    images, model = pictures(6), mlp(activation=activation)
    update = make_update(model, images, torch.arange(6) % CLASSES)
    edges = scores(run(CocktailParty(search="fixed-point", signals="edges"), update, model, 6), images)
    leak = scores(run(LinearLeak(), update, model, 6), images)
    assert float(edges.mean()) > float(leak.mean()) + 6 if activation == "sigmoid" else float(edges.mean()) > 15


def test_adam_lowers_its_loss_and_decorrelates(make_update):
    images, model = pictures(4), mlp()
    update = make_update(model, images, torch.arange(4))
    found = run(CocktailParty(iterations=300, learning_rate=0.01), update, model, 4)
    assert found.steps == 300
    assert found.losses[-1] < found.losses[0]
    assert found.diagnostics["component_correlation"] < 0.3
    assert found.images.shape == (4, *SHAPE)


def test_signs_and_scales_come_with_the_bias(make_update):
    """Every input of the mixture has 1 in the bias's column, so no image comes back as a negative."""
    images, model = pictures(3), mlp()
    found = run(
        CocktailParty(search="fixed-point", signals="edges"), make_update(model, images, torch.arange(3)), model, 3
    )
    matched = found.images[match_batch(found.images, images.float())].flatten(1)
    centred = matched - matched.mean(1, keepdim=True)
    wanted = images.float().flatten(1) - images.float().flatten(1).mean(1, keepdim=True)
    assert float(torch.cosine_similarity(centred, wanted).min()) > 0.8


def test_one_image_is_exact(make_update, random_images):
    model, images = mlp(activation="tanh"), random_images((1, *SHAPE))
    assert float(scores(run(CocktailParty(), make_update(model, images, torch.tensor([1])), model, 1), images)) > 100


def test_fewer_mixtures_than_images(make_update, random_images):
    model, images = mlp(hidden=(4,)), random_images((6, *SHAPE))
    with pytest.raises(NotApplicable, match="too few mixtures for a batch of 6"):
        run(CocktailParty(), make_update(model, images, torch.arange(6) % CLASSES), model, 6)


def test_convolutions_are_refused(make_update, random_images):
    model = build_model("convnet-small", image_shape=SHAPE, num_classes=CLASSES, seed=0, width=2)
    with pytest.raises(NotApplicable, match="no dense layer"):
        run(CocktailParty(), make_update(model, random_images((2, *SHAPE)), torch.arange(2)), model, 2)


@pytest.mark.parametrize("options", [{"search": "adamw"}, {"signals": "pixel"}, {"iterations": 0}])
def test_options_that_cannot_be(options):
    with pytest.raises(FedattackError, match="must be"):
        CocktailParty(**options)


def test_correlation_of_equal_components_is_one():
    signals = torch.randn(2, 50, generator=derive_generator(0, "c"), dtype=torch.float64)
    assert correlation(torch.ones(2, 2, dtype=torch.float64), signals) == pytest.approx(1.0)
    assert correlation(torch.eye(2, dtype=torch.float64), signals) < 0.5


# ------------------------------------------------------------------------------------------------ unmixing
@pytest.mark.parametrize(
    ("hidden", "activation"), [((64, 16), "relu"), ((48,), "sigmoid"), ((40, 16), "gelu"), ((), "relu")]
)
def test_unmixing_is_exact_whatever_follows(make_update, hidden, activation):
    images, model = pictures(4), mlp(hidden=hidden, activation=activation)
    found = run(Unmixing(), make_update(model, images, torch.tensor([0, 1, 1, 3])), model, 4)
    assert found.diagnostics["exact_images"] == 4
    assert float(scores(found, images).min()) > 100


def test_unmixing_where_no_relu_ever_switches_off(make_update):
    """No zeros to look for, but the network is smooth there: the head's equations give the batch."""
    images, model = pictures(3), mlp(hidden=(40,))
    with torch.no_grad():
        model.linear0.bias.fill_(10.0)
    update = make_update(model, images, torch.tensor([0, 1, 3]))
    found = run(Unmixing(rounds=1), update, model, 3, labels=torch.tensor([3, 1, 0]))
    assert found.diagnostics["zero_share"] == 0
    assert found.diagnostics["exact_images"] == 3
    assert float(scores(found, images).min()) > 100


def test_unmixing_of_a_weight_difference_of_unknown_scale(make_update):
    """Zeros and signs need no learning rate."""
    images, model = pictures(4), mlp(hidden=(64, 16))
    update = make_update(model, images, torch.arange(4), kind="weights", learning_rate=0.3, local_steps=1)
    assert float(scores(run(Unmixing(), update, model, 4), images).min()) > 60


@pytest.mark.parametrize("batch", [1, 5])
def test_unmixing_float32(make_update, batch):
    images, model = pictures(batch), mlp()
    update = make_update(model, images, torch.arange(batch) % CLASSES, dtype=torch.float32)
    assert float(scores(run(Unmixing(), update, model, batch), images).min()) > 60


def test_unmixing_refuses_what_it_cannot_see(make_update, random_images):
    model = build_model("lenet", image_shape=SHAPE, num_classes=CLASSES, seed=0, channels=3)
    with pytest.raises(NotApplicable, match="no dense layer"):
        run(Unmixing(), make_update(model, random_images((2, *SHAPE)), torch.arange(2)), model, 2)
    with pytest.raises(FedattackError, match="rounds must be"):
        Unmixing(rounds=0)


# ------------------------------------------------------------------------------------------------ what follows a layer
def behind_of(model, layer, make_state, shape=SHAPE):
    probes = torch.rand((2, *shape), generator=derive_generator(0, "probes"), dtype=torch.float64)
    return behind(model, make_state(model, torch.float64), layer, probes), probes


@pytest.mark.parametrize("activation", ["relu", "sigmoid", "leaky-relu", "softplus"])
def test_the_head_behind_a_layer_is_the_model(make_state, activation):
    model = mlp(hidden=(12, 7), activation=activation).double()
    found, probes = behind_of(model, "linear0", make_state)
    assert found.activation == activation
    before = model.linear0(model.flatten(model.normalize(probes)))
    torch.testing.assert_close(found.head(before), model(probes))
    last, _ = behind_of(model, "head", make_state)
    assert last.activation == "softmax"
    assert last.head(before) is before


def test_a_sum_behind_the_layer_is_no_stack(make_state):
    class Residual(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.flatten, self.first, self.act = torch.nn.Flatten(), torch.nn.Linear(768, 9), torch.nn.ReLU()
            self.last = torch.nn.Linear(9, CLASSES)

        def forward(self, images):
            z = self.first(self.flatten(images))
            return self.last(self.act(z) + z)

    found, _ = behind_of(Residual(), "first", make_state)
    assert found.activation == "relu"
    assert found.head is None


def test_a_functional_activation_is_not_guessed(make_state):
    class Functional(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.flatten, self.first = torch.nn.Flatten(), torch.nn.Linear(768, 9)
            self.last = torch.nn.Linear(9, CLASSES)

        def forward(self, images):
            return self.last(torch.relu(self.first(self.flatten(images))))

    found, _ = behind_of(Functional(), "first", make_state)
    assert (found.activation, found.head) == ("other", None)

"""Labels from the last layer's gradient.

Exact: one image, any model with a dense head of at least three classes, with a bias or without. Exact as well: batches on
a net whose prediction is the same for every image. Approximate: batches on any other net, since the mean predicted
probability of the client's images is estimated on other images.
"""

import pytest
import torch
from torch import nn

from attacks.labels import infer_labels
from fedattack.errors import NotApplicable
from fedattack.models import build_model
from fedattack.seeding import derive_generator, seeded_default_generator
from fedattack.types import Knowledge

SHAPE = (1, 8, 8)
CLASSES = 6
MODELS = {
    "mlp": {},
    "lenet": {"channels": 4},
    "convnet-small": {"width": 4},
    "vgg": {"width": 2},
    "resnet18": {"width": 4, "norm": "group"},
}


def inferred(update, model, batch=1, classes=CLASSES, **facts):
    knowledge = Knowledge(image_shape=SHAPE, batch_size=batch, num_classes=classes, **facts)
    return infer_labels(update, model, knowledge, generator=derive_generator(0, "labels"))


@pytest.mark.parametrize("name", sorted(MODELS))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_one_image_is_exact(make_update, random_images, name, dtype):
    for label in range(CLASSES):
        model = build_model(name, image_shape=SHAPE, num_classes=CLASSES, seed=label, **MODELS[name]).to(dtype)
        update = make_update(model, random_images((1, *SHAPE), label), torch.tensor([label]), dtype=dtype)
        assert inferred(update, model).tolist() == [label]


@pytest.mark.parametrize("activation", ["relu", "sigmoid", "tanh"])
def test_one_image_without_a_bias_is_exact(make_update, random_images, activation):
    """Σ_{j≠k} (p_j − y_j)(p_k − y_k) = −(p_k − y_k)², least for the true class from three classes on."""
    options = {"bias": False, "activation": activation}
    for label in range(CLASSES):
        model = build_model("mlp", image_shape=SHAPE, num_classes=CLASSES, seed=label, **options)
        update = make_update(model, random_images((1, *SHAPE), label), torch.tensor([label]))
        assert inferred(update, model).tolist() == [label]


@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize("bias", [True, False])
def test_two_classes(make_update, random_images, label, bias):
    """Without a bias both rows have the same length; behind a ReLU the true class is the row whose entries are negative."""
    for seed in range(4):
        options = {"bias": bias, "activation": "relu"}
        model = build_model("mlp", image_shape=SHAPE, num_classes=2, seed=seed, **options)
        update = make_update(model, random_images((1, *SHAPE), seed), torch.tensor([label]))
        assert inferred(update, model, classes=2).tolist() == [label]


@pytest.mark.parametrize("local_steps", [1, 3])
@pytest.mark.parametrize("known_rate", [True, False])
def test_one_image_from_weights_is_exact(make_update, random_images, local_steps, known_rate):
    model = build_model("mlp", image_shape=SHAPE, num_classes=CLASSES, seed=0)
    settings = {"kind": "weights", "learning_rate": 0.05, "local_steps": local_steps}
    update = make_update(model, random_images((1, *SHAPE)), torch.tensor([4]), **settings)
    facts = {"learning_rate": 0.05} if known_rate else {}
    assert inferred(update, model, local_steps=local_steps, **facts).tolist() == [4]


@pytest.mark.parametrize("labels", [[0, 0], [1, 4], [2, 2, 2, 5], [0, 1, 2, 3, 4, 5, 5, 5], [3] * 7])
def test_counts_are_exact_where_the_prediction_is_constant(make_update, random_images, labels):
    """A head of zeros predicts 1/K for every image, so p̄ is no estimate but the truth."""
    model = build_model("mlp", image_shape=SHAPE, num_classes=CLASSES, seed=0)
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.copy_(torch.linspace(-1, 1, CLASSES))
    update = make_update(model, random_images((len(labels), *SHAPE)), torch.tensor(labels).flip(0))
    assert inferred(update, model, len(labels)).tolist() == sorted(labels)


@pytest.mark.parametrize("name", ["mlp", "convnet-small"])
def test_counts_of_repeated_labels_on_untrained_nets(make_update, patches, name):
    """Approximate: p̄ comes from public images. Untrained default nets predict nearly the same for all, which is enough."""
    shape, wrong, total = patches.private.image_shape, 0, 0
    for seed in range(6):
        generator = derive_generator(seed, "batch")
        labels = torch.randint(0, 3, (6,), generator=generator)  # three of the classes: repeats for sure
        images = patches.private.images(torch.randperm(len(patches.private), generator=generator)[:6])
        model = build_model(name, image_shape=shape, num_classes=CLASSES, seed=seed)
        update = make_update(model, images, labels)
        found = infer_labels(
            update,
            model,
            Knowledge(batch_size=6, num_classes=CLASSES, public_images=patches.public.images()),
            generator=derive_generator(0, "labels"),
        )
        assert found.shape == (6,)
        counts = [torch.bincount(t, minlength=CLASSES) for t in (found, labels)]
        wrong, total = wrong + int((counts[0] - counts[1]).abs().sum()) // 2, total + 6
    assert wrong <= total // 12


def test_counts_after_several_local_steps_stay_a_batch(make_update, random_images):
    """Approximate; what must hold is that B labels of the K classes come back, most of them right for small steps."""
    model = build_model("mlp", image_shape=SHAPE, num_classes=CLASSES, seed=0)
    labels = torch.tensor([0, 0, 3, 5])
    settings = {"kind": "weights", "learning_rate": 0.01, "local_steps": 3}
    update = make_update(model, random_images((4, *SHAPE)), labels, **settings)
    found = inferred(update, model, 4, learning_rate=0.01, local_steps=3)
    assert found.tolist() == labels.tolist()


def test_counts_from_weights_need_the_learning_rate(make_update, random_images):
    """p̄ − n/B is read in units of the gradient: from an unscaled weight difference the counts would be p̄ alone."""
    model = build_model("mlp", image_shape=SHAPE, num_classes=CLASSES, seed=0)
    labels = torch.tensor([2, 2, 2, 2])
    update = make_update(model, random_images((4, *SHAPE)), labels, kind="weights", learning_rate=0.01)
    try:
        found = inferred(update, model, 4)
    except NotApplicable:
        return
    assert found.tolist() == labels.tolist()


def test_where_labels_cannot_be_read(make_update, random_images):
    no_bias = build_model("mlp", image_shape=SHAPE, num_classes=CLASSES, seed=0, bias=False)
    update = make_update(no_bias, random_images((2, *SHAPE)), torch.tensor([0, 1]))
    with pytest.raises(NotApplicable, match="bias"):
        inferred(update, no_bias, 2)
    with seeded_default_generator(0):
        dense_free = nn.Sequential(nn.Conv2d(1, CLASSES, 8), nn.Flatten())
    update = make_update(dense_free, random_images((1, *SHAPE)), torch.tensor([0]))
    with pytest.raises(NotApplicable, match="no dense layer"):
        inferred(update, dense_free)
    model = build_model("mlp", image_shape=SHAPE, num_classes=CLASSES, seed=0)
    update = make_update(model, random_images((2, *SHAPE)), torch.tensor([0, 1]))
    with pytest.raises(NotApplicable, match="image_shape or public_images"):
        infer_labels(update, model, Knowledge(batch_size=2), generator=derive_generator(0, "labels"))

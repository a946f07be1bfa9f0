"""User-level inversion: window, annealing and clipping against closed forms, batches of equal images, known denoisers."""

from dataclasses import replace

import pytest
import torch
from attack_cases import Case, prior_of
from conftest import update_from
from torch import Tensor, nn

from attacks.matching import DISTANCES, cosine, pose
from attacks.user_level import Search, UserLevel, class_shares, clipped, layers_of, timestep_at, window_weights
from fedattack.errors import FedattackError, MissingKnowledge, NotApplicable
from fedattack.jobs import attack_update
from fedattack.metrics import psnr_db
from fedattack.priors import Prior
from fedattack.seeding import derive_generator
from fedattack.tasks import Classification, Diffusion, simulate
from fedattack.types import Knowledge, Update, silent

SHAPE = (3, 8, 8)
MLP = Case("mlp", "mlp", {"hidden": (32,), "activation": "sigmoid"})
LENET = Case("lenet", "lenet", {"channels": 4})


def victim(images: Tensor, labels: list[int], case: Case = MLP, **settings):
    """Model, update of a batch, and what the server knows but the batch's size."""
    model = case.build_model(1).double()
    update = update_from(model, images, torch.tensor(labels), dtype=torch.float64, **settings)
    return model, update, Knowledge(image_shape=SHAPE, num_classes=4, learning_rate=0.1, prior=prior_of(SHAPE))


def attack(model, update, knowledge, seed: int = 0, progress=silent, **settings):
    generator = derive_generator(seed, "attack")
    return UserLevel(**settings).reconstruct(
        update, model, Classification(), knowledge, generator=generator, progress=progress
    )


class Gaussian(nn.Module):
    """The best ε-prediction where images are N(centre, s²·I)."""

    def __init__(self, task: Diffusion, centre: float, variance: float) -> None:
        super().__init__()
        self.table, self.centre, self.variance = task.alphas_cumprod, centre, variance

    def factor(self, now: int) -> float:
        a = float(self.table[now])
        return (1 - a) ** 0.5 / (a * self.variance + 1 - a)

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        now = int(timesteps[0])
        return self.factor(now) * (x - float(self.table[now]) ** 0.5 * self.centre)


def gaussian_prior(centre: float = 0.4, variance: float = 0.01) -> Prior:
    task = Diffusion(num_train_timesteps=50, beta_end=0.3)
    return Prior(Gaussian(task, centre, variance), task, SHAPE, "gaussian")


def search_of(prior: Prior, image: Tensor | None = None, **settings) -> Search:
    image = torch.full(SHAPE, 0.3, dtype=torch.float64) if image is None else image
    model, update, knowledge = victim(image[None], [2])
    problem = pose(
        update, model, Classification(), replace(knowledge, batch_size=1, labels=torch.tensor([2])), scale_free=True
    )
    return Search(UserLevel(**settings), problem, prior, derive_generator(3, "search"), silent)


# ------------------------------------------------------------------------------------------------ schedules
@pytest.mark.parametrize(
    ("progress", "weights"),
    [
        (0.0, [0.0, 0.0, 0.0, 0.08, 0.54, 1.0]),
        (0.6, [0.08, 0.54, 1.0, 1.0, 1.0, 1.0]),
        (1.0, [1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_the_window_slides_from_the_deepest_layer_to_the_shallowest(progress, weights):
    """L = 6, R = 2: centre at 6, 3 and 1, below it 0.54 + 0.46·cos(π·distance/R), nothing further away."""
    torch.testing.assert_close(window_weights(6, progress), torch.tensor(weights, dtype=torch.float64))


def test_the_window_never_narrows_and_one_layer_is_always_on():
    windows = torch.stack([window_weights(7, step / 50) for step in range(51)])
    assert bool((windows.diff(dim=0) >= -1e-12).all())
    assert bool((windows.diff(dim=1) >= -1e-12).all())
    assert window_weights(1, 0.0).tolist() == window_weights(1, 1.0).tolist() == [1.0]


def test_annealing_begins_at_the_last_timestep_and_ends_at_t_min():
    visited = [timestep_at(step / 100, 1000, 0.2) for step in range(101)]
    assert (visited[0], visited[-1]) == (999, 200)
    assert sorted(visited, reverse=True) == visited
    assert timestep_at(1.0, 50, 0.0) == 0


def test_clipping_shortens_what_is_too_long_and_nothing_else(random_images):
    gradient = random_images((3, 1, *SHAPE)) - 0.5
    norms = gradient.flatten(1).norm(dim=1)
    most = norms * torch.tensor([0.25, 1.0, 4.0])
    found = clipped(gradient, most)
    torch.testing.assert_close(found[0], 0.25 * gradient[0])
    assert torch.equal(found[1:], gradient[1:])
    assert bool((found.flatten(1).norm(dim=1) <= most * (1 + 1e-12)).all())
    assert not bool(clipped(gradient, 0 * most).any())
    assert torch.equal(clipped(0 * gradient, most), 0 * gradient)


def test_layers_that_say_nothing_are_left_out(random_images):
    observed = {
        "a.0.weight": torch.ones(2),
        "a.0.bias": torch.zeros(1),
        "a.1.weight": torch.zeros(2),
        "b": torch.ones(1),
    }
    assert layers_of(observed) == [["a.0.weight", "a.0.bias"], ["b"]]
    model, update, knowledge = victim(random_images((1, *SHAPE)), [2])
    silent_update = replace(update, received={name: torch.zeros_like(t) for name, t in update.received.items()})
    with pytest.raises(NotApplicable, match="update is zero"):
        attack(model, silent_update, replace(knowledge, labels=torch.tensor([2])), steps=2)


# ------------------------------------------------------------------------------------------------ the prior's loss
def test_the_priors_gradient_is_that_of_a_known_denoiser():
    """N(c, s²): ε_θ = f·(x_t − √ᾱ·c), so E[∇‖ε − ε_θ‖²] = 2·f·ᾱ·f·(x − c)."""
    prior = gaussian_prior()
    search = search_of(prior, restarts=3000, t_min=0.3)
    found = search.prior_gradient(torch.full(search.shape, 2.0), 1.0)
    now = timestep_at(1.0, 50, 0.3)
    a, factor = float(prior.task.alphas_cumprod[now]), prior.network.factor(now)
    assert float(found.mean()) == pytest.approx(2 * factor * a * (2.0 - 0.4) * factor, rel=0.02)


def test_the_prior_alone_pulls_to_where_its_images_are():
    """From N(0, 1) to the mean of a narrow Gaussian; no update is looked at, and the first chain is the result."""
    settings = {"guidance": "none", "steps": 80, "learning_rate": 0.08, "restarts": 2}
    found = [search_of(gaussian_prior(0.4), torch.full(SHAPE, grey).double(), **settings).run() for grey in (0.2, 0.9)]
    assert torch.equal(found[0].guess["images"], found[1].guess["images"])
    assert float((found[0].guess["images"] - 0.7).abs().mean()) < 0.06


@pytest.mark.parametrize(("guidance", "recorded"), [("none", False), ("matching", True)])
def test_only_what_is_differentiated_is_recorded(monkeypatch, guidance, recorded):
    """The prior alone measures its loss without a graph of second order."""
    seen = []

    def distance(simulated, observed):
        seen.append(any(tensor.requires_grad for tensor in simulated.values()))
        return cosine(simulated, observed)

    monkeypatch.setitem(DISTANCES, "cosine", distance)
    search = search_of(gaussian_prior(), guidance=guidance)
    seen.clear()  # of zeros
    search.matching_gradient(torch.zeros(search.shape, requires_grad=True), 1.0)
    assert seen == [recorded] * len(search.layers)


def test_final_denoising_ends_on_the_priors_images():
    """A prior of one single image gives that image; without final steps the image stays as it is."""
    x = torch.randn(1, 1, *SHAPE, generator=derive_generator(0, "x"))
    point = gaussian_prior(0.4, variance=0.0)
    torch.testing.assert_close(search_of(point, final_steps=4).finished(x), torch.full_like(x, 0.4))
    torch.testing.assert_close(search_of(point, final_steps=900, t_min=0.1).finished(x), torch.full_like(x, 0.4))
    assert torch.equal(search_of(point, final_steps=0).finished(x), x)


def test_kappa_limits_what_the_update_may_do(random_images):
    """κ = 0 is the prior alone; the share of clipped steps falls as κ grows."""
    image = random_images(SHAPE)
    settings = {"steps": 12, "restarts": 1, "final_steps": 0}
    alone = search_of(gaussian_prior(), image, guidance="none", **settings).run().guess["images"]
    nothing = search_of(gaussian_prior(), image, kappa=0.0, **settings).run().guess["images"]
    torch.testing.assert_close(nothing, alone)
    shares = []
    for kappa in (0.1, 1e9):
        search = search_of(gaussian_prior(), image, kappa=kappa, memory=0.5, **settings)
        search.run()
        shares.append(search.clipped)
    assert shares == [pytest.approx(1.0), 0.0]


# ------------------------------------------------------------------------------------------------ one image for a batch
@pytest.mark.parametrize("distance", ["cosine", "relative-l2", "l2"])
@pytest.mark.parametrize("case", [MLP, LENET], ids=["mlp", "lenet"])
def test_copies_of_one_image_are_matched_exactly_by_it(random_images, distance, case):
    """A mean over equal images, labelled alike or not, is the gradient of the one image labelled in these shares."""
    image = random_images((1, *SHAPE))
    labels = [2, 0, 2, 2]
    model, update, knowledge = victim(image.expand(4, *SHAPE), labels, case)
    for label, seen in (("distribution", labels), ("majority", [2, 2])):
        shares = class_shares(update, model, replace(knowledge, labels=torch.tensor(seen)), label, torch.Generator())
        known = shares if label == "distribution" else shares.argmax(-1)
        same = update if label == "distribution" else victim(image.expand(2, *SHAPE), seen, case)[1]
        problem = pose(same, model, Classification(), replace(knowledge, batch_size=1, labels=known))
        search = Search(UserLevel(distance=distance), problem, gaussian_prior(), torch.Generator(), silent)
        for progress in (0.0, 0.6, 1.0):
            costs = search.distances(progress)({"images": torch.stack([image, 0 * image])}).detach()
            assert float(costs[0]) < 1e-12
            assert 1e-4 < float(costs[1]) < 3.0


def test_the_result_depends_on_the_batch_only_through_its_gradient(random_images):
    image = random_images((1, *SHAPE))
    one = victim(image, [2])
    many = victim(image.expand(30, *SHAPE), [2] * 30)
    settings = {"steps": 5, "restarts": 2}
    a, b = (attack(*case, **settings) for case in (one, many))
    torch.testing.assert_close(a.images, b.images, rtol=1e-4, atol=1e-4)
    assert a.represents == b.represents == "user"
    assert a.images.shape == b.images.shape == (1, *SHAPE)
    assert b.labels.tolist() == [2]


def test_weights_are_attacked_through_their_pseudo_gradient(random_images):
    """FedAvg: one step is the gradient itself; after several steps the true image still costs nothing."""
    image = random_images((1, *SHAPE))
    model, update, knowledge = victim(image, [2])
    labelled = replace(knowledge, labels=torch.tensor([2]))
    private = {"images": image, "labels": torch.tensor([2])}
    for steps in (1, 3):
        received = simulate(model, update.sent, Classification(), [private] * steps, kind="weights", learning_rate=0.1)
        sent_back = Update(1, "0", update.sent, {n: t.detach() for n, t in received.items()}, "weights", 1)
        known = replace(labelled, local_steps=steps, local_batch_size=16)
        problem = pose(sent_back, model, Classification(), replace(known, batch_size=1, local_batch_size=1))
        search = Search(UserLevel(), problem, gaussian_prior(), torch.Generator(), silent)
        assert float(search.distances(1.0)({"images": image[None]}).detach()) < 1e-9
        found = attack(model, sent_back, known, steps=4)
        if steps == 1:
            plain = attack(model, update, labelled, steps=4)
            torch.testing.assert_close(found.images, plain.images, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "settings", [{}, {"window": "none", "distance": "l2", "memory": 0.5, "start": "grey"}], ids=["paper", "l2"]
)
def test_a_batch_of_one_user_is_seen_better_than_by_the_prior_alone(patches, settings):
    """Four images alike but for noise: the result is nearer to their mean than what the prior makes by itself."""
    mean = patches.private.images([3]).double()
    generator = derive_generator(0, "alike")
    images = (mean + 0.02 * torch.randn((4, *SHAPE), generator=generator, dtype=torch.float64)).clamp(0, 1)
    model, update, knowledge = victim(images, [2, 2, 2, 1])
    knowledge = replace(knowledge, batch_size=4, labels=torch.tensor([2, 2, 2, 1]), prior=prior_of(SHAPE))
    common = {"label": "distribution", "steps": 40} | settings
    found = attack(model, update, knowledge, restarts=2, **common)
    control = UserLevel(restarts=2, **common).controls()[0]
    alone = attack(model, update, knowledge, **control.parameters)
    assert float(psnr_db(found.images, mean)) > float(psnr_db(alone.images, mean)) + 3.0
    assert found.losses[-1] < 0.5 * alone.losses[-1], "by the same distance, window and label"
    assert found.represents == "user"
    assert found.labels.tolist() == [2]
    assert found.diagnostics["label_share"] == 0.75
    assert len(found.trajectory) == len(found.trajectory_steps)
    assert torch.equal(found.trajectory[-1], found.images)


# ------------------------------------------------------------------------------------------------ labels
def test_shares_are_counted_from_known_or_inferred_labels(random_images):
    labels = [1, 1, 1, 3, 3, 0, 1, 1]
    model, update, knowledge = victim(random_images((8, *SHAPE)), labels, LENET)
    exact = torch.tensor([[0.125, 0.625, 0.0, 0.25]], dtype=torch.float64)
    public = replace(knowledge, public_images=random_images((64, *SHAPE), 7).float())
    generator = derive_generator(0, "labels")
    for known in (replace(knowledge, labels=torch.tensor(labels)), replace(public, batch_size=8)):
        assert torch.equal(class_shares(update, model, known, "distribution", generator), exact)
    unknown_size = class_shares(update, model, public, "distribution", generator)
    torch.testing.assert_close(unknown_size, exact, rtol=0, atol=0.03)
    soft = replace(knowledge, labels=torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]]))
    assert class_shares(update, model, soft, "majority", generator).tolist() == [[0.25, 0.75, 0.0, 0.0]]


def test_idlgs_rule_needs_no_count_and_no_scale(random_images):
    """Where a weight difference has no known scale the labels cannot be counted, but the sign of the last bias is there."""
    model, update, knowledge = victim(random_images((5, *SHAPE)), [1, 3, 3, 3, 3])
    received = {name: update.sent[name] - 0.1 * tensor for name, tensor in update.received.items()}
    weights = replace(update, received=received, kind="weights")
    hidden = replace(knowledge, learning_rate=None, batch_size=5)
    assert attack(model, weights, hidden, steps=2).labels.tolist() == [3]
    for label in ("majority", "distribution"):
        with pytest.raises(NotApplicable, match="learning_rate must be known"):
            attack(model, weights, hidden, steps=2, label=label)


def test_idlgs_rule_gives_the_class_that_the_model_expects_too_rarely(random_images):
    """Of a mixed batch not the majority, where the model is surer of it than it is frequent; known labels that agree count."""
    images = random_images((4, *SHAPE))
    model, _, knowledge = victim(images, [1] * 4, LENET)
    with torch.no_grad():
        model.head.bias[1] += 8.0
    generator = derive_generator(0, "labels")
    for labels, rule in (([1] * 4, 1), ([1, 1, 1, 2], 2)):
        update = update_from(model, images, torch.tensor(labels), dtype=torch.float64)
        known = replace(knowledge, batch_size=4, labels=torch.tensor(labels))
        assert class_shares(update, model, known, "idlg", generator).argmax() == rule
        assert class_shares(update, model, replace(known, labels=None), "idlg", generator).argmax() == rule
        assert class_shares(update, model, known, "majority", generator).argmax() == 1
    assert "label_share" not in attack(model, update, known, steps=2).diagnostics, "nothing was counted"


def test_labels_that_are_known_and_agree_need_no_rule(random_images):
    """A model without a dense layer, and an update whose head was pruned away, tell no label."""
    images, labels = random_images((2, *SHAPE)), torch.tensor([3, 3])
    generator = derive_generator(0, "labels")
    model, update, knowledge = victim(images, [3, 3])
    pruned = {name: 0 * tensor if name.endswith("bias") else tensor for name, tensor in update.received.items()}
    convolution = torch.nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sigmoid(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).double()
    other = update_from(convolution, images, labels, dtype=torch.float64)
    for case, message in (
        ((other, convolution), "no dense layer"),
        ((replace(update, received=pruned), model), "gradient of the last dense layer's bias is zero"),
    ):
        known = replace(knowledge, batch_size=2, labels=labels)
        assert class_shares(*case, known, "idlg", generator).tolist() == [[0.0, 0.0, 0.0, 1.0]]
        with pytest.raises(NotApplicable, match=message):
            class_shares(*case, replace(known, labels=None), "idlg", generator)


# ------------------------------------------------------------------------------------------------ options
def test_the_controls_are_the_same_search_without_the_update():
    """What the prior alone takes over is all that its image and its loss depend on."""
    found = UserLevel(steps=50, learning_rate=0.3, kappa=5.0, weight=2.0, restarts=3, window="none", label="majority")
    kinds = {control.kind: control for control in found.controls()}
    shared = {"steps": 50, "learning_rate": 0.3, "window": "none", "label": "majority"}
    assert kinds["prior-alone"].parameters == shared | {"guidance": "none"}
    assert kinds["peer"].parameters == {"iterations": 150}
    assert "unrelated-update" in kinds
    assert UserLevel(guidance="none").controls() == ()


def test_what_cannot_be_is_refused(random_images):
    for wrong, message in (
        ({"guidance": "match"}, "did you mean 'matching'"),
        ({"label": "mean"}, "label must be one of"),
        ({"window": "hann"}, "window must be one of"),
        ({"steps": 0}, "steps must be a whole number of at least 1, got 0"),
        ({"t_min": 200}, r"t_min must be in \[0, 1\]"),
        ({"learning_rate": 0.0}, "learning_rate must be above zero"),
        ({"kappa": -1.0}, "kappa must be zero or positive"),
        ({"memory": 1.0}, r"memory must be in \[0, 1\)"),
    ):
        with pytest.raises(FedattackError, match=message):
            UserLevel(**wrong)
    model, update, knowledge = victim(random_images((2, *SHAPE)), [1, 2])
    with pytest.raises(FedattackError, match=r"images of prior .* must be of shape"):
        attack(model, update, replace(knowledge, prior=prior_of((1, 8, 8))), steps=2)
    with pytest.raises(MissingKnowledge, match="user-level needs prior"):
        attack_update(UserLevel(), update, MLP.context, replace(knowledge, prior=None), generator=torch.Generator())

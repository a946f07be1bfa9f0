"""Distances and priors with values known by hand, and the search on problems whose answer is known."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from attacks.dlg import DLG
from attacks.inverting_gradients import InvertingGradients
from attacks.matching import DISTANCES, cosine, lbfgs, pose, relative_l2, squared_l2, total_variation
from fedattack.errors import FedattackError, NotApplicable
from fedattack.metrics import psnr_db
from fedattack.models import build_model
from fedattack.seeding import derive_generator
from fedattack.tasks import Classification, Diffusion, simulate_gradient
from fedattack.types import Knowledge


def tensors(*values: list[float]) -> dict[str, Tensor]:
    return {f"layer{i}": torch.tensor(value, dtype=torch.float64) for i, value in enumerate(values)}


# ------------------------------------------------------------------------------------------------ distances
@pytest.mark.parametrize("name", sorted(DISTANCES))
def test_identical_updates_are_at_distance_zero(name):
    update = tensors([1.0, -2.0], [[3.0], [0.5]])
    assert float(DISTANCES[name](update, update)) == pytest.approx(0.0, abs=1e-15)


def test_values_by_hand():
    a, b = tensors([3.0, 0.0], [0.0]), tensors([0.0, 4.0], [2.0])
    assert float(squared_l2(a, b)) == 9 + 16 + 4
    assert float(relative_l2(a, b)) == (25 / 16 + 4 / 4) / 2
    assert float(cosine(a, b)) == 1.0
    half = tensors([1.0, 1.0], [0.0]), tensors([1.0, 0.0], [0.0])
    assert float(cosine(*half)) == pytest.approx(1 - math.sqrt(0.5))
    assert float(cosine(a, {name: -t for name, t in a.items()})) == 2.0


def test_cosine_ignores_scale_and_the_others_do_not():
    a, b = tensors([1.0, 2.0], [3.0]), tensors([2.0, -1.0], [0.5])
    scaled = {name: 1e-6 * t for name, t in a.items()}
    assert float(cosine(scaled, b)) == pytest.approx(float(cosine(a, b)), rel=1e-12)
    assert float(squared_l2(scaled, b)) != pytest.approx(float(squared_l2(a, b)), rel=1e-3)


def test_a_zero_update_is_at_relative_distance_one():
    observed = tensors([5.0, 2.0], [1e-9], [1e9, 0.0])
    silence = {name: torch.zeros_like(t) for name, t in observed.items()}
    assert float(relative_l2(silence, observed)) == pytest.approx(1.0)
    assert math.isfinite(float(cosine(silence, observed)))


@pytest.mark.parametrize("name", sorted(DISTANCES))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_layer_sent_as_zeros_does_not_drown_the_others(name, dtype):
    """Pruning and dead units send whole layers of zeros; a better match of the other layers must still be seen."""
    observed, far, near = (
        {n: t.to(dtype) for n, t in tensors([5.0, value], [scrap, scrap]).items()}
        for value, scrap in ((2.0, 0.0), (-1.0, 1e-3), (2.0, 1e-3))
    )
    distances = [float(DISTANCES[name](simulated, observed)) for simulated in (far, near)]
    assert all(math.isfinite(distance) for distance in distances)
    assert distances[1] < 0.999 * distances[0]


def test_only_what_was_observed_counts():
    observed = tensors([1.0, 1.0])
    simulated = {**observed, "never sent": torch.tensor([7.0])}
    for distance in DISTANCES.values():
        assert float(distance(simulated, observed)) == pytest.approx(0.0, abs=1e-15)


# ------------------------------------------------------------------------------------------------ total variation
def test_total_variation_by_hand():
    assert float(total_variation(torch.full((2, 3, 7, 5), 0.3))) == 0.0
    step = torch.zeros(1, 1, 7, 5)
    step[..., 3:] = 0.5  # one edge of 0.5 in each of 7 rows with 4 neighbour pairs, none between rows
    assert float(total_variation(step)) == pytest.approx(0.5 / 4)
    assert float(total_variation(step.transpose(-1, -2))) == pytest.approx(0.5 / 4)
    checks = (torch.arange(4)[:, None] + torch.arange(6)) % 2
    assert float(total_variation(checks.float()[None, None])) == 2.0


def test_total_variation_of_single_rows_and_pixels_is_finite():
    assert float(total_variation(torch.rand(1, 1, 1, 1))) == 0.0
    assert float(total_variation(torch.tensor([[[[0.0, 1.0, 0.0]]]]))) == 1.0


# ------------------------------------------------------------------------------------------------ the problem
def mlp(shape, classes=3):
    return build_model("mlp", image_shape=shape, num_classes=classes, seed=0, hidden=(12,), activation="sigmoid")


def test_the_truth_is_a_perfect_match(make_update, random_images):
    """Whatever the kind of update and number of steps: at the client's own data every distance is zero."""
    shape, labels = (1, 7, 5), torch.tensor([2, 0, 1])
    model, images = mlp(shape), random_images((3, *shape))
    facts = {"image_shape": shape, "batch_size": 3, "num_classes": 3, "labels": labels}
    for kind, steps, size, mu in (("gradient", 1, 3, 0.0), ("weights", 1, 3, 0.0), ("weights", 4, 2, 0.3)):
        settings = {"learning_rate": 0.2, "local_steps": steps, "local_batch_size": size, "proximal_mu": mu}
        update = make_update(model, images, labels, kind=kind, **settings)
        problem = pose(update, model, Classification(), Knowledge(**facts, **settings), precision="float64")
        simulated = problem.simulated({"images": images})
        assert set(simulated) == set(problem.observed) == {n for n, _ in model.named_parameters()}
        for distance in DISTANCES.values():
            assert float(distance(simulated, problem.observed)) < 1e-12
            assert float(distance(problem.simulated({"images": 1 - images}), problem.observed)) > 1e-6


def test_the_truth_of_a_diffusion_update_is_a_perfect_match(random_images, make_state):
    shape, task = (1, 8, 8), Diffusion(num_train_timesteps=10)
    options = {"block_out_channels": (8,), "attention": (), "mid_attention": False, "norm_num_groups": 4}
    model = build_model("unet", image_shape=shape, num_classes=None, seed=0, **options).double()
    private = task.draw(random_images((2, *shape)), torch.zeros(2), generator=derive_generator(0, "d"))
    from fedattack.types import Update

    sent = make_state(model)
    received = {n: t.detach() for n, t in simulate_gradient(model, sent, task, [private]).items()}
    update = Update(round=1, client="0", sent=sent, received=received, kind="gradient")
    problem = pose(update, model, task, Knowledge(image_shape=shape, batch_size=2))
    assert set(problem.unknown) == {"images", "noise", "timesteps"}
    guess = {**private, "timesteps": private["timesteps"].double()}
    assert float(relative_l2(problem.simulated(guess), problem.observed)) < 1e-18
    shown = Knowledge(image_shape=shape, batch_size=2, noise=private["noise"], timesteps=private["timesteps"])
    problem = pose(update, model, task, shown)
    assert set(problem.unknown) == {"images"}
    assert float(relative_l2(problem.simulated({"images": private["images"]}), problem.observed)) < 1e-18


def test_a_batch_sends_the_mean_of_what_its_images_would(make_update, random_images):
    images, labels = random_images((3, 1, 5, 4)), torch.tensor([1, 2, 1])
    model = build_model("lenet", image_shape=(1, 5, 4), num_classes=4, seed=0)
    update = make_update(model, images, labels)
    known = Knowledge(image_shape=(1, 5, 4), batch_size=3, num_classes=4, labels=labels)
    problem = pose(update, model, Classification(), known, precision="float64")
    alone = [problem.alone(number) for number in range(3)]
    sent = [one.simulated({"images": images[number : number + 1].double()}) for number, one in enumerate(alone)]
    whole = problem.simulated({"images": images.double()})
    for name, tensor in whole.items():
        torch.testing.assert_close(torch.stack([one[name] for one in sent]).mean(0), tensor, rtol=1e-9, atol=1e-12)
    for other in (
        pose(update, model, Classification(), replace(known, labels=None), precision="float64"),
        replace(problem, clip_norm=1.0),
        replace(problem, steps=[[0], [1, 2]]),
    ):
        assert other.alone(0) is None
    normal = build_model("resnet18", image_shape=(1, 5, 4), num_classes=4, seed=0, width=2).train()
    assert replace(problem, model=normal).alone(0) is None
    assert replace(problem, model=normal.eval()).alone(0) is not None


def test_soft_labels_are_probabilities_and_estimates_are_classes(make_update, random_images):
    shape = (1, 4, 4)
    model, images = mlp(shape), random_images((2, *shape))
    update = make_update(model, images, torch.tensor([2, 0]))
    problem = pose(update, model, Classification(), Knowledge(image_shape=shape, batch_size=2, num_classes=3))
    assert set(problem.unknown) == {"images", "labels"}
    sure = 60.0 * torch.eye(3, dtype=torch.float64)[torch.tensor([2, 0])]
    assert float(relative_l2(problem.simulated({"images": images, "labels": sure}), problem.observed)) < 1e-12
    estimate = problem.estimate({"images": 3 * images - 1, "labels": sure})
    assert estimate["labels"].tolist() == [2, 0]
    assert float(estimate["images"].min()) >= 0
    assert float(estimate["images"].max()) <= 1


def test_what_cannot_be_posed_says_why(make_update, random_images):
    shape = (1, 4, 4)
    model = mlp(shape)
    settings = {"kind": "weights", "local_steps": 2, "learning_rate": 0.1}
    update = make_update(model, random_images((1, *shape)), torch.tensor([0]), **settings)
    known = {"image_shape": shape, "batch_size": 1, "num_classes": 3}
    with pytest.raises(NotApplicable, match="learning_rate"):
        pose(update, model, Classification(), Knowledge(**known, local_steps=2))
    with pytest.raises(FedattackError, match="float64"):
        pose(update, model, Classification(), Knowledge(**known), precision="float46")
    update.received.clear()
    with pytest.raises(NotApplicable, match="none of the model's trained parameters"):
        pose(update, model, Classification(), Knowledge(**known, local_steps=2, learning_rate=0.1))


# ------------------------------------------------------------------------------------------------ searches
def test_dlg_recovers_image_and_label_without_any_oracle(make_update, random_images):
    shape = (1, 7, 5)
    options = {"channels": 6, "activation": "sigmoid"}
    model = build_model("lenet", image_shape=shape, num_classes=3, seed=0, **options)
    images, labels = random_images((1, *shape)), torch.tensor([1])
    known = Knowledge(image_shape=shape, batch_size=1, num_classes=3)
    found = DLG(iterations=60, restarts=3, start="grey").reconstruct(
        make_update(model, images, labels), model, Classification(), known, generator=derive_generator(0, "dlg")
    )
    assert float(psnr_db(found.images, images)) > 60
    assert found.labels.tolist() == [1]
    assert found.losses[-1] <= found.losses[0]
    assert found.steps >= len(found.losses) - 1


def test_lbfgs_gives_up_where_ten_steps_gained_too_little(make_update, random_images):
    """With a wrong label no image explains the gradient; and no ten steps lower a distance by all of it."""
    images, labels = random_images((1, 3, 8, 8)), torch.tensor([1])
    model = build_model("lenet", image_shape=(3, 8, 8), num_classes=4, seed=0, channels=4)
    update = make_update(model, images, labels)
    known = Knowledge(image_shape=(3, 8, 8), batch_size=1, num_classes=4, labels=torch.tensor([2]))
    problem = pose(update, model, Classification(), known)
    start = problem.start(1, derive_generator(0, "start"), "grey")

    def steps(falling: float) -> int:
        return lbfgs(problem, start, distance=squared_l2, iterations=25, falling=falling).steps

    assert (steps(0.0), steps(1.0)) == (25, 11)


def test_several_local_steps_are_unrolled(make_update, random_images):
    """The unrolled match is exact; taking the same update for one step is not."""
    shape, labels = (1, 6, 5), torch.tensor([1, 0])
    model, images = mlp(shape), random_images((2, *shape))
    facts = {"local_steps": 3, "local_batch_size": 1, "learning_rate": 1.0}
    update = make_update(model, images, labels, kind="weights", **facts)
    known = Knowledge(image_shape=shape, batch_size=2, num_classes=3, labels=labels, **facts)
    attack = DLG(iterations=40, start="grey", restarts=2)
    found = attack.reconstruct(update, model, Classification(), known, generator=derive_generator(0, "dlg"))
    assert float(psnr_db(found.images, images).min()) > 50


def test_weights_of_one_step_without_the_learning_rate(make_update, random_images):
    """A weight difference is the gradient up to an unknown factor: the search says so, or must find the image anyway."""
    shape = (1, 6, 5)
    model, images = mlp(shape), random_images((1, *shape))
    update = make_update(model, images, torch.tensor([1]), kind="weights", learning_rate=0.01)
    known = Knowledge(image_shape=shape, batch_size=1, num_classes=3, labels=torch.tensor([1]))
    attack = DLG(iterations=40, start="grey", restarts=2)
    try:
        found = attack.reconstruct(update, model, Classification(), known, generator=derive_generator(0, "dlg"))
    except FedattackError:
        return
    assert float(psnr_db(found.images, images)) > 40


def test_inverting_gradients_lowers_its_own_loss_and_keeps_the_best_restart(make_update, random_images):
    shape = (1, 6, 5)
    model, images = mlp(shape), random_images((1, *shape))
    known = Knowledge(image_shape=shape, batch_size=1, num_classes=3)
    found = InvertingGradients(iterations=150, restarts=3, tv_weight=1e-3).reconstruct(
        make_update(model, images, torch.tensor([1])),
        model,
        Classification(),
        known,
        generator=derive_generator(0, "ig"),
    )
    assert found.losses[-1] < 0.3 * found.losses[0]
    assert found.diagnostics["restarts"] == 3
    assert found.diagnostics["loss"] == found.losses[-1] <= found.diagnostics["worst_restart_loss"]


def test_restarts_together_are_the_restarts_one_by_one(make_update, random_images):
    """vmap over restarts is a fast path; a search of one restart from the same start gives the same answer."""
    from attacks.matching import adam

    shape = (1, 5, 4)
    model, images = mlp(shape), random_images((1, *shape))
    update = make_update(model, images, torch.tensor([1]))
    known = Knowledge(image_shape=shape, batch_size=1, num_classes=3, labels=torch.tensor([1]))
    problem = pose(update, model, Classification(), known, precision="float64")
    starts = problem.start(3, derive_generator(0, "starts"))
    settings = {"distance": cosine, "iterations": 30, "learning_rate": 0.05}
    together = adam(problem, starts, **settings)
    alone = [adam(problem, {n: v[r : r + 1] for n, v in starts.items()}, **settings) for r in range(3)]
    best = min(alone, key=lambda match: match.losses[-1])
    assert together.restart_losses == pytest.approx([match.losses[-1] for match in alone], rel=1e-7)
    torch.testing.assert_close(together.guess["images"], best.guess["images"], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("attack", [DLG, InvertingGradients])
def test_impossible_options_are_refused_by_name_before_any_update_is_seen(attack):
    with pytest.raises(FedattackError, match="did you mean 'cosine'"):
        attack(distance="cosin")
    with pytest.raises(FedattackError, match="did you mean 'grey'"):
        attack(start="gray")
    with pytest.raises(FedattackError, match="iterations must be a whole number"):
        attack(iterations=0)

"""`simulate` against slow oracles: plain autograd, a plain SGD loop on a deep copy, gradcheck, a hand-written DDPM loss."""

import copy
import math
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedattack.errors import FedattackError, MissingKnowledge
from fedattack.models import build_model
from fedattack.models.layers import BatchNorm2d
from fedattack.seeding import derive_generator
from fedattack.tasks import (
    TASKS,
    Classification,
    Diffusion,
    batch_indices,
    build_task,
    join_steps,
    schedule,
    simulate,
    simulate_gradient,
    split_steps,
)
from fedattack.types import Knowledge

SHAPE = (2, 7, 5)
CLASSES = 4
BATCH_NORMS = {"house": BatchNorm2d, "torch": nn.BatchNorm2d}


def small_convnet(seed: int = 0) -> nn.Module:
    options = {"width": 3, "activation": "tanh"}
    return build_model("convnet-small", image_shape=SHAPE, num_classes=CLASSES, seed=seed, **options).double()


def normed_net(norm: type[nn.BatchNorm2d], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [nn.Conv2d(2, 3, 3, padding=1), norm(3), nn.Tanh(), nn.Flatten(), nn.Linear(3 * 35, CLASSES)]
    return nn.Sequential(*layers).double()


def examples(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = derive_generator(seed, "examples")
    images = torch.rand((count, *SHAPE), generator=generator, dtype=torch.float64)
    return images, torch.randint(0, CLASSES, (count,), generator=generator)


def plain_sgd(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    steps: Sequence[Sequence[int]],
    learning_rate: float,
    proximal_mu: float = 0.0,
) -> dict[str, Tensor]:
    """The oracle: what anyone would write with torch.optim, on a copy of the model."""
    local = copy.deepcopy(model)
    start = [parameter.detach().clone() for parameter in local.parameters()]
    optimizer = torch.optim.SGD(local.parameters(), lr=learning_rate)
    for indices in steps:
        optimizer.zero_grad()
        loss = F.cross_entropy(local(images[list(indices)]), labels[list(indices)])
        for parameter, origin in zip(local.parameters(), start, strict=True):
            loss = loss + 0.5 * proximal_mu * (parameter - origin).square().sum()
        loss.backward()
        optimizer.step()
    return local.state_dict()


# ------------------------------------------------------------------------------------------------ the oracle: plain SGD
def test_gradient_equals_autograd(make_state):
    model, (images, labels) = small_convnet(), examples(3)
    wanted = torch.autograd.grad(F.cross_entropy(model(images), labels), list(model.parameters()))
    private = {"images": images, "labels": labels}
    found = simulate(model, make_state(model), Classification(), [private], kind="gradient")
    assert list(found) == [name for name, _ in model.named_parameters()]
    for gradient, oracle in zip(found.values(), wanted, strict=True):
        torch.testing.assert_close(gradient, oracle, rtol=1e-12, atol=1e-14)


def test_the_weights_are_those_of_sent_not_of_the_model(make_state):
    trained, other, (images, labels) = small_convnet(0), small_convnet(1), examples(2)
    batch = [{"images": images, "labels": labels}]
    with_own = simulate(trained, make_state(trained), Classification(), batch, kind="gradient")
    with_other = simulate(other, make_state(trained), Classification(), batch, kind="gradient")
    for name in with_own:
        assert torch.equal(with_own[name], with_other[name])


@pytest.mark.parametrize("proximal_mu", [0.0, 0.7])
@pytest.mark.parametrize(
    ("count", "batch", "local_steps"), [(3, 3, 1), (3, 3, 4), (5, 2, 3), (5, 2, 7), (4, 3, 5), (2, 8, 3), (1, 1, 6)]
)
def test_weights_equal_a_plain_sgd_loop(make_state, count, batch, local_steps, proximal_mu):
    model, (images, labels) = small_convnet(), examples(count)
    steps = batch_indices(count, batch, local_steps)
    private = {"images": images, "labels": labels}
    wanted = plain_sgd(model, images, labels, steps, 0.2, proximal_mu)
    found = simulate(
        model,
        make_state(model),
        Classification(),
        split_steps(Classification(), private, steps),
        kind="weights",
        learning_rate=0.2,
        proximal_mu=proximal_mu,
    )
    assert set(found) == set(wanted)
    for name, oracle in wanted.items():
        torch.testing.assert_close(found[name], oracle, rtol=1e-11, atol=1e-12)


def test_the_proximal_term_changes_something(make_state):
    """Otherwise the FedProx cases above would pass on a simulate that ignores the term."""
    model, (images, labels) = small_convnet(), examples(2)
    batches = [{"images": images, "labels": labels}] * 3
    with_term, without = (
        simulate_gradient(model, make_state(model), Classification(), batches, learning_rate=0.2, proximal_mu=mu)
        for mu in (0.7, 0.0)
    )
    assert max(float((with_term[n] - without[n]).abs().max()) for n in without) > 1e-4


def test_pseudo_gradient_is_the_weight_difference_over_the_learning_rate(make_state):
    model, (images, labels) = small_convnet(), examples(4)
    sent, task = make_state(model), Classification()
    batches = split_steps(task, {"images": images, "labels": labels}, batch_indices(4, 3, 3))
    total = simulate_gradient(model, sent, task, batches, learning_rate=0.3)
    weights = simulate(model, sent, task, batches, kind="weights", learning_rate=0.3)
    for name in total:
        torch.testing.assert_close(total[name], (sent[name] - weights[name]) / 0.3, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("norm", sorted(BATCH_NORMS))
@pytest.mark.parametrize("local_steps", [1, 3])
def test_batch_norm_in_training_mode_with_running_statistics(make_state, norm, local_steps):
    model, (images, labels) = normed_net(BATCH_NORMS[norm]).train(), examples(5)
    steps = batch_indices(5, 2, local_steps)
    wanted = plain_sgd(model, images, labels, steps, 0.1)
    task = Classification()
    batches = split_steps(task, {"images": images, "labels": labels}, steps)
    if local_steps == 1:
        batches = [{"images": images[steps[0]], "labels": labels[steps[0]]}]
    before = make_state(model)
    found = simulate(model, before, task, batches, kind="weights", learning_rate=0.1)
    for name, oracle in wanted.items():
        if oracle.is_floating_point():
            torch.testing.assert_close(found[name], oracle, rtol=1e-10, atol=1e-12)
    assert not torch.equal(found["1.running_mean"], before["1.running_mean"])
    for name, tensor in make_state(model).items():
        assert torch.equal(tensor, before[name]), f"simulate changed the model's own {name}"


@pytest.mark.parametrize("norm", sorted(BATCH_NORMS))
def test_batch_norm_in_evaluation_mode_keeps_its_statistics(make_state, norm):
    model, (images, labels) = normed_net(BATCH_NORMS[norm]).eval(), examples(3)
    sent = make_state(model)
    sent["1.running_mean"] += 0.3
    sent["1.running_var"] *= 2.0
    model.load_state_dict(sent)
    steps = batch_indices(3, 3, 2)
    wanted = plain_sgd(model, images, labels, steps, 0.1)
    batches = split_steps(Classification(), {"images": images, "labels": labels}, steps)
    found = simulate(model, sent, Classification(), batches, kind="weights", learning_rate=0.1)
    for name in ("0.weight", "1.weight", "4.bias", "1.running_mean", "1.running_var"):
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-11, atol=1e-13)
    assert torch.equal(found["1.running_mean"], sent["1.running_mean"])


def test_frozen_parameters_are_no_part_of_a_gradient_and_stay_as_sent(make_state):
    model, (images, labels) = small_convnet(), examples(2)
    model.conv0.weight.requires_grad_(False)
    batch = [{"images": images, "labels": labels}]
    sent = make_state(model)
    assert "conv0.weight" not in simulate(model, sent, Classification(), batch, kind="gradient")
    weights = simulate(model, sent, Classification(), batch, kind="weights", learning_rate=0.1)
    assert torch.equal(weights["conv0.weight"], sent["conv0.weight"])
    assert not torch.equal(weights["conv1.weight"], sent["conv1.weight"])


def test_what_cannot_be_simulated_is_refused(make_state):
    model, (images, labels) = small_convnet(), examples(2)
    batch, sent, task = {"images": images, "labels": labels}, make_state(model), Classification()
    with pytest.raises(FedattackError, match="exactly one"):
        simulate(model, sent, task, [batch, batch], kind="gradient")
    with pytest.raises(MissingKnowledge, match="learning_rate"):
        simulate(model, sent, task, [batch], kind="weights")
    with pytest.raises(MissingKnowledge, match="learning_rate"):
        simulate_gradient(model, sent, task, [batch, batch])


# ------------------------------------------------------------------------------------------------ second derivatives
@pytest.mark.parametrize("local_steps", [1, 3])
def test_gradcheck_wrt_images_and_soft_labels(make_state, local_steps):
    options = {"hidden": (3,), "activation": "tanh"}
    model = build_model("mlp", image_shape=(1, 3, 2), num_classes=3, seed=0, **options).double()
    sent, task = make_state(model), Classification()
    images = torch.rand((2, 1, 3, 2), generator=derive_generator(0, "x"), dtype=torch.float64).requires_grad_()
    logits = torch.randn((2, 3), generator=derive_generator(0, "y"), dtype=torch.float64).requires_grad_()
    steps = batch_indices(2, 1 if local_steps > 1 else 2, local_steps)

    def simulated(images: Tensor, logits: Tensor) -> tuple[Tensor, ...]:
        private = {"images": images, "labels": logits.softmax(-1)}
        batches = split_steps(task, private, steps)
        return tuple(simulate_gradient(model, sent, task, batches, learning_rate=0.5, proximal_mu=0.1).values())

    assert torch.autograd.gradcheck(simulated, (images, logits))


class TinyDenoiser(nn.Module):
    """A smooth stand-in for a U-Net with a known answer: tanh(a·x + b·t)."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([0.7, -0.4], dtype=torch.float64))

    def forward(self, images: Tensor, timesteps: Tensor) -> Tensor:
        return torch.tanh(self.scale[0] * images + self.scale[1] * timesteps.to(images.dtype)[:, None, None, None] / 10)


@pytest.mark.parametrize("local_steps", [1, 2])
def test_gradcheck_of_diffusion_wrt_images_noise_and_real_timesteps(make_state, local_steps):
    model, task = TinyDenoiser(), Diffusion(num_train_timesteps=10)
    generator = derive_generator(0, "diffusion")
    steps = batch_indices(2, 2, local_steps)
    draws = 2 * local_steps
    images = torch.rand((2, 1, 2, 3), generator=generator, dtype=torch.float64).requires_grad_()
    noise = torch.randn((draws, 1, 2, 3), generator=generator, dtype=torch.float64).requires_grad_()
    timesteps = (0.3 + 8 * torch.rand(draws, generator=generator, dtype=torch.float64)).requires_grad_()

    def simulated(images: Tensor, noise: Tensor, timesteps: Tensor) -> tuple[Tensor, ...]:
        private = {"images": images, "noise": noise, "timesteps": timesteps}
        batches = split_steps(task, private, steps)
        return tuple(simulate_gradient(model, make_state(model), task, batches, learning_rate=0.5).values())

    assert torch.autograd.gradcheck(simulated, (images, noise, timesteps))


# ------------------------------------------------------------------------------------------------ diffusion
def ddpm_scheduler(task: Diffusion):
    from diffusers import DDPMScheduler

    return DDPMScheduler(
        num_train_timesteps=task.num_train_timesteps,
        beta_start=task.beta_start,
        beta_end=task.beta_end,
        beta_schedule=task.beta_schedule,
        prediction_type=task.prediction_type,
    )


@pytest.mark.parametrize("schedule_name", ["linear", "squaredcos_cap_v2", "scaled_linear"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_diffusion_loss_equals_a_hand_written_ddpm_loss(schedule_name, prediction_type):
    task = Diffusion(num_train_timesteps=50, beta_schedule=schedule_name, prediction_type=prediction_type)
    scheduler, model = ddpm_scheduler(task), TinyDenoiser()
    generator = derive_generator(0, "ddpm")
    images = torch.rand((4, 3, 7, 5), generator=generator, dtype=torch.float64)
    noise = torch.randn((4, 3, 7, 5), generator=generator, dtype=torch.float64)
    timesteps = torch.tensor([0, 7, 31, 49])
    scheduler.alphas_cumprod = torch.cumprod(1.0 - scheduler.betas.double(), 0)
    clean = 2 * images - 1
    noisy = scheduler.add_noise(clean, noise, timesteps)
    target = noise if prediction_type == "epsilon" else scheduler.get_velocity(clean, noise, timesteps)
    wanted = F.mse_loss(model(noisy, timesteps), target)
    found = task.loss(model, {"images": images, "noise": noise, "timesteps": timesteps})
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


def test_real_timesteps_agree_at_integers_and_interpolate_between():
    task = Diffusion(num_train_timesteps=20)
    private = {
        "images": torch.rand((1, 1, 3, 4), generator=derive_generator(0, "i"), dtype=torch.float64),
        "noise": torch.randn((1, 1, 3, 4), generator=derive_generator(0, "n"), dtype=torch.float64),
    }

    def seen(timestep: Tensor) -> Tensor:
        """The noisy image that reaches the model."""
        kept: list[Tensor] = []

        def predict(noisy: Tensor, _: Tensor) -> Tensor:
            kept.append(noisy)
            return torch.zeros_like(noisy)

        task.loss(predict, {**private, "timesteps": timestep})
        return kept[0]

    for t in (0, 1, 10, 18, 19):
        exact = seen(torch.tensor([t]))
        torch.testing.assert_close(seen(torch.tensor([float(t)], dtype=torch.float64)), exact, rtol=1e-14, atol=1e-14)
    table = task.alphas_cumprod
    for t, weight in ((0, 0.25), (11, 0.5), (18, 0.75)):
        alpha = (1 - weight) * table[t] + weight * table[t + 1]
        wanted = alpha.sqrt() * (2 * private["images"] - 1) + (1 - alpha).sqrt() * private["noise"]
        torch.testing.assert_close(seen(torch.tensor([t + weight], dtype=torch.float64)), wanted)


def test_the_table_is_the_papers():
    """DDPM, section 4: β from 1e-4 to 0.02 in 1000 steps; ᾱ_0 = 0.9999 and ᾱ_999 ≈ 4e-5."""
    table = Diffusion().alphas_cumprod
    assert len(table) == 1000
    assert table.dtype == torch.float64
    assert float(table[0]) == pytest.approx(0.9999, abs=1e-7)
    assert float(table[-1]) == pytest.approx(4.036e-5, rel=1e-2)
    assert bool((table[1:] < table[:-1]).all())


def test_draw_is_reproducible_and_leaves_the_global_generator_alone():
    task, images, labels = Diffusion(num_train_timesteps=10), torch.rand(6, 1, 3, 3), torch.zeros(6, dtype=torch.int64)
    state = torch.get_rng_state()
    first, again, other = (task.draw(images, labels, generator=derive_generator(s, "draw")) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert set(first) == {"images", "noise", "timesteps"}
    for name in first:
        assert torch.equal(first[name], again[name])
    assert not torch.equal(first["noise"], other["noise"])
    assert first["noise"].shape == images.shape
    assert first["timesteps"].dtype == torch.int64


def test_timesteps_are_uniform_and_noise_is_standard_normal():
    task, count, bins = Diffusion(num_train_timesteps=10), 20_000, 10
    drawn = task.draw(torch.zeros(count, 1, 1, 2), torch.zeros(count), generator=derive_generator(0, "uniform"))
    counts = torch.bincount(drawn["timesteps"], minlength=bins)
    assert len(counts) == bins  # none outside 0 … T−1
    chi_squared = float(((counts - count / bins) ** 2 / (count / bins)).sum())
    assert chi_squared < 33.7  # the 0.9999 quantile with 9 degrees of freedom; the draw is fixed by its seed
    assert abs(float(drawn["noise"].mean())) < 5 / math.sqrt(2 * count)
    assert float(drawn["noise"].std()) == pytest.approx(1.0, abs=0.03)


# ------------------------------------------------------------------------------------------------ steps and variables
def test_batch_indices_example():
    assert batch_indices(5, 2, 3) == [[0, 1], [2, 3], [4, 0]]
    assert batch_indices(2, 8, 2) == [[0, 1], [0, 1]]


@given(st.integers(1, 9), st.integers(1, 12), st.integers(1, 8))
@settings(max_examples=60, deadline=None)
def test_batch_indices_go_on_round_and_round(count, batch, local_steps):
    steps = batch_indices(count, batch, local_steps)
    assert len(steps) == local_steps
    assert all(len(step) == min(batch, count) for step in steps)
    assert all(len(set(step)) == len(step) for step in steps)
    if batch <= count:
        assert [i for step in steps for i in step] == [i % count for i in range(batch * local_steps)]


@given(st.integers(1, 5), st.integers(1, 6), st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_split_is_the_inverse_of_join(count, batch, local_steps):
    task = Diffusion(num_train_timesteps=10)
    images = torch.arange(float(count)).reshape(-1, 1, 1, 1)
    labels = torch.arange(count)
    generator = derive_generator(0, "split")
    steps = batch_indices(count, batch, local_steps)
    batches = [task.draw(images[i], labels[i], generator=generator) for i in steps]
    joined = join_steps(task, images, labels, batches)
    assert torch.equal(joined["images"], images)
    assert len(joined["noise"]) == len(joined["timesteps"]) == sum(map(len, steps))
    again = split_steps(task, joined, steps)
    assert len(again) == len(batches)
    for found, wanted in zip(again, batches, strict=True):
        if len(steps) > 1 or batch >= count:
            assert torch.equal(found["images"], wanted["images"])
        assert torch.equal(found["noise"], wanted["noise"])
        assert torch.equal(found["timesteps"], wanted["timesteps"])


def test_one_step_on_a_part_of_the_data_takes_only_that_part():
    """batch_indices(5, 2, 1) is [[0, 1]]: a client with five examples and one local step of two never uses the others."""
    task, images, labels = Classification(), torch.rand(5, 1, 2, 2), torch.arange(5)
    (only,) = split_steps(task, {"images": images, "labels": labels}, batch_indices(5, 2, 1))
    assert torch.equal(only["images"], images[:2])
    assert torch.equal(only["labels"], labels[:2])


def test_schedule_is_what_the_attacker_may_assume():
    known = Knowledge(image_shape=SHAPE, batch_size=4)
    assert schedule(known) == [[0, 1, 2, 3]]
    known = Knowledge(image_shape=SHAPE, batch_size=3, local_batch_size=2, local_steps=3)
    assert schedule(known) == [[0, 1], [2, 0], [1, 2]]


def test_variables_have_the_shapes_of_what_is_drawn():
    known = Knowledge(image_shape=SHAPE, batch_size=3, num_classes=CLASSES, local_steps=2, local_batch_size=2)
    images, labels = examples(3)
    for name in TASKS:
        task = build_task(name)
        steps = schedule(known)
        generator = derive_generator(0, "variables")
        batches = [task.draw(images[i], labels[i], generator=generator) for i in steps]
        joined = join_steps(task, images, labels, batches)
        for variable_name, variable in task.variables(known).items():
            wanted = joined[variable_name].shape
            assert variable.shape[: len(wanted)] == tuple(wanted), (name, variable_name)
        assert set(task.variables(known)) == set(batches[0])


@pytest.mark.parametrize("name", sorted(TASKS))
@pytest.mark.parametrize("hidden", ["image_shape", "batch_size"])
def test_variables_of_unknown_shape_are_refused(name, hidden):
    facts = {"image_shape": SHAPE, "batch_size": 2, "num_classes": CLASSES}
    del facts[hidden]
    with pytest.raises(MissingKnowledge, match=hidden):
        build_task(name).variables(Knowledge(**facts))


def test_unknown_tasks_and_predictions_offer_the_closest_name():
    with pytest.raises(FedattackError, match="did you mean 'diffusion'"):
        build_task("difusion")
    with pytest.raises(FedattackError, match="did you mean 'epsilon'"):
        Diffusion(prediction_type="epsilom")


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("norm", ["none", "batch"])
def test_plain_autograd_gives_the_numbers_of_torch_func(norm, steps):
    """Values, and derivatives by the images, of one gradient and of unrolled steps; statistics in `sent` stay as they were."""
    model = build_model("convnet-small", image_shape=(3, 8, 8), num_classes=4, seed=0, width=8, norm=norm).double()
    sent = {name: tensor.detach().clone() for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    kept = {name: tensor.clone() for name, tensor in sent.items()}
    labels = torch.tensor([0, 1, 2])
    results = []
    for transformable in (True, False):
        images = torch.rand(3, 3, 8, 8, generator=derive_generator(0, "i"), dtype=torch.float64).requires_grad_()
        batches = [{"images": images, "labels": labels}] * steps
        gradient = simulate_gradient(
            model, sent, Classification(), batches, learning_rate=0.1, transformable=transformable
        )
        loss = sum(tensor.square().sum() for tensor in gradient.values())
        results.append((gradient, torch.autograd.grad(loss, images)[0]))
        with torch.no_grad():
            quiet = simulate_gradient(
                model, sent, Classification(), batches, learning_rate=0.1, transformable=transformable
            )
        assert not any(tensor.requires_grad for tensor in quiet.values())
    for name, tensor in results[0][0].items():
        torch.testing.assert_close(results[1][0][name], tensor, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(results[1][1], results[0][1], rtol=1e-10, atol=1e-14)
    assert all(torch.equal(sent[name], kept[name]) for name in sent)

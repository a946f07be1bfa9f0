"""Timesteps from the time embedding's gradient.

Exact without noise: one member, batches below the embedding's width, odd T, several local steps. Under noise: the 99 % set
holds the truth 99 % of the time, and the likelihood finds more than the span test. Elsewhere: NotApplicable with a reason.
"""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from attacks.timesteps import infer_timesteps, timestep_table, with_timesteps
from experiments import timestep_leak
from fedattack.errors import FedattackError, MissingKnowledge, NotApplicable
from fedattack.models import build_model
from fedattack.seeding import derive_generator, seeded_default_generator
from fedattack.tasks import Classification, Diffusion, batch_indices
from fedattack.types import Knowledge, Update

STEPS = 37
SHAPE = (1, 8, 8)
TOY_TASK = Diffusion(num_train_timesteps=STEPS)


class Toy(nn.Module):
    """Scales the image by a number that a dense layer makes of a known table's row; decoys come first."""

    def __init__(self, width: int = 9, outputs: int = 64, bias: bool = True, learned: bool = False) -> None:
        super().__init__()
        table = torch.randn(STEPS, width, generator=derive_generator(0, "table", width))
        if learned:
            self.table = nn.Parameter(table)
        else:
            self.register_buffer("table", table)
        with seeded_default_generator(0):
            self.of_image = nn.Linear(64, 3)
            self.of_both = nn.Linear(width + 3, 3)
            self.constant = nn.Linear(2, 1)
            self.time = nn.Linear(width, outputs, bias=bias)
            self.last = nn.Linear(outputs, 1)

    def forward(self, images: Tensor, timesteps: Tensor) -> Tensor:
        row = self.table[timesteps.long()]
        seen = self.of_image(images.flatten(1))
        seen = self.of_both(torch.cat([row, seen], 1)).mean(1, keepdim=True)
        seen = seen + self.constant(torch.ones(len(images), 2, dtype=images.dtype))
        return images * (seen + self.last(self.time(row).tanh()))[:, :, None, None]


def toy_update(model, members, deltas, *, sigma=0.0, generator=None, dtype=torch.float64):
    """An update whose layer gradient is Σ δ_b [τ(t_b), 1] + σ·noise by hand, deltas (B, outputs)."""
    rows = torch.cat([model.table[members].double(), torch.ones(len(members), 1).double()], 1)
    gradient = deltas.T @ rows
    if sigma:
        gradient = gradient + sigma * torch.randn(gradient.shape, generator=generator, dtype=torch.float64)
    sent = {name: tensor.detach().to(dtype) for name, tensor in model.state_dict().items()}
    received = {"time.weight": gradient[:, :-1].to(dtype), "time.bias": gradient[:, -1].to(dtype)}
    return Update(1, "0", sent, received, "gradient", len(members))


def facts(batch, shape=SHAPE, **more):
    return Knowledge(image_shape=shape, batch_size=batch, **more)


def draws(seed, *shape):
    return torch.randn(shape, generator=derive_generator(seed, "deltas"), dtype=torch.float64)


def unet(width, **options):
    channels = (width,)
    return build_model(
        "unet",
        image_shape=SHAPE,
        num_classes=None,
        seed=1,
        block_out_channels=channels,
        attention=(),
        mid_attention=False,
        **options,
    )


def client_timesteps(task, batch, steps, seed=0, dtype=torch.float64):
    """The draws of conftest.update_from, repeated."""
    generator = derive_generator(seed, "client")
    drawn = [
        task.draw(torch.zeros(len(i), *SHAPE, dtype=dtype), torch.zeros(len(i)), generator=generator) for i in steps
    ]
    return sorted(torch.cat([private["timesteps"] for private in drawn]).tolist())


# ------------------------------------------------------------------------------------------------ closed forms
def test_the_table_is_what_the_layer_sees():
    model = Toy()
    name, table = timestep_table(model, dict(model.state_dict()), set(model.state_dict()), SHAPE, STEPS)
    assert name == "time"
    assert torch.equal(table, model.table.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_timestep_alone_is_exact(dtype):
    model = Toy()
    for t in range(STEPS):
        update = toy_update(model, torch.tensor([t]), draws(t, 1, 64), dtype=dtype)
        found = infer_timesteps(update, model, TOY_TASK, facts(1))
        assert found.timesteps.tolist() == [t]
        assert found.timesteps.dtype == torch.int64
        assert found.exact
        assert found.rank == 1
        assert found.posterior.shape == (1, STEPS)
        assert float(found.posterior[0, t]) == 1.0
        assert int(found.log_likelihood.argmax()) == t
        assert found.credible_set().tolist() == [t]
        assert float(found.residuals[t]) < 1e-10
        assert found.residuals.shape == found.log_likelihood.shape == (STEPS,)
        assert float(found.residuals.max()) <= 1.0


@pytest.mark.parametrize("batch", [2, 5, 9])
def test_batches_up_to_the_width_are_exact(batch):
    """Nine columns and the bias are ten dimensions."""
    model = Toy()
    for seed in range(5):
        members = torch.randperm(STEPS, generator=derive_generator(seed, "t"))[:batch]
        found = infer_timesteps(toy_update(model, members, draws(seed, batch, 64)), model, TOY_TASK, facts(batch))
        assert found.timesteps.tolist() == sorted(members.tolist())
        assert found.exact
        assert found.rank == batch


def test_without_a_bias_the_weight_is_enough():
    model = Toy(bias=False)
    update = toy_update(model, torch.tensor([3, 30, 36]), draws(0, 3, 64))
    update.received.pop("time.bias")
    assert infer_timesteps(update, model, TOY_TASK, facts(3)).timesteps.tolist() == [3, 30, 36]


def test_members_fill_the_dimensions():
    model = Toy(outputs=64)
    update = toy_update(model, torch.arange(10), draws(0, 10, 64))
    with pytest.raises(NotApplicable, match="10 timesteps fill the 10 dimensions"):
        infer_timesteps(update, model, TOY_TASK, facts(10))
    model = Toy(outputs=4)  # four rows cannot span five embeddings
    with pytest.raises(NotApplicable, match="5 timesteps fill the 4 dimensions"):
        infer_timesteps(toy_update(model, torch.arange(5), draws(0, 5, 4)), model, TOY_TASK, facts(5))


@pytest.mark.parametrize("members", [[4, 4, 20], [7, 7, 7, 30], [2, 2, 5, 5, 9], [11, 11]])
@pytest.mark.parametrize("sigma", [0.0, 0.05])
def test_repeated_timesteps_are_counted_by_rank_and_placed_by_power(members, sigma):
    """Two of a kind share a direction with twice the power; with 256 outputs powers differ by 9 % by chance."""
    model = Toy(outputs=256)
    update = toy_update(
        model,
        torch.tensor(members),
        draws(1, len(members), 256),
        sigma=sigma,
        generator=derive_generator(0, "noise"),
    )
    found = infer_timesteps(update, model, TOY_TASK, facts(len(members)))
    assert found.rank == len(set(members))
    assert set(found.timesteps.tolist()) == set(members)
    assert len(found.timesteps) == len(members)
    if not sigma:
        assert found.exact
        assert found.timesteps.tolist() == members


# ------------------------------------------------------------------------------------------------ U-Nets
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("width", "batch"), [(32, 1), (32, 4), (32, 12), (64, 16), (64, 32), (128, 32)])
def test_unet_is_exact(make_update, random_images, width, batch, dtype):
    model, task = unet(width).to(dtype), Diffusion()
    for seed in range(2):
        update = make_update(
            model, random_images((batch, *SHAPE), seed), torch.zeros(batch), task=task, dtype=dtype, seed=seed
        )
        truth = client_timesteps(task, batch, [range(batch)], seed, dtype)
        found = infer_timesteps(update, model, task, facts(batch))
        assert set(found.timesteps.tolist()) == set(truth)
        assert found.rank == len(set(truth))
        assert found.exact
        if len(set(truth)) == batch:
            assert found.timesteps.tolist() == truth


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch", [32, 48])
def test_the_second_layer_takes_over_where_the_first_is_too_narrow(make_update, random_images, batch, dtype):
    """Width 32 and its bias are 33 dimensions, of which float32 resolves about 26."""
    model, task = unet(32).to(dtype), Diffusion()
    update = make_update(model, random_images((batch, *SHAPE)), torch.zeros(batch), task=task, dtype=dtype)
    found = infer_timesteps(update, model, task, facts(batch))
    assert set(found.timesteps.tolist()) == set(client_timesteps(task, batch, [range(batch)], dtype=dtype))
    assert found.exact
    assert found.layer == "unet.time_embedding.linear_2"
    with pytest.raises(NotApplicable, match="96 timesteps fill the 33 dimensions"):
        infer_timesteps(update, model, task, facts(batch, local_steps=96 // batch, learning_rate=0.1))


def test_unet_with_an_odd_number_of_timesteps(make_update, random_images):
    model, task = unet(32).double(), TOY_TASK
    update = make_update(model, random_images((3, *SHAPE)), torch.zeros(3), task=task)
    found = infer_timesteps(update, model, task, facts(3))
    assert found.timesteps.tolist() == client_timesteps(task, 3, [range(3)])
    assert len(found.log_likelihood) == STEPS


def test_class_conditional_unet_behind_a_fixed_class(make_update, random_images):
    """The class embedding is added behind the layer."""

    class Conditional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            from diffusers import UNet2DModel

            with seeded_default_generator(0):
                self.unet = UNet2DModel(
                    sample_size=8,
                    in_channels=1,
                    out_channels=1,
                    block_out_channels=(32,),
                    down_block_types=("DownBlock2D",),
                    up_block_types=("UpBlock2D",),
                    layers_per_block=1,
                    num_class_embeds=4,
                    norm_num_groups=8,
                    add_attention=False,
                )

        def forward(self, images: Tensor, timesteps: Tensor) -> Tensor:
            labels = torch.arange(len(images)) % 4
            output: Tensor = self.unet(images, timesteps, class_labels=labels, return_dict=False)[0]
            return output

    model, task = Conditional(), Diffusion()
    update = make_update(model, random_images((3, *SHAPE)), torch.zeros(3), task=task, dtype=torch.float32)
    found = infer_timesteps(update, model, task, facts(3))
    assert found.timesteps.tolist() == client_timesteps(task, 3, [range(3)], dtype=torch.float32)
    assert found.layer == "unet.time_embedding.linear_1"


# ------------------------------------------------------------------------------------------------ FedAvg
@pytest.mark.parametrize("known_rate", [True, False])
@pytest.mark.parametrize(("steps", "size"), [(1, 4), (2, 2), (2, 4), (3, 3)])
@pytest.mark.parametrize("proximal_mu", [0.0, 0.5])
def test_local_steps_add_their_members(make_update, random_images, steps, size, known_rate, proximal_mu):
    model, task, batch = unet(32).double(), Diffusion(), 4
    update = make_update(
        model,
        random_images((batch, *SHAPE)),
        torch.zeros(batch),
        task=task,
        kind="weights",
        learning_rate=0.05,
        local_steps=steps,
        local_batch_size=size,
        proximal_mu=proximal_mu,
    )
    knowledge = facts(
        batch,
        learning_rate=0.05 if known_rate else None,
        local_steps=steps,
        local_batch_size=size,
        proximal_mu=proximal_mu,
    )
    found = infer_timesteps(update, model, task, knowledge)
    assert found.timesteps.tolist() == client_timesteps(task, batch, batch_indices(batch, size, steps))


def test_float32_weights_round_like_noise_and_are_read_all_the_same(make_update, random_images):
    """(sent − received)/learning_rate has lost digits: about 1e-4 of the layer's rms here."""
    model, task = unet(64), Diffusion()
    update = make_update(
        model, random_images((4, *SHAPE)), torch.zeros(4), task=task, kind="weights", dtype=torch.float32
    )
    found = infer_timesteps(update, model, task, facts(4, learning_rate=0.1))
    assert found.timesteps.tolist() == client_timesteps(task, 4, [range(4)], dtype=torch.float32)
    assert not found.exact


# ------------------------------------------------------------------------------------------------ noise
@pytest.mark.parametrize("known", [True, False])
def test_posterior_of_one_member_is_calibrated(known):
    """400 toy draws of δ, t and noise: the 99 % set holds t in 99 % of them, and probabilities mean what they say."""
    model, repeats, sigma = Toy(outputs=24), 400, 2.0
    inside, right, claimed, sizes = [], [], [], []
    for seed in range(repeats):
        generator = derive_generator(seed, "calibration")
        t = int(torch.randint(0, STEPS, (1,), generator=generator))
        delta = torch.randn(1, 24, generator=generator, dtype=torch.float64)
        update = toy_update(model, torch.tensor([t]), delta, sigma=sigma, generator=generator)
        found = infer_timesteps(update, model, TOY_TASK, facts(1), sigma=sigma if known else None)
        members = found.credible_set(mass=0.99).tolist()
        inside.append(t in members)
        sizes.append(len(members))
        right.append(found.timesteps.tolist() == [t])
        claimed.append(float(found.posterior.max()))
        assert float(found.posterior.sum()) == pytest.approx(1.0)
        assert int(found.log_likelihood.argmax()) == found.timesteps.item()
    assert 3 < sum(sizes) / repeats < STEPS / 1.5, "neither trivial nor hopeless"
    assert 0.3 < sum(right) / repeats < 0.95
    assert sum(inside) / repeats > 0.965, "0.99 less five standard errors"
    assert sum(right) / repeats == pytest.approx(sum(claimed) / repeats, abs=0.08)


def test_pure_noise_gives_a_broad_posterior():
    """Twenty updates without any signal."""
    model, sizes, inside = Toy(), [], []
    for seed in range(20):
        generator = derive_generator(seed, "silence")
        update = toy_update(model, torch.tensor([seed]), 0.0 * draws(0, 1, 64), sigma=1.0, generator=generator)
        members = infer_timesteps(update, model, TOY_TASK, facts(1)).credible_set().tolist()
        sizes.append(len(members))
        inside.append(seed in members)
    assert sum(sizes) / 20 > 0.7 * STEPS
    assert sum(inside) >= 18


@pytest.mark.parametrize("batch", [1, 4])
def test_noise_is_estimated_from_the_smallest_singular_values(batch):
    model = Toy(width=24)
    members = torch.arange(batch) * 5
    update = toy_update(
        model, members, draws(0, batch, 64), sigma=0.3, generator=derive_generator(1, "noise"), dtype=torch.float32
    )
    found = infer_timesteps(update, model, TOY_TASK, facts(batch))
    assert found.sigma == pytest.approx(0.3, rel=0.1)
    assert not found.exact
    assert found.timesteps.tolist() == members.tolist()
    assert found.posterior.shape == (batch, STEPS)
    assert found.posterior.argmax(1).tolist() == members.tolist()


def test_the_likelihood_finds_more_than_the_span_test():
    """Same updates, same known σ: hits of the search against those of the B smallest residuals (MUSIC)."""
    model, batch = unet(32).double(), 8
    task = Diffusion()
    sent = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    name, table = timestep_table(model, sent, set(sent), SHAPE, 1000)
    hits = {"search": 0, "music": 0}
    for seed in range(8):
        generator = derive_generator(seed, "search")
        members = torch.randint(0, 1000, (batch,), generator=generator)
        rows = torch.cat([table[members], torch.ones(batch, 1)], 1)
        gradient = torch.randn(128, batch, generator=generator, dtype=torch.float64) @ rows
        gradient = gradient + 2.0 * torch.randn(gradient.shape, generator=generator, dtype=torch.float64)
        received = {f"{name}.weight": gradient[:, :-1], f"{name}.bias": gradient[:, -1]}
        update = Update(1, "0", sent, received, "gradient", batch)
        found = infer_timesteps(update, model, task, facts(batch), sigma=2.0)
        span = torch.linalg.svd(gradient, full_matrices=False).Vh[:batch]
        unit = nn.functional.normalize(torch.cat([table, torch.ones(1000, 1)], 1))
        music = (unit @ span.T).square().sum(1).argsort(descending=True)[:batch]
        for which, guess in (("search", found.timesteps), ("music", music)):
            hits[which] += (Counter(guess.tolist()) & Counter(members.tolist())).total()
    assert hits["search"] > 1.2 * hits["music"]
    assert hits["search"] > 0.7 * 8 * batch


@pytest.mark.parametrize("batch", [1, 3])
def test_a_given_sigma_of_zero_is_the_clean_case(batch):
    model = Toy()
    update = toy_update(model, torch.arange(batch), draws(0, batch, 64))
    assert infer_timesteps(update, model, TOY_TASK, facts(batch), sigma=0.0).exact
    with pytest.raises(FedattackError, match="sigma must be"):
        infer_timesteps(update, model, TOY_TASK, facts(batch), sigma=-1.0)


# ------------------------------------------------------------------------------------------------ what cannot be said
def test_other_tasks_and_models_are_refused(make_update, random_images):
    model = build_model("mlp", image_shape=SHAPE, num_classes=4, seed=0)
    update = make_update(model, random_images((1, *SHAPE)), torch.tensor([1]))
    with pytest.raises(NotApplicable, match="classification"):
        infer_timesteps(update, model, Classification(), facts(1))
    with pytest.raises(NotApplicable, match="cannot be probed"):
        infer_timesteps(update, model, TOY_TASK, facts(1))


def test_a_layer_that_was_not_sent_is_refused():
    model = Toy()
    update = toy_update(model, torch.tensor([1]), draws(0, 1, 64))
    frozen = replace(update, received={"of_image.weight": torch.ones(3, 64)})
    with pytest.raises(NotApplicable, match=r"does not hold time\.weight"):
        infer_timesteps(frozen, model, TOY_TASK, facts(1))


def test_the_next_layer_stands_in_for_a_frozen_one(make_update, random_images):
    model, task = unet(32).double(), Diffusion()
    update = make_update(model, random_images((3, *SHAPE)), torch.zeros(3), task=task)
    received = {name: tensor for name, tensor in update.received.items() if "linear_1" not in name}
    found = infer_timesteps(replace(update, received=received), model, task, facts(3))
    assert found.layer == "unet.time_embedding.linear_2"
    assert found.timesteps.tolist() == client_timesteps(task, 3, [range(3)])


@pytest.mark.parametrize("fill", [0.0, float("nan")])
def test_a_silent_or_broken_gradient_is_refused(fill):
    model = Toy()
    update = toy_update(model, torch.tensor([1]), torch.full((1, 64), fill).double())
    with pytest.raises(NotApplicable, match="zero or not finite"):
        infer_timesteps(update, model, TOY_TASK, facts(1))


def test_no_dense_layer_behind_the_timestep():
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(STEPS, 1)
            self.dense = nn.Linear(64, 64)

        def forward(self, images: Tensor, timesteps: Tensor) -> Tensor:
            scale = self.embedding(timesteps)[:, :, None, None]
            return self.dense(images.flatten(1)).reshape(images.shape) * scale

    model = Bare()
    sent = dict(model.state_dict())
    with pytest.raises(NotApplicable, match="no dense layer"):
        infer_timesteps(Update(1, "0", sent, sent, "gradient"), model, TOY_TASK, facts(1))


def test_a_learned_embedding_serves_one_step_and_no_more(make_update, random_images):
    model = Toy(learned=True).double()
    update = make_update(model, random_images((2, *SHAPE)), torch.zeros(2), task=TOY_TASK)
    found = infer_timesteps(update, model, TOY_TASK, facts(2))
    assert found.timesteps.tolist() == client_timesteps(TOY_TASK, 2, [range(2)])
    with pytest.raises(NotApplicable, match="moves with the weights"):
        infer_timesteps(update, model, TOY_TASK, facts(2, local_steps=2, learning_rate=0.1))


@pytest.mark.parametrize("hidden", ["batch_size", "image_shape"])
def test_hidden_facts_are_named(hidden):
    model = Toy()
    update = toy_update(model, torch.tensor([1]), draws(0, 1, 64))
    with pytest.raises(MissingKnowledge, match=hidden):
        infer_timesteps(update, model, TOY_TASK, replace(facts(1), **{hidden: None}))


# ------------------------------------------------------------------------------------------------ manners
@pytest.mark.parametrize("sigma", [None, 1e-4])
def test_nothing_is_left_behind(make_update, random_images, sigma):
    model, task = unet(32, dropout=0.3).train(), Diffusion()
    update = make_update(model, random_images((2, *SHAPE)), torch.zeros(2), task=task, dtype=torch.float32)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    received = {name: tensor.clone() for name, tensor in update.received.items()}
    sent = {name: tensor.clone() for name, tensor in update.sent.items()}
    random = torch.get_rng_state()
    first = infer_timesteps(update, model, task, facts(2), sigma=sigma)
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(bool((parameter.grad == 1).all()) for parameter in model.parameters())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert all(module.training for module in model.modules())
    assert all(torch.equal(tensor, received[name]) for name, tensor in update.received.items())
    assert all(torch.equal(tensor, sent[name]) for name, tensor in update.sent.items())
    again = infer_timesteps(update, unet(32).eval(), task, facts(2), sigma=sigma)
    assert torch.equal(first.posterior, again.posterior), "another instance with other modes gives the same"


def test_with_timesteps_fills_what_is_hidden_and_keeps_what_is_known():
    model = Toy()
    update = toy_update(model, torch.tensor([30, 8]), draws(0, 2, 64))
    filled = with_timesteps(update, model, TOY_TASK, facts(2))
    assert filled.timesteps.tolist() == [8, 30]
    assert replace(filled, timesteps=None) == facts(2)
    known = facts(2, timesteps=torch.tensor([1, 0]))
    assert with_timesteps(update, model, TOY_TASK, known) is known


def test_the_experiment_prints_both_tables(capsys, tmp_path):
    out = tmp_path / "rows" / "leak.jsonl"
    few = "--widths 32 --batches 1 2 --noise-batches 1 --sigmas 0.1 --dtypes float64 --training-steps 1 --repeats 2"
    assert timestep_leak.main([*few.split(), "--out", str(out)]) == 0
    assert len(out.read_text().splitlines()) == 3
    assert capsys.readouterr().out.count("| 32 | 1 |") == 3

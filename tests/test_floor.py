"""The error floor: closed forms, a plain oracle, and above all Monte Carlo: what least squares really attains under noise."""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from fedattack import floor as floors
from fedattack.errors import FedattackError, NotApplicable
from fedattack.floor import Earlier, Sent, error_floor, sharing
from fedattack.models import build_model
from fedattack.tasks import Classification, Diffusion, Task, parameter_names, simulate, split_steps
from fedattack.types import Knowledge, Update

SMALL = {"block_out_channels": (8,), "attention": (), "mid_attention": False, "norm_num_groups": 4}
DDPM = Diffusion(num_train_timesteps=100)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=seeded(seed), dtype=torch.float64)


def setting(
    name: str, shape=(3, 5, 4), batch: int = 1, *, task: Task | None = None, t: int = 30, kind="gradient", steps=1, **kw
):
    """(update, model, task, knowledge, truth) of an undefended client with random images."""
    task = task or Classification()
    model = build_model(name, image_shape=shape, num_classes=4, seed=1, **kw).double().eval()
    truth = {"images": drawn(batch, *shape), "labels": torch.arange(batch) % 4}
    if task.name == "diffusion":
        draws = batch * steps
        truth["noise"] = torch.randn(draws, *shape, generator=seeded(2), dtype=torch.float64)
        truth["timesteps"] = (t + 7 * torch.arange(draws)) % 100
    knowledge = Knowledge(num_classes=4, learning_rate=0.2, local_steps=steps)
    sent = {key: tensor.detach().clone() for key, tensor in model.state_dict().items()}
    batches = split_steps(task, truth, [list(range(batch))] * steps)
    received = simulate(model, sent, task, batches, kind=kind, learning_rate=0.2)
    received = {key: tensor.detach() for key, tensor in received.items()}
    return Update(1, "0", sent, received, kind, batch), model, task, knowledge, truth


def floor_of(case, method: str = "exact", **options) -> floors.Floor:
    return error_floor(*case, method=method, generator=seeded(), **options)


def dense(case, step: float = 1e-6) -> Tensor:
    """F by central differences, a column at a time."""
    sent = Sent.of(*case, None)
    columns = []
    for unit in torch.eye(len(sent.at), dtype=torch.float64):
        columns.append((sent.plain(sent.at + step * unit) - sent.plain(sent.at - step * unit)).detach() / (2 * step))
    return torch.stack(columns, 1)


# ------------------------------------------------------------------------------------------------ closed forms
@dataclass(frozen=True)
class Weighted:
    """loss = Σ_i c_i·output_i, whose weight gradient is c ⊗ (sum of the images): linear, so F is known."""

    name: ClassVar[str] = "classification"
    drawn: ClassVar[frozenset[str]] = frozenset()
    weights: tuple[float, ...] = (1.0, -2.0, 0.5)

    def loss(self, predict, private) -> Tensor:
        return (predict(private["images"].flatten(1)) * torch.tensor(self.weights, dtype=torch.float64)).sum()


def weighted(batch: int = 1):
    model = nn.Linear(12, 3).double()
    truth = {"images": drawn(batch, 3, 2, 2), "labels": torch.zeros(batch, dtype=torch.long)}
    sent = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    received = {name: torch.ones_like(tensor) for name, tensor in sent.items()}
    return Update(1, "0", sent, received, "gradient"), model, Weighted(), Knowledge(), truth


def test_a_linear_layer_has_the_floor_of_an_average():
    """Each pixel is sent three times, times c_i: the best average of the three has the error σ/‖c‖."""
    found = floor_of(weighted())
    expected = 1.0 / math.sqrt(1.0 + 4.0 + 0.25)
    assert found.rms_per_sigma == pytest.approx(expected, rel=1e-12)
    assert (found.status, found.rank, found.unknowns, found.hidden, found.equations) == ("exact", 12, 12, 0, 39)
    assert found.condition == pytest.approx(1.0)
    assert found.psnr_db(0.01) == pytest.approx(-20 * math.log10(0.01 * expected))
    assert found.rms(found.sigma_at(20.0)) == pytest.approx(0.1)
    assert found.psnr_db(0.0) is None


def test_what_is_summed_cannot_be_told_apart():
    """Of two images only the sum is sent: 12 of 24 directions are hidden, the sum/√2 is told to within σ/(‖c‖·√2)."""
    found = floor_of(weighted(2))
    assert (found.rank, found.hidden, found.identifiable) == (12, 12, False)
    assert found.rms_per_sigma == pytest.approx(1.0 / math.sqrt(5.25 * 2.0), rel=1e-10)
    assert found.per_image == pytest.approx([found.rms_per_sigma] * 2)
    assert found.psnr_db(0.01) is None


def test_clipping_scales_and_loses_the_norm():
    """A clipped update is g·C/‖g‖: F loses the part along g and shrinks with the rest."""
    case = weighted()
    norm = float(Sent.of(*case, None).value.norm())
    assert floor_of(case, clip_norm=2 * norm).rms_per_sigma == pytest.approx(floor_of(case).rms_per_sigma)
    clipped = floor_of(case, clip_norm=norm / 10)
    f = torch.zeros(39, 12, dtype=torch.float64)
    for i, c in enumerate(Weighted().weights):
        f[12 * i : 12 * (i + 1)] = c * torch.eye(12, dtype=torch.float64)
    unit = Sent.of(*case, None).value / norm
    f = (f - torch.outer(unit, unit @ f)) / 10
    assert clipped.rms_per_sigma == pytest.approx(float(torch.linalg.inv(f.T @ f).diagonal().mean().sqrt()), rel=1e-9)


# ------------------------------------------------------------------------------------------------ the plain oracle
CASES = {
    "lenet": lambda: setting("lenet", (3, 8, 8)),
    "lenet, relu, two images": lambda: setting("lenet", (3, 8, 8), 2, activation="relu", init="default"),
    "mlp, three images": lambda: setting("mlp", batch=3, hidden=[16], activation="tanh"),
    "unet": lambda: setting("unet", (2, 4, 3), task=DDPM, **SMALL),
    "unet, two images": lambda: setting("unet", (1, 3, 5), 2, task=DDPM, **SMALL),
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_the_mean_diagonal_of_the_inverse(name):
    """Hidden noise: the image block of the inverse of the joint matrix, formed here and eliminated there."""
    case = CASES[name]()
    f, found = dense(case), floor_of(case)
    pixels = case[4]["images"].numel()
    diagonal = torch.linalg.inv(f.T @ f).diagonal()[:pixels]
    assert found.hidden == 0
    assert found.rank == found.unknowns == f.shape[1]
    assert found.rms_per_sigma == pytest.approx(float(diagonal.mean().sqrt()), rel=1e-4)
    each = diagonal.reshape(len(case[4]["images"]), -1).mean(1).sqrt()
    assert found.per_image == pytest.approx(each.tolist(), rel=1e-4)


def test_noise_that_is_known_is_no_unknown():
    update, model, task, knowledge, truth = case = CASES["unet"]()
    known = floor_of((update, model, task, replace(knowledge, noise=truth["noise"]), truth))
    assert known.unknowns == 24
    assert known.rms_per_sigma < floor_of(case).rms_per_sigma
    f = dense(case)[:, :24]
    assert known.rms_per_sigma == pytest.approx(float(torch.linalg.inv(f.T @ f).diagonal().mean().sqrt()), rel=1e-4)


def test_weights_are_measured_in_what_was_sent():
    """One local step moves the weights by rate × gradient: the same noise on them weighs 1/rate as much."""
    gradient = floor_of(setting("lenet", (3, 8, 8)))
    weights = floor_of(setting("lenet", (3, 8, 8), kind="weights"))
    assert weights.rms_per_sigma == pytest.approx(gradient.rms_per_sigma / 0.2, rel=1e-6)
    assert weights.update_rms == pytest.approx(gradient.update_rms * 0.2, rel=1e-6)
    assert weights.rounding_sigma > gradient.rounding_sigma


@pytest.mark.parametrize("task", [None, DDPM])
def test_several_local_steps(task):
    """F of the unrolled steps, against finite differences of what training really returns."""
    name, options = ("unet", SMALL) if task else ("mlp", {"hidden": [16], "activation": "tanh"})
    shape = (1, 3, 3) if task else (3, 5, 4)
    case = setting(name, shape, 2, task=task, kind="weights", steps=2, **options)
    update, model, task, _, truth = case
    sent = Sent.of(*case, None)
    direction = torch.randn(len(sent.at), generator=seeded(5), dtype=torch.float64)

    def returned(hidden: Tensor) -> Tensor:
        private = {**truth, "images": hidden[: sent.pixels].reshape(truth["images"].shape)}
        if task.drawn:
            private["noise"] = hidden[sent.pixels :].reshape(truth["noise"].shape)
        batches = split_steps(task, private, [[0, 1]] * 2)
        state = simulate(model, update.sent, task, batches, kind="weights", learning_rate=0.2)
        return torch.cat([state[name].reshape(-1) for name in parameter_names(model)]).detach()

    step = 1e-5
    slope = (returned(sent.at + step * direction) - returned(sent.at - step * direction)) / (2 * step)
    torch.testing.assert_close(-(dense(case) @ direction), slope, rtol=1e-4, atol=1e-6)
    f = dense(case)
    diagonal = torch.linalg.pinv(f.T @ f).diagonal()[: sent.pixels]
    found = floor_of(case)
    assert found.hidden == 0
    assert found.rms_per_sigma == pytest.approx(float(diagonal.mean().sqrt()), rel=1e-4)


# ------------------------------------------------------------------------------------------------ is it the floor?
@pytest.mark.parametrize(
    ("name", "samples"), [("lenet", 60), ("mlp, three images", 60), ("unet", 60), ("unet, two images", 60)]
)
def test_least_squares_attains_it(name, samples):
    """Noise on the update, Gauss-Newton from the truth: the errors are the floor's, within their own spread."""
    case = CASES[name]()
    found, sent = floor_of(case), Sent.of(*case, None)
    sigma = 1e-5 / found.rms_per_sigma
    generator, errors = seeded(11), []
    inverse = torch.linalg.pinv(dense(case))
    for _ in range(samples):
        observed = sent.value + sigma * torch.randn(len(sent.value), generator=generator, dtype=torch.float64)
        hidden = sent.at
        for _ in range(3):  # F stays that of the truth: it moves by a share of 1e-5 only
            hidden = hidden + inverse @ (observed - sent.plain(hidden).detach())
        errors.append((hidden - sent.at)[: sent.pixels])
    squared = torch.stack(errors).square()
    measured = float(squared.mean().sqrt())
    assert measured == pytest.approx(found.rms(sigma), rel=0.1)
    if len(found.per_image) > 1:
        each = squared.reshape(samples, len(found.per_image), -1).mean((0, 2)).sqrt() / sigma
        assert each.tolist() == pytest.approx(found.per_image, rel=0.15)


# ------------------------------------------------------------------------------------------------ several updates
def in_another_round(case, seed: int, order=None):
    """The same client in another round: other weights, the images in another order, noise and timesteps drawn anew."""
    update, model, task, knowledge, truth = case
    fresh = torch.Generator().manual_seed(seed)
    sent = {n: t + 0.1 * torch.randn(t.shape, generator=fresh, dtype=t.dtype) for n, t in update.sent.items()}
    truth = dict(truth)
    if order is not None:
        truth |= {name: truth[name][order] for name in ("images", "labels")}
    if task.drawn:
        truth["noise"] = torch.randn(truth["noise"].shape, generator=fresh, dtype=torch.float64)
        truth["timesteps"] = (truth["timesteps"] + 3) % 100
    return replace(update, round=update.round + seed, sent=sent), model, task, knowledge, truth


def beside(*cases) -> list[Earlier]:
    return [Earlier(case[0], case[4]) for case in cases]


def test_the_floor_of_a_repeated_update_is_that_of_a_mean():
    """Twice the same equations under independent noise: their mean has σ/√2; under twice the noise they count a quarter."""
    case = weighted()
    one, two = floor_of(case), floor_of(case, earlier=beside(case))
    assert (two.updates, two.unknowns, two.equations, two.pixels) == (2, 12, 78, 12)
    assert two.rms_per_sigma == pytest.approx(one.rms_per_sigma / math.sqrt(2.0), rel=1e-12)
    assert (two.update_rms, two.rounding_sigma) == (one.update_rms, one.rounding_sigma)
    assert two.jacobian_norm == pytest.approx(one.jacobian_norm * math.sqrt(2.0))
    assert one.updates == 1
    noise = iter([1.0, 2.0])
    louder = floor_of(case, earlier=beside(case), sigma=lambda rms: next(noise))
    assert louder.rms_per_sigma == pytest.approx(one.rms_per_sigma / math.sqrt(1.25), rel=1e-12)


@pytest.mark.parametrize(
    ("name", "known"),
    [("lenet, relu, two images", False), ("unet", False), ("unet", True), ("unet, two images", False)],
)
def test_several_updates_are_their_equations_one_below_the_other(name, known):
    """By hand: columns of shared images, then of each round's own noise; rows in units of their own σ, relative to the rms."""
    case = CASES[name]()
    images = len(case[4]["images"])
    others = [in_another_round(case, 1, list(reversed(range(images)))), in_another_round(case, 2)]
    if known:  # of the attacked update alone
        case = (*case[:3], replace(case[3], noise=case[4]["noise"]), case[4])
    sents = [Sent.of(*one, None) for one in (case, *others)]
    pixels = sents[0].pixels
    rows, places = [], pixels
    wide = pixels + sum(len(sent.at) - pixels for sent in sents)
    for number, sent in enumerate(sents):
        f = dense((case, *others)[number]) * sents[0].update_rms / sent.update_rms
        whole = torch.zeros(len(f), wide, dtype=torch.float64)
        mine = f[:, :pixels].reshape(len(f), images, -1)
        whole[:, :pixels] = (mine.flip(1) if number == 1 else mine).reshape(len(f), pixels)
        whole[:, places : places + len(sent.at) - pixels] = f[:, pixels:]
        places += len(sent.at) - pixels
        rows.append(whole)
    stacked = torch.cat(rows)
    diagonal = torch.linalg.inv(stacked.T @ stacked).diagonal()[:pixels]
    found = floor_of(case, earlier=beside(*others), sigma=lambda rms: 0.3 * rms)
    assert (found.updates, found.unknowns, found.equations, found.hidden) == (3, wide, len(stacked), 0)
    assert found.rms_per_sigma == pytest.approx(float(diagonal.mean().sqrt()), rel=1e-4)
    assert found.per_image == pytest.approx(diagonal.reshape(images, -1).mean(1).sqrt().tolist(), rel=1e-4)
    assert found.update_rms == sents[0].update_rms


@pytest.mark.parametrize("name", CASES)
def test_a_further_update_never_raises_the_floor(name):
    case = CASES[name]()
    others = [in_another_round(case, seed) for seed in (1, 2)]
    alone, two, three = (floor_of(case, earlier=beside(*others[:n])).rms_per_sigma for n in range(3))
    assert three < two < alone


def test_least_squares_on_several_updates_attains_it():
    case = CASES["unet"]()
    other = in_another_round(case, 1)
    found = floor_of(case, earlier=beside(other), sigma=lambda rms: 0.3 * rms)
    first, second = Sent.of(*case, None), Sent.of(*other, None)
    pixels, sigma = first.pixels, 1e-5 / found.rms_per_sigma
    noises = sigma, sigma * second.update_rms / first.update_rms
    hidden = torch.cat([first.at, second.at[pixels:]])
    f = torch.zeros(len(first.value) + len(second.value), len(hidden), dtype=torch.float64)
    f[: len(first.value), : len(first.at)] = dense(case) / noises[0]
    f[len(first.value) :, [*range(pixels), *range(len(first.at), len(hidden))]] = dense(other) / noises[1]
    inverse, generator, errors = torch.linalg.pinv(f), seeded(11), []
    for _ in range(60):
        observed = [
            sent.value + noise * torch.randn(len(sent.value), generator=generator, dtype=torch.float64)
            for sent, noise in zip((first, second), noises, strict=True)
        ]
        at = hidden
        for _ in range(3):
            there = at[: len(first.at)], torch.cat([at[:pixels], at[len(first.at) :]])
            left = [
                (seen - sent.plain(x).detach()) / noise
                for seen, sent, x, noise in zip(observed, (first, second), there, noises, strict=True)
            ]
            at = at + inverse @ torch.cat(left)
        errors.append((at - hidden)[:pixels])
    assert float(torch.stack(errors).square().mean().sqrt()) == pytest.approx(found.rms(sigma), rel=0.1)


@pytest.mark.parametrize(
    ("name", "method"), [("mlp, three images", "sketch"), ("mlp, three images", "probes"), ("unet", "sketch")]
)
def test_cheaper_methods_agree_on_several_updates(name, method):
    case = CASES[name]()
    earlier = beside(in_another_round(case, 1))
    exact, found = floor_of(case, earlier=earlier), floor_of(case, method, earlier=earlier)
    assert (found.method, found.status, found.updates) == (method, "estimate", 2)
    assert found.rms_per_sigma == pytest.approx(exact.rms_per_sigma, rel=max(4 * found.relative_error, 0.02))
    assert found.jacobian_norm == pytest.approx(exact.jacobian_norm, rel=5 * found.jacobian_error)


def test_images_of_another_update_alone_are_nuisance():
    """Of two images only the sum is sent; that of one of them and a third helps as little as that third is known."""
    update, *rest, truth = weighted(2)
    third = {**truth, "images": torch.cat([truth["images"][1:], drawn(1, 3, 2, 2, seed=9)])}
    alone = {**truth, "images": third["images"][1:]}
    unrelated = {**truth, "images": drawn(2, 3, 2, 2, seed=10)}
    a, b, c = (Earlier(update, one) for one in (third, alone, unrelated))
    assert sharing(truth, [c, b, a]) == (b, a)  # b is reached through a
    assert sharing(truth, [c, b]) == ()
    case = (update, *rest, truth)
    told = floor_of(case, earlier=[a])
    assert (told.unknowns, told.pixels, told.rank, told.hidden) == (36, 24, 24, 12)
    assert told.rms_per_sigma == pytest.approx(floor_of(case).rms_per_sigma)
    told = floor_of(case, earlier=[b, a])  # sums x+y, y+z and z itself: all are told
    assert (told.unknowns, told.hidden) == (36, 0)
    sums = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    expected = torch.linalg.inv(sums.T @ sums).diagonal()[:2] / 5.25
    assert told.per_image == pytest.approx(expected.sqrt().tolist())
    told = floor_of(case, earlier=[c])
    assert told.rms_per_sigma == pytest.approx(floor_of(case).rms_per_sigma)


def test_a_zero_update_cannot_have_relative_noise():
    case, noise = weighted(), iter([1.0, 0.0])
    with pytest.raises(NotApplicable, match="one of the updates is zero"):
        floor_of(case, earlier=beside(case), sigma=lambda rms: next(noise))


# ------------------------------------------------------------------------------------------------ the cheaper methods
@pytest.mark.parametrize("name", CASES)
def test_a_sketch_agrees(name):
    case = CASES[name]()
    exact, found = floor_of(case), floor_of(case, "sketch")
    assert (found.method, found.status) == ("sketch", "estimate")
    assert (found.rank, found.hidden) == (exact.rank, exact.hidden)
    assert found.rms_per_sigma == pytest.approx(exact.rms_per_sigma, rel=3 * found.relative_error)
    assert found.relative_error < 0.06


@pytest.mark.parametrize("name", ["mlp, three images", "unet"])
def test_probes_agree(name):
    case = CASES[name]()
    exact, found = floor_of(case), floor_of(case, "probes")
    assert (found.method, found.status, found.rank, found.identifiable) == ("probes", "estimate", None, None)
    assert found.rms_per_sigma == pytest.approx(exact.rms_per_sigma, rel=max(4 * found.relative_error, 0.02))
    assert found.per_image == pytest.approx(exact.per_image, rel=0.25)


def test_probes_that_are_cut_short_are_bounds():
    """The sums of conjugate gradients only grow: a budget for fewer iterations gives a lower floor, and says so."""
    case = CASES["lenet"]()
    exact, cost = floor_of(case), floors.Cost.of(Sent.of(*case, None))
    few, more = (floor_of(case, "probes", seconds=n * cost.iteration * 1.01) for n in (5, 20))
    assert few.status == more.status == "at least"
    assert few.rms_per_sigma < more.rms_per_sigma < exact.rms_per_sigma * (1 + 3 * more.relative_error)
    assert few.per_image == ()
    assert few.derivatives == 2 * floors.PROBES * 5


def test_auto_takes_the_best_that_fits():
    small = setting("mlp", (3, 8, 8), hidden=[64])
    cost = floors.Cost.of(Sent.of(*small, None))
    assert cost.sketch < cost.exact
    assert floor_of(small, "auto").method == "exact"
    assert floor_of(small, "auto", seconds=(cost.sketch + cost.exact) / 2).method == "sketch"
    with pytest.raises(NotApplicable, match=r"skipped: 192 unknowns take an estimated"):
        floor_of(small, "auto", seconds=1e-6)
    large = setting("mlp", (3, 16, 16), hidden=[64])
    cost = floors.Cost.of(Sent.of(*large, None))
    assert 12 * cost.iteration < cost.sketch
    assert floor_of(large, "auto", seconds=12 * cost.iteration).method == "probes"


def test_the_estimate_does_not_depend_on_a_clock():
    case = CASES["lenet"]()
    assert floors.Cost.of(Sent.of(*case, None)) == floors.Cost.of(Sent.of(*case, None))


# ------------------------------------------------------------------------------------------------ what cannot be
def test_the_model_stays_as_it_was():
    case = CASES["lenet"]()
    model = case[1]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    floor_of(case, "auto")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_what_has_no_floor_says_why():
    update, model, task, knowledge, truth = case = setting("lenet", (3, 8, 8))
    with pytest.raises(FedattackError, match="method must be one of"):
        floor_of(case, "guess")
    with pytest.raises(NotApplicable, match="not finite"):
        floor_of((update, model, task, knowledge, {**truth, "images": truth["images"] * math.nan}))
    with pytest.raises(NotApplicable, match="none of the model's trained parameters"):
        floor_of((replace(update, received={}), model, task, knowledge, truth))
    with pytest.raises(NotApplicable, match="holds no noise, timesteps"):
        floor_of((update, model, DDPM, knowledge, truth))
    with pytest.raises(NotApplicable, match="learning_rate must be known"):
        floor_of((replace(update, kind="weights"), model, task, replace(knowledge, learning_rate=None), truth))


def test_one_image_in_a_batch_norm_that_trains():
    """8×8 images end as one pixel a channel, whose variance torch refuses: a reason, no crash."""
    model = build_model("resnet18", image_shape=(1, 8, 8), num_classes=2, seed=0, norm="batch").double()
    sent = {n: t.detach().clone() for n, t in model.state_dict().items() if t.is_floating_point()}
    truth = {"images": drawn(1, 1, 8, 8), "labels": torch.zeros(1, dtype=torch.long)}
    update = Update(1, "0", sent, sent, "gradient")
    with pytest.raises(NotApplicable, match="cannot be computed again"):
        floor_of((update, model.train(), Classification(), Knowledge(num_classes=2), truth), "probes", seconds=1.0)


def test_too_large_a_jacobian_is_refused(monkeypatch):
    monkeypatch.setattr(floors, "ENTRIES", 1000)
    with pytest.raises(NotApplicable, match="numbers are more than may be held"):
        floor_of(CASES["lenet"]())

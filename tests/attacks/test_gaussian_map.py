"""gaussian-map: its prior against Gaussians that are known, its search against closed forms, its images under noise."""

import math
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch
from attack_cases import Case
from conftest import update_from
from torch import Tensor

from attacks.coefficients import Cosines, Equations
from attacks.gaussian_map import GaussianMAP
from attacks.image_statistics import CONTRAST, Gaussian
from attacks.inverting_gradients import InvertingGradients
from attacks.most_probable import End, Search, Yardstick
from fedattack.errors import FedattackError
from fedattack.metrics import match_batch, psnr_db
from fedattack.seeding import derive_generator
from fedattack.tasks import Classification
from fedattack.types import Knowledge, Update, silent

SHAPE = (3, 8, 8)
SIZE = math.prod(SHAPE)
BASIS = Cosines.of(SHAPE, torch.zeros((), dtype=torch.float64))
SMOOTH = Case("lenet", "lenet", {"channels": 4})
CURVED = Case("convnet", "convnet-small", {"activation": "gelu"})
SHARP = Case("mlp", "mlp", {"hidden": (64, 64), "activation": "relu"})


def noisy(case: Case, images: Tensor, sigma: float, dtype: torch.dtype = torch.float64):
    """Model, update and what the server knows; sigma in units of the update's rms."""
    model = case.build_model(1).to(dtype)
    update = update_from(model, images, torch.arange(len(images)), dtype=dtype)
    count = sum(t.numel() for t in update.received.values())
    rms = math.sqrt(sum(float(t.square().sum()) for t in update.received.values()) / count)
    generator = derive_generator(0, "defense")
    received = {n: t + sigma * rms * torch.randn(t.shape, generator=generator) for n, t in update.received.items()}
    knowledge = Knowledge(
        image_shape=SHAPE,
        batch_size=len(images),
        num_classes=4,
        labels=torch.arange(len(images)),
        defense=f"gaussian-noise(sigma={sigma * rms})" if sigma else None,
    )
    return model, replace(update, received=received), knowledge, sigma * rms


def attack(model, update, knowledge, progress=silent, **settings):
    generator = derive_generator(0, "attack")
    return GaussianMAP(**settings).reconstruct(
        update, model, Classification(), knowledge, generator=generator, progress=progress
    )


# ------------------------------------------------------------------------------------------------ the prior
def drawn(count: int, correlated: bool, seed: int = 0) -> Tensor:
    """Images (N,C,H,W) whose coefficients vary independently, or nine tenths of them along five directions."""
    generator = derive_generator(seed, "images")
    free = torch.randn(count, SIZE, generator=generator, dtype=torch.float64)
    if correlated:
        directions = torch.randn(5, SIZE, generator=derive_generator(9, "directions"), dtype=torch.float64)
        free = (
            math.sqrt(0.1) * free + 0.9**0.5 * torch.randn(count, 5, generator=generator).double() @ directions / 5**0.5
        )
    return 0.5 + 0.5 * BASIS.back(0.2 * free.reshape(count, *SHAPE))


def test_how_much_images_vary_together_is_found_where_it_helps_to_know():
    together, apart = (Gaussian.of(SHAPE, BASIS, drawn(200, correlated)) for correlated in (True, False))
    assert together.share <= 0.2
    assert apart.share >= 0.5


def test_draws_vary_as_public_images_do():
    """Mean and covariance of coefficients(w) are those of the images, the covariance shrunk by the share that was chosen."""
    public = drawn(400, correlated=True)
    prior = Gaussian.of(SHAPE, BASIS, public)
    root = prior.coefficients(torch.eye(SIZE, dtype=torch.float64)) - prior.mean
    seen = BASIS.forward(2.0 * public - 1.0).flatten(1)
    covariance = torch.cov(seen.T, correction=0)
    wanted = (1.0 - prior.share) * covariance + prior.share * torch.diag(covariance.diagonal())
    assert float((prior.mean - seen.mean(0)).norm() / seen.mean(0).norm()) < 0.02
    assert float((root.T @ root - wanted).norm() / wanted.norm()) < 0.02  # the power law counts for four of 404 images


def test_without_public_images_it_is_the_power_law():
    prior = Gaussian.of(SHAPE, BASIS, None)
    spread = prior.spread.reshape(SHAPE)
    assert float(spread.square().sum() / SIZE) == pytest.approx(CONTRAST**2)
    assert float(spread[0, 0, 2] / spread[0, 0, 4]) == pytest.approx(math.sqrt(17 / 5))
    assert bool((spread[1:] < spread[0]).all())
    few = Gaussian.of(SHAPE, BASIS, drawn(2, correlated=False))
    assert bool((few.spread > 0).all())
    assert few.share == 1.0


def test_what_is_usual_is_seen_on_images_that_the_prior_was_not_fitted_to():
    """One image of five has three times the contrast: its w is as improbable as the Gaussian says, but not unusual."""
    even = drawn(800, correlated=True)
    uneven = even.clone()
    uneven[::5] = 0.5 + 3.0 * (uneven[::5] - 0.5)
    plain, mixed = (Gaussian.of(SHAPE, BASIS, images[:400]) for images in (even, uneven))
    assert 1.0 <= plain.usual < 1.5
    assert mixed.usual > 2.0
    half = Gaussian.of(SHAPE, BASIS, uneven[:200])  # halves are what it is measured with
    found = half._draws(BASIS.forward(2.0 * uneven[400:] - 1.0).flatten(1)).square().mean(1)
    assert 0.85 < float((found <= mixed.usual).double().mean()) < 0.95
    w = torch.randn(3, SIZE, generator=derive_generator(0, "draws"), dtype=torch.float64)
    torch.testing.assert_close(mixed._draws(mixed.coefficients(w)), w)
    assert Gaussian.of(SHAPE, BASIS, None).usual == 1.0


# ------------------------------------------------------------------------------------------------ the search
@dataclass(frozen=True)
class Linear(Equations):
    """y = M·u + constant + n."""

    matrix: Tensor | None = None
    constant: float = 0.0

    def simulated(self, u: Tensor, transformable: bool = True) -> Tensor:
        return self.matrix @ u + self.constant


def test_of_linear_equations_it_is_the_closed_form():
    sigma, generator = 0.3, derive_generator(0, "linear")
    matrix = torch.randn(300, SIZE, generator=generator, dtype=torch.float64) * torch.logspace(-2, 0, SIZE).double()
    prior = Gaussian.of(SHAPE, BASIS, drawn(100, correlated=True))
    truth = prior.coefficients(torch.randn(SIZE, generator=generator, dtype=torch.float64))
    observed = matrix @ truth + sigma * torch.randn(300, generator=generator, dtype=torch.float64)
    equations = Linear(None, BASIS, observed, 1e-12, matrix)
    end = Search(equations, (), prior, sigma, 100, silent).run(torch.zeros(1, SIZE, dtype=torch.float64))
    root = (prior.coefficients(torch.eye(SIZE, dtype=torch.float64)) - prior.mean).T  # u = mean + root·w
    left = (observed - matrix @ prior.mean) / sigma
    mapped = matrix @ root / sigma
    exact = torch.linalg.solve(mapped.T @ mapped + torch.eye(SIZE), mapped.T @ left)
    assert float((end.w[0] - exact).norm() / exact.norm()) < 1e-2
    assert float(exact.norm()) > 1.0
    assert end.explained


def test_a_copy_that_only_improbable_images_explain_is_taken_for_a_noisy_one(monkeypatch):
    """Its own error is no noise that could be read off: the images that it leads to must stay as probable as real ones."""
    generator = derive_generator(0, "linear")
    matrix = torch.randn(300, SIZE, generator=generator, dtype=torch.float64)
    prior = Gaussian.of(SHAPE, BASIS, drawn(100, correlated=True))
    truth = prior.coefficients(torch.randn(SIZE, generator=generator, dtype=torch.float64))
    equations = Linear(None, BASIS, matrix @ truth + 100.0, 1e-12, matrix, 100.0)
    far = prior.coefficients(1000.0 * torch.randn(SIZE, generator=generator, dtype=torch.float64))
    wrong = replace(equations, observed=matrix @ far + 100.0)
    heard: list[tuple[float, float]] = []
    descended = Search._descended

    def listening(search, which, begin, yardstick, share):
        found = descended(search, which, begin, yardstick, share)
        if which is wrong:
            heard.append((yardstick.sigma, float(found[0].square().mean())))
        return found

    monkeypatch.setattr(Search, "_descended", listening)
    end = Search(equations, (wrong,), prior, 1e-3, 100, silent).run(torch.zeros(1, SIZE, dtype=torch.float64))
    assert len(heard) > 1
    assert 1.0 < prior.usual < 2.0
    assert all(probable > prior.usual for _, probable in heard[:-1])
    assert heard[-1][1] <= prior.usual
    assert [b / a for (a, _), (b, _) in pairwise(heard)] == [2.0] * (len(heard) - 1)
    assert float((prior.coefficients(end.w[0]) - truth).norm() / truth.norm()) < 1e-2


def linear(copy_is_right: bool, constant: float = 100.0):
    """Equations, a copy of them, right or of other images, the prior and u."""
    generator = derive_generator(0, "linear")
    matrix = torch.randn(300, SIZE, generator=generator, dtype=torch.float64)
    prior = Gaussian.of(SHAPE, BASIS, drawn(100, correlated=True))
    truth, other = (prior.coefficients(torch.randn(SIZE, generator=generator, dtype=torch.float64)) for _ in range(2))
    equations = Linear(None, BASIS, matrix @ truth + constant, 1e-12, matrix, constant)
    copy = equations if copy_is_right else replace(equations, observed=matrix @ other + constant)
    return equations, replace(copy), prior, truth


def listen(monkeypatch) -> list[tuple[Equations, float, int]]:
    """Equations, sigma and stage of every descent."""
    heard: list[tuple[Equations, float, int]] = []
    descended = Search._descended

    def listening(search, which, begin, yardstick, share, *patience):
        heard.append((which, yardstick.sigma, search.stages))
        return descended(search, which, begin, yardstick, share, *patience)

    monkeypatch.setattr(Search, "_descended", listening)
    return heard


def in_order(heard, search: Search, before: int = 0) -> bool:
    """Whether stages never fell, stayed below what is planned for a search and were all told at its end."""
    stages = [stage - before for *_, stage in heard]
    return stages == sorted(stages) and stages[-1] < search._planned == search.stages - before


@pytest.mark.parametrize("sharp", [True, False])
@pytest.mark.parametrize("sigma", [1e-3, None])
def test_copies_of_a_smooth_model_end_where_one_came_near(sharp, sigma, monkeypatch):
    """Of a sharp one all are used: until the last it may lead elsewhere."""
    equations, copy, prior, truth = linear(copy_is_right=True)
    heard, copies = listen(monkeypatch), [copy, replace(copy), replace(copy)]
    search = Search(equations, copies, prior, sigma, 100, silent, sharp=sharp)
    end = search.run(torch.zeros(1, SIZE, dtype=torch.float64))
    assert float((prior.coefficients(end.w[0]) - truth).norm() / truth.norm()) < 1e-2
    assert [sum(which is one for which, *_ in heard) for one in copies] == ([1, 1, 1] if sharp else [1, 0, 0])
    assert heard[-1][0] is equations
    assert all(
        level <= heard[0][1] for which, level, _ in heard if which is equations
    )  # no levels from the loudest down
    assert in_order(heard, search)


@pytest.mark.parametrize("hidden", [False, True])
def test_levels_of_noise_lead_where_copies_of_a_smooth_model_do_not(hidden, monkeypatch):
    equations, wrong, prior, truth = linear(copy_is_right=False, constant=0.0)
    noise = torch.randn(300, generator=derive_generator(1, "noise"), dtype=torch.float64)
    rms = float(equations.observed.square().mean().sqrt())
    equations = replace(equations, observed=equations.observed + 0.1 * rms * noise)
    heard = listen(monkeypatch)
    search = Search(equations, [wrong], prior, None if hidden else 0.1 * rms, 100, silent, sharp=False)
    end = search.run(torch.zeros(1, SIZE, dtype=torch.float64))
    tried = [level for which, level, _ in heard if which is equations]
    assert search.levels[0] == max(tried) > 4.0 * rms
    assert search.levels[1] in tried
    assert float((prior.coefficients(end.w[0]) - truth).norm() / truth.norm()) < 0.2
    assert in_order(heard, search)
    assert len(end.costs) > len(tried)


@pytest.mark.parametrize(
    ("loudness", "soon", "direct"), [(0.5, True, []), (2.0, True, [0.25, 1.0]), (2.0, False, [0.25])]
)
def test_under_loud_noise_the_model_itself_is_descended_too(loudness, soon, direct, monkeypatch):
    """And given up soon where it does not explain the update."""
    equations, copy, prior, _ = linear(copy_is_right=True, constant=0.0)
    sigma = loudness * float(equations.observed.square().mean().sqrt())
    noise = torch.randn(300, generator=derive_generator(1, "noise"), dtype=torch.float64)
    equations = replace(equations, observed=equations.observed + sigma * noise)
    if not soon:
        monkeypatch.setattr(Search, "_explained", lambda *_: False)
    heard = listen(monkeypatch)
    search = Search(equations, [copy], prior, sigma, 100, silent)
    search.run(torch.zeros(1, SIZE, dtype=torch.float64))
    assert [level / sigma for which, level, _ in heard if which is equations] == [1.0, *direct]
    assert search.stages == search._planned


def slopes(monkeypatch, at: float) -> tuple[Search, list[End]]:
    """A search and two ends: for a unit of w the update rises by 1 at the first, by 100 at the other. at: the first's cost."""
    equations, _, prior, _ = linear(copy_is_right=True)
    monkeypatch.setattr(
        Search, "_simulated", lambda _, __, w: torch.where(w < 1.0, w, 1.0 + 100.0 * (w - 1.0)).flatten()
    )
    places = torch.zeros(1, SIZE, dtype=torch.float64), torch.full((1, SIZE), 2.0, dtype=torch.float64)
    ends = [End(w, [cost], cost, 1.0, 300.0, 300, True) for w, cost in zip(places, (at, 0.0), strict=True)]
    return Search(equations, (), prior, 1.0, 1, silent), ends


def test_of_ends_that_explain_the_update_the_roomier_one_is_taken(monkeypatch):
    """Its log determinant is lower by log(10,001 / 2) for every unknown."""
    room = SIZE * math.log(10_001 / 2)
    for at, better in ((room - 1.0, 0), (room + 1.0, 1)):
        search, ends = slopes(monkeypatch, at)
        assert search._best(ends) is ends[better]
        assert search._improbability(ends[0]) == pytest.approx(at + SIZE * math.log(2.0))


def test_room_is_no_matter_for_what_does_not_explain_or_is_the_same(monkeypatch):
    search, ends = slopes(monkeypatch, 10.0)
    assert search._best(ends) is ends[0]
    assert search._best([replace(ends[0], explained=False), ends[1]]) is ends[1]
    assert search._best([replace(end, explained=False) for end in ends]).w is ends[1].w
    assert search._best([ends[0], replace(ends[1], w=ends[0].w + 0.05)]) is not ends[0]


@pytest.mark.parametrize("count", [1, 2, 4])
def test_images_that_are_drawn_begin_with_narrower_copies(count, monkeypatch):
    equations, copy, prior, _ = linear(copy_is_right=True)
    heard, copies = listen(monkeypatch), [replace(copy) for _ in range(count)]
    search = Search(equations, copies, prior, 1e-3, 20, silent, runs=2)
    for size, first in ((0.0, 0), (1.0, min(2, count - 1))):
        before = search.stages
        heard.clear()
        search.run(torch.full((1, SIZE), size, dtype=torch.float64))
        assert heard[0][0] is copies[first]
        assert in_order(heard, search, before)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("size", [1e-25, 1e-18, 1.0, 1e15])
def test_a_direction_has_finite_slopes_however_small_the_update(sign, size):
    observed = torch.randn(100, generator=derive_generator(0, "observed"))
    simulated = (sign * size * (observed + 0.1)).requires_grad_()
    (slope,) = torch.autograd.grad(Yardstick(observed, 1.0, free=True).off(simulated), simulated)
    assert bool(slope.isfinite().all())


def test_an_update_of_zeros_has_a_finite_slope():
    zeros = torch.zeros(3, requires_grad=True)
    (slope,) = torch.autograd.grad(Yardstick(torch.ones(3), 1.0, free=True).off(0.0 * zeros), zeros)
    assert bool(slope.isfinite().all())


@pytest.mark.parametrize("level", [0.03, 0.045, 0.065, 0.095])
def test_noise_that_is_read_off_the_residuals_is_as_good_as_known(level):
    """Wherever it falls between the levels that are tried on the way."""
    generator = derive_generator(0, "linear")
    matrix = torch.randn(400, SIZE, generator=generator, dtype=torch.float64)
    prior = Gaussian.of(SHAPE, BASIS, drawn(100, correlated=False))
    truth = prior.coefficients(torch.randn(SIZE, generator=generator, dtype=torch.float64))
    clean = matrix @ truth + 5.0
    sigma = level * float(clean.square().mean().sqrt())
    observed = clean + sigma * torch.randn(400, generator=generator, dtype=torch.float64)
    equations = Linear(None, BASIS, observed, 1e-12, matrix, 5.0)
    begin = torch.zeros(1, SIZE, dtype=torch.float64)
    known, hidden = (Search(equations, (), prior, told, 100, silent).run(begin) for told in (sigma, None))
    errors = [float((prior.coefficients(end.w[0]) - truth).norm()) for end in (known, hidden)]
    assert errors[1] < 1.05 * errors[0]
    assert hidden.sigma == pytest.approx(sigma, rel=0.25)


def test_images_that_are_drawn_lead_to_ends_of_their_own(monkeypatch):
    """With the loudest noise all would begin at the same most probable images."""
    generator = derive_generator(0, "linear")
    matrix = torch.randn(300, SIZE, generator=generator, dtype=torch.float64)
    prior = Gaussian.of(SHAPE, BASIS, drawn(100, correlated=True))
    observed = matrix @ prior.coefficients(torch.randn(SIZE, generator=generator, dtype=torch.float64))
    rms = float(observed.square().mean().sqrt())
    search = Search(Linear(None, BASIS, observed, 1e-12, matrix), (), prior, 0.1 * rms, 5, silent, runs=2)
    heard: list[list[float]] = []
    descended = Search._descended

    def listening(search, which, begin, yardstick, share):
        heard[-1].append(yardstick.sigma / rms)
        return descended(search, which, begin, yardstick, share)

    monkeypatch.setattr(Search, "_descended", listening)
    for begin in (torch.zeros(1, SIZE), torch.randn(1, SIZE, generator=generator)):
        heard.append([])
        search.run(begin.double())
    assert heard[0][0] > 4.0
    assert 0.25 < heard[1][0] <= 1.0


def test_on_the_way_only_the_direction_of_an_update_is_matched():
    observed = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    known, free = Yardstick(observed, 0.5), Yardstick(observed, 0.5, free=True)
    aside = torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64)
    assert float(known.off(7.0 * observed)) == pytest.approx(4.0 * 36.0 * float(observed.square().sum()))
    assert float(free.off(7.0 * observed)) < 1e-20
    assert float(free.off(7.0 * (observed + 0.1 * aside))) == pytest.approx(float(free.off(observed + 0.1 * aside)))
    assert float(free.off(-7.0 * observed)) == pytest.approx(8.0 * float(observed.square().sum()))
    assert float(free.off(aside)) == pytest.approx(4.0 * float(observed.square().sum()))
    assert float(free.off(torch.zeros(3, dtype=torch.float64))) == pytest.approx(4.0 * float(observed.square().sum()))


# ------------------------------------------------------------------------------------------------ the images
@pytest.mark.parametrize("case", [SMOOTH, SHARP], ids=["smooth", "relu"])
def test_under_noise_it_beats_total_variation_and_says_that_the_noise_is_explained(patches, case):
    image = patches.private.images([3]).double()
    model, update, knowledge, sigma = noisy(case, image, 0.3)
    knowledge = replace(knowledge, public_images=patches.public.images())
    found = attack(model, update, knowledge)
    generator = derive_generator(0, "attack")
    others = [
        InvertingGradients(iterations=200, learning_rate=0.05, tv_weight=weight, start="grey").reconstruct(
            update, model, Classification(), knowledge, generator=generator
        )
        for weight in (0.003, 0.03, 0.3)
    ]
    assert float(psnr_db(found.images, image)) > max(float(psnr_db(o.images, image)) for o in others) + 1.0
    assert found.diagnostics["noise_std"] == pytest.approx(sigma)
    assert 0.8 < found.diagnostics["chi_square"] < 1.1


def test_public_images_help():
    image, public = drawn(1, correlated=True, seed=5).clamp(0.0, 1.0), drawn(100, correlated=True)
    model, update, knowledge, _ = noisy(SMOOTH, image, 1.0)
    told, alone = (attack(model, update, replace(knowledge, public_images=known)) for known in (public, None))
    assert float(psnr_db(told.images, image)) > float(psnr_db(alone.images, image)) + 1.0


@pytest.mark.parametrize("level", [0.03, 0.3])
def test_a_hidden_noise_level_is_read_off_the_residuals(patches, level):
    model, update, knowledge, sigma = noisy(SMOOTH, patches.private.images([3]).double(), level)
    found = attack(model, update, replace(knowledge, defense=None, public_images=patches.public.images()))
    assert found.diagnostics["noise_std"] == pytest.approx(sigma, rel=0.12)


def test_what_is_left_over_says_nothing_where_the_noise_is_hidden(patches):
    """A search that is lost takes what it leaves for noise: no chi-square, and all starts are made."""
    model, update, knowledge, sigma = noisy(SHARP, patches.private.images([3]).double(), 0.1)
    found = attack(model, update, replace(knowledge, defense=None), smoothing_steps=0, iterations=1, restarts=2)
    assert found.diagnostics["noise_std"] > 1.3 * sigma
    assert "chi_square" not in found.diagnostics
    assert found.diagnostics["starts"] == 2.0


@pytest.mark.parametrize("steps", [1, 16])
def test_the_rounding_of_weights_is_noise(patches, steps):
    """A difference of two weights that were rounded, at every local step, says less than its own size promises."""
    image, rate = patches.private.images([3]), 0.001
    model, client = SMOOTH.build_model(1), SMOOTH.build_model(1)
    optimizer = torch.optim.SGD(client.parameters(), rate)
    for _ in range(steps):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(client(image), torch.tensor([0])).backward()
        optimizer.step()
    sent, received = (
        {name: tensor.detach().clone() for name, tensor in net.state_dict().items()} for net in (model, client)
    )
    update = Update(round=1, client="0", sent=sent, received=received, kind="weights", num_examples=1)
    knowledge = Knowledge(
        image_shape=SHAPE,
        batch_size=1,
        num_classes=4,
        labels=torch.tensor([0]),
        learning_rate=rate,
        local_steps=steps,
        defense="none",
        public_images=patches.public.images(),
    )
    found = attack(model, update, knowledge, restarts=3)
    assert 0.2 < found.diagnostics["chi_square"] < 2.0
    assert found.diagnostics["starts"] == 1.0


@pytest.mark.parametrize("case", [SMOOTH, SHARP], ids=["smooth", "relu"])
def test_images_of_equal_labels_part(patches, case):
    images, labels = patches.private.images([3, 8]).double(), torch.tensor([1, 1])
    model = case.build_model(1).double()
    update = update_from(model, images, labels, dtype=torch.float64)
    knowledge = Knowledge(
        image_shape=SHAPE, batch_size=2, num_classes=4, labels=labels, public_images=patches.public.images()
    )
    found = attack(model, update, knowledge, sigma=1e-4)
    order = match_batch(found.images, images.float())
    assert float(psnr_db(found.images[order].double(), images).min()) > 15.0
    assert float((found.images[0] - found.images[1]).abs().max()) > 0.1


def test_a_batch_comes_back_in_the_order_of_its_labels(patches):
    images = patches.private.images([3, 8]).double()
    model, update, knowledge, _ = noisy(SMOOTH, images, 0.01)
    found = attack(model, update, replace(knowledge, public_images=patches.public.images()))
    assert float(psnr_db(found.images, images).min()) > 25.0
    assert torch.equal(found.labels, torch.arange(2))


def test_a_clean_update_is_matched_to_its_precision(patches):
    image = patches.private.images([3])
    model, update, knowledge, _ = noisy(SMOOTH, image, 0.0, torch.float32)
    found = attack(model, update, replace(knowledge, public_images=patches.public.images()))
    assert float(psnr_db(found.images, image)) > 60.0


@pytest.mark.parametrize(
    ("defense", "sigma", "noise"),
    [
        (None, None, 3e-5),
        ("none", None, 3e-5),
        ("none", 0.0, 0.0),
        ("gaussian-noise(sigma=1e-6, relative=True)", None, 1e-6),
    ],
)
def test_noise_that_nobody_told_of_is_not_taken_for_rounding(patches, defense, sigma, noise):
    """A clean update is matched to a small share of its size, unless sigma or a known defense says how far."""
    image = patches.private.images([3]).double()
    model, update, knowledge, _ = noisy(SMOOTH, image, 0.0)
    rms = float(torch.cat([t.reshape(-1) for t in update.received.values()]).square().mean().sqrt())
    knowledge = replace(knowledge, defense=defense, public_images=patches.public.images())
    found = attack(model, update, knowledge, sigma=sigma, iterations=30 if defense is None else 1)
    assert found.diagnostics["noise_std"] == pytest.approx(noise * rms, rel=1e-3, abs=1e-10 * rms)


@pytest.mark.parametrize("hidden", [False, True])
def test_a_model_with_gelus_is_inverted_whether_its_noise_is_known_or_not(patches, hidden):
    image = patches.private.images([3]).double()
    model, update, knowledge, sigma = noisy(CURVED, image, 0.3)
    knowledge = replace(knowledge, public_images=patches.public.images())
    found = attack(model, update, replace(knowledge, defense=None) if hidden else knowledge)
    assert found.diagnostics["noise_std"] == pytest.approx(sigma, rel=0.1)
    mean = patches.public.images().mean(0, keepdim=True).double()
    assert float(psnr_db(found.images, image)) > float(psnr_db(mean, image)) + 3.0


def test_smoothed_copies_lead_through_kinks(patches):
    image = patches.private.images([3]).double()
    model, update, knowledge, _ = noisy(SHARP, image, 0.1)
    knowledge = replace(knowledge, public_images=patches.public.images())
    led, alone = (attack(model, update, knowledge, smoothing_steps=steps) for steps in (7, 0))
    assert led.diagnostics["chi_square"] < 1.1 < alone.diagnostics["chi_square"]
    assert float(psnr_db(led.images, image)) > float(psnr_db(alone.images, image)) + 3.0


def test_more_starts_are_made_until_one_explains_the_update(patches):
    image = patches.private.images([3]).double()
    model, update, knowledge, _ = noisy(SHARP, image, 0.1)
    lost = attack(model, update, knowledge, smoothing_steps=0, iterations=1, restarts=3)
    assert lost.diagnostics["starts"] == 3.0
    assert attack(model, update, knowledge, restarts=3).diagnostics["starts"] == 1.0


@pytest.mark.parametrize("case", [SMOOTH, CURVED, SHARP], ids=["sigmoid", "gelu", "relu"])
def test_progress_never_goes_back_nor_past_its_end(patches, case):
    model, update, knowledge, _ = noisy(case, patches.private.images([3]).double(), 0.1)
    told: list[tuple[int, int]] = []
    attack(model, update, replace(knowledge, defense=None), lambda *now: told.append(now[:2]), restarts=2)
    done = [step for step, _ in told]
    assert done == sorted(done)
    assert len({total for _, total in told}) == 1
    assert 0 < done[-1] <= told[0][1]


def test_wrong_options_are_refused():
    for settings in ({"iterations": 0}, {"restarts": 1.5}, {"smoothing_steps": -1}, {"smoothing_steps": True}):
        with pytest.raises(FedattackError, match=f"{next(iter(settings))} must be a whole number of at least"):
            GaussianMAP(**settings)
    with pytest.raises(FedattackError, match="sigma must be zero or positive"):
        GaussianMAP(sigma=-1.0)
    with pytest.raises(FedattackError, match="precision must be one of"):
        GaussianMAP(precision="float16")


def test_a_residual_network_with_relus_is_inverted_under_noise(patches):
    image = patches.private.images([3]).double()
    case = replace(SHARP, name="resnet", model="resnet18", options={"width": 4}, mode="eval")
    model, update, knowledge, _ = noisy(case, image, 0.1)
    knowledge = replace(knowledge, public_images=patches.public.images())
    led, alone = (attack(model, update, knowledge, smoothing_steps=steps) for steps in (7, 0))
    assert float(psnr_db(led.images, image)) > float(psnr_db(alone.images, image)) + 3.0


@pytest.mark.parametrize("number", [3, 4])
def test_a_trained_model_that_is_sure_of_its_answer_is_inverted(patches, number, monkeypatch):
    """At the mean public image its update is many times the client's: with its size matched the search stands still."""
    case = replace(SMOOTH, name="convnet", model="convnet-small", options={"activation": "gelu"})
    model = case.build_model(1).double()
    images, labels = patches.private.images(list(range(10))).double(), torch.arange(10) % 4
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(100):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    image, label = images[[number]], labels[[number]]
    with torch.no_grad():
        assert float(model(image).softmax(-1)[0, label]) > 0.99
    update = update_from(model, image, label, dtype=torch.float64)
    sigma = 0.1 * float(torch.cat([t.reshape(-1) for t in update.received.values()]).square().mean().sqrt())
    knowledge = Knowledge(
        image_shape=SHAPE, batch_size=1, num_classes=4, labels=label, public_images=patches.public.images()
    )
    free = attack(model, update, knowledge, sigma=sigma)
    monkeypatch.setattr(Search, "_free", staticmethod(lambda which, level: Yardstick(which.observed, level)))
    sized = attack(model, update, knowledge, sigma=sigma)
    assert float(psnr_db(free.images, image)) > float(psnr_db(sized.images, image)) + 4.0

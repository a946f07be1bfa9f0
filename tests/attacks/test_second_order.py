"""Least squares with known answers, and exact inversions: pixels alone, and pixels with the noise projected out."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from attacks import certificates, least_squares, second_order
from attacks.conjugate_gradients import Damped, conjugate_gradients
from attacks.equations import Equations
from attacks.least_squares import (
    Dense,
    End,
    Latest,
    MatrixFree,
    Projected,
    ProjectedFree,
    Recycled,
    levenberg_marquardt,
)
from attacks.matching import pose
from attacks.preconditioners import LEAST, Formed, Nystrom, plain
from attacks.second_order import SecondOrder
from attacks.second_order_search import Case, Descent, View, nearest_first, searched
from fedattack.errors import FedattackError, NotApplicable
from fedattack.jacobians import Linearised, by_rows, jacobian_transposed
from fedattack.metrics import match_batch, psnr_db
from fedattack.models import build_model
from fedattack.seeding import derive_generator, seeded_default_generator
from fedattack.tasks import Classification, Diffusion, simulate_gradient
from fedattack.types import Knowledge, Update


def generator(*names: object) -> torch.Generator:
    return derive_generator(0, "second-order", *names)


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# ------------------------------------------------------------------------------------------------ least squares
def rosenbrock(x: Tensor) -> Tensor:
    return torch.stack([10.0 * (x[1] - x[0].square()), 1.0 - x[0]])


def exponentials(x: Tensor) -> Tensor:
    """Ten equations in two rates, zero at (0.7, 2)."""
    t = torch.linspace(0.1, 2.0, 10, dtype=torch.float64)
    return torch.exp(-x[0] * t) - torch.exp(-x[1] * t) - (torch.exp(-0.7 * t) - torch.exp(-2.0 * t))


@pytest.mark.parametrize("kind", ["dense", "matrix-free", "recycled"])
@pytest.mark.parametrize(
    ("function", "start", "answer"),
    [(rosenbrock, (-1.2, 1.0), (1.0, 1.0)), (exponentials, (0.3, 1.0), (0.7, 2.0))],
    ids=["rosenbrock", "exponentials"],
)
def test_known_minima(kind, function, start, answer):
    formed = Formed()

    def at(x: Tensor) -> Dense | MatrixFree | Recycled:
        if kind == "recycled":
            return Recycled.at(function, lambda x: function(x.double()).to(x), x, 1, formed)
        return Dense.at(function, x, 1) if kind == "dense" else MatrixFree.at(function, x, 50)

    told: list[tuple[int, float]] = []
    solution = levenberg_marquardt(
        at, double(*start), iterations=80, tolerance=1e-24, told=lambda *call: told.append(call)
    )
    torch.testing.assert_close(solution.x, double(*answer), rtol=1e-8, atol=1e-8)
    assert solution.reason == "tolerance"
    assert list(solution.costs) == sorted(solution.costs, reverse=True)
    assert [call[0] for call in told] == list(range(1, len(told) + 1))


def test_a_linear_problem_is_solved_as_lstsq_solves_it():
    matrix = torch.randn(9, 4, generator=generator("linear"), dtype=torch.float64)
    wanted = torch.randn(9, generator=generator("wanted"), dtype=torch.float64)
    solution = levenberg_marquardt(
        lambda x: Dense.at(lambda y: matrix @ y - wanted, x, 3), torch.zeros(4).double(), iterations=60, tolerance=0.0
    )
    exact = torch.linalg.lstsq(matrix, wanted[:, None]).solution[:, 0]
    torch.testing.assert_close(solution.x, exact, rtol=1e-7, atol=1e-7)
    assert solution.reason == "settled"


def test_damped_steps_agree():
    """Dense and matrix-free solve (JᵀJ + μ)·d = −Jᵀρ, checked against the augmented system."""
    x, mu = double(0.3, 1.0), 0.05
    jacobian = torch.autograd.functional.jacobian(exponentials, x)
    augmented = torch.cat([jacobian, math.sqrt(mu) * torch.eye(2, dtype=torch.float64)])
    right = torch.cat([-exponentials(x), torch.zeros(2, dtype=torch.float64)])
    exact = torch.linalg.lstsq(augmented, right[:, None]).solution[:, 0]
    for linear in (Dense.at(exponentials, x, 2).linear(), MatrixFree.at(exponentials, x, 50).linear()):
        if not isinstance(linear, type(Dense.at(exponentials, x, 2).linear())):
            linear = replace(linear, precision=1e-12)
        step = linear.solve(mu)
        torch.testing.assert_close(step, exact, rtol=1e-9, atol=1e-12)
        assert linear.predicted(step) == pytest.approx(float((exponentials(x) + jacobian @ step).square().sum()))
    torch.testing.assert_close(jacobian_transposed(exponentials, x, 1), jacobian.T)


def test_conjugate_gradients_see_the_extreme_singular_values():
    matrix = torch.randn(9, 4, generator=generator("extremes"), dtype=torch.float64)
    wanted = torch.randn(9, generator=generator("wanted"), dtype=torch.float64)
    linear = MatrixFree.at(lambda x: matrix @ x - wanted, torch.zeros(4).double(), 50).linear()
    replace(linear, precision=1e-12).solve(1e-3)
    assert linear.extremes == (0.0, 0.0), "nothing is known before the first solve"
    whole = replace(linear, precision=1e-12)
    whole.solve(1e-3)
    values = torch.linalg.svdvals(matrix)
    assert whole.extremes == pytest.approx((float(values[0]), float(values[-1])), rel=1e-6)
    short = replace(linear, inner=2)
    short.solve(1e-3)
    assert values[-1] < short.extremes[1] < short.extremes[0] < values[0]


def test_a_search_ends_where_a_step_promises_too_little():
    """x³ = 8 and x = 2, from 10: Newton's way down to steps that gain almost nothing."""

    def at(x):
        return Dense.at(lambda x: torch.cat([x**3 - 8.0, x - 2.0]), x, 8)

    start = torch.tensor([10.0], dtype=torch.float64)
    whole = levenberg_marquardt(at, start, iterations=60, tolerance=0.0)
    short = levenberg_marquardt(at, start, iterations=60, tolerance=0.0, significant=1.0)
    assert short.reason == "settled"
    assert len(short.costs) < len(whole.costs)
    assert float(whole.costs[-1]) < 1e-12 < float(short.costs[-1]) < 1.0


def test_a_box_is_kept():
    solution = levenberg_marquardt(
        lambda x: Dense.at(rosenbrock, x, 2),
        double(0.0, 0.2),
        iterations=60,
        tolerance=1e-24,
        box=(double(0.0, 0.0), double(0.8, 0.8)),
    )
    assert float(solution.x.max()) <= 0.8
    assert solution.costs[-1] < solution.costs[0]


def test_a_function_that_is_not_finite_ends_the_search():
    solution = levenberg_marquardt(
        lambda x: Dense.at(lambda y: y / 0.0, x, 1), double(1.0), iterations=5, tolerance=0.0
    )
    assert solution.reason == "not finite"


def test_what_vmap_cannot_do_is_done_one_by_one():
    def stubborn(row: Tensor) -> Tensor:
        return row * float(row.sum())  # .item() is refused under vmap

    torch.testing.assert_close(by_rows(stubborn, 3, 2, double(1.0)), torch.eye(3, dtype=torch.float64))


def test_variable_projection_fits_amplitudes_for_free():
    """Σ y_k·exp(−x_k·t): rates are searched, amplitudes projected out."""
    t = torch.linspace(0.0, 4.0, 30, dtype=torch.float64)

    def product(x: Tensor, y: Tensor) -> Tensor:
        return torch.exp(-x[:, None] * t).T @ y

    rates, amplitudes = double(0.5, 2.0), double(3.0, 1.0)
    wanted = product(rates, amplitudes)
    solution = levenberg_marquardt(
        lambda x: Projected.at(lambda z: torch.exp(-z[:, None] * t), lambda z, y: product(z, y) - wanted, x, 2),
        double(0.3, 1.5),
        iterations=60,
        tolerance=1e-26,
    )
    torch.testing.assert_close(solution.x, rates, rtol=1e-6, atol=1e-6)
    assert isinstance(solution.point, Projected)
    torch.testing.assert_close(solution.point.linear_unknowns, amplitudes, rtol=1e-6, atol=1e-6)
    assert solution.point.linear_rank == 2


def test_projection_with_a_right_side_that_moves():
    """ρ = (A·y − b, λ·(x − y)): the part of ρ that depends on x alone is projected too; the joint minimum is the same."""
    a, wanted, weight = double(1.0, 2.0, 3.0), double(1.0, 2.5, 2.0), 0.5

    def function(x: Tensor, y: Tensor) -> Tensor:
        return torch.cat([a * y * torch.exp(-x) - wanted, weight * (x - y)])

    def matrix(x: Tensor) -> Tensor:
        return torch.cat([a * torch.exp(-x), -weight * torch.ones(1, dtype=x.dtype)])[None]

    solution = levenberg_marquardt(
        lambda x: Projected.at(matrix, function, x, 1), double(2.0), iterations=60, tolerance=0.0
    )
    joint = levenberg_marquardt(
        lambda z: Dense.at(lambda z: function(z[:1], z[1:]), z, 2), double(2.0, 1.0), iterations=200, tolerance=0.0
    )
    assert isinstance(solution.point, Projected)
    both = torch.cat([solution.x, solution.point.linear_unknowns])
    torch.testing.assert_close(both, joint.x, rtol=5e-3, atol=5e-3)


def _stretched(x: Tensor) -> Tensor:
    """400 equations in 40 unknowns, zero at x = 0.1: a condition number of 1e3, and bent."""
    mixing = torch.randn(400, 40, generator=generator("bent"), dtype=torch.float64).to(x)
    bent = x + 0.5 * x.square() - 0.105
    return mixing @ (torch.logspace(0, -3, 40, dtype=torch.float64).to(x) * bent)


def test_a_jacobian_formed_once_serves_the_points_around():
    """Steps are those of the whole Jacobian, although it was formed elsewhere, in float32, from sums of the equations."""
    sums = torch.randn(120, 400, generator=generator("sums"), dtype=torch.float64)
    x, formed = torch.full((40,), 0.3, dtype=torch.float64), Formed()
    Recycled.at(_stretched, lambda x: sums.to(x) @ _stretched(x), x + 0.02, 8, formed).form()
    (gram,) = formed.grams
    linear = Recycled.at(_stretched, lambda x: sums.to(x) @ _stretched(x), x, 8, formed).linear()
    exact = Dense.at(_stretched, x, 8).linear()
    assert formed.grams[0] is gram
    for damping in (1e-2, 1e-4):
        step, best = linear.solve(damping), exact.solve(damping)
        assert step is not None
        assert best is not None
        off = linear.predicted(step) + damping * float(step.square().sum())
        least = exact.predicted(best) + damping * float(best.square().sum())
        start = float(linear.local.value.square().sum())
        assert off - least < 1e-3 * (start - least)
        torch.testing.assert_close(linear.predicted(step), exact.predicted(step))
    assert formed.grams[0] is gram
    assert 0 < formed.spent < LEAST


def _two_images(x: Tensor) -> Tensor:
    """Two images of 20 unknowns each, whose equations are the same sums: a condition number of 1e3, mostly within each."""
    mixing = torch.randn(400, 40, generator=generator("two"), dtype=torch.float64).to(x)
    bent = x + 0.5 * x.square() - 0.105
    return mixing @ (torch.logspace(0, -3, 20, dtype=torch.float64).to(x).repeat(2) * bent)


def test_blocks_of_a_jacobian_do_for_a_batch():
    """Steps are those of the whole Jacobian, of which only each image's own block was formed, and from few products."""
    x, groups = torch.full((40,), 0.3, dtype=torch.float64), list(torch.arange(40).reshape(2, 20))
    formed, exact = Formed(groups), Dense.at(_two_images, x, 8).linear()
    linear = Recycled.at(_two_images, _two_images, x, 8, formed).linear()
    assert [len(gram) for gram in formed.grams] == [20, 20]
    for number, gram in enumerate(formed.grams):
        ours = groups[number]
        torch.testing.assert_close(gram, exact.gram[ours][:, ours], rtol=1e-4, atol=1e-4)
    assert linear.scale == pytest.approx(exact.scale, rel=1e-4)
    plain, best = MatrixFree.at(_two_images, x, 1000).linear(), exact.solve(1e-6)
    products = {}
    for kind, one in (("blocks", linear), ("plain", replace(plain, precision=1e-4))):
        done: list[int] = []
        local = replace(
            one.local, times=lambda vector, done=done, times=one.local.times: (done.append(1), times(vector))[1]
        )
        step = replace(one, local=local).solve(1e-6)
        off = exact.predicted(step) - exact.predicted(best)
        assert off < 1e-3 * float(linear.local.value.square().sum())
        products[kind] = len(done)
    assert products["blocks"] < 0.5 * products["plain"]
    spectra = linear.spectra()
    assert [spectrum.rank for spectrum in spectra] == [20, 20]
    for ours, spectrum in zip(groups, spectra, strict=True):
        values = torch.linalg.svdvals(exact.transposed[ours])
        torch.testing.assert_close(spectrum.values, values, rtol=1e-3, atol=1e-6)
    assert linear.spectrum() is None, "the blocks do not tell the rank of the whole"


def test_a_block_of_zeros_is_no_hindrance():
    """An image that the update does not depend on stays where it is."""
    x, groups = torch.full((40,), 0.3, dtype=torch.float64), list(torch.arange(40).reshape(2, 20))

    def blind(x: Tensor) -> Tensor:
        return _two_images(torch.cat([x[:20], torch.full_like(x[20:], 0.1)]))

    linear = Recycled.at(blind, blind, x, 8, Formed(groups)).linear()
    step = linear.solve(1e-3)
    assert float(step[20:].abs().max()) == 0.0
    assert float(step[:20].abs().max()) > 0.01
    assert [spectrum.rank for spectrum in linear.spectra()] == [20, 0]


def test_unknowns_of_one_image_are_one_group():
    """Of every unknown of a pixel, where one lies behind the whole batch of the other."""
    attack = SecondOrder(dense_limit=12)
    assert attack.groups((1, 3, 2, 2)) == attack.groups((2, 3, 2, 1)) == []
    assert attack.groups((1, 3, 4, 4)) is None
    assert attack.groups((2, 3, 4, 4)) is None
    groups = attack.groups((3, 3, 2, 2), copies=2)
    assert sorted(torch.cat(groups).tolist()) == list(range(72))
    place = torch.stack([torch.full((3, 3, 2, 2), float(i)) + torch.arange(3).reshape(3, 1, 1, 1) for i in (10, 20)])
    for number, group in enumerate(groups):
        assert set(place.flatten()[group].tolist()) == {10.0 + number, 20.0 + number}


def test_a_sketch_sees_the_largest_eigenvalues_and_saves_products(monkeypatch):
    monkeypatch.setattr("attacks.preconditioners.RANK", 60)
    values = torch.logspace(0, -4, 200, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(300, 200, generator=generator("turn"), dtype=torch.float64))[0]
    back = torch.linalg.qr(torch.randn(200, 200, generator=generator("back"), dtype=torch.float64))[0]
    matrix, x = (turn * values) @ back.T, torch.zeros(200, dtype=torch.float64)
    wanted = matrix @ torch.randn(200, generator=generator("wanted"), dtype=torch.float64)
    done: list[int] = []
    local = Linearised.at(lambda x: matrix @ x - wanted, x)
    local = replace(local, times=lambda vector, times=local.times: (done.append(1), times(vector))[1])
    sketch = Nystrom(generator("sketch"))
    vector = torch.randn(200, generator=generator("vector"), dtype=torch.float64)
    assert sketch.inverse(1e-3)(vector) is vector
    sketch.form(local, x)
    assert len(done) == 60
    torch.testing.assert_close(sketch.values[:5], values[:5].square(), rtol=0.1, atol=0.0)
    assert bool((sketch.values <= values[:60].square() * (1.0 + 1e-9)).all()), "never too large (Loewner order)"
    inverse, steps = sketch.inverse(1e-6), {}
    assert float(vector @ inverse(vector)) > 0.0
    exact = torch.linalg.solve(matrix.T @ matrix + 1e-6 * torch.eye(200, dtype=torch.float64), matrix.T @ wanted)
    for kind, how in (("plain", plain), ("sketch", inverse)):
        gradient = local.back(local.value)
        found = Damped.of(local, gradient, 1e-6, 1000, 1e-8 * float(gradient @ how(gradient)), how)
        steps[kind] = len(found.lengths)
        assert found.finished
        assert float((matrix @ (found.step - exact)).norm()) < 1e-2 * float((matrix @ exact).norm())
    assert steps["sketch"] < 0.6 * steps["plain"]


def test_a_sketch_is_made_where_the_search_has_taken_long(monkeypatch):
    """Twice as many products as it costs: then every point that follows is preconditioned by it."""
    for module in ("preconditioners", "least_squares"):
        monkeypatch.setattr(f"attacks.{module}.RANK", 10)
    x, sketch = torch.full((40,), 0.3, dtype=torch.float64), Nystrom(generator("made"))
    places = []
    form = Nystrom.form
    monkeypatch.setattr(Nystrom, "form", lambda sketch, local, x: (places.append(x), form(sketch, local, x))[1])
    point = MatrixFree.at(_stretched, x, 500, sketch)
    linear, best = replace(point.linear(), precision=1e-6), Dense.at(_stretched, x, 8).linear()
    step = linear.solve(1e-5)
    assert [place is x for place in places] == [True]
    assert best.predicted(step) - best.predicted(best.solve(1e-5)) < 1e-6 * float(point.residual.square().sum())
    assert linear.extremes[0] > linear.extremes[1] > 0.0
    sketch.spent = 0
    again = replace(MatrixFree.at(_stretched, x + 1e-3, 500, sketch).linear(), precision=1e-2)
    assert again.solve(1e-2) is not None
    assert 0 < sketch.spent < 20
    assert len(places) == 1, "it serves the points around"
    assert again.extremes == linear.extremes, "what is preconditioned tells nothing of J's own"


@pytest.mark.parametrize("kind", ["dense", "recycled"])
def test_a_search_may_look_long_for_its_damping(kind):
    """A dozen steps are refused before the first is taken, from a damping far too small for so bent a valley."""

    def steep(x: Tensor) -> Tensor:
        return torch.stack([torch.exp(20.0 * x[0]) - 1.0, x[0] - 1e4 * x[1]])

    formed = Formed()

    def at(x: Tensor) -> Dense | Recycled:
        return Dense.at(steep, x, 1) if kind == "dense" else Recycled.at(steep, steep, x, 1, formed)

    solution = levenberg_marquardt(at, double(-0.3, 1e-4), iterations=60, tolerance=1e-20, damping=1e-30)
    refused = solution.costs.count(solution.costs[0]) - 1
    assert least_squares.PATIENCE < refused < 2 * least_squares.PATIENCE
    assert solution.reason == "tolerance"


def test_a_jacobian_is_formed_anew_where_the_last_one_does_not_help(monkeypatch):
    formations = []
    form = Recycled.form
    monkeypatch.setattr(Recycled, "form", lambda point: (formations.append(point.x), form(point))[1])
    x, formed = torch.full((40,), 0.3, dtype=torch.float64), Formed()
    formed.grams, formed.spent = (torch.eye(40, dtype=torch.float64),), LEAST - 2
    point = Recycled.at(_stretched, _stretched, x, 8, formed)
    step, best = point.linear().solve(1e-8), Dense.at(_stretched, x, 8).linear().solve(1e-8)
    assert [float((at - x).norm()) for at in formations] == [0.0]
    torch.testing.assert_close(step, best, rtol=1e-2, atol=1e-3)
    assert formed.spent <= 3
    for _ in range(3):  # nor again where it was formed, whatever the damping
        formed.spent = 10 * LEAST
        assert point.linear().solve(1e-9) is not None
    assert len(formations) == 1


@pytest.mark.parametrize("scale", [1e-60, 1e60])
def test_a_jacobian_that_float32_cannot_hold_is_formed_in_float64(scale):
    def function(x: Tensor) -> Tensor:
        return scale * rosenbrock(x)

    formed = Formed()
    solution = levenberg_marquardt(
        lambda x: Recycled.at(function, function, x, 1, formed),
        double(-1.2, 1.0),
        iterations=80,
        tolerance=1e-24 * scale**2,
    )
    torch.testing.assert_close(solution.x, double(1.0, 1.0))


def test_where_no_jacobian_is_finite_there_is_none():
    broken = Formed()
    broken.form(lambda x: x / 0.0 * 0.0, double(1.0, 2.0), 1)
    assert not broken.grams
    assert broken.inverse(1.0) is None
    blocks = Formed([torch.tensor([0]), torch.tensor([1])])
    blocks.form(lambda x: x / 0.0 * 0.0, double(1.0, 2.0), 1)
    assert blocks.inverse(1.0) is None


def test_a_singular_system_of_linear_unknowns_is_solved_all_the_same():
    """Two amplitudes of the same exponential: their sum is determined, they are not."""
    t = torch.linspace(0.0, 2.0, 12, dtype=torch.float64)

    def both(z: Tensor) -> Tensor:
        wanted = 3.0 * torch.exp(-0.8 * t).to(z)
        return (z[1] + z[2]) * torch.exp(-z[0] * t.to(z)) - wanted

    formed, latest = Formed(), Latest(torch.zeros(2, dtype=torch.float64))
    solution = levenberg_marquardt(
        lambda x: ProjectedFree.at(both, both, x, 1, 50, latest, formed), double(2.0), iterations=40, tolerance=1e-20
    )
    assert solution.reason == "tolerance"
    assert float(solution.x) == pytest.approx(0.8, abs=1e-6)


def test_conjugate_gradients_are_least_squares():
    matrix = torch.randn(9, 4, generator=generator("cg"), dtype=torch.float64)
    right = torch.randn(9, generator=generator("right"), dtype=torch.float64)
    z, left = conjugate_gradients(lambda u: matrix @ u, lambda v: matrix.T @ v, right, 50, 1e-14)
    torch.testing.assert_close(z, torch.linalg.lstsq(matrix, -right[:, None]).solution[:, 0])
    torch.testing.assert_close(left, right + matrix @ z)


def test_products_with_a_jacobian_made_once():
    """Linearised: J·u and Jᵀ·v against the Jacobian written down."""
    x = double(0.3, -0.7, 1.1)
    local = Linearised.at(lambda x: torch.stack([x[0] * x[1], x[2].exp() * x[0], x.sum() ** 2, x[1] ** 3]), x)
    s, e = 2 * float(x.sum()), math.exp(1.1)
    jacobian = double(-0.7, 0.3, 0.0, e, 0.0, 0.3 * e, s, s, s, 0.0, 3 * 0.49, 0.0).reshape(4, 3)
    torch.testing.assert_close(torch.stack([local.times(u) for u in torch.eye(3).double()], 1), jacobian)
    torch.testing.assert_close(torch.stack([local.back(v) for v in torch.eye(4).double()]), jacobian)


def linear_function(values: Tensor, seen: list[torch.dtype], seed: int = 0):
    """A linear function with these singular values, of as many unknowns, into 20 equations; it notes what it was given."""
    generator = derive_generator(seed, "matrix")
    count = len(values)
    sides = (torch.linalg.qr(torch.randn((n, n), dtype=torch.float64, generator=generator))[0] for n in (20, count))
    left, right = next(sides)[:, :count], next(sides)
    matrix = left * values @ right

    def function(x: Tensor) -> Tensor:
        seen.append(x.dtype)
        return matrix.to(x) @ x

    return function


@pytest.mark.parametrize("decades", [2, 6, 9])
def test_rank_is_told_in_float32_only_where_that_is_enough(decades, monkeypatch):
    """Singular values 1 to 10^-decades of a linear function of as many unknowns as are not decomposed by SVD."""
    monkeypatch.setattr(least_squares, "SMALL", 4)
    wanted = torch.logspace(0, -decades, 6, dtype=torch.float64)
    seen: list[torch.dtype] = []
    function, x = linear_function(wanted, seen), torch.ones(6, dtype=torch.float64)
    spectrum = Recycled.at(function, function, x, 6, Formed()).linear().spectrum()
    assert spectrum is not None
    assert spectrum.rank == 6
    assert torch.allclose(spectrum.values, wanted, rtol=1e-3)
    assert seen.count(torch.float64) == (2 if decades == 2 else 3)  # the residual, its slopes, and the Jacobian again


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_dependent_unknown_is_never_counted(dtype, monkeypatch):
    """Whatever rounding makes of the singular value that is zero."""
    monkeypatch.setattr(least_squares, "SMALL", 4)
    values = torch.linspace(1, 0, 10, dtype=torch.float64)
    for seed in range(20):
        function, x = linear_function(values, [], seed), torch.ones(10, dtype=dtype)
        for kind in ("recycled", "dense"):
            if kind == "recycled":
                linear = Recycled.at(function, function, x, 10, Formed()).linear()
            else:
                linear = Dense.at(function, x, 10).linear()
            spectrum = linear.spectrum()
            assert spectrum is not None
            assert spectrum.rank == 9


# ------------------------------------------------------------------------------------------------ the equations
def lenet(shape: tuple[int, int, int] = (3, 8, 8), **options: object) -> nn.Module:
    return build_model("lenet", image_shape=shape, num_classes=4, seed=0, **options)


def facts(images: Tensor, labels: Tensor | None = None, **more: object) -> Knowledge:
    shape = (images.shape[1], images.shape[2], images.shape[3])
    return Knowledge(image_shape=shape, batch_size=len(images), num_classes=4, labels=labels, **more)


def attack(found_by: SecondOrder, update: Update, model: nn.Module, knowledge: Knowledge, task=None, **settings):
    return found_by.reconstruct(
        update, model, task or Classification(), knowledge, generator=generator("attack"), **settings
    )


def test_layers_count_the_same_and_rounding_does_not_count(make_update, random_images):
    """Sum of squares = mean over layers of the relative error; layers of (almost) zeros are measured by the largest."""
    images, labels = random_images((1, 3, 8, 8)), torch.tensor([1])
    model = lenet(channels=4)
    update = make_update(model, images, labels)
    update.received["conv0.bias"] = torch.zeros_like(update.received["conv0.bias"])
    update.received["conv1.bias"] = torch.full_like(update.received["conv1.bias"], 1e-22)
    problem = pose(update, model, Classification(), facts(images, labels))
    equations = Equations.of(problem, update)
    weights = {name: float(weight) for name, weight in equations.weights.items()}
    layers = len(weights)
    largest = max(float(tensor.norm()) for tensor in update.received.values())
    for name, weight in weights.items():
        expected = largest if name in ("conv0.bias", "conv1.bias") else float(update.received[name].norm())
        assert weight == pytest.approx(1.0 / (expected * math.sqrt(layers - 2)))
    silence = {name: torch.zeros_like(tensor) for name, tensor in problem.observed.items()}
    assert float(equations.residual(silence).square().sum()) == pytest.approx(1.0)
    alike = Equations.of(problem, update, power=0.0)
    assert len({float(weight) for weight in alike.weights.values()}) == 1
    assert float(alike.residual(silence).square().sum()) == pytest.approx(1.0)


def test_a_sketch_keeps_squares_on_average(make_update, random_images):
    images, labels = random_images((1, 3, 8, 8)), torch.tensor([1])
    model = lenet(channels=4)
    update = make_update(model, images, labels)
    equations = Equations.of(pose(update, model, Classification(), facts(images, labels)), update)
    vector = torch.randn(len(equations.wanted), generator=generator("v"), dtype=torch.float64)
    sizes = [float(equations.sketched(100, generator("sketch", i)).pressed(vector).square().sum()) for i in range(200)]
    assert sum(sizes) / 200 == pytest.approx(float(vector.square().sum()), rel=0.05)
    assert equations.sketched(0, generator("none")) is equations
    assert equations.sketched(10**6, generator("all")) is equations


# ------------------------------------------------------------------------------------------------ classification
@pytest.mark.parametrize(
    "options", [{}, {"init": "default", "activation": "gelu"}], ids=["dlg-sigmoid", "default-gelu"]
)
def test_a_smooth_lenet_gives_the_image_exactly(options, make_update, patches):
    images, labels, model = patches.private.images([0]), torch.tensor([2]), lenet(**options)
    found = attack(SecondOrder(), make_update(model, images, labels), model, facts(images))  # the label is inferred
    assert float(psnr_db(found.images, images)) > 100
    assert found.labels.tolist() == [2]
    assert found.steps < 25
    assert found.losses[-1] == found.diagnostics["loss"] < 1e-18
    assert found.diagnostics["certified"] == 1.0
    assert found.diagnostics["starts_succeeded"] == 1.0
    assert found.diagnostics["rank"] == found.diagnostics["unknowns"] == 192
    assert 1.0 <= found.diagnostics["condition"] < 1e6


def test_a_batch_is_found_whole(make_update, patches):
    images, labels, model = patches.private.images([0, 400]), torch.tensor([0, 3]), lenet()
    found = attack(SecondOrder(), make_update(model, images, labels), model, facts(images, labels))
    assert float(psnr_db(found.images[match_batch(found.images, images)], images).min()) > 100
    assert found.diagnostics["certified"] == 1.0


def test_two_local_steps_are_unrolled(make_update, patches):
    images, labels, model = patches.private.images([0, 400]), torch.tensor([1, 0]), lenet(init="default")
    local = {"local_steps": 2, "local_batch_size": 1, "learning_rate": 0.5}
    update = make_update(model, images, labels, kind="weights", **local)
    found = attack(SecondOrder(), update, model, facts(images, labels, **local))
    assert float(psnr_db(found.images, images).min()) > 80
    assert found.diagnostics["certified"] == 1.0


def test_matrix_free_agrees_with_dense(make_update, random_images):
    images, labels = random_images((1, 1, 5, 4)), torch.tensor([1])
    model = lenet((1, 5, 4), channels=6)
    update = make_update(model, images, labels)
    dense = attack(SecondOrder(sketch=0), update, model, facts(images, labels))
    free = attack(SecondOrder(dense_limit=0), update, model, facts(images, labels))
    assert (dense.diagnostics["dense"], free.diagnostics["dense"]) == (1.0, 0.0)
    assert "rank" not in free.diagnostics
    assert 1.0 < free.diagnostics["condition_at_least"] <= 1.01 * dense.diagnostics["condition"]
    torch.testing.assert_close(free.images, dense.images, rtol=0, atol=1e-6)
    assert float(psnr_db(free.images, images)) > 100


@pytest.mark.parametrize("dense_limit", [19, 20])  # two images of 20 pixels: nothing is formed, or a block for each
def test_a_batch_beyond_the_limit_is_found_by_blocks(dense_limit, make_update, random_images):
    images, labels = random_images((2, 1, 5, 4)), torch.tensor([1, 2])
    model = lenet((1, 5, 4), channels=6)
    update, known = make_update(model, images, labels), facts(images, labels)
    whole = attack(SecondOrder(sketch=0), update, model, known)
    found = attack(SecondOrder(dense_limit=dense_limit), update, model, known)
    assert (whole.diagnostics["dense"], found.diagnostics["dense"]) == (1.0, 0.0)
    assert "rank" not in found.diagnostics
    assert found.diagnostics.get("rank_at_most") == (40 if dense_limit == 20 else None)
    assert 1.0 < found.diagnostics["condition_at_least"] <= 1.01 * whole.diagnostics["condition"]
    order = match_batch(found.images, images)
    assert found.diagnostics["certified"] == 1.0
    assert float(psnr_db(found.images[order], images).min()) > 100


@pytest.mark.parametrize("dense_limit", [20, 4096])
def test_a_batch_is_differentiated_image_by_image(dense_limit, make_update, random_images, monkeypatch):
    """The Jacobians are those of the whole batch, and so is what comes out, for each image costs what one alone does."""
    images, labels = random_images((3, 1, 5, 4)), torch.tensor([1, 2, 1])
    model = lenet((1, 5, 4), channels=6)
    update, known = make_update(model, images, labels), facts(images, labels)
    made: list[tuple[int, list[Tensor]]] = []
    form = Formed.form

    def watched(formed: Formed, function, x: Tensor, chunk: int) -> None:
        form(formed, function, x, chunk)
        alone, grams = formed.alone, formed.grams
        formed.alone = ()
        form(formed, function, x, chunk)
        for gram, slow in zip(grams, formed.grams, strict=True):
            torch.testing.assert_close(gram, slow, rtol=1e-4, atol=1e-4 * float(slow.abs().max()))
        formed.alone, formed.grams = alone, grams
        made.append((len(alone), list(grams)))

    monkeypatch.setattr(Formed, "form", watched)
    found = attack(SecondOrder(dense_limit=dense_limit), update, model, known)
    assert found.diagnostics["certified"] == 1.0
    assert {count for count, _ in made} == {3}
    assert [len(gram) for gram in made[0][1]] == ([20, 20, 20] if dense_limit == 20 else [60])


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_rank_is_that_of_the_matrix_it_is_read_off(precision, make_update, random_images):
    """However many equations there are: here a hundred times as many as the sketch keeps rows for an unknown."""
    images, labels = random_images((1, 1, 4, 4)), torch.tensor([1])
    model = build_model("mlp", image_shape=(1, 4, 4), num_classes=4, seed=0, hidden=(512, 512), activation="tanh")
    update = make_update(model, images, labels)
    found = attack(
        SecondOrder(precision=precision, certified=1e-8, tolerance=1e-12), update, model, facts(images, labels)
    )
    assert found.diagnostics["equations"] > 2e5
    assert found.diagnostics["rank"] == 16
    assert found.diagnostics["certified"] == 1.0
    assert float(psnr_db(found.images, images)) > 60


def test_the_certificate_is_honest(make_update, random_images):
    """One trial is not enough, and fewer equations than unknowns prove nothing however well they are met."""
    images, labels, model = random_images((1, 3, 8, 8)), torch.tensor([1]), lenet(channels=4)
    update = make_update(model, images, labels)
    hasty = attack(SecondOrder(iterations=1, restarts=1, descent_iterations=0), update, model, facts(images, labels))
    assert float(psnr_db(hasty.images, images)) < 40
    assert hasty.diagnostics["certified"] == hasty.diagnostics["starts_succeeded"] == 0.0
    partial = replace(update, received={name: update.received[name] for name in ("conv0.weight", "conv0.bias")})
    few = lenet(channels=2)
    update = make_update(few, images, labels)
    partial = replace(update, received={name: update.received[name] for name in ("conv0.weight", "conv0.bias")})
    free = attack(SecondOrder(restarts=2), partial, few, facts(images, labels))
    assert free.diagnostics["equations"] < free.diagnostics["unknowns"]
    assert free.diagnostics["loss"] < 1e-10
    assert float(psnr_db(free.images, images)) < 40
    assert free.diagnostics["certified"] == 0.0


@pytest.mark.parametrize("dense_limit", [20, 19])
def test_half_determined_batches_are_not_certified_beyond_the_limit(dense_limit, make_update, random_images):
    """Logistic regression on two classes sends sums of its images: each would be told if the other were known."""
    images, labels = random_images((2, 1, 5, 4)), torch.tensor([0, 1])
    model = build_model("mlp", image_shape=(1, 5, 4), num_classes=2, seed=0, hidden=())
    update, known = make_update(model, images, labels), facts(images, labels)
    whole = attack(SecondOrder(restarts=2), update, model, known)
    assert whole.diagnostics["rank"] < 40
    found = attack(SecondOrder(restarts=2, dense_limit=dense_limit), update, model, known)
    for one in (whole, found):
        assert one.diagnostics["loss"] < 1e-10
        assert one.diagnostics["certified"] == 0.0
        assert float(psnr_db(one.images[match_batch(one.images, images)], images).min()) < 30
    assert found.diagnostics["hidden_share"] > 0.3


def test_a_dead_batch_is_not_certified_by_blocks(make_update, random_images):
    images, labels, model = (
        random_images((2, 1, 5, 4)),
        torch.tensor([1, 2]),
        lenet((1, 5, 4), channels=6, activation="relu"),
    )
    with torch.no_grad():
        model.conv0.bias.fill_(-60.0)
    quick = SecondOrder(restarts=1, iterations=3, switching_iterations=0, smoothing_iterations=0, dense_limit=20)
    found = attack(quick, make_update(model, images, labels), model, facts(images, labels))
    assert found.diagnostics["certified"] == 0.0


def test_conjugate_gradients_without_an_end_vouch_for_nothing(monkeypatch):
    """Blocks that hardly know the Jacobian, as badly conditioned as it is: an unfinished step would look like a short one."""
    values = torch.logspace(0, -7, 400, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(600, 400, generator=generator("turn"), dtype=torch.float64))[0]
    back = torch.linalg.qr(torch.randn(400, 400, generator=generator("back"), dtype=torch.float64))[0]
    matrix, x = (turn * values) @ back.T, torch.full((400,), 0.02, dtype=torch.float64)
    groups = list(torch.arange(400).reshape(10, 40))
    blocks = Recycled.at(lambda x: matrix.to(x) @ x, lambda x: matrix.to(x) @ x, x, 64, Formed(groups)).linear()
    whole = Recycled.at(lambda x: matrix.to(x) @ x, lambda x: matrix.to(x) @ x, x, 64, Formed()).linear()
    assert certificates.last_step(blocks, 10) > 0.5 * 0.02
    assert certificates.last_step(whole, 10) > 0.5 * 0.02
    assert certificates.hidden_share(blocks, 10, generator("hidden")) > certificates.HIDDEN
    assert certificates.hidden_share(whole, 10, generator("hidden")) > certificates.HIDDEN
    monkeypatch.setattr(certificates, "FEW", 1)  # as many steps as unknowns, and these take twice as many
    assert certificates.last_step(blocks, 10) == certificates.hidden_share(blocks, 10, generator("hidden")) == math.inf
    assert certificates.last_step(whole, 10) < math.inf


def test_the_standard_error_is_that_of_least_squares():
    """Of many fits to noise, against the singular values' formula; rounding stands in where the fit is perfect."""
    matrix = torch.randn(50, 5, generator=generator("errors"), dtype=torch.float64) @ torch.diag(
        double(1, 0.5, 0.1, 0.02, 0.01)
    )
    noise = 1e-3 * torch.randn(50, 2000, generator=generator("noise"), dtype=torch.float64)
    away = float(torch.linalg.lstsq(matrix, noise).solution.square().mean().sqrt())
    values = torch.linalg.svdvals(matrix)
    assert certificates.standard_error(noise[:, 0], values, 0.0) == pytest.approx(away, rel=0.25)
    none = certificates.standard_error(torch.zeros(50, dtype=torch.float64), values, 1e-3 * math.sqrt(50))
    assert none == pytest.approx(away, rel=0.1)


class Blurred(nn.Module):
    """Behind a fixed mixing of pixels with a condition number of 1e4, three dense layers."""

    def __init__(self) -> None:
        super().__init__()
        turn, back = (torch.linalg.qr(torch.randn(16, 16, generator=generator("blur", side)))[0] for side in "ab")
        self.register_buffer("blur", (turn * torch.logspace(0, -4, 16)) @ back)
        self.layers = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 4))

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.layers(images.flatten(1) @ self.blur)
        return scores


def test_rounding_that_hides_an_image_takes_its_certificate(make_update, random_images):
    """The fit is as good as it can be, no step is left, and yet the image is not what comes out."""
    images, labels = random_images((1, 1, 4, 4)), torch.tensor([1])
    with seeded_default_generator(0):
        model = Blurred().double()
    update = make_update(model, images, labels)
    near = images.double().reshape(1, 1, 1, 4, 4) + 1e-3
    for dtype, certain in ((torch.float64, 1.0), (torch.float16, 0.0)):
        sent = replace(update, received={name: tensor.to(dtype) for name, tensor in update.received.items()})
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Case, "starts", lambda case: {"images": near})
            one = SecondOrder(restarts=1, descent_iterations=0, certified=1e-4)
            found = attack(one, sent, model, facts(images, labels))
        away = float((found.images - images).square().mean().sqrt())
        assert found.diagnostics["rank"] == 16
        assert found.diagnostics["step_left"] < 1e-3
        assert (away < 1e-3) == bool(certain)
        assert (found.diagnostics["standard_error"] < 1e-3) == bool(certain)
        assert found.diagnostics["certified"] == certain


def test_float32_searches_without_a_jacobian_are_certified(make_update, random_images):
    images, labels, model = random_images((2, 1, 5, 4)), torch.tensor([1, 2]), lenet((1, 5, 4), channels=6)
    one = SecondOrder(precision="float32", dense_limit=19, certified=1e-8, tolerance=1e-13)
    found = attack(one, make_update(model, images, labels), model, facts(images, labels))
    assert found.diagnostics["certified"] == 1.0
    assert float(psnr_db(found.images[match_batch(found.images, images)], images).min()) > 60


def test_batch_statistics_are_not_taken_apart(make_update, random_images):
    """In evaluation mode, too, where a layer keeps no running statistics."""
    images, labels = random_images((2, 1, 5, 4)), torch.tensor([1, 2])
    normal = nn.BatchNorm1d(12, track_running_stats=False)
    with seeded_default_generator(0):
        model = nn.Sequential(nn.Flatten(), nn.Linear(20, 12), normal, nn.Sigmoid(), nn.Linear(12, 4)).eval()
    update, known = make_update(model, images, labels), facts(images, labels)
    found = attack(SecondOrder(restarts=1, iterations=5), update, model, known)
    assert math.isfinite(found.diagnostics["loss"])

    class Centred(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x - x.mean(0, keepdim=True)

    model[2] = Centred()
    view = View.of(SecondOrder(), make_update(model, images, labels), model, Classification(), known)
    assert view.alone(0) is not None, "it cannot be seen from outside"
    assert not second_order._mean(view, images.double())
    model[2] = nn.Identity()
    view = View.of(SecondOrder(), make_update(model, images, labels), model, Classification(), known)
    assert second_order._mean(view, images.double())


@pytest.mark.parametrize("dense_limit", [4096, 20, 0])
def test_a_low_cost_is_not_enough_where_a_step_would_still_move_the_images(dense_limit, make_update, random_images):
    """However lenient `certified` is: the step that is left is about the distance from the truth."""
    images, labels, model = random_images((2, 1, 5, 4)), torch.tensor([1, 2]), lenet((1, 5, 4), channels=6)
    update, near = make_update(model, images, labels), (0.9 * images + 0.05).double()
    lenient = {"certified": 1e-2, "restarts": 1, "translations": 0, "dense_limit": dense_limit}
    for iterations in (1, 40):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Case, "starts", lambda case: {"images": near[None]})
            one = SecondOrder(iterations=iterations, descent_iterations=0, damping=1.0, **lenient)
            found = attack(one, update, model, facts(images, labels))
        away = float((found.images - images).square().mean().sqrt())
        assert found.diagnostics["loss"] < 1e-2
        if iterations == 1:
            assert found.diagnostics["step_left"] == pytest.approx(away, rel=0.2)
            assert away > 1e-3
        assert found.diagnostics["certified"] == float(iterations == 40)


def test_more_starts_never_end_higher(make_update, random_images):
    """ReLU has kinks: starts fail, the lowest own cost is kept, and nothing is certified that was not found."""
    images, labels = random_images((1, 3, 8, 8)), torch.tensor([1])
    model = lenet(channels=4, activation="relu", init="default")
    update = make_update(model, images, labels)
    one, three = (attack(SecondOrder(restarts=n, iterations=15), update, model, facts(images, labels)) for n in (1, 3))
    assert three.diagnostics["starts"] >= one.diagnostics["starts"]
    for found in (one, three):
        assert (found.diagnostics["certified"] == 1.0) == (float(psnr_db(found.images, images)) > 60)
    assert three.diagnostics["loss"] <= 1.0


@pytest.mark.parametrize("few", [False, True])
def test_progress_hears_of_every_step_and_never_goes_back(few, make_update, random_images):
    """few: fewer equations than unknowns, so that no start is ever enough."""
    images, labels, model = random_images((1, 3, 8, 8)), torch.tensor([1]), lenet(channels=2 if few else 4)
    update = make_update(model, images, labels)
    if few:
        update = replace(update, received={name: update.received[name] for name in ("conv0.weight", "conv0.bias")})
    calls: list[tuple[int, int, float]] = []
    found = attack(
        SecondOrder(restarts=2, iterations=7, descent_iterations=3),
        update,
        model,
        facts(images, labels),
        progress=lambda *call: calls.append(call),
    )
    assert len(calls) == found.steps
    done = [i for i, _, _ in calls]
    assert done == sorted(done)
    assert all(1 <= i <= n == 2 * (3 + 7) for i, n, _ in calls)
    assert found.diagnostics["descents"] == found.diagnostics["starts"] == 1.0 + few


def test_without_a_descent_progress_counts_none(make_update, random_images):
    images, labels, model = random_images((1, 3, 8, 8)), torch.tensor([1]), lenet(channels=4)
    totals: set[int] = set()
    attack(
        SecondOrder(restarts=2, iterations=7, sigma=1e-3),
        make_update(model, images, labels),
        model,
        facts(images, labels),
        progress=lambda done, total, cost: totals.add(total),
    )
    assert totals == {14}


def test_a_descent_stays_in_the_box(make_update, random_images):
    """L-BFGS knows no box; a search that does would reject every clamped trial from beyond it."""
    images = random_images((2, 3, 8, 8)).round()
    labels, model = torch.tensor([1, 2]), lenet(channels=6)
    update = make_update(model, images, labels)
    boxed = SecondOrder(restarts=1, iterations=40, box="step", translations=0, descent_iterations=3)
    assert attack(boxed, update, model, facts(images, labels)).diagnostics["certified"] == 1.0


def test_starts_brought_near_are_searched_at_once_and_of_others_the_nearest():
    asked: list[int] = []

    def approach(number: int) -> tuple[float, torch.Tensor]:
        asked.append(number)
        return (0.2, 1e-4, 0.1, math.inf, 0.3)[number], torch.tensor([float(number)])

    order = nearest_first(5, approach, waiting=9)
    assert float(next(order)) == 1.0
    assert asked == [0, 1]  # no descent is made before the near one has been searched
    assert [float(place) for place in order] == [2.0, 0.0, 4.0, 3.0]
    asked.clear()
    order = nearest_first(5, approach, waiting=2)
    assert [float(next(order)) for _ in range(2)] == [1.0, 2.0]
    assert asked == [0, 1, 2]  # nor are all made before a far one is searched
    assert [float(place) for place in order] == [0.0, 4.0, 3.0]


def descending_case(make_update, images: Tensor, labels: Tensor, weights: str = "entries") -> Case:
    model = lenet(channels=4)
    options = SecondOrder(restarts=1, descent_iterations=3, certified=0.0, weights=weights)
    view = View.of(options, make_update(model, images, labels), model, Classification(), facts(images, labels))
    return Case(options, [view], 0.1, derive_generator(0, "attack"), lambda *call: None, 0.0)


def test_a_descent_ends_where_it_is_close_or_slow_or_long(make_update, random_images):
    images, labels = random_images((1, 3, 8, 8)), torch.tensor([1])
    case = descending_case(make_update, images, labels)
    start = {"images": case.starts()["images"][0]}
    unit = case.unit(start)
    assert unit == case.distance_at(start) < 1.0
    capped = case.descend(start, Descent(longest=1, close=0.0, falling=0.0), unit)
    assert len(capped.costs) == 1 + 3  # what the option says
    assert capped.costs[0] == pytest.approx(1.0)
    close = case.descend(start, Descent(longest=9, close=1.01 * capped.costs[1], falling=0.0), unit)
    assert len(close.costs) == 1 + 2  # the step in which it was seen
    whole = case.descend(start, Descent(longest=9, close=0.0, falling=0.0), unit)
    share = whole.costs[1] / whole.costs[0]
    assert len(whole.costs) > len(close.costs)
    quick = Descent(longest=9, close=1.01 * capped.costs[1], quick=1.0 - 1.01 * share, falling=0.0)
    assert len(case.descend(start, quick, unit).costs) > len(close.costs)  # close, but still quick
    slow = case.descend(start, Descent(longest=9, close=0.0, falling=1.0), unit)
    assert len(slow.costs) == 1 + 11  # ten after the first one


def test_a_descent_weighs_equations_as_the_search_does(make_update, random_images):
    images, labels = random_images((1, 3, 8, 8)), torch.tensor([1])
    costs = set()
    for weights in ("entries", "layers"):
        case = descending_case(make_update, images, labels, weights)
        start = {"images": case.starts()["images"][0]}
        view = case.views[0]
        residual = view.equations.residual(view.problem.simulated(start))
        assert case.distance_at(start) == pytest.approx(float(residual.square().sum()))
        costs.add(round(case.distance_at(start), 12))
    assert len(costs) == 2


@pytest.mark.parametrize(
    ("box", "units", "order"), [("end", 1.0, [1, 0]), ("step", 1.0, [0, 1]), ("step", 1e-9, [1, 0])]
)
def test_starts_are_searched_in_the_order_of_where_their_descents_end(
    box, units, order, make_update, random_images, monkeypatch
):
    """Where the box puts them, and in units of their own first cost; the first comes to images far outside of the box."""
    images, labels, model = random_images((1, 3, 8, 8)), torch.tensor([1]), lenet(channels=4)
    away = images.double().reshape(-1) + 0.3 * torch.arange(192).cos()
    ends = [torch.where(away > 0.5, 5.0 * away + 1.0, away - 5.0), torch.full((192,), 0.9, dtype=torch.float64)]
    given, unit, searches = iter(ends), iter([units, 1.0]), []

    def descend(case: Case, start: dict[str, Tensor], descent: Descent, unit: float) -> End:
        return End(x=next(given), costs=(1.0,), reason="stalled")

    def noted(attack, at, start, *rest):
        searches.append(start)
        return searched(attack, at, start, *rest)

    monkeypatch.setattr(Case, "descend", descend)
    monkeypatch.setattr(Case, "unit", lambda case, start: next(unit))
    monkeypatch.setattr(second_order, "searched", noted)
    update = make_update(model, images, labels)
    attack(SecondOrder(restarts=2, translations=0, iterations=1, box=box), update, model, facts(images, labels))
    ends = [end.clamp(0.0, 1.0) for end in ends] if box == "step" else ends
    assert [next(i for i, end in enumerate(ends) if torch.equal(end, start)) for start in searches] == order


@pytest.mark.parametrize(
    "wrong",
    [
        {"restarts": 0},
        {"restarts": 2.5},
        {"translations": None},
        {"descent_iterations": "20"},
        {"box": 1},
        {"inner_steps": True},
    ],
)
def test_wrong_options_are_named(wrong):
    with pytest.raises(FedattackError, match=next(iter(wrong))):
        SecondOrder(**wrong)


def test_nothing_is_certified_where_the_update_does_not_depend_on_the_images(make_update, random_images):
    """A dead first layer: every image explains the update, and a start's cost may be exactly zero."""
    images, labels = random_images((1, 3, 8, 8)), torch.tensor([1])
    for activation, bias in (("sigmoid", 60.0), ("relu", -60.0)):
        model = lenet(channels=4, activation=activation)
        with torch.no_grad():
            model.conv0.bias.fill_(bias)
        update = make_update(model, images, labels)
        for options in ({}, {"dense_limit": 100}, {"spectrum": False}):
            quick = SecondOrder(restarts=1, iterations=3, switching_iterations=0, smoothing_iterations=0, **options)
            found = attack(quick, update, model, facts(images, labels))
            assert found.diagnostics["loss"] < 1e-10
            assert found.diagnostics["certified"] == 0.0
            assert float(psnr_db(found.images, images)) < 20


def test_nothing_descends_to_fit_noise_or_across_kinks(make_update, random_images):
    images, labels = random_images((1, 3, 8, 8)), torch.tensor([1])
    for activation, sigma, descents in (("sigmoid", None, 1.0), ("sigmoid", 1e-3, 0.0), ("relu", None, 0.0)):
        model = lenet(channels=4, activation=activation)
        quick = SecondOrder(restarts=1, iterations=2, sigma=sigma, switching_iterations=0, smoothing_iterations=0)
        found = attack(quick, make_update(model, images, labels), model, facts(images, labels))
        assert found.diagnostics["descents"] == descents


# ------------------------------------------------------------------------------------------------ diffusion
class Denoiser(nn.Module):
    """Two smooth convolutions and a time embedding: the smallest noise predictor with a layer of zero gradient."""

    def __init__(self, channels: int = 2, width: int = 16) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, width, 3, padding=1)
        self.time = nn.Linear(1, width)
        self.middle = nn.Conv2d(width, width, 3, padding=1)
        self.last = nn.Conv2d(width, channels, 3, padding=1)
        self.idle = nn.Parameter(torch.ones(3))

    def forward(self, images: Tensor, timesteps: Tensor) -> Tensor:
        when = self.time(timesteps.to(images.dtype)[:, None] / 1000.0)[:, :, None, None]
        hidden = torch.nn.functional.silu(self.first(images) + when)
        hidden = torch.nn.functional.silu(self.middle(hidden)) + 0.0 * self.idle.sum()
        out: Tensor = self.last(hidden)
        return out


def denoiser() -> nn.Module:
    with seeded_default_generator(0):
        return Denoiser().double()


def diffusion_update(model: nn.Module, task: Diffusion, images: Tensor, timesteps: list[int], seed: int = 0):
    private = dict(task.draw(images, torch.zeros(len(images)), generator=derive_generator(seed, "draw")))
    private["timesteps"] = torch.tensor(timesteps)
    sent = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    received = {n: t.detach() for n, t in simulate_gradient(model, sent, task, [private]).items()}
    update = Update(round=1, client="0", sent=sent, received=received, kind="gradient")
    shape = (images.shape[1], images.shape[2], images.shape[3])
    return private, update, Knowledge(image_shape=shape, batch_size=len(images), timesteps=private["timesteps"])


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_unknown_noise_is_projected_out(prediction_type, random_images):
    """Neither image nor noise is given; both come out exactly, and the idle parameter breaks nothing."""
    task, model = Diffusion(prediction_type=prediction_type), denoiser()
    images = random_images((1, 2, 4, 4))
    private, update, knowledge = diffusion_update(model, task, images, [100])
    assert float(update.received["idle"].abs().max()) == 0.0
    found = attack(SecondOrder(restarts=8), update, model, knowledge, task)
    assert found.diagnostics["certified"] == 1.0
    assert found.diagnostics["rank"] == found.diagnostics["unknowns"] == 64
    assert float(psnr_db(found.images, images)) > 80
    torch.testing.assert_close(found.noise, private["noise"], rtol=0, atol=1e-5)


@pytest.fixture
def formations(monkeypatch):
    """Numbers of unknowns of every Jacobian that is formed as a preconditioner, which all numbers of pixels are given."""
    sizes: list[int] = []
    form = Formed.form
    monkeypatch.setattr(
        Formed, "form", lambda formed, f, x, chunk: (sizes.append(len(x)), form(formed, f, x, chunk))[1]
    )
    monkeypatch.setattr("attacks.second_order_noise.PROJECTED", 8)
    return sizes


@pytest.mark.parametrize("dense_limit", [8, 63, 64])  # of 32 pixels, 64 unknowns with the noise
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_projection_without_a_matrix_finds_the_same(dense_limit, prediction_type, formations, random_images):
    task, model, images = Diffusion(prediction_type=prediction_type), denoiser(), random_images((1, 2, 4, 4))
    private, update, knowledge = diffusion_update(model, task, images, [100])
    found = attack(SecondOrder(dense_limit=dense_limit), update, model, knowledge, task)
    assert set(formations) == (set() if dense_limit == 8 else {64})
    assert len(formations) < found.steps
    assert found.diagnostics["dense"] == 0.0
    assert found.diagnostics["certified"] == 1.0
    assert found.diagnostics.get("rank") == (64 if dense_limit == 64 else None)
    assert float(psnr_db(found.images, images)) > 80
    torch.testing.assert_close(found.noise, private["noise"], rtol=0, atol=1e-4)


def test_noise_of_a_batch_is_projected_out_by_blocks(formations, random_images):
    """Images and their noise are one group each."""
    task, model, images = Diffusion(), denoiser(), random_images((2, 2, 3, 3))
    private, update, knowledge = diffusion_update(model, task, images, [100, 160])
    found = attack(SecondOrder(dense_limit=18), update, model, knowledge, task)
    assert set(formations) == {72}
    assert found.diagnostics["dense"] == 0.0
    order = match_batch(found.images, images)
    assert found.diagnostics["certified"] == 1.0
    assert float(psnr_db(found.images[order], images).min()) > 80
    torch.testing.assert_close(found.noise[order], private["noise"], rtol=0, atol=1e-4)


def test_rank_and_condition_without_a_matrix_are_those_with_one(random_images, monkeypatch):
    """A U-Net at 8×8, from near the truth: both end at the same point, and so are the figures, but for what a sketch does."""
    options = {"block_out_channels": (8,), "attention": (), "mid_attention": False, "norm_num_groups": 4}
    model = build_model("unet", image_shape=(1, 8, 8), num_classes=None, seed=0, **options).double()
    private, update, knowledge = diffusion_update(model, Diffusion(), random_images((1, 1, 8, 8)), [100])
    near = {name: private[name][None].double() + 1e-3 for name in ("images", "noise")}
    monkeypatch.setattr(Case, "starts", lambda case: near)
    attacks = [SecondOrder(sketch=sketch, restarts=1, descent_iterations=0, translations=0) for sketch in (0.0, 3.0)]
    with_one = attack(attacks[0], update, model, knowledge, Diffusion())
    monkeypatch.setattr("attacks.second_order_noise.PROJECTED", 8)
    for one, tolerance in zip(attacks, (1e-4, 0.5), strict=True):
        without = attack(one, update, model, knowledge, Diffusion())
        assert (with_one.diagnostics["dense"], without.diagnostics["dense"]) == (1.0, 0.0)
        assert with_one.diagnostics["rank"] == without.diagnostics["rank"] == 128
        assert with_one.diagnostics["certified"] == without.diagnostics["certified"] == 1.0
        assert without.diagnostics["condition"] == pytest.approx(with_one.diagnostics["condition"], rel=tolerance)


def test_dependent_unknowns_are_counted_without_a_matrix():
    """ρ = (x₁ + x₂ + y₁, y₁ + y₂, 2y₁ + 2y₂, x₁ − x₂): y can undo x₁ + x₂; without y₁ in the first it cannot."""
    rows = torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1], [0, 0, 2, 2], [1, -1, 0, 0]], dtype=torch.float64)

    def spectrum(matrix: Tensor, formed: Formed | None):
        x, y = double(0.1, 0.2), double(0.3, 0.4)

        def function(z: Tensor) -> Tensor:
            return matrix.to(z.dtype) @ z

        return ProjectedFree.at(function, function, x, 2, 20, Latest(y), formed).linear().spectrum()

    told = spectrum(rows, Formed())
    assert (told.rank, told.linear_rank) == (1, 2)
    torch.testing.assert_close(told.values, double(math.sqrt(2.0), 0.0), atol=1e-12, rtol=1e-12)
    joined = rows.clone()
    joined[0, 2] = 0.0
    told = spectrum(joined, Formed())
    assert (told.rank, told.linear_rank) == (2, 1)
    torch.testing.assert_close(told.values, double(math.sqrt(2.0), math.sqrt(2.0)))
    assert spectrum(rows, None) is None


def test_known_noise_leaves_the_images_alone(random_images):
    task, model, images = Diffusion(), denoiser(), random_images((2, 2, 4, 4))
    private, update, knowledge = diffusion_update(model, task, images, [50, 300])
    knowledge = replace(knowledge, noise=private["noise"])
    found = attack(SecondOrder(restarts=8), update, model, knowledge, task)
    assert found.diagnostics["certified"] == 1.0
    assert found.diagnostics["unknowns"] == 64
    assert float(psnr_db(found.images, images).min()) > 80


def test_a_unet_with_attention_gives_image_and_noise(random_images):
    """The keys' bias has a zero gradient up to rounding: it must not be blown up by its weight."""
    options = {"block_out_channels": (16,), "attention": (0,), "mid_attention": False, "norm_num_groups": 4}
    model = build_model("unet", image_shape=(1, 4, 4), num_classes=None, seed=0, **options).double()
    task, images = Diffusion(), random_images((1, 1, 4, 4))
    _, update, knowledge = diffusion_update(model, task, images, [100])
    bias = next(name for name in update.received if name.endswith("to_k.bias"))
    assert float(update.received[bias].abs().max()) < 1e-12
    found = attack(SecondOrder(restarts=6), update, model, knowledge, task)
    assert found.diagnostics["certified"] == 1.0
    assert float(psnr_db(found.images, images)) > 80
    blind = attack(SecondOrder(restarts=6), update, model, replace(knowledge, timesteps=None), task)
    assert blind.timesteps.tolist() == [100], "noise AND timestep unknown: the timestep is read off first"
    assert torch.equal(blind.images, found.images)


# ------------------------------------------------------------------------------------------------ refusals
def test_what_it_cannot_do_it_says(make_update, random_images):
    task, model, images = Diffusion(), denoiser(), random_images((1, 2, 4, 4))
    _, update, knowledge = diffusion_update(model, task, images, [100])
    with pytest.raises(NotApplicable, match="timesteps must be known"):
        attack(SecondOrder(), update, model, replace(knowledge, timesteps=None, local_steps=2, learning_rate=0.1), task)
    with pytest.raises(NotApplicable, match="one local step"):
        steps = replace(knowledge, local_steps=2, learning_rate=0.1, timesteps=torch.tensor([1, 2]))
        attack(SecondOrder(), update, model, steps, task)
    with pytest.raises(NotApplicable, match="64 unknowns"):
        few = replace(update, received={"last.bias": update.received["last.bias"]})
        attack(SecondOrder(), few, model, knowledge, task)
    with pytest.raises(NotApplicable, match="zero or not finite"):
        silent = replace(update, received={n: torch.zeros_like(t) for n, t in update.received.items()})
        attack(SecondOrder(), silent, model, knowledge, task)
    with pytest.raises(FedattackError, match="did you mean 'step'"):
        attack(SecondOrder(box="steps"), update, model, knowledge, task)


# ------------------------------------------------------------------------------------------------ noise, several updates
def noisy(update: Update, sigma: float, *names: object) -> Update:
    source = generator("noise", *names)
    received = {
        name: tensor + sigma * torch.randn(tensor.shape, generator=source, dtype=tensor.dtype)
        for name, tensor in update.received.items()
    }
    return replace(update, received=received)


def rms_of(update: Update) -> float:
    total = sum(float(tensor.square().sum()) for tensor in update.received.values())
    return math.sqrt(total / sum(tensor.numel() for tensor in update.received.values()))


def test_noise_is_explained_and_no_more(make_update, patches):
    """The residual ends at the noise and not below, and the prior helps."""
    images, labels, model = patches.private.images([0, 30, 77]), torch.tensor([2]), lenet()
    public = patches.public.images(range(64))
    psnr: dict[float, list[float]] = {0.0: [], 0.5: []}
    for i in range(3):
        clean = make_update(model, images[i : i + 1], labels)
        sigma = 0.3 * rms_of(clean)
        update = noisy(clean, sigma, i)
        told = facts(images[i : i + 1], labels, defense=f"gaussian-noise(sigma={sigma!r})", public_images=public)
        for weight, values in psnr.items():
            found = attack(SecondOrder(prior_weight=weight), update, model, told)
            assert found.diagnostics["chi_square"] == pytest.approx(1.0, abs=0.1)
            assert found.diagnostics["starts_succeeded"] == 1.0
            assert found.diagnostics["certified"] == 0.0
            values.append(float(psnr_db(found.images, images[i : i + 1])))
    assert sum(psnr[0.5]) / 3 > sum(psnr[0.0]) / 3 + 2.0


def test_a_known_sigma_needs_no_defense(make_update, random_images):
    images, labels, model = random_images((1, 3, 8, 8)), torch.tensor([1]), lenet()
    clean = make_update(model, images, labels)
    sigma = 0.01 * rms_of(clean)
    update = noisy(clean, sigma)
    told = facts(images, labels, defense=f"norm-clipping(max_norm=9.0) + gaussian-noise(sigma={sigma!r})")
    by_defense = attack(SecondOrder(), update, model, told)
    by_option = attack(SecondOrder(sigma=sigma), update, model, facts(images, labels))
    torch.testing.assert_close(by_defense.images, by_option.images, rtol=0, atol=0)


def test_without_a_prior_the_error_is_the_floor(make_update, random_images):
    """A maximum-likelihood estimate at small noise is efficient: its rms error is that of Cramér and Rao."""
    images, labels, model = 0.25 + 0.5 * random_images((1, 1, 6, 6)), torch.tensor([1]), lenet((1, 6, 6), channels=6)
    clean = make_update(model, images, labels)
    problem = pose(clean, model, Classification(), facts(images, labels))

    def simulated(x: Tensor) -> Tensor:
        return torch.cat([t.reshape(-1) for t in problem.simulated({"images": x.reshape(images.shape)}).values()])

    rows = jacobian_transposed(simulated, images.double().reshape(-1), 16)
    sigma = 1e-4 * rms_of(clean)
    floor = sigma * float(torch.linalg.inv(rows @ rows.T).diagonal().mean().sqrt())
    squares = []
    for i in range(8):
        found = attack(
            SecondOrder(sigma=sigma, prior_weight=0.0), noisy(clean, sigma, "floor", i), model, facts(images, labels)
        )
        squares.append(float((found.images.double() - images).square().mean()))
    assert math.sqrt(sum(squares) / len(squares)) == pytest.approx(floor, rel=0.2)


@pytest.mark.parametrize("preconditioned", [False, True])
def test_noise_on_a_diffusion_client_is_explained(preconditioned, random_images, request):
    formations = request.getfixturevalue("formations") if preconditioned else []
    task, model, images = Diffusion(), denoiser(), random_images((1, 2, 4, 4))
    _, clean, knowledge = diffusion_update(model, task, images, [50])
    sigma = 0.01 * rms_of(clean)
    told = replace(knowledge, defense=f"gaussian-noise(sigma={sigma!r})")
    found = attack(SecondOrder(spectrum=False), noisy(clean, sigma), model, told, task)
    assert bool(formations) == preconditioned
    assert found.diagnostics["chi_square"] == pytest.approx(1.0, abs=0.3)
    assert float(psnr_db(found.images, images)) > 20


def test_two_rounds_tell_what_one_cannot(make_update, random_images):
    """Fewer equations than unknowns in each of two updates of the same image; enough in both together."""
    images, labels = random_images((1, 3, 8, 8)), torch.tensor([1])
    models = [
        build_model(
            "lenet", image_shape=(3, 8, 8), num_classes=4, seed=seed, channels=1, init="default", activation="tanh"
        )
        for seed in (0, 1)
    ]
    first, second = (make_update(model, images, labels) for model in models)
    alone = attack(SecondOrder(restarts=1), first, models[0], facts(images, labels))
    both = attack(SecondOrder(restarts=6), first, models[0], facts(images, labels, history=(second,)))
    assert alone.diagnostics["equations"] < 192 < both.diagnostics["equations"]
    assert both.diagnostics["rounds_seen"] == 2
    assert alone.diagnostics["certified"] == 0.0
    assert both.diagnostics["rank"] > alone.diagnostics["rank"]


def two_rounds(random_images):
    """Images, model and task; the update of t = 900 and what is known, with an earlier update, of t = 30."""
    options = {"block_out_channels": (16,), "attention": (), "mid_attention": False, "norm_num_groups": 4}
    model = build_model("unet", image_shape=(1, 4, 4), num_classes=None, seed=0, **options).double()
    task, images = Diffusion(), random_images((1, 1, 4, 4))
    hard, easy = (diffusion_update(model, task, images, [t], seed=t)[1:] for t in (900, 30))
    return images, model, task, hard[0], replace(hard[1], timesteps=None, history=(easy[0],))


def test_the_easiest_round_of_a_diffusion_client_is_tried_first(random_images):
    images, model, task, update, knowledge = two_rounds(random_images)
    found = attack(SecondOrder(restarts=6), update, model, knowledge, task)
    assert found.timesteps.tolist() == [30]
    assert found.diagnostics["rounds_seen"] == 2
    assert found.diagnostics["rounds_tried"] == found.diagnostics["certified"] == 1.0
    assert float(psnr_db(found.images, images)) > 80


def test_progress_goes_through_all_rounds(random_images):
    _, model, task, update, knowledge = two_rounds(random_images)
    calls: list[tuple[int, int]] = []
    brief = SecondOrder(restarts=1, iterations=2, descent_iterations=0, translations=0)
    found = attack(brief, update, model, knowledge, task, progress=lambda done, total, _: calls.append((done, total)))
    assert found.diagnostics["rounds_tried"] == 2
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]


def clipped(update: Update, norm: float) -> Update:
    length = math.sqrt(sum(float(tensor.square().sum()) for tensor in update.received.values()))
    factor = min(1.0, norm / length)
    return replace(update, received={name: factor * tensor for name, tensor in update.received.items()})


@pytest.mark.parametrize("share", [0.1, 3.0], ids=["clipped", "below the bound"])
def test_known_clipping_is_no_protection(share, make_update, random_images):
    images, labels, model = random_images((1, 3, 8, 8)), torch.tensor([1]), lenet()
    clean = make_update(model, images, labels)
    norm = share * math.sqrt(sum(float(tensor.square().sum()) for tensor in clean.received.values()))
    update = clipped(clean, norm)
    found = attack(SecondOrder(), update, model, facts(images, labels, defense=f"norm-clipping(max_norm={norm!r})"))
    assert found.diagnostics["certified"] == 1.0
    assert float(psnr_db(found.images, images)) > 80


def test_clipped_residuals_cannot_be_projected_out(random_images):
    task, model, images = Diffusion(), denoiser(), random_images((1, 2, 4, 4))
    _, clean, knowledge = diffusion_update(model, task, images, [50])
    norm = 0.1 * math.sqrt(sum(float(tensor.square().sum()) for tensor in clean.received.values()))
    told = replace(knowledge, defense=f"norm-clipping(max_norm={norm!r})")
    with pytest.raises(NotApplicable, match="clipping hides the scale"):
        attack(SecondOrder(), clipped(clean, norm), model, told, task)

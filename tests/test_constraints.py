"""Gradient and weight constraints of a convolution: closed forms, adjoints, counting rules, ranks, solutions."""

import math

import pytest
import torch

from fedattack.constraints import (
    Convolution,
    Factored,
    GradientConstraints,
    Solved,
    Spectrum,
    WeightConstraints,
    gradient_matrix,
    hybrid_system,
    input_gradient,
    output,
    pinch,
    solve_gradient,
    solve_hybrid,
    solve_iteratively,
    split_gradient,
    weight_gradient,
    weight_gradient_adjoint,
    weight_matrix,
)
from fedattack.errors import FedattackError
from fedattack.seeding import derive_generator

SHAPES = [
    Convolution(3, 8, 8, 5, (5, 5), (2, 2), (2, 2)),
    Convolution(2, 7, 5, 4, (3, 3), (1, 1), (1, 1)),
    Convolution(4, 7, 5, 6, (3, 3), (1, 2), (1, 0), (2, 1), 2),
    Convolution(2, 9, 6, 3, (3, 2), (3, 2), (1, 1)),
    Convolution(1, 8, 8, 7, (4, 4), (4, 4)),
]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def normal(*size, seed=0):
    return torch.randn(size, generator=derive_generator(seed, "constraints", size), dtype=torch.float64)


def case(shape, batch=1, seed=0):
    """inputs, sensitivities, weight."""
    inputs = normal(batch, shape.channels, shape.height, shape.width, seed=seed)
    return (
        inputs,
        normal(batch, shape.filters, *shape.output, seed=seed + 1),
        normal(*shape.weight_shape, seed=seed + 2),
    )


def gradient_of(shape, inputs, sensitivity, **settings):
    return GradientConstraints(shape, sensitivity, weight_gradient(shape, inputs, sensitivity), **settings)


def weights_of(shape, inputs, weight, known=None):
    target = output(shape, weight, inputs)
    return WeightConstraints(shape, weight, target, torch.ones_like(target) if known is None else known.to(target))


# ------------------------------------------------------------------------------------------------ the operators
@each_shape
def test_weight_gradient_is_autograds(shape):
    inputs, sensitivity, weight = case(shape, batch=2)
    weight.requires_grad_()
    inputs.requires_grad_()
    (output(shape, weight, inputs) * sensitivity).sum().backward()
    torch.testing.assert_close(weight_gradient(shape, inputs.detach(), sensitivity), weight.grad)
    torch.testing.assert_close(input_gradient(shape, weight.detach(), sensitivity), inputs.grad)


@each_shape
def test_adjoints(shape):
    inputs, sensitivity, weight = case(shape, batch=2)
    gradient = normal(*shape.weight_shape, seed=9)
    left = (weight_gradient(shape, inputs, sensitivity) * gradient).sum()
    torch.testing.assert_close(left, (weight_gradient_adjoint(shape, gradient, sensitivity) * inputs).sum())
    left = (output(shape, weight, inputs) * sensitivity).sum()
    torch.testing.assert_close(left, (input_gradient(shape, weight, sensitivity) * inputs).sum())


@each_shape
def test_dense_matrices_are_the_operators(shape):
    inputs, sensitivity, weight = case(shape, batch=2)
    constraints = gradient_of(shape, inputs, sensitivity)
    matrix = constraints.matrix()
    assert matrix.shape == (constraints.gradient.numel(), inputs.numel())
    torch.testing.assert_close(matrix @ inputs.flatten(), constraints.right_side())
    whole = weight_matrix(shape, weight) @ inputs.flatten(1).T
    torch.testing.assert_close(whole.T.reshape(2, shape.filters, *shape.output), output(shape, weight, inputs))
    known = torch.rand(2, shape.filters, *shape.output, generator=derive_generator(0, "known")) < 0.5
    matrix, right = hybrid_system(constraints, weights_of(shape, inputs, weight, known))
    torch.testing.assert_close(matrix @ inputs.flatten()[:, None], right)
    assert len(matrix) == constraints.gradient.numel() + int(known.sum())


def test_gradient_matrix_of_a_shape_worked_by_hand():
    """One 2×2 kernel on 3×3 pixels: row (k, l) holds G at the pixels (i + k, j + l)."""
    shape = Convolution(1, 3, 3, 1, (2, 2))
    matrix = gradient_matrix(shape, torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]], dtype=torch.float64))
    wanted = [
        [1, 2, 0, 3, 4, 0, 0, 0, 0],
        [0, 1, 2, 0, 3, 4, 0, 0, 0],
        [0, 0, 0, 1, 2, 0, 3, 4, 0],
        [0, 0, 0, 0, 1, 2, 0, 3, 4],
    ]
    assert matrix.tolist() == wanted


def test_an_image_smaller_than_the_kernel():
    with pytest.raises(FedattackError, match="at least one pixel"):
        Convolution(1, 2, 2, 1, (3, 3))


# ------------------------------------------------------------------------------------------------ counting and ranks
@pytest.mark.parametrize(
    ("side", "kernel", "stride", "wanted"),
    [
        *[(8, 5, 1, 3), (16, 5, 1, 11), (32, 5, 1, 41), (8, 3, 1, 8), (16, 3, 1, 29), (32, 3, 1, 114)],
        *[(16, 5, 2, 16), (32, 5, 2, 64), (16, 3, 2, 64), (224, 7, 2, 1394), (224, 16, 16, 196)],
    ],
)
def test_the_smallest_number_of_filters(side, kernel, stride, wanted):
    """D_min = ceil((H/s)(W/s) / ⌊K/s⌋²)."""
    padding = 0 if kernel == stride else kernel // 2
    shape = Convolution(3, side, side, 1, (kernel, kernel), (stride, stride), (padding, padding))
    assert shape.filters_for_gradients() == wanted == math.ceil((side // stride) ** 2 / (kernel // stride) ** 2)
    assert shape.filters_for_weights() == 3 * stride**2


@pytest.mark.parametrize(
    ("side", "kernel", "stride", "filters", "rank"),
    [
        *[(16, 5, 2, 15, 252), (16, 5, 2, 16, 256), (32, 5, 2, 63, 1020), (32, 5, 2, 64, 1024)],
        *[(16, 3, 2, 63, 255), (16, 3, 2, 64, 256), (8, 5, 1, 2, 50), (8, 5, 1, 3, 64), (16, 5, 1, 10, 250)],
    ],
)
def test_ranks_of_random_sensitivities(side, kernel, stride, filters, rank):
    """The rank falls short of the unknowns just below D_min, by as much as counting in residue classes says."""
    shape = Convolution(1, side, side, filters, (kernel,) * 2, (stride,) * 2, (kernel // 2,) * 2)
    inputs, sensitivity, _ = case(shape)
    found = solve_gradient(gradient_of(shape, inputs, sensitivity))
    assert (found.spectrum.rank, found.spectrum.unknowns) == (rank, side * side)
    assert found.spectrum.full == (filters >= shape.filters_for_gradients())
    if found.spectrum.full:
        torch.testing.assert_close(found.inputs, inputs, rtol=0, atol=1e-9)
    assert found.residual < 1e-12


def test_more_filters_than_the_fewest_condition_better():
    conditions = []
    for filters in (16, 22):
        shape = Convolution(1, 16, 16, filters, (5, 5), (2, 2), (2, 2))
        inputs, sensitivity, _ = case(shape)
        conditions.append(solve_gradient(gradient_of(shape, inputs, sensitivity)).spectrum.condition)
    assert conditions[0] > 5 * conditions[1]


def test_masked_sensitivities_keep_their_rank_and_dead_filters_do_not():
    shape = Convolution(1, 8, 8, 4, (5, 5), (1, 1), (2, 2))
    inputs, sensitivity, _ = case(shape)
    sensitivity = sensitivity * (torch.rand(sensitivity.shape, generator=derive_generator(0, "mask")) < 0.5)
    assert solve_gradient(gradient_of(shape, inputs, sensitivity)).spectrum.full
    sensitivity[:, 2:] = 0
    assert solve_gradient(gradient_of(shape, inputs, sensitivity)).spectrum.rank == 50


def test_pixels_that_no_kernel_sees():
    shape = Convolution(1, 9, 8, 6, (2, 2), (3, 3))
    inputs, sensitivity, _ = case(shape)
    assert shape.unseen == 9 * 8 - 6 * 6
    assert shape.filters_for_gradients() is None
    found = solve_gradient(gradient_of(shape, inputs, sensitivity))
    assert found.spectrum.rank <= 36 < found.spectrum.unknowns


@pytest.mark.parametrize("batch", [1, 3])
def test_a_batch_needs_as_many_times_the_filters(batch):
    least = Convolution(2, 8, 8, 1, (5, 5), (1, 1), (2, 2)).filters_for_gradients(batch)
    assert least == math.ceil(batch * 64 / 25)
    for filters in (least - 1, least):
        shape = Convolution(2, 8, 8, filters, (5, 5), (1, 1), (2, 2))
        inputs, sensitivity, _ = case(shape, batch)
        found = solve_gradient(gradient_of(shape, inputs, sensitivity))
        assert found.spectrum.full == (filters == least)
    torch.testing.assert_close(found.inputs, inputs, rtol=0, atol=1e-8)


def test_groups_are_solved_apart():
    shape = Convolution(4, 6, 6, 16, (3, 3), (1, 1), (1, 1), groups=2)
    inputs, sensitivity, _ = case(shape)
    found = solve_gradient(gradient_of(shape, inputs, sensitivity))
    torch.testing.assert_close(found.inputs, inputs, rtol=0, atol=1e-9)


# ------------------------------------------------------------------------------------------------ dense systems
def test_factored_by_singular_values_and_by_qr_agree(monkeypatch):
    matrix, right = normal(40, 30), normal(40, 2, seed=1)
    values = torch.linalg.svdvals(matrix)
    exact = Factored(matrix, 1e-12)
    monkeypatch.setattr("fedattack.constraints.SINGULAR", 10)
    estimated = Factored(matrix, 1e-12)
    assert exact.spectrum.exact
    assert not estimated.spectrum.exact
    torch.testing.assert_close(exact.solve(right), estimated.solve(right))
    torch.testing.assert_close(exact.solve(right), torch.linalg.lstsq(matrix, right).solution)
    for spectrum in (exact.spectrum, estimated.spectrum):
        assert (spectrum.rank, spectrum.full) == (30, True)
        assert spectrum.sigma_max == pytest.approx(float(values[0]), rel=0.05)
        assert spectrum.sigma_min == pytest.approx(float(values[-1]), rel=0.05)


@pytest.mark.parametrize("limit", [5, 1024])
def test_a_deficient_system_has_the_solution_of_least_norm(monkeypatch, limit):
    monkeypatch.setattr("fedattack.constraints.SINGULAR", limit)
    matrix = normal(40, 20) @ normal(20, 30, seed=1)
    right = matrix @ normal(30, 2, seed=2)
    factored = Factored(matrix, 1e-10)
    assert factored.spectrum.rank == 20
    found = factored.solve(right)
    torch.testing.assert_close(found, torch.linalg.pinv(matrix, rtol=1e-10) @ right, rtol=1e-8, atol=1e-8)
    null = factored.null_space
    assert null.shape == (30, 10)
    assert float((matrix @ null).abs().max()) < 1e-10


def test_spectra_add_up():
    both = Spectrum(3, 4, 5.0, 0.5) + Spectrum(2, 2, 3.0, 0.1)
    assert both == Spectrum(5, 6, 5.0, 0.1)
    assert both.condition == pytest.approx(50)
    assert Spectrum(0, 1, 0.0, 0.0).condition == math.inf


# ------------------------------------------------------------------------------------------------ hybrid
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("limit", [1024, 3], ids=["split", "stacked"])
def test_hybrid_is_full_where_neither_kind_is(monkeypatch, batch, limit):
    monkeypatch.setattr("fedattack.constraints.SINGULAR", limit)
    shape = Convolution(3, 8, 8, 10, (3, 3), (2, 2), (1, 1))
    inputs, sensitivity, weight = case(shape, batch)
    gradient, weights = gradient_of(shape, inputs, sensitivity), weights_of(shape, inputs, weight)
    assert shape.filters < min(shape.filters_for_gradients(), shape.filters_for_weights())
    assert not solve_gradient(gradient).spectrum.full
    assert not solve_hybrid(None, weights, 1e-15).spectrum.full
    found = solve_hybrid(gradient, weights, 1e-15)
    if batch == 1:
        assert found.spectrum.full
        torch.testing.assert_close(found.inputs, inputs, rtol=0, atol=1e-9)
    assert found.spectrum.unknowns == batch * shape.unknowns
    assert found.residual < 1e-12


def test_split_and_stacked_ranks_agree(monkeypatch):
    """Where half of the outputs are known, some directions are open; both ways find as many, and they are really open."""
    shape = Convolution(2, 6, 6, 2, (3, 3), (1, 1), (1, 1))
    inputs, sensitivity, weight = case(shape)
    known = torch.rand(1, 2, *shape.output, generator=derive_generator(3, "known")) < 0.4
    gradient, weights = gradient_of(shape, inputs, sensitivity), weights_of(shape, inputs, weight, known)
    found = solve_hybrid(gradient, weights, 1e-15)
    matrix, _ = hybrid_system(gradient, weights)
    assert found.spectrum.rank == int(torch.linalg.matrix_rank(matrix)) < found.spectrum.unknowns
    assert found.free is not None
    assert len(found.free) == found.spectrum.unknowns - found.spectrum.rank
    assert float((matrix @ found.free.flatten(1).T).abs().max()) < 1e-10
    difference = (inputs - found.inputs).flatten()
    inside = found.free.flatten(1).T @ (found.free.flatten(1) @ difference)
    torch.testing.assert_close(inside, difference, rtol=0, atol=1e-9)


def test_a_split_takes_well_determined_directions_from_the_gradient():
    shape = Convolution(1, 8, 8, 4, (3, 3), (1, 1), (1, 1))
    inputs, sensitivity, _ = case(shape)
    split = split_gradient(gradient_of(shape, inputs, sensitivity), share=1e-3)
    assert split is not None
    gram = split.directions.flatten(1) @ split.directions.flatten(1).T
    torch.testing.assert_close(gram, torch.eye(len(gram), dtype=torch.float64))
    assert len(split.directions) == 64 - 36
    remaining = (inputs - split.inputs)[:, 0]
    projected = torch.einsum("fbhw,bhw->f", split.directions, remaining) @ split.directions.flatten(1)
    torch.testing.assert_close(projected, remaining.flatten(), rtol=0, atol=1e-9)


# ------------------------------------------------------------------------------------------------ without a matrix
@pytest.mark.parametrize(
    ("shape", "batch"),
    [
        (Convolution(3, 16, 16, 16, (5, 5), (2, 2), (2, 2)), 1),
        (Convolution(2, 13, 11, 12, (3, 3), (2, 2), (1, 1)), 2),
        (Convolution(4, 9, 8, 8, (3, 3), (1, 1), (1, 1), (1, 1), 2), 1),
    ],
    ids=["square", "odd", "groups"],
)
def test_conjugate_gradients_solve_weight_constraints(shape, batch):
    inputs, sensitivity, weight = case(shape, batch)
    weights = weights_of(shape, inputs, weight)
    for gradient in (None, gradient_of(shape, inputs, sensitivity)):
        found = solve_iteratively(gradient, weights)
        torch.testing.assert_close(found.inputs, inputs, rtol=0, atol=1e-8)
        assert found.spectrum.full
        assert found.iterations < 600


def test_conjugate_gradients_say_what_is_not_determined():
    """Consistent equations leave no residual, however few they are: the rank is what tells."""
    shape = Convolution(3, 10, 10, 6, (3, 3), (2, 2), (1, 1))
    inputs, _, weight = case(shape)
    found = solve_iteratively(None, weights_of(shape, inputs, weight))
    assert found.residual < 1e-10
    assert not found.spectrum.full
    assert 75 <= found.spectrum.rank <= 150  # an estimate from one probe; there are 6·25 equations for 300 unknowns
    assert float((found.inputs - inputs).abs().max()) > 0.1


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
@pytest.mark.parametrize("padding", [0, 1])
def test_conjugate_gradients_claim_no_rank_that_noise_has_taken(padding, seed):
    """As many equations as unknowns: exact ones determine all, noisy ones leave open what a dense factorisation leaves open."""
    shape = Convolution(1, 12, 12, 16, (3, 3), (1, 1), (padding, padding))
    inputs, sensitivity, _ = case(shape, seed=seed)
    for accuracy, full in ((2e-16, True), (1e-3, False)):
        gradient = gradient_of(shape, inputs, sensitivity, accuracy=accuracy)
        assert solve_gradient(gradient).spectrum.full == full
        assert solve_iteratively(gradient, None, accuracy=accuracy).spectrum.full == full


def test_conjugate_gradients_keep_a_rank_that_noise_leaves():
    shape = Convolution(3, 12, 12, 30, (5, 5), (1, 1), (2, 2))
    inputs, sensitivity, weight = case(shape)
    gradient, weights = gradient_of(shape, inputs, sensitivity, accuracy=1e-3), weights_of(shape, inputs, weight)
    for found in (
        solve_iteratively(gradient, None, accuracy=1e-3),
        solve_iteratively(gradient, weights, accuracy=1e-3),
        solve_iteratively(None, weights, accuracy=1e-3),
    ):
        assert found.spectrum.full
        torch.testing.assert_close(found.inputs, inputs, rtol=0, atol=0.05)


# ------------------------------------------------------------------------------------------------ inequalities
def test_inequalities_pin_down_what_equations_leave_open():
    """Non-negative inputs, mostly zeros, and fewer gradient constraints than pixels."""
    shape = Convolution(1, 8, 8, 2, (5, 5), (1, 1), (2, 2))
    inputs, sensitivity, weight = case(shape)
    inputs = inputs.clamp_min(1.0) - 1.0
    assert int((inputs > 0).sum()) < 20
    gradient = gradient_of(shape, inputs, sensitivity)
    nothing = weights_of(shape, inputs, weight, torch.zeros(1, 2, *shape.output))
    open_ = solve_hybrid(gradient, nothing, 1e-15)
    assert open_.spectrum.rank == 50
    infinite = torch.full_like(inputs, math.inf)
    found = pinch(open_, torch.zeros_like(inputs), infinite, None, derive_generator(0, "objectives"))
    assert found.spectrum.full
    torch.testing.assert_close(found.inputs, inputs, rtol=0, atol=1e-9)
    assert pinch(open_, -infinite, infinite, None, derive_generator(0, "objectives")) is open_


def test_inequalities_that_leave_room_change_nothing():
    shape = Convolution(1, 8, 8, 1, (5, 5), (1, 1), (2, 2))
    inputs, sensitivity, weight = case(shape)
    gradient = gradient_of(shape, inputs, sensitivity)
    open_ = solve_hybrid(gradient, weights_of(shape, inputs, weight, torch.zeros(1, 1, *shape.output)), 1e-15)
    low = torch.full_like(inputs, float(inputs.min()) - 1)
    assert pinch(open_, low, -low, None, derive_generator(0, "objectives")) is open_


def test_a_full_system_is_not_pinched():
    inputs = normal(1, 1, 2, 2)
    full = Solved(inputs, Spectrum(4, 4, 1.0, 1.0), 0.0, "gradient")
    assert pinch(full, inputs, inputs, None, derive_generator(0, "objectives")) is full


@pytest.mark.parametrize("accuracy", [1e-7, 1e-4, 1e-2])
@pytest.mark.parametrize("scale", [1.0, 50.0])
def test_open_pixels_are_not_pinned_down_by_coarse_numbers(accuracy, scale):
    """Four pixels of which nothing is known but a box, beside others as large as `scale`."""
    inputs = torch.full((1, 1, 2, 4), 0.5, dtype=torch.float64)
    inputs[..., 2:] = scale
    free = torch.zeros(4, 1, 1, 2, 4, dtype=torch.float64)
    free[:, 0, 0, :, :2] = torch.eye(4, dtype=torch.float64).reshape(4, 2, 2)
    open_ = Solved(inputs, Spectrum(4, 8, 1.0, 0.0), 0.0, "hybrid", free=free)
    low, high = torch.zeros_like(inputs), torch.full_like(inputs, scale)
    high[..., :2] = 1.0
    assert pinch(open_, low, high, None, derive_generator(0, "objectives"), accuracy) is open_

"""Closed forms: a synthetic batch behind one dense layer, whose inputs and gradients are known, comes back as it was."""

import math

import pytest
import torch
from torch import Tensor

from attacks.disaggregation import METHODS, DenseLayer, Disaggregated, disaggregate, factor
from attacks.independent_components import differences, unmix
from attacks.mixing_equations import Equations, identity, solve
from attacks.sparse_columns import descend, halfspaces, null_of, sample, unrepeated
from fedattack.errors import FedattackError, NotApplicable
from fedattack.seeding import derive_generator


def drawn(*shape: int, seed: int = 0, name: str = "numbers") -> Tensor:
    return torch.randn(*shape, generator=derive_generator(seed, name), dtype=torch.float64)


class Batch:
    """Inputs (B,D), a layer (M,D), and gradients that are zero exactly where a ReLU would make them so."""

    def __init__(self, batch: int, neurons: int, width: int, seed: int = 0, relu: bool = True) -> None:
        self.inputs = drawn(batch, width, seed=seed, name="inputs")
        self.layer = DenseLayer(
            drawn(neurons, width, seed=seed, name="weight") / width**0.5,
            0.1 * drawn(neurons, seed=seed, name="bias"),
            "relu" if relu else "other",
        )
        before = self.inputs @ self.layer.weight.T + self.layer.bias
        self.gradients = drawn(batch, neurons, seed=seed, name="gradients")
        if relu:
            self.gradients = self.gradients * (before > 0)
        self.weight, self.bias = self.gradients.T @ self.inputs, self.gradients.sum(0)

    def taken_apart(
        self, batch: int | None = -1, dtype: torch.dtype = torch.float64, **options: object
    ) -> Disaggregated:
        size = len(self.inputs) if batch == -1 else batch
        generator = derive_generator(1, "search")
        return disaggregate(
            self.weight.to(dtype), self.bias.to(dtype), size, layer=self.layer, generator=generator, **options
        )

    def errors(self, found: Disaggregated) -> Tensor:
        """Relative error of each sample's nearest input in what was found, (B,)."""
        return torch.cdist(self.inputs, found.inputs).amin(1) / self.inputs.norm(dim=1)


# ------------------------------------------------------------------------------------------------ behind a ReLU
@pytest.mark.parametrize(("batch", "neurons"), [(2, 40), (3, 48), (5, 60), (8, 96)])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_sparse_batch_comes_back_exactly(batch, neurons, seed):
    truth = Batch(batch, neurons, 3 * batch + 5, seed)
    found = truth.taken_apart()
    assert found.exact == batch
    assert float(truth.errors(found).max()) < 1e-9
    torch.testing.assert_close(found.gradients.T @ found.inputs, truth.weight)
    torch.testing.assert_close(found.gradients.sum(0), truth.bias)
    assert found.residual < 1e-10


@pytest.mark.parametrize("method", [("exclusive", "descent"), "descent", "sampling"])
def test_every_search_finds_a_small_batch(method):
    truth = Batch(4, 60, 20)
    found = truth.taken_apart(methods=method, samples=2000)
    assert found.exact == 4
    assert float(truth.errors(found).max()) < 1e-9


def test_float32_is_taken_for_what_it_is():
    truth = Batch(5, 80, 30)
    found = truth.taken_apart(dtype=torch.float32)
    assert found.exact == 5
    assert 1e-9 < float(truth.errors(found).max()) < 1e-4


def test_one_sample_is_a_quotient():
    truth = Batch(1, 12, 9)
    found = truth.taken_apart()
    assert (found.exact, found.method) == (1, "division")
    assert float(truth.errors(found).max()) < 1e-12


def test_the_batch_size_may_be_left_to_the_rank():
    truth = Batch(3, 40, 14)
    assert len(truth.taken_apart(batch=None).inputs) == 3


def test_a_large_batch_needs_no_sampling():
    """Sets of 15 rows inside one sample's zeros are one in 2^15 or rarer; descents find the columns all the same."""
    truth = Batch(16, 160, 60)
    found = truth.taken_apart()
    assert found.exact == 16
    assert float(truth.errors(found).max()) < 1e-8


# ------------------------------------------------------------------------------------------------ what it must not claim
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_dense_gradient_is_not_certified(seed):
    """Nothing is zero although the layer is said to have a ReLU: no sample may be called exact."""
    truth = Batch(4, 60, 20, seed, relu=False)
    layer = DenseLayer(truth.layer.weight, truth.layer.bias, "relu")
    found = disaggregate(truth.weight, truth.bias, 4, layer=layer, generator=derive_generator(1, "s"), rounds=2)
    assert found.exact == 0
    assert found.inputs.shape == (4, 20)
    assert bool(found.inputs.isfinite().all())


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_zeros_of_another_layer_are_not_certified(seed):
    """Sparse gradients whose zeros do not belong to these weights: the signs must give them away."""
    truth = Batch(4, 60, 20, seed)
    other = DenseLayer(drawn(60, 20, seed=seed, name="other"), truth.layer.bias, "relu")
    found = disaggregate(truth.weight, truth.bias, 4, layer=other, generator=derive_generator(1, "s"), rounds=2)
    assert found.exact == 0


@pytest.mark.parametrize("said", [2, 3])
def test_a_batch_smaller_than_the_rank_is_refused(said):
    with pytest.raises(NotApplicable, match="rank of 5"):
        Batch(5, 60, 20).taken_apart(batch=said)


def test_a_batch_larger_than_the_rank_finds_as_many_as_the_rank():
    """A sample that sent nothing is in no gradient: it is not claimed, and its place is filled."""
    truth = Batch(4, 60, 20)
    found = truth.taken_apart(batch=6)
    assert found.inputs.shape == (6, 20)
    assert found.exact == 4
    assert found.diagnostics["rank"] == 4
    assert float(found.gradients[4:].abs().max()) == 0


def test_full_rank_without_a_batch_size_is_refused():
    truth = Batch(30, 20, 40)
    with pytest.raises(NotApplicable, match="full rank"):
        truth.taken_apart(batch=None)


@pytest.mark.parametrize("spoilt", [0.0, math.nan])
def test_a_silent_or_broken_gradient_is_refused(spoilt):
    truth = Batch(3, 40, 14)
    truth.weight, truth.bias = truth.weight * spoilt, truth.bias * spoilt
    with pytest.raises(NotApplicable, match="zero or not finite"):
        truth.taken_apart()


def test_noise_lowers_the_claim_not_the_form():
    truth = Batch(4, 60, 20)
    scale = float(truth.weight.square().mean().sqrt())
    truth.weight = truth.weight + 0.1 * scale * drawn(60, 20, name="noise")
    found = truth.taken_apart()
    assert found.exact == 0
    assert found.inputs.shape == (4, 20)
    assert found.diagnostics["noise"] > 0.01


def test_equations_need_what_stands_behind_the_layer():
    with pytest.raises(NotApplicable, match="give no equations"):
        Batch(3, 40, 14).taken_apart(methods="equations", labels=torch.arange(3))


def test_an_unknown_method_is_named():
    with pytest.raises(FedattackError, match="descent"):
        Batch(2, 24, 9).taken_apart(methods="decent")
    assert "sampling" in METHODS


# ------------------------------------------------------------------------------------------------ the last layer
class Last:
    """A batch in front of a last dense layer with cross entropy behind it."""

    def __init__(self, batch: int, classes: int, width: int, seed: int = 0, repeated: bool = False) -> None:
        self.inputs = drawn(batch, width, seed=seed, name="inputs")
        weight = drawn(classes, width, seed=seed, name="weight") / width**0.5
        self.layer = DenseLayer(weight, 0.1 * drawn(classes, seed=seed, name="bias"), "softmax")
        self.labels = torch.arange(batch) % (max(1, batch - 1) if repeated else classes)
        logits = self.inputs @ weight.T + self.layer.bias
        self.gradients = (logits.softmax(1) - torch.nn.functional.one_hot(self.labels, classes)) / batch
        self.weight, self.bias = self.gradients.T @ self.inputs, self.gradients.sum(0)

    errors = Batch.errors


@pytest.mark.parametrize(
    ("batch", "classes", "repeated"), [(2, 5, False), (4, 10, False), (6, 20, False), (4, 10, True)]
)
def test_the_softmax_equations_give_the_batch(batch, classes, repeated):
    truth = Last(batch, classes, 30, repeated=repeated)
    found = disaggregate(
        truth.weight,
        truth.bias,
        batch,
        layer=truth.layer,
        generator=derive_generator(0, "s"),
        labels=truth.labels.flip(0),  # in any order
    )
    assert (found.exact, found.method) == (batch, "equations")
    assert float(truth.errors(found).max()) < 1e-7
    assert sorted(found.gradients.argmin(1).tolist()) == sorted(truth.labels.tolist())


def test_wrong_labels_explain_nothing():
    truth = Last(3, 10, 30)
    found = disaggregate(
        truth.weight,
        truth.bias,
        3,
        layer=truth.layer,
        generator=derive_generator(0, "s"),
        labels=torch.tensor([7, 8, 9]),
        rounds=1,
    )
    assert found.exact == 0


@pytest.mark.parametrize("head", ["identity", "tanh"])
def test_jacobian_against_finite_differences(head):
    weight = drawn(5, 7, name="head")
    function = identity if head == "identity" else lambda z: torch.tanh(z) @ weight.T
    basis = torch.linalg.qr(drawn(7, 3, name="basis")).Q
    labels = torch.tensor([0, 3, 3])
    equations = Equations(basis, drawn(3, 7, name="responses"), drawn(3, name="ones"), function, labels)
    points, direction = drawn(2, 3, 3, name="points"), drawn(2, 3, 3, name="direction")
    residual, jacobian = equations.linearised(points)
    torch.testing.assert_close(residual, equations.residual(points))
    step = 1e-6
    moved = (equations.residual(points + step * direction) - equations.residual(points - step * direction)) / (2 * step)
    torch.testing.assert_close((jacobian @ direction.reshape(2, 9, 1))[:, :, 0], moved, rtol=1e-6, atol=1e-8)


def test_gradients_of_a_head_are_autograds():
    weight = drawn(4, 6, name="head")
    labels = torch.tensor([1, 2, 0])
    before = drawn(3, 6, name="before").requires_grad_()
    logits = torch.tanh(before) @ weight.T
    (wanted,) = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, labels), before)
    equations = Equations(drawn(6, 3), drawn(3, 6), drawn(3), lambda z: torch.tanh(z) @ weight.T, labels)
    torch.testing.assert_close(equations.gradients(before.detach()), wanted)


def test_a_solved_start_stays():
    truth = Last(3, 8, 20)
    parts = factor(truth.weight, truth.bias, 3, truth.layer)
    both = torch.cat([truth.inputs, torch.ones(3, 1, dtype=torch.float64)], 1)
    points = torch.linalg.lstsq(parts.mixed.T, both.T).solution.T
    equations = Equations(parts.basis, parts.responses, parts.mixed[:, -1], identity, truth.labels)
    solved = solve(equations, points[None], steps=1, tolerance=1e-12)
    assert solved.residual < 1e-12
    torch.testing.assert_close(solved.points, points)


# ------------------------------------------------------------------------------------------------ the parts
def test_independent_signals_are_unmixed():
    """Laplace sources, mixed: every component is one source, up to order, sign and scale."""
    generator = derive_generator(0, "sources")
    sources = torch.distributions.Laplace(0.0, 1.0).icdf(
        torch.rand(4, 20_000, generator=generator, dtype=torch.float64)
    )
    mixture = drawn(4, 4, name="mixture")
    unmixing = unmix(mixture @ sources, iterations=200, tolerance=1e-9, generator=derive_generator(1, "u"))
    components = unmixing @ mixture
    share = components.abs() / components.norm(dim=1, keepdim=True)
    assert sorted(share.argmax(1).tolist()) == [0, 1, 2, 3]
    assert float(share.amax(1).min()) > 0.99


def test_differences_of_a_ramp():
    ramp = torch.arange(5.0).expand(1, 4, 5)
    edges = differences(ramp)
    assert edges.shape == (4 * 4 + 3 * 5,)
    assert edges[:16].unique().tolist() == [1.0]
    assert edges[16:].unique().tolist() == [0.0]


def test_descents_end_in_columns_of_zeros():
    gradients = drawn(80, 4) * (torch.rand(80, 4, generator=derive_generator(0, "on")) > 0.5)
    basis = torch.linalg.qr(gradients).Q
    ends = descend(basis, basis[:40], steps=50, floor=1e-9)
    zeros = ((basis @ ends.T).abs() < 1e-6).sum(0)
    columns = basis.T @ gradients
    columns = columns / columns.norm(dim=0)
    hit = ((ends @ columns).abs() > 1 - 1e-9).any(0)
    assert bool(hit.all())
    assert int(zeros.max()) == int((gradients == 0).sum(0).max())


def test_proposals_annihilate_their_rows():
    basis = torch.linalg.qr(drawn(20, 5)).Q
    q = sample(basis, 50, derive_generator(0, "p"))
    assert q.shape == (50, 5)
    assert bool((((basis @ q.T).abs() < 1e-9).sum(0) >= 4).all())


def test_null_of_and_unrepeated():
    basis = torch.linalg.qr(drawn(9, 3)).Q
    rows = torch.zeros(1, 9, dtype=torch.bool)
    rows[0, :2] = True
    q = null_of(basis, rows)
    assert float((basis[:2] @ q[0]).abs().max()) < 1e-12
    assert unrepeated(torch.cat([q, -q, basis[:1] / basis[0].norm()]), 1e-9).tolist() == [True, False, True]


def test_halfspaces_are_found_and_mixtures_are_not():
    points = drawn(4, 100)
    one, other = drawn(1, 4, name="one") @ points > 0, drawn(1, 4, name="other") @ points > 0
    found, wrong = halfspaces(points, torch.cat([one, one | other]))
    assert wrong[0] == 0
    assert wrong[1] > 5
    assert bool(((found[:1] @ points > 0) == one).all())

"""The log determinant from products alone."""

import pytest
import torch

from attacks.evidence import log_det
from fedattack.seeding import derive_generator

LIKE = torch.zeros(60, dtype=torch.float64)


def test_of_a_diagonal_it_is_exact():
    """Every vector of signs sees the same share of every entry; as many steps as there are different entries."""
    entries = torch.logspace(0, 6, 5).double().repeat_interleave(12)
    assert log_det(lambda v: entries * v, LIKE, probes=1, steps=5) == pytest.approx(float(entries.log().sum()))
    assert log_det(lambda v: v, LIKE) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("decades", [1, 4])
def test_of_a_matrix_it_is_near_and_repeats(decades):
    generator = derive_generator(0, "matrix")
    basis, _ = torch.linalg.qr(torch.randn(60, 60, generator=generator, dtype=torch.float64))
    matrix = basis @ torch.diag(torch.logspace(0, decades, 60).double()) @ basis.T
    exact = float(torch.logdet(matrix))
    assert log_det(lambda v: matrix @ v, LIKE, probes=50) == pytest.approx(exact, rel=0.03)
    assert log_det(lambda v: matrix @ v, LIKE) == log_det(lambda v: matrix @ v, LIKE)


def test_few_steps_see_a_wide_spectrum():
    """Most entries are 1, as of unknowns that the update does not tell: what counts are the few large ones."""
    generator = derive_generator(1, "matrix")
    factor = torch.randn(2000, 40, generator=generator, dtype=torch.float64)
    exact = float(torch.logdet(torch.eye(40).double() + factor.T @ factor))
    found = log_det(lambda v: v + factor @ (factor.T @ v), torch.zeros(2000, dtype=torch.float64), probes=60)
    assert found == pytest.approx(exact, rel=0.1)

"""Seeds by name: stable, distinct, and never through the global generator."""

import random

import numpy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedattack.seeding import derive_generator, derive_seed, seeded_default_generator

names = st.lists(st.text(max_size=8), max_size=4)


@given(st.integers(-(2**70), 2**70), names)
@settings(max_examples=50, deadline=None)
def test_a_seed_fits_a_generator_and_is_stable(root, parts):
    seed = derive_seed(root, *parts)
    assert 0 <= seed < 2**63
    assert derive_seed(root, *parts) == seed
    assert derive_generator(root, *parts).initial_seed() == seed


def test_order_number_and_root_of_the_names_count():
    seeds = [
        derive_seed(0),
        derive_seed(1),
        derive_seed(0, "a"),
        derive_seed(0, "b"),
        derive_seed(0, "a", "b"),
        derive_seed(0, "b", "a"),
        derive_seed(0, "ab"),
        derive_seed(0, "a", "b", ""),
        derive_seed(0, ""),
        derive_seed(10, "1"),
        derive_seed(1, "01"),
    ]
    assert len(set(seeds)) == len(seeds)


def test_many_cells_never_collide():
    cells = [(f"client-{c}", f"round-{r}", a) for c in range(30) for r in range(30) for a in ("dlg", "idlg")]
    assert len({derive_seed(7, *cell) for cell in cells}) == len(cells)


def test_skipping_a_cell_changes_no_other():
    def draws(cells: list[str]) -> dict[str, float]:
        return {cell: float(torch.rand((), generator=derive_generator(3, cell))) for cell in cells}

    everything, resumed = draws(["a", "b", "c"]), draws(["c", "b"])
    assert {cell: everything[cell] for cell in resumed} == resumed


def test_numbers_are_named_as_they_print():
    assert derive_seed(0, 1) == derive_seed(0, "1")


def global_states() -> tuple[bytes, bytes, object]:
    return (
        torch.get_rng_state().numpy().tobytes(),
        numpy.random.get_state()[1].tobytes(),
        random.getstate(),
    )


def test_the_global_generators_are_untouched():
    before = global_states()
    torch.rand(3, generator=derive_generator(0, "x"))
    derive_seed(0, "y")
    assert global_states() == before


def test_code_without_a_generator_argument_is_seeded_and_the_state_put_back():
    before = global_states()
    with seeded_default_generator(5):
        first = torch.nn.Linear(3, 2).weight
    with seeded_default_generator(5):
        again = torch.nn.Linear(3, 2).weight
    with seeded_default_generator(6):
        other = torch.nn.Linear(3, 2).weight
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert global_states() == before


def test_the_state_is_put_back_after_an_error():
    before = global_states()
    try:
        with seeded_default_generator(5):
            torch.rand(3)
            raise RuntimeError
    except RuntimeError:
        pass
    assert global_states() == before

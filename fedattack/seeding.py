"""Randomness without global seeds: names are hashed to a seed, a generator travels as an argument.

Skipping or resuming one cell of a campaign therefore changes no other.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def derive_seed(root: int, *names: object) -> int:
    """A seed in [0, 2**63) from a root seed and names, e.g. derive_seed(7, "attack", "dlg", "client-3", "round-1")."""
    text = "\x1f".join([str(root), *(str(name) for name in names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def derive_generator(root: int, *names: object) -> torch.Generator:
    """A CPU generator seeded by `derive_seed`. Draw on the CPU, then move."""
    return torch.Generator().manual_seed(derive_seed(root, *names))


@contextmanager
def seeded_global_generators(seed: int) -> Iterator[None]:
    """Library code that draws from Python's, numpy's or torch's global generators draws from `seed` inside.

    Their states are put back afterwards. Flower samples clients and adds differential-privacy noise that way.
    """
    import random

    import numpy as np

    python, arrays = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        random.setstate(random.Random(seed).getstate())
        np.random.set_state(np.random.RandomState(seed % 2**32).get_state())  # noqa: NPY002
        with seeded_default_generator(seed):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)  # noqa: NPY002


@contextmanager
def seeded_default_generator(seed: int) -> Iterator[None]:
    """Code that cannot take a generator (layer constructors) draws from `seed` inside; the global state is put back."""
    with torch.random.fork_rng(devices=[]):
        torch.random.set_rng_state(torch.Generator().manual_seed(seed).get_state())
        yield

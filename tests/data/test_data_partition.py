"""Partitions: disjoint, complete, a function of the seed, and as one-sided as their name says."""

import pytest
import torch

from fedattack.data import ImageData, partition
from fedattack.data.partition import SCHEMES
from fedattack.errors import FedattackError, UnknownName


def toy(count: int = 200, num_classes: int = 5, users: int | None = 8) -> ImageData:
    """Sorted by class, as folders are."""
    labels = torch.arange(count) * num_classes // count
    ids = None if users is None else torch.arange(count) % users
    names = tuple("abcdefghij"[:num_classes])
    return ImageData(torch.zeros(count, 1, 7, 5, dtype=torch.uint8), labels, names, ids, "toy")


def classes_of(data: ImageData, parts: list[torch.Tensor]) -> list[int]:
    return [len(data.labels[part].unique()) for part in parts]


@pytest.mark.parametrize("scheme", sorted(SCHEMES))
def test_every_index_is_dealt_once_and_the_seed_decides(scheme):
    data = toy()
    parts = partition(data, 8, scheme, seed=1)
    assert len(parts) == 8
    assert all(len(part) and part.dtype == torch.int64 for part in parts)
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(len(data)))
    again = partition(data, 8, scheme, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(parts, again, strict=True))
    other = partition(data, 8, scheme, seed=2)
    assert not all(torch.equal(a, b) for a, b in zip(parts, other, strict=True))


def test_aliases_are_the_same_scheme():
    for name, alias in (("by-label", "pathological"), ("natural-id", "by-user")):
        pairs = zip(partition(toy(), 8, name, seed=1), partition(toy(), 8, alias, seed=1), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_iid_is_mixed_although_the_set_is_sorted():
    data = toy(203)
    parts = partition(data, 4, seed=0)
    assert sorted(len(part) for part in parts) == [50, 51, 51, 51]
    assert classes_of(data, parts) == [5, 5, 5, 5]


def test_dirichlet_alpha_goes_from_one_sided_to_even():
    data = toy(1000)

    def largest_share(alpha: float) -> float:
        parts = partition(data, 5, "dirichlet", seed=0, alpha=alpha)
        counts = torch.stack([torch.bincount(data.labels[part], minlength=5) for part in parts]).float()
        return float((counts.max(1).values / counts.sum(1)).mean())

    assert largest_share(0.1) > 0.5
    assert largest_share(1000.0) < 0.25


def test_by_label_gives_each_client_its_classes():
    data = toy()
    assert classes_of(data, partition(data, 5, "by-label", seed=0, classes_per_client=2)) == [2] * 5
    assert classes_of(data, partition(data, 5, "by-label", seed=0, classes_per_client=1)) == [1] * 5
    two = partition(data, 2, "by-label", seed=0, classes_per_client=1)
    assert sorted(torch.cat(two).tolist()) == list(range(80))


def test_shards_are_few_classes_each_and_nothing_is_dropped():
    data = toy(203)
    parts = partition(data, 5, "shard", seed=0, shards_per_client=2)
    assert sum(map(len, parts)) == 203
    assert max(classes_of(data, parts)) <= 4


def test_users_are_clients():
    data = toy()
    parts = partition(data, 8, "by-user", seed=0)
    assert [data.users[part].unique().tolist() for part in parts] == [[i] for i in range(8)]
    drawn = [partition(data, 3, "by-user", seed=seed) for seed in (0, 0, 1, 2)]
    ids = [[int(data.users[part[0]]) for part in parts] for parts in drawn]
    assert ids[0] == ids[1]
    assert len({tuple(i) for i in ids}) > 1
    assert all(len(data.users[part].unique()) == 1 for parts in drawn for part in parts)


def test_errors():
    with pytest.raises(UnknownName, match="did you mean 'dirichlet'"):
        partition(toy(), 3, "dirichlett", seed=0)
    with pytest.raises(FedattackError, match=r"alfa.*did you mean 'alpha'"):
        partition(toy(), 3, "dirichlet", seed=0, alfa=1.0)
    with pytest.raises(FedattackError, match="at most 8, the users of toy"):
        partition(toy(), 9, "by-user", seed=0)
    with pytest.raises(FedattackError, match="at most 0"):
        partition(toy(users=None), 2, "by-user", seed=0)
    for clients in (0, 201):
        with pytest.raises(FedattackError, match="clients must be in 1 … 200"):
            partition(toy(), clients, seed=0)
    with pytest.raises(FedattackError, match="dirichlet"):
        partition(toy(20), 20, "dirichlet", seed=0, alpha=0.01)
    with pytest.raises(FedattackError, match="by-label"):
        partition(toy(), 3, "by-label", seed=0, classes_per_client=6)
    with pytest.raises(FedattackError, match="shard"):
        partition(toy(20), 15, "shard", seed=0, shards_per_client=1)


def test_the_global_random_state_is_left_alone():
    import numpy as np

    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    for scheme in SCHEMES:
        partition(toy(), 8, scheme, seed=1)
    assert torch.equal(before, torch.get_rng_state())
    assert (numpy_before == np.random.get_state()[1]).all()

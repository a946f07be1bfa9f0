"""Cut image sets into private, public and test by a seed."""

import torch
from torch import Tensor

from fedattack.data.types import ImageData, Splits
from fedattack.errors import FedattackError, must
from fedattack.seeding import derive_generator


def split_one(
    data: ImageData, *, seed: int, public_fraction: float = 0.2, test_fraction: float = 0.2, by_user: bool = False
) -> Splits:
    """All three parts from one set. With `by_user` the fractions count users, and no user is in two parts."""
    check_fractions(public_fraction, test_fraction)
    if by_user and data.users is None:
        raise FedattackError(must("by_user", f"off, because {data.name} has no users", by_user))
    ids = data.users if by_user and data.users is not None else torch.arange(len(data))
    private, public, test = _cut(ids, (public_fraction, test_fraction), seed, data.name)
    return Splits(data.subset(private), data.subset(public), data.subset(test))


def split_train_test(train: ImageData, test: ImageData, *, seed: int, public_fraction: float = 0.2) -> Splits:
    """Private and public from the set's own train part, test from its own test part."""
    check_fractions(public_fraction, 0.0)
    private, public = _cut(torch.arange(len(train)), (public_fraction,), seed, train.name)
    return Splits(train.subset(private), train.subset(public), test)


def limited(total: int, limit: int | None, *, seed: int, name: str) -> Tensor:
    """At most `limit` of `total` indices, drawn by the seed, in rising order."""
    if limit is None or limit >= total:
        return torch.arange(total)
    if limit < 1:
        raise FedattackError(must("limit", "at least 1 or none", limit))
    order = torch.randperm(total, generator=derive_generator(seed, "limit", name))
    return order[:limit].sort().values


def check_fractions(public_fraction: float, test_fraction: float) -> None:
    """Both in [0, 1), and something is left for private."""
    for what, value in (("public_fraction", public_fraction), ("test_fraction", test_fraction)):
        if not 0.0 <= value < 1.0:
            raise FedattackError(must(what, "in [0, 1)", value))
    if public_fraction + test_fraction >= 1.0:
        raise FedattackError(must("public_fraction + test_fraction", "below 1", public_fraction + test_fraction))


def _cut(ids: Tensor, fractions: tuple[float, ...], seed: int, name: str) -> list[Tensor]:
    """Row indices of the rest, then of each fraction; rows of one id stay together."""
    unique = torch.unique(ids)
    order = unique[torch.randperm(len(unique), generator=derive_generator(seed, "split", name))]
    sizes = [round(fraction * len(order)) for fraction in fractions]
    parts = order.split([len(order) - sum(sizes), *sizes])
    return [torch.isin(ids, part).nonzero().flatten() for part in parts]

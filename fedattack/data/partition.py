"""Deal a private set out to clients, with Flower's own partitioners over a table of indices (no images travel)."""

import io
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr
from typing import Any

import torch
from torch import Tensor

from fedattack.data.types import ImageData
from fedattack.errors import FedattackError, UnknownName, must, one_of
from fedattack.registry import parameter_problems
from fedattack.seeding import derive_generator, derive_seed


def partition(data: ImageData, clients: int, scheme: str = "iid", *, seed: int, **parameters: Any) -> list[Tensor]:
    """One (n_i,) int64 tensor of indices into `data` for each client; disjoint, none empty, in a shuffled order.

    iid                             equal shares (sizes differ by one at most)
    dirichlet(alpha, min_size)      each class is shared out by Dirichlet(alpha); small alpha = one-sided clients
    by-label(classes_per_client)    client i holds classes i, i+1, …; one that nobody holds is left out
    shard(shards_per_client)        sorted by label, cut into shards, dealt at random (McMahan et al. 2017)
    natural-id                      one user is one client; where there are more users, some are drawn

    "pathological" is by-label and "by-user" is natural-id under another name. Raises UnknownName or FedattackError.
    """
    if scheme not in SCHEMES:
        raise UnknownName(one_of("partition scheme", SCHEMES, scheme))
    build = SCHEMES[scheme]
    problems = parameter_problems(build, {"data": data, "clients": clients, "seed": seed, **parameters})
    if problems:
        raise FedattackError(f"partition scheme {scheme!r}: " + "; ".join(problems))
    if not 1 <= clients <= len(data):
        raise FedattackError(must("clients", f"in 1 … {len(data)} (the number of images)", clients))

    from datasets import Dataset

    order = torch.randperm(len(data), generator=derive_generator(seed, "partition", "order"))
    columns = {"index": order.tolist(), "label": data.labels[order].tolist()}
    if data.users is not None:
        columns["user"] = data.users[order].tolist()
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            partitioner = build(
                data=data, clients=clients, seed=derive_seed(seed, "partition", build.__name__), **parameters
            )
            partitioner.dataset = Dataset.from_dict(columns)
            users = _chosen(int(partitioner.num_partitions), clients, seed)
            parts = [torch.tensor(partitioner.load_partition(i)["index"][:], dtype=torch.int64) for i in users]
        except (ValueError, TypeError) as error:
            raise FedattackError(f"partition scheme {scheme!r} for {clients} clients: {error}") from error
    empty = [i for i, part in enumerate(parts) if not len(part)]
    if empty:
        raise FedattackError(must(f"share of every client under {scheme!r}", "non-empty", f"empty for clients {empty}"))
    return parts


def _iid(data: ImageData, clients: int, seed: int) -> Any:
    from flwr_datasets.partitioner import IidPartitioner

    return IidPartitioner(num_partitions=clients)


def _dirichlet(data: ImageData, clients: int, seed: int, alpha: float = 0.5, min_size: int = 1) -> Any:
    from flwr_datasets.partitioner import DirichletPartitioner

    return DirichletPartitioner(
        num_partitions=clients, partition_by="label", alpha=alpha, min_partition_size=min_size, seed=seed
    )


def _by_label(data: ImageData, clients: int, seed: int, classes_per_client: int = 2) -> Any:
    from flwr_datasets.partitioner import PathologicalPartitioner

    return PathologicalPartitioner(
        num_partitions=clients,
        partition_by="label",
        num_classes_per_partition=classes_per_client,
        class_assignment_mode="deterministic",
        seed=seed,
    )


def _shard(data: ImageData, clients: int, seed: int, shards_per_client: int = 2) -> Any:
    """All images are dealt: the shard is rounded up, the last may be short (Flower's default drops a remainder)."""
    from flwr_datasets.partitioner import ShardPartitioner

    if shards_per_client < 1:
        raise FedattackError(must("shards_per_client", "at least 1", shards_per_client))
    return ShardPartitioner(
        num_partitions=clients,
        partition_by="label",
        shard_size=-(-len(data) // (clients * shards_per_client)),
        keep_incomplete_shard=True,
        seed=seed,
    )


def _natural_id(data: ImageData, clients: int, seed: int) -> Any:
    from flwr_datasets.partitioner import NaturalIdPartitioner

    users = 0 if data.users is None else len(torch.unique(data.users))
    if users < clients:
        raise FedattackError(must("clients", f"at most {users}, the users of {data.name}", clients))
    return NaturalIdPartitioner(partition_by="user")


def _chosen(available: int, clients: int, seed: int) -> list[int]:
    """Which of the partitions are used: all, or `clients` of them drawn by the seed."""
    if available == clients:
        return list(range(clients))
    drawn = torch.randperm(available, generator=derive_generator(seed, "partition", "users"))[:clients]
    chosen: list[int] = drawn.sort().values.tolist()
    return chosen


SCHEMES: dict[str, Callable[..., Any]] = {
    "iid": _iid,
    "dirichlet": _dirichlet,
    "by-label": _by_label,
    "pathological": _by_label,
    "shard": _shard,
    "natural-id": _natural_id,
    "by-user": _natural_id,
}

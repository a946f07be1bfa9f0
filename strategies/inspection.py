"""Look at a client's reply without trusting it: is it what a client of this model could have sent?

Nothing is unpacked before its declared and its real shape, type and size are known to be right, so no reply can make the
server allocate more than an honest one does.
"""

from collections.abc import Collection, Mapping
from io import BytesIO
from math import prod

import numpy as np
import torch
from flwr.app import Array, ArrayRecord

from fedattack.errors import MalformedUpdate, must
from fedattack.types import State

FLOATS = frozenset({"float32", "float64"})
"""Types that may stand for one another: FedAdam and others aggregate in float64 what clients answer in float32."""

_HEADER = 4096  # bytes that numpy's own file header may take beside the numbers


def to_state(record: ArrayRecord) -> State:
    """Tensors of a record that is trusted (the server's own)."""
    return {name: torch.from_numpy(array.numpy().copy()) for name, array in record.items()}


def inspect(
    received: Mapping[str, Array], sent: Mapping[str, Array], expected: Collection[str]
) -> tuple[State, list[str]]:
    """The tensors of a reply and everything that is wrong with it; with any problem the tensors are not to be used.

    `expected` names what must be there; more than `sent` holds is refused. Scalars (counters) may change their type, as
    aggregation turns integers into floats.
    """
    problems = [f"tensor {name!r} is missing" for name in expected if name not in received]
    state: State = {}
    for name, array in received.items():
        if name not in sent:
            problems.append(f"tensor {str(name)[:80]!r} was never sent")
            continue
        try:
            state[name] = _unpack(name, array, sent[name])
        except MalformedUpdate as problem:
            problems.append(str(problem))
        except Exception as error:  # whatever a hostile payload provokes is a finding, not a crash
            problems.append(f"tensor {name!r} cannot be read: {type(error).__name__}: {str(error)[:200]}")
    return state, problems


def _unpack(name: str, array: Array, sent: Array) -> torch.Tensor:
    wanted, got = tuple(sent.shape), tuple(array.shape)
    if got != wanted:
        raise MalformedUpdate(must(f"shape of {name!r}", str(wanted), got))
    counter = not wanted
    if not (counter or array.dtype == sent.dtype or {array.dtype, sent.dtype} <= FLOATS):
        raise MalformedUpdate(must(f"dtype of {name!r}", sent.dtype, array.dtype))
    limit = 8 * prod(wanted) + _HEADER
    if len(array.data) > limit:
        raise MalformedUpdate(must(f"size of {name!r}", f"at most {limit} bytes", len(array.data)))
    if array.stype != sent.stype:
        raise MalformedUpdate(must(f"serialisation of {name!r}", repr(sent.stype), array.stype))
    real_shape, real_dtype = _numpy_header(array.data)
    if real_shape != wanted or real_dtype != array.dtype or real_dtype.kind not in "fiu":
        wording = f"numbers of type {array.dtype} and shape {wanted}"
        raise MalformedUpdate(must(f"content of {name!r}", wording, (str(real_dtype), real_shape)))
    numbers = array.numpy()
    if numbers.dtype.kind == "f" and not np.isfinite(numbers).all():
        bad = int((~np.isfinite(numbers)).sum())
        raise MalformedUpdate(must(f"values of {name!r}", "finite", f"{bad} of {numbers.size} NaN or infinite"))
    return torch.from_numpy(numbers.copy())


def _numpy_header(data: bytes) -> tuple[tuple[int, ...], np.dtype[np.generic]]:
    """Shape and type as numpy's own header states them, without unpacking the numbers."""
    file = BytesIO(data[:_HEADER])
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    return tuple(shape), dtype

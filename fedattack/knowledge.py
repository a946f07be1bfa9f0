"""Threat models: which facts an attack is given. The only place where an oracle can enter, and where it is recorded.

`facts` are what an honest-but-curious server really has; `truth` is read for the fields that a threat model asks for by
name and for no others. Those fields are oracles, and every result row lists them.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from typing import Any

from torch import Tensor

from fedattack.errors import FedattackError, must, one_of
from fedattack.types import Knowledge

FIELDS = frozenset(f.name for f in fields(Knowledge))
ORACLES = frozenset({"labels", "timesteps", "noise"})

_SERVER = FIELDS - ORACLES - {"defense"}
THREAT_MODELS: dict[str, frozenset[str]] = {
    "server": _SERVER,
    "informed-server": _SERVER | {"defense"},
    "labels-known": _SERVER | {"labels"},
    "everything-known": FIELDS,
}
"""server: what the training server has anyway, public data included. informed-server: also which defense runs.
labels-known: the oracle most papers assume. everything-known: all oracles, an upper bound."""


def visible_fields(threat_model: str, reveal: Iterable[str] = (), hide: Iterable[str] = ()) -> frozenset[str]:
    """The fields that a preset shows, with some added and some removed. Raises FedattackError on an unknown name."""
    if threat_model not in THREAT_MODELS:
        raise FedattackError(one_of("threat_model", THREAT_MODELS, threat_model))
    for name in (*reveal, *hide):
        if name not in FIELDS:
            raise FedattackError(one_of("knowledge field", FIELDS, name))
    return (THREAT_MODELS[threat_model] | frozenset(reveal)) - frozenset(hide)


def build_knowledge(
    visible: frozenset[str], facts: Mapping[str, Any], truth: Callable[[], Mapping[str, Tensor]] | None = None
) -> Knowledge:
    """Knowledge with the visible fields filled in. `truth` is called only if an oracle is among them."""
    oracles = visible & ORACLES
    values = {name: value for name, value in facts.items() if name in visible}
    if unknown := set(facts) - FIELDS | set(facts) & ORACLES:
        raise FedattackError(must("facts of a server", "no oracle and no unknown field", sorted(unknown)))
    if oracles and truth is not None:
        values |= {name: tensor for name, tensor in truth().items() if name in oracles}
    return Knowledge(**values)

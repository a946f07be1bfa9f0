"""Every error that fedattack raises on purpose, and the one way their texts are worded."""

from collections.abc import Iterable
from difflib import get_close_matches


class FedattackError(Exception):
    """Base of all errors of this package: catch this one to catch them all."""


class ConfigError(FedattackError):
    """One or more problems of a configuration, all listed in the text, each with its file and key."""


class UnknownName(FedattackError):
    """A name that no table holds."""


class NotApplicable(FedattackError):
    """The attack cannot say anything about this update, and why. It is a result, not a failure."""


class MissingKnowledge(FedattackError):
    """The attack needs a fact that the threat model hides."""


class MalformedUpdate(FedattackError):
    """A client's reply that does not fit what the client was sent."""


class MissingDependency(FedattackError):
    """An optional library, file or network resource is not there."""


class AttackTimeout(FedattackError):
    """The attack ran past its time limit."""


def must(what: str, rule: str, got: object) -> str:
    """The house wording: «what» must be «rule», got «value»."""
    return f"{what} must be {rule}, got {got!r}"


def closest(name: str, allowed: Iterable[str]) -> str:
    """A hint such as " (did you mean 'dlg'?)", or an empty string."""
    match = get_close_matches(name, list(allowed), n=1, cutoff=0.5)
    return f" (did you mean {match[0]!r}?)" if match else ""


def one_of(what: str, allowed: Iterable[str], got: object) -> str:
    """`must` for a name from a table, with the closest match offered."""
    names = sorted(allowed)
    return must(what, "one of " + ", ".join(names), got) + closest(str(got), names)

"""What every attack with a diffusion prior is run beside, and the few steps of its way that it keeps."""

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from fedattack.registry import ATTACKS
from fedattack.types import Control

SNAPSHOTS = 12
"""Images kept of the way, evenly spread over the steps, the result among them."""

MATCHING = "inverting-gradients"
"""The peer that matches gradients without a prior."""

STATISTICAL = "gaussian-map"
"""The peer whose prior is the mean and covariance of public images."""


def usual_controls(
    attack: Any, *, shared: tuple[str, ...], alone: Mapping[str, Any], evaluations: int, jacobians: bool = False
) -> list[Control]:
    """The prior alone, another client's update, the analytic estimate, and gradient matching without a prior.

    attack: a dataclass, whose fields `shared` the prior alone takes over; `alone`: what switches its guidance off.
    evaluations: of the update's gradient in all its chains together, as many as `inverting-gradients` gets. jacobians: it also
    takes Jacobians, one directional derivative for each pixel, whose number no setting tells: then no fewer evaluations than
    `inverting-gradients` takes by itself.
    """
    own = ATTACKS.get(MATCHING).iterations if jacobians else 1
    budget = {"iterations": evaluations} if evaluations > own or not jacobians else {}
    return [
        prior_alone(attack, shared, alone),
        Control("unrelated-update"),
        Control("peer", "linear-leak", {}),
        Control("peer", MATCHING, budget),
    ]


def prior_alone(attack: Any, shared: tuple[str, ...], alone: Mapping[str, Any]) -> Control:
    """The same attack with its fields `shared`, where they are not the defaults, and those of `alone`."""
    return Control("prior-alone", parameters={**changed(attack, shared), **alone})


def changed(attack: Any, names: tuple[str, ...]) -> dict[str, Any]:
    """Those of an attack's fields `names` that are not the defaults."""
    return {
        field.name: getattr(attack, field.name)
        for field in fields(attack)
        if field.name in names and (field.default is MISSING or getattr(attack, field.name) != field.default)
    }


def snapshot_steps(steps: int) -> tuple[int, ...]:
    """Which of the steps 0, 1, …, steps − 1 to keep, the first among them: with the result never more than SNAPSHOTS."""
    kept = min(steps, SNAPSHOTS - 1)
    return tuple(round(i * steps / kept) for i in range(kept))

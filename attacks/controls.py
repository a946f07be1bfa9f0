"""What every attack with a diffusion prior is run beside, and the few steps of its way that it keeps."""

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from fedattack.types import Control

SNAPSHOTS = 12
"""Images kept of the way, evenly spread over the steps, the result among them."""


def usual_controls(
    attack: Any, *, shared: tuple[str, ...], alone: Mapping[str, Any], evaluations: int
) -> list[Control]:
    """The prior alone, another client's update, the analytic estimate, and gradient matching without a prior.

    attack: a dataclass, whose fields `shared` the prior alone takes over; `alone`: what switches its guidance off.
    evaluations: of the update's gradient in all its chains together, as many as `inverting-gradients` gets.
    """
    changed = {
        field.name: getattr(attack, field.name)
        for field in fields(attack)
        if field.name in shared and (field.default is MISSING or getattr(attack, field.name) != field.default)
    }
    return [
        Control("prior-alone", parameters={**changed, **alone}),
        Control("unrelated-update"),
        Control("peer", "linear-leak", {}),
        Control("peer", "inverting-gradients", {"iterations": max(evaluations, 1)}),
    ]


def snapshot_steps(steps: int) -> tuple[int, ...]:
    """Which of the steps 0, 1, …, steps − 1 to keep, the first among them: with the result never more than SNAPSHOTS."""
    kept = min(steps, SNAPSHOTS - 1)
    return tuple(round(i * steps / kept) for i in range(kept))

"""Whether a search for images has ended exactly: what its last linear model says beyond the cost.

    step_left       how far an undamped step would still move the pixels
    hidden_share    what of a random change of the pixels the update does not tell
    standard_error  what rounding and residuals that cannot be met leave open: s·√(mean of 1/σ²), s² = ‖ρ‖²/equations

All to first order. Conjugate gradients that do not come to an end vouch for nothing.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from attacks.conjugate_gradients import Damped
from attacks.least_squares import MatrixFreeLinear, RecycledLinear
from attacks.preconditioners import TIGHT
from fedattack.jacobians import Linearised

EXACT = 1e-3
"""Root mean square error of an image's pixels up to which it counts as exact: 60 dB. A cost alone does not tell that where a
Jacobian is so badly conditioned that the update hardly depends on some contrasts."""

HIDDEN = 0.1
"""Share of a random change (root mean square) up to which it counts as told: a hundredth of the unknowns may be hidden."""

SURELY = 1e-6
"""How exactly steps are solved for where no whole Jacobian preconditions them: small singular values are then found last."""

FEW = 1000
"""Conjugate gradients that are allowed however few unknowns there are; else as many as there are."""


def last_step(linear: RecycledLinear | MatrixFreeLinear, images: int) -> float:
    """`step_left`: the largest root mean square over the images; infinite where there is no such step."""
    step = _undamped(linear, linear.local)
    return math.inf if step is None else _largest(step, images)


def hidden_share(linear: RecycledLinear | MatrixFreeLinear, images: int, generator: torch.Generator) -> float:
    """A random change is looked for by its first-order effect: what of it is not found again, of the image that loses most.

    Infinite where there is no answer.
    """
    like = linear.gradient
    change = torch.randn(len(like), generator=generator, dtype=like.dtype).to(like.device)
    step = _undamped(linear, replace(linear.local, value=-linear.local.times(change)))
    return math.inf if step is None else _largest(step - change, images)


def standard_error(residual: Tensor, values: Tensor, rounding: float) -> float:
    """`standard_error` of a Jacobian with these singular values; rounding: of the numbers that were sent, relatively."""
    size = max(float(residual.norm()), rounding) / math.sqrt(len(residual))
    return size * float((1.0 / values.double().square()).mean().sqrt())


def _undamped(linear: RecycledLinear | MatrixFreeLinear, local: Linearised) -> Tensor | None:
    """The Gauss-Newton step, or None where it is not to be had in as many conjugate gradients as are worth it."""
    inverse, damping = linear.nearly_inverse()
    if inverse is None:
        return None
    whole = isinstance(linear, RecycledLinear) and linear.point.formed.whole
    gradient = local.back(local.value)
    precision = TIGHT if whole else max(SURELY, 100 * torch.finfo(gradient.dtype).eps)
    enough = precision**2 * float(gradient @ inverse(gradient))
    found = Damped.of(local, gradient, damping, max(FEW, len(gradient)), enough, inverse)
    return found.step if found.finished and bool(found.step.isfinite().all()) else None


def _largest(step: Tensor, images: int) -> float:
    return float(step.reshape(images, -1).square().mean(1).sqrt().max())

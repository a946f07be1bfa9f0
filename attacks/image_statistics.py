"""What pictures are like before anything is known of one: a Gaussian over the coefficients of cosines.

    u = mean + spread·(√s·w + V·((√((1 − s)·λ + s) − √s)·Vᵀ·w)),   w ~ N(0, 1)

Mean and variances of public images, coefficient by coefficient; λ, V: how they vary together, shrunk to a diagonal by the
share s with which half of the public images makes the other half most probable. Where there are none: brightness and colours
of natural images, whose power falls with the square of the frequency.
Source: shrinkage: Ledoit, Wolf, J. Multivariate Analysis 88 (2004), their share replaced by cross-validation; the power law:
Field, J. Opt. Soc. Am. A 4 (1987).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attacks.coefficients import Cosines

CONTRAST = 0.5
"""Standard deviation of natural pixels in [−1, 1]."""

COLOUR = 0.1
"""Variance of a colour difference in units of that of brightness."""

COUNTS_FOR = 4
"""Images: what the power law counts for beside public ones."""

MOST = 1024
"""Public images that are looked at, evenly spread over all."""

ROUNDING = 1e-12
"""Of a variance, in units of the largest: less is none."""

USUAL = 0.9
"""This share of the images have no larger mean square of w than `Gaussian.usual`."""

SHARES = (1.0, 0.5, 0.3, 0.2, 0.1, 0.05, 0.02)


@dataclass(frozen=True)
class Gaussian:
    """Over the coefficients (n,) of one image in [−1, 1]. directions (n,k), variances (k,) in units of spread²; share: s.

    usual: the mean square of w that images have at most, but for a few: 1 of draws, more of real ones.
    """

    mean: Tensor
    spread: Tensor
    directions: Tensor
    variances: Tensor
    share: float
    usual: float = 1.0

    @staticmethod
    def diagonal(mean: Tensor, spread: Tensor) -> "Gaussian":
        """Of coefficients that do not vary together; (…,n), one row for each image or one for all."""
        nothing = mean.new_zeros(mean.shape[-1], 0)
        return Gaussian(mean, spread, nothing, nothing[0], 1.0)

    @staticmethod
    def of(shape: tuple[int, int, int], basis: Cosines, public: Tensor | None) -> "Gaussian":
        """Of public images (N,C,H,W) in [0, 1]; of natural ones in general where there are none."""
        natural = _natural(shape).to(basis.rows.device).reshape(-1)
        general = Gaussian.diagonal(torch.zeros_like(natural), natural.sqrt())
        if public is None or not len(public):
            return general._to(basis.rows)
        some = public[:: math.ceil(len(public) / MOST)]
        seen = basis.forward(2.0 * some.to(basis.rows) - 1.0).flatten(1).double()
        if len(seen) < 4:
            return general._fitted(seen)._to(basis.rows)
        halves = seen[::2], seen[1::2]
        fits = [(general._fitted(half), other) for half, other in (halves, halves[::-1])]
        scores = [sum(fit._with(share)._log_density(other) for fit, other in fits) for share in SHARES]
        share = SHARES[max(range(len(SHARES)), key=scores.__getitem__)]
        squares = torch.cat([fit._with(share)._draws(other).square().mean(1) for fit, other in fits])
        usual = max(1.0, float(squares.quantile(USUAL)))
        return replace(general._fitted(seen)._with(share), usual=usual)._to(basis.rows)

    def coefficients(self, w: Tensor) -> Tensor:
        """(…,n) of draws w (…,n)."""
        least = math.sqrt(self.share)
        longer = ((1.0 - self.share) * self.variances + self.share).sqrt() - least
        return self.mean + self.spread * (least * w + ((w @ self.directions) * longer) @ self.directions.T)

    def _fitted(self, seen: Tensor) -> "Gaussian":
        """Mean, variances and directions of coefficients (N,n), s still 1; `self` counts for a few images."""
        own = COUNTS_FOR / (COUNTS_FOR + len(seen))
        mean = (1.0 - own) * seen.mean(0)
        off = seen - mean
        spread = ((1.0 - own) * off.square().mean(0) + own * self.spread.square()).sqrt()
        scaled = off / spread / math.sqrt(len(seen))
        variances, among = torch.linalg.eigh(scaled @ scaled.T if len(seen) < seen.shape[1] else scaled.T @ scaled)
        told = variances > ROUNDING * variances[-1]
        variances, directions = variances[told], among[:, told]
        if len(seen) < seen.shape[1]:
            directions = scaled.T @ directions / variances.sqrt()
        return Gaussian(mean, spread, directions, variances, 1.0)

    def _with(self, share: float) -> "Gaussian":
        return replace(self, share=share)

    def _to(self, like: Tensor) -> "Gaussian":
        """Fitted in float64, used in the precision of the search."""
        mean, spread, directions, variances = (
            tensor.to(like) for tensor in (self.mean, self.spread, self.directions, self.variances)
        )
        return Gaussian(mean, spread, directions, variances, self.share, self.usual)

    def _draws(self, seen: Tensor) -> Tensor:
        """w (N,n) of coefficients (N,n)."""
        whitened = (seen - self.mean) / self.spread
        shorter = (self.share / ((1.0 - self.share) * self.variances + self.share)).sqrt() - 1.0
        return (whitened + ((whitened @ self.directions) * shorter) @ self.directions.T) / math.sqrt(self.share)

    def _log_density(self, seen: Tensor) -> float:
        """Of coefficients (N,n), without constants."""
        whitened = (seen - self.mean) / self.spread
        along = whitened @ self.directions
        variances = (1.0 - self.share) * self.variances + self.share
        squares = (whitened.square().sum(1) - along.square().sum(1)) / self.share + (along.square() / variances).sum(1)
        rest = len(self.mean) - len(variances)
        size = self.spread.log().sum() * 2 + variances.log().sum() + rest * math.log(self.share)
        return float(-0.5 * (squares + size).sum())


def _natural(shape: Sequence[int]) -> Tensor:
    """Variances (C,H,W) of coefficients by the power law."""
    channels, height, width = shape
    down, right = (torch.arange(size, dtype=torch.float64) for size in (height, width))
    power = 1.0 / (1.0 + down[:, None].square() + right.square())
    colours = torch.full((channels, 1, 1), COLOUR, dtype=torch.float64)
    colours[0] = 1.0
    found = colours * power
    return found * (CONTRAST**2 * found.numel() / found.sum())

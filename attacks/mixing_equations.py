"""A batch's mixing matrix from what the layers behind a dense layer make of it.

With [weight | bias] = U·S and points P (see disaggregation) the pre-activations are P·T, so the gradients that the known
head would send back are G(P·T), and

    U = G(P·T)ᵀ·P,   P·s = 1      (s the last column of S)

are M·r + r smooth equations for the r² entries of P, whatever the size of the inputs. Levenberg-Marquardt from many starts.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, jvp, vmap

MEMORY = 1 << 25
"""Most numbers in the Jacobians of the starts that run together."""

SMALL = 100
"""Unknowns up to which damped steps are solved by QR."""


@dataclass(frozen=True)
class Equations:
    """basis (M,r), responses (r,M), ones (r,): U, T and s. head: (B,M) -> logits (B,K). labels (B,); B samples in the mean."""

    basis: Tensor
    responses: Tensor
    ones: Tensor
    head: Callable[[Tensor], Tensor]
    labels: Tensor

    def gradients(self, before: Tensor) -> Tensor:
        """∂(mean loss)/∂pre-activation of every sample, (n·r, M), of pre-activations (n·r, M)."""
        repeated = self.labels.repeat(len(before) // len(self.labels))
        if self._plain:
            return (before.softmax(-1) - F.one_hot(repeated, before.shape[1])) / len(self.labels)

        def total(z: Tensor) -> Tensor:
            return F.cross_entropy(self.head(z), repeated, reduction="sum")

        gradient: Tensor = grad(total)(before)
        return gradient / len(self.labels)

    @property
    def _plain(self) -> bool:
        return self.head is identity

    def residual(self, points: Tensor) -> Tensor:
        """(n, M·r + r), in units in which U is 1; points (n, r, r)."""
        count, rank, _ = points.shape
        sent = self.gradients((points @ self.responses).reshape(count * rank, -1)).reshape(count, rank, -1)
        return self._residual(points, sent)

    def _residual(self, points: Tensor, sent: Tensor) -> Tensor:
        rank = points.shape[1]
        matched = (points.mT @ sent - self.basis.T).reshape(len(points), -1) / rank**0.5
        return torch.cat([matched, (points @ self.ones - 1.0) / rank**0.5], 1)

    def linearised(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """The residual and its Jacobian (n, M·r + r, r²)."""
        count, rank, _ = points.shape
        width = self.basis.shape[0]
        before = (points @ self.responses).reshape(count * rank, -1)
        sent = self.gradients(before)

        def along(direction: Tensor) -> Tensor:
            tangent: Tensor = jvp(self.gradients, (before,), (direction.expand_as(before),))[1]
            return tangent

        moved = vmap(along)(self.responses).reshape(rank, count, rank, width)  # [i, n, b, m]
        sent = sent.reshape(count, rank, width)
        # d/dP[b,i] of (PᵀG)[j,m] = δ_ij G[b,m] + P[b,j] · moved[i,b,m]
        jacobian = torch.einsum("nbj,inbm->njmbi", points, moved)
        diagonal = jacobian.diagonal(dim1=1, dim2=4)  # (n, m, b, i)
        diagonal.add_(sent.permute(0, 2, 1)[:, :, :, None])
        top = jacobian.reshape(count, rank * width, rank * rank) / rank**0.5
        each = torch.eye(rank, dtype=points.dtype, device=points.device)
        bottom = (each[:, :, None] * self.ones).reshape(rank, rank * rank).expand(count, -1, -1) / rank**0.5
        return self._residual(points, sent), torch.cat([top, bottom], 1)


def identity(logits: Tensor) -> Tensor:
    """The head of a layer that is the last one."""
    return logits


@dataclass(frozen=True)
class Solved:
    """points (r,r) with the smallest residual, that residual in units of U, and how many starts of its group reached it."""

    points: Tensor
    residual: float
    agreeing: int


def solve(equations: Equations, starts: Tensor, *, steps: int, tolerance: float) -> Solved:
    """Levenberg-Marquardt from all starts (n, r, r), in groups that fit the memory; ends when a group has one at tolerance.

    tolerance: of the residual's norm, U's own norm being 1.
    """
    rank, width = equations.responses.shape
    together = max(1, MEMORY // ((rank * width + rank) * rank * rank))
    best, value, agreeing = starts[0], float("inf"), 0
    for begin in range(0, len(starts), together):
        points, norms = _group(equations, starts[begin : begin + together], steps, tolerance)
        first = int(norms.argmin())
        if float(norms[first]) < value:
            best, value = points[first], float(norms[first])
            agreeing = int((norms < 10.0 * max(value, tolerance)).sum())
        if value <= tolerance:
            break
    return Solved(best, value, agreeing)


def _group(equations: Equations, points: Tensor, steps: int, tolerance: float) -> tuple[Tensor, Tensor]:
    count, rank, _ = points.shape
    residual, jacobian = equations.linearised(points)
    cost = residual.square().sum(1)
    damping = 1e-2 * jacobian.square().sum(1).amax(1)
    factor = torch.full_like(damping, 2.0)
    for _ in range(steps):
        moved = _damped(jacobian, residual, damping)
        trial = points + moved.reshape(count, rank, rank)
        after = equations.residual(trial).square().sum(1)
        expected = cost - (residual + (jacobian @ moved[:, :, None])[:, :, 0]).square().sum(1)
        gain = (cost - after) / expected.clamp_min(1e-300)
        fine = after.isfinite() & (after < cost)
        shrink = (1.0 - (2.0 * gain.clamp(0.0, 1.0) - 1.0) ** 3).clamp_min(1.0 / 3.0)
        shrink = torch.where(gain > 0.9, 0.1 * shrink, shrink)
        damping = torch.where(fine, damping * shrink, damping * factor).clamp(1e-18, 1e12)
        factor = torch.where(fine, 2.0, 2.0 * factor).clamp_max(1e6)
        points = torch.where(fine[:, None, None], trial, points)
        if bool(fine.any()):
            residual, jacobian = equations.linearised(points)
            cost = residual.square().sum(1)
        if float(cost.min()) <= tolerance**2:
            break
    return points, cost.sqrt()


def _damped(jacobian: Tensor, residual: Tensor, damping: Tensor) -> Tensor:
    """argmin ‖residual + J·d‖² + damping·‖d‖², (n, unknowns): by QR where it is small, which loses no digits."""
    unknowns = jacobian.shape[2]
    if unknowns <= SMALL:
        scaled = damping.sqrt()[:, None, None] * torch.eye(unknowns, dtype=jacobian.dtype, device=jacobian.device)
        q, r = torch.linalg.qr(torch.cat([jacobian, scaled], 1))
        right = -(q[:, : jacobian.shape[1]].mT @ residual[:, :, None])
        solved: Tensor = torch.linalg.solve_triangular(r, right, upper=True)[:, :, 0]
        return solved
    gram = jacobian.mT @ jacobian
    gram.diagonal(dim1=1, dim2=2).add_(damping[:, None])
    slope = jacobian.mT @ residual[:, :, None]
    moved: Tensor = torch.linalg.solve_ex(gram, -slope)[0][:, :, 0]
    return moved

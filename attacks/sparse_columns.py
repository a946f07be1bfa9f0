"""The sparsest vectors of a column space: basis @ q with as many exact zeros as can be.

Source: the problem is SPEAR's (Dimitrov et al., NeurIPS 2024, arXiv 2403.03945) and dictionary learning's (Spielman, Wang,
Wright, COLT 2012; SPEAR++, Bakarsky et al., arXiv 2510.24200, for gradients). `sample` is SPEAR's search. `descend` is ours:
reweighted least squares for ‖basis @ q‖₁ under ⟨q_before, q⟩ = 1, all starts at once.
"""

import torch
from torch import Tensor

CHUNK = 1 << 26
"""Most numbers in the largest temporary tensor."""


def descend(basis: Tensor, starts: Tensor, *, steps: int, floor: float) -> Tensor:
    """Local minima of ‖basis @ q‖₁, (n, r) unit rows, from starts (n, r); basis (M, r) orthonormal.

    floor: size of an entry of basis @ q, relative to their root mean square, below which it is noise.
    """
    rows = basis[basis.norm(dim=1) > 0]
    rank = basis.shape[1]
    squares = (rows[:, :, None] * rows[:, None, :]).reshape(len(rows), -1)
    many = max(1, CHUNK // max(len(rows), rank * rank))
    found = []
    for first in range(0, len(starts), many):
        part = starts[first : first + many]
        q = part / part.norm(dim=1, keepdim=True)
        for step in range(steps):
            smoothing = max(0.3 * (floor / 0.3) ** (step / max(1, steps - 1)), floor) / len(rows) ** 0.5
            weights = ((q @ rows.T).square() + smoothing**2).rsqrt()
            weights = weights / weights.amax(1, keepdim=True)
            gram = (weights @ squares).reshape(-1, rank, rank)
            diagonal = gram.diagonal(dim1=1, dim2=2)
            diagonal.add_(1e-14 * diagonal.amax(1, keepdim=True))
            factor, failed = torch.linalg.cholesky_ex(gram)
            moved = torch.cholesky_solve(q[:, :, None], factor)[:, :, 0]
            moved = moved / moved.norm(dim=1, keepdim=True)
            fine = (failed == 0) & moved.isfinite().all(1)
            q = torch.where(fine[:, None], moved, q)
        found.append(q)
    return torch.cat(found) if found else starts


def sample(basis: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """SPEAR's proposals: for each of `count` random sets of r − 1 rows the q that they all annihilate, (n, r) unit rows."""
    rows = basis[basis.norm(dim=1) > 0]
    rank = basis.shape[1]
    if rank == 1:
        return basis.new_ones(1, 1)
    if len(rows) < rank - 1:
        return basis.new_zeros(0, rank)
    order = torch.rand(count, len(rows), generator=generator).argsort(1)[:, : rank - 1].to(basis.device)
    border = torch.randn(count, 1, rank, generator=generator, dtype=torch.float64).to(basis)
    systems = torch.cat([rows[order], border], 1)
    wanted = basis.new_zeros(count, rank, 1)
    wanted[:, -1] = 1.0
    solved, failed = torch.linalg.solve_ex(systems, wanted)
    q = solved[:, :, 0]
    q = q / q.norm(dim=1, keepdim=True)
    kept: Tensor = q[(failed == 0) & q.isfinite().all(1)]
    return kept


def null_of(basis: Tensor, rows: Tensor) -> Tensor:
    """The unit q (n, r) that the chosen rows (n, M) bool of the basis annihilate best; each needs r − 1 of them."""
    rank = basis.shape[1]
    found = [torch.linalg.svd(basis[chosen], full_matrices=int(chosen.sum()) < rank).Vh[-1] for chosen in rows]
    stacked: Tensor = torch.stack(found) if found else basis.new_zeros(0, basis.shape[1])
    return stacked


def unrepeated(columns: Tensor, tolerance: float) -> Tensor:
    """Which of the unit rows (n, r) repeat no earlier one up to sign, (n,) bool."""
    alike = 1.0 - (columns @ columns.T).abs() < tolerance
    first: Tensor = ~torch.tril(alike, diagonal=-1).any(1)
    return first


def halfspaces(points: Tensor, inside: Tensor, *, steps: int = 40, ridge: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Directions p (n, r) with p @ points > 0 exactly where `inside` (n, M) says, and how many points each gets wrong (n,).

    points (r, M). A squared hinge by Newton's method; M > 2r points in general position that were labelled at random can
    hardly ever be split so (Cover 1965), which is what makes 0 wrong points evidence.
    """
    rank, count = points.shape
    if not len(inside):
        return points.new_zeros(0, rank), points.new_zeros(0, dtype=torch.int64)
    left, singular, _ = torch.linalg.svd(points, full_matrices=False)
    whitening = left / singular.clamp_min(1e-12 * singular[0]) * count**0.5
    white = whitening.T @ points
    squares = (white.T[:, :, None] * white.T[:, None, :]).reshape(count, -1)
    damping = ridge * count * torch.eye(white.shape[0], dtype=white.dtype, device=white.device)
    sign = torch.where(inside, 1.0, -1.0).to(white)

    def hinge(p: Tensor) -> Tensor:
        loss: Tensor = (1.0 - sign * (p @ white)).clamp_min(0.0).square().sum(1) + ridge * count * p.square().sum(1)
        return loss

    p = sign @ white.T / count
    best = hinge(p)
    for _ in range(steps):
        short = (sign * (p @ white) < 1.0).to(white)
        curvature = (short @ squares).reshape(len(p), *damping.shape) + damping
        newton = torch.linalg.solve(curvature, ((short * sign) @ white.T)[:, :, None])[:, :, 0]
        moved = p
        for length in (1.0, 0.5, 0.25, 0.1, 0.03):
            trial = p + length * (newton - p)
            value = hinge(trial)
            better = value < best
            best = torch.where(better, value, best)
            moved = torch.where(better[:, None], trial, moved)
        if torch.equal(moved, p):
            break
        p = moved
    wrong: Tensor = (sign * (p @ white) <= 0).sum(1)
    return p @ whitening.T, wrong

"""How much room an image has around it: of two ends of a search that of the lower cost need not be the more probable place.

    −2·log evidence ≈ cost + log det(JᵀJ/σ² + 1)          J: the simulated update by coordinates in which the prior is N(0, 1)

An update is a product of what the network makes of an image and the image itself, so far from the truth large derivatives fit
noise better than the truth does, in a place so narrow that hardly any image is there. Source: Laplace's approximation as in
MacKay, Neural Computation 4 (1992) 415; the log determinant by stochastic Lanczos quadrature: Ubaru, Chen, Saad, SIAM J. Matrix
Anal. Appl. 38 (2017) 1075, Algorithm 1.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fedattack.seeding import derive_generator

PROBES, STEPS = 4, 30
"""Random vectors of the log determinant's estimate, the same for every end, and Lanczos steps with each."""


def log_det(times: Callable[[Tensor], Tensor], like: Tensor, *, probes: int = PROBES, steps: int = STEPS) -> float:
    """log det A of a symmetric positive definite A, from products times(v) = A·v with vectors like `like` (n,)."""
    generator, found = derive_generator(0, "log-det"), 0.0
    for _ in range(probes):
        signs = torch.randint(0, 2, like.shape, generator=generator).to(like) * 2.0 - 1.0
        values, weights = _quadrature(times, signs / signs.norm(), min(steps, len(like)))
        found += len(like) * float((weights * values.clamp_min(torch.finfo(values.dtype).tiny).log()).sum())
    return found / probes


def _quadrature(times: Callable[[Tensor], Tensor], start: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights of Gauss quadrature over A's spectrum as seen from `start`: Lanczos, fully orthogonalised."""
    basis, diagonal, beside = [start], list[Tensor](), list[Tensor]()
    for _ in range(steps):
        image = times(basis[-1])
        diagonal.append(image @ basis[-1])
        known = torch.stack(basis)
        for _ in range(2):  # once leaves rounding
            image = image - (known @ image) @ known
        beside.append(image.norm())
        if float(beside[-1]) <= 1e-10 * float(diagonal[0].abs()):
            break
        basis.append(image / beside[-1])
    size = len(diagonal)
    matrix = torch.diag(torch.stack(diagonal))
    if size > 1:
        off = torch.stack(beside[: size - 1])
        matrix = matrix + torch.diag(off, 1) + torch.diag(off, -1)
    values, vectors = torch.linalg.eigh(matrix)
    return values, vectors[0].square()

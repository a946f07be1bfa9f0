"""What makes conjugate gradients few: JᵀJ of an earlier point of the search, whole, in blocks, or its largest part."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from attacks.conjugate_gradients import Damped
from fedattack.jacobians import Function, Linearised, jacobian_transposed

RENT, LEAST = 8, 32
"""A Jacobian of n columns is formed anew once n / RENT conjugate gradients, or LEAST if that is more, were preconditioned by
the last one: they have then cost about as much as forming it does, of one image (of a batch, image by image, more)."""

LOOSE, TIGHT = 1e-2, 1e-4
"""How exactly preconditioned conjugate gradients solve for a step: the more so the nearer the search is to its end."""

RANK = 128
"""Random vectors of a `Nystrom`; it is made anew once twice as many conjugate gradients were made since the last one."""

Inverse = Callable[[Tensor], Tensor]


@dataclass
class Formed:
    """JᵀJ where a search formed it last, which preconditions the points that follow.

    groups: indices of unknowns, each in one group; of JᵀJ only the blocks within a group are formed then, one after another.
    Images of a batch are such groups: forgetting what two images do to the same equation costs few conjugate gradients.
    Empty: all unknowns are one group.
    alone: for each image of a batch, which have equally many unknowns, one behind the other, a function of its unknowns only,
    whose derivatives are those of all images' function but cheaper. Empty: there are none.
    place: the unknowns there. spent: iterations since then. grams is empty before the first, and where J is not finite or zero.
    """

    groups: Sequence[Tensor] = ()
    alone: Sequence[Function] = ()
    grams: Sequence[Tensor] = field(default=(), init=False)
    place: Tensor | None = field(default=None, init=False)
    spent: int = field(default=0, init=False)

    @property
    def whole(self) -> bool:
        return not self.groups

    def form(self, function: Function, x: Tensor, chunk: int) -> None:
        """In float32: exactly enough for a preconditioner, and two to four times as fast; where that is not enough, as x is."""
        self.grams, self.place, self.spent = (), x, 0
        for at in (x.float(), x):
            grams = [_gram(rows.to(x)) for rows in self.jacobians(function, at, chunk)]
            there = [bool(gram.any()) for gram in grams]
            if all(bool(gram.isfinite().all()) for gram in grams) and (any(there) if at is x else all(there)):
                self.grams = grams
                break

    def inverse(self, damping: float | Tensor, first: int = 0) -> Inverse | None:
        """About (JᵀJ + damping)⁻¹ for the unknowns from `first` on, or None where that is not to be had."""
        if not self.grams:
            return None
        blocks = []
        for group, gram in zip(self._indices(), self.grams, strict=True):
            ours = (group >= first).nonzero()[:, 0]
            damped = gram[ours][:, ours] if len(ours) < len(group) else gram.clone()
            group = group[ours] - first
            damped.diagonal().add_(damping[group] if isinstance(damping, Tensor) else damping)
            factor, failed = torch.linalg.cholesky_ex(damped)
            if int(failed):
                return None
            blocks.append((group, factor))
        return partial(_solved, blocks)

    @property
    def scale(self) -> float:
        """The largest diagonal entry of JᵀJ; 0 where there is none."""
        return max((float(gram.diagonal().max()) for gram in self.grams), default=0.0)

    @property
    def least(self) -> float:
        """So little damping that it only keeps a singular matrix from being one."""
        return 10 * torch.finfo(self.grams[0].dtype).eps * self.scale if self.grams else 0.0

    def solve(
        self,
        local: Linearised,
        gradient: Tensor,
        damping: float | Tensor,
        here: Tensor,
        form: Callable[[], None],
    ) -> Tensor | None:
        """argmin ‖ρ + J·d‖² + Σ damping·d²; form() forms J `here`, which is done where the last one was used long enough."""
        rent = max(LEAST, len(gradient) // RENT)
        precision = max(TIGHT, min(LOOSE, float(local.value.norm())))
        step = None
        for _ in range(2):
            if self.place is not here and (not self.grams or self.spent >= rent):
                form()
            inverse = self.inverse(damping)
            if inverse is None:
                return None
            most = rent if self.place is here else rent - self.spent
            enough = precision**2 * float(gradient @ inverse(gradient))
            found = Damped.of(local, gradient, damping, most, enough, inverse, step)
            self.spent += len(found.lengths)
            step = found.step
            if found.finished:
                break
        return step

    def jacobians(self, function: Function, x: Tensor, chunk: int) -> Iterator[Tensor]:
        """Jᵀ of each group's unknowns, (unknowns, equations), in which TF32 has no part."""
        if self.alone:
            images = zip(self.alone, x.chunk(len(self.alone)), strict=True)
            rows = (_rows(function, image, chunk) for function, image in images)
            yield from rows if self.groups else [_joined(rows, len(x))]
        elif self.groups:
            yield from (_rows(partial(_with, function, x, group), x[group], chunk) for group in self.groups)
        else:
            yield _rows(function, x, chunk)

    def _indices(self) -> Sequence[Tensor]:
        return self.groups or [torch.arange(len(gram), device=gram.device) for gram in self.grams]


def _rows(function: Function, x: Tensor, chunk: int) -> Tensor:
    cudnn = torch.backends.cudnn
    with cudnn.flags(cudnn.enabled, cudnn.benchmark, deterministic=cudnn.deterministic, allow_tf32=False):
        return jacobian_transposed(function, x, chunk)


def _with(function: Function, x: Tensor, group: Tensor, part: Tensor) -> Tensor:
    return function(x.index_put((group,), part))


def _joined(parts: Iterator[Tensor], count: int) -> Tensor:
    """Filled in place: a list of parts would take the memory twice."""
    first = next(parts)
    found, done = first.new_empty(count, first.shape[1]), len(first)
    found[:done] = first
    for part in parts:
        found[done : done + len(part)] = part
        done += len(part)
    return found


def _gram(rows: Tensor) -> Tensor:
    return rows @ rows.T


def solved(factor: Tensor, right: Tensor) -> Tensor:
    """By a Cholesky factor (n, n), of one right side (n,).

    Two triangular solves: torch.cholesky_solve takes twelve times as long for one right side (n = 3,072, torch 2.15, a CPU).
    """
    half = torch.linalg.solve_triangular(factor, right[:, None], upper=False)
    found: Tensor = torch.linalg.solve_triangular(factor.mT, half, upper=True)[:, 0]
    return found


def _solved(blocks: Sequence[tuple[Tensor, Tensor]], right: Tensor) -> Tensor:
    found = torch.empty_like(right)
    for group, factor in blocks:
        found[group] = solved(factor, right[group])
    return found


def plain(vector: Tensor) -> Tensor:
    """No preconditioner at all."""
    return vector


@dataclass
class Nystrom:
    """The largest eigenvalues of JᵀJ, about, where a search without any Jacobian last took products with random vectors.

    Source: Frangella, Tropp and Udell, SIAM J. Matrix Anal. Appl. 44 (2023): Algorithm 2.1, the randomised Nyström
    approximation, and Eq. 1.3, the preconditioner.
    place, spent: as of `Formed`. extremes: see `attacks.least_squares.MatrixFreeLinear`.
    """

    generator: torch.Generator
    extremes: tuple[float, float] = field(default=(0.0, 0.0), init=False)
    vectors: Tensor | None = field(default=None, init=False)
    values: Tensor | None = field(default=None, init=False)
    place: Tensor | None = field(default=None, init=False)
    spent: int = field(default=0, init=False)

    def form(self, local: Linearised, x: Tensor) -> None:
        self.vectors, self.values, self.place, self.spent = None, None, x, 0
        random = torch.randn(len(x), min(RANK, len(x)), generator=self.generator, dtype=x.dtype).to(x.device)
        basis = torch.linalg.qr(random)[0]
        images = torch.stack([local.back(local.times(column)) for column in basis.T], 1)
        shift = torch.finfo(x.dtype).eps * images.norm()
        images = images + shift * basis
        inner = basis.T @ images
        factor, failed = torch.linalg.cholesky_ex(0.5 * (inner + inner.T))
        if int(failed) or not bool(images.isfinite().all()):
            return
        vectors, roots, _ = torch.linalg.svd(
            torch.linalg.solve_triangular(factor, images.T, upper=False).T, full_matrices=False
        )
        self.vectors, self.values = vectors, (roots.square() - shift).clamp_min(0.0)

    def inverse(self, damping: float) -> Inverse:
        """About (JᵀJ + damping)⁻¹, but for a factor; nothing where no products were taken yet."""
        vectors, values = self.vectors, self.values
        if vectors is None or values is None:
            return plain
        shares = (values[-1] + damping) / (values + damping) - 1.0
        return lambda vector: vector + vectors @ (shares * (vectors.T @ vector))

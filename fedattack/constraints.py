"""The linear equations that a client's gradient writes down about a convolution's input: counted, ranked and solved.

Two kinds, for samples x_1 … x_B (C,H,W) with outputs Z_b = W ∗ x_b + b and sensitivities G_b = ∂L/∂Z_b (D,H',W'):

    gradient constraints    Σ_b Σ_ij G_b[d,i,j] · x_b[c, s·i + k − p, s·j + l − p] = ∂L/∂W[d,c,k,l]      (M(G) x_c = y_c)
    weight constraints      (W ∗ x_b)[d,i,j] = Z_b[d,i,j] − b_d        where the output Z_b[d,i,j] is known

Source: Eltaras et al., R-CONV (arXiv 2406.04227) and R-CONV++ (arXiv 2509.18871) for the first, Zhu and Blaschko, R-GAP
(ICLR 2021, arXiv 2010.07733) for the use of both. Everything below them is our own: M(G) falls into one system for each
residue of pixel coordinates modulo the stride, shared by all channels; both kinds are applied and transposed by
convolutions, so large systems need no matrix; weight constraints are preconditioned by their Fourier transform.
All tensors are float64 inside.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input, conv2d_weight

from fedattack.errors import FedattackError, must

Pair = tuple[int, int]

SINGULAR = 1024
"""Unknowns up to which a dense system is solved by its singular values, all of which are then known."""

DENSE = 4352
"""Unknowns up to which a system is solved densely (by QR beyond SINGULAR)."""

SURPLUS = 1.2
"""Weight constraints for each unknown from which large systems are first tried without the costlier gradient constraints."""

PINCHED = 512
"""Open directions up to which inequalities are tried."""

COARSE = 1e-2
"""Share of the inputs' size, and of the narrowest bounds, from which a tolerance no longer tells their values apart."""

ENTRIES = 1 << 27
"""How many numbers a dense system may hold (1 GB in float64)."""


# ------------------------------------------------------------------------------------------------ shapes and counting
@dataclass(frozen=True)
class Convolution:
    """The shape of a Conv2d on inputs (B, channels, height, width) with zero padding; kernel, stride … are (rows, columns)."""

    channels: int
    height: int
    width: int
    filters: int
    kernel: Pair
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1

    @staticmethod
    def of(module: nn.Conv2d, height: int, width: int) -> "Convolution":
        """The shape of a module on inputs of this size. padding "same" must be as wide on either side."""
        kernel, dilation, stride = module.kernel_size, module.dilation, module.stride
        if module.padding == "valid":
            padding = (0, 0)
        elif module.padding == "same":
            total = (dilation[0] * (kernel[0] - 1), dilation[1] * (kernel[1] - 1))
            if total[0] % 2 or total[1] % 2:
                raise FedattackError(must("padding", "as wide on one side as on the other", (module.padding, kernel)))
            padding = (total[0] // 2, total[1] // 2)
        else:
            padding = (int(module.padding[0]), int(module.padding[1]))
        return Convolution(
            module.in_channels, height, width, module.out_channels,
            (kernel[0], kernel[1]), (stride[0], stride[1]), padding, (dilation[0], dilation[1]), module.groups,
        )  # fmt: skip

    def __post_init__(self) -> None:
        if min(self.output) < 1:
            raise FedattackError(must("the output of a convolution", "at least one pixel", self.output))

    @cached_property
    def output(self) -> Pair:
        """(H', W')."""
        rows, columns = (
            (size + 2 * p - d * (k - 1) - 1) // s + 1
            for size, k, s, p, d in zip(
                (self.height, self.width), self.kernel, self.stride, self.padding, self.dilation, strict=True
            )
        )
        return rows, columns

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        return (self.filters, self.channels // self.groups, *self.kernel)

    @property
    def pixels(self) -> int:
        """Unknowns of one channel of one sample."""
        return self.height * self.width

    @property
    def unknowns(self) -> int:
        """Unknowns of one sample."""
        return self.channels * self.pixels

    @property
    def gradient_constraints(self) -> int:
        """Gradient constraints on each channel, which all samples share."""
        return self.filters // self.groups * self.kernel[0] * self.kernel[1]

    @property
    def weight_constraints(self) -> int:
        """Weight constraints on each sample where all outputs are known."""
        return self.filters * self.output[0] * self.output[1]

    @cached_property
    def residues(self) -> list["Residue"]:
        """The independent parts of the gradient constraints, s² of them for stride s."""
        sizes = (self.height, self.width)
        axes = [
            _axis(sizes[a], self.kernel[a], self.stride[a], self.padding[a], self.dilation[a], self.output[a])
            for a in (0, 1)
        ]
        return [Residue(rows, columns) for rows in axes[0] for columns in axes[1]]

    @property
    def unseen(self) -> int:
        """Pixels of a channel that no kernel position covers: no constraint holds them."""
        return sum(int((~part.seen).sum()) for part in self.residues)

    def filters_for_gradients(self, batch: int = 1) -> int | None:
        """D_min: the filters from which gradient constraints are as many as unknowns in every residue class.

        ceil((H/s)(W/s) / ⌊K/s⌋²) where the stride divides the sides; `batch` times the pixels for a batch. None where some
        pixels are seen by no kernel position, whatever the number of filters.
        """
        if self.unseen:
            return None
        return self.groups * max(-(-batch * part.pixels // part.offsets) for part in self.residues if part.pixels)

    def filters_for_weights(self) -> int:
        """The filters from which weight constraints alone are as many as unknowns: C·s² for stride s (R-GAP's counting)."""
        return -(-self.unknowns // (self.output[0] * self.output[1]))


@dataclass(frozen=True, eq=False)
class Axis:
    """One residue class of one axis: its pixels, its kernel offsets, and which output (−1: none) an offset meets them in."""

    pixels: Tensor
    offsets: Tensor
    outputs: Tensor  # (offsets, pixels)


@dataclass(frozen=True, eq=False)
class Residue:
    """Pixels whose padded coordinates have one remainder modulo the stride, and the kernel offsets that see them."""

    rows: Axis
    columns: Axis

    @property
    def pixels(self) -> int:
        return len(self.rows.pixels) * len(self.columns.pixels)

    @property
    def offsets(self) -> int:
        return len(self.rows.offsets) * len(self.columns.offsets)

    @property
    def seen(self) -> Tensor:
        """(rows, columns) bool: pixels that at least one offset sees."""
        return (self.rows.outputs >= 0).any(0)[:, None] & (self.columns.outputs >= 0).any(0)[None]

    @property
    def key(self) -> tuple[tuple[int, ...], ...]:
        """Equal for parts with one and the same matrix."""
        return tuple(tuple(axis.outputs.flatten().tolist()) for axis in (self.rows, self.columns))

    def matrix(self, sensitivity: Tensor) -> Tensor:
        """Rows (filter, offset), columns (sample, pixel) of M(G), from G (B,D,H',W')."""
        padded = F.pad(sensitivity, (0, 1, 0, 1))  # index −1 is the zero that was added
        picked = padded[:, :, self.rows.outputs][..., self.columns.outputs]  # B, D, k, rows, l, columns
        batch, filters = sensitivity.shape[:2]
        return picked.permute(1, 2, 4, 0, 3, 5).reshape(filters * self.offsets, batch * self.pixels)

    def take(self, weight_gradient: Tensor) -> Tensor:
        """The right-hand sides (filters·offsets, channels) out of ∂L/∂W (D,C,K,K)."""
        picked = weight_gradient[:, :, self.rows.offsets][..., self.columns.offsets]
        return picked.permute(0, 2, 3, 1).reshape(-1, weight_gradient.shape[1])

    def put(self, images: Tensor, values: Tensor) -> None:
        """Write a solution (samples·pixels, channels) into images (B,C,H,W)."""
        batch, channels = images.shape[:2]
        block = values.reshape(batch, len(self.rows.pixels), len(self.columns.pixels), channels)
        images[:, :, self.rows.pixels[:, None], self.columns.pixels[None]] = block.permute(0, 3, 1, 2)


def _axis(size: int, kernel: int, stride: int, padding: int, dilation: int, outputs: int) -> list[Axis]:
    found = []
    for remainder in range(stride):
        pixels = torch.tensor([i for i in range(size) if (i + padding) % stride == remainder], dtype=torch.int64)
        offsets = torch.tensor([k for k in range(kernel) if dilation * k % stride == remainder], dtype=torch.int64)
        seen_in = (pixels[None] + padding - dilation * offsets[:, None]) // stride
        found.append(Axis(pixels, offsets, torch.where((seen_in >= 0) & (seen_in < outputs), seen_in, -1)))
    return found


# ------------------------------------------------------------------------------------------------ the two operators
def weight_gradient(shape: Convolution, inputs: Tensor, sensitivity: Tensor) -> Tensor:
    """M(G) x: ∂L/∂W (D,C/groups,K,K) of inputs (B,C,H,W) under sensitivities G (B,D,H',W')."""
    geometry = (shape.stride, shape.padding, shape.dilation, shape.groups)
    found: Tensor = conv2d_weight(inputs, shape.weight_shape, sensitivity, *geometry)  # type: ignore[no-untyped-call]
    return found


def weight_gradient_adjoint(shape: Convolution, gradient: Tensor, sensitivity: Tensor) -> Tensor:
    """M(G)ᵀ y: (B,C,H,W) from y like ∂L/∂W."""
    return input_gradient(shape, gradient, sensitivity)


def output(shape: Convolution, weight: Tensor, inputs: Tensor) -> Tensor:
    """W ∗ x without bias, (B,D,H',W')."""
    return F.conv2d(inputs, weight, None, shape.stride, shape.padding, shape.dilation, shape.groups)


def input_gradient(shape: Convolution, weight: Tensor, sensitivity: Tensor) -> Tensor:
    """∂L/∂x (B,C,H,W) from G = ∂L/∂Z: the transposed convolution, adjoint of `output`."""
    size = (len(sensitivity), shape.channels, shape.height, shape.width)
    geometry = (shape.stride, shape.padding, shape.dilation, shape.groups)
    found: Tensor = conv2d_input(size, weight, sensitivity, *geometry)  # type: ignore[no-untyped-call]
    return found


def gradient_matrix(shape: Convolution, sensitivity: Tensor) -> Tensor:
    """M(G) for one channel (of the first group), dense: rows (filter, k, l), columns (sample, row, column)."""
    batch, filters = len(sensitivity), shape.filters // shape.groups
    rows, columns = shape.kernel
    whole = sensitivity.new_zeros(filters, rows, columns, batch, shape.height, shape.width)
    for part in shape.residues:
        block = part.matrix(sensitivity[:, :filters]).reshape(
            filters, len(part.rows.offsets), len(part.columns.offsets), batch, len(part.rows.pixels), -1
        )
        index = torch.meshgrid(
            part.rows.offsets, part.columns.offsets, part.rows.pixels, part.columns.pixels, indexing="ij"
        )
        row, column, i, j = index
        whole[:, row, column, :, i, j] = block.permute(1, 2, 4, 5, 0, 3)
    return whole.reshape(filters * rows * columns, batch * shape.pixels)


def weight_matrix(shape: Convolution, weight: Tensor) -> Tensor:
    """The convolution itself as a dense matrix (D·H'·W', C·H·W)."""
    eye = torch.eye(shape.unknowns, dtype=weight.dtype, device=weight.device)
    return output(shape, weight, eye.reshape(-1, shape.channels, shape.height, shape.width)).flatten(1).T


# ------------------------------------------------------------------------------------------------ dense systems
@dataclass(frozen=True)
class Spectrum:
    """What a system can determine. rank: singular values above the threshold; sigma_min: the smallest of all, or an
    estimate of it where the system was too large for all singular values (exact: False)."""

    rank: int
    unknowns: int
    sigma_max: float
    sigma_min: float
    exact: bool = True

    @property
    def full(self) -> bool:
        return self.rank == self.unknowns

    @property
    def condition(self) -> float:
        return self.sigma_max / self.sigma_min if self.sigma_min > 0 else math.inf

    def __add__(self, other: "Spectrum") -> "Spectrum":
        """The spectrum of two independent systems side by side."""
        return Spectrum(
            self.rank + other.rank,
            self.unknowns + other.unknowns,
            max(self.sigma_max, other.sigma_max),
            min(self.sigma_min, other.sigma_min),
            self.exact and other.exact,
        )


class Factored:
    """A dense matrix (m,n), factored once, with its spectrum.

    Singular values below `cutoff`·σ_max count as zero: their directions stay at 0 in a solution, which is then the least
    squares solution of least norm. Up to SINGULAR unknowns by singular values; beyond by QR, whose σ_min is estimated by
    inverse iteration, and by the singular values of R where that is below the cutoff.
    """

    spectrum: Spectrum

    def __init__(self, matrix: Tensor, cutoff: float) -> None:
        rows, unknowns = matrix.shape
        self._matrix = matrix
        self._triangle: tuple[Tensor, Tensor] | None = None
        self._svd: tuple[Tensor, Tensor, Tensor] | None = None
        if rows >= unknowns > SINGULAR:
            reflectors, tau = torch.geqrf(matrix)
            triangle = reflectors[:unknowns].triu()
            largest, smallest = _extreme_singular_values(triangle)
            if smallest > cutoff * largest:
                self._triangle = (reflectors, tau)
                self.spectrum = Spectrum(unknowns, unknowns, largest, smallest, exact=False)
                return
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        largest = float(values[0]) if len(values) else 0.0
        rank = int((values > cutoff * largest).sum()) if largest > 0 else 0
        smallest = float(values[-1]) if rows >= unknowns and len(values) else 0.0
        self._svd = (left[:, :rank], values[:rank], right[:rank])
        self.spectrum = Spectrum(rank, unknowns, largest, smallest)

    def solve(self, right: Tensor) -> Tensor:
        """The least-squares solution (n,r) for right-hand sides (m,r), once refined."""
        found = self._apply(right)
        return found + self._apply(right - self._matrix @ found)

    def _apply(self, right: Tensor) -> Tensor:
        if self._svd is not None:
            left, values, directions = self._svd
            return directions.mT @ ((left.mT @ right) / values[:, None])
        assert self._triangle is not None
        reflectors, tau = self._triangle
        unknowns = reflectors.shape[1]
        rotated = torch.ormqr(reflectors, tau, right, transpose=True)[:unknowns]
        found: Tensor = torch.linalg.solve_triangular(reflectors[:unknowns], rotated, upper=True)
        return found

    @property
    def null_space(self) -> Tensor:
        """Orthonormal columns (n, n − rank) that the system does not see."""
        unknowns = self._matrix.shape[1]
        if self._svd is None:
            return self._matrix.new_zeros(unknowns, 0)
        directions = self._svd[2].mT
        if directions.shape[1] == 0:
            return torch.eye(unknowns, dtype=directions.dtype)
        basis: Tensor = torch.linalg.qr(directions, mode="complete").Q
        return basis[:, directions.shape[1] :]


def _extreme_singular_values(triangle: Tensor, iterations: int = 8) -> tuple[float, float]:
    """(largest, smallest) of an upper triangular matrix: power iterations from a fixed start; the smallest from above."""
    unknowns = len(triangle)
    if not triangle.diagonal().abs().min() > 0:
        return float(torch.linalg.matrix_norm(triangle)), 0.0
    start = torch.rand((unknowns, 4), generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 0.5
    high = low = start.to(triangle) / start.norm(dim=0).to(triangle)
    largest = smallest = 0.0
    for _ in range(iterations):
        high = triangle.mT @ (triangle @ high)
        norms = high.norm(dim=0)
        largest, high = float(norms.max()), high / norms
        low = torch.linalg.solve_triangular(
            triangle, torch.linalg.solve_triangular(triangle.mT, low, upper=False), upper=True
        )
        norms = low.norm(dim=0)
        if not bool(norms.isfinite().all()):
            return math.sqrt(largest), 0.0
        smallest, low = 1.0 / float(norms.max()), low / norms
    return math.sqrt(largest), math.sqrt(smallest)


def cutoff_for(rows: int, unknowns: int, accuracy: float) -> float:
    """Singular values below this share of the largest are rounding errors of equations known to `accuracy` (relative)."""
    return max(10.0 * accuracy, max(rows, unknowns, 1) * torch.finfo(torch.float64).eps)


# ------------------------------------------------------------------------------------------------ gradient constraints
@dataclass(frozen=True)
class GradientConstraints:
    """M(G) x = ∂L/∂W. sensitivity G (B,D,H',W'), gradient (D,C/groups,K,K); accuracy: relative, of both."""

    shape: Convolution
    sensitivity: Tensor
    gradient: Tensor
    accuracy: float = torch.finfo(torch.float64).eps

    @property
    def batch(self) -> int:
        return len(self.sensitivity)

    def apply(self, inputs: Tensor) -> Tensor:
        return weight_gradient(self.shape, inputs, self.sensitivity)

    def adjoint(self, gradient: Tensor) -> Tensor:
        return weight_gradient_adjoint(self.shape, gradient, self.sensitivity)

    def residual(self, inputs: Tensor) -> float:
        """‖M(G) x − ∂L/∂W‖ / ‖∂L/∂W‖."""
        return relative(self.apply(inputs) - self.gradient, self.gradient)

    def by_group(self) -> Iterator["GradientConstraints"]:
        """One set of constraints for each group of channels, without groups."""
        shape, groups = self.shape, self.shape.groups
        filters = shape.filters // groups
        alone = Convolution(
            shape.channels // groups, shape.height, shape.width, filters,
            shape.kernel, shape.stride, shape.padding, shape.dilation,
        )  # fmt: skip
        for g in range(groups):
            part = slice(g * filters, (g + 1) * filters)
            yield GradientConstraints(alone, self.sensitivity[:, part], self.gradient[part], self.accuracy)

    @property
    def dense(self) -> bool:
        """Whether every part is small enough for a dense factorisation."""
        filters = self.shape.filters // self.shape.groups
        return all(
            self.batch * part.pixels <= DENSE and filters * part.offsets * self.batch * part.pixels <= ENTRIES
            for part in self.shape.residues
        )

    def matrix(self) -> Tensor:
        """All constraints on all channels as one dense matrix (C/groups·D·K², B·C·H·W), samples outermost in the columns."""
        shape, rows = self.shape, []
        for g, part in enumerate(self.by_group()):
            one = gradient_matrix(part.shape, part.sensitivity).reshape(-1, self.batch, shape.pixels)
            for c in range(part.shape.channels):
                block = one.new_zeros(len(one), self.batch, shape.channels, shape.pixels)
                block[:, :, g * part.shape.channels + c] = one
                rows.append(block.flatten(1))
        return torch.cat(rows)

    def right_side(self) -> Tensor:
        """∂L/∂W in the order of the rows of `matrix`."""
        return torch.cat([p.gradient[:, c].flatten() for p in self.by_group() for c in range(p.shape.channels)])


@dataclass(frozen=True)
class Solved:
    """inputs (B,C,H,W) and what determined them. spectrum: for gradient constraints alone that of one channel of every
    sample (all groups together), else that of all unknowns; residual: relative, of every constraint that was used."""

    inputs: Tensor
    spectrum: Spectrum
    residual: float
    kind: str
    iterations: int = 0
    free: Tensor | None = None  # (k,B,C,H,W), orthonormal: what nothing determines, where it is known


def solve_gradient(constraints: GradientConstraints) -> Solved:
    """Inputs from gradient constraints alone, by one factorisation for each residue class, shared by all channels.

    Directions without a constraint stay 0. Systems beyond DENSE unknowns a class are solved by conjugate gradients.
    """
    if not constraints.dense:
        return solve_iteratively(constraints, None, accuracy=constraints.accuracy)
    shape, batch = constraints.shape, constraints.batch
    inputs = constraints.gradient.new_zeros(batch, shape.channels, shape.height, shape.width)
    spectra: list[Spectrum] = []
    for g, group in enumerate(constraints.by_group()):
        known: dict[tuple[tuple[int, ...], ...], Factored] = {}
        piece = inputs[:, g * group.shape.channels : (g + 1) * group.shape.channels]
        for part in group.shape.residues:
            if not part.pixels:
                continue
            if not part.offsets:
                spectra.append(Spectrum(0, batch * part.pixels, 0.0, 0.0))
                continue
            if part.key not in known:
                matrix = part.matrix(group.sensitivity)
                known[part.key] = Factored(matrix, cutoff_for(len(matrix), matrix.shape[1], constraints.accuracy))
            factored = known[part.key]
            spectra.append(factored.spectrum)
            part.put(piece, factored.solve(part.take(group.gradient)))
    total = spectra[0]
    for spectrum in spectra[1:]:
        total += spectrum
    return Solved(inputs, total, constraints.residual(inputs), "gradient")


# ------------------------------------------------------------------------------------------------ weight constraints
@dataclass(frozen=True)
class WeightConstraints:
    """W ∗ x = target (B,D,H',W') at the outputs where `trust` (like target) is positive; trust also weighs the rows."""

    shape: Convolution
    weight: Tensor
    target: Tensor
    trust: Tensor

    @property
    def batch(self) -> int:
        return len(self.target)

    @property
    def count(self) -> int:
        """Known outputs of all samples."""
        return int((self.trust > 0).sum())

    def apply(self, inputs: Tensor) -> Tensor:
        return self.trust * output(self.shape, self.weight, inputs)

    def adjoint(self, outputs: Tensor) -> Tensor:
        return input_gradient(self.shape, self.weight, self.trust * outputs)

    def right_side(self) -> Tensor:
        return self.trust * torch.where(self.trust > 0, self.target, 0.0)

    def residual(self, inputs: Tensor) -> float:
        right = self.right_side()
        return relative(self.apply(inputs) - right, right)

    def row_norm(self) -> float:
        """Root mean square norm of the rows of known outputs."""
        squares = self.weight.square().sum((1, 2, 3))[None, :, None, None] * self.trust.square()
        return float((squares.sum() / max(1, self.count)).sqrt())


def relative(difference: Tensor, whole: Tensor) -> float:
    """‖difference‖ / ‖whole‖, 0 for nothing over nothing."""
    top, bottom = float(difference.norm()), float(whole.norm())
    return top / bottom if bottom > 0 else (math.inf if top > 0 else 0.0)


def gradient_scale(gradient: GradientConstraints, weights: WeightConstraints) -> float:
    """What gradient constraints are multiplied by, beside weight constraints: their rows then have the same mean norm."""
    rows = float(gradient.sensitivity.square().sum((0, 2, 3)).mean().sqrt())
    return weights.row_norm() / rows if rows > 0 else 1.0


def hybrid_system(gradient: GradientConstraints | None, weights: WeightConstraints) -> tuple[Tensor, Tensor]:
    """Both kinds stacked: dense (rows, B·C·H·W) and right-hand side (rows, 1); gradient rows first."""
    single = weight_matrix(weights.shape, weights.weight)
    rows, right = [], []
    if gradient is not None:
        scale = gradient_scale(gradient, weights)
        rows.append(scale * gradient.matrix())
        right.append(scale * gradient.right_side())
    for b in range(weights.batch):
        trust = weights.trust[b].flatten()
        known = trust > 0
        block = single.new_zeros(int(known.sum()), weights.batch, single.shape[1])
        block[:, b] = trust[known, None] * single[known]
        rows.append(block.flatten(1))
        right.append(weights.right_side()[b].flatten()[known])
    return torch.cat(rows), torch.cat(right)[:, None]


def solve_hybrid(gradient: GradientConstraints | None, weights: WeightConstraints, accuracy: float) -> Solved:
    """Inputs from both kinds of constraints in one least-squares system; gradient None: from weight constraints alone.

    Where each residue class is small enough for its singular values, what gradient constraints determine well is taken from
    them, and only the rest is solved for with the weight constraints; else both are stacked, beyond DENSE unknowns without
    a matrix.
    """
    shape, batch = weights.shape, weights.batch
    kind = "weights" if gradient is None else "hybrid"
    if gradient is not None and (split := split_gradient(gradient)) is not None:
        free = len(split.directions) * shape.channels
        if free <= DENSE and (weights.count + free) * free <= ENTRIES:
            return solve_split(split, weights, accuracy)
    unknowns = batch * shape.unknowns
    count = weights.count + (gradient.gradient.numel() if gradient is not None else 0)
    if unknowns > DENSE or count * unknowns > ENTRIES:
        if gradient is not None and weights.count >= SURPLUS * unknowns:
            alone = solve_iteratively(None, weights, accuracy=accuracy, iterations=800)
            if alone.spectrum.full:  # the gradient is then a check that was not used
                return alone
        return solve_iteratively(gradient, weights, accuracy=accuracy)
    matrix, right = hybrid_system(gradient, weights)
    factored = Factored(matrix, cutoff_for(len(matrix), unknowns, accuracy))
    found = factored.solve(right)
    inputs = found.reshape(batch, shape.channels, shape.height, shape.width)
    return Solved(inputs, factored.spectrum, relative(matrix @ found - right, right), kind)


@dataclass(frozen=True)
class Split:
    """Gradient constraints taken apart by the singular values of their residue classes.

    inputs (B,C,H,W): their solution along directions with σ > share·σ_max. directions (f,B,H,W): the others, orthonormal and
    the same for every channel; sigma (f,) and right (f,C): the equations sigma·z = right that are left on them.
    """

    constraints: GradientConstraints
    inputs: Tensor
    directions: Tensor
    sigma: Tensor
    right: Tensor
    sigma_max: float
    sigma_fixed: float


def share_for(accuracy: float) -> float:
    """Singular values below this share of the largest are better supported by weight constraints."""
    return min(0.1, max(1e-3, 100.0 * math.sqrt(accuracy)))


def split_gradient(constraints: GradientConstraints, share: float | None = None) -> Split | None:
    """See `Split`; None where a residue class has more unknowns than SINGULAR, or channels are in groups."""
    shape, batch = constraints.shape, constraints.batch
    if shape.groups > 1 or any(batch * part.pixels > SINGULAR for part in shape.residues):
        return None
    share = share_for(constraints.accuracy) if share is None else share
    parts = [part for part in shape.residues if part.pixels]
    decomposed: dict[tuple[tuple[int, ...], ...], tuple[Tensor, Tensor, Tensor]] = {}
    for part in parts:
        if part.key not in decomposed:
            decomposed[part.key] = _complete_svd(part.matrix(constraints.sensitivity))
    largest = max((float(values[0]) for _, values, _ in decomposed.values() if len(values)), default=0.0)
    like = constraints.gradient
    inputs = like.new_zeros(batch, shape.channels, shape.height, shape.width)
    directions, sigma, right, smallest = [], [], [], math.inf
    for part in parts:
        left, values, vectors = decomposed[part.key]
        fixed = int((values > share * largest).sum()) if largest > 0 else 0
        components = left.mT @ part.take(constraints.gradient)
        if fixed:
            smallest = min(smallest, float(values[fixed - 1]))
            part.put(inputs, vectors[:fixed].mT @ (components[:fixed] / values[:fixed, None]))
        block = like.new_zeros(batch, len(vectors) - fixed, shape.height, shape.width)
        part.put(block, vectors[fixed:].mT)
        directions.append(block.transpose(0, 1))
        missing = len(vectors) - len(values)
        sigma.append(F.pad(values[fixed:], (0, missing)))
        right.append(F.pad(components[fixed:], (0, 0, 0, missing)))
    return Split(
        constraints, inputs, torch.cat(directions), torch.cat(sigma), torch.cat(right), largest,
        smallest if smallest < math.inf else 0.0,
    )  # fmt: skip


def _complete_svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """left (m,k), values (k,), right (n,n): all right singular vectors, k = min(m,n)."""
    rows, unknowns = matrix.shape
    if not rows:
        eye = torch.eye(unknowns, dtype=matrix.dtype, device=matrix.device)
        return matrix.new_zeros(0, 0), matrix.new_zeros(0), eye
    if rows <= unknowns:
        left, values, right = torch.linalg.svd(matrix, full_matrices=True)
        return left, values, right
    orthogonal, triangle = torch.linalg.qr(matrix)
    left, values, right = torch.linalg.svd(triangle)
    return orthogonal @ left, values, right


def solve_split(split: Split, weights: WeightConstraints | None, accuracy: float) -> Solved:
    """The directions that gradient constraints leave open, from what they still say about them and weight constraints."""
    constraints, shape = split.constraints, split.constraints.shape
    batch, channels, free = constraints.batch, shape.channels, len(split.directions)
    scale = gradient_scale(constraints, weights) if weights is not None else 1.0
    inputs, unknowns = split.inputs, batch * shape.unknowns
    fixed = unknowns - free * channels
    cut = 10.0 * accuracy * split.sigma_max
    heard = split.sigma > cut  # below: rounding errors
    eye = torch.eye(free * channels, dtype=inputs.dtype, device=inputs.device)
    weak = torch.where(heard, split.sigma, 0.0).repeat_interleave(channels)
    rows, right = [(scale * weak[:, None] * eye)[weak > 0]], [scale * split.right.flatten()[weak > 0]]
    if weights is not None:
        known = weights.trust > 0
        rows.append(_responses(split, weights)[:, known].mT)
        right.append((weights.right_side() - weights.apply(inputs))[known])
    matrix, target = torch.cat(rows), torch.cat(right)[:, None]
    left_over = None
    smallest, rank, largest = scale * split.sigma_fixed if fixed else math.inf, fixed, scale * split.sigma_max
    if free:
        factored = Factored(matrix, cutoff_for(len(matrix), matrix.shape[1], accuracy))
        inputs = inputs + _combine(split.directions, factored.solve(target).reshape(free, channels))
        rank += factored.spectrum.rank
        largest, smallest = max(largest, factored.spectrum.sigma_max), min(smallest, factored.spectrum.sigma_min)
        null = factored.null_space
        if 0 < null.shape[1] * unknowns <= ENTRIES // 4:
            left_over = torch.stack([_combine(split.directions, column.reshape(free, channels)) for column in null.mT])
    residuals = [(constraints.residual(inputs), float(constraints.gradient.norm()) * scale)]
    if weights is not None:
        residuals.append((weights.residual(inputs), float(weights.right_side().norm())))
    whole = math.hypot(*(size for _, size in residuals))
    residual = math.hypot(*(part * size for part, size in residuals if size > 0)) / whole if whole > 0 else 0.0
    kind = "hybrid" if weights is not None else "gradient"
    return Solved(inputs, Spectrum(rank, unknowns, largest, smallest, exact=False), residual, kind, free=left_over)


def _combine(directions: Tensor, coefficients: Tensor) -> Tensor:
    """Σ_f directions (f,B,H,W) ⊗ coefficients (f,C) as (B,C,H,W)."""
    return torch.einsum("fbhw,fc->bchw", directions, coefficients)


def _responses(split: Split, weights: WeightConstraints) -> Tensor:
    """trust·(W ∗ x) for every direction on every channel: (f·C, B, D, H', W')."""
    shape = weights.shape
    each = Convolution(
        1, shape.height, shape.width, shape.filters * shape.channels,
        shape.kernel, shape.stride, shape.padding, shape.dilation,
    )  # fmt: skip
    kernels = weights.weight.transpose(0, 1).reshape(each.weight_shape)  # channel outermost
    free, batch = split.directions.shape[:2]
    seen = output(each, kernels, split.directions.reshape(free * batch, 1, shape.height, shape.width))
    seen = seen.reshape(free, batch, shape.channels, shape.filters, *shape.output).transpose(1, 2)
    return (seen * weights.trust).reshape(free * shape.channels, batch, shape.filters, *shape.output)


def pinch(
    solved: Solved,
    low: Tensor,
    high: Tensor,
    below: WeightConstraints | None,
    generator: torch.Generator,
    accuracy: float = torch.finfo(torch.float64).eps,
) -> Solved:
    """Fix what a system leaves open by low ≤ inputs ≤ high (like inputs) and, where `below.trust` > 0, W ∗ x ≤ below.target.

    Linear programs in the open directions, with random objectives and their opposites: where all have one solution it is the
    only one that fits (to `accuracy`), and is returned with full rank, polished on the inequalities that bind. Else `solved`,
    as also where `accuracy` is too coarse to tell solutions apart.
    """
    if solved.free is None or solved.spectrum.full or len(solved.free) > PINCHED:
        return solved
    from scipy.optimize import linprog

    free = solved.free
    rows, limits = [], []
    for bound, sign in ((low, -1.0), (high, 1.0)):
        bounded = bound.isfinite()
        if bool(bounded.any()):
            rows.append(sign * free[:, bounded].mT)
            limits.append(sign * (bound - solved.inputs)[bounded])
    if below is not None and below.count:
        known = below.trust > 0
        rows.append(torch.stack([output(below.shape, below.weight, part)[known] for part in free], 1))
        limits.append((below.target - output(below.shape, below.weight, solved.inputs))[known])
    if not rows:
        return solved
    matrix, limit = torch.cat(rows), torch.cat(limits)
    size, width = float(solved.inputs.abs().max()), high - low
    slack, same = max(1e-9, 30.0 * accuracy) * size, max(1e-5, 5e4 * accuracy) * size
    reached = width[width.isfinite() & (width > 0) & (free.abs() > 1e-9).any(0)]
    narrowest = min([size, *([float(reached.min())] if len(reached) else [])])
    if max(same, 100.0 * slack) > COARSE * narrowest:  # then all solutions would agree
        return solved
    found: list[Tensor] = []
    for _ in range(2):
        objective = torch.randn(len(free), generator=generator, dtype=torch.float64)
        for sign in (1.0, -1.0):
            answer = linprog(
                (sign * objective).numpy(), matrix.cpu().numpy(), (limit + slack).cpu().numpy(), bounds=(None, None)
            )
            if answer.status != 0:
                return solved
            found.append(torch.from_numpy(answer.x).to(matrix))
            if not float((found[-1] - found[0]).abs().max()) <= same:
                return solved
    middle = torch.stack(found).mean(0)
    binding, polished = (matrix @ middle - limit).abs() < same, middle
    for _ in range(20):  # drop those that only seemed to bind
        if int(binding.sum()) < len(free):
            return solved
        polished = torch.linalg.lstsq(matrix[binding], limit[binding, None], driver="gelsd").solution[:, 0]
        gap = (matrix @ polished - limit).abs()
        worst = float(gap[binding].max())
        if worst <= 100.0 * slack:
            break
        binding = binding & (gap < 0.5 * worst)
    outside = float((matrix @ polished - limit).max())
    off = float((matrix[binding] @ polished - limit[binding]).abs().max())
    if not max(outside, off) <= 100.0 * slack:
        return solved
    inputs = solved.inputs + torch.einsum("k,kbchw->bchw", polished, free)
    old = solved.spectrum
    spectrum = Spectrum(old.unknowns, old.unknowns, old.sigma_max, old.sigma_min, exact=False)
    return Solved(inputs, spectrum, solved.residual, "inequalities", solved.iterations)


# ------------------------------------------------------------------------------------------------ large systems
def solve_iteratively(
    gradient: GradientConstraints | None,
    weights: WeightConstraints | None,
    *,
    accuracy: float = torch.finfo(torch.float64).eps,
    iterations: int = 3000,
    tolerance: float = 1e-14,
) -> Solved:
    """Least squares by conjugate gradients on the normal equations, operators applied by convolutions.

    Weight constraints are preconditioned by the inverse of their periodic version, which the Fourier transform makes block
    diagonal; gradient constraints are added to it as a low-rank update (Woodbury) where they are few. The rank is estimated:
    a random input is sent through the same equations, and what does not come back is not determined. Where they are known to
    `accuracy` only (relative), it must also come back with errors of that size, below what a singular value at the cutoff of
    dense systems would make of them. σ_min and σ_max are of the preconditioned system.
    """
    some = gradient if gradient is not None else weights
    assert some is not None
    shape, batch = some.shape, some.batch
    scale = gradient_scale(gradient, weights) if gradient is not None and weights is not None else 1.0
    precondition: Callable[[Tensor], Tensor] = _identity
    if weights is not None:
        precondition = _inverse_periodic(weights)
        if gradient is not None and few(gradient):
            precondition = _woodbury(precondition, gradient, scale)

    def apply(inputs: Tensor) -> list[Tensor]:
        parts = [] if gradient is None else [scale * gradient.apply(inputs)]
        return parts if weights is None else [*parts, weights.apply(inputs)]

    def adjoint(parts: list[Tensor]) -> Tensor:
        found = None if weights is None else weights.adjoint(parts[-1])
        if gradient is not None:
            other = gradient.adjoint(scale * parts[0])
            found = other if found is None else found + other
        assert found is not None
        return found

    def solve(right: list[Tensor], tolerance: float) -> tuple[Tensor, int, tuple[float, float]]:
        start = right[0].new_zeros(batch, shape.channels, shape.height, shape.width)
        return _conjugate_gradients(
            apply, adjoint, right, start, precondition, iterations=iterations, tolerance=tolerance
        )

    right = [] if gradient is None else [scale * gradient.gradient]
    right += [] if weights is None else [weights.right_side()]
    inputs, steps, extremes = solve(right, max(tolerance, accuracy))
    size = math.sqrt(sum(float(part.square().sum()) for part in right))
    left = [a - b for a, b in zip(apply(inputs), right, strict=True)]
    residual = math.sqrt(sum(float(part.square().sum()) for part in left)) / size if size > 0 else 0.0
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(inputs.shape, generator=generator, dtype=torch.float64).to(inputs)
    seen = apply(probe)
    back = solve(seen, 1e-7)[0]
    unknowns = batch * shape.unknowns
    trace = float((probe * back).sum() / probe.square().sum())  # of the projection that equations and solver make
    full = relative(back - probe, probe) < 1e-4
    if full and accuracy > tolerance:
        errors = [torch.randn(part.shape, generator=generator, dtype=torch.float64).to(part) for part in seen]
        errors = [accuracy * float(part.square().mean().sqrt()) * e for part, e in zip(seen, errors, strict=True)]
        noisy = solve([part + e for part, e in zip(seen, errors, strict=True)], accuracy)[0]
        count = sum(part.numel() for part in seen)
        error = math.sqrt(sum(float(e.square().sum()) for e in errors) / count)
        largest = _largest_singular_value(apply, adjoint, probe)
        full = float((noisy - probe).norm()) < 0.5 * error / cutoff_for(count, unknowns, accuracy) / largest
        trace = float((probe * noisy).sum() / probe.square().sum())
    count = (0 if gradient is None else gradient.gradient.numel()) + (0 if weights is None else weights.count)
    rank = unknowns if full else min(unknowns - 1, count, math.floor(unknowns * max(0.0, trace)))
    kind = "hybrid" if gradient is not None and weights is not None else ("weights" if gradient is None else "gradient")
    return Solved(inputs, Spectrum(rank, unknowns, extremes[1], extremes[0], exact=False), residual, kind, steps)


def _largest_singular_value(
    apply: Callable[[Tensor], list[Tensor]], adjoint: Callable[[list[Tensor]], Tensor], start: Tensor, steps: int = 8
) -> float:
    """By power iterations, from below."""
    found, size = start / start.norm(), 0.0
    for _ in range(steps):
        found = adjoint(apply(found))
        size = float(found.norm())
        if not size > 0:
            break
        found = found / size
    return math.sqrt(size)


def few(gradient: GradientConstraints) -> bool:
    """Whether a low-rank update of this size can be held in memory and factored."""
    shape = gradient.shape
    rows = shape.gradient_constraints
    return shape.groups == 1 and rows * shape.channels <= DENSE and rows * gradient.batch * shape.pixels <= ENTRIES // 2


def _woodbury(
    inner: Callable[[Tensor], Tensor], gradient: GradientConstraints, scale: float
) -> Callable[[Tensor], Tensor]:
    """(P + UᵀU)⁻¹ from P⁻¹, with the gradient constraints' rows U: P⁻¹ − P⁻¹Uᵀ(1 + U P⁻¹Uᵀ)⁻¹U P⁻¹."""
    shape, batch, channels = gradient.shape, gradient.batch, gradient.shape.channels
    rows = scale * gradient_matrix(shape, gradient.sensitivity).reshape(-1, batch, shape.height, shape.width)
    count = len(rows)
    core = rows.new_zeros(channels * count, channels * count)
    for c in range(channels):
        for first in range(0, count, 64):
            some = rows[first : first + 64]
            images = rows.new_zeros(len(some), batch, channels, shape.height, shape.width)
            images[:, :, c] = some
            solved = inner(images.flatten(0, 1)).reshape(images.shape)
            begin = c * count + first
            core[begin : begin + len(some)] = torch.einsum("qbchw,nbhw->qcn", solved, rows).flatten(1)
    core = (core + core.mT) / 2 + torch.eye(len(core), dtype=core.dtype, device=core.device)
    factor = torch.linalg.cholesky(core)

    def precondition(inputs: Tensor) -> Tensor:
        ahead = inner(inputs)
        seen = torch.einsum("nbhw,bchw->cn", rows, ahead).reshape(-1, 1)
        weights = torch.cholesky_solve(seen, factor).reshape(channels, count)
        return ahead - inner(torch.einsum("nbhw,cn->bchw", rows, weights))

    return precondition


def _identity(inputs: Tensor) -> Tensor:
    return inputs


def _conjugate_gradients(
    apply: Callable[[Tensor], list[Tensor]],
    adjoint: Callable[[list[Tensor]], Tensor],
    right: list[Tensor],
    start: Tensor,
    precondition: Callable[[Tensor], Tensor],
    *,
    iterations: int,
    tolerance: float,
) -> tuple[Tensor, int, tuple[float, float]]:
    """Preconditioned CGLS, restarted from the true residual where it stalls; (inputs, steps, (σ_min, σ_max) estimates)."""
    found, steps = start, 0
    size = math.sqrt(sum(float(part.square().sum()) for part in right))
    alphas: list[float] = []
    betas: list[float] = []
    before = math.inf
    while steps < iterations:
        residual = [b - a for a, b in zip(apply(found), right, strict=True)]
        now = math.sqrt(sum(float(part.square().sum()) for part in residual))
        if now <= tolerance * size or now > 0.5 * before:
            break
        before = now
        slope = adjoint(residual)
        ahead = precondition(slope)
        power = float((slope * ahead).sum())
        direction, first = ahead, power
        record = not alphas
        while steps < iterations and power > tolerance**2 * first and power > 0:
            image = apply(direction)
            bend = sum(float(part.square().sum()) for part in image)
            if not bend > 0:
                break
            step = power / bend
            found = found + step * direction
            residual = [r - step * i for r, i in zip(residual, image, strict=True)]
            slope = adjoint(residual)
            ahead = precondition(slope)
            fresh = float((slope * ahead).sum())
            if record:
                alphas.append(step)
                betas.append(fresh / power)
            direction = ahead + (fresh / power) * direction
            power = fresh
            steps += 1
            if math.sqrt(sum(float(part.square().sum()) for part in residual)) <= 0.1 * tolerance * size:
                break
    return found, steps, _lanczos_extremes(alphas, betas)


def _lanczos_extremes(alphas: list[float], betas: list[float]) -> tuple[float, float]:
    """Extreme singular values seen by conjugate gradients (of the preconditioned system)."""
    if not alphas:
        return 0.0, 0.0
    from scipy.linalg import eigvalsh_tridiagonal

    diagonal = [1 / alphas[0]] + [1 / alphas[i] + betas[i - 1] / alphas[i - 1] for i in range(1, len(alphas))]
    beside = [math.sqrt(betas[i]) / alphas[i] for i in range(len(alphas) - 1)]
    values = eigvalsh_tridiagonal(diagonal, beside)
    return math.sqrt(max(0.0, float(values[0]))), math.sqrt(max(0.0, float(values[-1])))


def _inverse_periodic(weights: WeightConstraints, damping: float = 1e-5) -> Callable[[Tensor], Tensor]:
    """(WᵀW + damping)⁻¹ for the convolution on a torus: block diagonal after a Fourier transform of each phase.

    The input is cut into its s² phases (pixels with one residue modulo the stride), which the convolution mixes without a
    stride; at each frequency that is a (D, C·s²) matrix. Groups are not split: zeros stand in the weight.
    """
    shape = weights.shape
    (sh, sw), (ph, pw), (dh, dw) = shape.stride, shape.padding, shape.dilation
    rows, columns = -(-shape.height // sh), -(-shape.width // sw)
    weight = weights.weight
    if shape.groups > 1:
        full = weight.new_zeros(shape.filters, shape.channels, *shape.kernel)
        d, c = shape.filters // shape.groups, shape.channels // shape.groups
        for g in range(shape.groups):
            full[g * d : (g + 1) * d, g * c : (g + 1) * c] = weight[g * d : (g + 1) * d]
        weight = full
    phases = weight.new_zeros(shape.filters, shape.channels, sh, sw, rows, columns)
    for k in range(shape.kernel[0]):
        for m in range(shape.kernel[1]):
            (i, a), (j, b) = divmod(dh * k - ph, sh), divmod(dw * m - pw, sw)
            phases[:, :, a, b, -i % rows, -j % columns] += weight[:, :, k, m]
    transfer = torch.fft.rfft2(phases).flatten(1, 3).permute(2, 3, 0, 1)  # rows, frequencies, D, C·s²
    trust = float(weights.trust.square().mean())
    gram = trust * transfer.mH @ transfer
    size = gram.shape[-1]
    largest = float(gram.diagonal(dim1=-2, dim2=-1).real.max())
    factor = torch.linalg.cholesky(gram + damping * largest * torch.eye(size, dtype=gram.dtype, device=gram.device))

    def precondition(inputs: Tensor) -> Tensor:
        batch, channels = inputs.shape[:2]
        padded = F.pad(inputs, (0, columns * sw - shape.width, 0, rows * sh - shape.height))
        cut = padded.reshape(batch, channels, rows, sh, columns, sw).permute(0, 1, 3, 5, 2, 4)
        seen = torch.fft.rfft2(cut).reshape(batch, size, rows, -1).permute(2, 3, 1, 0)
        solved = torch.cholesky_solve(seen, factor).permute(3, 2, 0, 1)
        back: Tensor = torch.fft.irfft2(solved.reshape(batch, channels, sh, sw, rows, -1), s=(rows, columns))
        joined = back.permute(0, 1, 4, 2, 5, 3).reshape(batch, channels, rows * sh, columns * sw)
        return joined[:, :, : shape.height, : shape.width]

    return precondition

"""From the gradient of one dense layer over a batch to the samples: weight = Δᵀ·X, bias = Δᵀ·1, and what else is known.

The singular value decomposition [weight | bias] = U·S (U orthonormal (M,r), S (r,D+1)) leaves an unknown r×r mixture:

    Δᵀ = U·Q,   [X | 1] = P·S,   P = Q⁻¹

A column q of Q is one sample's gradient, a row p of P is one sample's input. Nothing of the size of an image is left in the
search: the layer's pre-activations are P·T with T = S·[W | c]ᵀ (r,M). What tells right columns from wrong ones:

- after a ReLU, U·q is exactly zero where the sample's pre-activation is not positive, and only there (SPEAR);
- a neuron that one sample alone switches on has that sample's p as its row of U;
- edges of different photographs are almost independent (the Cocktail Party attack works on pixels, which are not);
- in front of a known head, Δ is a function of P·T: as many equations as U has entries for r² unknowns.

Every sample that is called exact is certified by the layer's own data: its gradient's zeros are its pre-activation's signs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from attacks.independent_components import differences, unmix
from attacks.mixing_equations import Equations, identity, solve
from attacks.sparse_columns import descend, halfspaces, null_of, sample, unrepeated
from fedattack.errors import FedattackError, NotApplicable, must, one_of

METHODS = ("exclusive", "independent", "descent", "sampling", "equations")
"""exclusive: neurons of one sample. independent: independent components, and the signs they predict. descent: local minima
of ‖U·q‖₁. sampling: SPEAR's own search. equations: a known head's, solved for the mixture."""

NOISE = 0.02
"""Noise in a typical entry of a gradient, relative to their size, beyond which zeros cannot be told from small entries."""

NOISELESS = 1e-5
"""Noise up to which single samples are certified; beyond it all of them are, or none."""

MOST = 512
"""Proposals polished at once, those with the most zeros first."""

WORK = 1 << 27
"""Most multiplications of one step of all descents together: large batches get fewer starts."""

LARGEST = 40
"""Samples up to which the equations of a known head are solved: their Jacobian has samples² columns."""


MISFITS = 0.02
"""Share of neurons that a column's zeros may have on the wrong side: those whose gradient vanishes for another reason."""


@dataclass(frozen=True)
class DenseLayer:
    """A dense layer W (M,D), c (M,) as the client received it, and what is known about its surroundings.

    activation: what follows it, named as in fedattack.models.layers, or "softmax" where it is the last layer. shape:
    (C,H,W) where an input is a flattened picture or feature map. head: logits (B,K) from pre-activations (B,M), in any
    floating-point type, twice differentiable; not needed for "relu", and the identity for "softmax".
    """

    weight: Tensor
    bias: Tensor
    activation: str = "relu"
    shape: tuple[int, int, int] | None = None
    head: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class Disaggregated:
    """Samples of a batch, certain ones first: inputs (B,D), gradients (B,M) of the mean loss, float64.

    weight = gradients.T @ inputs and bias = gradients.sum(0), up to `residual` (relative). exact: how many samples are
    certified by the data. method: what found them. diagnostics: rank, singular values' spread, noise, proposals tried.
    """

    inputs: Tensor
    gradients: Tensor
    residual: float
    exact: int
    method: str
    diagnostics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Factored:
    """[weight | bias] = basis·mixed up to noise: basis (M,r) orthonormal, mixed (r,D+1), its row norms descending.

    noise: standard deviation of an entry of [weight | bias]. responses: mixed·[W | c]ᵀ (r,M).
    """

    basis: Tensor
    mixed: Tensor
    singular: Tensor
    noise: float
    responses: Tensor
    excess: float

    @property
    def rank(self) -> int:
        return len(self.singular)

    def tolerance(self, columns: Tensor) -> Tensor:
        """Entries of basis @ q that may be zero, (n, 1), for columns (n, r)."""
        spread = (columns / self.singular).norm(dim=1, keepdim=True)
        size = columns.norm(dim=1, keepdim=True) / len(self.basis) ** 0.5
        allowed: Tensor = (30.0 * self.noise * spread).maximum(1e-9 * size)
        return allowed

    def points(self, directions: Tensor) -> Tensor:
        """Rows of P from their directions (n, r): scaled so that the last entry of p @ mixed is 1. Bad ones are dropped."""
        scale = directions @ self.mixed[:, -1]
        fine = scale.abs() > 1e-9 * directions.norm(dim=1) * self.singular[0]
        return directions[fine] / scale[fine, None]


def factor(weight: Tensor, bias: Tensor, batch: int | None, layer: DenseLayer) -> Factored:
    """The low-rank form of a layer's gradient. Raises NotApplicable where its rank contradicts the batch size."""
    both = torch.cat([weight.double(), bias.double()[:, None]], 1)
    if not bool(both.isfinite().all()) or not float(bias.abs().max()) > 0:
        raise NotApplicable("the layer's gradient is zero or not finite: nothing of it saw a sample")
    left, singular, right = torch.linalg.svd(both, full_matrices=False)
    epsilon = torch.finfo(weight.dtype).eps
    rounding = float(4.0 * epsilon * singular[0])
    numerical = int((singular > 1e3 * rounding).sum())
    most = len(singular)
    if batch is None:
        if numerical == most:
            raise NotApplicable(f"the layer's gradient has full rank {most}: the batch is larger, or there is noise")
        batch = numerical
    beyond = float(singular[batch]) if batch < most else 0.0
    if batch < most and batch < numerical < most and beyond > 1e-2 * float(singular[batch - 1]):
        raise NotApplicable(f"a batch of {batch} cannot give the layer's gradient its rank of {numerical}")
    floor = max(beyond, rounding)
    rank = _usable(singular, min(batch, most), floor)
    mixed = singular[:rank, None] * right[:rank]
    whole = torch.cat([layer.weight.double(), layer.bias.double()[:, None]], 1).to(both.device)
    return Factored(
        basis=left[:, :rank],
        mixed=mixed,
        singular=singular[:rank],
        noise=floor / (both.shape[0] ** 0.5 + both.shape[1] ** 0.5),
        responses=mixed @ whole.T,
        excess=beyond / float(singular[rank - 1]),
    )


def _usable(singular: Tensor, batch: int, floor: float) -> int:
    """How many of the first `batch` singular values are signal.

    Those below a gap are not where the last one is as small as what lies beyond the batch: some samples sent nothing.
    Otherwise all are, noise or not.
    """
    above = singular[:batch]
    steps = above[:-1] / above[1:].clamp_min(1e-300)
    if float(above[-1]) < 3.0 * floor and len(steps) and float(steps.max()) > 1e3:
        return int(steps.argmax()) + 1
    return batch


def disaggregate(
    weight: Tensor,
    bias: Tensor,
    batch: int | None,
    *,
    layer: DenseLayer,
    generator: torch.Generator,
    methods: Sequence[str] | str = "auto",
    labels: Tensor | None = None,
    rounds: int = 6,
    starts: int = 512,
    samples: int = 20_000,
    told: Callable[[int, int, int], None] = lambda done, rounds, found: None,
) -> Disaggregated:
    """Inputs and gradients of every sample from a dense layer's gradient, weight (M,D) and bias (M,), of the mean loss.

    batch: how many samples, or None: as many as the rank says. Give the tensors in the precision in which they arrived: their
    type says how exact they are. methods: names of METHODS, or "auto": all that fit the layer. labels (B,), in any order, or
    None: guessed where they are needed. rounds: how often what was found is taken out and the rest searched again; starts,
    samples: how many descents and SPEAR proposals a round. `told` hears of rounds done and samples certified. Samples that
    are not found are estimated, see `Disaggregated.exact`. Raises NotApplicable where the rank contradicts the batch size.
    """
    chosen = _chosen(methods, layer, labels)
    if "equations" in chosen and layer.head is None and layer.activation != "softmax":
        raise NotApplicable(
            f"the layers behind ({layer.activation}) are not known as a function: they give no equations"
        )
    parts = factor(weight, bias, batch, layer)
    wanted = batch or parts.rank
    if wanted == 1:
        alone = _single(weight.double(), bias.double(), parts)
        told(rounds, rounds, alone.exact)
        return alone
    search = _Search(parts, layer, generator)
    sparse = tuple(name for name in chosen if name != "equations" and layer.activation == "relu")
    if sparse and search.floor < NOISE:
        search.by_sparsity(sparse, rounds, starts, samples, told)
    elif "independent" in chosen:
        search.guess = search.independent(None)
        search.method = "independent"
    if "equations" in chosen and search.trusted < parts.rank == wanted <= LARGEST:
        search.by_equations(labels, rounds)
    told(rounds, rounds, search.trusted)
    return search.result(weight.double(), bias.double(), wanted)


def _chosen(methods: Sequence[str] | str, layer: DenseLayer, labels: Tensor | None) -> tuple[str, ...]:
    if methods == "auto":
        solvable = layer.activation == "softmax" or (layer.head is not None and labels is not None)
        sparse = ("exclusive", "independent", "descent") if layer.activation == "relu" else ("independent",)
        return (*sparse, "equations") if solvable else sparse
    named = (methods,) if isinstance(methods, str) else tuple(methods)
    for name in named:
        if name not in METHODS:
            raise FedattackError(one_of("method", METHODS, name))
    if not named:
        raise FedattackError(must("methods", f"some of {', '.join(METHODS)}", named))
    return named


def _single(weight: Tensor, bias: Tensor, parts: Factored) -> Disaggregated:
    """One sample: x = dW/db by least squares over all rows."""
    inputs = (bias @ weight / bias.square().sum())[None]
    residual = float((weight - bias[:, None] * inputs).norm() / weight.norm())
    return Disaggregated(inputs, bias[None], residual, int(parts.excess < NOISELESS), "division", _figures(parts))


def _figures(parts: Factored) -> dict[str, float]:
    return {
        "rank": float(parts.rank),
        "condition": float(parts.singular[0] / parts.singular[-1]),
        "excess_rank": parts.excess,
    }


class _Search:
    """What is known so far about one layer's samples."""

    def __init__(self, parts: Factored, layer: DenseLayer, generator: torch.Generator) -> None:
        self.parts = parts
        self.layer = layer
        self.generator = generator
        self.columns = parts.basis.new_zeros(0, parts.rank)  # unit rows: candidates for columns of Q
        self.certain = self.columns  # those that are certified, scaled
        self.points: Tensor | None = None  # (r, r): rows of P, where all are certified or best guesses
        self.guess: Tensor | None = None
        self.trusted = 0
        self.tried = 0
        self.figures: dict[str, float] = {}
        self.method = "none"

    # ------------------------------------------------------------------------------------------- sparse columns
    def by_sparsity(
        self,
        chosen: tuple[str, ...],
        rounds: int,
        starts: int,
        samples: int,
        told: Callable[[int, int, int], None],
    ) -> None:
        rank, basis = self.parts.rank, self.parts.basis
        known = self.columns
        for turn in range(1, rounds + 1):
            for method in chosen:
                if method == "exclusive":
                    if turn > 1:
                        continue
                    self._add(self._predicted(self._exclusive()))
                elif method == "independent":
                    points = self.independent(known)
                    self.guess = points if self.guess is None or len(points) == rank else self.guess
                    self._add(self._predicted(points))
                elif method == "descent":
                    live = basis[basis.norm(dim=1) > 0]
                    many = max(8, min(starts, WORK // (len(live) * rank**2)))
                    begin = live[torch.randperm(len(live), generator=self.generator)[:many].to(live.device)]
                    if turn > 1:
                        begin = torch.randn(many, rank, generator=self.generator, dtype=torch.float64).to(basis)
                    self._add(descend(basis, begin, steps=40, floor=self.floor))
                else:
                    self._add(sample(basis, samples, self.generator))
                known = self._selected()
                agreed = self._certify(known)
                if self.trusted == rank:
                    self.method = method
                    return
                if agreed is not None and bool(agreed.any()):
                    known = known[agreed]
            if turn < rounds:
                told(turn, rounds, self.trusted)
        self._complete(known)

    @property
    def floor(self) -> float:
        """Size of the noise in a typical entry of basis @ q, relative to that of the entries."""
        spread = float((1.0 / self.parts.singular).square().mean().sqrt())
        relative: float = self.parts.noise * spread * len(self.parts.basis) ** 0.5
        return max(1e-9, relative)

    def _exclusive(self) -> Tensor:
        """Points from pairs of rows of the basis that are parallel: neurons that one sample alone switches on."""
        parts = self.parts
        norms = parts.basis.norm(dim=1, keepdim=True)
        rows = (parts.basis / norms)[norms[:, 0] > 1e-6 * norms.max()]
        agree = 1.0 - (rows @ rows.T).abs() < max(1e-9, 1e2 * self.floor**2)
        agree.fill_diagonal_(False)
        shared = rows[agree.any(1)]
        return parts.points(shared[unrepeated(shared, 1e-6)])

    def independent(self, known: Tensor | None) -> Tensor:
        """Points (n, r) by independent components of what is left when the known columns' samples are taken out.

        A p with p·q = 0 for every known q mixes the other samples only.
        """
        parts = self.parts
        space = torch.eye(parts.rank, dtype=torch.float64, device=parts.basis.device)
        if known is not None and len(known):
            space = torch.linalg.svd(known).Vh[len(known) :]
        signals = (space @ parts.mixed)[:, :-1]
        if self.layer.shape is not None and min(self.layer.shape[1:]) > 1:
            signals = differences(signals.reshape(len(signals), *self.layer.shape))
        if len(signals) < 2:
            return parts.points(space)
        centred = signals - signals.mean(1, keepdim=True)
        singular = torch.linalg.svdvals(centred)
        if len(singular) < len(signals) or float(singular[-1]) < 1e-9 * float(singular[0]):
            return parts.points(space)
        unmixing = unmix(signals, iterations=300, tolerance=1e-7, generator=self.generator)
        return parts.points(unmixing @ space)

    def _predicted(self, points: Tensor) -> Tensor:
        """Columns from points: where the pre-activation is most negative, the column's gradient must vanish."""
        parts = self.parts
        if not len(points):
            return self.columns[:0]
        live = parts.basis.norm(dim=1) > 0
        order = (points @ parts.responses)[:, live].argsort(1)
        rows = torch.arange(len(live), device=live.device)[live]
        begins = []
        for share in (0.15, 0.3):
            count = min(len(rows), max(parts.rank + 2, int(share * len(rows))))
            mask = torch.zeros(len(points), len(live), dtype=torch.bool, device=live.device)
            mask.scatter_(1, rows[order[:, :count]], True)
            begins.append(null_of(parts.basis, mask))
        begin = torch.cat(begins)
        return torch.cat([begin, descend(parts.basis, begin, steps=60, floor=self.floor)])

    def _add(self, proposals: Tensor) -> None:
        """Take in the proposals that have more zeros than r − 1 rows can force, each polished on its own zeros.

        The smaller part of the nearly zero entries is used first: one small entry that is no zero would spoil it.
        """
        parts, rank = self.parts, self.parts.rank
        self.tried += len(proposals)
        if len(self.columns):
            proposals = proposals[(proposals @ self.columns.T).abs().amax(1) < 1.0 - 1e-6]
        live = parts.basis.norm(dim=1) > 0
        values = (proposals @ parts.basis.T).abs()
        near = (values < parts.tolerance(proposals).clamp_min(1e-3 / values.shape[1] ** 0.5)) & live
        enough = near.sum(1) >= rank + 2
        best = near.sum(1).where(enough, -1).argsort(descending=True, stable=True)[: min(MOST, int(enough.sum()))]
        proposals, near, values = proposals[best], near[best], values[best]
        alone = unrepeated(proposals, 1e-6)
        proposals, near, values = proposals[alone], near[alone], values[alone]
        if not len(proposals):
            return
        counts = (0.6 * near.sum(1)).long().clamp_min(rank - 1)
        place = values.where(near, torch.inf).argsort(1).argsort(1)
        polished = null_of(parts.basis, place < counts[:, None])
        near = self._zeros(polished) & live
        enough = near.sum(1) >= rank + 2
        if bool(enough.any()):
            polished = torch.cat([self.columns, null_of(parts.basis, near[enough])])
            self.columns = polished[unrepeated(polished, 1e-7)]

    def _zeros(self, columns: Tensor) -> Tensor:
        return (columns @ self.parts.basis.T).abs() < self.parts.tolerance(columns)

    def _selected(self) -> Tensor:
        """The sparsest linearly independent candidates whose zeros some point can explain.

        A mixture of two samples has fewer zeros than either, and hardly ever those of a half-space.
        """
        pool = self.columns
        if not len(pool):
            return pool
        live = self.parts.basis.norm(dim=1) > 0
        zero = self._zeros(pool)
        _, wrong = halfspaces(self.parts.responses[:, live], ~zero[:, live])
        fine = wrong <= MISFITS * int(live.sum())
        merit = zero.sum(1) - 8 * wrong
        pool = pool[fine][merit[fine].argsort(descending=True, stable=True)]
        taken: list[Tensor] = []
        span = pool.new_zeros(self.parts.rank, 0)
        for column in pool:
            rest = column - span @ (span.T @ column)
            rest = rest - span @ (span.T @ rest)
            if float(rest.norm()) > 1e-4:
                taken.append(column)
                span = torch.cat([span, (rest / rest.norm())[:, None]], 1)
                if len(taken) == self.parts.rank:
                    break
        return torch.stack(taken) if taken else pool[:0]

    def _certify(self, columns: Tensor) -> Tensor | None:
        """With r columns the points follow; which samples' zeros and signs agree, (r,) bool. Keeps the points if it is best."""
        if len(columns) < self.parts.rank:
            return None
        points = torch.linalg.inv(columns.T)
        points = points / (points @ self.parts.mixed[:, -1])[:, None]
        if not bool(points.isfinite().all()):
            return None
        agreed = self._agree(columns, points)
        if self.floor > NOISELESS and not bool(agreed.all()):
            agreed = torch.zeros_like(agreed)  # a slightly wrong column would go unnoticed in the others' points
        if self.points is None or int(agreed.sum()) >= self.trusted:
            order = agreed.long().argsort(descending=True, stable=True)
            self.points, self.trusted = points[order], int(agreed.sum())
        return agreed

    def _agree(self, columns: Tensor, points: Tensor) -> Tensor:
        """For each pair of a column and a point, (n, r) each: is it a sample? (n,) bool."""
        before = points @ self.parts.responses
        clear = before.abs() > 1e-3 * before.square().mean(1, keepdim=True).sqrt()
        zero = self._zeros(columns)
        off, on = (before < 0) & clear, (before > 0) & clear
        live = self.parts.basis.norm(dim=1) > 0
        enough = ((off & live).sum(1) >= self.parts.rank + 2) & (clear.sum(1) >= 2 * self.parts.rank + 16)
        agreed: Tensor = enough & ~(off & ~zero).any(1) & (2 * (on & zero).sum(1) <= on.sum(1))
        return agreed

    def _complete(self, known: Tensor) -> None:
        """Best points where not all columns are certain.

        A known column fixes its point but for a mixture of the unknown samples, and the signs of its pre-activations bound
        that; unknown samples are the independent components of what is left.
        """
        parts, rank = self.parts, self.parts.rank
        self.method = "partial" if self.trusted or len(known) else "independent" if self.guess is not None else "none"
        if self.trusted or not len(known) or len(known) == rank:
            return
        live = parts.basis.norm(dim=1) > 0
        free = torch.linalg.svd(known).Vh[len(known) :]
        firm = torch.linalg.pinv(known).T
        on = ~self._zeros(known)[:, live]
        found = []
        for one, active in zip(firm, on, strict=True):
            open_to = torch.cat([one[None], free])
            weights, _ = halfspaces(open_to @ parts.responses[:, live], active[None])
            found.append(weights[0] @ open_to)
        self.guess = torch.cat([parts.points(torch.stack(found)), parts.points(self.independent(known))])

    # ------------------------------------------------------------------------------------------- a known head
    def by_equations(self, labels: Tensor | None, rounds: int) -> None:
        """Points for which the head sends back what was sent; certain where they explain it down to its noise."""
        parts, rank = self.parts, self.parts.rank
        head = self.layer.head or identity
        noise = parts.noise * len(parts.basis) ** 0.5 * float((1.0 / parts.singular).norm())
        tolerance = max(1e-10, 10.0 * noise)
        best = None
        for classes in self._label_sets(labels, head):
            equations = Equations(parts.basis, parts.responses, parts.mixed[:, -1], head, classes)
            starts = self._starts(equations)
            solved = solve(equations, starts[: 1 + len(starts) // 4], steps=100, tolerance=tolerance)
            if solved.residual > tolerance:
                solved = solve(equations, starts, steps=30 * rounds, tolerance=tolerance)
            if best is None or solved.residual < best.residual:
                best = solved
            if best.residual <= tolerance:
                break
        if best is None:
            return
        self.figures |= {"equations_residual": best.residual, "starts_agreeing": float(best.agreeing)}
        scaled = parts.points(best.points)
        if len(scaled) == rank and (best.residual <= tolerance < 0.05 or self.guess is None):
            self.points, self.method = scaled, "equations"
            self.trusted = rank if best.residual <= tolerance < 0.05 else 0

    def _label_sets(self, labels: Tensor | None, head: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """Labels to try: the given ones, or for a last layer n = B·(p̄ − ∂L/∂c) with some guesses of the mean output p̄."""
        parts = self.parts
        if labels is not None:
            return [labels.to(parts.basis.device)]
        if head is not identity:
            raise NotApplicable("labels must be known to use the equations of the layers behind this one")
        bias = parts.basis @ parts.mixed[:, -1]
        means = [torch.full_like(bias, 1.0 / len(bias)), self.layer.bias.double().to(bias).softmax(0)]
        if self.guess is not None:
            means.insert(0, (self.guess @ parts.responses).softmax(1).mean(0))
        sets: list[Tensor] = []
        for mean in means:
            classes = counted(mean - bias, parts.rank)
            if not any(torch.equal(classes, other) for other in sets):
                sets.append(classes)
        return sets

    def _starts(self, equations: Equations) -> Tensor:
        """Matrices P (n, r, r), best first: from guessed pre-activations, and from independent components."""
        parts, rank = self.parts, self.parts.rank
        classes = equations.labels
        most = max(4, min(64, 4096 // rank**2))
        if equations.head is identity:
            count = torch.bincount(classes, minlength=len(parts.basis)).double() / len(classes)
            mean = (parts.basis @ parts.mixed[:, -1] + count).clamp_min(1e-6).log()
            spread = torch.linspace(0.1, 2.0, most, dtype=torch.float64)[:, None, None]
            drawn = torch.randn(most, rank, len(mean), generator=self.generator, dtype=torch.float64)
            before = mean + (spread * drawn).to(mean)
        else:
            rows = parts.points(parts.basis) @ parts.responses
            picked = torch.randint(len(rows), (most, rank), generator=self.generator).to(rows.device)
            before = rows.clamp(*rows.flatten().quantile(rows.new_tensor([0.05, 0.95])))[picked]
        sent = equations.gradients(before.reshape(most * rank, -1)).reshape(most, rank, -1)
        columns = parts.basis.T @ sent.mT  # (n, r, B): Q of the guess
        points, failed = torch.linalg.inv_ex(columns)
        points = points[failed == 0]
        if self.guess is not None and len(self.guess) == rank:
            points = torch.cat([self._labelled(self.guess, equations)[None], points])
        scale = points @ parts.mixed[:, -1]
        points = points[(scale.abs() > 1e-9).all(1)]
        points = points / (points @ parts.mixed[:, -1])[:, :, None]
        values = equations.residual(points).square().sum(1)
        best_first: Tensor = points[values.nan_to_num(torch.inf).argsort()]
        return best_first

    def _labelled(self, points: Tensor, equations: Equations) -> Tensor:
        """Points in the order of the labels that explain their gradients best, one after another."""
        parts, rank = self.parts, self.parts.rank
        wanted = (parts.basis @ torch.linalg.inv(points)).T  # (r, M)
        before = points @ parts.responses
        error = points.new_zeros(rank, rank)  # of point i with label j
        for i in range(rank):
            sent = equations.gradients(before[i].expand(rank, -1))
            error[i] = (sent - wanted[i]).square().sum(1)
        order = points.new_zeros(rank, dtype=torch.int64)
        for _ in range(rank):
            place = int(error.argmin())
            i, j = place // rank, place % rank
            order[j] = i
            error[i], error[:, j] = torch.inf, torch.inf
        return points[order]

    # ------------------------------------------------------------------------------------------- the answer
    def result(self, weight: Tensor, bias: Tensor, wanted: int) -> Disaggregated:
        points = self.points if self.points is not None else self.guess
        found = from_points(points, self.parts, weight, bias, wanted, self.method)
        figures = {
            "noise": self.floor,
            "candidates": float(len(self.columns)),
            "proposals": float(self.tried),
        } | self.figures
        return replace(found, exact=self.trusted, diagnostics=found.diagnostics | figures)


def from_points(
    points: Tensor | None, parts: Factored, weight: Tensor, bias: Tensor, batch: int, method: str
) -> Disaggregated:
    """The samples of the points (n, r), none of them certain. Missing points are made up: rows of the basis first, which are
    mixtures of the samples that switch a neuron on, then the mean sample, with no gradient.
    """
    if points is None or len(points) < parts.rank:
        strongest = parts.basis.norm(dim=1).argsort(descending=True)
        rows = parts.points(parts.basis[strongest])
        points = rows if points is None else torch.cat([points, rows])
    points = points[: parts.rank]
    inputs = (points @ parts.mixed)[:, :-1]
    both = torch.cat([inputs, inputs.new_ones(len(inputs), 1)], 1)
    observed = torch.cat([weight, bias[:, None]], 1)
    gradients = torch.linalg.lstsq(both.T, observed.T).solution
    if len(inputs) < batch:
        missing = batch - len(inputs)
        inputs = torch.cat([inputs, inputs.mean(0, keepdim=True).expand(missing, -1)])
        gradients = torch.cat([gradients, gradients.new_zeros(missing, gradients.shape[1])])
    residual = float((weight - gradients.T @ inputs).norm() / weight.norm())
    return Disaggregated(inputs, gradients, residual, 0, method, _figures(parts))


def counted(shares: Tensor, total: int) -> Tensor:
    """Classes (total,) in ascending order, as often as their shares say, by largest remainders."""
    scaled = total * shares.clamp_min(0.0)
    counts = scaled.floor()
    missing = total - int(counts.sum())
    if missing > 0:
        counts[(scaled - counts).argsort(descending=True)[:missing]] += 1
    classes = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts.long())
    return classes[torch.linspace(0, len(classes) - 1, total, device=classes.device).round().long()]

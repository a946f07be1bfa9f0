"""The error floor: the least pixel error that noise on the update leaves to any unbiased attack without a prior.

    covariance of an unbiased estimate ≥ σ²·(FᵀF)⁻¹        F = ∂(what is sent)/∂(what is hidden), at the truth
    rms pixel error ≥ σ·rms_per_sigma                      rms_per_sigma² = mean diagonal of its image block

Source: Cramér 1946, Rao 1945. It is a yardstick for scoring, never for an attack: F is taken at the truth. Noise that is
hidden counts as unknown and is eliminated (Schur complement); labels and timesteps are discrete and count as known, which
can only lower the floor. Activations with kinks have F almost everywhere. A prior, and the box [0, 1], can beat the floor
where it is high: there it only says that the update no longer decides. An attacker who has further updates of the same images
has the floor of all of them: their F one below the other, the noise of each round an unknown of its own.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import jvp, vjp, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fedattack.errors import FedattackError, NotApplicable, must, one_of
from fedattack.jacobians import Function, jacobian_transposed
from fedattack.tasks import Task, parameter_names, schedule, simulate_gradient, split_steps
from fedattack.types import Knowledge, Private, Progress, Update, silent

METHODS = ("auto", "exact", "sketch", "probes")

SKETCH = 4
"""Rows that a sketch keeps for each unknown."""

SPREAD = 4
"""Rows of the sketch that each coordinate of the update is added to."""

PROBES = 8
"""Random ±1 images at most whose xᵀ(FᵀF)⁻¹x estimate the mean diagonal; of large images fewer do, 3 at least."""

ENTRIES = 1 << 27
"""How many numbers of F (or of its sketch) are held at most: 1 GiB."""

CHUNK_ENTRIES = 1 << 24
"""How many numbers one chunk of directional derivatives may hold."""

CONVERGED = 1e-2
"""Conjugate gradients stop where the last `DELAY` steps together added less than this share, and so did the residual."""

DELAY = 8

SKIPPED = "skipped:"
"""How the reason begins where a computation was not affordable."""

FEWEST_SIGNS, MOST_SIGNS = 4, 64
"""Random directions from which ‖F‖_F is taken where there is no floor."""


@dataclass(frozen=True)
class Floor:
    """The floor of one update, σ being the standard deviation of noise on every coordinate of what was sent.

    What was sent is the gradient, or the weight difference. `unknowns` counts pixels and hidden noise, `rank` how many
    directions of them the update tells (None: not computed); `hidden` counts image directions that it does not tell, for
    which no unbiased estimate exists. rms_per_sigma is over the image directions that it does tell, in units of [0, 1]
    pixels per σ; per_image is the same for each image. `condition`: of F for the images, the hidden noise eliminated.
    status: "exact"; "estimate", with `relative_error` as its standard error; "at least", where conjugate gradients were
    stopped early and the floor is higher still. update_rms: root mean square coordinate of what is sent. rounding_sigma: the
    standard deviation of its rounding to float32, ε·rms/√12, an order of magnitude only (coordinates differ in size; a client
    that also computes in float32 errs several times more). derivatives: directional derivatives of the update that were taken.
    jacobian_norm: ‖∂(what is sent)/∂images‖_F, RV where that is the gradient; jacobian_error: its relative standard error.
    updates: how many it is of together; σ and update_rms are then those of the attacked one, jacobian_norm is that of all.
    """

    method: str
    status: str
    unknowns: int
    equations: int
    pixels: int
    rank: int | None
    hidden: int | None
    condition: float | None
    rms_per_sigma: float
    relative_error: float
    per_image: tuple[float, ...]
    update_rms: float
    rounding_sigma: float
    derivatives: int
    jacobian_norm: float | None = None
    jacobian_error: float = 0.0
    updates: int = 1

    @property
    def identifiable(self) -> bool | None:
        """Whether the update tells every image direction; None where that was not computed."""
        return None if self.hidden is None else self.hidden == 0

    def rms(self, sigma: float) -> float:
        """rms pixel error at noise σ, over the directions that the update tells."""
        return sigma * self.rms_per_sigma

    def psnr_db(self, sigma: float) -> float | None:
        """The PSNR that the floor allows at noise σ; None where directions are hidden, or there is no noise."""
        rms = self.rms(sigma)
        return None if self.identifiable is False or rms <= 0 else -20.0 * math.log10(rms)

    def sigma_at(self, psnr_db: float) -> float:
        """The σ at which the floor passes `psnr_db`: from there on no unbiased attack reaches it."""
        return float(10.0 ** (-psnr_db / 20.0) / self.rms_per_sigma)


@dataclass(frozen=True)
class Earlier:
    """A further update of the same client that the attacker has, and its truth."""

    update: Update
    truth: Private


def sharing(truth: Private, others: Sequence[Earlier]) -> tuple[Earlier, ...]:
    """Those that hold an image of the truth, or of another that does; the rest says nothing of the truth's images."""
    pool, found, before = _pictures(truth["images"]), dict[int, Earlier](), -1
    while before < len(found):
        before = len(found)
        for number, other in enumerate(others):
            images = _pictures(other.truth["images"])
            if number not in found and min(_places(pool, images)) < len(pool):
                found[number] = other
                pool += _not_in(pool, images)
    return tuple(other for number, other in enumerate(others) if number in found)


def error_floor(
    update: Update,
    model: nn.Module,
    task: Task,
    knowledge: Knowledge,
    truth: Private,
    *,
    earlier: Sequence[Earlier] = (),
    sigma: Callable[[float], float] | None = None,
    method: str = "auto",
    seconds: float = math.inf,
    clip_norm: float | None = None,
    generator: torch.Generator,
    progress: Progress = silent,
) -> Floor:
    """The floor of an update whose private variables are `truth`, in float64.

    knowledge: its scalars say how the client trained and must be true; `noise` counts as known where it is given. truth:
    what `tasks.join_steps` gives. method: "exact" forms F, "sketch" a random projection of it with SKETCH rows for each
    unknown, "probes" only products with it; "auto" the first of these whose cost fits in `seconds`, estimated by counting
    operations (of one thread), not by a clock, so that the choice repeats. clip_norm: of a defense that clips the update.
    earlier: updates that the attacker has beside it, trained alike; an image equal to one of the truth's is the same unknown,
    their noise is not known. sigma: the standard deviation of noise on an update by its root mean square, None: all have one.

    Raises NotApplicable where the floor cannot be had, with the reason.
    """
    if method not in METHODS:
        raise FedattackError(one_of("method", METHODS, method))
    sent = Sent.of(update, model, task, knowledge, truth, clip_norm)
    if earlier:
        alone = replace(knowledge, noise=None)
        others = [Sent.of(other.update, model, task, alone, other.truth, clip_norm) for other in earlier]
        sent = Sent.together([sent, *others], sigma)
    try:
        cost = Cost.of(sent)
        chosen = _affordable(sent, cost, seconds) if method == "auto" else method
        if chosen == "probes":
            return _by_probes(sent, cost.iterations(seconds), generator, progress)
        return _by_jacobian(sent, chosen == "sketch", generator, progress)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise NotApplicable(f"the update has no usable derivative: {str(error).strip().splitlines()[0]}") from error


def jacobian_norm(
    update: Update,
    model: nn.Module,
    task: Task,
    knowledge: Knowledge,
    truth: Private,
    *,
    seconds: float,
    clip_norm: float | None = None,
    generator: torch.Generator,
) -> dict[str, float]:
    """jacobian_norm, jacobian_error and update_rms of a `Floor` alone, from as many random directions as fit in `seconds`.

    For updates whose floor costs too much; at least 4 directions, at most 64. Raises NotApplicable as `error_floor` does.
    """
    sent = Sent.of(update, model, task, knowledge, truth, clip_norm)
    try:
        fitting = int(seconds / (cost := Cost.of(sent)).derivative)
        if fitting < FEWEST_SIGNS:
            raise NotApplicable(
                f"{SKIPPED} {FEWEST_SIGNS} directions take an estimated {FEWEST_SIGNS * cost.derivative:.2g} s, "
                f"and this update has {seconds:.2g} s"
            )
        directions = torch.zeros(min(fitting, MOST_SIGNS), sent.unknowns, dtype=sent.at.dtype)
        shape = (len(directions), sent.pixels)
        directions[:, : sent.pixels] = 2.0 * torch.randint(2, shape, generator=generator) - 1.0
        times, _ = _products(sent)
        parts = [times(some) for some in torch.split(directions.to(sent.at.device), sent.chunk)]
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise NotApplicable(f"the update has no usable derivative: {str(error).strip().splitlines()[0]}") from error
    norm, spread = _norm_by_signs(torch.cat(parts))
    return {"jacobian_norm": norm, "jacobian_error": spread, "update_rms": sent.update_rms}


# ---------------------------------------------------------------------------------------------------- what is sent
@dataclass(frozen=True)
class Sent:
    """What the client sends (N,) as a function of what is hidden (unknowns,), pixels first, then noise; `at` is the truth.

    `plain` is the same function by plain autograd. rounding: standard deviation of the rounding of what is sent to float32.
    Of several updates together pixels, images and update_rms are those of the attacked one; images that only others hold
    stand behind its own, with the noise.
    """

    function: Function
    plain: Function
    at: Tensor
    pixels: int
    images: int
    value: Tensor
    rounding: float
    update_rms: float
    updates: int = 1

    @staticmethod
    def of(
        update: Update, model: nn.Module, task: Task, knowledge: Knowledge, truth: Private, clip_norm: float | None
    ) -> "Sent":
        images = truth["images"].double()
        batch, channels, height, width = images.shape
        knowledge = replace(knowledge, batch_size=batch, image_shape=(channels, height, width))
        steps = schedule(knowledge)
        if missing := sorted({"images", *task.drawn} - set(truth)):
            raise NotApplicable(f"the truth holds no {', '.join(missing)}")
        if any(len(truth[name]) != sum(len(step) for step in steps) for name in task.drawn):
            raise NotApplicable(
                must("the truth's draws", "one for each image of each local step", len(truth["images"]))
            )
        if update.kind == "weights" and knowledge.learning_rate is None:
            raise NotApplicable("learning_rate must be known to say what an update of weights holds")
        scale = float(knowledge.learning_rate or 1.0) if update.kind == "weights" else 1.0
        state = {name: t.double() if t.is_floating_point() else t for name, t in update.sent.items()}
        names = [name for name in parameter_names(model) if name in update.received]
        if not names:
            raise NotApplicable("the update holds none of the model's trained parameters")
        fixed = {name: t.double() if t.is_floating_point() else t for name, t in truth.items() if name != "images"}
        parts = [images.reshape(-1)]
        if "noise" in task.drawn and knowledge.noise is None:
            parts.append(fixed.pop("noise").reshape(-1))
        at, pixels = torch.cat(parts), images.numel()

        def value(hidden: Tensor, transformable: bool) -> Tensor:
            private = fixed | {"images": hidden[:pixels].reshape(images.shape)}
            if len(hidden) > pixels:
                private["noise"] = hidden[pixels:].reshape(-1, *images.shape[1:])
            gradient = simulate_gradient(
                model,
                state,
                task,
                split_steps(task, private, steps),
                learning_rate=knowledge.learning_rate,
                proximal_mu=knowledge.proximal_mu or 0.0,
                transformable=transformable,
            )
            flat = scale * torch.cat([gradient[name].reshape(-1) for name in names])
            if clip_norm is not None:
                flat = flat * (clip_norm / flat.norm()).clamp(max=1.0)
            return flat

        try:
            with torch.no_grad():
                there = value(at, False)
        except (RuntimeError, ValueError) as error:
            raise NotApplicable(f"the update cannot be computed again: {error}") from error
        if not bool(there.isfinite().all()):
            raise NotApplicable("the update is not finite at the truth")
        stored = there
        if update.kind == "weights":
            stored = torch.cat([state[name].reshape(-1) for name in names]) - there
        return Sent(
            function=lambda hidden: value(hidden, True),
            plain=lambda hidden: value(hidden, False),
            at=at,
            pixels=pixels,
            images=len(images),
            value=there,
            rounding=float(torch.finfo(torch.float32).eps * stored.square().mean().sqrt()) / math.sqrt(12.0),
            update_rms=float(there.square().mean().sqrt()),
        )

    @staticmethod
    def together(parts: Sequence["Sent"], sigma: Callable[[float], float] | None) -> "Sent":
        """All updates, the attacked one first, each multiplied so that its noise has the σ of the attacked one's."""
        first = parts[0]
        each = first.pixels // first.images
        pool: list[Tensor] = []
        places, ends = [], []
        for part in parts:
            images = list(part.at[: part.pixels].reshape(-1, each))
            places.append(torch.tensor(_places(pool, images), device=first.at.device))
            pool += _not_in(pool, images)
        ends.append(len(pool) * each)
        for part in parts:
            ends.append(ends[-1] + part.unknowns - part.pixels)
        at = torch.cat([*pool, *(part.at[part.pixels :] for part in parts)])
        scales = _scales([part.update_rms for part in parts], sigma)

        def arguments(hidden: Tensor) -> list[Tensor]:
            images = hidden[: ends[0]].reshape(-1, each)
            noise = [hidden[start:end] for start, end in pairwise(ends)]
            return [torch.cat([images.index_select(0, i).flatten(), e]) for i, e in zip(places, noise, strict=True)]

        def value(hidden: Tensor, functions: Sequence[Function]) -> Tensor:
            given = zip(scales, functions, arguments(hidden), strict=True)
            return torch.cat([scale * function(argument) for scale, function, argument in given])

        return replace(
            first,
            function=lambda hidden: value(hidden, [part.function for part in parts]),
            plain=lambda hidden: value(hidden, [part.plain for part in parts]),
            at=at,
            value=torch.cat([scale * part.value for scale, part in zip(scales, parts, strict=True)]),
            rounding=min(scale * part.rounding for scale, part in zip(scales, parts, strict=True)),
            updates=len(parts),
        )

    @property
    def unknowns(self) -> int:
        return len(self.at)

    @property
    def equations(self) -> int:
        return len(self.value)

    @property
    def probes(self) -> int:
        """Random images for `probes`: the spread of the mean falls with their number times their size."""
        return max(3, min(PROBES, 4096 // self.pixels))

    @property
    def chunk(self) -> int:
        return max(1, min(64, CHUNK_ENTRIES // self.equations))

    def floor(self, method: str, status: str, rms_per_sigma: float, **found: Any) -> Floor:
        """A Floor with what is the same for every method filled in."""
        facts: dict[str, Any] = {
            "rank": None, "hidden": None, "condition": None, "relative_error": 0.0, "per_image": (), "derivatives": 0,
        }  # fmt: skip
        return Floor(
            method=method,
            status=status,
            unknowns=self.unknowns,
            equations=self.equations,
            pixels=self.pixels,
            rms_per_sigma=rms_per_sigma,
            update_rms=self.update_rms,
            rounding_sigma=self.rounding,
            updates=self.updates,
            **facts | found,
        )


def _scales(sizes: Sequence[float], sigma: Callable[[float], float] | None) -> list[float]:
    """σ of the first update in units of that of each, by their root mean squares; 1 where there is no noise at all."""
    noise = [0.0 if sigma is None else sigma(size) for size in sizes]
    if not any(noise):
        return [1.0] * len(noise)
    if not all(noise):
        raise NotApplicable("one of the updates is zero, and with it the noise that is relative to it")
    return [noise[0] / own for own in noise]


def _pictures(images: Tensor) -> list[Tensor]:
    return list(images.double().flatten(1))


def _places(pool: Sequence[Tensor], images: Sequence[Tensor]) -> list[int]:
    """Where each image is in the pool, no place twice; those that are not in it follow one another behind its end."""
    free: dict[bytes, list[int]] = {}
    for place, image in enumerate(pool):
        free.setdefault(_bytes(image), []).append(place)
    places, end = [], len(pool)
    for image in images:
        same = free.get(_bytes(image))
        places.append(same.pop(0) if same else end)
        end += places[-1] == end
    return places


def _not_in(pool: Sequence[Tensor], images: Sequence[Tensor]) -> list[Tensor]:
    return [image for image, place in zip(images, _places(pool, images), strict=True) if place >= len(pool)]


def _bytes(image: Tensor) -> bytes:
    found: bytes = image.detach().cpu().contiguous().numpy().tobytes()
    return found


# ---------------------------------------------------------------------------------------------------- what it costs
@dataclass(frozen=True)
class Cost:
    """Estimated seconds of one thread: of one directional derivative among many, of an iteration of `probes`, of forming F.

    Counted on one evaluation of the update; the constants are of an ordinary core (measured on LeNet, MLP, ConvNet and U-Net,
    8 to 32 pixels wide, they are right within a factor of two). No clock is read, so that runs repeat.
    """

    derivative: float
    iteration: float
    exact: float
    sketch: float

    @staticmethod
    def of(sent: Sent) -> "Cost":
        from torch.utils.flop_counter import FlopCounterMode

        with FlopCounterMode(display=False) as flops, _Work() as work, torch.no_grad():
            sent.plain(sent.at)
        element, flop, call, algebra = 3e-9, 0.12e-9, 5e-5, 1.0 / 15e9
        derivative = element * work.elements + flop * flops.get_total_flops()
        n = sent.unknowns
        columns = n * (derivative + call * work.calls / sent.chunk)
        solve = 9.0 * sent.pixels**3 * algebra
        return Cost(
            derivative=derivative,
            iteration=2.0 * (sent.probes * derivative + 2.0 * call * work.calls),
            exact=columns + 2.0 * sent.equations * n * n * algebra + solve,
            sketch=columns + SPREAD * n * sent.equations * element + 2.0 * SKETCH * n**3 * algebra + solve,
        )

    def iterations(self, seconds: float) -> int | None:
        """How many iterations of `probes` fit, None for as many as it takes."""
        return None if math.isinf(seconds) else int(seconds / self.iteration)


class _Work(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts calls and the numbers that they write."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls, self.elements = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.calls += 1
        self.elements += sum(leaf.numel() for leaf in tree_leaves(made) if isinstance(leaf, Tensor))
        return made


FEWEST = 10
"""Iterations of conjugate gradients below which a bound is not worth its time."""


def _affordable(sent: Sent, cost: Cost, seconds: float) -> str:
    """The most exact method that fits in `seconds` and in memory."""
    n, kept = sent.unknowns, SKETCH * sent.unknowns
    if cost.exact <= seconds and n * sent.equations <= ENTRIES:
        return "exact"
    if kept < sent.equations and cost.sketch <= seconds and n * kept <= ENTRIES:
        return "sketch"
    if FEWEST * cost.iteration <= seconds:
        return "probes"
    raise NotApplicable(
        f"{SKIPPED} {n:,} unknowns take an estimated {min(cost.exact, cost.sketch):.2g} s, a bound by probes "
        f"{FEWEST * cost.iteration:.2g} s at least, and this update has {seconds:.2g} s"
    )


# ---------------------------------------------------------------------------------------------------- with F formed
def _by_jacobian(sent: Sent, sketched: bool, generator: torch.Generator, progress: Progress) -> Floor:
    """From the singular values of F, whole or as a sketch, with the hidden noise projected out."""
    n, kept = sent.unknowns, SKETCH * sent.unknowns
    sketched = sketched and kept < sent.equations
    rows = kept if sketched else sent.equations
    if n * rows > ENTRIES:
        other = "probes" if sketched else "sketch or probes"
        raise NotApplicable(f"{n:,} × {rows:,} numbers are more than may be held ({ENTRIES:,}): use {other}")
    press = _sketch(sent.equations, kept, generator, sent.at) if sketched else _whole
    derivatives = jacobian_transposed(
        lambda hidden: press(sent.function(hidden)), sent.at, sent.chunk, lambda done: progress(done, n, math.nan)
    )
    if not bool(derivatives.isfinite().all()):
        raise NotApplicable("the update's derivative is not finite at the truth")
    images, noise = derivatives[: sent.pixels], derivatives[sent.pixels :]
    norm = float(images.norm())
    rank = 0
    if len(noise):
        basis = _range(noise)
        rank = basis.shape[1]
        for _ in range(2):  # twice is enough (Kahan) for orthogonality to rounding
            images = images - (images @ basis) @ basis.T
    values, variances, shares = _inverse(images, float(derivatives.square().sum(1).max().sqrt()))
    seen = len(values)
    rank += seen
    if seen == 0:
        raise NotApplicable("the update does not depend on the images at all")
    correction = (kept - rank - 1) / kept if sketched else 1.0  # a sketch of full rank: the mean of an inverse Wishart
    per_image = [
        math.sqrt(correction * float(some.sum()) / max(float(share.sum()), 1e-300))
        for some, share in zip(variances.chunk(sent.images), shares.chunk(sent.images), strict=True)
    ]
    return sent.floor(
        "sketch" if sketched else "exact",
        "estimate" if sketched else "exact",
        math.sqrt(correction * float(variances.sum()) / seen),
        rank=rank,
        hidden=sent.pixels - seen,
        condition=float(values[0] / values[-1]),
        relative_error=math.sqrt(0.5 / max(kept - rank - 3, 1)) if sketched else 0.0,
        per_image=tuple(per_image),
        derivatives=n,
        jacobian_norm=norm,
        jacobian_error=math.sqrt(0.5 / kept) if sketched else 0.0,
    )


def _whole(vector: Tensor) -> Tensor:
    return vector


def _sketch(equations: int, rows: int, generator: torch.Generator, like: Tensor) -> Function:
    """Every coordinate is added, with random signs, to SPREAD of the rows.

    Source: Nelson and Nguyên, OSNAP, FOCS 2013. With a spread of 1 (CountSketch) floors came out up to 4 % too high on a
    ConvNet, with 4 within 1 % of the exact ones.
    """
    buckets = torch.randint(rows, (SPREAD, equations), generator=generator).to(like.device)
    signs = (2.0 * torch.randint(2, (SPREAD, equations), generator=generator) - 1.0).to(like) / math.sqrt(SPREAD)

    def press(vector: Tensor) -> Tensor:
        pressed = vector.new_zeros(rows)
        for bucket, sign in zip(buckets, signs, strict=True):
            pressed = pressed.index_add(0, bucket, sign * vector)
        return pressed

    return press


def _range(transposed: Tensor) -> Tensor:
    """An orthonormal basis (equations, rank) of the span of the rows."""
    q, r = torch.linalg.qr(transposed.T)
    u, values, _ = torch.linalg.svd(r)
    basis: Tensor = q @ u[:, : _rank(values, max(transposed.shape), float(values[0]))]
    return basis


def _inverse(transposed: Tensor, largest: float) -> tuple[Tensor, Tensor, Tensor]:
    """Singular values of Fᵀ above rounding, descending; the diagonal of (FᵀF)⁺; each unknown's share in the directions kept.

    largest: of the rows' norms before anything was projected off, the scale of their rounding.
    """
    r = torch.linalg.qr(transposed.T, mode="r")[1]
    values = torch.linalg.svdvals(r)
    size = max(transposed.shape)
    rank = _rank(values, size, max(largest, float(values[0])))
    if rank == len(transposed):  # then the inverse of R is at hand, in a fraction of the time of singular vectors
        unit = torch.eye(rank, dtype=r.dtype, device=r.device)
        inverse = torch.linalg.solve_triangular(r, unit, upper=True)
        return values, inverse.square().sum(1), torch.ones_like(values)
    _, values, directions = torch.linalg.svd(r, full_matrices=False)
    values, directions = values[:rank], directions[:rank]
    return values, (directions.T / values).square().sum(1), directions.square().sum(0)


def _rank(values: Tensor, size: int, largest: float) -> int:
    """How many stand above the rounding of a matrix of so many rows, a hundredfold since F itself is computed with rounding."""
    return int((values > 100.0 * torch.finfo(values.dtype).eps * math.sqrt(size) * largest).sum())


# ---------------------------------------------------------------------------------------------------- with products only
def _by_probes(sent: Sent, most: int | None, generator: torch.Generator, progress: Progress) -> Floor:
    """Mean of xᵀ(FᵀF)⁻¹x over random ±1 images x, by conjugate gradients, whose partial sums are bounds from below.

    Source: Hutchinson 1990; Hestenes and Stiefel 1952, Theorem 6:1 (the sums); Strakoš and Tichý 2002 (when to stop).
    """
    n, pixels, probes = sent.unknowns, sent.pixels, sent.probes
    right = torch.zeros(probes, n, dtype=sent.at.dtype)
    right[:, :pixels] = 2.0 * torch.randint(2, (probes, pixels), generator=generator) - 1.0
    right = right.to(sent.at.device)
    times, back = _products(sent)
    solution, residual, direction = torch.zeros_like(right), right.clone(), right.clone()
    size = residual.square().sum(1)
    total = torch.zeros_like(size)
    recent: list[Tensor] = []
    limit = n if most is None else max(1, most)
    iteration, done, norm, error = 0, False, 0.0, 0.0
    while iteration < limit and not done:
        image = times(direction)
        if iteration == 0:  # of random signs still
            norm, error = _norm_by_signs(image)
        length = size / image.square().sum(1).clamp_min(1e-300)
        length = torch.where(length.isfinite(), length, 0.0)
        added = length * size
        total = total + added
        recent = [*recent[1 - DELAY :], added]
        solution = solution + length[:, None] * direction
        residual = residual - length[:, None] * back(image)
        before, size = size, residual.square().sum(1)
        direction = residual + (size / before.clamp_min(1e-300))[:, None] * direction
        iteration += 1
        settled = torch.stack(recent).sum(0) <= CONVERGED * total
        small = size <= CONVERGED**2 * right.square().sum(1)
        done = (len(recent) == DELAY and bool((settled & small).all())) or not bool((size > 0).any())
        progress(iteration, limit, float(total.mean()))
    variances = total / pixels
    mean = float(variances.mean())
    if not (math.isfinite(mean) and mean > 0):
        raise NotApplicable("conjugate gradients broke down: the update hardly depends on the images")
    spread = float(variances.std()) / math.sqrt(probes)
    parts = (right * solution)[:, :pixels].mean(0).clamp_min(0.0).chunk(sent.images)
    return sent.floor(
        "probes",
        "estimate" if done else "at least",
        math.sqrt(mean),
        relative_error=0.5 * spread / mean,
        per_image=tuple(math.sqrt(float(part.mean())) for part in parts) if done else (),
        derivatives=2 * probes * iteration,
        jacobian_norm=norm,
        jacobian_error=error,
    )


def _norm_by_signs(products: Tensor) -> tuple[float, float]:
    """‖F‖_F from F·v, one v of random signs a row, and its relative standard error (Hutchinson 1990)."""
    squares = products.square().sum(1)
    mean = float(squares.mean())
    if len(squares) < 2 or not mean > 0:
        return math.sqrt(mean), math.inf
    return math.sqrt(mean), float(squares.std()) / math.sqrt(len(squares)) / (2.0 * mean)


def _products(sent: Sent) -> tuple[Function, Function]:
    """V ↦ V·Fᵀ and W ↦ W·F for rows of several vectors at once, one by one where the model cannot be vmapped."""
    pull: Callable[..., tuple[Tensor]] = vjp(sent.function, sent.at)[1]

    def push(direction: Tensor) -> Tensor:
        derivative: Tensor = jvp(sent.function, (sent.at,), (direction,))[1]
        return derivative

    def back(vector: Tensor) -> Tensor:
        return pull(vector, retain_graph=True)[0]

    def several(one: Function) -> Function:
        def together(vectors: Tensor) -> Tensor:
            try:
                made: Tensor = vmap(one)(vectors)
            except (RuntimeError, ValueError) as reason:
                if "vmap" not in str(reason) and "batch" not in str(reason):
                    raise
                made = torch.stack([one(vector) for vector in vectors])
            return made.detach()

        return together

    return several(push), several(back)

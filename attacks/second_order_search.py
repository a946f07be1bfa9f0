"""What both searches of `second-order` share: its options, the updates as equations, one start after another.

The searches: `attacks.second_order` where the images alone are unknown, `attacks.second_order_noise` where their noise is, too.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter

import torch
from torch import Tensor, nn

from attacks.certificates import EXACT, HIDDEN, hidden_share, last_step, standard_error
from attacks.equations import Equations
from attacks.least_squares import (
    End,
    MatrixFree,
    MatrixFreeLinear,
    Point,
    ProjectedFree,
    Recycled,
    Solution,
    levenberg_marquardt,
)
from attacks.matching import Problem, check_options, lbfgs, pose
from attacks.noise import noise_level
from attacks.smoothing import kinks
from attacks.spectra import Spectrum
from attacks.starting import random_start
from attacks.translations import Translating
from fedattack.errors import FedattackError, must, one_of
from fedattack.tasks import Task
from fedattack.types import Knowledge, Progress, Reconstruction, State, Update

BOXES = ("end", "step")
WEIGHTS = {"entries": 0.0, "balanced": 0.5, "layers": 1.0}
"""How much a layer counts: its equations are divided by ‖g_layer‖ to this power."""

COUNTS = {
    "restarts": 1,
    "inner_steps": 1,
    "descent_iterations": 0,
    "smoothing_iterations": 0,
    "switching_iterations": 0,
    "translations": 0,
}
"""Options that are whole numbers, and the least they may be; `iterations` is checked with all attacks'."""

NEAR = 1e-3
"""A descent has come near a solution where it ends below this share of its start's cost, or of silence's where that is lower:
others end at 0.01 to 0.2 of it."""

NOISE = 1e-2
"""On an image, to see whether the update depends on it at all."""

EQUATIONS = 4096
"""A sketch keeps at least so many: they are cheap."""

BLOCKS = 1 << 28
"""How many numbers the Jacobian blocks JᵀJ of all images together may hold (2 GB in float64, and their factors as much)."""

ENTRIES = 1 << 24
"""How many numbers one chunk of Jacobian columns may hold."""


@dataclass(frozen=True)
class Options:
    """What `second-order` can be told.

    iterations: trial steps of each start; the search ends early below `tolerance`, where it stalls, or once a start is
    certified. A cost is ‖simulated − observed‖²/‖observed‖² in the weights of the search: 1 for silence, 0 for a perfect
    match. weights: "entries" (all alike), "layers" (each divided by its norm, so that all layers count the same) or
    "balanced" between them. certified: the cost, in "layers" weights whatever the search had, below which (with as many
    independent equations as unknowns; beyond dense_limit, unknown noise counted, or without `spectrum`, independence is not
    checked as such) a result is called exact; where images alone are unknown, only if an undamped step would move no image's
    pixels by more than 0.001 (rms; `step_left`), and besides the `standard_error` of rounding is no larger, or, beyond
    dense_limit, no more than a tenth of a random change is hidden (`hidden_share`; see attacks/certificates.py).
    start: "grey", "normal" or "uniform", see Problem.start; or an attack such as "r-conv", whose result is the first start
    (of models with ReLUs the second too, slightly smoothed; the others are grey). box: images are clamped to [0, 1] at the
    "end" or after each "step". damping: of the first step, in units of the largest diagonal entry of JᵀJ. sketch: equations
    kept for each unknown in the Jacobians that precondition the steps, 0 for all, never fewer than 4,096 (with unknown noise in
    at most 512 pixels the search itself keeps four times as many: with fewer, most get stuck). dense_limit: so many unknown
    pixels have their Jacobian formed at once; of a batch with more, each image has its own block, one after another; of images
    with more, none is formed, and each step takes up to `inner_steps` conjugate gradients, which a sketch of the largest
    eigenvalues preconditions (with unknown noise nothing does).
    descent_iterations: a tenth (where noise is unknown a fifth) of the outer steps of L-BFGS that a start may take before it is
    searched (up to 20 steps each, as in DLG), of one clean update of a model without ReLUs, from random starts. It takes fewer
    where it comes close, or where ten of them gain less than 10 %. Starts that it brought near, below 1e-3 of their first cost,
    are searched at once, others when three of them wait, or no other is left, the nearest first. Where noise is unknown it
    descends again and again with moved images, and all starts before one that did not come near is searched. They count as
    `steps`, not among `losses`; 0: none.
    smoothing_iterations: trial steps, before those on the model itself, at each of five widths of smoothed copies of a model
    whose modules include ReLUs, the gradients of which jump (always with weights "layers": deep ones need it); 0: none.
    switching_iterations: of such a model, where that did not end exactly: trial steps of each of up to 20 rounds in which the
    on or off of the units nearest to their kinks, a share `gates` of all, is unknown beside the images (see
    attacks/switching.py); 0: none. For one clean update of one step on all images.
    translations: where a search or a descent of a clean update has stalled: further ones, at most, each as long, from its end
    with one image moved by a few pixels (see attacks/translations.py); 0: none.
    spectrum: whether rank and condition number are computed at the end (beyond dense_limit only bounds: `rank_at_most`, the
    sum of the images' own ranks, and `condition_at_least`, about, from their blocks or from conjugate gradients).

    sigma: standard deviation of Gaussian noise on every entry of the (pseudo-)gradient; None: what the known defense says,
    else none. With noise the whitened problem is solved, all equations kept as far as memory allows, with a total-variation
    prior on the images times `prior_weight` (0: none) and N(0, 1) on unknown DDPM noise: maximum a posteriori.
    """

    iterations: int = 100
    restarts: int = 8
    start: str = "grey"
    tolerance: float = 1e-22
    certified: float = 1e-10
    weights: str = "entries"
    damping: float = 1e-3
    box: str = "end"
    sketch: float = 3.0
    dense_limit: int = 4096
    inner_steps: int = 300
    descent_iterations: int = 20
    smoothing_iterations: int = 10
    switching_iterations: int = 12
    gates: float = 0.2
    translations: int = 12
    spectrum: bool = True
    sigma: float | None = None
    prior_weight: float = 0.5
    precision: str = "float64"

    def __post_init__(self) -> None:
        check_options("l2", random_start(self.start), self.iterations)
        for what, table, got in (("box", BOXES, self.box), ("weights", WEIGHTS, self.weights)):
            if got not in table:
                raise FedattackError(one_of(what, table, got))
        for name, least in COUNTS.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise FedattackError(must(name, f"a whole number of at least {least}", value))
        for name in ("sigma", "prior_weight"):
            if (value := getattr(self, name)) is not None and not value >= 0:
                raise FedattackError(must(name, "zero or positive", value))
        if not 0 < self.gates <= 1:
            raise FedattackError(must("gates", "a share above 0, at most 1", self.gates))

    def groups(self, shape: Sequence[int], copies: int = 1) -> list[Tensor] | None:
        """Which unknowns a Jacobian is formed of at once: all (an empty list), each image's (B,C,H,W), or None: it is not.

        copies: how many unknowns there are for a pixel, one whole batch behind the other.
        """
        count, pixels = shape[0], math.prod(shape[1:])
        if count * pixels <= self.dense_limit:
            return []
        if pixels > self.dense_limit or count * (copies * pixels) ** 2 > BLOCKS:
            return None
        return list(torch.arange(copies * count * pixels).reshape(copies, count, pixels).transpose(0, 1).flatten(1))

    def kept(self, unknowns: int) -> int:
        """How many equations a sketch keeps; 0: all."""
        return max(EQUATIONS, math.ceil(self.sketch * unknowns)) if self.sketch > 0 else 0


# ---------------------------------------------------------------------------------------------------- equations
def chunk_of(count: int) -> int:
    """How many columns of a Jacobian of so many equations are computed at once."""
    return max(1, min(64, ENTRIES // count))


@dataclass(frozen=True)
class View:
    """One update of the images.

    equations: those of the search. verdict: all of them, by which the results of starts are compared; every layer alike,
    unless there is noise. noise: its standard deviation on every equation. rounding: of the numbers sent, relatively.
    """

    problem: Problem
    equations: Equations
    verdict: Equations
    noise: float
    rounding: float

    @staticmethod
    def of(attack: Options, update: Update, model: nn.Module, task: Task, knowledge: Knowledge) -> "View":
        problem = pose(update, model, task, knowledge, precision=attack.precision)
        sigma = noise_level(update, knowledge) if attack.sigma is None else attack.sigma
        equations = Equations.of(problem, update, WEIGHTS["entries" if sigma > 0 else attack.weights])
        verdict = equations if sigma > 0 else Equations.of(problem, update)
        sent = next((t.dtype for t in update.received.values() if t.is_floating_point()), problem.dtype)
        noise = sigma * float(next(iter(equations.weights.values())))
        return View(problem, equations, verdict, noise, torch.finfo(sent).eps)

    def sketched(self, count: int, generator: torch.Generator) -> "View":
        return replace(self, equations=self.equations.sketched(count, generator))

    def to(self, dtype: torch.dtype) -> "View":
        return replace(self, problem=self.problem.to(dtype), equations=self.equations.to(dtype))

    def alone(self, number: int) -> "View | None":
        """Of one image of the batch, see `Problem.alone`."""
        problem = self.problem.alone(number)
        return None if problem is None else replace(self, problem=problem)

    def cost(self, guess: dict[str, Tensor]) -> float:
        with torch.no_grad():
            return squared(self.verdict.left(self.problem.simulated(guess)) - self.verdict.wanted)

    def moved(self, guess: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
        """Whether two guesses have different updates, by more than rounding."""
        with torch.no_grad():
            one, two = (self.verdict.left(self.problem.simulated(there)) for there in (guess, other))
        return float((one - two).norm()) > 100 * torch.finfo(one.dtype).eps * max(1.0, float(one.norm()))


@dataclass(frozen=True)
class Descent:
    """How far L-BFGS goes: `longest` times the option's steps; less where ten of them do not lower its cost by the share
    `falling`, or where it is below the share `close` of that of its start (see `Case.unit`) and one step does not lower it by
    the share `quick`.
    """

    longest: int
    close: float
    quick: float = 1.0
    falling: float = 0.1


@dataclass
class Case:
    """What every search needs. views: updates of the same images, noisy ones divided by their noise where there are several.

    difference: the mean difference of neighbouring pixels of public images. first: images to start from. descents: the
    steps of each that was made. highest: the progress that was told last.
    """

    attack: Options
    views: list[View]
    difference: float
    generator: torch.Generator
    progress: Progress
    begun: float
    first: Tensor | None = None
    descents: list[int] = field(default_factory=list)
    highest: int = 0

    def starts(self) -> dict[str, Tensor]:
        """(restarts, …) each, the first given or all at random."""
        attack, problem = self.attack, self.views[0].problem
        return problem.start(attack.restarts, self.generator, random_start(attack.start), self.first)

    def translating(
        self,
        search: Callable[[Tensor, int], Solution],
        unknown: Callable[[Solution], Tensor],
        finish: Callable[[Solution], dict[str, Tensor]],
        rough_cost: Callable[[Tensor], float],
        close_cost: Callable[[Tensor], float] | None = None,
    ) -> Translating[Solution]:
        """Not under noise, where a cost is no longer nearly zero or far from it."""
        return Translating(
            search=search,
            unknown=unknown,
            shape=self.views[0].problem.unknown["images"].shape,
            verdict=lambda end: self.cost(finish(end)),
            rough_cost=rough_cost,
            close_cost=close_cost or rough_cost,
            success=self.success,
            most=self.attack.translations if self.noise == 0 else 0,
        )

    def every_image_matters(self, guess: Mapping[str, Tensor]) -> bool:
        """Whether a little noise on any one image moves the update: what is left to ask where rank is not computed."""
        for number in range(len(guess["images"])):
            images = guess["images"].clone()
            noise = torch.randn(images[number].shape, generator=self.generator, dtype=images.dtype)
            images[number] += NOISE * noise.to(images)
            if not any(view.moved(guess, {**guess, "images": images}) for view in self.views):
                return False
        return True

    @property
    def noise(self) -> float:
        """On every equation of the first view, and of the others once they are scaled by `share`; 0: there is none."""
        return self.views[0].noise

    def share(self, view: View) -> float:
        """What a view's equations are multiplied by, so that all have the same noise."""
        return self.noise / view.noise if self.noise > 0 and view.noise > 0 else 1.0

    @property
    def prior(self) -> float:
        """Factor of the prior's residuals, −2·log p, beside equations that are not divided by their noise."""
        return self.noise * math.sqrt(2.0 * self.attack.prior_weight)

    def cost(self, guess: dict[str, Tensor]) -> float:
        """Mean over the views of the verdict."""
        return sum(self.share(view) ** 2 * view.cost(guess) for view in self.views) / len(self.views)

    def tell(self, done: int, before: int, cost: float) -> None:
        """Progress, never backwards. Descents have the first part of it, though searches may come between them; then there are
        `before` trials and those of the search, for each start."""
        each = self.attack.descent_iterations * self.descending + before + self.attack.iterations
        self.highest = min(self.attack.restarts * each, max(self.highest, done))
        self.progress(self.highest, self.attack.restarts * each, cost)

    def distance(self, simulated: State, observed: State) -> Tensor:
        """The cost of the search, of one update without noise."""
        equations = self.views[0].equations
        return (equations.left(simulated) - equations.wanted).square().sum()

    def distance_at(self, guess: Mapping[str, Tensor]) -> float:
        """`distance` of what a client with these unknowns would have sent, infinite where that is not finite."""
        problem = self.views[0].problem
        with torch.no_grad():
            found = float(self.distance(problem.simulated(guess), problem.observed))
        return found if math.isfinite(found) else math.inf

    def unit(self, start: Mapping[str, Tensor]) -> float:
        """In what the costs of descents from a start are counted: its own cost, or that of silence where that is lower."""
        return max(min(1.0, self.distance_at(start)), torch.finfo(torch.float64).tiny)

    def descend(self, start: Mapping[str, Tensor], descent: Descent, unit: float) -> End:
        """Where L-BFGS comes from a start: cheap far from a solution, where Jacobians soon grow old.

        x: the unknowns in the order of `start`, flat. costs: in `unit`, the last one infinite where it came to nothing. It
        always counts as stalled, so that moved images are tried.
        """
        attack, each = self.attack, self.attack.descent_iterations
        before = min(len(self.descents), attack.restarts - 1) * each

        def told(iteration: int, _: int, cost: float) -> None:
            self.tell(before + math.ceil(iteration / descent.longest), 0, cost)

        match = lbfgs(
            self.views[0].problem,
            {name: tensor[None] for name, tensor in start.items()},
            distance=self.distance,
            iterations=descent.longest * each,
            success=attack.tolerance,
            falling=descent.falling,
            close=descent.close * unit,
            quick=descent.quick,
            progress=told,
        )
        costs = tuple(cost / unit for cost in match.losses)
        well = all(bool(tensor.isfinite().all()) for tensor in match.guess.values()) and math.isfinite(costs[-1])
        self.descents.append(len(costs) - 1)
        place = torch.cat([(match.guess if well else start)[name].reshape(-1) for name in start])
        return End(x=place, costs=costs if well else (*costs[:-1], math.inf), reason="stalled")

    @property
    def descending(self) -> bool:
        """Whether starts are brought near by L-BFGS first: not what another attack found, and not to fit noise.

        One update alone, of a model without kinks.
        """
        clean = len(self.views) == 1 and self.noise == 0 and not kinks(self.views[0].problem.model)
        return self.attack.descent_iterations > 0 and self.first is None and clean

    @property
    def count(self) -> int:
        """How many equations there are without any sketch."""
        return sum(len(view.verdict.wanted) for view in self.views)

    @property
    def success(self) -> float:
        """The cost below which a start has explained the updates: exactly, or down to their noise."""
        if self.noise == 0:
            return self.attack.certified
        return self.noise**2 * (self.count + 5.0 * math.sqrt(2.0 * self.count)) / len(self.views)


# ---------------------------------------------------------------------------------------------------- starts
def nearest_first(starts: int, approach: Callable[[int], tuple[float, Tensor]], waiting: int) -> Iterator[Tensor]:
    """Places to search from: what a descent brought near at once; of others the nearest, as soon as so many are waiting.

    approach: where the descent from a start ends, after its cost in units of the start's.
    """
    rest: list[tuple[float, Tensor]] = []
    for number in range(starts):
        cost, place = approach(number)
        if cost < NEAR:
            yield place
            continue
        rest.append((cost, place))
        if len(rest) == waiting:
            yield rest.pop(min(range(waiting), key=lambda i: rest[i][0]))[1]
    yield from (place for _, place in sorted(rest, key=lambda pair: pair[0]))


Told = Callable[[int, float], None]
"""Hears of every trial: its number and its cost."""


def later(told: Told, done: int) -> Told:
    """`told` for a search that comes after so many trials."""
    return lambda iteration, cost: told(done + iteration, cost)


def searched(
    attack: Options,
    at: Callable[[Tensor], Point],
    start: Tensor,
    told: Told,
    box: tuple[Tensor, Tensor] | None = None,
) -> Solution:
    """One search, as long and as exact as the options say."""
    return levenberg_marquardt(
        at,
        start,
        iterations=attack.iterations,
        tolerance=attack.tolerance,
        damping=attack.damping,
        box=box,
        told=told,
    )


def squared(residual: Tensor) -> float:
    """‖ρ‖², infinite where it is not finite."""
    found = float(residual.detach().square().sum())
    return found if math.isfinite(found) else math.inf


def multistart(
    case: Case,
    solve: Callable[[int, Tensor, Told], Solution],
    starts: Iterable[Tensor],
    finish: Callable[[Solution], dict[str, Tensor]],
    unknowns: int,
    before: int = 0,
) -> Reconstruction:
    """One start after another until one explains the update; the lowest verdict wins.

    solve: is given a start's number too. before: trials besides iterations.
    """
    attack, problem = case.attack, case.views[0].problem
    ends: list[tuple[float, Solution, dict[str, Tensor]]] = []
    trials = 0
    for number, start in enumerate(starts):

        def told(iteration: int, cost: float, done: int = number * (before + attack.iterations)) -> None:
            here = min(iteration, before + attack.iterations)  # searches of moved images come on top
            case.tell(attack.restarts * attack.descent_iterations * case.descending + done + here, before, cost)

        solution = solve(number, start, told)
        trials += len(solution.costs) - 1
        guess = finish(solution)
        ends.append((case.cost(guess), solution, guess))
        if ends[-1][0] <= case.success and unknowns <= case.count:
            break
    cost, solution, guess = min(ends, key=lambda end: end[0])
    equations = sum(view.equations.count for view in case.views)
    blocks = solution.point if isinstance(solution.point, Recycled) and not solution.point.formed.whole else None
    dense = blocks is None and not isinstance(solution.point, MatrixFree | ProjectedFree)
    diagnostics = {
        "loss": cost,
        "iterations": float(len(solution.costs) - 1),
        "starts": float(len(ends)),
        "translations": float(sum(end[1].searches - 1 for end in ends)),
        "descents": float(len(case.descents)),
        "starts_succeeded": float(sum(end[0] <= case.success for end in ends)),
        "equations": float(equations),
        "unknowns": float(unknowns),
        "dense": float(dense),
    }
    if len(case.views) > 1:
        diagnostics["rounds_seen"] = float(len(case.views))
    if case.noise > 0:
        diagnostics["chi_square"] = cost * len(case.views) / (case.noise**2 * case.count)
    formed = dense or (isinstance(solution.point, ProjectedFree) and unknowns <= attack.dense_limit)
    spectrum = solution.point.linear().spectrum() if attack.spectrum and formed else None
    determined = unknowns <= case.count and not (attack.spectrum and formed and spectrum is None)
    if blocks is not None and attack.spectrum:
        determined = _determined(blocks, unknowns, diagnostics) and determined
    if spectrum is None:
        determined = determined and case.every_image_matters(guess)
    elif len(spectrum.values) > 0:
        values, rank = spectrum.values, spectrum.rank
        columns = len(solution.x)
        determined = determined and rank == columns
        if float(values[0]) > 0:
            diagnostics["condition"] = float(values[0] / values[min(len(values), columns) - 1].clamp_min(1e-300))
        rank += spectrum.linear_rank
        determined = determined and rank == unknowns
        diagnostics["rank"] = float(rank)
    if attack.spectrum and isinstance(solution.linear, MatrixFreeLinear):
        largest, smallest = solution.linear.extremes
        if smallest > 0:
            diagnostics["condition_at_least"] = largest / smallest
    if case.noise == 0 and isinstance(solution.point, Recycled | MatrixFree):
        limits = _told_of_the_end(case, solution.point, spectrum, diagnostics)
        determined = determined and all(found <= limit for found, limit in limits)
    diagnostics["certified"] = float(cost <= attack.certified and determined)
    found = problem.estimate(guess)
    return Reconstruction(
        images=found["images"].clamp(0.0, 1.0).nan_to_num(0.5).float(),
        labels=found.get("labels"),
        timesteps=found.get("timesteps"),
        noise=found["noise"].nan_to_num(0.0) if "noise" in found else None,
        losses=(*solution.costs, cost),
        steps=trials + sum(case.descents),
        seconds=perf_counter() - case.begun,
        diagnostics=diagnostics,
    )


def _told_of_the_end(
    case: Case, point: Recycled | MatrixFree, spectrum: Spectrum | None, diagnostics: dict[str, float]
) -> list[tuple[float, float]]:
    """What `attacks.certificates` says of images that alone are unknown, put into the diagnostics too: figures and limits."""
    linear, images = point.linear(), case.views[0].problem.unknown["images"].shape[0]
    diagnostics["step_left"] = last_step(linear, images)
    limits = [(diagnostics["step_left"], EXACT)]
    if spectrum is None:
        diagnostics["hidden_share"] = hidden_share(linear, images, case.generator)
        limits.append((diagnostics["hidden_share"], HIDDEN))
    else:
        diagnostics["standard_error"] = standard_error(point.residual, spectrum.values, case.views[0].rounding)
        limits.append((diagnostics["standard_error"], EXACT))
    return limits


def _determined(point: Recycled, unknowns: int, diagnostics: dict[str, float]) -> bool:
    """Whether each image would be determined if the others were known: as much as the blocks of its Jacobian tell.

    Of all images the rank is at most the sum of theirs, and the condition number at least the largest singular value of any
    over the smallest of any.
    """
    spectra = point.linear().spectra()
    known = [spectrum for spectrum in spectra if spectrum is not None]
    if len(known) < len(spectra):
        return False
    rank = sum(spectrum.rank for spectrum in known)
    largest, smallest = (pick(float(s.values[at]) for s in known) for pick, at in ((max, 0), (min, -1)))
    diagnostics["rank_at_most"] = float(rank)
    if smallest > 0:
        diagnostics["condition_at_least"] = largest / smallest
    return rank == unknowns

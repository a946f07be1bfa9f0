"""Second order: the images as the exact solution of a least-squares problem, by Levenberg-Marquardt; noise projected out.

Source: our own combination. Levenberg, Quart. Appl. Math. 2 (1944); Marquardt, SIAM J. Appl. Math. 11 (1963); variable
projection: Golub and Pereyra, SIAM J. Numer. Anal. 10 (1973), with Kaufman's Jacobian (BIT 15, 1975).
Differs from it: the unknowns are private images and the equations the client's gradient, one for each weight. A
diffusion client's gradient g = (2/m)·J(x_t)ᵀ·r is linear in the residual r = model(x_t, t) − target, so the unknown noise
is solved for and only the noisy image x_t is searched. Steps are those of all equations, by conjugate gradients; a Jacobian
of a random sketch, a few equations for each unknown, is formed now and then and preconditions them.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from time import perf_counter
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.func import grad, vjp

from attacks.equations import Equations
from attacks.labels import infer_labels
from attacks.least_squares import (
    Dense,
    Formed,
    Latest,
    MatrixFree,
    MatrixFreeLinear,
    Point,
    Projected,
    ProjectedFree,
    Recycled,
    Solution,
    levenberg_marquardt,
)
from attacks.matching import Problem, check_options, pose
from attacks.noise import differences, mean_difference, noise_level, variation_rows, variation_slopes
from attacks.smoothing import kinks, smoothed, spreads
from attacks.starting import first_guess, random_start
from attacks.switching import Gates
from attacks.timesteps import with_timesteps
from attacks.translations import Translating
from fedattack.errors import FedattackError, NotApplicable, must, one_of
from fedattack.jacobians import by_rows
from fedattack.tasks import Diffusion, Task, bind
from fedattack.types import Knowledge, Progress, Reconstruction, State, Update, silent

BOXES = ("end", "step")
WEIGHTS = {"entries": 0.0, "balanced": 0.5, "layers": 1.0}
"""How much a layer counts: its equations are divided by ‖g_layer‖ to this power."""

EQUATIONS = 4096
"""A sketch keeps at least so many: they are cheap."""

ENTRIES = 1 << 24
"""How many numbers one chunk of Jacobian columns may hold."""

JACOBIAN = 1 << 27
"""How many numbers a whole Jacobian may hold (1 GB in float64) where every equation dropped costs: with unknown noise
projected out of a noisy update."""

PROJECTED = 512
"""Pixels beyond which unknown noise is projected out by conjugate gradients."""

SMOOTHING = (0.5, 0.2, 0.08, 0.03, 0.01)
"""Widths of a continuation to sharp activations, in standard deviations of what an activation is given at the start."""

SLIGHT = 2
"""How many of these widths are left out where a start is what another attack found."""

SMOOTHED = 1e-12
"""A smoothed model need not be matched better than this."""

ROUNDS, FRUITLESS = 20, 5
"""How often free gates are chosen anew, at most, and how often in all without lowering the cost of the gated search."""

GATED, GATED_DENSE = 4, 1024
"""Equations kept for each pixel and each free gate, up to so many of both; beyond, the gated search is matrix-free."""

LOWER = 0.8
"""A round of gates has gained nothing unless it ends at this share of the lowest cost so far."""

LOYALTY = 1e-9
"""Weight, beside the relative cost, of the mean squared distance of the gates from where the images have them; less near the
end, where it would be all that is left of the cost."""

REWEIGHTINGS = 2
"""How often the quadratic bound on total variation is renewed where noise is projected out."""


@dataclass(frozen=True)
class SecondOrder:
    """Exact inversion where the model is smooth and the update clean; it says by its own cost whether it succeeded.

    iterations: trial steps of each start; the search ends early below `tolerance`, where it stalls, or once a start is
    certified. A cost is ‖simulated − observed‖²/‖observed‖² in the weights of the search: 1 for silence, 0 for a perfect
    match. weights: "entries" (all alike), "layers" (each divided by its norm, so that all layers count the same) or
    "balanced" between them. certified: the cost, in "layers" weights whatever the search had, below which (with as many
    independent equations as unknowns; beyond dense_limit independence is not checked) a result is called exact.
    start: "grey", "normal" or "uniform", see Problem.start; or an attack such as "r-conv", whose result is the first start
    (of models with ReLUs the second too, slightly smoothed; the others are grey). box: images are clamped to [0, 1] at the
    "end" or after each "step". damping: of the first step, in units of the largest diagonal entry of JᵀJ. sketch: equations
    kept for each unknown in the Jacobians that precondition the steps, 0 for all, never fewer than 4,096 (with unknown noise in
    at most 512 pixels the search itself keeps four times as many: with fewer, most get stuck). dense_limit: unknown pixels
    beyond which no Jacobian is formed and each step takes up to `inner_steps` plain conjugate gradients.
    smoothing_iterations: trial steps, before those on the model itself, at each of five widths of smoothed copies of a model
    whose modules include ReLUs, the gradients of which jump (always with weights "layers": deep ones need it); 0: none.
    switching_iterations: of such a model, where that did not end exactly: trial steps of each of up to 20 rounds in which the
    on or off of the units nearest to their kinks, a share `gates` of all, is unknown beside the images (see
    attacks/switching.py); 0: none. For one clean update of one step on all images.
    translations: where a search of a clean update has stalled: further searches, at most, of as many iterations each, from its
    end with one image moved by a few pixels (see attacks/translations.py); 0: none.
    spectrum: whether rank and condition number are computed at the end (beyond dense_limit only a lower bound of the condition
    number, from the conjugate gradients).

    sigma: standard deviation of Gaussian noise on every entry of the (pseudo-)gradient; None: what the known defense says,
    else none. With noise the whitened problem is solved, all equations kept as far as memory allows, with a total-variation
    prior on the images times `prior_weight` (0: none) and N(0, 1) on unknown DDPM noise: maximum a posteriori.
    """

    name: ClassVar[str] = "second-order"
    needs: ClassVar[frozenset[str]] = frozenset({"image_shape", "batch_size"})
    tasks: ClassVar[frozenset[str]] = frozenset({"classification", "diffusion"})

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
        for name in ("sigma", "prior_weight"):
            if (value := getattr(self, name)) is not None and not value >= 0:
                raise FedattackError(must(name, "zero or positive", value))
        if self.translations < 0:
            raise FedattackError(must("translations", "zero or positive", self.translations))
        if not 0 < self.gates <= 1:
            raise FedattackError(must("gates", "a share above 0, at most 1", self.gates))

    def kept(self, unknowns: int) -> int:
        """How many equations a sketch keeps; 0: all."""
        return max(EQUATIONS, math.ceil(self.sketch * unknowns)) if self.sketch > 0 else 0

    def reconstruct(
        self,
        update: Update,
        model: nn.Module,
        task: Task,
        knowledge: Knowledge,
        *,
        generator: torch.Generator,
        progress: Progress = silent,
    ) -> Reconstruction:
        begun = perf_counter()
        first, knowledge = first_guess(self.start, update, model, task, knowledge, generator)
        if task.name == "diffusion" and (knowledge.timesteps is None or knowledge.history):
            return _search_rounds(self, update, model, task, knowledge, generator, progress, begun, first)
        if task.name == "classification" and knowledge.labels is None:
            knowledge = replace(knowledge, labels=infer_labels(update, model, knowledge, generator=generator))
        views = [_View.of(self, seen, model, task, knowledge) for seen in (update, *(knowledge.history or ()))]
        case = _Case(self, views, mean_difference(knowledge), generator, progress, begun, first)
        return _search_noisy(case) if "noise" in views[0].problem.unknown else _search_images(case)


def _search_rounds(
    attack: SecondOrder,
    update: Update,
    model: nn.Module,
    task: Task,
    knowledge: Knowledge,
    generator: torch.Generator,
    progress: Progress,
    begun: float,
    first: Tensor | None,
) -> Reconstruction:
    """A diffusion client's updates one by one, that of the smallest timesteps first, until one is explained.

    Timesteps are integers, no unknowns of a least-squares problem: they are read off the time embedding. They come without
    an order, which is no loss where the images have none either: in one local step with unknown noise.
    """
    several = (knowledge.local_steps or 1) > 1
    if knowledge.timesteps is None and (several or (knowledge.noise is not None and (knowledge.batch_size or 1) > 1)):
        raise NotApplicable(
            "timesteps must be known: those of several steps, or beside given noise, cannot be put in order"
        )
    told = [(update, with_timesteps(update, model, task, replace(knowledge, history=None)))]
    for seen in knowledge.history or ():  # given timesteps and noise belong to the update itself
        other = replace(knowledge, history=None, timesteps=None, noise=None)
        told.append((seen, with_timesteps(seen, model, task, other)))
    told.sort(key=lambda pair: _largest(pair[1].timesteps))
    ends: list[Reconstruction] = []
    for seen, known in told:
        views = [_View.of(attack, seen, model, task, known)]
        case = _Case(attack, views, mean_difference(knowledge), generator, progress, begun, first)
        found = _search_noisy(case) if "noise" in views[0].problem.unknown else _search_images(case)
        ends.append(found)
        if found.diagnostics["starts_succeeded"] > 0:
            break
    best = min(ends, key=lambda found: found.diagnostics.get("chi_square", found.diagnostics["loss"]))
    return replace(
        best,
        steps=sum(found.steps for found in ends),
        diagnostics=best.diagnostics | {"rounds_seen": float(len(told)), "rounds_tried": float(len(ends))},
    )


def _largest(timesteps: Tensor | None) -> int:
    assert timesteps is not None
    return int(timesteps.max())


# ---------------------------------------------------------------------------------------------------- equations
def _chunk(count: int) -> int:
    return max(1, min(64, ENTRIES // count))


@dataclass(frozen=True)
class _View:
    """One update of the images.

    equations: those of the search. verdict: all of them, by which the results of starts are compared; every layer alike,
    unless there is noise. noise: its standard deviation on every equation.
    """

    problem: Problem
    equations: Equations
    verdict: Equations
    noise: float

    @staticmethod
    def of(attack: SecondOrder, update: Update, model: nn.Module, task: Task, knowledge: Knowledge) -> "_View":
        problem = pose(update, model, task, knowledge, precision=attack.precision)
        sigma = noise_level(update, knowledge) if attack.sigma is None else attack.sigma
        equations = Equations.of(problem, update, WEIGHTS["entries" if sigma > 0 else attack.weights])
        verdict = equations if sigma > 0 else Equations.of(problem, update)
        return _View(problem, equations, verdict, sigma * float(next(iter(equations.weights.values()))))

    def sketched(self, count: int, generator: torch.Generator) -> "_View":
        return replace(self, equations=self.equations.sketched(count, generator))

    def to(self, dtype: torch.dtype) -> "_View":
        return replace(self, problem=self.problem.to(dtype), equations=self.equations.to(dtype))

    def cost(self, guess: dict[str, Tensor]) -> float:
        with torch.no_grad():
            return _squared(self.verdict.left(self.problem.simulated(guess)) - self.verdict.wanted)


@dataclass(frozen=True)
class _Case:
    """What every search needs. views: updates of the same images, noisy ones divided by their noise where there are several.

    difference: the mean difference of neighbouring pixels of public images. first: images to start from.
    """

    attack: SecondOrder
    views: list[_View]
    difference: float
    generator: torch.Generator
    progress: Progress
    begun: float
    first: Tensor | None = None

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
    ) -> Translating:
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

    @property
    def noise(self) -> float:
        """On every equation of the first view, and of the others once they are scaled by `share`; 0: there is none."""
        return self.views[0].noise

    def share(self, view: _View) -> float:
        """What a view's equations are multiplied by, so that all have the same noise."""
        return self.noise / view.noise if self.noise > 0 and view.noise > 0 else 1.0

    @property
    def prior(self) -> float:
        """Factor of the prior's residuals, −2·log p, beside equations that are not divided by their noise."""
        return self.noise * math.sqrt(2.0 * self.attack.prior_weight)

    def cost(self, guess: dict[str, Tensor]) -> float:
        """Mean over the views of the verdict."""
        return sum(self.share(view) ** 2 * view.cost(guess) for view in self.views) / len(self.views)

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


# ---------------------------------------------------------------------------------------------------- known noise
def _search_images(case: _Case) -> Reconstruction:
    """Nothing but the images is unknown."""
    attack, problem = case.attack, case.views[0].problem
    variable = problem.unknown["images"]
    unknowns = math.prod(variable.shape)
    dense = unknowns <= attack.dense_limit
    starts = case.starts()["images"].reshape(attack.restarts, -1)
    sharp = bool(kinks(problem.model))
    widths = SMOOTHING if sharp and attack.smoothing_iterations > 0 else ()
    lone = len(case.views) == 1 and problem.steps == [list(range(variable.shape[0]))] and case.noise == 0
    switching = sharp and lone and attack.switching_iterations > 0
    if case.first is not None and widths:
        starts[1:2] = starts[0]  # first as it is, for strong smoothing leads away from it, then slightly smoothed
    layered = [replace(view, equations=view.verdict) for view in case.views]

    def function(views: Sequence[_View], x: Tensor, transformable: bool = False) -> Tensor:
        images = x.reshape(variable.shape)
        rows = []
        for view in views:
            simulated = view.problem.simulated({"images": images}, transformable=transformable)
            rows.append(case.share(view) * view.equations.residual(simulated))
        if case.prior > 0:
            rows.append(case.prior * variation_rows(images, case.difference))
        return torch.cat(rows)

    def stepper(views: Sequence[_View]) -> Callable[[Tensor], Point]:
        few = [view.sketched(attack.kept(unknowns), case.generator) for view in views] if dense else []
        rough, formed = [view.to(torch.float32) for view in few], Formed()

        def sketched(x: Tensor) -> Tensor:
            return function(rough if x.dtype == torch.float32 else few, x, transformable=True)

        def at(x: Tensor) -> Point:
            whole = partial(function, views)
            if dense:
                return Recycled.at(whole, sketched, x, _chunk(case.count), formed)
            return MatrixFree.at(whole, x, attack.inner_steps)

        return at

    def search(brief: SecondOrder, views: Sequence[_View], start: Tensor, told: Told) -> Solution:
        return _searched(brief, stepper(views), start, told, box)

    def rough_cost(x: Tensor) -> float:
        with torch.no_grad():
            return _squared(function(case.views, x))

    def finish(solution: Solution) -> dict[str, Tensor]:
        return {"images": solution.x.reshape(variable.shape)}

    box = (torch.zeros_like(starts[0]), torch.ones_like(starts[0])) if attack.box == "step" else None

    def solve(number: int, start: Tensor, told: Told) -> Solution:
        first: tuple[float, ...] = ()
        trials: list[float] = []
        spread = spreads(problem.model, problem.sent, start.reshape(variable.shape)) if widths else {}
        for width in widths if case.first is None or number > 1 else (widths[SLIGHT:] if number else ()):
            brief = replace(attack, iterations=attack.smoothing_iterations, tolerance=SMOOTHED)
            views = [_smoothed(view, {name: width * size for name, size in spread.items()}) for view in layered]
            found = search(brief, views, start, _later(told, len(trials)))
            start = found.x if math.isfinite(found.costs[-1]) else start
            first, trials = first or found.costs[:1], [*trials, *found.costs[1:]]

        at = stepper(case.views)

        def sharp_search(x: Tensor, done: int, before: int = len(trials)) -> Solution:
            return _searched(attack, at, x, _later(told, before + done), box)

        translating = case.translating(sharp_search, lambda end: end.x, finish, rough_cost)
        found = best = translating.search_from(start)
        first, trials = first or found.costs[:1], [*trials, *found.costs[1:]]
        x, lowest, fruitless, share, searches = found.x, math.inf, 0, attack.gates, found.searches
        for _ in range(ROUNDS if switching else 0):
            if case.cost(finish(best)) <= case.success or not math.isfinite(best.costs[-1]) or fruitless == FRUITLESS:
                break
            gated = _switched(case, x, share, min(LOYALTY, 0.1 * lowest), _later(told, len(trials)))
            if gated is None or not math.isfinite(gated.costs[-1]):
                break
            if gated.costs[-1] < LOWER * lowest:
                lowest = gated.costs[-1]
            else:  # near the end fewer gates are in doubt, and too many leave the images undetermined
                fruitless, share = fruitless + 1, 0.5 * share
            x, trials = gated.x[:unknowns], [*trials, *gated.costs[1:]]
            brief = replace(attack, iterations=attack.switching_iterations)
            found = search(brief, case.views, x, _later(told, len(trials)))
            trials += found.costs[1:]
            best = min(best, found, key=lambda end: case.cost(finish(end)))
        return replace(best, costs=(*first, *trials), searches=searches)

    extra = len(widths) * attack.smoothing_iterations + (2 * ROUNDS * attack.switching_iterations if switching else 0)
    return _multistart(case, solve, starts, finish, unknowns, extra)


def _switched(case: _Case, x: Tensor, share: float, loyalty: float, told: "Told") -> Solution | None:
    """A search from x of images and a share of the gates at once, gates last; None where there is no room for any gate."""
    attack, problem = case.attack, case.views[0].problem
    shape = problem.unknown["images"].shape
    gates = Gates.of(problem.model, problem.sent, x.reshape(shape))
    states, pixels = gates.states, len(x)
    count = min(math.ceil(share * len(states)), case.count - pixels)
    if count <= 0:
        return None
    near, chance = gates.nearest(count)
    dense = pixels + count <= min(GATED_DENSE, attack.dense_limit)
    equations = case.views[0].equations.whole
    if dense:
        equations = equations.sketched(max(EQUATIONS, GATED * (pixels + count)), case.generator)
    gated = replace(problem, model=gates.model)

    def residual(z: Tensor) -> Tensor:
        images, free = z[:pixels].reshape(shape), z[pixels:]
        gates.put(states.index_put((near,), free))
        simulated = gated.simulated({"images": images}, transformable=dense)
        return torch.cat([equations.residual(simulated), math.sqrt(loyalty / count) * (free - chance)])

    def at(z: Tensor) -> Point:
        return Dense.at(residual, z, _chunk(case.count)) if dense else MatrixFree.at(residual, z, attack.inner_steps)

    box = None
    if attack.box == "step":
        open_ended = torch.full_like(chance, math.inf)
        box = (torch.cat([torch.zeros_like(x), -open_ended]), torch.cat([torch.ones_like(x), open_ended]))
    brief = replace(attack, iterations=attack.switching_iterations)
    return _searched(brief, at, torch.cat([x, chance]), told, box)


def _smoothed(view: _View, widths: Mapping[str, float]) -> _View:
    return replace(view, problem=replace(view.problem, model=smoothed(view.problem.model, widths)))


def _later(told: "Told", done: int) -> "Told":
    return lambda iteration, cost: told(done + iteration, cost)


# ---------------------------------------------------------------------------------------------------- unknown noise
def _search_noisy(case: _Case) -> Reconstruction:
    """Images and noise are unknown: search the noisy images x_t, with the residual r = model(x_t, t) − target projected out."""
    attack, problem = case.attack, case.views[0].problem
    task = problem.task
    if not isinstance(task, Diffusion):
        raise NotApplicable("noise can be projected out of the diffusion task only")
    if len(problem.steps) > 1:
        raise NotApplicable(
            "unknown noise can be projected out of one local step only: later ones are not linear in it"
        )
    shape = problem.unknown["images"].shape
    pixels = math.prod(shape)
    length = math.sqrt(sum(float(tensor.square().sum()) for tensor in problem.observed.values()))
    if problem.clip_norm is not None and length > 0.999 * problem.clip_norm:
        raise NotApplicable("clipping hides the scale of the residual, by which unknown noise is found")
    if case.count < 2 * pixels:
        raise NotApplicable(f"{case.count} numbers cannot tell {2 * pixels} unknowns (images and noise)")
    timesteps = problem.known["timesteps"]
    alpha_bar = task.alphas_cumprod.to(timesteps.device)[timesteps].to(problem.dtype).reshape(-1, 1, 1, 1)
    signal, spread = alpha_bar.sqrt(), (1.0 - alpha_bar).sqrt()
    starts = case.starts()
    noisy = signal * (2.0 * starts["images"] - 1.0) + spread * starts["noise"]
    dense = pixels <= min(attack.dense_limit, PROJECTED)
    whole = case.views[0]
    kept = attack.kept(2 * pixels)
    if dense:  # the search itself is sketched: see `sketch`
        kept = max(EQUATIONS, JACOBIAN // (2 * pixels)) if case.noise > 0 else attack.kept(8 * pixels)
    few = whole.sketched(kept, case.generator)

    def predict(problem: Problem, weights: State, x: Tensor) -> Tensor:
        return bind(problem.model, {**problem.sent, **weights})(x.reshape(shape), timesteps)

    def private(problem: Problem, x: Tensor, r: Tensor) -> dict[str, Tensor]:
        """Images and noise behind noisy images and residual; linear in r."""
        target, seen = predict(problem, {}, x) - r.reshape(shape), x.reshape(shape)
        root, rest = signal.to(x), spread.to(x)
        if task.prediction_type == "epsilon":
            return {"images": 0.5 + 0.5 * (seen - rest * target) / root, "noise": target}
        return {"images": 0.5 + 0.5 * (root * seen - rest * target), "noise": rest * seen + root * target}

    def unlikely(problem: Problem, x: Tensor, r: Tensor, slopes: Tensor) -> Tensor:
        """Residuals of the prior, empty where there is none."""
        if case.noise == 0:
            return x.new_zeros(0)
        guess = private(problem, x, r)
        parts = [case.noise * guess["noise"].reshape(-1)]
        return torch.cat([*parts, case.prior * slopes.to(x) * differences(guess["images"])])

    def residual(view: _View, slopes: Tensor, x: Tensor, r: Tensor, transformable: bool = True) -> Tensor:
        problem = view.problem
        pulled = (2.0 / pixels) * r.reshape(shape)
        trained = {name: problem.sent[name] for name in problem.observed}
        if transformable:
            simulated = grad(lambda weights: (pulled * predict(problem, weights, x)).sum())(trained)
        else:  # plain autograd, whose graphs the matrix-free search keeps
            at = {name: tensor.detach().requires_grad_() for name, tensor in trained.items()}
            seen = (pulled * predict(problem, at, x)).sum()
            found = torch.autograd.grad(seen, list(at.values()), create_graph=True, materialize_grads=True)
            simulated = dict(zip(at, found, strict=True))
        return torch.cat([view.equations.residual(simulated), unlikely(problem, x, r, slopes)])

    def matrix(slopes: Tensor, x: Tensor) -> Tensor:
        trained = {name: problem.sent[name] for name in problem.observed}
        pull: Callable[..., tuple[State]] = vjp(lambda weights: predict(problem, weights, x), trained)[1]
        without = unlikely(problem, x, torch.zeros_like(x), slopes)

        def row(r: Tensor) -> Tensor:
            pulled = pull((2.0 / pixels) * r.reshape(shape), retain_graph=True)[0]
            equations = few.equations.pressed(few.equations.left(pulled))
            return torch.cat([equations, unlikely(problem, x, r, slopes) - without])

        return by_rows(row, pixels, _chunk(case.count), x)

    def dense_at(slopes: Tensor) -> Callable[[Tensor], Point]:
        rows, function = partial(matrix, slopes), partial(residual, few, slopes)
        return lambda x: Projected.at(rows, function, x, _chunk(case.count))

    def free_at(slopes: Tensor, latest: Latest) -> Callable[[Tensor], Point]:
        formed, rough = Formed() if pixels <= attack.dense_limit else None, few.to(torch.float32)

        def both(z: Tensor) -> Tensor:
            return residual(whole, slopes, z[:pixels], z[pixels:], transformable=False)

        def sketched(z: Tensor) -> Tensor:
            return residual(rough if z.dtype == torch.float32 else few, slopes, z[:pixels], z[pixels:])

        return lambda x: ProjectedFree.at(both, sketched, x, _chunk(case.count), attack.inner_steps, latest, formed)

    def finish(solution: Solution) -> dict[str, Tensor]:
        assert isinstance(solution.point, Projected | ProjectedFree)
        with torch.no_grad():
            return private(problem, solution.x, solution.point.linear_unknowns)

    def unknown(solution: Solution) -> Tensor:
        assert isinstance(solution.point, Projected | ProjectedFree)
        return torch.cat([solution.x, solution.point.linear_unknowns])

    def solve(number: int, start: Tensor, told: Told) -> Solution:
        slopes = torch.full_like(differences(start.reshape(shape)), 1.0 / case.difference)
        costs: tuple[float, ...] = ()
        for _ in range(1 + REWEIGHTINGS):
            latest = Latest(torch.zeros_like(start))
            at = dense_at(slopes) if dense else free_at(slopes, latest)

            def put(z: Tensor, latest: Latest = latest) -> Tensor:  # noisy images and residuals, one behind the other
                latest.y = z[pixels:]
                return z[:pixels]

            def search(z: Tensor, done: int, at: Callable[[Tensor], Point] = at) -> Solution:
                return _searched(attack, at, put(z), _later(told, done))

            def rough_cost(z: Tensor, slopes: Tensor = slopes) -> float:
                with torch.no_grad():
                    return _squared(residual(whole, slopes, z[:pixels], z[pixels:]))

            def close_cost(z: Tensor, at: Callable[[Tensor], Point] = at) -> float:
                return _squared(at(put(z)).residual)

            begin = torch.cat([start, latest.y])
            solution = case.translating(search, unknown, finish, rough_cost, close_cost).search_from(begin)
            costs += solution.costs
            if case.prior == 0 or not math.isfinite(solution.costs[-1]):
                break
            start, slopes = solution.x, variation_slopes(finish(solution)["images"], case.difference)
        return replace(solution, costs=costs)

    return _multistart(case, solve, noisy.reshape(attack.restarts, -1), finish, 2 * pixels)


# ---------------------------------------------------------------------------------------------------- starts
Told = Callable[[int, float], None]


def _searched(
    attack: SecondOrder,
    at: Callable[[Tensor], Point],
    start: Tensor,
    told: Told,
    box: tuple[Tensor, Tensor] | None = None,
) -> Solution:
    return levenberg_marquardt(
        at,
        start,
        iterations=attack.iterations,
        tolerance=attack.tolerance,
        damping=attack.damping,
        box=box,
        told=told,
    )


def _squared(residual: Tensor) -> float:
    """‖ρ‖², infinite where it is not finite."""
    found = float(residual.detach().square().sum())
    return found if math.isfinite(found) else math.inf


def _multistart(
    case: _Case,
    solve: Callable[[int, Tensor, Told], Solution],
    starts: Tensor,
    finish: Callable[[Solution], dict[str, Tensor]],
    unknowns: int,
    before: int = 0,
) -> Reconstruction:
    """One start after another until one explains the update; the lowest verdict wins. solve: is given a start's number too.
    before: trials besides iterations."""
    attack, problem = case.attack, case.views[0].problem
    ends: list[tuple[float, Solution, dict[str, Tensor]]] = []
    trials = 0
    for number, start in enumerate(starts):

        def told(iteration: int, cost: float, done: int = number * (before + attack.iterations)) -> None:
            here = min(iteration, before + attack.iterations)  # searches of moved images come on top
            case.progress(done + here, len(starts) * (before + attack.iterations), cost)

        solution = solve(number, start, told)
        trials += len(solution.costs) - 1
        guess = finish(solution)
        ends.append((case.cost(guess), solution, guess))
        if ends[-1][0] <= case.success and unknowns <= case.count:
            break
    cost, solution, guess = min(ends, key=lambda end: end[0])
    equations = sum(view.equations.count for view in case.views)
    diagnostics = {
        "loss": cost,
        "iterations": float(len(solution.costs) - 1),
        "starts": float(len(ends)),
        "translations": float(sum(end[1].searches - 1 for end in ends)),
        "starts_succeeded": float(sum(end[0] <= case.success for end in ends)),
        "equations": float(equations),
        "unknowns": float(unknowns),
        "dense": float(not isinstance(solution.point, MatrixFree | ProjectedFree)),
    }
    if len(case.views) > 1:
        diagnostics["rounds_seen"] = float(len(case.views))
    if case.noise > 0:
        diagnostics["chi_square"] = cost * len(case.views) / (case.noise**2 * case.count)
    determined = unknowns <= case.count
    spectrum = solution.linear.spectrum() if attack.spectrum else None
    if spectrum is not None and len(spectrum.values) > 0 and float(spectrum.values[0]) > 0:
        values, rank = spectrum.values, spectrum.rank
        searched = len(solution.x)
        determined = determined and rank == searched
        diagnostics["condition"] = float(values[0] / values[min(len(values), searched) - 1].clamp_min(1e-300))
        if isinstance(solution.point, Projected):
            rank += solution.point.linear_rank
            determined = determined and rank == unknowns
        diagnostics["rank"] = float(rank)
    if attack.spectrum and isinstance(solution.linear, MatrixFreeLinear):
        largest, smallest = solution.linear.extremes
        if smallest > 0:
            diagnostics["condition_at_least"] = largest / smallest
    diagnostics["certified"] = float(cost <= attack.certified and determined)
    found = problem.estimate(guess)
    return Reconstruction(
        images=found["images"].clamp(0.0, 1.0).nan_to_num(0.5).float(),
        labels=found.get("labels"),
        timesteps=found.get("timesteps"),
        noise=found["noise"].nan_to_num(0.0) if "noise" in found else None,
        losses=(*solution.costs, cost),
        steps=trials,
        seconds=perf_counter() - case.begun,
        diagnostics=diagnostics,
    )

"""Second order: the images as the exact solution of a least-squares problem, by Levenberg-Marquardt; noise projected out.

Source: our own combination. Levenberg, Quart. Appl. Math. 2 (1944); Marquardt, SIAM J. Appl. Math. 11 (1963); variable
projection: Golub and Pereyra, SIAM J. Numer. Anal. 10 (1973), with Kaufman's Jacobian (BIT 15, 1975).
Differs from it: the unknowns are private images and the equations the client's gradient, one for each weight. A
diffusion client's gradient g = (2/m)·J(x_t)ᵀ·r is linear in the residual r = model(x_t, t) − target, so the unknown noise
is solved for and only the noisy image x_t is searched. Steps are those of all equations, by conjugate gradients; a Jacobian
of a random sketch, a few equations for each unknown, is formed now and then and preconditions them. L-BFGS brings starts near.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from time import perf_counter
from typing import ClassVar

import torch
from torch import Tensor, nn

from attacks.labels import infer_labels
from attacks.least_squares import Dense, MatrixFree, Point, Recycled, Solution
from attacks.noise import mean_difference, variation_rows
from attacks.preconditioners import Formed, Nystrom
from attacks.second_order_noise import search_noisy
from attacks.second_order_search import (
    EQUATIONS,
    Case,
    Descent,
    Options,
    Told,
    View,
    chunk_of,
    later,
    multistart,
    nearest_first,
    searched,
    squared,
)
from attacks.smoothing import kinks, smoothed, spreads
from attacks.starting import first_guess
from attacks.switching import Gates
from attacks.timesteps import with_timesteps
from fedattack.errors import NotApplicable
from fedattack.tasks import Task
from fedattack.types import Knowledge, Progress, Reconstruction, Update, silent

LONGEST, CLOSE, PRICE = 10, 1e-6, 160
"""Of descents of images alone, see `_descent`. On deep networks L-BFGS is ahead of Levenberg-Marquardt down to the second."""

WAITING = 3
"""So many starts that a descent did not bring near wait for nearer ones before one of them is searched all the same."""

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


@dataclass(frozen=True)
class SecondOrder(Options):
    """Exact inversion where the model is smooth and the update clean; it says by its own cost whether it succeeded.

    Options: see `attacks.second_order_search.Options`.
    """

    name: ClassVar[str] = "second-order"
    needs: ClassVar[frozenset[str]] = frozenset({"image_shape", "batch_size"})
    tasks: ClassVar[frozenset[str]] = frozenset({"classification", "diffusion"})

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
        first, knowledge = first_guess(self.start, update, model, task, knowledge, generator, progress)
        if task.name == "diffusion" and (knowledge.timesteps is None or knowledge.history):
            return _search_rounds(self, update, model, task, knowledge, generator, progress, begun, first)
        if task.name == "classification" and knowledge.labels is None:
            knowledge = replace(knowledge, labels=infer_labels(update, model, knowledge, generator=generator))
        views = [View.of(self, seen, model, task, knowledge) for seen in (update, *(knowledge.history or ()))]
        case = Case(self, views, mean_difference(knowledge), generator, progress, begun, first)
        return search_noisy(case) if "noise" in views[0].problem.unknown else _search_images(case)


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
    for number, (seen, known) in enumerate(told):

        def heard(done: int, total: int, cost: float, number: int = number) -> None:
            progress(number * total + done, len(told) * total, cost)

        views = [View.of(attack, seen, model, task, known)]
        case = Case(attack, views, mean_difference(knowledge), generator, heard, begun, first)
        found = search_noisy(case) if "noise" in views[0].problem.unknown else _search_images(case)
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


# ---------------------------------------------------------------------------------------------------- images alone
def _descent(unknowns: int) -> Descent:
    """Below CLOSE a descent goes on while it gains a factor of ten for half the price of forming one Jacobian.

    That price is one step of L-BFGS (20 gradients) for every PRICE / 2 unknowns, as measured on a ConvNet at 32×32.
    """
    return Descent(longest=LONGEST, close=CLOSE, quick=1.0 - 10.0 ** (-PRICE / unknowns))


def _search_images(case: Case) -> Reconstruction:
    """Nothing but the images is unknown."""
    attack, problem = case.attack, case.views[0].problem
    variable = problem.unknown["images"]
    unknowns = math.prod(variable.shape)
    groups = attack.groups(variable.shape)
    starts = case.starts()["images"].reshape(attack.restarts, -1)
    sharp = kinks(problem.model)
    widths = SMOOTHING if sharp and attack.smoothing_iterations > 0 else ()
    lone = len(case.views) == 1 and problem.steps == [list(range(variable.shape[0]))] and case.noise == 0
    switching = bool(sharp) and lone and attack.switching_iterations > 0
    if case.first is not None and widths:
        starts[1:2] = starts[0]  # first as it is, for strong smoothing leads away from it, then slightly smoothed
    layered = [replace(view, equations=view.verdict) for view in case.views]

    def function(views: Sequence[View], x: Tensor, transformable: bool = False) -> Tensor:
        images = x.reshape(views[0].problem.unknown["images"].shape)
        rows = []
        for view in views:
            simulated = view.problem.simulated({"images": images}, transformable=transformable)
            rows.append(case.share(view) * view.equations.residual(simulated))
        if case.prior > 0:
            rows.append(case.prior * variation_rows(images, case.difference))
        return torch.cat(rows)

    def stepper(views: Sequence[View]) -> Callable[[Tensor], Point]:
        if groups is None:
            sketch = Nystrom(case.generator)
            return lambda x: MatrixFree.at(partial(function, views), x, attack.inner_steps, sketch)
        kept = attack.kept(len(groups[0]) if groups else unknowns)
        few = [view.sketched(kept, case.generator) for view in views]
        rough = [view.to(torch.float32) for view in few]

        def sketched(x: Tensor, number: int | None = None) -> Tensor:
            seen = rough if x.dtype == torch.float32 else few
            if number is None:
                return function(seen, x, transformable=True)
            return function([one for view in seen if (one := view.alone(number))], x, transformable=True) / count

        count = variable.shape[0]
        shared = count > 1 and case.prior == 0 and all(_mean(view, starts[0].reshape(variable.shape)) for view in views)
        formed = Formed(
            [group.to(starts.device) for group in groups],
            [partial(sketched, number=number) for number in range(count)] if shared else [],
        )
        return lambda x: Recycled.at(partial(function, views), sketched, x, chunk_of(case.count), formed)

    def search(brief: Options, views: Sequence[View], start: Tensor, told: Told) -> Solution:
        return searched(brief, stepper(views), start, told, box)

    def rough_cost(x: Tensor) -> float:
        with torch.no_grad():
            return squared(function(case.views, x))

    def finish(solution: Solution) -> dict[str, Tensor]:
        return {"images": solution.x.reshape(variable.shape)}

    box = (torch.zeros_like(starts[0]), torch.ones_like(starts[0])) if attack.box == "step" else None

    def solve(number: int, start: Tensor, told: Told) -> Solution:
        first: tuple[float, ...] = ()
        trials: list[float] = []
        spread = spreads(problem.model, problem.sent, start.reshape(variable.shape)) if widths else {}
        for width in widths if case.first is None or number > 1 else (widths[SLIGHT:] if number else ()):
            brief = replace(attack, iterations=attack.smoothing_iterations, tolerance=SMOOTHED)
            views = [
                _smoothed(view, {name: width * spread[name] for name in sharp if name in spread}) for view in layered
            ]
            found = search(brief, views, start, later(told, len(trials)))
            start = found.x if math.isfinite(found.costs[-1]) else start
            first, trials = first or found.costs[:1], [*trials, *found.costs[1:]]

        at = stepper(case.views)

        def sharp_search(x: Tensor, done: int, before: int = len(trials)) -> Solution:
            return searched(attack, at, x, later(told, before + done), box)

        translating = case.translating(sharp_search, lambda end: end.x, finish, rough_cost)
        found = best = translating.search_from(start)
        first, trials = first or found.costs[:1], [*trials, *found.costs[1:]]
        x, lowest, fruitless, share, searches = found.x, math.inf, 0, attack.gates, found.searches
        for _ in range(ROUNDS if switching else 0):
            if case.cost(finish(best)) <= case.success or not math.isfinite(best.costs[-1]) or fruitless == FRUITLESS:
                break
            gated = _switched(case, x, share, min(LOYALTY, 0.1 * lowest), later(told, len(trials)))
            if gated is None or not math.isfinite(gated.costs[-1]):
                break
            if gated.costs[-1] < LOWER * lowest:
                lowest = gated.costs[-1]
            else:  # near the end fewer gates are in doubt, and too many leave the images undetermined
                fruitless, share = fruitless + 1, 0.5 * share
            x, trials = gated.x[:unknowns], [*trials, *gated.costs[1:]]
            brief = replace(attack, iterations=attack.switching_iterations)
            found = search(brief, case.views, x, later(told, len(trials)))
            trials += found.costs[1:]
            best = min(best, found, key=lambda end: case.cost(finish(end)))
        return replace(best, costs=(*first, *trials), searches=searches)

    def approach(number: int) -> tuple[float, Tensor]:
        begun = {"images": starts[number].reshape(variable.shape)}
        unit = case.unit(begun)
        place = case.descend(begun, _descent(unknowns), unit).x
        place = place if box is None else place.clamp(*box)
        return case.distance_at({"images": place.reshape(variable.shape)}) / unit, place

    extra = len(widths) * attack.smoothing_iterations + 2 * ROUNDS * attack.switching_iterations * switching
    ordered = nearest_first(attack.restarts, approach, WAITING) if case.descending else starts
    return multistart(case, solve, ordered, finish, unknowns, extra)


def _mean(view: View, images: Tensor) -> bool:
    """Whether these images' update is the mean of what they would send alone, as it must be unless the model mixes images."""
    alone = [one for number in range(len(images)) if (one := view.alone(number))]
    if not alone:
        return False
    with torch.no_grad():
        parts = [
            one.equations.left(one.problem.simulated({"images": images[number : number + 1]}))
            for number, one in enumerate(alone)
        ]
        whole = view.equations.left(view.problem.simulated({"images": images}))
    off = float((torch.stack(parts).mean(0) - whole).norm())
    return off <= math.sqrt(torch.finfo(whole.dtype).eps) * float(whole.norm())


def _switched(case: Case, x: Tensor, share: float, loyalty: float, told: Told) -> Solution | None:
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
        return Dense.at(residual, z, chunk_of(case.count)) if dense else MatrixFree.at(residual, z, attack.inner_steps)

    box = None
    if attack.box == "step":
        open_ended = torch.full_like(chance, math.inf)
        box = (torch.cat([torch.zeros_like(x), -open_ended]), torch.cat([torch.ones_like(x), open_ended]))
    brief = replace(attack, iterations=attack.switching_iterations)
    return searched(brief, at, torch.cat([x, chance]), told, box)


def _smoothed(view: View, widths: Mapping[str, float]) -> View:
    return replace(view, problem=replace(view.problem, model=smoothed(view.problem.model, widths)))

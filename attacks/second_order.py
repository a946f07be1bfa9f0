"""Second order: the images as the exact solution of a least-squares problem, by Levenberg-Marquardt; noise projected out.

Source: our own combination. Levenberg, Quart. Appl. Math. 2 (1944); Marquardt, SIAM J. Appl. Math. 11 (1963); variable
projection: Golub and Pereyra, SIAM J. Numer. Anal. 10 (1973), with Kaufman's Jacobian (BIT 15, 1975).
Differs from it: the unknowns are private images and the equations the client's gradient, one for each weight. A
diffusion client's gradient g = (2/m)·J(x_t)ᵀ·r is linear in the residual r = model(x_t, t) − target, so the unknown noise
is solved for and only the noisy image x_t is searched. Where there are many more weights than unknowns, a random sketch
keeps a few equations for each unknown.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from time import perf_counter
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.func import grad, vjp

from attacks.labels import infer_labels
from attacks.least_squares import (
    Dense,
    MatrixFree,
    Point,
    Projected,
    Solution,
    by_rows,
    levenberg_marquardt,
    numerical_rank,
)
from attacks.matching import Problem, check_options, pose
from attacks.timesteps import with_timesteps
from fedattack.errors import FedattackError, NotApplicable, one_of
from fedattack.tasks import Diffusion, Task, bind
from fedattack.types import Knowledge, Progress, Reconstruction, State, Update, silent

BOXES = ("end", "step")
WEIGHTS = {"entries": 0.0, "balanced": 0.5, "layers": 1.0}
"""How much a layer counts: its equations are divided by ‖g_layer‖ to this power."""

EQUATIONS = 4096
"""A sketch keeps at least so many: searches of small problems get stuck less often with more, and they are cheap."""

ENTRIES = 1 << 24
"""How many numbers one chunk of Jacobian columns may hold."""


@dataclass(frozen=True)
class SecondOrder:
    """Exact inversion where the model is smooth and the update clean; it says by its own cost whether it succeeded.

    iterations: trial steps of each start; the search ends early below `tolerance`, where it stalls, or once a start is
    certified. A cost is ‖simulated − observed‖²/‖observed‖² in the weights of the search: 1 for silence, 0 for a perfect
    match. weights: "entries" (all alike), "layers" (each divided by its norm, so that all layers count the same) or
    "balanced" between them. certified: the cost, in "layers" weights whatever the search had, below which (with as many
    independent equations as unknowns) a result is called exact.
    start: "grey", "normal" or "uniform", see Problem.start. box: images are clamped to [0, 1] at the "end" or after each
    "step". damping: of the first step, in units of the largest diagonal entry of JᵀJ. sketch: equations kept for each
    unknown, 0 for all, never fewer than 4,096; four times as many where noise is unknown (with fewer, most of those
    searches get stuck). dense_limit: unknowns beyond which no Jacobian is formed and each step takes up to `inner_steps`
    iterations of conjugate gradients. spectrum: whether rank and condition number are computed at the end.
    """

    name: ClassVar[str] = "second-order"
    needs: ClassVar[frozenset[str]] = frozenset({"image_shape", "batch_size"})
    tasks: ClassVar[frozenset[str]] = frozenset({"classification", "diffusion"})

    iterations: int = 60
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
    spectrum: bool = True
    precision: str = "float64"

    def __post_init__(self) -> None:
        check_options("l2", self.start, self.iterations)
        for what, table, got in (("box", BOXES, self.box), ("weights", WEIGHTS, self.weights)):
            if got not in table:
                raise FedattackError(one_of(what, table, got))

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
        if task.name == "classification" and knowledge.labels is None:
            knowledge = replace(knowledge, labels=infer_labels(update, model, knowledge, generator=generator))
        if task.name == "diffusion" and knowledge.timesteps is None:
            knowledge = _told_timesteps(update, model, task, knowledge)
        problem = pose(update, model, task, knowledge, precision=self.precision)
        equations = Equations.of(problem, update, WEIGHTS[self.weights])
        case = _Case(self, problem, equations, Equations.of(problem, update), generator, progress, begun)
        return _search_noisy(case) if "noise" in problem.unknown else _search_images(case)


def _told_timesteps(update: Update, model: nn.Module, task: Task, knowledge: Knowledge) -> Knowledge:
    """Timesteps are integers, no unknowns of a least-squares problem: they are read off the time embedding first.

    They come without an order. That is no loss where the images have none either: in one local step with unknown noise.
    """
    several = (knowledge.local_steps or 1) > 1
    if several or (knowledge.noise is not None and (knowledge.batch_size or 1) > 1):
        raise NotApplicable(
            "timesteps must be known: those of several steps, or beside given noise, cannot be put in order"
        )
    return with_timesteps(update, model, task, knowledge)


# ---------------------------------------------------------------------------------------------------- equations
@dataclass(frozen=True)
class Equations:
    """One equation for each observed weight, scaled so that the sum of squares is the relative cost.

    buckets, signs: a sparse random sketch (CountSketch: Charikar, Chen, Farach-Colton 2002) that adds every equation, with
    a random sign, to one of a few sums; None keeps them all.
    """

    weights: State
    wanted: Tensor
    buckets: Tensor | None = None
    signs: Tensor | None = None
    count: int = 0

    @staticmethod
    def of(problem: Problem, update: Update, power: float = 1.0) -> "Equations":
        """Each layer divided by its norm to this power; 1: the cost is the mean over layers of their relative errors.

        Zero layers, and those that are the rounding of zero (the bias of attention's keys), are measured by the largest.
        """
        norms = {name: float(tensor.norm()) for name, tensor in problem.observed.items()}
        largest = max(norms.values())
        if not (0.0 < largest < math.inf):
            raise NotApplicable("the update is zero or not finite: there is nothing to solve for")
        sent = next((t.dtype for t in update.received.values() if t.is_floating_point()), torch.float32)
        floor = 100 * torch.finfo(sent).eps * largest
        norms = {name: norm if norm > floor else largest for name, norm in norms.items()}
        total = math.sqrt(sum(norm ** (2.0 - 2.0 * power) for norm in norms.values()))
        weights = {
            name: torch.full((), norm**-power / total).to(problem.observed[name]) for name, norm in norms.items()
        }
        wanted = torch.cat([(weights[name] * tensor).reshape(-1) for name, tensor in problem.observed.items()])
        return Equations(weights, wanted, count=len(wanted))

    def sketched(self, count: int, generator: torch.Generator) -> "Equations":
        """At most `count` equations."""
        total = len(self.wanted)
        if count <= 0 or count >= total:
            return self
        device = self.wanted.device
        buckets = torch.randint(count, (total,), generator=generator).to(device)
        signs = (2.0 * torch.randint(2, (total,), generator=generator) - 1.0).to(self.wanted)
        return replace(self, buckets=buckets, signs=signs, count=count)

    def pressed(self, vector: Tensor) -> Tensor:
        if self.buckets is None or self.signs is None:
            return vector
        return vector.new_zeros(self.count).index_add(0, self.buckets, self.signs * vector)

    def left(self, simulated: State) -> Tensor:
        return torch.cat([(weight * simulated[name]).reshape(-1) for name, weight in self.weights.items()])

    def residual(self, simulated: State) -> Tensor:
        return self.pressed(self.left(simulated) - self.wanted)


def _kept(share: float, unknowns: int) -> int:
    return max(EQUATIONS, math.ceil(share * unknowns)) if share > 0 else 0


def _chunk(equations: Equations) -> int:
    return max(1, min(64, ENTRIES // len(equations.wanted)))


@dataclass(frozen=True)
class _Case:
    """What every search needs. verdict: all equations, every layer alike; the results of starts are compared by them."""

    attack: SecondOrder
    problem: Problem
    equations: Equations
    verdict: Equations
    generator: torch.Generator
    progress: Progress
    begun: float


# ---------------------------------------------------------------------------------------------------- known noise
def _search_images(case: _Case) -> Reconstruction:
    """Nothing but the images is unknown."""
    attack, problem, equations, generator = case.attack, case.problem, case.equations, case.generator
    variable = problem.unknown["images"]
    unknowns = math.prod(variable.shape)
    dense = unknowns <= attack.dense_limit
    starts = problem.start(attack.restarts, generator, attack.start)["images"].reshape(attack.restarts, -1)
    if dense:
        equations = equations.sketched(_kept(attack.sketch, unknowns), generator)

    def function(x: Tensor) -> Tensor:
        return equations.residual(problem.simulated({"images": x.reshape(variable.shape)}))

    def at(x: Tensor) -> Point:
        if dense:
            return Dense.at(function, x, _chunk(equations))
        return MatrixFree.at(function, x, attack.inner_steps)

    def finish(solution: Solution) -> dict[str, Tensor]:
        return {"images": solution.x.reshape(variable.shape)}

    box = (torch.zeros_like(starts[0]), torch.ones_like(starts[0])) if attack.box == "step" else None
    return _multistart(replace(case, equations=equations), at, starts, finish, unknowns, box)


# ---------------------------------------------------------------------------------------------------- unknown noise
def _search_noisy(case: _Case) -> Reconstruction:
    """Images and noise are unknown: search the noisy images x_t, with the residual r = model(x_t, t) − target projected out."""
    attack, problem, equations, generator = case.attack, case.problem, case.equations, case.generator
    task = problem.task
    if not isinstance(task, Diffusion):
        raise NotApplicable("noise can be projected out of the diffusion task only")
    if len(problem.steps) > 1:
        raise NotApplicable(
            "unknown noise can be projected out of one local step only: later ones are not linear in it"
        )
    shape = problem.unknown["images"].shape
    pixels = math.prod(shape)
    if pixels > attack.dense_limit:
        raise NotApplicable(f"unknown noise needs a dense Jacobian: {pixels} pixels are more than dense_limit")
    if len(equations.wanted) < 2 * pixels:
        raise NotApplicable(f"{len(equations.wanted)} numbers cannot tell {2 * pixels} unknowns (images and noise)")
    timesteps = problem.known["timesteps"]
    alpha_bar = task.alphas_cumprod.to(timesteps.device)[timesteps].to(problem.dtype).reshape(-1, 1, 1, 1)
    signal, spread = alpha_bar.sqrt(), (1.0 - alpha_bar).sqrt()
    starts = problem.start(attack.restarts, generator, attack.start)
    noisy = signal * (2.0 * starts["images"] - 1.0) + spread * starts["noise"]
    equations = equations.sketched(_kept(4 * attack.sketch, 2 * pixels), generator)
    trained = {name: problem.sent[name] for name in problem.observed}

    def predict(weights: State, x: Tensor) -> Tensor:
        return bind(problem.model, {**problem.sent, **weights})(x.reshape(shape), timesteps)

    def product(x: Tensor, r: Tensor) -> Tensor:
        pulled = (2.0 / pixels) * r.reshape(shape)
        return equations.pressed(equations.left(grad(lambda weights: (pulled * predict(weights, x)).sum())(trained)))

    def matrix(x: Tensor) -> Tensor:
        pull: Callable[..., tuple[State]] = vjp(lambda weights: predict(weights, x), trained)[1]

        def row(r: Tensor) -> Tensor:
            return equations.pressed(equations.left(pull((2.0 / pixels) * r.reshape(shape), retain_graph=True)[0]))

        return by_rows(row, pixels, _chunk(equations), x)

    wanted = equations.pressed(equations.wanted)

    def at(x: Tensor) -> Point:
        return Projected.at(matrix, product, x, wanted, _chunk(equations))

    def finish(solution: Solution) -> dict[str, Tensor]:
        assert isinstance(solution.point, Projected)
        x = solution.x.reshape(shape)
        with torch.no_grad():
            target = predict({}, solution.x) - solution.point.linear_unknowns.reshape(shape)
        if task.prediction_type == "epsilon":
            return {"images": 0.5 + 0.5 * (x - spread * target) / signal, "noise": target}
        return {"images": 0.5 + 0.5 * (signal * x - spread * target), "noise": spread * x + signal * target}

    noisy = noisy.reshape(attack.restarts, -1)
    return _multistart(replace(case, equations=equations), at, noisy, finish, 2 * pixels)


# ---------------------------------------------------------------------------------------------------- starts
def _multistart(
    case: _Case,
    at: Callable[[Tensor], Point],
    starts: Tensor,
    finish: Callable[[Solution], dict[str, Tensor]],
    unknowns: int,
    box: tuple[Tensor, Tensor] | None = None,
) -> Reconstruction:
    """One start after another until one is certified; the lowest verdict wins."""
    attack, problem, verdict = case.attack, case.problem, case.verdict
    ends: list[tuple[float, Solution, dict[str, Tensor]]] = []
    trials = 0
    for number, start in enumerate(starts):

        def told(iteration: int, cost: float, done: int = number * attack.iterations) -> None:
            case.progress(done + iteration, len(starts) * attack.iterations, cost)

        solution = levenberg_marquardt(
            at,
            start,
            iterations=attack.iterations,
            tolerance=attack.tolerance,
            damping=attack.damping,
            box=box,
            told=told,
        )
        trials += len(solution.costs) - 1
        guess = finish(solution)
        with torch.no_grad():
            difference = verdict.left(problem.simulated(guess)) - verdict.wanted
        cost = float(difference.square().sum())
        ends.append((cost if math.isfinite(cost) else math.inf, solution, guess))
        if cost <= attack.certified and unknowns <= len(verdict.wanted):
            break
    cost, solution, guess = min(ends, key=lambda end: end[0])
    diagnostics = {
        "loss": cost,
        "iterations": float(len(solution.costs) - 1),
        "starts": float(len(ends)),
        "starts_succeeded": float(sum(end[0] <= attack.certified for end in ends)),
        "equations": float(case.equations.count),
        "unknowns": float(unknowns),
        "dense": float(not isinstance(solution.point, MatrixFree)),
    }
    determined = unknowns <= len(verdict.wanted)
    values = solution.linear.spectrum() if attack.spectrum else None
    if values is not None and len(values) > 0 and float(values[0]) > 0:
        rank = numerical_rank(values, case.equations.count)
        searched = len(solution.x)
        determined = determined and rank == searched
        diagnostics["condition"] = float(values[0] / values[min(len(values), searched) - 1].clamp_min(1e-300))
        if isinstance(solution.point, Projected):
            rank += solution.point.linear_rank
            determined = determined and rank == unknowns
        diagnostics["rank"] = float(rank)
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

"""`second-order` where images and noise are unknown: the noise enters linearly and is projected out.

Source: variable projection, see `attacks.second_order`; ours, that a diffusion client's gradient is linear in its residual.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.func import grad, vjp

from attacks.least_squares import Latest, Point, Projected, ProjectedFree, Solution
from attacks.matching import Problem
from attacks.noise import differences, variation_slopes
from attacks.preconditioners import Formed
from attacks.second_order_search import (
    EQUATIONS,
    NEAR,
    Case,
    Descent,
    Told,
    View,
    chunk_of,
    later,
    multistart,
    nearest_first,
    searched,
    squared,
)
from attacks.translations import Translating
from fedattack.errors import NotApplicable
from fedattack.jacobians import by_rows
from fedattack.tasks import Diffusion, bind
from fedattack.types import Reconstruction, State

JACOBIAN = 1 << 27
"""How many numbers a whole Jacobian may hold (1 GB in float64) where every equation dropped costs: with unknown noise
projected out of a noisy update."""

PROJECTED = 512
"""Pixels beyond which unknown noise is projected out by conjugate gradients."""

SLACK = 2.0
"""How many times as much a move may cost in a descent, whose residual is not projected anew."""

DESCENT = Descent(longest=5, close=1e-5)
"""Of images and noise; a Jacobian of the images alone, with the noise projected out, does the rest."""

REWEIGHTINGS = 2
"""How often the quadratic bound on total variation is renewed where noise is projected out."""


def search_noisy(case: Case) -> Reconstruction:
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
    dense = pixels <= min(attack.dense_limit, PROJECTED)
    whole = case.views[0]
    groups = attack.groups(shape, copies=2)
    kept = attack.kept(len(groups[0]) if groups else 2 * pixels)
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

    def residual(view: View, slopes: Tensor, x: Tensor, r: Tensor, transformable: bool = True) -> Tensor:
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

        return by_rows(row, pixels, chunk_of(case.count), x)

    def dense_at(slopes: Tensor) -> Callable[[Tensor], Point]:
        rows, function = partial(matrix, slopes), partial(residual, few, slopes)
        return lambda x: Projected.at(rows, function, x, chunk_of(case.count))

    def free_at(slopes: Tensor, latest: Latest) -> Callable[[Tensor], Point]:
        formed = None if groups is None else Formed([group.to(signal.device) for group in groups])
        rough = few.to(torch.float32)

        def both(z: Tensor) -> Tensor:
            return residual(whole, slopes, z[:pixels], z[pixels:], transformable=False)

        def sketched(z: Tensor) -> Tensor:
            return residual(rough if z.dtype == torch.float32 else few, slopes, z[:pixels], z[pixels:])

        return lambda x: ProjectedFree.at(both, sketched, x, chunk_of(case.count), attack.inner_steps, latest, formed)

    def finish(solution: Solution) -> dict[str, Tensor]:
        assert isinstance(solution.point, Projected | ProjectedFree)
        with torch.no_grad():
            return private(problem, solution.x, solution.point.linear_unknowns)

    def unknown(solution: Solution) -> Tensor:
        assert isinstance(solution.point, Projected | ProjectedFree)
        return torch.cat([solution.x, solution.point.linear_unknowns])

    def solve(number: int, start: Tensor, told: Told) -> Solution:
        x, near = start[:pixels], start[pixels:]
        slopes = torch.full_like(differences(x.reshape(shape)), 1.0 / case.difference)
        costs: tuple[float, ...] = ()
        for _ in range(1 + REWEIGHTINGS):
            latest = Latest(near)
            at = dense_at(slopes) if dense else free_at(slopes, latest)

            def put(z: Tensor, latest: Latest = latest) -> Tensor:  # noisy images and residuals, one behind the other
                latest.y = z[pixels:]
                return z[:pixels]

            def search(z: Tensor, done: int, at: Callable[[Tensor], Point] = at) -> Solution:
                return searched(attack, at, put(z), later(told, done))

            def rough_cost(z: Tensor, slopes: Tensor = slopes) -> float:
                with torch.no_grad():
                    return squared(residual(whole, slopes, z[:pixels], z[pixels:]))

            def close_cost(z: Tensor, at: Callable[[Tensor], Point] = at) -> float:
                return squared(at(put(z)).residual)

            translating = case.translating(search, unknown, finish, rough_cost, close_cost)
            solution = translating.search_from(torch.cat([x, near]))
            costs += solution.costs
            if case.prior == 0 or not math.isfinite(solution.costs[-1]):
                break
            x, slopes = solution.x, variation_slopes(finish(solution)["images"], case.difference)
        return replace(solution, costs=costs)

    def begin(guess: Mapping[str, Tensor]) -> Tensor:
        """Noisy images and residuals behind images and noise, the inverse of `private`."""
        images, noise = guess["images"].reshape(shape), guess["noise"].reshape(shape)
        x = signal * (2.0 * images - 1.0) + spread * noise
        target = noise if task.prediction_type == "epsilon" else signal * noise - spread * (2.0 * images - 1.0)
        with torch.no_grad():
            return torch.cat([x.reshape(-1), (predict(problem, {}, x) - target).reshape(-1)])

    def approach(number: int) -> tuple[float, Tensor]:
        cost, place = _approached(case, {name: tensor[number] for name, tensor in starts.items()})
        return cost, begin(_split(place, shape))

    if case.descending:
        ordered = nearest_first(attack.restarts, approach, waiting=attack.restarts)
        return multistart(case, solve, ordered, finish, 2 * pixels)
    away = torch.zeros(pixels, dtype=problem.dtype, device=signal.device)
    plain = (signal * (2.0 * images - 1.0) + spread * noise for images, noise in zip(*starts.values(), strict=True))
    return multistart(case, solve, (torch.cat([x.reshape(-1), away]) for x in plain), finish, 2 * pixels)


def _approached(case: Case, start: Mapping[str, Tensor]) -> tuple[float, Tensor]:
    """The best of descents from a start and from where they end with an image moved: cost, and images before noise."""
    shape, unit = case.views[0].problem.unknown["images"].shape, case.unit(start)

    def cost(place: Tensor) -> float:
        return case.distance_at(_split(place, shape)) / unit

    found = Translating(
        search=lambda place, done: case.descend(_split(place, shape), DESCENT, unit),
        unknown=lambda end: end.x,
        shape=shape,
        verdict=lambda end: end.costs[-1],
        rough_cost=cost,
        close_cost=cost,
        success=NEAR,
        most=case.attack.translations,
        slack=SLACK,
    ).search_from(torch.cat([start[name].reshape(-1) for name in ("images", "noise")]))
    return cost(found.x), found.x


def _split(place: Tensor, shape: Sequence[int]) -> dict[str, Tensor]:
    images, noise = place.reshape(2, *shape)
    return {"images": images, "noise": noise}

"""The engine that every gradient-matching attack shares: find private variables whose simulated update matches.

    reconstruction = argmin over unknowns  distance(update, simulate(unknowns, known)) + penalty(images)

`Problem` says what is fixed and what is unknown, for any task and any threat model; `adam` and `lbfgs` search. All state
carries a leading restart axis R; restarts run together through `torch.func.vmap` where the model allows it.
"""

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice

import torch
from torch import Tensor, nn
from torch.func import vmap

from attacks.noise import clip_norm
from fedattack.errors import FedattackError, NotApplicable, must, one_of
from fedattack.tasks import Task, Variable, parameter_names, schedule, simulate_gradient, split_steps
from fedattack.types import Knowledge, Progress, Reconstruction, State, Update, silent

Distance = Callable[[State, State], Tensor]
Penalty = Callable[[Tensor], Tensor]
DTYPES = {"float32": torch.float32, "float64": torch.float64}


# ---------------------------------------------------------------------------------------------------- distances
def squared_l2(simulated: State, observed: State) -> Tensor:
    """Σ over layers ‖a − b‖², DLG's distance."""
    return torch.stack([(simulated[name] - observed[name]).square().sum() for name in observed]).sum()


def relative_l2(simulated: State, observed: State) -> Tensor:
    """Mean over layers of ‖a − b‖²/‖b‖²: every layer counts the same, 0 is a perfect match, 1 is silence.

    A layer that was observed as all zero (pruned, or behind dead units) is measured by the whole update's norm instead.
    """
    norms = torch.stack([wanted.square().sum() for wanted in observed.values()])
    norms = torch.where(norms > 0, norms, norms.sum().clamp_min(torch.finfo(norms.dtype).tiny))
    errors = torch.stack([(simulated[name] - wanted).square().sum() for name, wanted in observed.items()])
    return (errors / norms).mean()


def cosine(simulated: State, observed: State) -> Tensor:
    """1 − ⟨a, b⟩/(‖a‖‖b‖) over all layers as one vector, Inverting Gradients' distance (Eq. 4)."""
    dot = torch.stack([(simulated[name] * observed[name]).sum() for name in observed]).sum()
    a = torch.stack([simulated[name].square().sum() for name in observed]).sum()
    b = torch.stack([observed[name].square().sum() for name in observed]).sum()
    return 1.0 - dot / (a * b).clamp_min(torch.finfo(a.dtype).tiny).sqrt()


STARTS = {"uniform": 0.0, "normal": 0.5, "grey": 0.1}
"""How an attack's images may start; the number is the standard deviation around 0.5 of those that are normal."""

TIMESTEP_RATE = 1.0
"""Adam's rate for relaxed timesteps, in timesteps."""

DISTANCES: dict[str, Distance] = {"l2": squared_l2, "relative-l2": relative_l2, "cosine": cosine}


def check_options(distance: str, start: str, iterations: int) -> None:
    """Raise FedattackError where an attack's options cannot be."""
    for what, table, got in (("distance", DISTANCES, distance), ("start", STARTS, start)):
        if got not in table:
            raise FedattackError(one_of(what, table, got))
    if not isinstance(iterations, int) or iterations < 1:
        raise FedattackError(must("iterations", "a whole number of at least 1", iterations))


def total_variation(images: Tensor) -> Tensor:
    """Mean absolute difference of neighbouring pixels, both directions (anisotropic TV); images (B,C,H,W)."""
    down = (images[..., 1:, :] - images[..., :-1, :]).abs()
    right = (images[..., :, 1:] - images[..., :, :-1]).abs()
    return sum((part.mean() for part in (down, right) if part.numel()), images.new_zeros(()))


# ---------------------------------------------------------------------------------------------------- the problem
SLOW = 10
"""Outer steps of L-BFGS after which it is seen how much they gained."""


@dataclass(frozen=True)
class Problem:
    """One update to be explained: the observed (pseudo-)gradient, what is known, what is unknown.

    Unknown tensors are real: labels are logits (B,K), turned into probabilities before the loss; timesteps real numbers.
    """

    model: nn.Module
    sent: State
    task: Task
    observed: State
    known: dict[str, Tensor]
    unknown: dict[str, Variable]
    steps: list[list[int]]
    learning_rate: float | None
    proximal_mu: float
    dtype: torch.dtype
    clip_norm: float | None = None

    def simulated(self, guess: Mapping[str, Tensor], *, transformable: bool = True) -> State:
        """The (pseudo-)gradient that the client would have sent for `guess` (no restart axis), on the observed names.

        Clipped where the attacker knows that the client clips; noise is not added.
        """
        private = {**self.known, **{name: self._relax(name, value) for name, value in guess.items()}}
        gradient = simulate_gradient(
            self.model,
            self.sent,
            self.task,
            split_steps(self.task, private, self.steps),
            learning_rate=self.learning_rate,
            proximal_mu=self.proximal_mu,
            transformable=transformable,
        )
        if self.clip_norm is not None:
            norm = torch.stack([tensor.square().sum() for tensor in gradient.values()]).sum().sqrt()
            factor = (self.clip_norm / norm).clamp(max=1.0)
            return {name: factor * gradient[name] for name in self.observed}
        return {name: gradient[name] for name in self.observed}

    def start(
        self, restarts: int, generator: torch.Generator, images: str = "uniform", first: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Random guesses, (R, …) each. images: "uniform" in [0, 1]; "normal", 0.5 + 0.5·N(0, 1), which is DLG's N(0, 1) after
        the models' own normalisation; "grey", 0.5 + 0.1·N(0, 1). Everything else but timesteps is N(0, 1). first: the images
        (B,C,H,W) that restart 0 has instead of random ones.
        """
        guesses = {}
        for name, variable in self.unknown.items():
            shape = (restarts, *variable.shape)
            if name == "images" and images == "uniform":
                guess = torch.rand(shape, generator=generator, dtype=self.dtype)
            elif name == "images":
                guess = 0.5 + STARTS[images] * torch.randn(shape, generator=generator, dtype=self.dtype)
            elif name == "timesteps":
                guess = variable.high * torch.rand(shape, generator=generator, dtype=self.dtype)
            else:
                guess = torch.randn(shape, generator=generator, dtype=self.dtype)
            guesses[name] = guess.to(self._device)
        if first is not None:
            guesses["images"][0] = first.to(guesses["images"])
        return guesses

    def estimate(self, guess: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Public form of a guess: images clamped to their box, labels as class indices, timesteps as integers."""
        found = dict(self.known)
        for name, value in guess.items():
            variable = self.unknown[name]
            if name == "labels":
                found[name] = value.argmax(-1)
            elif variable.discrete:
                found[name] = value.clamp(variable.low, variable.high).round().long()
            else:
                found[name] = value.clamp(variable.low, variable.high)
        return found

    def to(self, dtype: torch.dtype) -> "Problem":
        """The same in another precision, with a model of its own."""

        def cast(state: State) -> dict[str, Tensor]:
            return {name: t.to(dtype) if t.is_floating_point() else t for name, t in state.items()}

        if dtype == self.dtype:
            return self
        return replace(
            self,
            model=deepcopy(self.model).to(dtype),
            sent=cast(self.sent),
            observed=cast(self.observed),
            known=cast(self.known),
            dtype=dtype,
        )

    def alone(self, number: int) -> "Problem | None":
        """What one image of the batch would send alone: the batch sends the mean of that over its images.

        None where that is not so: more than images unknown, several steps, clipping, statistics of the batch.
        """
        count = self.unknown["images"].shape[0]
        mean = self.steps == [list(range(count))] and self.clip_norm is None and not _mixes_images(self.model)
        if not mean or set(self.unknown) != {"images"}:
            return None
        images = self.unknown["images"]
        return replace(
            self,
            known={name: tensor[number : number + 1] for name, tensor in self.known.items()},
            unknown={"images": replace(images, shape=(1, *images.shape[1:]))},
            steps=[[0]],
        )

    @property
    def _device(self) -> torch.device:
        return next(iter(self.observed.values())).device

    def _relax(self, name: str, value: Tensor) -> Tensor:
        return value.softmax(-1) if name == "labels" else value


def pose(
    update: Update,
    model: nn.Module,
    task: Task,
    knowledge: Knowledge,
    *,
    precision: str | None = None,
    scale_free: bool = False,
) -> Problem:
    """The matching problem of an update under a threat model. `precision` "float32" or "float64"; None: the update's own.

    Raises NotApplicable where the update holds none of the model's trained parameters, and where it carries weights whose
    learning rate is hidden (one local step can be matched all the same by a distance that is `scale_free`).
    """
    dtype = next((t.dtype for t in update.received.values() if t.is_floating_point()), torch.float32)
    if precision is not None:
        if precision not in DTYPES:
            raise FedattackError(one_of("precision", DTYPES, precision))
        dtype = DTYPES[precision]
    sent = {name: t.to(dtype) if t.is_floating_point() else t for name, t in update.sent.items()}
    several = (knowledge.local_steps or 1) > 1
    if update.kind == "weights" and knowledge.learning_rate is None and (several or not scale_free):
        why = "unroll several local steps" if several else "turn a weight difference into a gradient"
        raise NotApplicable(f"learning_rate must be known to {why}")
    gradient = update.gradient(knowledge.learning_rate)
    observed = {name: gradient[name].to(dtype) for name in parameter_names(model) if name in gradient}
    if not observed:
        raise NotApplicable("the update holds none of the model's trained parameters")
    variables = task.variables(knowledge)
    hints = {"labels": knowledge.labels, "timesteps": knowledge.timesteps, "noise": knowledge.noise}
    known = {
        name: hint.to(dtype) if hint.is_floating_point() else hint
        for name, hint in hints.items()
        if hint is not None and name in variables
    }
    return Problem(
        model=model,
        sent=sent,
        task=task,
        observed=observed,
        known=known,
        unknown={name: variable for name, variable in variables.items() if name not in known},
        steps=schedule(knowledge),
        learning_rate=knowledge.learning_rate,
        proximal_mu=knowledge.proximal_mu or 0.0,
        dtype=dtype,
        clip_norm=None if scale_free else clip_norm(update, knowledge),
    )


# ---------------------------------------------------------------------------------------------------- the searches
@dataclass(frozen=True)
class Match:
    """The best restart by its own loss: its guess, its loss along the way, and every restart's final loss (R,)."""

    guess: dict[str, Tensor]
    losses: tuple[float, ...]
    steps: int
    restart_losses: tuple[float, ...]


def objective(problem: Problem, distance: Distance, penalty: Penalty | None = None) -> Callable[..., Tensor]:
    """losses (R,) of guesses with a restart axis; a single restart goes by plain autograd, which is faster there."""

    def one(guess: dict[str, Tensor], transformable: bool = True) -> Tensor:
        loss = distance(problem.simulated(guess, transformable=transformable), problem.observed)
        return loss + penalty(guess["images"]) if penalty is not None else loss

    def each(guesses: dict[str, Tensor]) -> Tensor:
        restarts = len(next(iter(guesses.values())))
        return torch.stack([one({name: value[r] for name, value in guesses.items()}, False) for r in range(restarts)])

    def together(guesses: dict[str, Tensor]) -> Tensor:
        if len(next(iter(guesses.values()))) == 1:
            return each(guesses)
        losses: Tensor = vmap(one)(guesses)
        return losses

    return each if _updates_buffers(problem.model) else together


def silence_cost(problem: Problem, distance: Distance) -> float:
    """The distance of a zero update from the observed one: what a loss is worth is seen beside it."""
    return float(distance({n: torch.zeros_like(t) for n, t in problem.observed.items()}, problem.observed))


def adam(
    problem: Problem,
    start: Mapping[str, Tensor],
    *,
    distance: Distance,
    penalty: Penalty | None = None,
    iterations: int,
    learning_rate: float,
    signed: bool = False,
    boxed: bool = True,
    decay_at: tuple[float, ...] = (3 / 8, 5 / 8, 7 / 8),
    progress: Progress = silent,
) -> Match:
    """Adam on all unknowns of all restarts at once; the rate falls tenfold at the given shares of the iterations.

    Timesteps have a rate of their own, TIMESTEP_RATE: their box is hundreds of times wider than any other. `signed` replaces
    each gradient by its sign, `boxed` projects onto the variables' boxes after every step.
    """
    losses_of = objective(problem, distance, penalty)
    guesses = {name: value.clone().requires_grad_() for name, value in start.items()}
    rates = {"timesteps": TIMESTEP_RATE}
    groups = [{"params": [value], "lr": rates.get(name, learning_rate)} for name, value in guesses.items()]
    optimizer = torch.optim.Adam(groups)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [int(share * iterations) for share in decay_at], 0.1)
    history = []
    for iteration in range(iterations):
        losses = losses_of(guesses)
        gradients = torch.autograd.grad(losses.sum(), list(guesses.values()))
        for value, gradient in zip(guesses.values(), gradients, strict=True):
            value.grad = gradient.sign() if signed else gradient
        optimizer.step()
        scheduler.step()
        if boxed:
            _project(problem, guesses)
        history.append(losses.detach())
        progress(iteration + 1, iterations, float(history[-1].min()))
    with torch.no_grad():
        history.append(losses_of(guesses).detach())
    return _best(guesses, torch.stack(history), iterations)


def outer_steps(
    loss: Callable[[], Tensor],
    leaves: list[Tensor],
    *,
    learning_rate: float = 1.0,
    history_size: int = 100,
    inner: int = 20,
    line_search: bool = True,
) -> Iterator[float]:
    """L-BFGS on leaves in place, without end: the loss before each outer step of up to `inner` steps, once it is made."""
    optimizer = torch.optim.LBFGS(
        leaves,
        lr=learning_rate,
        max_iter=inner,
        history_size=history_size,
        tolerance_grad=0.0,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe" if line_search else None,
    )

    def closure() -> Tensor:
        found = loss()
        for leaf, slope in zip(leaves, torch.autograd.grad(found, leaves), strict=True):
            leaf.grad = slope
        return found.detach()

    while True:
        yield float(optimizer.step(closure))  # type: ignore[no-untyped-call]


def lbfgs(
    problem: Problem,
    start: Mapping[str, Tensor],
    *,
    distance: Distance,
    iterations: int,
    learning_rate: float = 1.0,
    history_size: int = 100,
    inner: int = 20,
    line_search: bool = True,
    success: float = 0.0,
    falling: float = 0.0,
    close: float = 0.0,
    quick: float = 1.0,
    progress: Progress = silent,
) -> Match:
    """L-BFGS, one restart after another, until one of them ends below `success` times the distance of a zero update.

    `iterations` counts outer steps of up to `inner` L-BFGS steps each, as DLG does. A restart that turns non-finite or
    stands still is given up, and one whose last ten steps did not lower the distance by the share `falling`, or, below
    `close` times the distance of a zero update, whose last one did not lower it by the share `quick`. Inside, the loss is
    scaled so that a zero update costs 1e6: torch's L-BFGS learns no curvature from steps with yᵀs below the absolute 1e-10,
    and would stand still around a relative distance of 1e-8.
    """
    losses_of = objective(problem, distance)
    silence = silence_cost(problem, distance)
    scale = 1e6 / silence if silence > 0 else 1.0
    restarts = len(next(iter(start.values())))
    ends, histories, final = [], [], []
    for restart in range(restarts):
        guess = {name: value[restart : restart + 1].clone().requires_grad_() for name, value in start.items()}
        steps = outer_steps(
            partial(_scaled, losses_of, guess, scale),
            list(guess.values()),
            learning_rate=learning_rate,
            history_size=history_size,
            inner=inner,
            line_search=line_search,
        )
        history: list[float] = []
        for iteration, before in enumerate(islice(steps, iterations)):
            loss = before / scale
            history.append(loss)
            progress(restart * iterations + iteration + 1, restarts * iterations, loss)
            slow = falling > 0 and len(history) > SLOW and history[-1] > (1.0 - falling) * history[-1 - SLOW]
            quiet = loss <= close * silence and (len(history) < 2 or loss > (1.0 - quick) * history[-2])
            if loss <= success * silence or slow or quiet or not _moving(history):
                break
        history.append(float(losses_of(guess).detach()))
        ends.append({name: value.detach() for name, value in guess.items()})
        histories.append(history)
        final.append(history[-1] if history[-1] == history[-1] else float("inf"))
        if final[-1] <= success * silence:
            break
    best = final.index(min(final))
    return Match(
        guess={name: value[0] for name, value in ends[best].items()},
        losses=tuple(histories[best]),
        steps=sum(len(history) - 1 for history in histories),
        restart_losses=tuple(final),
    )


def reconstruction(problem: Problem, match: Match, seconds: float) -> Reconstruction:
    """What a match says, in the units of `Reconstruction`, with the spread of the restarts as diagnostics."""
    found = problem.estimate(match.guess)
    if not bool(found["images"].isfinite().all()):
        raise FedattackError("the search diverged: not one restart ended with finite images")
    images = found["images"].clamp(0.0, 1.0).float()
    return Reconstruction(
        images=images,
        labels=found.get("labels"),
        timesteps=found.get("timesteps"),
        noise=found.get("noise"),
        losses=match.losses,
        steps=match.steps,
        seconds=seconds,
        diagnostics={
            "loss": match.losses[-1],
            "restarts": float(len(match.restart_losses)),
            "worst_restart_loss": max(match.restart_losses),
        },
    )


def _scaled(losses_of: Callable[..., Tensor], guess: dict[str, Tensor], scale: float) -> Tensor:
    found: Tensor = scale * losses_of(guess).sum()
    return found


def _moving(history: list[float], patience: int = 3) -> bool:
    """False once the loss is not finite, or has not moved at all for `patience` outer steps."""
    if not abs(history[-1]) < float("inf"):
        return False
    recent = history[-patience - 1 :]
    return len(recent) <= patience or any(loss != recent[0] for loss in recent)


def _project(problem: Problem, guesses: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, value in guesses.items():
            value.clamp_(problem.unknown[name].low, problem.unknown[name].high)


def _best(guesses: dict[str, Tensor], history: Tensor, steps: int) -> Match:
    final = history[-1].nan_to_num(float("inf"))
    best = int(final.argmin())
    return Match(
        guess={name: value.detach()[best] for name, value in guesses.items()},
        losses=tuple(history[:, best].tolist()),
        steps=steps,
        restart_losses=tuple(final.tolist()),
    )


def _mixes_images(model: nn.Module) -> bool:
    """Whether an image's prediction depends on the others of its batch, by batch normalisation."""
    normal = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    return any(m.training or m.running_mean is None for m in normal)


def _updates_buffers(model: nn.Module) -> bool:
    """Whether a forward pass in the present mode writes running statistics, which vmap cannot batch."""
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training for m in model.modules())

"""The most probable images under Gaussian noise and a Gaussian prior, by L-BFGS in coordinates in which the prior is N(0, 1).

    argmin over w  ‖y − A(u(w))‖²/σ² + ‖w‖²        u(w): attacks/image_statistics.py, A: the simulated client

Source: Liu, Nocedal, Mathematical Programming 45 (1989). Far from the client's images an update's size says little more than
how sure the model is of its answer, and a trained one's may be ten times too large: so on the way there only its direction is
matched, first as if the noise were so loud that the prior has the last word, then less and less so: on smoothed copies of the
model (attacks/smoothing.py), each narrower than the one before, or, where there is nothing to smooth or copies of a smooth
model do not lead near, on the model itself. Copies are not the client's model, so even the client's images would leave more
over than noise: σ is taken for so much larger there, or the images would be bent to explain that, too. Under loud noise several
images explain an update; the one with the most room around it is taken (attacks/evidence.py).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import Tensor

from attacks.coefficients import Equations
from attacks.evidence import log_det
from attacks.image_statistics import Gaussian
from attacks.matching import outer_steps
from attacks.smoothing import bends, kinks, smoothed, spreads
from fedattack.jacobians import Linearised

SIGNIFICANT = 1.0
"""What an outer step must gain, in units of the noise, or the search ends."""

EASY = 1e-3
"""On the way, and while noise is still read off the residuals: what it must gain as a share of the cost."""

VAGUE, SURER = 4.0, 0.25
"""The noise that a model itself is first searched with, over what makes the equations say as much as the prior; every
further one in units of that before. Images that were drawn begin at the update's own rms, or all would lead to the same end."""

TELLING = 0.25
"""Such noise is at most twice what the model leaves unexplained, or the true noise, where χ² of one equation is above this."""

READINGS = 8
"""Times that an unknown noise level is read off the residuals, at most."""

SETTLED = 0.8
"""A level that falls less than to this share of the one before is the last."""

WIDEST, NARROWER = 4.0, 0.5
"""The width of the first smoothed copy, in units of what its activations are given, and of others in that of the one before. At
first a copy is nearly linear, and hardly has more than one place to end in."""

ERRORS, ERRORS_OF_KINKS = 10.0, 2.0
"""How much more a copy may err on the client's images than on those that it finds, beyond the noise. One of a network with
ReLUs less: taken for noisier, it leads elsewhere."""

NEAR = 0.02
"""A smooth model itself is searched, without further copies, as soon as it leaves no more than this share of the update, and
noise: it leads on from there, where ReLUs still do not."""

FOUND = 1e-3
"""An end that copies of a smooth model led to is the last where it leaves no more than this share of the update, and noise."""

LOUDEST = 1024.0
"""As loud as that may become, in units of the update's rms."""

QUIET, DIRECT = 0.25, 10
"""Where known noise is as loud as the update a descent on the model itself begins, too, as if it were so much less. If it
explains the update within so many outer steps it is gone on with. Ways that leave an update's size aside lead less near."""

ALIKE = 0.1
"""Ends no further apart than this, root mean square in units of the prior's spread, are one: the lower cost is taken."""

DOUBT = 5.0
"""Standard deviations that a misfit may have more than noise, and still be noise."""

NUDGE = 1e-2
"""By which the images of a batch differ at first, in units of the prior's spread: those of equal labels have equal gradients
where they are equal, and would stay so."""

WIDE = 2
"""So many of the widest copies are left out where images were drawn, or all would lead to the same end."""

DRAWN = 8
"""Images drawn from the prior, by which widths are measured."""


@dataclass(frozen=True)
class Yardstick:
    """How far a simulated update (m,) is from the observed one. sigma: the standard deviation of what may be between them;
    free: the simulated update may be multiplied by any positive factor first; one that points away is the worse for it."""

    observed: Tensor
    sigma: float
    free: bool = False

    def off(self, simulated: Tensor) -> Tensor:
        """Squared and summed, in units of sigma²; free, ‖y‖²·(1 − cos·|cos|)."""
        there, wanted = simulated / self.sigma, self.observed / self.sigma
        if not self.free:
            return (there - wanted).square().sum()
        least = torch.finfo(there.dtype).tiny ** 0.25  # squares and quotients of this are still numbers
        unit = there / there.detach().abs().amax().clamp_min(least)
        product, size = unit @ wanted, unit.square().sum().clamp_min(least**2)
        towards = (product / size * unit - wanted).square().sum()
        return torch.where(product > 0, towards, wanted.square().sum() + product.square() / size)


@dataclass(frozen=True)
class End:
    """Where one start led. costs: −2·log posterior, without constants, of each outer step, of its model, noise and yardstick;
    cost: the last one of the way that led here.

    sigma: the noise, as it is known or as the residuals say; misfit: ‖y − A‖². explained: whether what is left is no more than
    noise that is known (or rounding): of what is read off the residuals nothing else can be said.
    """

    w: Tensor
    costs: list[float]
    cost: float
    sigma: float
    misfit: float
    equations: int
    explained: bool

    @property
    def chi_square(self) -> float:
        """What is left over, in units of known noise: 1 where it is noise."""
        return self.misfit / (self.sigma**2 * self.equations)

    @property
    def rank(self) -> tuple[float, float]:
        """Lower is better: the noise that it needs, then the cost."""
        return (self.sigma, self.cost)


@dataclass
class Search:
    """From one w (B,n) after the other. copies: of smoothed models, first to last. sigma: of the noise; None: unknown.
    sharp: whether the model's own gradients jump.

    iterations: outer steps for each model and each noise level, at most; once readings of unknown noise took as many together,
    they end. progress hears of all of them; `runs`: how many
    searches it shall expect.
    """

    equations: Equations
    copies: Sequence[Equations]
    prior: Gaussian
    sigma: float | None
    iterations: int
    progress: Callable[[int, int, float], None]
    runs: int = 1
    sharp: bool = True
    levels: Sequence[float] = ()
    stages: int = 0
    done: int = 0

    @staticmethod
    def of(
        equations: Equations,
        prior: Gaussian,
        *,
        sigma: float | None,
        iterations: int,
        smoothing_steps: int,
        generator: torch.Generator,
        progress: Callable[[int, int, float], None],
        runs: int = 1,
    ) -> "Search":
        """Through so many smoothed copies of the model, where it has what can be smoothed."""
        copies = _smoothed_copies(equations, prior, smoothing_steps, generator)
        sharp = bool(copies) and bool(kinks(equations.problem.model))
        return Search(equations, copies, prior, sigma, iterations, progress, runs, sharp)

    def run(self, begin: Tensor) -> End:
        """Through copies, where there are any. A smooth model is then searched through levels of noise, unless what copies led
        to leaves next to nothing: whichever end needs less noise."""
        drawn, before = self.stages > 0, self.stages
        self.levels = _levels(self._equal(begin), self._least) if self._by_levels else []
        costs = [self._cost(self.equations, begin, self._known(self._loud))]
        ends: list[End] = []
        if self.copies:
            w, sigma = self._through_copies(begin, drawn, costs)
            self.stages = before + len(self.copies)
            if self.sharp or self.sigma is None or self._near(w):
                ends.append(self._settled(w + self._apart(begin), sigma, costs))
        if self._by_levels and not (ends and self._found(ends[0])):
            self.stages = before + self._planned - self._direct - self._settling - len(self.levels)
            w, sigma = self._through_levels(begin, drawn, costs)
            self.stages = before + self._planned - self._direct - self._settling
            ends.append(self._settled(w + self._apart(begin), sigma, costs))
        if self._direct:
            self.stages = before + self._planned - self._direct
            ends += self._directly(begin, costs)
        self.stages = before + self._planned
        return replace(self._best(ends), costs=costs)

    def _best(self, ends: Sequence[End]) -> End:
        """Of several that explain the update that with the most evidence, else the one that needs the least noise."""
        best = min(ends, key=lambda end: end.rank)
        explaining = [end for end in ends if end.explained]
        if all(float((end.w - best.w).square().mean().sqrt()) <= ALIKE for end in explaining):
            return best
        return min(explaining, key=self._improbability)

    def _improbability(self, end: End) -> float:
        """−2·log evidence, without constants (attacks/evidence.py)."""
        w = end.w.flatten()
        local = Linearised.at(lambda at: self._simulated(self.equations, at.reshape(end.w.shape)) / end.sigma, w)
        return end.cost + log_det(lambda v: local.back(local.times(v)) + v, w)

    def _directly(self, begin: Tensor, costs: list[float]) -> list[End]:
        """Where the noise as it is known leads almost from the first, if that explains the update soon; `costs` grow."""
        w, more = self._descended(self.equations, begin, self._known(QUIET * self._least), 0.0, DIRECT)
        costs += more
        self.stages += 1
        if not self._explained(self._misfit(w)):
            return []
        return [self._settled(w, self._least, costs)]

    @property
    def _by_levels(self) -> bool:
        """Whether there is a way through levels of noise."""
        return not (self.copies and self.sharp)

    @property
    def _least(self) -> float:
        return max(self.sigma or 0.0, self.equations.rounding)

    @property
    def _loud(self) -> float:
        return max(float(self.equations.observed.square().mean().sqrt()), self._least)

    def _equal(self, begin: Tensor) -> float:
        """The noise with which the equations say as much as the prior."""
        return self._loud * math.sqrt(len(self.equations.observed) / begin.numel())

    def _free_equations(self, begin: Tensor) -> int:
        count = len(self.equations.observed)
        return max(count - begin.numel(), count // 4, 1)

    def _near(self, w: Tensor) -> bool:
        """Whether the model itself leaves little but noise, whatever the size."""
        observed = self.equations.observed
        left = self._off(self.equations, w, self._free(self.equations, 1.0))
        return left < self._least**2 * len(observed) + NEAR * float(observed.square().sum())

    def _found(self, end: End) -> bool:
        left = end.misfit - self._least**2 * end.equations
        return end.explained or left < FOUND * float(self.equations.observed.square().sum())

    def _through_copies(self, begin: Tensor, drawn: bool, costs: list[float]) -> tuple[Tensor, float]:
        """w and the noise to go on with; `costs` grow. A copy's own error, too, is what it leaves over, unless that is not loud
        enough for its images to stay as probable as real ones."""
        w, sigma = begin, self._loud if drawn else self._equal(begin)
        for copy in self.copies[min(WIDE, len(self.copies) - 1) if drawn else 0 :]:
            start = w + self._apart(begin)
            found, more = self._descended(copy, start, self._free(copy, sigma), EASY)
            while float(found.square().mean()) > self.prior.usual and sigma < LOUDEST * self._loud:
                sigma *= 2.0
                found, more = self._descended(copy, start, self._free(copy, sigma), EASY)
            left = self._off(copy, found, self._free(copy, 1.0)) / self._free_equations(begin)
            beyond = max(left - self._least**2, 0.0)
            errors = ERRORS_OF_KINKS if self.sharp else ERRORS
            w, sigma = found, min(sigma, math.sqrt(self._least**2 + errors**2 * beyond))
            costs += more
            self.stages += 1
            if not self.sharp and self._near(w):
                break
        return w, sigma

    def _through_levels(self, begin: Tensor, drawn: bool, costs: list[float]) -> tuple[Tensor, float]:
        """w and the noise to go on with; `costs` grow."""
        whole, w, sigma = self.equations, begin, self._loud
        for level in self.levels:
            if not (drawn and level > self._loud):
                w, more = self._descended(whole, w + self._apart(begin), self._free(whole, level), EASY)
                costs += more
                sigma = min(level / SURER, self._loud)
                telling = TELLING * self._free_equations(begin)
                if level <= self._loud and self._off(whole, w, self._free(whole, level)) > telling:
                    break
            self.stages += 1
        return w, sigma

    def _settled(self, w: Tensor, level: float, costs: list[float]) -> End:
        """Noise that is unknown is first as loud as the way left it, then as the residuals say, again and again; only the last
        search goes to its end."""
        least, outer = self._least, 0
        level = level if self.sigma is None else least
        for _ in range(self._settling - 1):
            w, more = self._descended(self.equations, w, self._known(level), EASY)
            before, level = level, max(math.sqrt(self._misfit(w) / self._free_equations(w)), least)
            costs += more
            outer, self.stages = outer + len(more), self.stages + 1
            if not level < SETTLED * before or outer >= self.iterations:
                break
        w, more = self._descended(self.equations, w, self._known(level), 0.0)
        costs += more
        return self._end(w, max(math.sqrt(self._misfit(w) / self._free_equations(w)), least), costs)

    def _end(self, w: Tensor, level: float, costs: Sequence[float]) -> End:
        misfit, count, least = self._misfit(w), len(self.equations.observed), self._least
        return End(
            w, list(costs), costs[-1], level if self.sigma is None else least, misfit, count, self._explained(misfit)
        )

    def _explained(self, misfit: float) -> bool:
        count = len(self.equations.observed)
        return misfit <= self._least**2 * (count + DOUBT * math.sqrt(2.0 * count))

    @property
    def _settling(self) -> int:
        """Descents at the end of a way, at most."""
        return READINGS if self.sigma is None else 1

    @property
    def _planned(self) -> int:
        """Descents of one search, at most, but for those of copies that are repeated."""
        ways = int(bool(self.copies)) + int(self._by_levels)
        return len(self.copies) + len(self.levels) + ways * self._settling + self._direct

    @property
    def _direct(self) -> int:
        """Descents with the noise as it is known almost from the first: of updates that are no louder than their noise."""
        loud = 2.0 * self._least**2 >= float(self.equations.observed.square().mean())
        return 2 if self.sigma is not None and loud else 0

    def _apart(self, begin: Tensor) -> Tensor:
        """A little of what the images of a batch began with: louder noise may have drawn those of equal labels together."""
        size = float(begin.square().mean().sqrt())
        return NUDGE / size * begin if len(begin) > 1 and size > 0 else torch.zeros_like(begin)

    def _known(self, sigma: float) -> Yardstick:
        return Yardstick(self.equations.observed, sigma)

    @staticmethod
    def _free(equations: Equations, sigma: float) -> Yardstick:
        return Yardstick(equations.observed, sigma, free=True)

    def _simulated(self, equations: Equations, w: Tensor) -> Tensor:
        return equations.simulated(self.prior.coefficients(w).reshape(-1), transformable=False)

    def _off(self, equations: Equations, w: Tensor, yardstick: Yardstick) -> float:
        with torch.no_grad():
            return float(yardstick.off(self._simulated(equations, w)))

    def _misfit(self, w: Tensor) -> float:
        return self._off(self.equations, w, self._known(1.0))

    def _cost(self, equations: Equations, w: Tensor, yardstick: Yardstick) -> float:
        return self._off(equations, w, yardstick) + float(w.square().sum())

    def _descended(
        self, equations: Equations, begin: Tensor, yardstick: Yardstick, share: float, patience: int = 0
    ) -> tuple[Tensor, list[float]]:
        """The lowest point of L-BFGS and the cost after every outer step, until one gains less than noise does, or `share`.

        patience: outer steps, if any, after which it ends unless the update is explained.
        """
        w, best, lowest = begin.clone().requires_grad_(), begin, self._cost(equations, begin, yardstick)
        costs: list[float] = []

        def cost() -> Tensor:
            return yardstick.off(self._simulated(equations, w)) + w.square().sum()

        total = self.runs * self._planned * self.iterations
        for step, _ in enumerate(islice(outer_steps(cost, [w]), self.iterations)):
            reached = self._cost(equations, w.detach(), yardstick)
            self.done = min(max(self.done, self.stages * self.iterations + step + 1), total)
            self.progress(self.done, total, reached)
            if not reached < lowest:
                break
            best, gained, lowest = w.detach().clone(), lowest - reached, reached
            costs.append(lowest)
            if gained < max(SIGNIFICANT, share * lowest):
                break
            if step + 1 == patience and not self._explained(self._misfit(best)):
                break
        return best, costs or [lowest]


def _smoothed_copies(equations: Equations, prior: Gaussian, count: int, generator: torch.Generator) -> list[Equations]:
    """The same equations for `count` smoothed copies of a model, the widest first; none of one that has no `bends`."""
    problem = equations.problem
    if not count or not bends(problem.model):
        return []
    drawn = torch.randn(DRAWN, *prior.mean.shape, generator=generator, dtype=torch.float64).to(prior.mean)
    images = equations.basis.back(prior.coefficients(drawn).reshape(-1, *problem.unknown["images"].shape[1:]))
    spread = spreads(problem.model, problem.sent, (0.5 + 0.5 * images).clamp(0.0, 1.0))
    widths = [WIDEST * NARROWER**step for step in range(count)]
    models = [smoothed(problem.model, {name: width * size for name, size in spread.items()}) for width in widths]
    return [replace(equations, problem=replace(problem, model=model)) for model in models]


def _levels(equal: float, least: float) -> list[float]:
    """Of the noise, downwards. equal: where the equations say as much as the prior."""
    level, levels = VAGUE * equal, list[float]()
    while level > least:
        levels.append(level)
        level *= SURER
    return levels

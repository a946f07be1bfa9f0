"""User-level inversion: one image for a whole batch, from the prior's loss and a windowed match of the batch's mean gradient.

Source: Li, Lowy, Liu, Koike-Akino, Malin, Parsons, Wang, "Exploring User-level Gradient Inversion with a Diffusion Prior",
FL@FM workshop of NeurIPS 2023, arXiv 2409.07291: Eq. 13 (the prior's loss) and Section 2.3.2 (timesteps annealed from T to
t_min, a sliding asymmetric Hamming window over the layers, the matching gradient clipped by the prior's, final denoising).
Differs from it: no code was published, and its words give no formula but Eq. 13, which is that of Graikos et al., NeurIPS 2022
(arXiv 2206.09012) for a point mass. So all of these are ours: the window's form, the scale of the matching loss (that of a
zero update is 1, under the same window), linear annealing, Adam and its falling rate, κ and t_min; `memory` and kappa = 0.1
are those of Graikos et al.'s own code. Of the image's label nothing is said. By default it is the one class of all known labels
where they agree, else that of iDLG's rule: the one class for which a single image's last layer can have this gradient. For a
batch of several classes that is the one that the model expects too rarely, the most so where there are several; known labels
that differ are then not looked at. Others are the most frequent class, and the shares of all: a batch of copies of one
image, labelled in these shares, has exactly the gradient that the match then simulates; but where labels are hidden a
trained model's are counted wrongly, and the match then has the wrong sign. Final denoising starts from the image noised to
t_min. Several chains run together and the one whose image matches the update best, all layers counting, is kept.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import ClassVar

import torch
from torch import Tensor, nn

from attacks.controls import snapshot_steps, usual_controls
from attacks.labels import infer_labels, last_dense
from attacks.matching import DISTANCES, Distance, Match, Problem, objective, pose, reconstruction
from fedattack.errors import FedattackError, NotApplicable, must, one_of
from fedattack.priors import Prior, ddim_step, denoise, load_prior
from fedattack.tasks import Task
from fedattack.types import Control, Knowledge, Progress, Reconstruction, State, Update, silent

GUIDANCES = ("matching", "none")
LABELS = ("idlg", "majority", "distribution")
WINDOWS = ("hamming", "none")

REACH = 1 / 3
"""Share of the layers that the window reaches below its centre."""

STARTS = {"noise": 1.0, "grey": 0.2}
"""How the image may start; the number is its standard deviation around grey, where −1 is black and 1 is white."""

COUNTED = 1000
"""Images that an update is taken for where their number is hidden: class shares come in thousandths."""


@dataclass(frozen=True)
class UserLevel:
    """Classifiers: one image that stands for a user's whole batch, however large, by a diffusion prior.

    guidance: "matching", the paper's; "none", the prior's loss alone, whose first chain is the result. label: of the image,
    "idlg", or "majority" or "distribution" (the shares of all classes) from known or inferred labels. distance: of each layer,
    "cosine", "relative-l2" or "l2". window: "hamming", whose centre goes from the deepest to the shallowest layer; "none" has
    all layers count all the time. kappa: most norm of the matching gradient in units of the prior's, smoothed by `memory`
    (share of the past, 0 none). weight: of the matching loss; clipping limits what it does. start: "noise", N(0, 1), or "grey".
    learning_rate: falls linearly to zero. t_min: share of T − 1 to which t falls. final_steps: of DDIM from there, 0 for none.
    restarts: chains in one batch. precision: of the match, "float32" or "float64"; None: the update's.
    """

    name: ClassVar[str] = "user-level"
    needs: ClassVar[frozenset[str]] = frozenset({"image_shape", "num_classes", "prior"})
    tasks: ClassVar[frozenset[str]] = frozenset({"classification"})

    guidance: str = "matching"
    label: str = "idlg"
    distance: str = "cosine"
    window: str = "hamming"
    kappa: float = 10.0
    memory: float = 0.0
    weight: float = 10_000.0
    start: str = "noise"
    steps: int = 4000
    learning_rate: float = 0.2
    t_min: float = 0.05
    final_steps: int = 10
    restarts: int = 1
    precision: str | None = None

    def __post_init__(self) -> None:
        named = (
            ("guidance", GUIDANCES, self.guidance),
            ("label", LABELS, self.label),
            ("distance", DISTANCES, self.distance),
            ("window", WINDOWS, self.window),
            ("start", STARTS, self.start),
        )
        for what, table, got in named:
            if got not in table:
                raise FedattackError(one_of(what, table, got))
        for name in ("steps", "restarts"):
            if getattr(self, name) < 1:
                raise FedattackError(must(name, "a whole number of at least 1", getattr(self, name)))
        for name in ("kappa", "weight", "final_steps"):
            if not getattr(self, name) >= 0:
                raise FedattackError(must(name, "zero or positive", getattr(self, name)))
        if not self.learning_rate > 0:
            raise FedattackError(must("learning_rate", "above zero", self.learning_rate))
        if not 0 <= self.t_min <= 1:
            raise FedattackError(must("t_min", "in [0, 1], a share of the timesteps", self.t_min))
        if not 0 <= self.memory < 1:
            raise FedattackError(must("memory", "in [0, 1)", self.memory))

    def controls(self) -> Sequence[Control]:
        """None for guidance "none", which is one."""
        if self.guidance == "none":
            return ()
        image = ("start", "steps", "learning_rate", "t_min", "final_steps")
        loss = ("label", "distance", "window", "precision")
        evaluations = self.steps * self.restarts
        return usual_controls(self, shared=image + loss, alone={"guidance": "none"}, evaluations=evaluations)

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
        shares = class_shares(update, model, knowledge, self.label, generator)
        majority = shares.argmax(-1)
        alone = replace(
            knowledge,
            batch_size=1,
            local_batch_size=1,
            labels=shares if self.label == "distribution" else majority,
        )
        problem = pose(update, model, task, alone, precision=self.precision, scale_free=self.distance == "cosine")
        assert knowledge.prior is not None
        prior = load_prior(knowledge.prior).fitting(knowledge.image_shape)
        search = Search(self, problem, prior, generator, progress)
        match = search.run()
        found = reconstruction(problem, match, perf_counter() - begun)
        found.diagnostics["clipped"] = search.clipped
        if self.label != "idlg":
            found.diagnostics["label_share"] = float(shares.max())
        trajectory = torch.stack([*search.snapshots, found.images.cpu()])
        found = replace(found, trajectory=trajectory, trajectory_steps=(*search.due, self.steps))
        return replace(found, labels=majority, represents="user", seconds=perf_counter() - begun)


# ------------------------------------------------------------------------------------------------ the label
def class_shares(
    update: Update, model: nn.Module, knowledge: Knowledge, label: str, generator: torch.Generator
) -> Tensor:
    """(1,K) float64 shares of the classes in the batch; for label = "idlg" all of it is the class of the one image.

    Raises NotApplicable where labels are hidden, or differ and "idlg" is asked for, and the update does not tell them.
    """
    classes = knowledge.num_classes
    assert classes is not None
    known = None if knowledge.labels is None else _shares(knowledge.labels, classes)
    if label == "idlg":
        if known is not None and float(known.max()) == 1.0:
            return known
        gradient = update.gradient(knowledge.learning_rate)
        weight, bias = last_dense(model, gradient, classes)
        if not bool(gradient[bias or weight].any()):
            raise NotApplicable(f"the gradient of the last dense layer's {'bias' if bias else 'weight'} is zero")
        rule = infer_labels(update, model, replace(knowledge, batch_size=1), generator=generator)
        return _shares(rule, classes)
    if known is not None:
        return known
    counted = replace(knowledge, batch_size=knowledge.batch_size or COUNTED)
    return _shares(infer_labels(update, model, counted, generator=generator), classes)


def _shares(labels: Tensor, classes: int) -> Tensor:
    """(1,K) of class indices (B,) or of probabilities (B,K)."""
    if labels.ndim == 2:
        return labels.double().mean(0, keepdim=True)
    return torch.nn.functional.one_hot(labels, classes).double().mean(0, keepdim=True)


# ------------------------------------------------------------------------------------------------ the schedules
def window_weights(layers: int, progress: float) -> Tensor:
    """ω (L,) of layers 1 … L, shallow to deep, at progress u in [0, 1]: all layers from c(u) = L − u(L − 1) up count 1.

    Below the centre the weight falls along half a Hamming window to 0.08 at a distance of R = REACH·L layers, and is 0 beyond.
    """
    below = layers - progress * (layers - 1) - torch.arange(1, layers + 1, dtype=torch.float64)
    reach = REACH * layers
    side = 0.54 + 0.46 * (math.pi * below / reach).cos()
    return torch.where(below <= 0, 1.0, torch.where(below <= reach, side, 0.0))


def timestep_at(progress: float, timesteps: int, t_min: float) -> int:
    """t at progress u in [0, 1]: T − 1 at its start, t_min·(T − 1) at its end, linear in between."""
    return round((timesteps - 1) * (t_min + (1.0 - t_min) * (1.0 - progress)))


def clipped(gradient: Tensor, most: Tensor) -> Tensor:
    """Gradients (R,…), each scaled down to the norm `most` (R,) where it is longer; never scaled up."""
    norms = gradient.flatten(1).norm(dim=1)
    factor = (most / norms.clamp_min(torch.finfo(norms.dtype).tiny)).clamp(max=1.0)
    shortened: Tensor = factor.reshape(-1, *[1] * (gradient.ndim - 1)) * gradient
    return shortened


def layers_of(observed: State) -> list[list[str]]:
    """Names of the tensors of every layer (weight, bias), in the model's order; layers observed as all zero say nothing."""
    found: dict[str, list[str]] = {}
    for name in observed:
        found.setdefault(name.rpartition(".")[0], []).append(name)
    return [names for names in found.values() if any(bool(observed[name].any()) for name in names)]


# ------------------------------------------------------------------------------------------------ the search
class Search:
    """R images (R,1,C,H,W) in one batch, in the prior's range of about [−1, 1], from their start to the result."""

    def __init__(
        self, attack: UserLevel, problem: Problem, prior: Prior, generator: torch.Generator, progress: Progress
    ) -> None:
        self.attack, self.problem, self.generator, self._progress = attack, problem, generator, progress
        self.layers = layers_of(problem.observed)
        if not self.layers:
            raise NotApplicable("the update is zero: there is nothing to match")
        self.device = next(iter(problem.observed.values())).device
        self.prior = prior.to(torch.float32, self.device)
        self.shape = (attack.restarts, *problem.unknown["images"].shape)
        distance = DISTANCES[attack.distance]
        self._silence = [self._of_layer(distance, {}, names) for names in self.layers]
        self.due = snapshot_steps(attack.steps)
        self.snapshots: list[Tensor] = []
        self.clipped = 0.0

    def run(self) -> Match:
        attack = self.attack
        x = (STARTS[attack.start] * self.noise()).requires_grad_()
        optimizer = torch.optim.Adam([x], lr=attack.learning_rate)
        history, smoothed, first = [], None, 0
        shown: list[Tensor] = []
        for step in range(attack.steps):
            progress = step / max(attack.steps - 1, 1)
            led_by = self.prior_gradient(x.detach(), progress)
            norms = led_by.flatten(1).norm(dim=1)
            smoothed = norms if smoothed is None else attack.memory * smoothed + (1.0 - attack.memory) * norms
            losses, pulled = self.matching_gradient(x, progress)
            limited = clipped(pulled, attack.kappa * smoothed)
            self.clipped += float((limited != pulled).flatten(1).any(1).double().mean()) / attack.steps
            x.grad = led_by if attack.guidance == "none" else led_by + limited
            optimizer.param_groups[0]["lr"] = attack.learning_rate * (1.0 - step / attack.steps)
            optimizer.step()
            history.append(losses)
            if step in self.due:
                shown.append(self.images(x))
            self._progress(step + 1, attack.steps, float(losses.min()))
        images = self.images(self.finished(x.detach()))
        with torch.no_grad():
            final = self.distances(1.0)({"images": images.to(self.problem.dtype)})
        history.append(final)
        if attack.guidance != "none":
            first = int(final.nan_to_num(math.inf).argmin())
        self.snapshots = [pictures[first].cpu() for pictures in shown]
        return Match(
            guess={"images": images[first].to(self.problem.dtype)},
            losses=tuple(torch.stack(history)[:, first].tolist()),
            steps=attack.steps,
            restart_losses=tuple(final.tolist()),
        )

    def noise(self) -> Tensor:
        """N(0, 1), drawn on the CPU."""
        return torch.randn(self.shape, generator=self.generator).to(self.device)

    def images(self, x: Tensor) -> Tensor:
        """In [0, 1]."""
        return (0.5 + 0.5 * x.detach()).clamp(0.0, 1.0)

    def prior_gradient(self, x: Tensor, progress: float) -> Tensor:
        """Of ‖ε − ε_θ(√ᾱ_t·x + √(1 − ᾱ_t)·ε, t)‖² at x for one ε a chain: Eq. 13."""
        now = timestep_at(progress, self.prior.task.num_train_timesteps, self.attack.t_min)
        a, noise = float(self.prior.task.alphas_cumprod[now]), self.noise()
        at = x.detach().requires_grad_()
        noisy = a**0.5 * at + (1 - a) ** 0.5 * noise
        off = denoise(self.prior, noisy.flatten(0, 1), now)[1].reshape(x.shape) - noise
        return torch.autograd.grad(off.square().sum(), at)[0]

    def matching_gradient(self, x: Tensor, progress: float) -> tuple[Tensor, Tensor]:
        """Losses (R,) and the gradient of weight times their sum, (R,1,C,H,W); zero, and no graph, without guidance."""
        guided = self.attack.guidance != "none"
        with torch.set_grad_enabled(guided):
            losses = self.distances(progress)({"images": 0.5 + 0.5 * x.to(self.problem.dtype)})
        if not guided:
            return losses, torch.zeros_like(x)
        gradient = torch.autograd.grad(self.attack.weight * losses.sum(), x)[0]
        return losses.detach(), gradient

    def distances(self, progress: float) -> Callable[..., Tensor]:
        """Σ ω_l·D_l as a share of what it is for a zero update, for guesses with a restart axis."""
        attack, count = self.attack, len(self.layers)
        weights = [1.0] * count if attack.window == "none" else window_weights(count, progress).tolist()
        distance = DISTANCES[attack.distance]
        whole = sum(weight * float(silence) for weight, silence in zip(weights, self._silence, strict=True))

        def windowed(simulated: State, observed: State) -> Tensor:
            terms = [
                weight / whole * self._of_layer(distance, simulated, names)
                for weight, names in zip(weights, self.layers, strict=True)
                if weight > 0
            ]
            return torch.stack(terms).sum()

        return objective(self.problem, windowed)

    def _of_layer(self, distance: Distance, simulated: State, names: list[str]) -> Tensor:
        """`distance` of one layer, of zeros where nothing was simulated."""
        observed = {name: self.problem.observed[name] for name in names}
        return distance({name: simulated.get(name, torch.zeros_like(observed[name])) for name in names}, observed)

    @torch.no_grad()
    def finished(self, x: Tensor) -> Tensor:
        """x noised to t_min and denoised in `final_steps` steps of DDIM, which leave no noise."""
        steps, timesteps = self.attack.final_steps, self.prior.task.num_train_timesteps
        start = timestep_at(1.0, timesteps, self.attack.t_min)
        if not steps:
            return x
        times = sorted({round(start * (steps - i) / steps) for i in range(steps)}, reverse=True)
        a = float(self.prior.task.alphas_cumprod[times[0]])
        at: Tensor = (a**0.5 * x + (1 - a) ** 0.5 * self.noise()).flatten(0, 1)
        for now, then in zip(times, [*times[1:], -1], strict=True):
            at = ddim_step(self.prior, at, now, then)
        return at.reshape(x.shape)

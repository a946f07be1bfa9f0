"""Cocktail Party attack: the rows of a dense layer's weight gradient are mixtures of the inputs; ICA takes them apart.

Source: Kariyappa, Guo, Maeng, Xiong, Suh, Qureshi, Lee, "Cocktail Party Attack: Breaking Aggregation-Based Privacy in
Federated Learning Using Independent Component Analysis", ICML 2023, arXiv 2209.05578: whitening, negentropy of the components
by log cosh, decorrelation weighted exponentially, total variation of components that are images.
Differs from it: sign and scale of each component come from the bias gradient, whose column of the mixture is 1 for every
sample (the paper rescales every image to its own range); whitening by singular values; the search may also be the classic
fixed-point iteration, and may listen to edges in place of pixels, which are far more independent of one another. Weights of
the terms are those of the published Tiny-ImageNet run; the published code switches the negentropy off after computing it,
here it counts. Embeddings of convolutional networks, which the paper then inverts by feature matching, are refused.
"""

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import ClassVar

import torch
from torch import Tensor, nn

from attacks.dense_layers import layer_gradient, reconstruction, seen_layer
from attacks.disaggregation import Factored, disaggregate, factor, from_points
from attacks.independent_components import differences, unmix
from attacks.matching import total_variation
from fedattack.errors import FedattackError, NotApplicable, must, one_of
from fedattack.tasks import Task
from fedattack.types import Knowledge, Progress, Reconstruction, Update, silent

SEARCHES = ("adam", "fixed-point")
SIGNALS = ("pixels", "edges")


@dataclass(frozen=True)
class CocktailParty:
    """Approximate images of a large batch behind a dense layer that sees the image, whatever follows it.

    search: "adam", the paper's, or "fixed-point" (FastICA). signals: "pixels", the paper's, or "edges"; they are what must be
    independent. decorrelation, temperature, tv_weight, negentropy, learning_rate: of "adam" only.
    """

    name: ClassVar[str] = "cocktail-party"
    needs: ClassVar[frozenset[str]] = frozenset({"image_shape", "batch_size"})
    tasks: ClassVar[frozenset[str]] = frozenset({"classification"})

    search: str = "adam"
    signals: str = "pixels"
    iterations: int = 25_000
    learning_rate: float = 1e-3
    negentropy: float = 1.0
    decorrelation: float = 1.47
    temperature: float = 12.4
    tv_weight: float = 3.1

    def __post_init__(self) -> None:
        for what, table, got in (("search", SEARCHES, self.search), ("signals", SIGNALS, self.signals)):
            if got not in table:
                raise FedattackError(one_of(what, table, got))
        if not isinstance(self.iterations, int) or self.iterations < 1:
            raise FedattackError(must("iterations", "a whole number of at least 1", self.iterations))

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
        assert knowledge.image_shape is not None
        assert knowledge.batch_size is not None
        batch = knowledge.batch_size
        layer, seen = seen_layer(update, model, knowledge, generator)
        weight, bias = layer_gradient(update, seen.name, knowledge)
        if batch == 1:
            found = disaggregate(weight, bias, 1, layer=layer, generator=generator)
            progress(1, 1, found.residual)
            return reconstruction(found, seen, knowledge, begun, {})
        parts = factor(weight, bias, batch, layer)
        if parts.rank < batch:
            raise NotApplicable(f"the layer's gradient has rank {parts.rank}: too few mixtures for a batch of {batch}")
        signals = parts.mixed[:, :-1]
        if self.signals == "edges" and min(knowledge.image_shape[1:]) > 1:
            signals = differences(signals.reshape(batch, *knowledge.image_shape))
        if self.search == "fixed-point":
            unmixing = unmix(signals, iterations=self.iterations, tolerance=1e-7, generator=generator)
            progress(1, 1, 0.0)
            losses: tuple[float, ...] = ()
        else:
            unmixing, losses = self._descend(signals, parts, knowledge.image_shape, progress)
        found = from_points(parts.points(unmixing), parts, weight.double(), bias.double(), batch, "independent")
        figures = {"component_correlation": correlation(unmixing, signals)}
        result = reconstruction(found, seen, knowledge, begun, figures)
        steps = len(losses) or result.steps
        return Reconstruction(
            result.images, losses=losses, steps=steps, seconds=result.seconds, diagnostics=result.diagnostics
        )

    def _descend(
        self, signals: Tensor, parts: Factored, shape: tuple[int, int, int], progress: Progress
    ) -> tuple[Tensor, tuple[float, ...]]:
        """The unmixing matrix (r, r) by Adam on the paper's loss, and the loss along the way."""
        rank, length = signals.shape
        left, singular, right = torch.linalg.svd(signals - signals.mean(1, keepdim=True), full_matrices=False)
        whitening = (left / singular.clamp_min(1e-12 * singular[0])).T * length**0.5
        white = (right * length**0.5).float()
        pictures = (whitening @ parts.mixed[:, :-1]).float()
        rotation = torch.eye(rank, device=white.device).requires_grad_()
        optimizer = torch.optim.Adam([rotation], self.learning_rate)
        losses: list[float] = []
        loss_of = self._loss(white, pictures, shape)
        for iteration in range(1, self.iterations + 1):
            with torch.enable_grad():
                loss = loss_of(rotation / rotation.norm(dim=1, keepdim=True))
                (rotation.grad,) = torch.autograd.grad(loss, rotation)
            optimizer.step()
            losses.append(float(loss.detach()))
            if iteration % 50 == 0 or iteration == self.iterations or iteration == 1:
                progress(iteration, self.iterations, losses[-1])
        unit = rotation.detach() / rotation.detach().norm(dim=1, keepdim=True)
        return unit.double() @ whitening, tuple(losses)

    def _loss(self, white: Tensor, pictures: Tensor, shape: tuple[int, int, int]) -> Callable[[Tensor], Tensor]:
        def loss(u: Tensor) -> Tensor:
            s = u @ white
            log_cosh = (s.abs() + torch.nn.functional.softplus(-2.0 * s.abs()) - 0.6931471805599453).mean(1)
            j = log_cosh.square().mean()
            r = (torch.exp(self.temperature * (u @ u.T).abs()) - 1.0).mean()
            tv = 2.0 * total_variation((u @ pictures).reshape(-1, *shape)) if self.tv_weight else s.new_zeros(())
            return -self.negentropy * j + self.decorrelation * r + self.tv_weight * tv

        return loss


def correlation(unmixing: Tensor, signals: Tensor) -> float:
    """Largest correlation of two different components: 0 where the search ended in a rotation of the whitened signals."""
    components = unmixing @ signals
    components = components - components.mean(1, keepdim=True)
    components = components / components.norm(dim=1, keepdim=True)
    return float((components @ components.T).abs().fill_diagonal_(0.0).max())

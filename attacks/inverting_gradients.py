"""Inverting Gradients: signed Adam on the cosine distance of gradients plus total variation, images in their box.

Source: Geiping, Bauermeister, Dröge, Moeller, "Inverting Gradients - How easy is it to break privacy in federated
learning?", NeurIPS 2020 (arXiv 2003.14053), Eq. 4; section 6 for several local steps (the unrolled update is matched).
Differs from it: step size and TV weight are in units of [0, 1] pixels (the authors' are in units of pixels divided by the
data's standard deviation, about a quarter); where labels are hidden they are read off the last layer first, and
timesteps off the time embedding; the restart with the lowest final objective is kept; all restarts run together.
"""

from dataclasses import dataclass, replace
from time import perf_counter
from typing import ClassVar

import torch
from torch import Tensor, nn

from attacks.labels import infer_labels
from attacks.matching import DISTANCES, adam, check_options, pose, reconstruction, total_variation
from attacks.starting import first_guess, random_start
from attacks.timestep_sources import check_source, settle_timesteps
from fedattack.tasks import Task
from fedattack.types import Knowledge, Progress, Reconstruction, Update, silent


@dataclass(frozen=True)
class InvertingGradients:
    """Cosine matching + total variation, signed Adam with step decay, box constraint, restarts in one batch.

    learning_rate in [0, 1] pixels a step; tv_weight multiplies the mean absolute neighbour difference; start "normal",
    "uniform", "grey", or an attack such as "r-conv", from whose result the first restart starts; precision "float32",
    "float64" or None for the update's own. timesteps (of diffusion models, where hidden): "leak", read off the update, or
    "relaxed", optimised as real numbers.
    """

    name: ClassVar[str] = "inverting-gradients"
    needs: ClassVar[frozenset[str]] = frozenset({"image_shape", "batch_size"})
    tasks: ClassVar[frozenset[str]] = frozenset({"classification", "diffusion"})

    iterations: int = 4800
    learning_rate: float = 0.025
    tv_weight: float = 0.4
    restarts: int = 1
    start: str = "uniform"
    distance: str = "cosine"
    signed: bool = True
    boxed: bool = True
    precision: str | None = None
    timesteps: str = "leak"

    def __post_init__(self) -> None:
        check_options(self.distance, random_start(self.start), self.iterations)
        check_source(self.timesteps)

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
        if task.name == "classification" and knowledge.labels is None:
            knowledge = replace(knowledge, labels=infer_labels(update, model, knowledge, generator=generator))
        knowledge, diagnostics = settle_timesteps(update, model, task, knowledge, self.timesteps)
        scale_free = self.distance == "cosine"
        problem = pose(update, model, task, knowledge, precision=self.precision, scale_free=scale_free)
        match = adam(
            problem,
            problem.start(self.restarts, generator, random_start(self.start), first),
            distance=DISTANCES[self.distance],
            penalty=self._prior if self.tv_weight else None,
            iterations=self.iterations,
            learning_rate=self.learning_rate,
            signed=self.signed,
            boxed=self.boxed,
            progress=progress,
        )
        found = reconstruction(problem, match, perf_counter() - begun)
        found.diagnostics.update(diagnostics)
        return found

    def _prior(self, images: Tensor) -> Tensor:
        return self.tv_weight * total_variation(images)

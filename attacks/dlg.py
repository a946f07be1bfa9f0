"""Deep Leakage from Gradients: L-BFGS on dummy images and dummy labels until their gradient equals the client's.

Source: Zhu, Liu, Han, "Deep Leakage from Gradients", NeurIPS 2019 (arXiv 1906.08935), Algorithm 1 and Eq. 2-4.
Differs from it: a strong-Wolfe line search (the paper steps with rate 1 and diverges for about one seed in three);
several restarts of which the one with the lowest matching loss is kept; any private variable that the threat model hides
is a dummy too (noise and timesteps of a diffusion model), and any that it shows is not; timesteps are read off the update
where they can be; a result within 1e-7 of the update ends the search.
"""

from dataclasses import dataclass
from time import perf_counter
from typing import ClassVar

import torch
from torch import nn

from attacks.matching import DISTANCES, check_options, lbfgs, pose, reconstruction
from attacks.timestep_sources import check_source, settle_timesteps
from fedattack.tasks import Task
from fedattack.types import Knowledge, Progress, Reconstruction, Update, silent


@dataclass(frozen=True)
class DLG:
    """Gradient matching with L-BFGS, squared L2 distance, labels optimised along with the images.

    iterations: outer L-BFGS calls of up to 20 steps. start: "normal" as in the paper, "uniform", or "grey" (0.5 + small
    noise, the surest on natural images). distance: "l2", "relative-l2", "cosine". precision: "float32", "float64" or
    None for the update's own. timesteps (of diffusion models, where hidden): "leak", read off the update, or "relaxed".
    """

    name: ClassVar[str] = "dlg"
    needs: ClassVar[frozenset[str]] = frozenset({"image_shape", "batch_size"})
    tasks: ClassVar[frozenset[str]] = frozenset({"classification", "diffusion"})

    iterations: int = 300
    learning_rate: float = 1.0
    history_size: int = 100
    restarts: int = 1
    start: str = "normal"
    distance: str = "l2"
    line_search: bool = True
    success: float = 1e-7
    precision: str | None = "float64"
    timesteps: str = "leak"

    def __post_init__(self) -> None:
        check_options(self.distance, self.start, self.iterations)
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
        knowledge, diagnostics = settle_timesteps(update, model, task, knowledge, self.timesteps)
        problem = pose(update, model, task, knowledge, precision=self.precision)
        match = lbfgs(
            problem,
            problem.start(self.restarts, generator, self.start),
            distance=DISTANCES[self.distance],
            iterations=self.iterations,
            learning_rate=self.learning_rate,
            history_size=self.history_size,
            line_search=self.line_search,
            success=self.success**2,
            progress=progress,
        )
        found = reconstruction(problem, match, perf_counter() - begun)
        found.diagnostics.update(diagnostics)
        return found

"""DLG-dm and InvG-dm: GIDM's baselines, plain gradient matching on a diffusion client's pixels with Adam.

Source: Huang, Hong, Roos, Chen, "GIDM: Gradient Inversion of Federated Diffusion Models", ARES 2025 (arXiv 2405.20380),
section 4.2; after DLG (arXiv 1906.08935) and Inverting Gradients (arXiv 2003.14053). Adam at 0.01 without decay, squared L2
for DLG-dm, cosine for InvG-dm. The paper gives them ε and t; so it is here where the threat model reveals both.
Differs from it: where it does not, the timesteps are read off the update and the noise is an unknown that moves along. The
number of iterations, which the paper leaves open, is that of GIDM's two phases together.
"""

from dataclasses import dataclass
from time import perf_counter
from typing import ClassVar

import torch
from torch import nn

from attacks.matching import DISTANCES, adam, check_options, pose, reconstruction, silence_cost
from attacks.timestep_sources import check_source, settle_timesteps
from fedattack.tasks import Task
from fedattack.types import Knowledge, Progress, Reconstruction, Update, silent


@dataclass(frozen=True)
class DLGdm:
    """DLG adapted to diffusion clients: Adam on the squared L2 distance of gradients. Options as for inverting-gradients.

    timesteps: "leak" (read off the update) or "relaxed" (real numbers that move along) where they are hidden.
    """

    name: ClassVar[str] = "dlg-dm"
    needs: ClassVar[frozenset[str]] = frozenset({"image_shape", "batch_size"})
    tasks: ClassVar[frozenset[str]] = frozenset({"diffusion"})

    iterations: int = 6500
    learning_rate: float = 0.01
    restarts: int = 1
    start: str = "normal"
    distance: str = "l2"
    timesteps: str = "leak"
    boxed: bool = False
    precision: str | None = None

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
        scale_free = self.distance == "cosine"
        problem = pose(update, model, task, knowledge, precision=self.precision, scale_free=scale_free)
        distance = DISTANCES[self.distance]
        match = adam(
            problem,
            problem.start(self.restarts, generator, self.start),
            distance=distance,
            iterations=self.iterations,
            learning_rate=self.learning_rate,
            boxed=self.boxed,
            decay_at=(),
            progress=progress,
        )
        found = reconstruction(problem, match, perf_counter() - begun)
        silence = silence_cost(problem, distance)
        found.diagnostics.update(diagnostics, silence=silence)
        if silence > 0:
            found.diagnostics["relative_loss"] = found.diagnostics["loss"] / silence
        return found


@dataclass(frozen=True)
class InvGdm(DLGdm):
    """Inverting Gradients adapted to diffusion clients: Adam on the cosine distance of gradients. Options as for dlg-dm."""

    name: ClassVar[str] = "invg-dm"
    start: str = "uniform"
    distance: str = "cosine"

"""R-GAP: one image by linear algebra, each layer's input from its output and its weight's gradient together.

Source: Zhu and Blaschko, R-GAP: Recursive Gradient Attack on Privacy, ICLR 2021, arXiv 2010.07733 (algorithm 1: weight
constraints W·x = z and gradient constraints k·xᵀ = ∂L/∂W of a layer, stacked and solved by least squares, layer after layer).
Differs from it: any number of classes, because the first dense layer needs a bias, whose gradient gives its input and output's
sensitivity away (the paper has one logit, no biases, and finds the scale from the loss); sensitivities come by the chain
rule, which is what the paper's recursion for k amounts to; each system is solved as r-conv solves its hybrid ones.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from attacks.chain import Activate, read_chain
from attacks.r_conv import RConv, one_step
from fedattack.errors import NotApplicable
from fedattack.tasks import Task
from fedattack.types import Knowledge, Progress, Reconstruction, Update, silent


@dataclass(frozen=True)
class RGAP:
    """The baseline of analytic attacks: needs every layer's output, so activations that can be inverted, and one image.

    Systems of too low a rank get the least-squares solution of least norm, as in the paper; diagnostics say so.
    """

    name: ClassVar[str] = "r-gap"
    needs: ClassVar[frozenset[str]] = frozenset({"image_shape", "batch_size"})
    tasks: ClassVar[frozenset[str]] = frozenset({"classification"})

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
        assert knowledge.image_shape is not None
        if one_step(update, knowledge) > 1:
            raise NotApplicable("R-GAP inverts the gradient of one image, not of a batch")
        for step in read_chain(model, update.sent, knowledge.image_shape, generator).steps:
            if isinstance(step, Activate) and (step.activation.flat or step.activation.folded):
                raise NotApplicable(
                    f"layer {step.name!r} ({step.activation.name}) cannot be inverted, and R-GAP needs its input"
                )
        both = RConv(constraints="hybrid", deficient="everywhere")
        return both.reconstruct(update, model, task, knowledge, generator=generator, progress=progress)

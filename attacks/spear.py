"""SPEAR: a batch taken apart by the zeros that a ReLU leaves in the gradient.

Source: Dimitrov, Baader, Müller, Vechev, "SPEAR: Exact Gradient Inversion of Batches in Federated Learning", NeurIPS 2024,
arXiv 2403.03945.
Differs from it: written from the abstract and public summaries, the paper's code not being public. Proposals are kept where
they have more exact zeros than r − 1 rows force, in place of a tuned threshold τ; the columns are chosen by one greedy pass
over those whose zeros are a half-space of the layer's own responses, and the sparsity-matching coefficient is asked of every
sample (all clear signs must match) in place of a second greedy stage; scales come with the bias gradient, which is one more
column of the decomposition. `unmixing` finds the same columns by faster searches.
"""

import math
from dataclasses import dataclass
from time import perf_counter
from typing import ClassVar

import torch
from torch import nn

from attacks.dense_layers import layer_gradient, reconstruction, seen_layer
from attacks.disaggregation import NOISE, disaggregate
from fedattack.errors import FedattackError, NotApplicable, must
from fedattack.tasks import Task
from fedattack.types import Knowledge, Progress, Reconstruction, Update, silent


@dataclass(frozen=True)
class Spear:
    """Exact batches behind a dense layer with a ReLU that sees the image.

    proposals: random sets of rows a round; rounds: at most. patience: how many
    times its budget of proposals the search may be expected to need before it is refused as hopeless.
    """

    name: ClassVar[str] = "spear"
    needs: ClassVar[frozenset[str]] = frozenset({"image_shape", "batch_size"})
    tasks: ClassVar[frozenset[str]] = frozenset({"classification"})

    proposals: int = 20_000
    rounds: int = 20
    patience: float = 100.0

    def __post_init__(self) -> None:
        for what, got in (("proposals", self.proposals), ("rounds", self.rounds)):
            if not isinstance(got, int) or got < 1:
                raise FedattackError(must(what, "a whole number of at least 1", got))

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
        if batch > 1 and layer.activation != "relu":
            raise NotApplicable(
                f"behind layer {seen.name!r} comes {layer.activation}, no ReLU: no gradient of it is zero"
            )
        expected = expected_proposals(len(layer.weight), batch)
        if expected > self.patience * self.proposals * self.rounds:
            raise NotApplicable(
                f"some {expected:.0e} random sets of {batch - 1} of {len(layer.weight)} neurons are needed for one hit"
            )
        found = disaggregate(
            *layer_gradient(update, seen.name, knowledge),
            batch,
            layer=layer,
            generator=generator,
            methods="sampling",
            rounds=self.rounds,
            samples=self.proposals,
            told=lambda done, rounds, exact: progress(done, rounds, float(batch - exact)),
        )
        if found.method == "none" and found.diagnostics["noise"] >= NOISE:
            raise NotApplicable(
                f"noise of {found.diagnostics['noise']:.1g} of a gradient's size hides which of its entries are zero"
            )
        return reconstruction(found, seen, knowledge, begun, {"expected_proposals": expected} if batch > 1 else {})


def expected_proposals(neurons: int, batch: int) -> float:
    """Random sets of batch − 1 rows until one lies in the zeros of some sample, if each has half of the neurons off."""
    off = neurons // 2
    if batch <= 1:
        return 1.0
    if off < batch - 1:
        return math.inf
    chance = (
        math.lgamma(off + 1)
        - math.lgamma(off - batch + 2)
        - math.lgamma(neurons + 1)
        + math.lgamma(neurons - batch + 2)
    )
    return math.exp(min(700.0, -chance)) / batch

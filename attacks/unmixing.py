"""Unmixing: whole batches behind a dense layer, exactly, whatever follows the layer.

Source: our own construction on the decomposition of SPEAR (Dimitrov et al., NeurIPS 2024, arXiv 2403.03945) with the idea of
the Cocktail Party attack (Kariyappa et al., ICML 2023, arXiv 2209.05578).
Differs from it: independent components of the images' edges start the search. Behind a ReLU their signs say which neurons a
sample left off, and the columns that vanish there are the samples' gradients: no sampling, so nothing grows exponentially
with the batch. Before any other stack of layers, as the last layer, or where a ReLU leaves too few zeros,
Levenberg-Marquardt solves the equations that the layers behind impose on the mixture of B² numbers.
"""

from contextlib import suppress
from dataclasses import dataclass
from time import perf_counter
from typing import ClassVar

import torch
from torch import nn

from attacks.dense_layers import layer_gradient, reconstruction, seen_layer
from attacks.disaggregation import disaggregate
from attacks.labels import infer_labels
from fedattack.errors import FedattackError, NotApplicable, must
from fedattack.tasks import Task
from fedattack.types import Knowledge, Progress, Reconstruction, Update, silent


@dataclass(frozen=True)
class Unmixing:
    """Certified images of a batch, estimates for the rest; see `attacks.disaggregation`.

    rounds: how often what was found is taken out and the rest searched again. starts: descents a round, at most.
    """

    name: ClassVar[str] = "unmixing"
    needs: ClassVar[frozenset[str]] = frozenset({"image_shape", "batch_size"})
    tasks: ClassVar[frozenset[str]] = frozenset({"classification"})

    rounds: int = 6
    starts: int = 512

    def __post_init__(self) -> None:
        for what, got in (("rounds", self.rounds), ("starts", self.starts)):
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
        assert knowledge.batch_size is not None
        batch, labels = knowledge.batch_size, knowledge.labels
        layer, seen = seen_layer(update, model, knowledge, generator)
        if batch > 1 and layer.head is not None and layer.activation != "softmax" and labels is None:
            with suppress(NotApplicable):
                labels = infer_labels(update, model, knowledge, generator=generator)
        methods: tuple[str, ...] | str = "auto"
        if update.kind == "weights" and knowledge.learning_rate is None:  # equations need the gradient's true size
            methods = ("exclusive", "independent", "descent") if layer.activation == "relu" else "independent"
        found = disaggregate(
            *layer_gradient(update, seen.name, knowledge),
            batch,
            layer=layer,
            generator=generator,
            methods=methods,
            labels=labels,
            rounds=self.rounds,
            starts=self.starts,
            told=lambda done, rounds, exact: progress(done, rounds, float(batch - exact)),
        )
        return reconstruction(found, seen, knowledge, begun, {})

"""Improved DLG: the label is read off the last layer's gradient first, then L-BFGS matches the images alone.

Source: Zhao, Mopuri, Bilen, "iDLG: Improved Deep Leakage from Gradients", 2020 (arXiv 2001.02610), Algorithm 1, Eq. 4-5.
Differs from it: batches are allowed, their labels estimated by counts (see attacks/labels.py); otherwise as attacks/dlg.py.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import nn

from attacks.dlg import DLG
from attacks.labels import infer_labels
from fedattack.tasks import Task
from fedattack.types import Knowledge, Progress, Reconstruction, Update, silent


@dataclass(frozen=True)
class IDLG(DLG):
    """DLG with the label known from the sign of the last layer's gradient. Parameters as for dlg."""

    name: ClassVar[str] = "idlg"
    needs: ClassVar[frozenset[str]] = frozenset({"image_shape", "batch_size", "num_classes"})
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
        labels = infer_labels(update, model, knowledge, generator=generator)
        return super().reconstruct(
            update, model, task, replace(knowledge, labels=labels), generator=generator, progress=progress
        )

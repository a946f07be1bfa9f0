"""The witness: in a simulation it writes down what a client really trained on, for metrics and oracles to read.

It runs on the client's side only, writes only where the simulation asks it to, and nothing that it writes can reach an
attack except through a threat model that names the field. In a deployment there is no folder and so no witness.
"""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from fedattack.store import update_name, write_tensors
from fedattack.tasks import Task, join_steps
from fedattack.types import Private


def bear_witness(
    folder: Path, client: str, server_round: int, task: Task, images: Tensor, labels: Tensor, batches: Sequence[Private]
) -> Path:
    """Write images (N,C,H,W), labels (N,) and the task's draws of all local steps; gives the file's path."""
    path = folder / f"{update_name(client, server_round)}.safetensors"
    write_tensors(
        path, join_steps(task, images, labels, batches), {"type": "truth", "client": client, "round": server_round}
    )
    return path

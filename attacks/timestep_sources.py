"""Where an attack on a diffusion client takes hidden timesteps from: the closed form of their leak, or a search."""

from dataclasses import replace

from torch import nn

from attacks.timesteps import infer_timesteps
from fedattack.errors import FedattackError, NotApplicable, one_of
from fedattack.tasks import Task
from fedattack.types import Knowledge, Update

SOURCES = ("leak", "relaxed")
"""leak: read off the time embedding's gradient (attacks/timesteps.py), relaxed where that does not apply. relaxed: real
numbers, optimised with the other unknowns."""


def check_source(source: str, allowed: tuple[str, ...] = SOURCES) -> None:
    """Raise FedattackError for a source that is not allowed."""
    if source not in allowed:
        raise FedattackError(one_of("timesteps", allowed, source))


def settle_timesteps(
    update: Update, model: nn.Module, task: Task, knowledge: Knowledge, source: str
) -> tuple[Knowledge, dict[str, float]]:
    """What is known once the timesteps are read off the update (if `source` says so), and diagnostics about it.

    Timesteps that are known stay. The leak gives them in no order: it counts as refused where the images have one, that is
    beside known noise in a batch, and where members of several local steps cannot be told apart. Diagnostics: one of
    timesteps_given, timesteps_leaked (with timesteps_exact) and timesteps_<source> is 1, and timesteps_leak_refused is.
    """
    if task.name != "diffusion":
        return knowledge, {}
    if knowledge.timesteps is not None:
        return knowledge, {"timesteps_given": 1.0}
    if source != "leak":
        return knowledge, {f"timesteps_{source}": 1.0}
    ordered = (knowledge.local_steps or 1) > 1 or (knowledge.noise is not None and (knowledge.batch_size or 1) > 1)
    try:
        if ordered:
            raise NotApplicable("the leak has no order, and here order matters")
        found = infer_timesteps(update, model, task, knowledge)
    except NotApplicable:
        return knowledge, {"timesteps_relaxed": 1.0, "timesteps_leak_refused": 1.0}
    device = next(tensor.device for tensor in update.received.values())
    told = replace(knowledge, timesteps=found.timesteps.to(device))
    return told, {"timesteps_leaked": 1.0, "timesteps_exact": float(found.exact)}

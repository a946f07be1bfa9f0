"""A search that starts from what another attack found: closed forms are exact but fragile, searches are sturdy but get lost.

`start` of a search names a random start of `attacks.matching`, or an attack: "r-conv" or "linear-leak(agreement=1e-4)".
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from attacks.matching import STARTS
from fedattack.errors import FedattackError, MissingKnowledge, NotApplicable, one_of
from fedattack.registry import ATTACKS, parse_spec
from fedattack.tasks import Task
from fedattack.types import Attack, Knowledge, Progress, Update, silent


def random_start(start: str) -> str:
    """The random start that the option names; "grey" where it names an attack. Raises FedattackError where it is neither."""
    name, _ = parse_spec(start)
    if name in STARTS:
        return start
    if name in ATTACKS.names() or ":" in name:
        return "grey"
    raise FedattackError(one_of("start", (*STARTS, *ATTACKS.names()), start))


def first_guess(
    start: str,
    update: Update,
    model: nn.Module,
    task: Task,
    knowledge: Knowledge,
    generator: torch.Generator,
    progress: Progress = silent,
) -> tuple[Tensor | None, Knowledge]:
    """Images (B,C,H,W) that the attack named by `start` finds in this update, and what is known with its labels.

    None and `knowledge` itself where `start` is random. Images are put in the order of the labels, known ones or the
    attack's own; those of a diffusion client in that of their timesteps, where these are unknown: ascending is how they are
    read off the update. progress hears of that attack's iterations before it hears of the search's, and may stop it. Raises
    NotApplicable where there are several images of a classifier's client without labels, where the attack looks for no such
    images at all, or what the attack raises.
    """
    name, parameters = parse_spec(start)
    if name in STARTS:
        return None, knowledge
    attack: Attack = ATTACKS.create(name, **parameters)
    if task.name not in attack.tasks:
        raise NotApplicable(f"start {name!r} does not attack the task {task.name!r}")
    if missing := attack.needs - knowledge.known():
        raise MissingKnowledge(f"start {name!r} needs {', '.join(sorted(missing))}, which this threat model hides")
    alone = replace(knowledge, history=None)
    found = attack.reconstruct(update, model, task, alone, generator=generator, progress=progress)
    images = found.images
    if found.represents != "images" and (found.represents != "user" or knowledge.batch_size != 1):
        raise NotApplicable(f"start {name!r} does not look for every image of the client")
    if found.labels is None and len(images) > 1 and task.name == "classification":
        raise NotApplicable(
            f"start {name!r} does not tell the labels of its {len(images)} images, so their order is unknown"
        )
    if found.timesteps is not None and len(found.timesteps) == len(images) and knowledge.timesteps is None:
        images = images[found.timesteps.argsort(stable=True).to(images.device)]
    if found.labels is not None:
        if knowledge.labels is None:
            knowledge = replace(knowledge, labels=found.labels)
        else:
            ordered = torch.empty_like(images)
            ordered[knowledge.labels.argsort(stable=True)] = images[found.labels.argsort(stable=True)]
            images = ordered
    return images, knowledge

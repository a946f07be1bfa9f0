"""What a client does with its private images in one round, in plain torch: choose, train, defend, witness. No Flower here."""

from dataclasses import dataclass
from pathlib import Path

import torch

from clients.witness import bear_witness
from fedattack.cells import DTYPES, build_victim
from fedattack.config import Settings
from fedattack.data import ImageData
from fedattack.registry import DEFENSES
from fedattack.seeding import derive_generator
from fedattack.tasks import STATISTICS, batch_indices, bind, simulate
from fedattack.types import Defense, State


@dataclass(frozen=True)
class LocalResult:
    """What a round of local training gives: the update before any update defense, the loss at its start, images seen."""

    update: State
    loss: float
    num_examples: int


def client_name(partition_id: int) -> str:
    return f"client-{partition_id}"


def build_defenses(settings: Settings) -> list[Defense]:
    """The cell's own defenses, in the order in which they act."""
    return [DEFENSES.create(name, **parameters) for name, parameters in settings.federation.defenses()]


def choose_examples(data: ImageData, settings: Settings, client: str, server_round: int, seed: int) -> list[int]:
    """Indices of the images that a client uses in a round: without repetition, from its own generator.

    Anew every round, unless the settings ask for `same_examples`.
    """
    drawn_in = 1 if settings.federation.same_examples else server_round
    order = torch.randperm(len(data), generator=derive_generator(seed, "examples", client, f"round-{drawn_in}"))
    chosen: list[int] = order[: settings.federation.images_per_round].tolist()
    return chosen


def train_locally(
    settings: Settings,
    sent: State,
    data: ImageData,
    *,
    client: str,
    server_round: int,
    seed: int,
    proximal_mu: float = 0.0,
    truth: Path | None = None,
) -> LocalResult:
    """One round: the gradient of one batch (fedsgd), or the weights after local SGD (fedavg).

    `seed` is the client's own: its images, and for a DDPM t and ε of every image (GIDM, Algorithm 1), are drawn from it.
    Where `truth` names a folder the witness writes there what was really used.
    """
    federation, task, dtype = settings.federation, settings.task.build(), DTYPES[settings.precision]
    sent = {name: tensor.to(dtype) for name, tensor in sent.items()}  # some strategies aggregate in another precision
    indices = choose_examples(data, settings, client, server_round, seed)
    images, labels = data.images(indices, dtype), data.labels[indices]
    generator = derive_generator(seed, "training", client, f"round-{server_round}")
    model = build_victim(settings, data.image_shape, data.num_classes)
    defenses, batches = build_defenses(settings), []
    for step in batch_indices(len(images), federation.batch_size, federation.local_steps):
        batch = images[step], labels[step]
        for defense in defenses:
            batch = defense.on_batch(*batch, generator=generator)
        batches.append(task.draw(*batch, generator=generator))
    update = simulate(
        model,
        sent,
        task,
        batches,
        kind="gradient" if federation.protocol == "fedsgd" else "weights",
        learning_rate=federation.learning_rate,
        proximal_mu=proximal_mu,
    )
    with torch.no_grad():
        loss = float(task.loss(bind(model, {name: tensor.clone() for name, tensor in sent.items()}), batches[0]))
    if truth is not None:
        bear_witness(truth, client, server_round, task, images, labels, batches)
    return LocalResult({name: tensor.detach() for name, tensor in update.items()}, loss, len(images))


def defend(update: State, sent: State, settings: Settings, *, client: str, server_round: int, seed: int) -> State:
    """Apply the cell's update defenses in order: to the gradient, or to the weight difference, put back on `sent`.

    Running statistics of BatchNorm, which fedavg sends along, are left as they are: noise would make variances negative.
    """
    weights = settings.federation.protocol == "fedavg"
    names = [name for name in update if not name.endswith(STATISTICS)]
    moved = {name: update[name] - sent[name] if weights else update[name] for name in names}
    for number, defense in enumerate(build_defenses(settings)):
        generator = derive_generator(seed, "defense", number, defense.name, client, f"round-{server_round}")
        moved = defense.on_update(moved, sent=sent, generator=generator)
    return update | {name: sent[name] + tensor if weights else tensor for name, tensor in moved.items()}

"""Searches that start from another attack's result."""

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch

from attacks.inverting_gradients import InvertingGradients
from attacks.linear_leak import LinearLeak
from attacks.second_order import SecondOrder
from attacks.starting import first_guess
from fedattack.errors import FedattackError, MissingKnowledge, NotApplicable
from fedattack.metrics import psnr_db
from fedattack.models import build_model
from fedattack.seeding import derive_generator
from fedattack.tasks import Classification, Diffusion
from fedattack.types import Knowledge, Reconstruction, Update

SHAPE = (3, 8, 8)
KNOWN = Knowledge(image_shape=SHAPE, batch_size=1, num_classes=4)


def generator() -> torch.Generator:
    return derive_generator(0, "starting")


@dataclass(frozen=True)
class Told:
    """Finds images that are all 0.1·label, in the order that it is told."""

    name: ClassVar[str] = "told"
    needs: ClassVar[frozenset[str]] = frozenset({"batch_size"})
    tasks: ClassVar[frozenset[str]] = frozenset({"classification"})

    labels: tuple[int, ...] = (3, 1, 2)

    def reconstruct(self, update, model, task, knowledge, *, generator, progress=None):
        labels = torch.tensor(self.labels)
        return Reconstruction((0.1 * labels).reshape(-1, 1, 1, 1).expand(-1, *SHAPE), labels=labels)


NOTHING = Update(round=1, client="0", sent={}, received={}, kind="gradient")
TOLD = f"{__name__}:Told"


def guess(known: Knowledge, start: str = TOLD):
    return first_guess(start, NOTHING, torch.nn.Identity(), Classification(), known, generator())


def test_images_stand_in_the_order_of_the_labels():
    images, known = guess(replace(KNOWN, batch_size=3, labels=torch.tensor([2, 3, 1])))
    torch.testing.assert_close(images[:, 0, 0, 0], torch.tensor([0.2, 0.3, 0.1]))
    assert known.labels.tolist() == [2, 3, 1]
    images, known = guess(replace(KNOWN, batch_size=3))
    torch.testing.assert_close(images[:, 0, 0, 0], torch.tensor([0.3, 0.1, 0.2]))
    assert known.labels.tolist() == [3, 1, 2]


def test_images_without_labels_have_no_order(monkeypatch):
    unlabelled = lambda self, *_, **__: Reconstruction(torch.zeros(3, *SHAPE))  # noqa: E731
    monkeypatch.setattr(Told, "reconstruct", unlabelled)
    with pytest.raises(NotApplicable, match="does not tell the labels of its 3 images"):
        guess(replace(KNOWN, batch_size=3))


@dataclass(frozen=True)
class Half:
    """Finds two images, one twice as bright as the other, without labels; of timesteps that it is told."""

    name: ClassVar[str] = "half"
    needs: ClassVar[frozenset[str]] = frozenset()
    tasks: ClassVar[frozenset[str]] = frozenset({"diffusion"})

    timesteps: tuple[int, ...] = ()

    def reconstruct(self, update, model, task, knowledge, *, generator, progress=None):
        images = torch.tensor([0.6, 0.3]).reshape(-1, 1, 1, 1).expand(-1, *SHAPE)
        return Reconstruction(images, timesteps=torch.tensor(self.timesteps) if self.timesteps else None)


def test_images_of_a_diffusion_client_need_no_labels(make_update, patches):
    """Their order is that of their timesteps, ascending; what another attack found of two begins a search of both."""
    task = Diffusion()
    options = {"block_out_channels": (8,), "attention": (), "mid_attention": False, "norm_num_groups": 4}
    model = build_model("unet", image_shape=SHAPE, num_classes=None, seed=0, **options).double()
    update = make_update(model, patches.test.images([3, 5]).double(), torch.zeros(2, dtype=torch.long), task=task)
    known = Knowledge(image_shape=SHAPE, batch_size=2)
    images, same = first_guess(f"{__name__}:Half", update, model, task, known, generator())
    torch.testing.assert_close(images[:, 0, 0, 0], torch.tensor([0.6, 0.3]))
    assert same is known
    for timesteps, order in (("[5, 9]", [0.6, 0.3]), ("[9, 5]", [0.3, 0.6])):
        told, _ = first_guess(f"{__name__}:Half(timesteps={timesteps})", update, model, task, known, generator())
        torch.testing.assert_close(told[:, 0, 0, 0], torch.tensor(order))
    attack = SecondOrder(start=f"{__name__}:Half", restarts=1, iterations=2)
    found = attack.reconstruct(update, model, task, known, generator=generator())
    assert found.steps == 2
    assert (found.diagnostics["starts"], found.diagnostics["descents"]) == (1.0, 0.0)


def test_what_is_no_image_of_the_client_begins_no_search(make_update, patches):
    """timestep-leak's stand-in is no find, though it has the shape of one."""
    options = {"block_out_channels": (8,), "attention": (), "mid_attention": False, "norm_num_groups": 4}
    model = build_model("unet", image_shape=SHAPE, num_classes=None, seed=0, **options).double()
    image = patches.test.images([3]).double()
    update = make_update(model, image, torch.zeros(1, dtype=torch.long), task=Diffusion())
    known = Knowledge(image_shape=SHAPE, batch_size=1)
    with pytest.raises(NotApplicable, match=r"start 'timestep-leak' does not look for every image"):
        first_guess("timestep-leak", update, model, Diffusion(), known, generator())


def test_a_random_start_is_left_alone():
    assert guess(KNOWN, "grey") == (None, KNOWN)


@pytest.mark.parametrize(
    "attack",
    [SecondOrder(start="idlg(iterations=7)"), InvertingGradients(start="idlg(iterations=7)")],
    ids=["second-order", "inverting-gradients"],
)
def test_who_waits_for_a_start_sees_it_work_and_may_stop_it(attack, make_update, patches):
    model = build_model("mlp", image_shape=SHAPE, num_classes=4, seed=2, hidden=(8,), activation="sigmoid")
    update = make_update(model, patches.test.images([3]), torch.tensor([1]))

    class Enough(Exception):
        pass

    def stop(iteration: int, iterations: int, loss: float) -> None:
        assert (iteration, iterations) == (1, 7)
        raise Enough

    with pytest.raises(Enough):
        attack.reconstruct(update, model, Classification(), KNOWN, generator=generator(), progress=stop)


def test_what_cannot_be_is_said():
    with pytest.raises(FedattackError, match=r"start must be one of .*linear-leak.*did you mean 'linear-leak'"):
        SecondOrder(start="linear-leek")
    with pytest.raises(FedattackError, match=r"start must be one of .*uniform"):
        InvertingGradients(start="unifrm")
    with pytest.raises(MissingKnowledge, match=r"start .* needs batch_size"):
        guess(replace(KNOWN, batch_size=None))
    with pytest.raises(NotApplicable, match=r"start 'linear-leak' does not attack the task 'diffusion'"):
        first_guess("linear-leak", NOTHING, torch.nn.Identity(), Diffusion(), KNOWN, generator())


@pytest.mark.parametrize(
    "attack",
    [
        SecondOrder(start="linear-leak", restarts=1, iterations=20),
        InvertingGradients(start="linear-leak", iterations=60, learning_rate=0.01, tv_weight=0.02, precision="float64"),
    ],
    ids=["second-order", "inverting-gradients"],
)
def test_a_search_mends_what_noise_did_to_a_closed_form(attack, make_update, patches):
    """The closed form uses the first layer only; the search uses all, and knows what pictures look like."""
    model = build_model("mlp", image_shape=SHAPE, num_classes=4, seed=2, hidden=(32,), activation="sigmoid").double()
    image, label = patches.test.images([3]).double(), torch.tensor([1])
    update = make_update(model, image, label)
    rms = torch.cat([t.reshape(-1) for t in update.received.values()]).square().mean().sqrt()
    drawn = generator()
    noisy = {n: t + 0.3 * rms * torch.randn(t.shape, generator=drawn).to(t) for n, t in update.received.items()}
    update = replace(update, received=noisy)
    known = replace(KNOWN, defense="gaussian-noise(sigma=0.3, relative=True)")

    def error_db(attack) -> float:
        found = attack.reconstruct(update, model, Classification(), known, generator=generator())
        return float(psnr_db(found.images, image.float()))

    assert error_db(attack) > error_db(LinearLeak()) + 1.0


def test_a_start_that_was_found_is_not_smoothed_away(make_update, patches):
    """ReLU networks are smoothed at first, which leads away from a start that is right already."""
    model = build_model("mlp", image_shape=SHAPE, num_classes=4, seed=2, hidden=(32,), activation="relu").double()
    update = make_update(model, patches.test.images([3]).double(), torch.tensor([1]))
    attack = SecondOrder(start="linear-leak", restarts=1, iterations=20)
    found = attack.reconstruct(update, model, Classification(), KNOWN, generator=generator())
    assert found.diagnostics["certified"] == 1.0
    assert found.losses[0] < 1e-10  # the costs of smoothed copies would come first

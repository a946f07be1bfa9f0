"""Gates in place of ReLUs: the same model at its own states, nothing that jumps; and deep ReLU nets inverted exactly."""

import copy

import pytest
import torch
from torch import nn

from attacks import second_order
from attacks.second_order import SecondOrder
from attacks.smoothing import kinks
from attacks.switching import Gate, Gates
from fedattack.errors import FedattackError
from fedattack.metrics import psnr_db
from fedattack.models import build_model
from fedattack.seeding import derive_generator
from fedattack.tasks import Classification, bind
from fedattack.types import Knowledge, Reconstruction


def small(name: str = "resnet18", **options: object) -> nn.Module:
    model = build_model(name, image_shape=(3, 8, 8), num_classes=3, seed=0, width=2, **options)
    return model.double().eval()


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_a_gated_model_at_its_own_states_is_the_model(random_images, norm):
    """Whose blocks call one activation twice, so that states are told apart by their order."""
    model, images = small(norm=norm), random_images((2, 3, 8, 8)).double()
    before = copy.deepcopy(model)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gates = Gates.of(model, state, images)
    assert len(gates.calls) == 17 > len(kinks(model)) == 9
    assert len(gates.inputs) == sum(shape.numel() for _, shape in gates.calls)
    assert kinks(gates.model) == []
    weights = {name: tensor.clone().requires_grad_() for name, tensor in model.named_parameters()}
    outputs = []
    for twin in (model, gates.model):
        gates.put(gates.states)
        out = bind(twin, {**state, **weights})(images)
        outputs.append((out.detach(), torch.autograd.grad(out.square().sum(), list(weights.values()))))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-12, atol=1e-12)
    assert not any(module._forward_pre_hooks for module in gates.model.modules())
    for (name, tensor), old in zip(model.state_dict().items(), before.state_dict().values(), strict=True):
        assert torch.equal(tensor, old), name
    assert len(kinks(model)) == 9


def test_a_gate_follows_the_states_it_is_given_not_its_input():
    gate, z = Gate(0.1), torch.tensor([2.0, -2.0, 4.0])
    gate.states.append(torch.tensor([0.0, 1.0, 0.5]))
    torch.testing.assert_close(gate(z), torch.tensor([0.2, -2.0, 2.2]))
    gate.listening = True
    torch.testing.assert_close(gate(z), nn.functional.leaky_relu(z, 0.1))


def test_the_nearest_units_are_those_next_to_their_kinks():
    model = nn.Sequential(nn.Flatten(), nn.LeakyReLU(0.2))
    images = torch.tensor([[[[3.0, -0.1]], [[0.0, -4.0]]]], dtype=torch.float64)
    gates = Gates.of(model, {}, images)
    torch.testing.assert_close(gates.inputs, images.flatten() / images.std(correction=0))
    assert gates.states.tolist() == [1.0, 0.0, 0.0, 0.0]
    near, chance = gates.nearest(3)
    assert near.tolist() == [2, 1, 0]
    torch.testing.assert_close(chance[[0, 2]], torch.special.ndtr(torch.tensor([0.0, 2.0], dtype=torch.float64)))
    assert 0.4 < float(chance[1]) < 0.5


def test_a_module_that_stands_at_two_places_is_met_twice(random_images):
    """And one that is never called is not met at all."""
    shared = nn.ReLU()
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), shared, nn.Linear(5, 4), shared).double()
    images = random_images((2, 3, 2, 2)).double()
    gates = Gates.of(model, dict(model.state_dict()), images)
    assert kinks(model) == ["2", "4"]
    assert kinks(gates.model) == []
    assert [shape for _, shape in gates.calls] == [(2, 5), (2, 4)]
    gates.put(gates.states)
    torch.testing.assert_close(gates.model(images), model(images))
    idle = nn.Sequential(nn.Flatten())
    idle.unused = nn.ReLU()
    idle.forward = lambda x: torch.relu(x)
    assert len(Gates.of(idle, {}, images).inputs) == 0


def partly(make_update, model: nn.Module, knowledge: Knowledge, **options: object) -> Reconstruction:
    images = torch.rand(2, 3, 4, 4, generator=derive_generator(1, "images"), dtype=torch.float64)
    update = make_update(model, images, torch.tensor([0, 2]))
    attack = SecondOrder(restarts=1, iterations=4, smoothing_iterations=1, switching_iterations=1, **options)
    generator = derive_generator(0, "switching")
    return attack.reconstruct(update, model, Classification(), knowledge, generator=generator)


def test_a_step_on_some_of_the_images_is_searched_without_gates(make_update):
    """Where nothing is found, that is all that is said."""
    model = build_model("convnet-small", image_shape=(3, 4, 4), num_classes=3, seed=0, width=2).double()
    known = Knowledge(
        image_shape=(3, 4, 4),
        batch_size=2,
        num_classes=3,
        labels=torch.tensor([0, 2]),
        local_batch_size=1,
        local_steps=1,
        learning_rate=0.1,
    )
    assert partly(make_update, model, known).diagnostics["certified"] == 0.0


def test_a_box_holds_in_every_round(make_update, monkeypatch):
    seen: list[torch.Tensor] = []

    class Told(Gates):
        @staticmethod
        def of(model: nn.Module, state: object, images: torch.Tensor) -> Gates:
            seen.append(images)
            return Gates.of(model, state, images)

    monkeypatch.setattr(second_order, "Gates", Told)
    model = build_model("convnet-small", image_shape=(3, 4, 4), num_classes=3, seed=0, width=2).double()
    known = Knowledge(image_shape=(3, 4, 4), batch_size=2, num_classes=3, labels=torch.tensor([0, 2]))
    end = partly(make_update, model, known, box="step")
    assert len(seen) > 1
    assert all(bool(((images >= 0) & (images <= 1)).all()) for images in seen)
    assert len(end.losses) == end.steps + 2  # the start's, one for each trial, and the verdict
    assert end.losses[0] >= end.losses[1] > 0


def found(make_update, **options: object) -> tuple[Reconstruction, float]:
    """A smooth 6×6 picture behind a small ReLU ConvNet, from its gradient, one start."""
    rows, columns = torch.meshgrid(torch.arange(6) / 8, torch.arange(6) / 8, indexing="ij")
    images = torch.stack([0.5 + 0.3 * torch.sin(6 * rows + c) * torch.cos(5 * columns - c) for c in range(3)])[None]
    model = build_model("convnet-small", image_shape=(3, 6, 6), num_classes=10, seed=4, width=8).double()
    update = make_update(model, images.double(), torch.tensor([2]))
    calls: list[tuple[int, int, float]] = []
    end = SecondOrder(restarts=1, **options).reconstruct(
        update,
        model,
        Classification(),
        Knowledge(image_shape=(3, 6, 6), batch_size=1, num_classes=10),
        generator=derive_generator(0, "switching"),
        progress=lambda *call: calls.append(call),
    )
    assert [call[0] for call in calls] == sorted({call[0] for call in calls})
    assert all(1 <= i <= n for i, n, _ in calls)
    assert end.steps == len(calls)
    return end, float(psnr_db(end.images, images).min())


def test_free_gates_lead_a_search_out_from_between_the_jumps(make_update):
    """Without them the same start is stuck, and says so."""
    stuck, below = found(make_update, switching_iterations=0)
    assert stuck.diagnostics["certified"] == 0.0
    exact, above = found(make_update)
    assert exact.diagnostics["certified"] == 1.0
    assert above > 100 > 40 > below


def test_many_gates_are_searched_without_a_matrix(make_update, monkeypatch):
    monkeypatch.setattr(second_order, "GATED_DENSE", 0)
    exact, psnr = found(make_update)
    assert exact.diagnostics["certified"] == 1.0
    assert psnr > 100


@pytest.mark.parametrize("share", [0.0, 1.5, float("nan")])
def test_a_share_of_gates_is_a_share(share):
    with pytest.raises(FedattackError, match="gates"):
        SecondOrder(gates=share)

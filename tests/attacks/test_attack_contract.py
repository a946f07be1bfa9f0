"""What every registered attack promises. A new plugin is covered by being registered: there is no code per attack here."""

import dataclasses
import inspect
import random
import re
import sys
from contextlib import suppress
from functools import cache
from typing import Any

import attack_cases
import numpy
import pytest
import torch
from attack_cases import CASES, CLASSES, Case, cheap, facts
from torch import Tensor, nn

import fedattack.jobs
from fedattack.errors import FedattackError, MissingKnowledge, NotApplicable
from fedattack.jobs import attack_update
from fedattack.knowledge import FIELDS
from fedattack.registry import ATTACKS
from fedattack.seeding import derive_generator
from fedattack.tasks import TASKS, Classification
from fedattack.types import Knowledge, Reconstruction, Update

NAMES = ATTACKS.names()
every_attack = pytest.mark.parametrize("name", NAMES)
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@cache
def public_images(shape: tuple[int, int, int]) -> Tensor:
    return torch.rand((12, *shape), generator=derive_generator(0, "public", shape))


@cache
def update_of(case: Case, seed: int = 0) -> Update:
    images = torch.rand((case.batch, *case.shape), generator=derive_generator(seed, "victim", case.name))
    return case.update(images, torch.arange(case.batch) % CLASSES)


def attack_case(
    name: str, case: Case, *, update: Update | None = None, seed: int = 0, **settings: Any
) -> Reconstruction:
    attack = cheap(name)
    knowledge = facts(case, attack, public_images(case.shape))
    generator = derive_generator(seed, "attack")
    return attack_update(attack, update or update_of(case), case.context, knowledge, generator=generator, **settings)


def says_why(reason: Exception) -> None:
    """A refusal is a result that a reader of the report sees."""
    assert str(reason).strip()


@cache
def seed_three(name: str, case: Case) -> Reconstruction | NotApplicable:
    """The run that several tests look at."""
    try:
        return attack_case(name, case, seed=3)
    except NotApplicable as reason:
        return reason


def applied(name: str, case: Case) -> Reconstruction:
    """`seed_three`, or a skip with the attack's reason."""
    found = seed_three(name, case)
    if isinstance(found, NotApplicable):
        says_why(found)
        pytest.skip(f"not applicable: {found}")
    return found


def attack_or_skip(name: str, case: Case, **settings: Any) -> Reconstruction:
    try:
        return attack_case(name, case, **settings)
    except NotApplicable as reason:
        says_why(reason)
        pytest.skip(f"not applicable: {reason}")


@cache
def first_case(name: str) -> Case:
    """The first case that the attack says something about."""
    for case in CASES:
        if isinstance(seed_three(name, case), Reconstruction):
            return case
    reasons = [f"{case.name}: {seed_three(name, case)}" for case in CASES]
    raise AssertionError(f"{name} runs on no case at all: {reasons}; add one to attack_cases.CASES")


# ------------------------------------------------------------------------------------------------ the class
@every_attack
def test_class_is_a_frozen_dataclass_that_says_what_it_needs(name):
    attack = ATTACKS.get(name)
    assert dataclasses.is_dataclass(attack)
    assert attack.__dataclass_params__.frozen
    assert attack.name == name
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name)
    assert not attack.__name__.endswith("Attack")
    assert isinstance(attack.needs, frozenset)
    assert attack.needs <= FIELDS
    assert isinstance(attack.tasks, frozenset)
    assert attack.tasks
    assert attack.tasks <= set(TASKS)
    fields = {field.name for field in dataclasses.fields(attack)}
    assert not fields & {"name", "needs", "tasks"}, "these are ClassVars"
    assert attack() == attack(), "every hyper-parameter has the paper's default"
    assert hash(attack()) == hash(attack())


@every_attack
def test_module_says_where_it_comes_from_and_how_it_differs(name):
    module = sys.modules[ATTACKS.get(name).__module__]
    text = inspect.getdoc(module) or ""
    assert "Source:" in text
    assert "Differs from it:" in text
    assert text.splitlines()[0].endswith(".")
    assert ATTACKS.summary(name)


@every_attack
def test_reconstruct_takes_the_documented_arguments_and_no_others(name):
    """The structural half of the blindfold: there is no argument through which a truth could come."""
    parameters = inspect.signature(ATTACKS.get(name).reconstruct).parameters
    assert list(parameters) == ["self", "update", "model", "task", "knowledge", "generator", "progress"]
    for keyword in ("generator", "progress"):
        assert parameters[keyword].kind is inspect.Parameter.KEYWORD_ONLY
    assert parameters["progress"].default is not inspect.Parameter.empty


# ------------------------------------------------------------------------------------------------ the result
@every_attack
def test_runs_somewhere(name):
    assert first_case(name) in CASES


@every_attack
@every_case
def test_result_has_the_promised_form(name, case):
    found = applied(name, case)
    assert isinstance(found, Reconstruction)
    count = 1 if found.represents == "user" else case.batch
    assert found.images.shape == (count, *case.shape)
    assert found.images.is_floating_point()
    assert bool(found.images.isfinite().all())
    assert float(found.images.min()) >= 0.0
    assert float(found.images.max()) <= 1.0
    assert not found.images.requires_grad
    assert found.images.device.type == "cpu"
    if found.labels is not None:
        assert found.labels.shape == (count,)
        assert found.labels.dtype == torch.int64
        assert set(found.labels.tolist()) <= set(range(CLASSES))
    for estimate in (found.timesteps, found.noise):
        assert estimate is None or (bool(estimate.isfinite().all()) and not estimate.requires_grad)
    if found.timesteps is not None:
        assert found.timesteps.dtype == torch.int64
    if found.trajectory is not None:
        steps = found.trajectory_steps
        assert found.trajectory.shape == (len(steps), *found.images.shape)
        assert found.trajectory.is_floating_point()
        assert found.trajectory.device.type == "cpu"
        assert float(found.trajectory.min()) >= 0.0
        assert float(found.trajectory.max()) <= 1.0
        assert torch.equal(found.trajectory[-1], found.images.to(found.trajectory))
        assert all(isinstance(step, int) for step in steps)
        assert list(steps) == sorted(set(steps))
        assert steps[0] >= 0
        assert steps[-1] == len(found.losses) - 1, "they are counted as losses are"
    else:
        assert found.trajectory_steps == ()
    assert all(isinstance(loss, float) for loss in found.losses)
    assert isinstance(found.steps, int)
    assert found.steps >= 0
    assert found.seconds >= 0
    assert all(isinstance(k, str) and isinstance(v, float) for k, v in found.diagnostics.items())


@every_attack
@every_case
def test_same_generator_seed_same_bits(name, case):
    first, again = applied(name, case), attack_case(name, case, seed=3)
    for field in dataclasses.fields(Reconstruction):
        a, b = getattr(first, field.name), getattr(again, field.name)
        if isinstance(a, Tensor):
            assert torch.equal(a, b), field.name
        elif field.name != "seconds":
            assert a == b, field.name


# ------------------------------------------------------------------------------------------------ what it leaves alone
HOOKS = [name for name in vars(nn.Linear(1, 1)) if name.endswith("hooks") or "hooks_with" in name]


def model_picture(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that an attack might change."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    return {
        "values": {name: tensor.detach().clone() for name, tensor in tensors.items()},
        "identities": {name: (id(tensor), tensor.data_ptr()) for name, tensor in tensors.items()},
        "grads": {name: None if t.grad is None else t.grad.clone() for name, t in tensors.items()},
        "requires_grad": {name: tensor.requires_grad for name, tensor in tensors.items()},
        "dtypes": {name: tensor.dtype for name, tensor in tensors.items()},
        "tensor_hooks": {name: dict(tensor._backward_hooks or {}) for name, tensor in tensors.items()},
        "training": {name: module.training for name, module in model.named_modules()},
        "hooks": {(name, hook): dict(getattr(m, hook)) for name, m in model.named_modules() for hook in HOOKS},
        "types": {name: type(module) for name, module in model.named_modules()},
        "forwards": {name: "forward" in vars(module) for name, module in model.named_modules()},
        "state": list(model.state_dict()),
    }


def assert_same(before: Any, after: Any, where: str = "model") -> None:
    if isinstance(before, Tensor):
        assert torch.equal(before, after), where
    elif isinstance(before, dict):
        assert list(before) == list(after), where
        for key in before:
            assert_same(before[key], after[key], f"{where} {key}")
    else:
        assert before == after, where


@every_attack
@every_case
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_model_and_arguments_are_left_as_they_were(name, case, training):
    attack, task = cheap(name), case.build_task()
    if task.name not in attack.tasks:
        pytest.skip("another task")
    model, update = case.build_model(seed=9).train(training), update_of(case)
    for number, parameter in enumerate(model.parameters()):
        if number % 2:
            parameter.grad = torch.full_like(parameter, 0.25)
    next(m for m in model.modules() if not list(m.children())).register_forward_hook(lambda *_: None)
    if len(modules := list(model.modules())) > 3:
        modules[2].training = not training  # mixed modes are a state too
    knowledge = facts(case, attack, public_images(case.shape))
    pictures = model_picture(model), tensors_of(update), tensors_of(knowledge)
    generators = torch.get_rng_state(), numpy.random.get_state()[1].copy(), random.getstate()
    grad_mode, dtype, threads = torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads()
    with suppress(NotApplicable):  # saying no must leave no traces either
        attack.reconstruct(update, model, task, knowledge, generator=derive_generator(0, "contract"))
    assert_same(pictures[0], model_picture(model))
    assert_same(pictures[1], tensors_of(update), "update")
    assert_same(pictures[2], tensors_of(knowledge), "knowledge")
    assert torch.equal(generators[0], torch.get_rng_state()), "the global torch generator was used"
    assert (generators[1] == numpy.random.get_state()[1]).all(), "numpy's global generator was used"
    assert generators[2] == random.getstate(), "python's global generator was used"
    assert (grad_mode, dtype, threads) == (
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
        torch.get_num_threads(),
    )


def tensors_of(thing: Update | Knowledge) -> dict[str, Any]:
    """Copies of every tensor of an update or a knowledge, with the dtype and whether it requires a gradient."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(thing):
        value = getattr(thing, field.name)
        for key, tensor in value.items() if isinstance(value, dict) else [("", value)]:
            if isinstance(tensor, Tensor):
                found[f"{field.name} {key}"] = tensor.clone()
                found[f"{field.name} {key} form"] = (tensor.dtype, tensor.requires_grad, tensor.grad is None)
    return found


@every_attack
def test_result_is_independent_of_the_model_instances_own_weights(name):
    """An attack uses `update.sent`: the instance only lends its structure."""
    case = first_case(name)
    attack, task = cheap(name), case.build_task()
    found = [
        attack.reconstruct(
            update_of(case),
            case.build_model(seed),
            task,
            facts(case, attack, public_images(case.shape)),
            generator=derive_generator(0, "x"),
        )
        for seed in (5, 6)
    ]
    assert torch.equal(found[0].images, found[1].images)


# ------------------------------------------------------------------------------------------------ needs and tasks
def no_compute(*_: object, **__: object) -> nn.Module:
    raise AssertionError("a model was built before the attack's needs were checked")


@pytest.mark.parametrize(
    ("name", "hidden"), [(name, hidden) for name in NAMES for hidden in sorted(ATTACKS.get(name).needs)]
)
def test_needs_are_enforced_before_any_compute(name, hidden, monkeypatch):
    attack = cheap(name)
    case = next(case for case in CASES if case.task in attack.tasks)
    knowledge = facts(case, attack, public_images(case.shape), **{hidden: None})
    monkeypatch.setattr(fedattack.jobs, "build_model", no_compute)
    monkeypatch.setattr(type(attack), "reconstruct", no_compute)
    with pytest.raises(MissingKnowledge, match=hidden):
        attack_update(attack, update_of(case), case.context, knowledge, generator=derive_generator(0, "x"))


@every_attack
def test_only_what_is_needed_is_needed(name):
    """With nothing but its needs an attack must work, or say NotApplicable, and never trip over a field that is None."""
    attack, case = cheap(name), first_case(name)
    full = facts(case, attack, public_images(case.shape))
    least = Knowledge(**{field: getattr(full, field) for field in attack.needs})
    try:
        found = attack_update(attack, update_of(case), case.context, least, generator=derive_generator(0, "x"))
    except (NotApplicable, MissingKnowledge) as reason:
        says_why(reason)
    else:
        assert bool(found.images.isfinite().all())


@dataclasses.dataclass(frozen=True)
class Toy(Classification):
    """A task that no attack can have heard of."""

    name = "toy"


@pytest.mark.parametrize(
    ("name", "task"),
    [(name, task) for name in NAMES for task in [*sorted(set(TASKS) - ATTACKS.get(name).tasks), "toy"]],
)
def test_other_tasks_are_not_applicable(name, task, monkeypatch):
    monkeypatch.setitem(TASKS, "toy", Toy)
    monkeypatch.setattr(fedattack.jobs, "build_model", no_compute)
    attack, case = cheap(name), CASES[0]
    context = {**case.context, "task": {"name": task}}
    knowledge = facts(case, attack, public_images(case.shape))
    with pytest.raises(NotApplicable, match=task):
        attack_update(attack, update_of(case), context, knowledge, generator=derive_generator(0, "x"))


# ------------------------------------------------------------------------------------------------ hard updates
def with_received(update: Update, change: Any) -> Update:
    received = {
        name: change(tensor) if tensor.is_floating_point() else tensor for name, tensor in update.received.items()
    }
    return dataclasses.replace(update, received=received)


@every_attack
@every_case
def test_no_nan_under_a_noisy_update(name, case):
    generator = derive_generator(0, "noise")

    def noisy(tensor: Tensor) -> Tensor:
        noise = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
        return tensor + 10.0 * tensor.std(unbiased=False) * noise

    found = attack_or_skip(name, case, update=with_received(update_of(case), noisy))
    assert bool(found.images.isfinite().all())
    assert float(found.images.min()) >= 0.0
    assert float(found.images.max()) <= 1.0


@every_attack
@every_case
def test_a_silent_update_is_refused_or_gives_finite_images(name, case):
    found = attack_or_skip(name, case, update=with_received(update_of(case), torch.zeros_like))
    assert bool(found.images.isfinite().all())


@every_attack
@every_case
def test_a_partial_update_is_refused_or_gives_finite_images(name, case):
    """A client that sends its last layer only (partial training): a result or NotApplicable, never a KeyError."""
    update = update_of(case)
    last = list(update.received)[-2:]
    partial = dataclasses.replace(update, received={key: update.received[key] for key in last})
    try:
        found = attack_or_skip(name, case, update=partial)
    except FedattackError as reason:
        says_why(reason)
    else:
        assert bool(found.images.isfinite().all())


# ------------------------------------------------------------------------------------------------ progress
class Enough(Exception):
    """Raised by a progress that wants the attack to stop."""


@every_attack
def test_progress_is_told_and_can_stop_the_attack(name):
    case, calls = first_case(name), []
    attack_case(name, case, progress=lambda *call: calls.append(call))
    assert calls
    for iteration, iterations, loss in calls:
        assert isinstance(iteration, int)
        assert isinstance(iterations, int)
        assert isinstance(loss, float)
        assert 1 <= iteration <= iterations
    assert [call[0] for call in calls] == sorted(call[0] for call in calls)

    def stop(iteration: int, iterations: int, loss: float) -> None:
        calls.append((iteration, iterations, loss))
        raise Enough

    calls.clear()
    with pytest.raises(Enough):
        attack_case(name, case, progress=stop)
    assert len(calls) == 1


def test_cheap_settings_are_really_set():
    """Otherwise the cases above would run with the papers' thousands of iterations, or none."""
    assert cheap("dlg").iterations == 2
    assert cheap("dlg").restarts == 2
    assert attack_cases.cheap("dlg", most=7, iterations=11, unheard_of=1).iterations == 11

"""GIDM and its baselines: phases, the schedule of the triple optimisation, where ε and t come from."""

import math
from itertools import pairwise

import pytest
import torch
from attack_cases import UNET
from conftest import update_from
from torch import Tensor

from attacks.gidm import GIDM, Generative, Phases, as_private
from attacks.gidm_baselines import DLGdm, InvGdm
from attacks.matching import DISTANCES, Problem, pose, squared_l2
from attacks.timestep_sources import settle_timesteps
from fedattack.errors import FedattackError, NotApplicable
from fedattack.jobs import attack_update
from fedattack.metrics import psnr_db
from fedattack.models import build_model
from fedattack.seeding import derive_generator
from fedattack.tasks import Classification, Diffusion
from fedattack.types import Knowledge, Update

SHAPE = (1, 8, 8)
TASK = Diffusion(num_train_timesteps=20)
QUICK = {"sampling_steps": 2, "learning_rate": 0.05}


def unet(seed: int = 1) -> torch.nn.Module:
    return build_model("unet", image_shape=SHAPE, num_classes=None, seed=seed, **UNET).double()


def case(
    batch: int = 1, known: tuple[str, ...] = (), seed: int = 0
) -> tuple[torch.nn.Module, Update, Knowledge, Tensor]:
    """A model, the update of smooth images, what is known of it, and the images."""
    small = torch.rand((batch, 1, 3, 3), generator=derive_generator(seed, "images"), dtype=torch.float64)
    images = torch.nn.functional.interpolate(small, 8, mode="bilinear", align_corners=True)
    model = unet()
    update = update_from(model, images, torch.zeros(batch), task=TASK, seed=seed)
    drawn = TASK.draw(images, torch.zeros(batch), generator=derive_generator(seed, "client"))
    oracles = {name: drawn[name] for name in known}
    return model, update, Knowledge(image_shape=SHAPE, batch_size=batch, **oracles), images


def run(attack, batch: int = 1, known: tuple[str, ...] = (), seed: int = 0, **kwargs):
    model, update, knowledge, images = case(batch, known, seed)
    found = attack.reconstruct(update, model, TASK, knowledge, generator=derive_generator(seed, "attack"), **kwargs)
    return found, images


def phases_of(attack: GIDM, known: tuple[str, ...] = ()) -> tuple[Phases, Problem]:
    model, update, knowledge, _ = case(known=known)
    problem = pose(update, model, TASK, knowledge)
    return Phases(problem, squared_l2, attack, lambda *_: None), problem


# ------------------------------------------------------------------------------------------------ what moves when
def test_the_noise_moves_in_every_second_interval_only():
    """S iterations of {x, t}, S of {x, t, ε}, …: the values themselves, after every number of iterations."""
    attack = GIDM(interval=3, timesteps="relaxed")
    phases, problem = phases_of(attack)
    start = problem.start(1, derive_generator(0, "start"))
    x = start.pop("images")
    assert [phases.moving(i, {"noise", "timesteps"}) for i in (0, 2, 6, 8)] == [["timesteps"]] * 4
    assert [phases.moving(i, {"noise", "timesteps"}) for i in (3, 5, 9, 11)] == [["timesteps", "noise"]] * 4
    seen: list[dict[str, Tensor]] = []
    original = phases._losses

    def watch(images: Tensor, others: dict[str, Tensor]) -> Tensor:
        seen.append({"x": images.detach().clone(), **{n: v.detach().clone() for n, v in others.items()}})
        return original(images, others)

    phases._losses = watch
    phases.search(x, start, None, 12, False)
    assert len(seen) == 13
    for iteration, (before, after) in enumerate(pairwise(seen)):
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert moved == ({"x", "timesteps", "noise"} if iteration // 3 % 2 else {"x", "timesteps"}), iteration


def test_what_is_not_to_be_optimised_stays_as_drawn():
    for settings in ({"noise_optimised": False}, {}):
        attack = GIDM(interval=1, timesteps="argmax", **settings)
        phases, problem = phases_of(attack)
        start = problem.start(1, derive_generator(0, "start"))
        x, drawn = start.pop("images"), start["noise"].clone()
        _, ends, _ = phases.search(x, start, None, 4, False)
        assert torch.equal(ends["noise"], drawn) == bool(settings)


def test_first_steps_of_adam_are_the_learning_rates():
    """Adam's first step is its rate in every coordinate: 0.01 in pixels, 1 in timesteps; the noise waits for its interval."""
    attack = GIDM(timesteps="relaxed", interval=1, noise_learning_rate=0.03)
    phases, problem = phases_of(attack)
    start = problem.start(1, derive_generator(0, "start")) | {"timesteps": torch.tensor([[9.5]], dtype=torch.float64)}
    x = start.pop("images")
    positions = []
    original = phases._losses
    phases._losses = lambda images, others: (
        positions.append((images.detach().clone(), {n: v.detach().clone() for n, v in others.items()}))
        or original(images, others)
    )
    phases.search(x, start, None, 2, False)
    (x0, o0), (x1, o1), (_, o2) = positions
    assert torch.allclose((x1 - x0).abs(), torch.full_like(x0, 0.01), rtol=1e-3)
    assert float((o1["timesteps"] - o0["timesteps"]).abs()) == pytest.approx(1.0, rel=1e-3)
    assert torch.equal(o1["noise"], o0["noise"])
    assert torch.allclose((o2["noise"] - o1["noise"]).abs(), torch.full_like(x0, 0.03), rtol=1e-3)


def test_argmax_passes_no_gradient_to_the_timestep():
    """The paper's search for t: the vector never moves, so t stays the argmax of where it was drawn."""
    phases, problem = phases_of(GIDM(timesteps="argmax", interval=1))
    start = problem.start(2, derive_generator(0, "start"))
    x = start.pop("images")
    vector = torch.rand((2, 1, 20), generator=derive_generator(0, "vector"), dtype=torch.float64)
    _, ends, _ = phases.search(x, start | {"timesteps": vector}, None, 3, False)
    assert torch.equal(ends["timesteps"], vector)
    assert torch.equal(as_private("timesteps", vector), vector.argmax(-1))
    few, _ = run(GIDM(timesteps="argmax", generative_iterations=0, fine_tuning_iterations=2))
    many, _ = run(GIDM(timesteps="argmax", generative_iterations=2, fine_tuning_iterations=7, **QUICK))
    assert torch.equal(few.timesteps, many.timesteps)
    drawn = [
        int(run(GIDM(timesteps="argmax", generative_iterations=0, fine_tuning_iterations=1), seed=s)[0].timesteps)
        for s in range(8)
    ]
    assert len(set(drawn)) > 2
    assert all(0 <= t < 20 for t in drawn)


# ------------------------------------------------------------------------------------------------ the phases
def test_the_gradient_of_the_generative_phase_is_that_of_finite_differences():
    """∂ loss / ∂ latent, put together from the inner gradient on the images and the sampler's way back."""
    from attacks.gidm import _prior, sampler_of

    model, update, knowledge, _ = case(known=("noise", "timesteps"))
    problem = pose(update, model, TASK, knowledge)
    attack = GIDM(sampling_steps=3)
    phases = Phases(problem, DISTANCES["l2"], attack, lambda *_: None)
    generator = derive_generator(0, "latent")
    x = torch.randn((1, 1, *SHAPE), generator=generator, dtype=torch.float64)
    direction = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    decode = sampler_of(attack, _prior(update, model, TASK, knowledge, x), x, generator)
    slopes: list[Tensor] = []

    class Recorder(torch.optim.Adam):
        def step(self, *_, **__):
            slopes.append(self.param_groups[0]["params"][0].grad.clone())

    original, torch.optim.Adam = torch.optim.Adam, Recorder
    try:
        _, _, losses = phases.search(x, {}, decode, 1, False)
    finally:
        torch.optim.Adam = original

    def value(at: Tensor) -> float:
        with torch.no_grad():
            return float(phases._losses(decode(at), {}))

    h = 1e-5
    rise = (value(x + h * direction) - value(x - h * direction)) / (2 * h)
    assert float(losses[0]) == pytest.approx(value(x), rel=1e-12)
    assert float((slopes[0] * direction).sum()) == pytest.approx(rise, rel=1e-6)


def test_memory_changes_no_result():
    attack = {"generative_iterations": 4, "fine_tuning_iterations": 1, "sampling_steps": 4}
    frugal, _ = run(GIDM(**attack, memory_mib=0.0), known=("noise", "timesteps"))
    lavish, _ = run(GIDM(**attack, memory_mib=4096.0), known=("noise", "timesteps"))
    assert torch.allclose(frugal.images, lavish.images, rtol=0, atol=1e-7)
    assert frugal.losses == pytest.approx(lavish.losses, rel=1e-9)


def test_everything_known_both_phases_lower_the_loss_and_find_the_image():
    attack = GIDM(generative_iterations=30, fine_tuning_iterations=100, **QUICK)
    found, images = run(attack, known=("noise", "timesteps"))
    generative, fine = found.diagnostics["generative_loss"], found.diagnostics["fine_tuning_loss"]
    assert generative < found.losses[0]
    assert fine < 1e-2 * generative
    assert found.diagnostics["loss"] == fine == found.losses[-1] == min(found.losses)
    assert len(found.losses) == 31 + 101
    assert found.steps == 130
    assert float(psnr_db(found.images, images.float())) > 30.0


def test_generative_is_the_first_phase():
    alone, _ = run(Generative(generative_iterations=5, **QUICK), known=("noise", "timesteps"))
    both, _ = run(GIDM(generative_iterations=5, fine_tuning_iterations=1, **QUICK), known=("noise", "timesteps"))
    assert alone.losses == both.losses[: len(alone.losses)]
    assert alone.diagnostics["generative_loss"] == both.diagnostics["generative_loss"]
    assert "fine_tuning_loss" not in alone.diagnostics
    assert Generative().generative_iterations == GIDM().generative_iterations == 5000
    assert GIDM().fine_tuning_iterations == 1500


def test_each_restart_is_searched_on_its_own_and_the_best_is_kept():
    attack = GIDM(generative_iterations=0, fine_tuning_iterations=4, restarts=3, boxed=True)
    found, _ = run(attack, known=("noise", "timesteps"))
    assert found.diagnostics["restarts"] == 3.0
    assert found.diagnostics["loss"] < found.diagnostics["worst_restart_loss"]
    model, update, knowledge, _ = case(known=("noise", "timesteps"))
    problem = pose(update, model, TASK, knowledge)
    cost = float(squared_l2(problem.simulated({"images": found.images.double()}), problem.observed))
    assert found.diagnostics["loss"] * found.diagnostics["silence"] == pytest.approx(cost, rel=1e-5)


def test_a_box_keeps_pixels_in_it():
    attack = GIDM(generative_iterations=0, fine_tuning_iterations=10, learning_rate=0.5, boxed=True)
    phases, problem = phases_of(attack, known=("noise", "timesteps"))
    x = problem.start(1, derive_generator(0))["images"]
    end, _, _ = phases.search(x, {}, None, 10, True)
    assert float(end.min()) >= 0.0
    assert float(end.max()) <= 1.0
    free, _, _ = phases.search(x, {}, None, 10, False)
    assert float(free.max()) > 1.0 or float(free.min()) < 0.0


def test_progress_counts_both_phases():
    told: list[tuple[int, int]] = []
    attack = GIDM(generative_iterations=2, fine_tuning_iterations=3, **QUICK)
    run(attack, known=("noise",), progress=lambda i, n, loss: told.append((i, n)))
    assert told == [(i, 5) for i in range(1, 6)]


# ------------------------------------------------------------------------------------------------ what is known
@pytest.mark.parametrize(
    "attack", [GIDM(generative_iterations=2, fine_tuning_iterations=2, **QUICK), DLGdm(iterations=3)]
)
def test_only_what_is_known_is_used(attack):
    """A known ε or t is the result's; a hidden one is not the truth (ε), or is read off the update (t)."""
    everything = case(known=("noise", "timesteps"))[2]
    for known in ((), ("noise",), ("timesteps",), ("noise", "timesteps")):
        found, _ = run(attack, known=known)
        assert torch.equal(found.noise, everything.noise) == ("noise" in known)
        assert torch.equal(found.timesteps, everything.timesteps)
        assert found.diagnostics.get("timesteps_given", 0.0) == float("timesteps" in known)
        assert found.diagnostics.get("timesteps_leaked", 0.0) == float("timesteps" not in known)


def test_hidden_noise_starts_from_the_generator_alone():
    """Two clients that differ in ε only: an attack that knew ε would start from another ε."""
    attack = DLGdm(iterations=1, learning_rate=1e-12)
    found = [run(attack, seed=seed)[0].noise for seed in (0, 0)]
    assert torch.equal(*found)
    model, update, knowledge, _ = case(seed=1)
    other = attack.reconstruct(update, model, TASK, knowledge, generator=derive_generator(0, "attack"))
    assert torch.allclose(other.noise, found[0], atol=1e-9)


def test_the_leak_falls_back_where_order_matters():
    relaxed, _ = run(GIDM(generative_iterations=0, fine_tuning_iterations=2), batch=2, known=("noise",))
    assert relaxed.diagnostics["timesteps_leak_refused"] == relaxed.diagnostics["timesteps_relaxed"] == 1.0
    leaked, _ = run(GIDM(generative_iterations=0, fine_tuning_iterations=2), batch=2)
    assert leaked.diagnostics["timesteps_leaked"] == leaked.diagnostics["timesteps_exact"] == 1.0
    assert leaked.timesteps.tolist() == sorted(case(2, known=("timesteps",))[2].timesteps.tolist())


def test_settling_leaves_other_tasks_and_known_timesteps_alone():
    model, update, knowledge, _ = case(known=("timesteps",))
    assert settle_timesteps(update, model, Classification(), knowledge, "leak") == (knowledge, {})
    assert settle_timesteps(update, model, TASK, knowledge, "leak")[0] is knowledge
    hidden = case()[2]
    assert settle_timesteps(update, model, TASK, hidden, "relaxed") == (hidden, {"timesteps_relaxed": 1.0})


def test_the_prior_is_the_known_one_else_the_sent_weights(tmp_path):
    from diffusers import DDPMPipeline, DDPMScheduler

    attack = Generative(generative_iterations=2, **QUICK)
    model, update, knowledge, _ = case(known=("noise", "timesteps"))
    other = unet(seed=9).float()
    DDPMPipeline(unet=other.unet, scheduler=DDPMScheduler(num_train_timesteps=20)).save_pretrained(tmp_path / "p")
    results = []
    for prior in (None, str(tmp_path / "p")):
        told = Knowledge(
            image_shape=SHAPE, batch_size=1, noise=knowledge.noise, timesteps=knowledge.timesteps, prior=prior
        )
        found = attack.reconstruct(update, model, TASK, told, generator=derive_generator(0, "attack"))
        assert found.diagnostics["prior_is_sent"] == float(prior is None)
        results.append(found)
    assert not torch.allclose(results[0].images, results[1].images, atol=1e-3)
    wrong = build_model("unet", image_shape=(3, 8, 8), num_classes=None, seed=0, **UNET)
    DDPMPipeline(unet=wrong.unet, scheduler=DDPMScheduler()).save_pretrained(tmp_path / "wrong")
    told = Knowledge(image_shape=SHAPE, batch_size=1, prior=str(tmp_path / "wrong"))
    with pytest.raises(FedattackError, match=r"of shape \(1, 8, 8\), got \(3, 8, 8\)"):
        attack.reconstruct(update, model, TASK, told, generator=derive_generator(0))


# ------------------------------------------------------------------------------------------------ baselines and options
def test_baselines_find_the_image_when_noise_and_timestep_are_known():
    for attack in (DLGdm(iterations=120, learning_rate=0.05), InvGdm(iterations=120, learning_rate=0.05)):
        found, images = run(attack, known=("noise", "timesteps"))
        assert float(psnr_db(found.images, images.float())) > 25.0, attack.name
        assert found.losses[-1] < 1e-2 * found.losses[0]
        assert found.diagnostics["relative_loss"] * found.diagnostics["silence"] == pytest.approx(found.losses[-1])
    assert found.diagnostics["silence"] == 1.0  # of the cosine
    assert (DLGdm().distance, InvGdm().distance) == ("l2", "cosine")


def test_controls_are_the_prior_alone_another_update_and_the_papers_baseline():
    attack = GIDM(generative_iterations=3, fine_tuning_iterations=2, sampling_steps=2, restarts=2, interval=1)
    controls = attack.controls()
    assert [(control.kind, control.attack, control.parameters) for control in controls] == [
        ("prior-alone", "", {"sampling_steps": 2, "guidance": "none"}),
        ("unrelated-update", "", None),
        ("peer", "invg-dm", {"iterations": 5, "restarts": 2}),
    ]
    assert GIDM(**controls[0].parameters).controls() == ()
    assert GIDM(generative_iterations=0).controls() == ()  # no prior in it
    faster = GIDM(learning_rate=0.03, timesteps="argmax", precision="float64").controls()[2].parameters
    assert faster == {"iterations": 6500, "learning_rate": 0.03, "timesteps": "relaxed", "precision": "float64"}
    for parameters in (controls[2].parameters, faster):
        InvGdm(**parameters)


@pytest.mark.parametrize("attack", [GIDM, Generative])
def test_without_guidance_it_is_the_sampler_whatever_the_update(attack):
    alone = attack(guidance="none", **QUICK)
    found, _ = run(alone)
    model, _, knowledge, _ = case()
    other = case(seed=1)[1]
    led_by_other = alone.reconstruct(other, model, TASK, knowledge, generator=derive_generator(0, "attack"))
    assert torch.equal(found.images, led_by_other.images)
    assert found.steps == 0
    matched, _ = run(
        attack(generative_iterations=2, **({"fine_tuning_iterations": 0} if attack is GIDM else {}), **QUICK)
    )
    assert not torch.allclose(found.images, matched.images, atol=1e-3)


@pytest.mark.parametrize("name", ["gidm", "generative", "dlg-dm", "invg-dm"])
def test_classifiers_are_refused(name):
    from fedattack.registry import ATTACKS

    context = {
        "model": {"name": "mlp", "options": {}},
        "image_shape": [1, 8, 8],
        "num_classes": 2,
        "task": {"name": "classification"},
    }
    _, update, knowledge, _ = case()
    with pytest.raises(NotApplicable, match="diffusion"):
        attack_update(ATTACKS.create(name), update, context, knowledge, generator=derive_generator(0))


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"timesteps": "argmin"}, "did you mean 'argmax'"),
        ({"generative_iterations": 0, "fine_tuning_iterations": 0}, "iterations must be"),
        ({"generative_iterations": -1}, "generative_iterations must be at least 0"),
        ({"interval": 0}, "interval must be at least 1"),
        ({"sampling_steps": 0}, "sampling_steps must be at least 1"),
        ({"eta": -0.1}, "eta must be at least 0"),
        ({"distance": "l3"}, "did you mean"),
        ({"guidance": "prior"}, "guidance must be one of"),
    ],
)
def test_options_that_cannot_be_are_refused(settings, complaint):
    with pytest.raises(FedattackError, match=complaint):
        GIDM(**settings)
    with pytest.raises(FedattackError, match="timesteps must be one of leak, relaxed"):
        DLGdm(timesteps="argmax")


def test_a_search_that_diverges_keeps_its_best_iterate():
    attack = GIDM(generative_iterations=0, fine_tuning_iterations=20, learning_rate=1e3)
    found, _ = run(attack, known=("noise", "timesteps"))
    assert math.isfinite(found.diagnostics["loss"])
    assert found.diagnostics["loss"] == min(found.losses)

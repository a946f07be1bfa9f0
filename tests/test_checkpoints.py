"""Checkpoints load in plain diffusers as the same function, averages follow their formula, samples follow the data's law."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from fedattack.checkpoints import (
    MovingAverage,
    best_weights,
    digest_of,
    draw_samples,
    image_grid,
    load_weights,
    save_checkpoint,
    weights_problems,
)
from fedattack.errors import FedattackError
from fedattack.models import build_model
from fedattack.store import write_tensors
from fedattack.tasks import BETA_SCHEDULES, Classification, Diffusion

TINY = {"block_out_channels": (4, 8), "norm_num_groups": 2, "attention_head_dim": 2}
SHAPE = (3, 8, 8)


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny(seed=0, **options):
    return build_model("unet", image_shape=SHAPE, num_classes=None, seed=seed, **{**TINY, **options})


def state_of(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    """A checkpoint of `tiny(seed=3)` with the default schedule."""
    model = tiny(seed=3)
    folder = tmp_path_factory.mktemp("saved") / "round-007"
    return save_checkpoint(folder, model, Diffusion(), state_of(model))


# ------------------------------------------------------------------------------------------------ saving
@pytest.mark.parametrize("precision", [torch.float32, torch.float64])
def test_plain_diffusers_loads_the_same_function(precision, tmp_path) -> None:
    model = tiny(seed=1).to(precision).eval()
    task = Diffusion(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", num_train_timesteps=200)
    average = {name: tensor * 0.5 for name, tensor in state_of(model).items()}
    folder = save_checkpoint(tmp_path / "round-001", model, task, state_of(model), average=average)
    images = torch.randn(5, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=precision)
    timesteps = torch.tensor([0, 1, 50, 133, 199])
    for path, factor in ((folder, 1.0), (folder / "ema", 0.5)):
        loaded = DDPMPipeline.from_pretrained(path)
        assert isinstance(loaded.unet, UNet2DModel)
        assert type(loaded.unet.time_proj).__module__.startswith("diffusers.")
        scaled = {name: tensor * factor for name, tensor in state_of(model).items()}
        with torch.no_grad():
            mine = torch.func.functional_call(model, scaled, (images, timesteps))
            theirs = loaded.unet(images.float(), timesteps).sample
        torch.testing.assert_close(theirs, mine.float(), rtol=1e-4, atol=1e-4)
        assert (mine.abs() > 0.01).any()
        scheduler = loaded.scheduler
        assert isinstance(scheduler, DDPMScheduler)
        assert scheduler.config.prediction_type == "v_prediction"
        torch.testing.assert_close(scheduler.alphas_cumprod.double(), task.alphas_cumprod, rtol=1e-4, atol=1e-6)
    drawn = DDPMPipeline.from_pretrained(folder)(batch_size=1, num_inference_steps=2, output_type="pt").images
    assert drawn.shape == (1, *SHAPE)
    assert best_weights(folder) == folder / "ema"


def test_a_checkpoint_is_private_replaces_the_old_one_and_leaves_nothing_beside(tmp_path) -> None:
    model, target = tiny(), tmp_path / "checkpoints" / "round-001"
    save_checkpoint(target, model, Diffusion(), state_of(model), average=state_of(model), samples=torch.rand(3, *SHAPE))
    save_checkpoint(target, model, Diffusion(), state_of(model), about={"round": 1})
    assert [path.name for path in target.parent.iterdir()] == ["round-001"]
    assert not (target / "ema").exists()
    assert best_weights(target) == target
    modes = {path.stat().st_mode & 0o077 for path in (tmp_path / "checkpoints").rglob("*")}
    assert modes == {0}
    names = {path.name for path in target.rglob("*") if path.is_file()}
    assert {"model_index.json", "config.json", "diffusion_pytorch_model.safetensors", "about.json"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl"))]


def test_saving_and_sampling_leave_the_global_generator_and_the_model_alone(tmp_path) -> None:
    model = tiny(dropout=0.5).train()
    before, weights = torch.random.get_rng_state(), state_of(model)
    save_checkpoint(tmp_path / "c", model, Diffusion(), weights)
    draw_samples(model, weights, Diffusion(), SHAPE, 2, steps=2, seed=0)
    load_weights(tmp_path / "c", model, Diffusion())
    assert torch.equal(torch.random.get_rng_state(), before)
    assert model.training
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_a_classifier_is_one_safetensors_file(tmp_path) -> None:
    model = build_model("lenet", image_shape=(3, 32, 32), num_classes=4, seed=1)
    folder = save_checkpoint(tmp_path / "c", model, Classification(), state_of(model), average=state_of(model))
    other = build_model("lenet", image_shape=(3, 32, 32), num_classes=4, seed=2)
    for path in (folder, folder / "model.safetensors", folder / "ema"):
        found = load_weights(path, other, Classification())
        assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())


def test_a_grid_holds_every_pixel_unchanged() -> None:
    images = torch.rand(5, 3, 4, 7, generator=torch.Generator().manual_seed(0))
    grid = image_grid(images, gap=2)
    assert grid.shape == (3, 2 * 4 + 2, 3 * 7 + 2 * 2)
    assert torch.equal(grid[:, 6:10, 9:16], images[4])
    assert torch.equal(grid[:, :4, 18:25], images[2])
    assert (grid[:, 4:6] == 1).all()
    assert image_grid(images[:1]).shape == (3, 4, 7)


# ------------------------------------------------------------------------------------------------ samples
class Gaussian(torch.nn.Module):
    """The exact ε (or v) of pixels that are N(μ, s²): what a U-Net would learn from endless data."""

    def __init__(self, task: Diffusion, mean: float, std: float) -> None:
        super().__init__()
        self.task, self.mean, self.std = task, mean, std
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def forward(self, noisy, timesteps):
        alpha = self.task.alphas_cumprod[timesteps].float().reshape(-1, 1, 1, 1)
        spread = 1 - alpha
        noise = spread.sqrt() * (noisy - alpha.sqrt() * self.mean) / (alpha * self.std**2 + spread)
        if self.task.prediction_type == "epsilon":
            return noise
        clean = (noisy - spread.sqrt() * noise) / alpha.sqrt()
        return alpha.sqrt() * noise - spread.sqrt() * clean


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    "schedule", [name for name in BETA_SCHEDULES if name != "laplace"]
)  # has no small steps at the end
def test_samples_follow_the_law_of_the_data(schedule: str, prediction_type: str) -> None:
    """Closed form: DDIM carries N(0, 1) to N(μ − μ·s·√ᾱ_T/σ_T, (s/σ_T)²), σ_T² = ᾱ_T·s² + 1 − ᾱ_T."""
    task = Diffusion(beta_schedule=schedule, prediction_type=prediction_type)
    mean, std, alpha = 0.3, 0.15, float(task.alphas_cumprod[-1])
    model, last = Gaussian(task, mean, std), (alpha * std**2 + 1 - alpha) ** 0.5
    images = draw_samples(model, state_of(model), task, (3, 16, 16), 8, steps=500, seed=1)
    assert images.shape == (8, 3, 16, 16)
    assert float(images.mean()) == pytest.approx((mean - mean * std * alpha**0.5 / last + 1) / 2, abs=0.004)
    assert float(images.std()) == pytest.approx(std / last / 2, rel=0.05)


def test_no_number_of_steps_asks_for_a_timestep_that_is_none() -> None:
    seen: list[int] = []
    model = Gaussian(Diffusion(num_train_timesteps=50), 0.3, 0.15)
    model.register_forward_pre_hook(lambda _, given: seen.append(int(given[1][0])))
    for steps in (28, 29, 31, 50):
        seen.clear()
        draw_samples(model, state_of(model), model.task, (1, 2, 2), 1, steps=steps, seed=0)
        assert len(seen) == steps
        assert min(seen) >= 0


def test_a_diverged_model_still_leaves_its_checkpoint(tmp_path) -> None:
    model = tiny()
    samples = torch.full((1, *SHAPE), float("nan"))
    about = {"samples": {"std": float(samples.std())}}
    folder = save_checkpoint(tmp_path / "c", model, Diffusion(), state_of(model), samples=samples, about=about)
    assert json.loads((folder / "about.json").read_text()) == {"samples": {"std": None}}


def test_samples_are_a_function_of_seed_and_weights() -> None:
    model, task = tiny(), Diffusion()
    told: list[tuple[int, int]] = []
    first, again, other = (
        draw_samples(
            model, state_of(model), task, SHAPE, 2, steps=3, seed=seed, progress=lambda i, n, _: told.append((i, n))
        )
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert told[:3] == [(1, 3), (2, 3), (3, 3)]
    assert first.min() >= 0
    assert first.max() <= 1


# ------------------------------------------------------------------------------------------------ moving average
def test_the_average_follows_its_formula_and_goes_on_where_it_was() -> None:
    model = build_model("resnet18", image_shape=(3, 8, 8), num_classes=2, seed=0, width=2, norm="batch")
    names = [name for name, _ in model.named_parameters()]
    rounds = []
    for number in range(25):
        generator = torch.Generator().manual_seed(number)
        floats = {name: t for name, t in model.state_dict().items() if t.is_floating_point()}
        rounds.append({name: torch.randn(t.shape, generator=generator) for name, t in floats.items()})
    buffers = rounds[0].keys() - set(names)
    assert buffers
    average, halfway, expected = MovingAverage(model, 0.6), None, None
    for number, state in enumerate(rounds, start=1):
        average.step(state)
        decay = 0.0 if number == 1 else min(0.6, number / (9 + number))
        if expected is None:
            expected = {name: state[name].clone() for name in names}
        expected = {name: decay * expected[name] + (1 - decay) * state[name] for name in names}
        for name in names:
            torch.testing.assert_close(average.state[name], expected[name])
        assert average.about["last_decay"] == pytest.approx(decay)
        assert all(torch.equal(average.state[name], state[name]) for name in buffers)
        if number == 12:
            halfway = ({name: tensor.clone() for name, tensor in average.state.items()}, average.about["steps"])
    resumed = MovingAverage(
        build_model("resnet18", image_shape=(3, 8, 8), num_classes=2, seed=9, width=2, norm="batch"), 0.6
    )
    resumed.restore(*halfway)
    for state in rounds[12:]:
        resumed.step(state)
    assert all(torch.equal(resumed.state[name], tensor) for name, tensor in average.state.items())
    assert resumed.about == average.about


# ------------------------------------------------------------------------------------------------ loading
def test_every_form_of_weights_gives_the_same_tensors(pipeline, tmp_path) -> None:
    write_tensors(tmp_path / "mine.safetensors", state_of(tiny(seed=3)), {"type": "model"})
    wanted = state_of(tiny(seed=3))
    for path in (pipeline, pipeline / "unet", tmp_path / "mine.safetensors"):
        assert weights_problems(path, Diffusion()) == []
        found = load_weights(path, tiny(seed=0), Diffusion())
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    double = load_weights(pipeline, tiny(seed=0).double(), Diffusion())
    assert {tensor.dtype for tensor in double.values()} == {torch.float64}


def test_tensors_that_do_not_fit_are_named_with_both_shapes(pipeline) -> None:
    with pytest.raises(
        FedattackError, match=r"'unet.conv_in.weight' must be of shape \(8, 3, 3, 3\), got \(4, 3, 3, 3\)"
    ):
        load_weights(pipeline, tiny(block_out_channels=(8, 8)), Diffusion())
    with pytest.raises(FedattackError, match=r"tensor 'unet\.mid_block\S+' of shape \S+ is none of the model's"):
        load_weights(pipeline, tiny(mid_attention=False), Diffusion())
    with pytest.raises(FedattackError, match=r"tensor 'unet\.\S+' of shape \(\d.*\) is missing"):
        load_weights(pipeline, tiny(layers_per_block=2), Diffusion())


def test_the_same_tensors_of_another_function_are_refused(pipeline) -> None:
    """Heads and groups have no tensors: only the configuration tells."""
    with pytest.raises(FedattackError, match="attention_head_dim must be 4, got 2"):
        load_weights(pipeline, tiny(attention_head_dim=4), Diffusion())
    with pytest.raises(FedattackError, match="norm_num_groups must be 4, got 2"):
        load_weights(pipeline, tiny(norm_num_groups=4), Diffusion())


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"num_train_timesteps": 500}, "num_train_timesteps = 500"),
        ({"beta_schedule": "squaredcos_cap_v2"}, "beta_schedule = 'squaredcos_cap_v2'"),
        ({"beta_end": 0.03}, "beta_end = 0.03"),
        ({"prediction_type": "v_prediction"}, "prediction_type = 'v_prediction'"),
    ],
)
def test_a_schedule_that_contradicts_the_weights_is_refused_with_both(pipeline, options, named) -> None:
    task = Diffusion(**options)
    for path in (pipeline, pipeline / "unet"):
        (problem,) = weights_problems(path, task)
        ours, theirs = problem.split("got")
        assert named in ours
        assert named not in theirs
        assert "num_train_timesteps = 1000, beta_schedule = 'linear', beta_start = 0.0001, beta_end = 0.02" in theirs
        with pytest.raises(FedattackError, match="must be that of the task"):
            load_weights(path, tiny(), task)


def test_a_schedule_rescaled_to_no_signal_is_another(tmp_path) -> None:
    model = tiny()
    folder = save_checkpoint(tmp_path / "c", model, Diffusion(), state_of(model))
    DDPMScheduler(rescale_betas_zero_snr=True).save_pretrained(folder / "scheduler")
    (problem,) = weights_problems(folder, Diffusion())
    assert problem.endswith("rescale_betas_zero_snr = True)")


def test_other_things_are_no_weights(pipeline, tmp_path) -> None:
    assert "that exists" in weights_problems(tmp_path / "none", Diffusion())[0]
    (tmp_path / "model.pt").write_bytes(b"cos\nsystem\n")
    assert "safetensors file" in weights_problems(tmp_path / "model.pt", Diffusion())[0]
    (tmp_path / "model.safetensors").write_bytes(b"garbage")
    with pytest.raises(FedattackError, match="must be a safetensors file"):
        load_weights(tmp_path / "model.safetensors", tiny(), Diffusion())
    assert "'diffusion'" in weights_problems(pipeline, Classification())[0]
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text((pipeline / "unet" / "config.json").read_text())
    torch.save(tiny(seed=3).unet.state_dict(), pickled / "diffusion_pytorch_model.bin")
    with pytest.raises(FedattackError, match="must be a U-Net that diffusers can load"):
        load_weights(pickled, tiny(), Diffusion())


def test_a_digest_changes_with_the_weights_only(pipeline, tmp_path) -> None:
    first, second = tmp_path / "a.safetensors", tmp_path / "b" / "a.safetensors"
    write_tensors(first, {"w": torch.ones(2)}, {})
    write_tensors(second, {"w": torch.ones(2)}, {})
    assert digest_of(first) == digest_of(second) != digest_of(pipeline)
    write_tensors(second, {"w": torch.zeros(2)}, {})
    assert digest_of(first) != digest_of(second)
    assert len(digest_of(first)) == len(hashlib.sha256().hexdigest())
    assert digest_of(tmp_path / "none") == ""

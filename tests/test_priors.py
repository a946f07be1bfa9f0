"""Priors: the sampler against diffusers step by step, its gradient, and where priors come from."""

import json
import shutil

import pytest
import torch
from conftest import update_from
from safetensors.torch import load_file

from fedattack import planning, priors
from fedattack.checkpoints import digest_of
from fedattack.errors import FedattackError, MissingDependency
from fedattack.models import build_model
from fedattack.priors import (
    Prior,
    ddim_step,
    draw_noises,
    folder_of,
    load_prior,
    prior_of,
    sample,
    sampling_timesteps,
    step_bytes,
    unet_in,
)
from fedattack.seeding import derive_generator
from fedattack.tasks import Classification, Diffusion

OPTIONS = {"block_out_channels": (8, 16), "norm_num_groups": 4, "attention_head_dim": 4}
SHAPE = (3, 8, 8)


def unet(seed: int = 0, dtype: torch.dtype = torch.float64):
    return build_model("unet", image_shape=SHAPE, num_classes=None, seed=seed, **OPTIONS).to(dtype)


def toy(task: Diffusion | None = None, **settings) -> Prior:
    """A prior of random weights."""
    model = unet(**settings)
    return Prior(model.eval().requires_grad_(False), task or Diffusion(), SHAPE, "toy")


def latent(batch: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randn((batch, *SHAPE), generator=derive_generator(seed, "latent"), dtype=torch.float64)


def scheduler_of(kind: str, task: Diffusion, **settings):
    import diffusers

    made = getattr(diffusers, kind)(
        num_train_timesteps=task.num_train_timesteps,
        beta_start=task.beta_start,
        beta_end=task.beta_end,
        beta_schedule=task.beta_schedule,
        prediction_type=task.prediction_type,
        **settings,
    )
    made.alphas_cumprod = task.alphas_cumprod  # the scheduler's own table is float32
    return made


# ------------------------------------------------------------------------------------------------ the sampler
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("steps", [1, 4, 10, 1000])
def test_timesteps_are_those_of_diffusers(spacing, steps):
    scheduler = scheduler_of("DDIMScheduler", Diffusion(), timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    assert sampling_timesteps(Diffusion(), steps, spacing) == scheduler.timesteps.tolist()


@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("eta", [0.0, 0.6])
@pytest.mark.parametrize("clip", [False, True])
def test_every_step_is_that_of_diffusers(predicts, schedule, eta, clip):
    prior = toy(Diffusion(prediction_type=predicts, beta_schedule=schedule))
    scheduler = scheduler_of("DDIMScheduler", prior.task, timestep_spacing="trailing", clip_sample=clip)
    scheduler.set_timesteps(5)
    noises = draw_noises(prior.task, latent(), derive_generator(0, "noise"), steps=5, eta=eta)
    x = y = latent()
    times = sampling_timesteps(prior.task, 5)
    for now, then, noise in zip(times, [*times[1:], -1], noises, strict=True):
        x = ddim_step(prior, x, now, then, eta, noise, clip)
        output = prior.predict(y, torch.full((2,), now))
        last = torch.zeros_like(y)
        y = scheduler.step(output, now, y, eta=eta, variance_noise=last if noise is None else noise).prev_sample
        assert torch.allclose(x, y, rtol=1e-9, atol=1e-9 * float(y.abs().max()))
    whole = sample(prior, latent(), steps=5, eta=eta, noises=noises, clip=clip)
    assert torch.equal(whole, x)


def test_eta_one_with_every_step_is_ddpm():
    """DDPM's posterior variance ("fixed_small"), all T steps, unclipped."""
    prior = toy(Diffusion(num_train_timesteps=12, beta_end=0.3))
    scheduler = scheduler_of("DDPMScheduler", prior.task, clip_sample=False)
    scheduler.betas = 1.0 - prior.task.alphas_cumprod / torch.cat([torch.ones(1), prior.task.alphas_cumprod[:-1]])
    scheduler.alphas = 1.0 - scheduler.betas
    noises = draw_noises(prior.task, latent(), derive_generator(4, "noise"), steps=12, eta=1.0)
    drawn, y = derive_generator(4, "noise"), latent()
    for now in range(11, -1, -1):
        y = scheduler.step(prior.predict(y, torch.full((2,), now)), now, y, generator=drawn).prev_sample
    x = sample(prior, latent(), steps=12, eta=1.0, noises=noises)
    assert torch.allclose(x, y, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(x, sample(prior, latent(), steps=12), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_gradient_of_the_latent_is_that_of_finite_differences(eta):
    prior = toy(Diffusion(num_train_timesteps=50))  # of a milder schedule: 1/√ᾱ is 157 at the end of a thousand
    noises = draw_noises(prior.task, latent(), derive_generator(0, "noise"), steps=4, eta=eta)
    weight, direction = latent(seed=1), latent(seed=2)
    x = latent().requires_grad_()

    def value(at: torch.Tensor) -> torch.Tensor:
        return (weight * sample(prior, at, steps=4, eta=eta, noises=noises).tanh()).sum()

    (slope,) = torch.autograd.grad(value(x), x)
    h = 1e-4
    with torch.no_grad():
        rise = (value(x + h * direction) - value(x - h * direction)) / (2 * h)
    assert float((slope * direction).sum()) == pytest.approx(float(rise), rel=1e-6)


@pytest.mark.parametrize("keep", [0, 2, 4])
def test_running_steps_twice_changes_no_bit_of_the_gradient(keep):
    prior = toy()
    slopes = []
    for kept in (4, keep):
        x = latent().requires_grad_()
        (slope,) = torch.autograd.grad(sample(prior, x, steps=4, keep=kept).square().sum(), x)
        slopes.append(slope)
    assert torch.equal(*slopes)


def test_only_the_input_of_a_step_that_is_run_twice_is_kept():
    """The bytes that the way back holds, counted: all activations with keep, one latent a step without."""
    prior, x = toy(), latent().requires_grad_()

    def held(keep: int) -> int:
        kept: dict[int, int] = {}

        def count(tensor: torch.Tensor) -> torch.Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            images = sample(prior, x, steps=4, keep=keep)
        del images
        return sum(kept.values())

    weights = sum(p.numel() * p.element_size() for p in prior.network.parameters())
    assert held(4) > 3.5 * step_bytes(prior, x)
    assert held(0) < 0.1 * (held(4) - weights)


def test_a_sampler_that_adds_noise_must_be_given_it():
    with pytest.raises(FedattackError, match="noises must be given"):
        sample(toy(), latent(), steps=2, eta=1.0)
    for steps in (0, 1001):
        with pytest.raises(FedattackError, match="between 1 and the 1000"):
            sample(toy(), latent(), steps=steps)
    with pytest.raises(FedattackError, match="did you mean 'trailing'"):
        sampling_timesteps(Diffusion(), 2, "trailin")


# ------------------------------------------------------------------------------------------------ where priors come from
def test_the_attacked_weights_are_a_prior_of_their_own(random_images):
    model = unet(seed=1)
    update = update_from(model, random_images((1, *SHAPE)), torch.zeros(1), task=Diffusion())
    other = unet(seed=2, dtype=torch.float32).train()
    prior = prior_of(update, other, Diffusion(), SHAPE)
    x, t = latent(), torch.tensor([3, 700])
    assert torch.allclose(prior.predict(x, t), model(x, t), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(other(x.float(), t).double(), model(x, t), rtol=0.1, atol=0.1)
    assert other.training
    assert all(p.requires_grad for p in other.parameters())
    with pytest.raises(FedattackError, match="the task of a prior must be diffusion"):
        prior_of(update, other, Classification(), SHAPE)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A DDPMPipeline folder and the network that is in it."""
    from diffusers import DDPMPipeline, DDPMScheduler

    folder = tmp_path_factory.mktemp("prior")
    model = unet(dtype=torch.float32)
    scheduler = DDPMScheduler(num_train_timesteps=50, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    DDPMPipeline(unet=model.unet, scheduler=scheduler).save_pretrained(folder)
    return folder, model


def test_a_pipeline_folder_loads_to_the_same_numbers(saved):
    folder, model = saved
    prior = load_prior(str(folder))
    assert prior.task == Diffusion(
        num_train_timesteps=50, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction"
    )
    assert prior.image_shape == SHAPE
    x, t = latent().float(), torch.tensor([3, 40])
    assert torch.equal(prior.predict(x, t), model(x, t))
    double = prior.to(torch.float64).predict(x.double(), t)
    assert double.dtype == torch.float64
    assert torch.allclose(double, model.double()(x.double(), t), rtol=1e-12, atol=1e-12)
    model.float()


def test_a_loaded_prior_has_second_derivatives(saved):
    prior = load_prior(str(saved[0])).to(torch.float64)
    x = latent(1)[:, :, :2, :2].clone().requires_grad_()
    (slope,) = torch.autograd.grad(prior.predict(x, torch.tensor([3])).square().sum(), x, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.square().sum(), x)
    assert float(curvature.abs().max()) > 0


def test_a_bare_unet_with_its_scheduler_beside_it_loads(saved, tmp_path):
    folder, _ = saved
    shutil.copytree(folder / "unet", tmp_path / "p")
    with pytest.raises(FedattackError, match=r"holds no scheduler_config.json"):
        load_prior(str(tmp_path / "p"))
    shutil.copy(folder / "scheduler" / "scheduler_config.json", tmp_path / "p")
    assert load_prior(str(tmp_path / "p")).task.num_train_timesteps == 50


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"prediction_type": "sample"}, "not supported: prediction_type must be one of"),
        ({"beta_schedule": "none"}, "not supported"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas of prior"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr of prior"),
    ],
)
def test_schedules_that_cannot_be_reproduced_are_refused(saved, tmp_path, change, complaint):
    shutil.copytree(saved[0], tmp_path / "p")
    file = tmp_path / "p" / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(FedattackError, match=complaint):
        load_prior(str(tmp_path / "p"))


def test_what_is_no_prior_is_refused_with_what_would_be_one(saved, tmp_path, monkeypatch):
    import huggingface_hub

    with pytest.raises(MissingDependency, match=r"a diffusers folder with unet/config.json"):
        load_prior(str(tmp_path))
    for spec in ("/no/such/folder", "./prior", "name", "https://example.org/x"):
        with pytest.raises(MissingDependency, match="prior must be a diffusers folder or a name on the hub"):
            load_prior(spec)

    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(MissingDependency, match=r"'owner/model' is no local folder.*no network"):
        load_prior("owner/model")


def flat(saved, folder, pickled: bool) -> None:
    """A pipeline as google/ddpm-celebahq-256 has it: no sub-folders, and weights that may be older than safetensors."""
    folder.mkdir()
    (folder / "model_index.json").write_text((saved[0] / "model_index.json").read_text())
    for file in ("unet/config.json", "unet/diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json"):
        shutil.copy(saved[0] / file, folder)
    if pickled:
        weights = folder / "diffusion_pytorch_model.safetensors"
        torch.save(load_file(weights), weights.with_suffix(".bin"))
        weights.unlink()


@pytest.mark.parametrize("pickled", [False, True], ids=["safetensors", "bin"])
def test_a_pipeline_without_sub_folders_loads(saved, tmp_path, pickled):
    flat(saved, tmp_path / "p", pickled)
    prior = load_prior(str(tmp_path / "p"))
    assert prior.task.num_train_timesteps == 50
    x, t = latent().float(), torch.tensor([3, 40])
    assert torch.equal(prior.predict(x, t), saved[1](x, t))


def test_weights_that_would_run_something_are_refused(saved, tmp_path):
    flat(saved, tmp_path / "p", pickled=True)
    marker = tmp_path / "was-run"

    class Trap:
        def __reduce__(self):
            return marker.mkdir, ()

    torch.save({"conv_in.weight": Trap()}, tmp_path / "p" / "diffusion_pytorch_model.bin")
    with pytest.raises(FedattackError, match="cannot be read as a UNet2DModel"):
        load_prior(str(tmp_path / "p"))
    assert not marker.exists()


@pytest.fixture
def hub(saved, tmp_path, monkeypatch):
    """The hub and its cache as two folders; gives the hub's, and what was asked of the network."""
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    there, cache, asked = tmp_path / "hub", tmp_path / "cache/snapshots/commit", []

    def download(name, filename, *, revision, local_files_only):
        assert (name, revision in (None, "commit")) == ("owner/model", True)
        if not (cache / filename).is_file():
            if local_files_only:
                raise LocalEntryNotFoundError(filename)
            asked.append(filename)
            if not (there / filename).is_file():
                raise EntryNotFoundError(filename)
            (cache / filename).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(there / filename, cache / filename)
        return str(cache / filename)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    priors._fetched.cache_clear()
    yield there, asked
    priors._fetched.cache_clear()


@pytest.mark.parametrize("layout", ["folders", "flat", "flat-bin"])
def test_a_model_of_the_hub_is_fetched_once_and_without_what_it_does_not_need(saved, hub, layout):
    there, asked = hub
    if layout == "folders":
        shutil.copytree(saved[0], there)
    else:
        flat(saved, there, pickled=layout == "flat-bin")
    (there / "ema.safetensors").write_bytes(b"")
    with pytest.raises(MissingDependency, match="cannot be had from the hub"):
        folder_of("owner/model", fetch=False)
    prior = load_prior("owner/model")
    assert (prior.source, prior.task.num_train_timesteps) == ("owner/model", 50)
    assert "ema.safetensors" not in asked
    before = len(asked)
    root = unet_in(folder_of("owner/model", fetch=False))
    assert load_prior("owner/model").image_shape == SHAPE
    assert len(asked) == before
    assert digest_of(root) == digest_of(there / "unet" if layout == "folders" else root) != ""


def test_planning_asks_the_cache_and_never_the_hub(saved, hub):
    there, asked = hub
    flat(saved, there, pickled=False)
    assert planning._prior_digest("owner/model") == ""
    assert asked == []
    folder_of("owner/model")
    assert planning._prior_digest("owner/model") == digest_of(there) != ""
    assert planning._prior_digest("") == planning._prior_digest(None) == ""

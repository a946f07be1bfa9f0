"""Training a prior: it loads anywhere, goes on to the same bits, says what it saw, and another one is never overwritten."""

import hashlib
import json
from dataclasses import replace

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from typer.testing import CliRunner

from fedattack import prior_training, provenance
from fedattack.cli import app
from fedattack.data import load_dataset
from fedattack.data.resize import fit
from fedattack.errors import FedattackError
from fedattack.prior_training import PRESETS, TRAINING, PriorSettings, prior_settings, train_prior
from fedattack.priors import load_prior, sample
from fedattack.provenance import SAME, overlap, read_provenance, same_settings, summary, thumbnails
from fedattack.seeding import derive_generator
from fedattack.store import read_tensors

SMALL = PriorSettings(
    "patches", size=8, channels=(8, 16), steps=12, batch=4, warmup=2, learning_rate=1e-2, ema=0.9, timesteps=20, seed=5
)


class Interrupted(Exception):
    """What a progress raises in the middle of a training."""


def stop_at(step):
    def told(done, total, loss):
        if done == step:
            raise Interrupted

    return told


def weights_of(folder):
    return {name: t.clone() for name, t in load_prior(str(folder)).network.state_dict().items()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A prior of 12 steps on the public patches, and its provenance."""
    folder = tmp_path_factory.mktemp("priors") / "small"
    return folder, train_prior(SMALL, folder, samples=4, sample_steps=3)


def test_the_result_is_a_pipeline_that_diffusers_and_attacks_load(trained):
    from diffusers import DDPMPipeline

    folder, _ = trained
    pipeline = DDPMPipeline.from_pretrained(folder)
    assert pipeline.unet.config.sample_size == 8
    assert pipeline.scheduler.config.num_train_timesteps == 20
    prior = load_prior(str(folder))
    assert prior.image_shape == (3, 8, 8)
    assert prior.task == SMALL.task
    latent = torch.randn((1, 3, 8, 8), generator=derive_generator(0, "latent"))
    assert bool(sample(prior, latent, steps=4).isfinite().all())
    assert (folder / "samples.png").stat().st_size > 0
    assert not (folder / TRAINING).exists()
    assert folder.stat().st_mode & 0o777 == 0o700


def test_training_lowers_the_loss_and_the_average_is_what_is_saved(tmp_path):
    settings = replace(SMALL, steps=80, batch=8, ema=0.95)
    about = train_prior(settings, tmp_path / "p", samples=0)
    assert about["loss"]["curve"][-1] < 0.7 * about["loss"]["curve"][0]
    prior, task = load_prior(str(tmp_path / "p")), settings.task
    images = load_dataset("patches", image_size=8).public.images()
    private = task.draw(images, torch.zeros(len(images)), generator=derive_generator(0, "check"))
    with torch.no_grad():
        loss = float(task.loss(prior.predict, private))
        silent = float(task.loss(lambda noisy, t: torch.zeros_like(noisy), private))
    assert loss == pytest.approx(about["loss"]["average_on_trained"], rel=0.15)
    assert loss < 0.7 * silent


def test_an_interrupted_training_goes_on_to_the_same_bits(trained, tmp_path):
    folder, about = trained
    with pytest.raises(Interrupted):
        train_prior(SMALL, tmp_path / "p", samples=4, sample_steps=3, save_every=5, progress=stop_at(8))
    assert not read_provenance(str(tmp_path / "p"))
    seen = []
    again = train_prior(
        SMALL, tmp_path / "p", samples=4, sample_steps=3, progress=lambda done, total, loss: seen.append((done, total))
    )
    assert seen == [(done, 12) for done in range(6, 13)]  # from the file of step 5
    for name, tensor in weights_of(tmp_path / "p").items():
        assert torch.equal(tensor, weights_of(folder)[name]), name
    assert (tmp_path / "p/samples.png").read_bytes() == (folder / "samples.png").read_bytes()
    assert again["loss"] == about["loss"]


@pytest.mark.parametrize("moment", ["save_thumbnails", "write_json"])
def test_an_interrupt_after_training_is_no_loss(trained, tmp_path, monkeypatch, moment):
    """Weights are there and the provenance is not; save_every is more than all steps."""
    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        patched.setattr(prior_training, moment, lambda *_: stop_at(None)(None, 0, 0))
        train_prior(SMALL, tmp_path / "p", samples=4, sample_steps=3)
    assert (tmp_path / "p/unet").is_dir()
    seen = []
    again = train_prior(SMALL, tmp_path / "p", samples=4, sample_steps=3, progress=lambda *call: seen.append(call))
    assert not seen
    assert again["loss"] == trained[1]["loss"]
    for name, tensor in weights_of(tmp_path / "p").items():
        assert torch.equal(tensor, weights_of(trained[0])[name]), name
    assert not (tmp_path / "p" / TRAINING).exists()


@pytest.mark.parametrize("steps", [1, 12])
def test_a_diverged_prior_is_not_kept(tmp_path, steps):
    """After one step the loss was still finite and the weights no longer give one."""
    with pytest.raises(FedattackError, match="must be finite, got"):
        train_prior(replace(SMALL, learning_rate=1e30, steps=steps), tmp_path / "p")
    assert not list((tmp_path / "p").iterdir())


def test_a_diverged_prior_of_before_is_refused(trained, tmp_path):
    (tmp_path / "p").mkdir()
    loss = {**trained[1]["loss"], "last": None}
    (tmp_path / "p/provenance.json").write_text(json.dumps({**trained[1], "loss": loss}))
    with pytest.raises(FedattackError, match="must be finite, got None"):
        train_prior(SMALL, tmp_path / "p")


def test_what_cannot_be_is_refused_by_name(tmp_path):
    with pytest.raises(FedattackError, match="save_every must be"):
        train_prior(SMALL, tmp_path / "p", save_every=0)
    with pytest.raises(FedattackError, match="samples must be"):
        train_prior(SMALL, tmp_path / "p", samples=-1)
    with pytest.raises(FedattackError, match="image_size"):
        replace(SMALL, options={"image_size": 16})
    assert not (tmp_path / "p").exists()


def test_the_seed_decides_the_weights(trained, tmp_path):
    train_prior(SMALL, tmp_path / "same", samples=0)
    train_prior(replace(SMALL, seed=6), tmp_path / "other", samples=0)
    mine, same, other = (weights_of(folder) for folder in (trained[0], tmp_path / "same", tmp_path / "other"))
    assert all(torch.equal(mine[name], same[name]) for name in mine)
    assert not any(torch.equal(mine[name], other[name]) for name in mine if name.endswith("weight"))


def test_a_prior_that_is_there_is_used_and_another_refused(trained, tmp_path):
    folder, about = trained
    seen = []
    assert train_prior(SMALL, folder, progress=lambda *call: seen.append(call)) == about
    assert not seen
    for change, complaint in (
        ({"steps": 13}, "steps is 12 there, asked for 13"),
        ({"channels": (16, 16)}, r"channels is \[8, 16\] there"),
        ({"split": "test"}, "data.split is 'public' there, asked for 'test'"),
        ({"options": {"seed": 9}}, "data.sha256"),
    ):
        with pytest.raises(FedattackError, match=complaint):
            train_prior(replace(SMALL, **change), folder)
    with pytest.raises(Interrupted):
        train_prior(SMALL, tmp_path / "half", save_every=2, progress=stop_at(3))
    with pytest.raises(FedattackError, match="learning_rate"):
        train_prior(replace(SMALL, learning_rate=0.5), tmp_path / "half")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/letter.txt").write_text("dear")
    with pytest.raises(FedattackError, match="must be empty"):
        train_prior(SMALL, tmp_path / "mine")


def test_the_provenance_says_what_was_seen(trained):
    folder, about = trained
    assert json.loads((folder / "provenance.json").read_text()) == about
    public = load_dataset("patches", image_size=8).public
    assert about["data"]["images"] == len(public)
    assert about["data"]["split"] == "public"
    assert (about["seed"], about["steps"], about["batch"]) == (5, 12, 4)
    assert about["loss"]["average_on_held_out"] > 0
    told = summary(str(folder))
    assert told["sha256"] == about["data"]["sha256"]
    assert (told["dataset"], told["seed"], told["steps"]) == ("patches", 5, 12)
    assert summary("google/ddpm-cifar10-32") == {} == summary("")


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(FedattackError, match="split must be one of"):
        replace(SMALL, split="publik")
    with pytest.raises(FedattackError, match="steps must be"):
        replace(SMALL, steps=0)
    with pytest.raises(FedattackError, match="beta_schedule must be one of"):
        replace(SMALL, schedule="cosine")
    with pytest.raises(FedattackError, match="did you mean 'gpu-64'"):
        prior_settings("patches", "gpu64")
    for preset in PRESETS:
        assert prior_settings("patches", preset, seed=3, steps=None).seed == 3
    assert prior_settings("patches", "gpu-64").size == 64


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_builds_a_model_of_its_size(preset):
    settings = prior_settings("patches", preset)
    with torch.device("meta"):
        model = settings.build((3, settings.size, settings.size))
    assert model.unet.config.sample_size == settings.size


# ------------------------------------------------------------------------------------------------ overlap
def test_a_thumbnail_is_the_mean_of_what_it_covers():
    """7×5 is not divisible by 4: the middle 5×5 in exact quarters, by a slow sum over sub-pixels."""
    pixels = torch.randint(0, 256, (2, 3, 7, 5), generator=derive_generator(0, "pixels"), dtype=torch.uint8)
    square = pixels[:, :, 1:6].double()
    slow = torch.zeros(2, 3, 4, 4, dtype=torch.double)
    for y in range(20):
        for x in range(20):
            slow[:, :, y // 5, x // 5] += square[:, :, y // 4, x // 4] / 25
    assert torch.equal(thumbnails(pixels).double(), slow.round())
    assert torch.equal(thumbnails(pixels.float() / 255), thumbnails(pixels))


def test_the_fingerprint_is_of_shape_and_bytes():
    pixels = torch.randint(0, 256, (2, 3, 5, 4), generator=derive_generator(0, "pixels"), dtype=torch.uint8)
    strided = pixels.transpose(2, 3).contiguous().transpose(2, 3)
    wanted = hashlib.sha256(b"(2, 3, 5, 4)" + pixels.numpy().tobytes()).hexdigest()
    assert provenance.fingerprint(pixels) == provenance.fingerprint(strided) == wanted


def test_images_the_prior_was_trained_on_are_found_at_any_size(trained):
    folder, _ = trained
    splits = load_dataset("patches", image_size=8)
    seen, new = splits.public.images()[:10], splits.private.images()[:60]
    assert overlap(seen, str(folder)) == {
        "compared": 10,
        "same": 10,
        "mirrored": True,
        "nearest_levels": 0.0,
        "tolerance_levels": SAME,
    }
    assert overlap(torch.cat([new, seen[:1]]), str(folder))["same"] == 1
    assert overlap(new, str(folder))["same"] == 0
    larger = torch.nn.functional.interpolate(seen, scale_factor=3, mode="nearest")
    noisy = (larger + 0.02 * torch.randn(larger.shape, generator=derive_generator(1, "noise"))).clamp(0, 1)
    assert overlap(noisy, str(folder))["same"] == 10
    unknown = overlap(seen[:, :1], str(folder))
    assert (unknown["compared"], unknown["same"]) == (0, None)
    assert "3 channels" in unknown["reason"]
    assert overlap(seen, "google/ddpm-cifar10-32") == {}


@pytest.mark.parametrize("flips", [True, False])
def test_a_mirrored_copy_is_the_same_image_where_training_mirrored(tmp_path, flips):
    train_prior(replace(SMALL, steps=1, flips=flips), tmp_path / "p", samples=0)
    found = overlap(load_dataset("patches", image_size=8).public.images()[:10].flip(-1), str(tmp_path / "p"))
    assert found["mirrored"] is flips
    assert (found["same"] == 10) is flips


class Memory(TorchDispatchMode):
    """The most bytes that were held at once by tensors made under it."""

    def __init__(self):
        super().__init__()
        self.held, self.peak = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.held[storage.data_ptr()] = (StorageWeakRef(storage), storage.nbytes())
        self.held = {at: one for at, one in self.held.items() if not one[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.held.values()))
        return made


@pytest.mark.parametrize("side", [16, 64])
def test_thumbnails_of_many_images_take_little_memory(monkeypatch, side):
    """Beside the images themselves a few chunks, however many images there are."""
    monkeypatch.setattr(provenance, "POOLED", 1 << 18)
    pixels = torch.randint(0, 256, (400, 3, side, side), generator=derive_generator(0, "many"), dtype=torch.uint8)
    with Memory() as memory:
        made = thumbnails(pixels)
    assert made.shape == (400, 3, 4, 4)
    assert memory.peak - pixels.nbytes < 3 * 4 * (1 << 18)


def test_a_smaller_copy_is_the_same_image(patches):
    large = load_dataset("patches", image_size=32).public.pixels
    difference = (thumbnails(fit(large, 16)).double() - thumbnails(large).double()).square().flatten(1).mean(1).sqrt()
    assert float(difference.max()) < 0.5 * SAME


def test_differences_of_settings_are_named():
    wanted, found = {"a": 1, "b": {"c": (2, 3), "d": 4}}, {"a": 1, "b": {"c": [2, 3]}}
    assert same_settings(wanted, found) == ["b.d is None there, asked for 4"]


# ------------------------------------------------------------------------------------------------ the command
def test_the_command_trains_and_uses_what_is_there(tmp_path):
    arguments = (
        "train-prior patches --size 8 --channels 8,16 --steps 3 --batch 4 --samples 0 --prediction v_prediction --schedule "
        f"squaredcos_cap_v2 --option max_per_picture=20 --device cpu --threads 1 --seed 2 --out {tmp_path / 'p'}"
    ).split()
    first = CliRunner().invoke(app, arguments)
    assert first.exit_code == 0, first.output
    about = read_provenance(str(tmp_path / "p"))
    assert (about["prediction"], about["schedule"], about["seed"]) == ("v_prediction", "squaredcos_cap_v2", 2)
    assert about["data"]["options"] == {"max_per_picture": 20}
    written = (tmp_path / "p/provenance.json").stat().st_mtime_ns
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert (tmp_path / "p/provenance.json").stat().st_mtime_ns == written
    wrong = CliRunner().invoke(app, [*arguments, "--channels", "8;16"])
    assert isinstance(wrong.exception, FedattackError)
    assert "--channels must be whole numbers" in str(wrong.exception)
    assert load_prior(str(tmp_path / "p")).task.prediction_type == "v_prediction"
    assert read_tensors(tmp_path / "p/images.safetensors")[0]["thumbnails"].shape == (about["data"]["images"], 3, 4, 4)

"""`timestep-leak`: the batch's timesteps without noise, a posterior under it that means what it says, and reasons to refuse."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from attacks.timestep_leak import TimestepLeak
from fedattack.errors import FedattackError, NotApplicable
from fedattack.metrics import timestep_accuracy
from fedattack.models import build_model
from fedattack.seeding import derive_generator, seeded_default_generator
from fedattack.store import load_reconstruction, save_reconstruction
from fedattack.tasks import Diffusion, batch_indices
from fedattack.types import Knowledge

SHAPE = (1, 8, 8)
TASK = Diffusion()
LAYER = "unet.time_embedding.linear_1"


def unet(width=32):
    options = {"block_out_channels": (width,), "attention": (), "mid_attention": False}
    return build_model("unet", image_shape=SHAPE, num_classes=None, seed=1, **options)


def facts(batch, **more):
    return Knowledge(image_shape=SHAPE, batch_size=batch, **more)


def attack(update, model, knowledge, task=TASK, **options):
    return TimestepLeak(**options).reconstruct(update, model, task, knowledge, generator=derive_generator(0, "attack"))


def drawn(batch, seed, dtype=torch.float64, steps=None):
    """The client's timesteps: the draws of conftest.update_from, repeated."""
    generator = derive_generator(seed, "client")
    images, labels = torch.zeros(batch, *SHAPE, dtype=dtype), torch.zeros(batch)
    draws = [TASK.draw(images[i], labels[i], generator=generator) for i in steps or [range(batch)]]
    return torch.cat([private["timesteps"] for private in draws])


def with_noise(update, sigma, seed):
    generator = derive_generator(seed, "noise")
    noisy = {
        name: tensor + sigma * torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor)
        for name, tensor in update.received.items()
    }
    return replace(update, received=noisy)


# ------------------------------------------------------------------------------------------------ without noise
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_four_timesteps_of_an_untrained_unet_are_exact(make_update, random_images, dtype):
    model, public = unet().to(dtype), torch.rand(5, *SHAPE, generator=derive_generator(0, "public"))
    for seed in range(5):
        images = random_images((4, *SHAPE), seed)
        update = make_update(model, images, torch.zeros(4), task=TASK, dtype=dtype, seed=seed)
        found, truth = attack(update, model, facts(4, public_images=public)), drawn(4, seed, dtype)
        assert found.timesteps.tolist() == truth.sort().values.tolist()
        assert timestep_accuracy(found.timesteps, truth) == 1.0
        assert found.timestep_posterior.shape == (4, 1000)
        assert found.timestep_posterior.argmax(1).tolist() == found.timesteps.tolist()
        assert found.losses == (0.0,)
        said = {key: value for key, value in found.diagnostics.items() if key != "noise_std"}
        expected = {"members": 4, "rank": 4, "repeats": 0, "exact": 1, "posterior_mass": 1, "credible_99": 1}
        assert said == expected
        assert found.diagnostics["noise_std"] < 1e-6, "rounding"
        assert found.represents == "timesteps"
        assert torch.allclose(found.images, public.mean(0, keepdim=True).expand(4, -1, -1, -1))


def test_without_public_images_grey_stands_in(make_update, random_images):
    model = unet()
    update = make_update(model, random_images((2, *SHAPE)), torch.zeros(2), task=TASK)
    assert torch.equal(attack(update, model, facts(2)).images, torch.full((2, *SHAPE), 0.5))


def test_an_update_tells_its_own_timesteps_and_no_others(make_update, random_images):
    """Two clients with the same images: whose update it is decides."""
    model, images = unet().double(), random_images((3, *SHAPE))
    for seed in (0, 1):
        update = make_update(model, images, torch.zeros(3), task=TASK, seed=seed)
        found = attack(update, model, facts(3)).timesteps
        assert timestep_accuracy(found, drawn(3, seed)) == 1.0
        assert timestep_accuracy(found, drawn(3, 1 - seed)) == 0.0


def test_all_local_steps_are_told(make_update, random_images):
    model, steps = unet().double(), batch_indices(4, 2, 3)
    settings = {"kind": "weights", "learning_rate": 0.05, "local_steps": 3, "local_batch_size": 2}
    update = make_update(model, random_images((4, *SHAPE)), torch.zeros(4), task=TASK, **settings)
    found = attack(update, model, facts(4, learning_rate=0.05, local_steps=3, local_batch_size=2))
    assert timestep_accuracy(found.timesteps, drawn(4, 0, steps=steps)) == 1.0
    assert found.images.shape == (4, *SHAPE)
    assert found.timestep_posterior.shape == (6, 1000)


def test_repeats_are_counted_and_called_a_guess(make_update, random_images):
    """Thirty members of fifty timesteps: the distinct ones are exact, which of them occur twice is not."""
    model, task = unet(64).double(), Diffusion(num_train_timesteps=50)
    update = make_update(model, random_images((30, *SHAPE)), torch.zeros(30), task=task)
    draw = task.draw(
        torch.zeros(30, *SHAPE, dtype=torch.float64), torch.zeros(30), generator=derive_generator(0, "client")
    )
    truth = draw["timesteps"].tolist()
    found = attack(update, model, facts(30), task=task)
    assert found.diagnostics["exact"] == 1.0
    assert found.diagnostics["rank"] == len(set(truth))
    assert found.diagnostics["repeats"] == 30 - len(set(truth)) > 0
    assert set(found.timesteps.tolist()) == set(truth)


# ------------------------------------------------------------------------------------------------ under noise
@pytest.mark.parametrize("told", [True, False], ids=["known", "unknown"])
@pytest.mark.parametrize("times", [11.0, 14.0])
def test_the_99_percent_set_holds_the_truth(make_update, random_images, times, told):
    """Forty clients of one image, noise so many times the layer's own rms: at most three misses (chance 1 in 1,000)."""
    model, repeats, inside, sizes, masses, right = unet().double(), 40, 0, [], [], []
    for seed in range(repeats):
        update = make_update(model, random_images((1, *SHAPE), seed), torch.zeros(1), task=TASK, seed=seed)
        sigma = times * float(update.received[f"{LAYER}.weight"].square().mean().sqrt())
        defense = f"gaussian-noise(sigma={sigma!r})" if told else None
        found = attack(with_noise(update, sigma, seed), model, facts(1, defense=defense))
        posterior = found.timestep_posterior[0].double()
        assert float(posterior.sum()) == pytest.approx(1.0, abs=1e-5)
        assert found.diagnostics["exact"] == 0.0
        assert found.diagnostics["noise_std"] == pytest.approx(sigma, rel=1e-9 if told else 0.1)
        order = posterior.argsort(descending=True)
        smallest = order[: int(found.diagnostics["credible_99"])]
        assert float(posterior[smallest].sum()) >= 0.99 - 1e-5
        assert float(posterior[smallest[:-1]].sum()) < 0.99 + 1e-5
        t = int(drawn(1, seed))
        inside += t in smallest.tolist()
        sizes.append(len(smallest))
        masses.append(found.diagnostics["posterior_mass"])
        right.append(found.timesteps.tolist() == [t])
    assert inside >= repeats - 3
    assert 2 < sum(sizes) / repeats < 700, "neither trivial nor hopeless"
    assert sum(right) / repeats == pytest.approx(sum(masses) / repeats, abs=0.25), "the mass is the chance to be right"


def test_a_noisy_batch_has_a_posterior_a_member(make_update, random_images):
    model = unet().double()
    update = make_update(model, random_images((4, *SHAPE)), torch.zeros(4), task=TASK)
    sigma = 3.0 * float(update.received[f"{LAYER}.weight"].square().mean().sqrt())
    found = attack(with_noise(update, sigma, 0), model, facts(4, defense=f"gaussian-noise(sigma={sigma!r})"))
    assert found.timestep_posterior.sum(1).tolist() == pytest.approx([1.0] * 4, abs=1e-5)
    assert 0.0 < found.diagnostics["posterior_mass"] < 1.0
    assert found.diagnostics["credible_99"] > 1
    assert found.losses[0] > 0.0


def test_noise_on_weights_is_known_with_and_without_the_learning_rate(make_update, random_images):
    model = unet().double()
    update = make_update(
        model, random_images((1, *SHAPE)), torch.zeros(1), task=TASK, kind="weights", learning_rate=0.05
    )
    noisy, defense = with_noise(update, 1e-3, 0), "gaussian-noise(sigma=0.001)"
    rate = attack(noisy, model, facts(1, defense=defense, learning_rate=0.05))
    none = attack(noisy, model, facts(1, defense=defense))
    assert rate.diagnostics["noise_std"] == pytest.approx(1e-3 / 0.05)
    assert none.diagnostics["noise_std"] == pytest.approx(1e-3)
    assert torch.allclose(rate.timestep_posterior, none.timestep_posterior, atol=1e-6)
    told = attack(noisy, model, facts(1, defense=defense), sigma=2e-3)
    assert told.diagnostics["noise_std"] == pytest.approx(2e-3), "the option comes first"


# ------------------------------------------------------------------------------------------------ other embeddings
class Other(nn.Module):
    """A diffusers U-Net that embeds the time in another way; a fixed class for each place of the batch where there are some."""

    def __init__(self, **options) -> None:
        super().__init__()
        from diffusers import UNet2DModel

        blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "layers_per_block": 1}
        sizes = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (32,)}
        with seeded_default_generator(0):
            self.unet = UNet2DModel(**sizes, **blocks, norm_num_groups=8, add_attention=False, **options)
        self.classes = options.get("num_class_embeds")

    def forward(self, images: Tensor, timesteps: Tensor) -> Tensor:
        labels = {"class_labels": torch.arange(len(images)) % self.classes} if self.classes else {}
        output: Tensor = self.unet(images, timesteps + 1, return_dict=False, **labels)[0]  # log t: 0 has none
        return output


@pytest.mark.parametrize(
    "options",
    [
        {"time_embedding_type": "fourier"},
        {"time_embedding_type": "learned", "num_train_timesteps": 1001},
        {"num_class_embeds": 4},
        {"freq_shift": 1, "flip_sin_to_cos": False},
    ],
    ids=["fourier", "learned", "class added", "shifted"],
)
def test_embeddings_of_other_kinds(make_update, random_images, options):
    model = Other(**options).double()
    update = make_update(model, random_images((4, *SHAPE)), torch.zeros(4), task=TASK)
    found = attack(update, model, facts(4))
    assert Counter(found.timesteps.tolist()) == Counter(drawn(4, 0).tolist())


def test_a_learned_embedding_moves_in_several_steps_and_is_refused(make_update, random_images):
    model = Other(time_embedding_type="learned", num_train_timesteps=1001).double()
    update = make_update(model, random_images((2, *SHAPE)), torch.zeros(2), task=TASK, kind="weights", local_steps=2)
    with pytest.raises(NotApplicable, match="moves with the weights"):
        attack(update, model, facts(2, local_steps=2, learning_rate=0.1))


def test_a_model_that_embeds_no_time_is_not_applicable(make_update, random_images):
    class Timeless(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            with seeded_default_generator(0):
                self.dense = nn.Linear(64, 64)

        def forward(self, images: Tensor, timesteps: Tensor) -> Tensor:
            return self.dense(images.flatten(1)).reshape(images.shape)

    model = Timeless().double()
    update = make_update(model, random_images((1, *SHAPE)), torch.zeros(1), task=TASK)
    with pytest.raises(NotApplicable, match="no dense layer of the model sees the timestep"):
        attack(update, model, facts(1))


# ------------------------------------------------------------------------------------------------ manners
def test_known_timesteps_leave_nothing_to_find(make_update, random_images):
    model = unet()
    update = make_update(model, random_images((1, *SHAPE)), torch.zeros(1), task=TASK)
    with pytest.raises(NotApplicable, match="known already"):
        attack(update, model, facts(1, timesteps=torch.tensor([3])))


@pytest.mark.parametrize("options", [{"sigma": -1.0}, {"sigma": float("nan")}, {"sigma": float("inf")}, {"sweeps": 0}])
def test_options_are_checked(options):
    with pytest.raises(FedattackError, match=f"{next(iter(options))} must be"):
        TimestepLeak(**options)


def test_the_posterior_is_kept_on_disk(make_update, random_images, tmp_path):
    model = unet()
    update = make_update(model, random_images((2, *SHAPE)), torch.zeros(2), task=TASK)
    found = attack(update, model, facts(2))
    save_reconstruction(tmp_path / "r.safetensors", found)
    again = load_reconstruction(tmp_path / "r.safetensors")
    assert torch.equal(again.timestep_posterior, found.timestep_posterior)
    assert torch.equal(again.timesteps, found.timesteps)
    assert again.represents == "timesteps"

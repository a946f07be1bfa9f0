"""Statistics and closed forms of every defense; the contract that every registered one keeps."""

import math

import pytest
import torch

from clients.defenses.gaussian_noise import GaussianNoise, root_mean_square
from clients.defenses.norm_clipping import NormClipping
from fedattack.errors import FedattackError
from fedattack.registry import DEFENSES
from fedattack.types import Defense

EXAMPLES = {"gaussian-noise": {"sigma": 0.1}, "norm-clipping": {"max_norm": 0.5}}


def update() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {"w": torch.randn(200, 100, generator=generator), "b": torch.randn(7, generator=generator)}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", DEFENSES.names())
def test_contract(name: str) -> None:
    """Same names, shapes and types; the input is left alone; the same generator gives the same result."""
    missing = [key for key, default in DEFENSES.parameters(name).items() if default is ...]
    assert set(missing) <= set(EXAMPLES.get(name, {})), "give an example of the parameters of a new defense"
    defense = DEFENSES.create(name, **EXAMPLES.get(name, {}))
    assert isinstance(defense, Defense)
    assert defense.name == name
    given = update()
    kept = {key: tensor.clone() for key, tensor in given.items()}
    state = torch.get_rng_state()
    first = defense.on_update(given, sent=kept, generator=seeded(1))
    again = defense.on_update(given, sent=kept, generator=seeded(1))
    assert torch.equal(torch.get_rng_state(), state)
    assert {k: (t.shape, t.dtype) for k, t in first.items()} == {k: (t.shape, t.dtype) for k, t in kept.items()}
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert all(torch.equal(given[key], kept[key]) for key in given)
    images, labels = torch.rand(3, 1, 7, 5), torch.tensor([0, 1, 2])
    defended, told = defense.on_batch(images, labels, generator=seeded(1))
    assert defended.shape[1:] == images.shape[1:]
    assert len(defended) == len(told)
    assert all(isinstance(value, int | float) for value in defense.describe().values())


def test_gaussian_noise_has_the_stated_standard_deviation() -> None:
    given = update()
    noisy = GaussianNoise(sigma=0.1).on_update(given, sent={}, generator=seeded(2))
    noise = torch.cat([(noisy[key] - given[key]).flatten() for key in given])
    count = noise.numel()
    assert abs(float(noise.mean())) < 5 * 0.1 / math.sqrt(count)
    assert abs(float(noise.std()) - 0.1) < 5 * 0.1 / math.sqrt(2 * count)
    assert abs(float((noise.abs() < 0.1).float().mean()) - 0.6827) < 0.02, "not normal"
    assert GaussianNoise(sigma=0.1).describe() == pytest.approx({"noise_std": 0.1, "noise_variance": 0.01})


def test_relative_noise_is_a_multiple_of_the_updates_own_rms() -> None:
    given = {key: 30 * tensor for key, tensor in update().items()}
    noisy = GaussianNoise(sigma=0.5, relative=True).on_update(given, sent={}, generator=seeded(2))
    noise = torch.cat([(noisy[key] - given[key]).flatten() for key in given])
    assert float(noise.std()) == pytest.approx(0.5 * root_mean_square(given), rel=0.03)


def test_no_noise_is_the_identity() -> None:
    given = update()
    same = GaussianNoise(sigma=0.0).on_update(given, sent={}, generator=seeded(2))
    assert all(torch.equal(same[key], given[key]) for key in given)


def test_clipping_caps_the_norm_and_keeps_the_direction() -> None:
    given = update()
    norm = math.sqrt(sum(float(t.double().square().sum()) for t in given.values()))
    clipped = NormClipping(max_norm=2.0).on_update(given, sent={}, generator=seeded(0))
    assert math.sqrt(sum(float(t.double().square().sum()) for t in clipped.values())) == pytest.approx(2.0, rel=1e-5)
    torch.testing.assert_close(clipped["w"] * norm / 2.0, given["w"], rtol=1e-5, atol=1e-6)
    small = NormClipping(max_norm=2 * norm).on_update(given, sent={}, generator=seeded(0))
    assert all(torch.equal(small[key], given[key]) for key in given)
    zero = NormClipping(max_norm=1.0).on_update({"w": torch.zeros(3)}, sent={}, generator=seeded(0))
    assert torch.equal(zero["w"], torch.zeros(3))


@pytest.mark.parametrize(
    ("name", "parameters"), [("gaussian-noise", {"sigma": -1}), ("norm-clipping", {"max_norm": 0})]
)
def test_nonsense_parameters_are_refused(name: str, parameters: dict[str, float]) -> None:
    with pytest.raises(FedattackError, match="must be"):
        DEFENSES.create(name, **parameters)

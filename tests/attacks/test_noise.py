"""What an attacker who knows the defense makes of the noise on an update."""

import pytest
import torch

from attacks.noise import clip_norm, noise_level
from clients.training import defend
from fedattack.config import parse_config
from fedattack.errors import FedattackError
from fedattack.types import Knowledge, Update

RATE = 0.05


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("protocol", ["fedsgd", "fedavg"])
def test_the_level_is_that_of_what_was_added(protocol: str, relative: bool) -> None:
    """Also where running statistics, which move a hundred times as far and get no noise, travel along."""
    defense = f"gaussian-noise(sigma={0.5 if relative else 2e-4!r}, relative={relative})"
    (settings,) = parse_config({"federation": {"protocol": protocol, "defense": defense}}).cells
    draws = torch.Generator().manual_seed(0)
    sent = {"w": torch.randn(20_000, generator=draws), "bn.running_var": torch.ones(2_000)}
    gradient = 0.01 * torch.randn(20_000, generator=draws)
    if protocol == "fedsgd":
        update = {"w": gradient}
    else:
        update = {"w": sent["w"] - RATE * gradient, "bn.running_var": torch.full((2_000,), 0.9)}
    received = defend(update, sent, settings, client="client-0", server_round=1, seed=0)
    kind = "gradient" if protocol == "fedsgd" else "weights"
    seen = Update(1, "client-0", sent, received, kind, 1)
    rate = RATE if protocol == "fedavg" else None
    added = (seen.gradient(rate)["w"] - gradient).std()
    level = noise_level(seen, Knowledge(defense=defense, learning_rate=rate))
    assert level == pytest.approx(float(added), rel=0.03)


def test_a_known_clip_is_in_units_of_the_gradient():
    weights = {"w": torch.ones(2)}
    gradient = Update(1, "0", weights, weights, "gradient")
    difference = Update(1, "0", weights, weights, "weights")
    before = "norm-clipping(max_norm=4.0) + norm-clipping(max_norm=2.0)"
    chain = f"{before} + gaussian-noise(sigma=0.1) + norm-clipping(max_norm=1.0)"
    assert clip_norm(gradient, Knowledge(defense=chain)) == 2.0
    assert clip_norm(difference, Knowledge(defense=chain, learning_rate=0.5)) == 4.0
    assert clip_norm(gradient, Knowledge(defense="gaussian-noise(sigma=0.1)")) is None
    assert clip_norm(gradient, Knowledge()) is None
    with pytest.raises(FedattackError, match="learning_rate"):
        clip_norm(difference, Knowledge(defense=chain))

"""The plain loop of the cost measurement computes what the attack computes, or its ratio would mean nothing."""

from copy import deepcopy

import pytest
import torch

from attacks.gidm import Phases
from attacks.matching import DISTANCES
from experiments.gidm_cost import Setting, memory_here, plain_loop
from fedattack.types import silent


@pytest.mark.parametrize("generative", [True, False])
@pytest.mark.parametrize("tidy", [True, False])
def test_the_plain_loop_takes_the_same_first_gradient(generative, tidy, monkeypatch):
    """Of the latent, or of the pixels in [−1, 1], which is half that of pixels in [0, 1]."""
    setting = Setting(8, [8, 16], 3, 0.0)
    slopes: list[torch.Tensor] = []

    class Recorder(torch.optim.Adam):
        def step(self, *_, **__):
            slopes.append(self.param_groups[0]["params"][0].grad.clone())

    monkeypatch.setattr(torch.optim, "Adam", Recorder)
    x = setting.latent[0]
    frozen = deepcopy(setting.net).requires_grad_(False)
    times = setting.times() if generative else []
    plain_loop(setting.net, frozen, setting.observed, setting.noise, x, times, 1, tidy)
    phases = Phases(setting.problem, DISTANCES["l2"], setting.attack, silent)
    start = setting.latent if generative else 0.5 + 0.5 * setting.latent
    phases.search(start, {}, setting.decode() if generative else None, 1, False)
    plain, ours = slopes[0], slopes[1][0] * phases.silence * (1.0 if generative else 0.5)
    assert torch.allclose(plain, ours, rtol=1e-3, atol=1e-3 * float(ours.abs().max()))


def test_memory_is_measured_in_mebibytes(capsys):
    memory_here(Setting(8, [8, 16], 2, 0.0), 0.0)
    assert 0.0 <= float(capsys.readouterr().out) < 500.0

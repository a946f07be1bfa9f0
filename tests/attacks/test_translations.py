"""Moved images, and searches that stall on the right image in the wrong place."""

import pytest
import torch

from attacks.second_order import SecondOrder
from attacks.translations import moved, moves
from fedattack.errors import FedattackError
from fedattack.metrics import psnr_db
from fedattack.seeding import derive_generator
from fedattack.tasks import Diffusion
from tests.attacks.test_second_order import denoiser, diffusion_update


@pytest.mark.parametrize(("height", "width", "longest"), [(3, 5, 1), (8, 8, 2), (16, 24, 4), (32, 32, 8), (64, 64, 8)])
def test_moves_go_a_quarter_of_the_image_at_most(height, width, longest):
    steps = moves((2, 3, height, width))
    assert len(steps) == len(set(steps))
    assert {number for number, _, _ in steps} == {0, 1}
    assert max(max(abs(down), abs(right)) for _, down, right in steps) == longest
    assert not any(down == right == 0 for _, down, right in steps)
    assert {(0, down, right) for down in (-1, 0, 1) for right in (-1, 0, 1)} - set(steps) == {(0, 0, 0)}


def test_one_image_is_moved_down_and_right_and_back(random_images):
    images = random_images((2, 3, 8, 8))
    there = moved(images, (1, 2, -1))
    assert torch.equal(there[0], images[0])
    assert torch.equal(there[1, :, 2:, :-1], images[1, :, :-2, 1:])
    assert torch.equal(moved(there, (1, -2, 1)), images)


def likeness(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]).double())[0, 1])


def test_a_search_that_stalls_on_a_moved_image_goes_on_from_where_it_belongs():
    """Stalled without hops; what it found there is the private noisy image in another place."""
    task, model = Diffusion(), denoiser()
    images = torch.rand((1, 2, 6, 6), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    private, update, knowledge = diffusion_update(model, task, images, [400])

    def search(hops: int):
        attack = SecondOrder(restarts=1, hops=hops)
        return attack.reconstruct(update, model, task, knowledge, generator=derive_generator(0, "a"))

    stalled, found = search(0), search(12)
    assert stalled.diagnostics["certified"] == 0.0
    alike = {move: likeness(moved(stalled.noise, move), private["noise"]) for move in moves(images.shape)}
    assert max(alike.values()) > 0.7 > 0.3 > likeness(stalled.noise, private["noise"])
    assert found.diagnostics["certified"] == found.diagnostics["starts"] == 1.0
    assert float(psnr_db(found.images, images)) > 80
    torch.testing.assert_close(found.noise, private["noise"], rtol=0, atol=1e-4)
    assert found.steps > stalled.steps
    assert found.losses[: stalled.steps + 1] == stalled.losses[:-1]


def test_a_negative_number_of_hops_is_refused():
    with pytest.raises(FedattackError, match="hops"):
        SecondOrder(hops=-1)

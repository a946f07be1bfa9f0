"""Moved images, and searches that stall on the right image in the wrong place."""

import math
from dataclasses import dataclass, field

import pytest
import torch

from attacks import translations
from attacks.least_squares import Solution
from attacks.second_order import SecondOrder
from attacks.translations import Translating, moved, moves
from fedattack.errors import FedattackError
from fedattack.metrics import psnr_db
from fedattack.models import build_model
from fedattack.seeding import derive_generator
from fedattack.tasks import Classification, Diffusion
from tests.attacks.test_second_order import denoiser, diffusion_update, facts


@pytest.mark.parametrize(
    ("height", "width", "down", "right"),
    [(3, 5, 1, 1), (1, 12, 0, 2), (8, 8, 2, 2), (8, 64, 2, 8), (16, 24, 4, 4), (32, 32, 8, 8), (64, 64, 8, 8)],
)
def test_moves_go_a_quarter_of_the_image_at_most(height, width, down, right, random_images):
    steps = moves((2, 3, height, width))
    assert {number for number, _, _ in steps} == {0, 1}
    assert (max(abs(y) for _, y, _ in steps), max(abs(x) for _, _, x in steps)) == (down, right)
    images = random_images((2, 3, height, width))
    places = {moved(images, step).numpy().tobytes() for step in steps}
    assert len(places | {images.numpy().tobytes()}) == len(steps) + 1
    lengths = [max(abs(y), abs(x)) for _, y, x in steps]
    assert lengths == sorted(lengths)


def test_the_eight_places_around_are_among_the_moves():
    steps = moves((1, 3, 8, 8))
    assert {(0, down, right) for down in (-1, 0, 1) for right in (-1, 0, 1)} - set(steps) == {(0, 0, 0)}


def test_one_image_is_moved_down_and_right_and_back(random_images):
    images = random_images((2, 3, 8, 8))
    there = moved(images, (1, 2, -1))
    assert torch.equal(there[0], images[0])
    assert torch.equal(there[1, :, 2:, :-1], images[1, :, :-2, 1:])
    assert torch.equal(moved(there, (1, -2, 1)), images)


def likeness(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]).double())[0, 1])


@pytest.mark.parametrize("descent", [0, 20])
def test_a_search_that_stalls_on_a_moved_image_goes_on_from_where_it_belongs(descent):
    """Given no further searches it stays where it stalled; what it found there is the private noisy image in another place.

    With a descent before it, too.
    """
    task, model = Diffusion(), denoiser()
    images = torch.rand((1, 2, 6, 6), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    private, update, knowledge = diffusion_update(model, task, images, [400])

    def search(most: int):
        attack = SecondOrder(restarts=1, translations=most, descent_iterations=descent)
        return attack.reconstruct(update, model, task, knowledge, generator=derive_generator(0, "a"))

    stalled, found = search(0), search(12)
    assert stalled.diagnostics["certified"] == 0.0
    alike = {move: likeness(moved(stalled.noise, move), private["noise"]) for move in moves(images.shape)}
    assert max(alike.values()) > 0.7 > 0.3 > likeness(stalled.noise, private["noise"])
    assert found.diagnostics["certified"] == found.diagnostics["starts"] == 1.0
    assert float(psnr_db(found.images, images)) > 80
    torch.testing.assert_close(found.noise, private["noise"], rtol=0, atol=1e-4)
    assert found.steps > stalled.steps
    assert found.diagnostics["translations"] >= 1.0 > stalled.diagnostics["translations"] == 0.0
    assert stalled.diagnostics["descents"] == float(descent > 0)
    if not descent:
        assert found.losses[: stalled.steps + 1] == stalled.losses[:-1]


@dataclass
class Landscape:
    """A search in which an image stays where it is put; `costs` of its places, by how far down and right it was moved."""

    image: torch.Tensor
    costs: dict[tuple[int, int], float]
    reason: str = "stalled"
    starts: list[tuple[int, int]] = field(default_factory=list)
    done: list[int] = field(default_factory=list)

    def place(self, x: torch.Tensor) -> tuple[int, int]:
        shape = self.image.shape
        return next(m[1:] for m in [(0, 0, 0), *moves(shape)] if torch.equal(moved(self.image, m).reshape(-1), x))

    def cost(self, x: torch.Tensor) -> float:
        return self.costs.get(self.place(x), 1000.0)

    def search(self, x: torch.Tensor, done: int) -> Solution:
        self.starts.append(self.place(x))
        self.done.append(done)
        return Solution(x=x, point=None, linear=None, costs=(9.0, self.cost(x)), reason=self.reason)

    def run(self, most: int = 12, slack: float = 1.0) -> Solution:
        return Translating(
            search=self.search,
            unknown=lambda end: end.x,
            shape=self.image.shape,
            verdict=lambda end: end.costs[-1],
            rough_cost=self.cost,
            close_cost=self.cost,
            success=0.1,
            most=most,
            slack=slack,
        ).search_from(self.image.reshape(-1))


@pytest.fixture
def landscape(random_images):
    return lambda costs, **options: Landscape(random_images((1, 1, 8, 8)), costs, **options)


def test_it_goes_on_from_the_best_place_and_ends_with_success(landscape):
    there = landscape({(0, 0): 1.0, (0, 1): 1.9, (1, 0): 0.5, (2, 0): 0.05, (1, 1): 0.6})
    found = there.run()
    assert there.starts == [(0, 0), (2, 0)]
    assert there.done == [0, 1]
    assert (found.costs, found.searches) == ((9.0, 1.0, 0.05), 2)


def test_slack_lets_dearer_moves_be_tried(landscape):
    costs = {(0, 0): 1.0, (0, 1): 3.0, (1, 0): 5.0}
    assert [landscape(costs).run(slack=slack).searches for slack in (1.0, 2.0, 3.0)] == [1, 2, 3]


def test_it_gives_up_after_three_searches_that_gained_nothing(landscape):
    there = landscape({(0, 0): 1.0, (0, 1): 1.0, (1, 0): 1.1, (-1, 0): 1.2, (0, -1): 1.3, (2, 2): 1.4})
    found = there.run()
    assert there.starts == [(0, 0), (0, 1), (1, 0), (-1, 0)]
    assert there.place(found.x) == (0, 0)
    assert (found.costs, found.searches) == ((9.0, 1.0, 1.0, 1.1, 1.2), 4)
    there.starts.clear()
    assert there.run(most=2).searches == 3


@pytest.mark.parametrize(
    ("costs", "reason", "most"),
    [
        pytest.param({(0, 0): 1.0, (0, 1): 2.1}, "stalled", 12, id="none near enough"),
        pytest.param({(0, 0): 1.0, (0, 1): 0.5}, "iterations", 12, id="not at its end"),
        pytest.param({(0, 0): 0.1, (0, 1): 0.01}, "stalled", 12, id="exact"),
        pytest.param({(0, 0): math.inf, (0, 1): 0.01}, "stalled", 12, id="not finite"),
        pytest.param({(0, 0): 1.0, (0, 1): 0.5}, "stalled", 0, id="not wanted"),
    ],
)
def test_where_moving_makes_no_sense_nothing_is_moved(landscape, costs, reason, most):
    there = landscape(costs, reason=reason)
    assert there.run(most).searches == len(there.starts) == 1


def test_a_model_that_sees_every_move_is_not_asked_closely():
    """The dear cost is spared where even the cheapest move multiplies the rough one by more than ten; any stride may be it."""

    def search(x: torch.Tensor, done: int) -> Solution:
        return Solution(x=x, point=None, linear=None, costs=(1.0,), reason="stalled")

    def ahead(rough):
        asked: list[torch.Tensor] = []
        there = Translating(
            search,
            lambda end: end.x,
            (1, 1, 8, 8),
            lambda end: 1.0,
            rough,
            lambda x: float(asked.append(x) or 1.0),
            0.1,
            1,
        )
        there.search_from(start)
        return asked

    start = torch.rand((1, 1, 8, 8), generator=torch.Generator().manual_seed(0)).reshape(-1)
    assert ahead(lambda x: 10.1) == []
    by_two = moved(start.reshape(1, 1, 8, 8), (0, 2, 0)).reshape(-1)
    assert len(ahead(lambda x: 0.5 if torch.equal(x, by_two) else 10.1)) == translations.SHORTLIST


def test_one_image_of_a_batch_is_moved_and_its_blocks_together(random_images):
    images = random_images((3, 2, 1, 4, 4))  # three blocks of a batch of two
    seen: list[torch.Tensor] = []

    def search(x: torch.Tensor, done: int) -> Solution:
        seen.append(x.reshape(images.shape))
        return Solution(x=x, point=None, linear=None, costs=(1.0,), reason="stalled")

    Translating(
        search, lambda end: end.x, (2, 1, 4, 4), lambda end: 1.0, lambda x: 1.0, lambda x: 1.0, 0.1, 1
    ).search_from(images.reshape(-1))
    assert len(seen) == 2
    changed = [number for number in (0, 1) if not torch.equal(seen[0][:, number], seen[1][:, number])]
    assert len(changed) == 1
    assert any(
        torch.equal(seen[1], torch.stack([moved(block, move) for block in images])) for move in moves((2, 1, 4, 4))
    )


def test_a_dense_head_knows_where_an_image_is(make_update, random_images, monkeypatch):
    """A search that is never content with what it has found moves nothing, unless it is told that all costs are near."""
    model = build_model(
        "lenet", image_shape=(1, 8, 8), num_classes=3, seed=0, init="default", activation="gelu"
    ).double()
    images, labels = random_images((1, 1, 8, 8)).double(), torch.tensor([1])
    update, knowledge = make_update(model, images, labels), facts(images, labels)
    attack = SecondOrder(restarts=1, certified=0.0, tolerance=0.0, translations=1)

    def search() -> float:
        found = attack.reconstruct(update, model, Classification(), knowledge, generator=derive_generator(0, "a"))
        return found.diagnostics["translations"]

    assert search() == 0.0
    monkeypatch.setattr(translations, "BLIND", math.inf)
    monkeypatch.setattr(translations, "NEAR", math.inf)
    assert search() == 1.0


def test_a_negative_number_of_searches_is_refused():
    with pytest.raises(FedattackError, match="translations"):
        SecondOrder(translations=-1)

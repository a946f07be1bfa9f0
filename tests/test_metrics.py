"""Metrics: closed forms first, then the slow oracle (scikit-image, brute force), then what must be refused."""

from itertools import permutations
from pathlib import Path

import pytest
import torch

from fedattack import metrics
from fedattack.errors import FedattackError, MissingDependency, NotApplicable
from fedattack.types import Reconstruction

TORCH_HOME = Path(__file__).parents[1].parent / "shared" / "torch-home"
HAS_SQUEEZE = (TORCH_HOME / "hub" / "checkpoints" / "squeezenet1_1-b8a52dc0.pth").is_file()
needs_squeeze = pytest.mark.skipif(not HAS_SQUEEZE, reason="no SqueezeNet backbone in ../shared/torch-home")


def images(count: int, seed: int = 0, shape: tuple[int, int, int] = (3, 16, 12)) -> torch.Tensor:
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def torch_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(TORCH_HOME))


# ------------------------------------------------------------------------------------------------ closed forms
@pytest.mark.parametrize(("offset", "expected"), [(0.1, 20.0), (0.01, 40.0), (1.0, 0.0)])
def test_psnr_of_an_offset(offset: float, expected: float) -> None:
    truth = torch.zeros(2, 3, 7, 5, dtype=torch.float64)
    value = metrics.psnr_db(truth + offset, truth)
    assert value.shape == (2,)
    assert value.dtype == torch.float64
    assert value.tolist() == pytest.approx([expected] * 2, abs=1e-9)


def test_identical_images_score_the_stated_cap() -> None:
    truth = images(2)
    assert metrics.mse(truth, truth).tolist() == [0.0, 0.0]
    assert metrics.psnr_db(truth, truth).tolist() == pytest.approx([200.0, 200.0])
    assert metrics.ssim(truth, truth).tolist() == pytest.approx([1.0, 1.0])


def test_metrics_are_per_image() -> None:
    truth = torch.full((3, 1, 7, 5), 0.5, dtype=torch.float64)
    reconstruction = truth + torch.tensor([0.0, 0.1, 0.5]).reshape(3, 1, 1, 1).double()
    assert metrics.mse(reconstruction, truth).tolist() == pytest.approx([0.0, 0.01, 0.25])


@pytest.mark.parametrize(
    ("estimated", "truth", "expected"),
    [
        ([1, 2, 3], [3, 1, 2], 1.0),
        ([1, 1, 1], [1, 2, 3], 1 / 3),
        ([7], [1], 0.0),
        ([1, 2, 3, 4], [1, 2], 0.5),
        ([1], [1, 1], 0.5),
    ],
)
def test_label_accuracy_compares_multisets(estimated: list[int], truth: list[int], expected: float) -> None:
    assert metrics.label_accuracy(torch.tensor(estimated), torch.tensor(truth)) == pytest.approx(expected)


# ------------------------------------------------------------------------------------------------ slow oracles
@pytest.mark.parametrize("channels", [1, 3])
def test_ssim_is_scikit_images_image_by_image(channels: int) -> None:
    from skimage.metrics import structural_similarity

    truth, other = images(2, 1, (channels, 16, 12)), images(2, 2, (channels, 16, 12))
    expected = []
    for i in range(2):
        options = {"data_range": 1.0, "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
        planes = [
            structural_similarity(truth[i, c].double().numpy(), other[i, c].double().numpy(), **options)
            for c in range(channels)
        ]
        expected.append(sum(planes) / channels)
    assert metrics.ssim(other, truth).tolist() == pytest.approx(expected, abs=1e-12)


def test_matching_undoes_a_permutation() -> None:
    truth = images(9, 3, (1, 7, 5))
    order = torch.randperm(9, generator=torch.Generator().manual_seed(4))
    shuffled = (truth[order] + 0.01).clamp(0, 1)
    match = metrics.match_batch(shuffled, truth)
    assert torch.equal(order[match], torch.arange(9))


def test_matching_is_the_best_of_all_permutations() -> None:
    truth, other = images(5, 5, (1, 7, 5)), images(5, 6, (1, 7, 5))
    cost = min(float(metrics.mse(other[list(p)], truth).sum()) for p in permutations(range(5)))
    assert float(metrics.mse(other[metrics.match_batch(other, truth)], truth).sum()) == pytest.approx(cost)


def test_matching_with_fewer_and_with_more_images() -> None:
    truth = images(4, 7, (1, 7, 5))
    assert metrics.match_batch(truth[[2]], truth).tolist() == [-1, -1, 0, -1]
    more = torch.cat([images(3, 8, (1, 7, 5)), truth])
    assert metrics.match_batch(more, truth).tolist() == [3, 4, 5, 6]
    assert metrics.match_batch(truth[:0], truth).tolist() == [-1] * 4
    placed = metrics.matched_images(truth[[2]], [-1, -1, 0, -1])
    assert [image is not None for image in placed] == [False, False, True, False]


# ------------------------------------------------------------------------------------------------ score
@pytest.mark.parametrize(
    ("estimated", "truth", "expected"),
    [
        ([7], [7], 1.0),
        ([7], [8], 0.0),
        ([3, 900, 41, 41], [41, 3, 41, 900], 1.0),
        ([3, 41, 41, 41], [41, 3, 41, 900], 0.75),
        ([41], [41, 3, 900, 41], 0.25),
        ([1, 2, 3, 4], [4], 0.25),
    ],
)
def test_timestep_accuracy_compares_multisets(estimated: list[int], truth: list[int], expected: float) -> None:
    assert metrics.timestep_accuracy(torch.tensor(estimated), torch.tensor(truth)) == pytest.approx(expected)
    with pytest.raises(NotApplicable, match="no true timesteps"):
        metrics.timestep_accuracy(torch.tensor(estimated), torch.tensor([]))


def test_timesteps_are_scored_where_there_are_some() -> None:
    truth, drawn = images(2, 9), torch.tensor([5, 70, 5, 8])  # two local steps of two images
    found = Reconstruction(images=truth, timesteps=torch.tensor([5, 5, 8, 9]))
    row = metrics.score(found, truth, None, truth_timesteps=drawn, lpips_nets=()).as_row()
    assert row["timestep_accuracy"] == 0.75
    silent = metrics.score(Reconstruction(images=truth), truth, None, truth_timesteps=drawn, lpips_nets=()).as_row()
    assert silent["timestep_accuracy"] is None
    assert silent["missing"]["timestep_accuracy"] == "the attack estimates no timesteps"
    classifier = metrics.score(found, truth, None, lpips_nets=()).as_row()
    assert "timestep_accuracy" not in {*classifier, *classifier["missing"]}


def test_placeholders_are_not_scored() -> None:
    truth = images(3, 9)
    found = Reconstruction(images=truth, timesteps=torch.tensor([1, 2, 3]), represents="timesteps")
    scores = metrics.score(found, truth, None, truth_timesteps=torch.tensor([3, 2, 1]), lpips_nets=("squeeze",))
    assert (scores.psnr_db, scores.mse, scores.ssim, scores.lpips) == (None, None, None, {})
    assert scores.assignment == (-1, -1, -1)
    assert scores.timestep_accuracy == 1.0
    names = ("images", "psnr_db", "mse", "ssim", "lpips-squeeze")
    assert {scores.missing[name] for name in names} == {"the attack finds timesteps and makes no images"}


def test_score_follows_the_truths_order() -> None:
    truth = images(3, 9)
    found = Reconstruction(images=(truth[[2, 0, 1]] * 0.5), labels=torch.tensor([5, 3, 4]))
    scores = metrics.score(found, truth, torch.tensor([3, 4, 5]), lpips_nets=())
    assert scores.assignment == (1, 2, 0)
    assert scores.mse == pytest.approx(metrics.mse(truth * 0.5, truth).tolist())
    assert scores.psnr_db == pytest.approx(metrics.psnr_db(truth * 0.5, truth).tolist())
    assert scores.label_accuracy == 1.0
    assert scores.missing == {}
    assert set(scores.as_row()) == {"mse", "psnr_db", "ssim", "lpips", "label_accuracy", "assignment", "missing"}


def test_small_images_miss_ssim_and_lpips_with_reasons() -> None:
    truth = images(2, 10, (1, 7, 5))
    scores = metrics.score(Reconstruction(images=truth), truth, None, lpips_nets=("squeeze", "vgg"))
    assert scores.ssim is None
    assert "at least 11 pixels, got '7x5'" in scores.missing["ssim"]
    assert scores.lpips == {}
    assert "17 pixels" in scores.missing["lpips-squeeze"]
    assert set(scores.missing) == {"ssim", "lpips-squeeze", "lpips-vgg", "label_accuracy"}
    assert scores.psnr_db == pytest.approx((200.0, 200.0))


def test_score_with_fewer_images_leaves_gaps() -> None:
    truth = images(3, 11)
    scores = metrics.score(Reconstruction(images=truth[[1]]), truth, None, lpips_nets=())
    assert scores.mse == (None, 0.0, None)
    assert scores.missing["images"] == "2 of 3 true images have no reconstruction"
    nothing = metrics.score(Reconstruction(images=truth[:0]), truth, None, lpips_nets=())
    assert nothing.psnr_db is None
    assert "no pair" in nothing.missing["psnr_db"]


def test_one_image_for_a_batch_is_compared_with_every_image_and_none_is_chosen() -> None:
    truth = images(4, 13)
    found = Reconstruction(images=truth[[2]], labels=torch.tensor([1]), represents="user")
    scores = metrics.score(found, truth, torch.tensor([1, 1, 0, 0]), lpips_nets=())
    assert scores.assignment == (0, 0, 0, 0)
    assert scores.psnr_db == pytest.approx(metrics.psnr_db(truth[[2]].expand(truth.shape), truth).tolist())
    assert len(scores.ssim) == 4
    assert scores.label_accuracy is None
    assert scores.missing == {"label_accuracy": "one image stands for the batch"}
    mean = truth.double().mean(0, keepdim=True)
    told = float(metrics.psnr_db(truth[[2]].double(), mean))
    assert scores.representative == pytest.approx({"nearest": 2, "nearest_psnr_db": 200.0, "batch_mean_psnr_db": told})
    assert scores.as_row()["representative"]["nearest"] == 2
    with pytest.raises(FedattackError, match="images that represent a user must be exactly one, got 2"):
        metrics.score(Reconstruction(images=truth[:2], represents="user"), truth, None)


def test_no_single_image_is_closer_to_a_batch_than_its_mean() -> None:
    truth = images(5, 14)
    mean = metrics.batch_mean(truth)
    assert mean.shape == truth.shape
    assert torch.equal(mean[0], mean[4])
    best = float(metrics.mse(mean, truth).mean())
    for other in (mean + 0.01 * images(1, 15), *(image.expand(truth.shape) for image in truth)):
        assert float(metrics.mse(other, truth).mean()) > best


@pytest.mark.parametrize(
    ("value", "words"), [(float("nan"), "finite"), (float("inf"), "finite"), (1.5, "in [0, 1]"), (-0.1, "in [0, 1]")]
)
def test_broken_pixels_are_an_error(value: float, words: str) -> None:
    truth, broken = images(1, 12), images(1, 12)
    broken[0, 0, 0, 0] = value
    with pytest.raises(FedattackError, match=words.replace("[", r"\[")):
        metrics.score(Reconstruction(images=broken), truth, None)


def test_other_shapes_are_an_error() -> None:
    with pytest.raises(FedattackError, match="shape"):
        metrics.mse(images(1), images(2))
    with pytest.raises(FedattackError, match="must be"):
        metrics.score(Reconstruction(images=images(1, 0, (1, 7, 5))), images(1, 0, (1, 5, 7)), None)


# ------------------------------------------------------------------------------------------------ LPIPS
@needs_squeeze
@pytest.mark.usefixtures("torch_home")
@pytest.mark.parametrize("channels", [1, 3])
def test_lpips_is_zero_for_equals_and_grows_with_noise(channels: int, capsys: pytest.CaptureFixture[str]) -> None:
    truth = images(2, 13, (channels, 32, 17))
    noise = torch.randn(truth.shape, generator=torch.Generator().manual_seed(1))
    state = torch.random.get_rng_state()
    zero, little, much = (
        metrics.lpips((truth + scale * noise).clamp(0, 1), truth, "squeeze") for scale in (0.0, 0.05, 0.5)
    )
    assert torch.equal(state, torch.random.get_rng_state())
    assert zero.shape == (2,)
    assert zero.dtype == torch.float64
    assert zero.tolist() == [0.0, 0.0]
    assert bool((little > 0).all())
    assert bool((much > little).all())
    assert capsys.readouterr().out == ""


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("net", sorted(metrics.LPIPS_MIN_SIDE))
def test_lpips_size_limits_are_those_of_the_backbones(net: str) -> None:
    from lpips import pretrained_networks

    kinds = {"alex": "alexnet", "squeeze": "squeezenet", "vgg": "vgg16"}
    side = metrics.LPIPS_MIN_SIDE[net]
    with torch.device("meta"):
        backbone = getattr(pretrained_networks, kinds[net])(pretrained=False)
        backbone(torch.zeros(1, 3, side, side))
        with pytest.raises(RuntimeError):
            backbone(torch.zeros(1, 3, side - 1, side - 1))


def test_lpips_without_its_backbone_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    truth = images(1, 14, (3, 32, 32))
    with pytest.raises(MissingDependency, match="TORCH_HOME"):
        metrics.lpips(truth, truth, "vgg")
    scores = metrics.score(Reconstruction(images=truth), truth, None, lpips_nets=("alex",))
    assert "alexnet" in scores.missing["lpips-alex"]
    assert scores.lpips == {}


def test_lpips_refuses_what_it_cannot_see() -> None:
    with pytest.raises(FedattackError, match="one of alex, squeeze, vgg"):
        metrics.lpips(images(1), images(1), "sqeeze")
    with pytest.raises(NotApplicable, match="1 or 3"):
        metrics.lpips(images(1, 0, (2, 32, 32)), images(1, 0, (2, 32, 32)), "vgg")


# ------------------------------------------------------------------------------------------------ baselines
def test_baselines() -> None:
    public, truth = images(6, 15, (3, 7, 5)), images(4, 16, (3, 7, 5))
    truth[2] = public[5]
    found = metrics.baselines(public, truth, generator=torch.Generator().manual_seed(0))
    again = metrics.baselines(public, truth, generator=torch.Generator().manual_seed(0))
    assert set(found) == {"mean-image", "nearest-public", "noise"}
    for name, batch in found.items():
        assert batch.shape == truth.shape
        assert batch.dtype == torch.float32
        assert torch.equal(batch, again[name])
        metrics.score(Reconstruction(images=batch), truth, None, lpips_nets=())
    torch.testing.assert_close(found["mean-image"][1], public.mean(dim=0))
    assert torch.equal(found["nearest-public"][2], public[5])
    for i in range(4):
        distances = [float(metrics.mse(p[None], truth[i][None])) for p in public]
        assert torch.equal(found["nearest-public"][i], public[min(range(6), key=distances.__getitem__)])

"""GG-CDM: steps against their formulas, chains against the sampler, the posterior's mean against Gaussians in closed form."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from attack_cases import Case, prior_of
from conftest import update_from
from torch import Tensor, nn

from attacks.coefficients import Cosines, Equations, dct
from attacks.gg_cdm import GGCDM, Chain, by_posterior, errors, on_the_sphere
from attacks.matching import pose
from attacks.posterior import linearise
from fedattack.errors import FedattackError, MissingKnowledge
from fedattack.jobs import attack_update
from fedattack.metrics import psnr_db
from fedattack.models import build_model
from fedattack.priors import Prior, draw_noises, load_prior, sample
from fedattack.seeding import derive_generator
from fedattack.tasks import Classification, Diffusion
from fedattack.types import Knowledge, silent

SHAPE = (3, 8, 8)
VARIANCE = 0.09
MLP = Case("mlp", "mlp", {"hidden": (32,), "activation": "sigmoid"})


def victim(image: Tensor, sigma: float = 0.0, dtype: torch.dtype = torch.float64):
    """Model, update and what the server knows; sigma in units of the update's rms."""
    model = MLP.build_model(1).to(dtype)
    update = update_from(model, image[None], torch.tensor([2]), dtype=dtype)
    if sigma:
        rms = math.sqrt(sum(float(t.square().sum()) for t in update.received.values()) / count_of(update))
        generator = derive_generator(0, "defense")
        noisy = {n: t + sigma * rms * torch.randn(t.shape, generator=generator) for n, t in update.received.items()}
        update = replace(update, received=noisy)
    return model, update, Knowledge(image_shape=SHAPE, batch_size=1, num_classes=4, prior=prior_of(SHAPE))


def count_of(update) -> int:
    return sum(t.numel() for t in update.received.values())


def attack(model, update, knowledge, seed: int = 0, progress=silent, **settings):
    generator = derive_generator(seed, "attack")
    return GGCDM(**settings).reconstruct(
        update, model, Classification(), knowledge, generator=generator, progress=progress
    )


class Gaussian(nn.Module):
    """The best ε-prediction where images are N(0, s²·I)."""

    def __init__(self, task: Diffusion, variance: float) -> None:
        super().__init__()
        self.table, self.variance = task.alphas_cumprod, variance

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        a = self.table[timesteps].to(x.dtype).reshape(-1, 1, 1, 1)
        return (1 - a).sqrt() / (a * self.variance + 1 - a) * x


def gaussian_prior(variance: float = VARIANCE) -> Prior:
    task = Diffusion(num_train_timesteps=400, beta_end=0.05)
    return Prior(Gaussian(task, variance), task, SHAPE, "toy")


def gaussian_images(count: int = 64) -> Tensor:
    """In [0, 1] but for tails, as such a prior has them in [−1, 1]."""
    return 0.5 + 0.5 * VARIANCE**0.5 * torch.randn((count, *SHAPE), generator=derive_generator(8, "public"))


@dataclass(frozen=True)
class Linear(Equations):
    """y = M·u + n."""

    matrix: Tensor | None = None

    def simulated(self, u: Tensor, transformable: bool = True) -> Tensor:
        return self.matrix @ u


def linear_equations(rows: int = 400, sigma: float = 0.5, seed: int = 0) -> tuple[Linear, Tensor]:
    """Equations and the truth u: directions told a thousand times better than others."""
    n = math.prod(SHAPE)
    generator = derive_generator(seed, "linear")
    matrix = torch.randn(rows, n, generator=generator, dtype=torch.float64) * torch.logspace(-3, 0, n).double()
    u = 0.3 * torch.randn(n, generator=generator, dtype=torch.float64)
    observed = matrix @ u + sigma * torch.randn(rows, generator=generator, dtype=torch.float64)
    return Linear(None, Cosines.of(SHAPE, observed), observed, 1e-12, matrix), u


def chain_of(prior: Prior, image: Tensor, **settings) -> Chain:
    model, update, knowledge = victim(image)
    problem = pose(update, model, Classification(), replace(knowledge, labels=torch.tensor([2])), precision="float64")
    return Chain(GGCDM(guidance="posterior", **settings), problem, prior, derive_generator(3, "chain"), silent, None)


# ------------------------------------------------------------------------------------------------ the spherical step
def test_the_spherical_step_is_that_of_dsg(random_images):
    """d* = −r·g/‖g‖, d = d_s + m·(d* − d_s), r·d/‖d‖ with r = σ√n, written out for one image."""
    sample_of, slope = random_images((3, 2, *SHAPE), 1) - 0.5, random_images((3, 2, *SHAPE), 2) - 0.5
    sigma, share = 0.3, 0.2
    found = on_the_sphere(sample_of, slope, sigma, share)
    r = sigma * math.sqrt(3 * 8 * 8)
    for i in range(3):
        for j in range(2):
            d_star = -r * slope[i, j] / slope[i, j].norm()
            d = sample_of[i, j] + share * (d_star - sample_of[i, j])
            torch.testing.assert_close(found[i, j], r * d / d.norm())
    lengths = found.flatten(2).norm(dim=2)
    torch.testing.assert_close(lengths, torch.full_like(lengths, r))


def test_only_the_direction_of_the_slope_matters(random_images):
    sample_of, slope = random_images((1, 1, *SHAPE), 1) - 0.5, random_images((1, 1, *SHAPE), 2) - 0.5
    torch.testing.assert_close(
        on_the_sphere(sample_of, slope, 0.3, 0.2), on_the_sphere(sample_of, 1e-6 * slope, 0.3, 0.2)
    )
    straight = on_the_sphere(sample_of, slope, 0.3, 1.0)
    assert float(torch.cosine_similarity(straight.flatten(), -slope.flatten(), dim=0)) == pytest.approx(1.0)
    torch.testing.assert_close(
        on_the_sphere(sample_of, torch.zeros_like(slope), 0.3, 0.0),
        0.3 * math.sqrt(192) * sample_of / sample_of.norm(),
    )


# ------------------------------------------------------------------------------------------------ chains
def test_without_guidance_the_chain_is_the_priors_own_sampler(random_images):
    """prior.sample with the same noise, unclipped, for DDPM and for DDIM."""
    model, update, knowledge = victim(random_images(SHAPE))
    prior = load_prior(knowledge.prior)
    for eta in (1.0, 0.4):
        found = attack(model, update, knowledge, guidance="none", sampling_steps=6, eta=eta, clip=False, restarts=2)
        generator = derive_generator(0, "attack")
        latent = torch.randn((2, 1, *SHAPE), generator=generator)
        noises = draw_noises(prior.task, latent, generator, steps=5, eta=eta)[:4]
        more = [torch.randn(latent.shape, generator=generator) for _ in range(6 - len(noises))]
        drawn = [noise.flatten(0, 1) for noise in [*noises, *more]]
        with torch.no_grad():
            images = sample(prior, latent.flatten(0, 1), steps=6, eta=eta, noises=[*drawn[:5], None])
        torch.testing.assert_close(found.images, (0.5 + 0.5 * images[:1]).clamp(0, 1), rtol=1e-4, atol=1e-4)


def test_no_guidance_looks_at_no_update(random_images):
    settings = {"guidance": "none", "sampling_steps": 4, "restarts": 3}
    found = [attack(*victim(random_images(SHAPE, seed)), **settings).images for seed in (0, 1)]
    assert torch.equal(*found)


@pytest.mark.parametrize("start", ["noise", "second-order(restarts=1)"])
def test_no_step_is_no_guidance(random_images, start):
    model, update, knowledge = victim(random_images(SHAPE))
    settings = {"sampling_steps": 5, "start_from": start, "start_at": 0.6}
    still = attack(model, update, knowledge, guidance="dps", step_size=0.0, **settings)
    none = attack(model, update, knowledge, guidance="none", **settings)
    torch.testing.assert_close(still.images, none.images)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"mixing_schedule": "linear", "mixing": 0.5},
        {"distance": "cosine"},
        {"eta": 0.5},
        {"guidance": "dps", "step_size": 10.0},
        {"guidance": "dps", "step_size": 10.0, "distance": "cosine", "eta": 0.0},
        {"guidance": "posterior", "linearisations": 3},
        {"guidance": "posterior", "linearisations": 3, "eta": 0.0, "dense_limit": 10},
    ],
    ids=lambda settings: " ".join(str(value) for value in settings.values()) or "default",
)
def test_guidance_comes_closer_to_the_update_than_none(patches, settings):
    """In its own distance and in the picture, for every kind of guidance; the losses tell of every step and of the end."""
    image = patches.private.images([3])[0].double()
    case = victim(image)
    common = {"sampling_steps": 25, "restarts": 2}
    found = attack(*case, **common, **settings)
    alone = attack(*case, **common, guidance="none", distance=settings.get("distance", "l2"))
    assert found.losses[-1] < 0.8 * alone.losses[-1]
    assert float(psnr_db(found.images, image[None])) > float(psnr_db(alone.images, image[None]))
    assert len(found.losses) == 26
    assert found.steps == 25
    assert found.diagnostics["loss"] == found.losses[-1] <= found.diagnostics["worst_restart_loss"]


@pytest.mark.parametrize(
    "settings",
    [
        {"restarts": 3},
        {"guidance": "dps", "sampling_steps": 5},
        {"guidance": "posterior", "average": False, "iterations": 1},
        {"guidance": "none", "restarts": 3, "average": True, "sampling_steps": 4},
    ],
    ids=lambda settings: " ".join(str(value) for value in settings.values()),
)
def test_the_way_is_that_of_the_kept_chain(random_images, settings):
    """The distance of every snapshot, or of the chains' mean, computed anew, is its step's loss; the last is the result."""
    model, update, knowledge = victim(random_images(SHAPE), sigma=0.1)
    known = replace(knowledge, labels=torch.tensor([2]))
    found = attack(model, update, known, **{"sampling_steps": 30, "precision": "float64"} | settings)
    steps = settings.get("sampling_steps", 30)
    assert found.trajectory is not None
    assert found.trajectory.shape == (min(12, steps + 1), 1, *SHAPE)
    assert found.trajectory.dtype == torch.float32
    assert (found.trajectory_steps[0], found.trajectory_steps[-1]) == (0, steps)
    assert torch.equal(found.trajectory[-1], found.images)
    silence = math.sqrt(sum(float(t.square().sum()) for t in update.received.values()))
    for step, images in zip(found.trajectory_steps, found.trajectory, strict=True):
        there = update_from(model, images.double(), torch.tensor([2]), dtype=torch.float64).received
        off = math.sqrt(sum(float((there[name] - t).square().sum()) for name, t in update.received.items()))
        assert off / silence == pytest.approx(found.losses[step], rel=1e-4)


def test_the_way_of_an_average_ends_in_it(random_images):
    found = attack(*victim(random_images(SHAPE)), sampling_steps=3, restarts=2, average=True)
    assert found.trajectory is not None
    assert found.trajectory_steps == (0, 1, 2, 3)
    assert torch.equal(found.trajectory[-1], found.images)


def test_controls_are_named_by_the_attack():
    """The prior alone keeps what its sampler is, and nothing of the guidance; it has no controls of its own."""
    controls = GGCDM(guidance="dps", sampling_steps=20, eta=0.5, restarts=3, step_size=0.1).controls()
    assert [(control.kind, control.attack, control.parameters) for control in controls] == [
        ("prior-alone", "", {"sampling_steps": 20, "eta": 0.5, "guidance": "none"}),
        ("unrelated-update", "", None),
        ("peer", "linear-leak", {}),
        ("peer", "inverting-gradients", {"iterations": 60}),
        ("peer", "gaussian-map", {}),
    ]
    assert GGCDM(**controls[0].parameters).controls() == ()


def test_the_controls_of_an_average_and_of_a_start_are_as_strong_as_they():
    """The prior alone averages too; its peer gets no less than its default, or the evaluations that were counted."""

    def found(**settings):
        alone, _, _, *peers = GGCDM(sampling_steps=10, **settings).controls()
        return alone.parameters, [(peer.kind, peer.attack, peer.parameters) for peer in peers]

    matching, statistical = ("peer", "inverting-gradients"), ("peer", "gaussian-map", {})
    averaged = {"guidance": "none", "sampling_steps": 10, "restarts": 3, "average": True}
    assert found(guidance="posterior", restarts=3) == (averaged, [(*matching, {}), statistical])
    assert found(average=True, restarts=3) == (averaged, [(*matching, {"iterations": 30}), statistical])
    single = {"guidance": "none", "sampling_steps": 10}
    assert found(guidance="posterior") == (single, [(*matching, {}), statistical])
    assert found(guidance="posterior", restarts=481, average=False) == (
        single,
        [(*matching, {"iterations": 4810}), statistical],
    )
    assert GGCDM(guidance="posterior", sigma=0.1).controls()[-1].parameters == {"sigma": 0.1}
    started = found(start_from="second-order(restarts=2)")
    assert started == (
        single,
        [(*matching, {"iterations": 10}), statistical, ("peer", "second-order", {"restarts": 2})],
    )


def test_a_chain_starts_where_another_attack_ended(patches):
    """From the exact image at 2 of 100 timesteps hardly anything changes; from noise everything does."""
    image = patches.private.images([3])[0].double()
    case = victim(image)
    near = attack(*case, guidance="none", sampling_steps=100, start_from="second-order(restarts=1)", start_at=0.02)
    far = attack(*case, guidance="none", sampling_steps=100)
    assert near.steps < 4
    assert float(psnr_db(near.images, image[None])) > float(psnr_db(far.images, image[None])) + 8.0


def test_a_hidden_label_is_inferred(random_images):
    model, update, knowledge = victim(random_images(SHAPE))
    settings = {"sampling_steps": 3}
    hidden = attack(model, update, knowledge, **settings)
    given = attack(model, update, replace(knowledge, labels=torch.tensor([2])), **settings)
    assert hidden.labels.tolist() == [2]
    assert torch.equal(hidden.images, given.images)


def test_what_cannot_work_is_refused(random_images):
    with pytest.raises(FedattackError, match=r"eta of the spherical guidance must be above 0, .*, got 0"):
        GGCDM(eta=0.0)
    with pytest.raises(FedattackError, match="did you mean 'spherical'"):
        GGCDM(guidance="sphere")
    with pytest.raises(FedattackError, match="distance of the posterior guidance"):
        GGCDM(guidance="posterior", distance="cosine")
    with pytest.raises(FedattackError, match="start must be one of"):
        GGCDM(start_from="nowhere")
    with pytest.raises(FedattackError, match="start_from must be 'noise' or an attack"):
        GGCDM(start_from="grey")
    with pytest.raises(FedattackError, match=r"start_at must be in \[0, 1\], got 3"):
        GGCDM(start_at=3)
    model, update, knowledge = victim(random_images(SHAPE))
    for shape in ((1, 8, 8), (3, 4, 4)):
        wrong = replace(knowledge, prior=prior_of(shape))
        with pytest.raises(FedattackError, match=r"images of prior .* must be of shape \(3, 8, 8\)"):
            attack(model, update, wrong, sampling_steps=2)
    with pytest.raises(MissingKnowledge, match="gg-cdm needs prior"):
        attack_update(
            GGCDM(), update, MLP.context, replace(knowledge, prior=None), generator=derive_generator(0, "attack")
        )


# ------------------------------------------------------------------------------------------------ the posterior's mean
@pytest.mark.parametrize("dense_limit", [1000, 0])
def test_the_mean_is_that_of_a_product_of_gaussians(dense_limit):
    sigma = 0.5
    equations, _ = linear_equations(sigma=sigma)
    generator = derive_generator(1, "anchors")
    anchors = torch.randn(2, math.prod(SHAPE), generator=generator, dtype=torch.float64)
    variances = 0.01 + 0.1 * torch.rand(math.prod(SHAPE), generator=generator, dtype=torch.float64)
    settings = {"before": None, "descent": None, "iterations": 3, "inner": 800, "dense_limit": dense_limit}
    likelihood = linearise(equations, 0 * anchors[0], anchors[0], variances, sigma=sigma, **settings)
    told = equations.matrix.T @ equations.matrix / sigma**2
    for anchor, found in zip(anchors, likelihood.mean(anchors, variances), strict=True):
        right = equations.matrix.T @ equations.observed / sigma**2 + anchor / variances
        exact = torch.linalg.solve(told + torch.diag(1 / variances), right)
        torch.testing.assert_close(found, exact, rtol=1e-3, atol=1e-3)
        assert float((found - anchor).norm()) > 0.1


def test_an_unknown_noise_level_is_read_off_the_residuals():
    for sigma in (0.02, 0.5):
        equations, u = linear_equations(rows=1500, sigma=sigma)
        settings = {"before": None, "descent": None, "iterations": 10, "inner": 100, "dense_limit": 1000}
        likelihood = linearise(equations, 0 * u, 0 * u, torch.full_like(u, VARIANCE), sigma=None, **settings)
        assert likelihood.sigma == pytest.approx(sigma, rel=0.06)


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 7, 5)])
def test_cosines_are_orthonormal_and_come_back(shape, random_images):
    images = random_images((2, *shape))
    basis = Cosines.of(shape, images)
    coefficients = basis.forward(images)
    torch.testing.assert_close(basis.back(coefficients), images)
    torch.testing.assert_close(coefficients.square().sum(), images.square().sum())
    flat = torch.full((1, *shape), 0.25, dtype=torch.float64)
    first = torch.zeros((1, *shape), dtype=torch.float64)
    first[0, 0, 0, 0] = 0.25 * math.sqrt(math.prod(shape))
    torch.testing.assert_close(basis.forward(flat), first)


def test_the_cosines_are_scipys():
    from scipy.fft import dct as reference

    torch.testing.assert_close(dct(7), torch.from_numpy(reference(torch.eye(7).double().numpy(), axis=0, norm="ortho")))


@pytest.mark.parametrize("public", [True, False])
def test_the_priors_errors_are_those_of_a_gaussian(random_images, public):
    """N(0, s²): Var(x0 | x_t) = s²(1 − ᾱ)/(ᾱs² + 1 − ᾱ) in every direction, measured on images or on the prior's own."""
    prior = gaussian_prior()
    chain = chain_of(prior, random_images(SHAPE), clip=False, sampling_steps=7)
    basis = Cosines.of(SHAPE, torch.zeros((), dtype=torch.float64))
    found = errors(chain, gaussian_images() if public else None, basis)
    assert found.shape == (7, math.prod(SHAPE))
    for row, now in zip(found, chain.times, strict=True):
        a = float(prior.task.alphas_cumprod[now])
        exact = VARIANCE * (1 - a) / (a * VARIANCE + 1 - a)
        assert float(row.mean()) == pytest.approx(exact, rel=0.05 if public else 0.15)
        assert float(row.std()) < 0.3 * exact


def test_chains_are_samples_of_the_posterior_and_their_mean_is_its_mean(random_images, monkeypatch):
    """Gaussian prior, linear equations: the mean and the variance that 80 chains must have are known.

    The variance is a little too small, as DDPM's own is in so many steps (its posterior variance is that for one image).
    """
    monkeypatch.setattr(Chain, "distances", lambda chain, images: torch.zeros(len(images)))  # of no interest here
    sigma, chains = 0.5, 80
    equations, _ = linear_equations(sigma=sigma)
    settings = {
        "clip": False,
        "sampling_steps": 200,
        "restarts": chains,
        "linearisations": 1,
        "iterations": 2,
        "smoothing_steps": 0,
    }
    precision = equations.matrix.T @ equations.matrix / sigma**2 + torch.eye(math.prod(SHAPE)) / VARIANCE
    covariance = torch.linalg.inv(precision)
    exact = covariance @ (equations.matrix.T @ equations.observed) / sigma**2
    chain = chain_of(gaussian_prior(), random_images(SHAPE), **settings)
    images, told = by_posterior(chain, equations, sigma, gaussian_images())
    samples = equations.basis.forward(2.0 * images - 1.0).reshape(chains, -1)
    error = (samples.mean(0) - exact) / (covariance.diagonal().sqrt() / math.sqrt(chains))
    assert float(error.square().mean()) < 1.5
    assert 0.8 < float((samples.var(0) / covariance.diagonal()).mean()) < 1.05
    assert told["noise_std"] == sigma


def test_a_clean_update_gives_the_exact_image(patches):
    image = patches.private.images([3])[0].double()
    found = attack(*victim(image), guidance="posterior", sampling_steps=4, linearisations=2)
    assert float(psnr_db(found.images, image[None])) > 100.0
    rounded = attack(*victim(image.float(), dtype=torch.float32), guidance="posterior", sampling_steps=4)
    assert float(psnr_db(rounded.images, image[None])) > 80.0


def test_a_batch_behind_relus_is_led_through_smoothed_copies(random_images):
    case = replace(MLP, options={"hidden": (32,), "activation": "relu"})
    update = update_from(case.build_model(1).double(), random_images((2, *SHAPE)).double(), torch.tensor([0, 2]))
    labels = torch.tensor([0, 2])
    knowledge = Knowledge(image_shape=SHAPE, batch_size=2, num_classes=4, labels=labels, prior=prior_of(SHAPE))
    told: list[tuple[int, int]] = []
    settings = {"guidance": "posterior", "sampling_steps": 2, "smoothing_steps": 2, "iterations": 2, "sigma": 1e-3}
    found = attack(
        case.build_model(1).double(), update, knowledge, progress=lambda *now: told.append(now[:2]), **settings
    )
    assert found.images.shape == (2, *SHAPE)
    assert (0, 2) in told  # the search before the first step is heard, so that a timeout can end it
    assert told == sorted(told)


def test_a_linearisation_that_explains_less_than_the_one_before_is_not_taken():
    sigma = 0.5
    equations, u = linear_equations(sigma=sigma)
    settings = {"sigma": sigma, "descent": None, "inner": 100, "dense_limit": 1000}
    variances = torch.full_like(u, VARIANCE)
    good = linearise(equations, 0 * u, 0 * u, variances, before=None, iterations=10, **settings)
    assert (
        linearise(equations, good.point + 5.0, u, variances, before=good, iterations=0, **settings).point is good.point
    )
    near = linearise(equations, good.point + 1e-4, u, variances, before=good, iterations=0, **settings)
    torch.testing.assert_close(near.point, good.point + 1e-4)


def test_under_noise_the_weights_are_those_of_the_noise(patches):
    """A prior trained for seconds: the posterior's mean beats the guidance, and says how much noise there is."""
    image = patches.private.images([3])[0].double()
    model, update, knowledge = victim(image, sigma=0.3)
    public = patches.public.images()
    knowledge = replace(knowledge, prior=prior_of(SHAPE, public), public_images=public)
    common = {"sampling_steps": 12, "restarts": 3}
    found = attack(model, update, knowledge, guidance="posterior", linearisations=2, **common)
    spherical = attack(model, update, knowledge, **common)
    assert float(psnr_db(found.images, image[None])) > float(psnr_db(spherical.images, image[None])) + 3.0
    rms = math.sqrt(sum(float(t.square().sum()) for t in update.received.values()) / count_of(update))
    assert found.diagnostics["noise_std"] == pytest.approx(rms * 0.3 / math.sqrt(1.09), rel=0.05)
    assert "chi_square" not in found.diagnostics  # noise that was read off the residuals always explains them
    told = attack(
        model, update, knowledge, guidance="posterior", linearisations=2, sigma=0.3 * rms / math.sqrt(1.09), **common
    )
    assert 0.9 < told.diagnostics["chi_square"] < 1.1
    assert found.diagnostics["chain_spread_rms"] > 0.005


def test_a_wide_model_is_solved_without_its_jacobian(random_images):
    """The same image by conjugate gradients as by the whole Jacobian."""
    model = build_model("lenet", image_shape=SHAPE, num_classes=4, seed=1, channels=4).double()
    update = update_from(model, random_images((1, *SHAPE)), torch.tensor([2]))
    knowledge = Knowledge(image_shape=SHAPE, batch_size=1, num_classes=4, prior=prior_of(SHAPE))
    settings = {"guidance": "posterior", "sampling_steps": 3, "linearisations": 2, "sigma": 1e-3, "inner_steps": 400}
    whole, free = (attack(model, update, knowledge, dense_limit=limit, **settings).images for limit in (4096, 0))
    torch.testing.assert_close(whole, free, rtol=0, atol=5e-3)

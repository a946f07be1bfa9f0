"""Timesteps of a federated DDPM's batch, read off the update by linear algebra: exact without noise, a posterior under it.

Source: own derivation, in `attacks.timesteps`. The row space of a dense layer's gradient is spanned by its inputs (Phong et al.
2018; Geiping et al., NeurIPS 2020, arXiv 2003.14053, Prop. 3.1), and those of the first time-embedding layer are a public
table; MUSIC (Schmidt 1986) tests the span, sparse Bayesian learning (Wipf, Rao 2007) gives the likelihood under noise.
Differs from it: the number of atoms is known (batch · local steps), they may repeat, and under noise the second layer's
likelihood counts too. The other attacks on diffusion clients take their t from the same function (`timesteps = "leak"`), where
GIDM's paper (arXiv 2405.20380) has the argmax of a softmax, which passes no gradient. This one stops there: it makes no images.
"""

import math
from dataclasses import dataclass, replace
from time import perf_counter
from typing import ClassVar

import torch
from torch import Tensor, nn

from attacks.noise import noise_level
from attacks.timesteps import infer_timesteps
from fedattack.errors import FedattackError, NotApplicable, must
from fedattack.tasks import Task
from fedattack.types import Knowledge, Progress, Reconstruction, Update, silent

MASS = 0.99
"""Of a credible set."""


@dataclass(frozen=True)
class TimestepLeak:
    """Diffusion clients: the timesteps of a batch from its time embedding's gradient, with a posterior over every t.

    sigma: of Gaussian noise on every entry of the gradient; None: of the known defense, else read off the update. sweeps: most
    passes of the search for the likeliest batch, under noise only.

    The result stands in `timesteps` (K,), ascending and in no relation to the images, K = batch · local steps, and in
    `timestep_posterior` (K,T), a row for each with the others held: the full posterior where K = 1, else a lower bound on
    the doubt. There are no images to find: the mean public image, or mid-grey, stands in for each and is not scored. The loss
    is the mean −log of the posterior mass of the choice. Diagnostics: members K; rank, how many of them are distinct; repeats,
    K − rank, which are placed by power and no more than a guess; exact, 1 where the equations alone tell the distinct ones;
    posterior_mass and credible_99, mass of the choice and size of the smallest set of timesteps that holds 99 %, both of the
    member in most doubt; noise_std, the noise assumed, in the gradient's units (rounding where there is no other). Raises
    NotApplicable where t is known already and wherever `infer_timesteps` does, models that embed no time among them.
    """

    name: ClassVar[str] = "timestep-leak"
    needs: ClassVar[frozenset[str]] = frozenset({"image_shape", "batch_size"})
    tasks: ClassVar[frozenset[str]] = frozenset({"diffusion"})

    sigma: float | None = None
    sweeps: int = 6

    def __post_init__(self) -> None:
        if self.sigma is not None and not 0 <= self.sigma < math.inf:
            raise FedattackError(must("sigma", "zero or positive, or None", self.sigma))
        if self.sweeps < 1:
            raise FedattackError(must("sweeps", "a whole number of at least 1", self.sweeps))

    def reconstruct(
        self,
        update: Update,
        model: nn.Module,
        task: Task,
        knowledge: Knowledge,
        *,
        generator: torch.Generator,
        progress: Progress = silent,
    ) -> Reconstruction:
        begun = perf_counter()
        if knowledge.timesteps is not None:
            raise NotApplicable("the timesteps are known already: nothing is left to find")
        sigma = self.sigma if self.sigma is not None else _known_noise(update, knowledge)
        found = infer_timesteps(update, model, task, knowledge, sigma=sigma, sweeps=self.sweeps)
        members = torch.arange(len(found.timesteps), device=found.timesteps.device)
        mass = found.posterior[members, found.timesteps]
        loss = max(0.0, -float(mass.clamp_min(torch.finfo(mass.dtype).tiny).log().mean()))
        progress(1, 1, loss)
        return Reconstruction(
            images=stand_in(knowledge),
            timesteps=found.timesteps,
            timestep_posterior=found.posterior.float(),
            losses=(loss,),
            steps=1,
            seconds=perf_counter() - begun,
            diagnostics={
                "members": float(len(members)),
                "rank": float(found.rank),
                "repeats": float(len(members) - found.rank),
                "exact": float(found.exact),
                "posterior_mass": float(mass.min()),
                "credible_99": float(max(len(found.credible_set(k, MASS)) for k in members.tolist())),
                "noise_std": found.sigma,
            },
            represents="timesteps",
        )


def stand_in(knowledge: Knowledge) -> Tensor:
    """The mean public image, or mid-grey, for every image of the batch, (B,C,H,W) float32."""
    assert knowledge.image_shape is not None
    assert knowledge.batch_size is not None
    public = knowledge.public_images
    if public is None or not len(public):
        return torch.full((knowledge.batch_size, *knowledge.image_shape), 0.5)
    mean = public.double().mean(0, keepdim=True).float().clamp(0.0, 1.0)
    return mean.repeat(knowledge.batch_size, 1, 1, 1)


def _known_noise(update: Update, knowledge: Knowledge) -> float | None:
    """Of the known defense in the units of `update.gradient(learning_rate)`, None where no Gaussian noise is known of."""
    if knowledge.learning_rate is None:
        knowledge = replace(knowledge, learning_rate=1.0)  # the difference of weights itself is then the gradient
    return noise_level(update, knowledge) or None

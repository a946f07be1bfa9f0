"""The types that travel between the rooms: what the server copied, what the attacker knows, what it found.

Images are float NCHW in [0, 1] everywhere; the first layer of a model normalises.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from fedattack.tasks import Task

State = dict[str, Tensor]
"""Named tensors of a model (parameters, and floating-point buffers where they are sent)."""

Private = Mapping[str, Tensor]
"""The private variables of one gradient step, named as the task names them: images, labels, noise, timesteps."""

UpdateKind = Literal["gradient", "weights"]

Represents = Literal["images", "user", "timesteps"]

Progress = Callable[[int, int, float], None]
"""Called as progress(iteration, iterations, loss). It may raise to stop the attack."""


def silent(iteration: int, iterations: int, loss: float) -> None:
    """The progress that shows nothing."""


@dataclass(frozen=True, slots=True)
class Update:
    """What an honest-but-curious server holds about one client in one round: facts only, nothing derived.

    `received` is what arrived, after the client's defenses. For kind "gradient" it holds one tensor per parameter,
    the mean gradient over the client's batch; for kind "weights" the client's model after local training.
    """

    round: int
    client: str
    sent: State
    received: State
    kind: UpdateKind
    num_examples: int | None = None

    def gradient(self, learning_rate: float | None = None) -> State:
        """The (pseudo-)gradient of every parameter: what arrived, or (sent − received) / learning_rate.

        Without a learning rate the weight difference itself is given (a positive multiple, which ratios and cosines ignore).
        """
        if self.kind == "gradient":
            return dict(self.received)
        scale = 1.0 if learning_rate is None else 1.0 / learning_rate
        return {
            name: (self.sent[name] - tensor) * scale
            for name, tensor in self.received.items()
            if name in self.sent and tensor.is_floating_point()
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Knowledge:
    """What the attacker knows. Every field is a value or None (hidden); a threat model says which are visible.

    labels (B,) int64 · timesteps (B,) int64 · noise (B,C,H,W) · public_images (N,C,H,W) in [0, 1]. `labels`, `timesteps`
    and `noise` are never the server's to see: where they are given they are oracles, and every result row says so.
    history: other updates of the same client that the attacker takes to hold the same images. defense: as a configuration
    writes it. prior: a folder or hub name of a diffusion model.
    """

    image_shape: tuple[int, int, int] | None = None
    batch_size: int | None = None
    num_classes: int | None = None
    labels: Tensor | None = None
    timesteps: Tensor | None = None
    noise: Tensor | None = None
    learning_rate: float | None = None
    local_steps: int | None = None
    local_batch_size: int | None = None
    proximal_mu: float | None = None
    defense: str | None = None
    prior: str | None = None
    public_images: Tensor | None = None
    history: tuple[Update, ...] | None = None

    def known(self) -> frozenset[str]:
        """The names of the fields that have a value."""
        return frozenset(f.name for f in fields(self) if getattr(self, f.name) is not None)


@dataclass(frozen=True, slots=True)
class Reconstruction:
    """What an attack found. images (B,C,H,W) in [0, 1]; the others are the attack's own estimates or None.

    `losses` is the attack's own loss along its best run, `diagnostics` plain numbers that say how much to believe it.
    represents: "images", one for each true image of the batch; "user", exactly one image that stands for the whole batch;
    "timesteps", the timesteps alone were looked for, the images are a placeholder for each true one and are not scored.
    timestep_posterior (K,T): the probability of every t for each of `timesteps` (K,).
    trajectory (S,B,C,H,W) in [0, 1]: the images at a few steps of the way, the last of them the result; trajectory_steps: at
    which, counted as `losses` are.
    """

    images: Tensor
    labels: Tensor | None = None
    timesteps: Tensor | None = None
    noise: Tensor | None = None
    losses: tuple[float, ...] = ()
    steps: int = 0
    seconds: float = 0.0
    diagnostics: dict[str, float] = field(default_factory=dict)
    represents: Represents = "images"
    timestep_posterior: Tensor | None = None
    trajectory: Tensor | None = None
    trajectory_steps: tuple[int, ...] = ()


ControlKind = Literal["prior-alone", "unrelated-update", "peer"]
"""prior-alone: the attack's prior, led by nothing. unrelated-update: the attack on another client's update of the same
round. peer: another attack, without such a prior, on the same update. The first two show what a prior makes of anything:
yardsticks.
"""


@dataclass(frozen=True, slots=True)
class Control:
    """What runs beside an attack that makes images with a prior, or else the prior's own quality is taken for leakage.

    attack: a registered name, "" the attack itself; parameters: of it, None those of the attack itself.
    """

    kind: ControlKind
    attack: str = ""
    parameters: Mapping[str, Any] | None = None


class Attack(Protocol):
    """A frozen dataclass whose fields are the paper's hyper-parameters with the paper's defaults.

    `needs` names the Knowledge fields without which it cannot start; `tasks` the tasks it understands. An attack never
    changes the model, draws randomness from `generator` only, and picks its result by its own loss. One that makes images with
    a prior also has a method controls() -> Sequence[Control], and campaigns run those beside it.
    """

    name: ClassVar[str]
    needs: ClassVar[frozenset[str]]
    tasks: ClassVar[frozenset[str]]

    def reconstruct(
        self,
        update: Update,
        model: nn.Module,
        task: "Task",
        knowledge: Knowledge,
        *,
        generator: torch.Generator,
        progress: Progress = silent,
    ) -> Reconstruction: ...


class Defense:
    """The identity; a defense overrides what it changes. A frozen dataclass whose fields are its parameters.

    `on_batch` sees the client's images (B,C,H,W) and labels (B,) before the loss; `on_update` sees what would be sent as a
    (pseudo-)gradient: the gradient itself under FedSGD, the weight difference received − sent under FedAvg.
    """

    name: ClassVar[str] = "none"

    def on_batch(self, images: Tensor, labels: Tensor, *, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return images, labels

    def on_update(self, update: State, *, sent: State, generator: torch.Generator) -> State:
        return update

    def describe(self) -> dict[str, Any]:
        """Figures a reader wants beside the name, units in the keys (noise_std, noise_variance, clip_norm)."""
        return {}

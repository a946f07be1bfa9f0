"""What a client minimises, which of its variables are private, and local training as one differentiable function.

    update = defense(gradient of task.loss(model, private))          private = task.draw(images, labels, generator)

Clients and attacks both call `simulate`, so they cannot drift apart.
"""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, ClassVar, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad

from fedattack.errors import FedattackError, MissingKnowledge, must, one_of
from fedattack.seeding import seeded_default_generator
from fedattack.types import Knowledge, Private, State, UpdateKind

Predict = Callable[..., Tensor]
"""A model with its weights bound: predict(images) or predict(noisy_images, timesteps)."""


@dataclass(frozen=True)
class Variable:
    """One private variable as an attacker sees it before the attack: its shape and the box it must lie in.

    `discrete` values (class indices, timesteps) are relaxed by the task's own loss: labels as class probabilities
    (B,K), timesteps as real numbers.
    """

    shape: tuple[int, ...]
    low: float = -float("inf")
    high: float = float("inf")
    discrete: bool = False


class Task(Protocol):
    """Loss and private variables of one kind of training."""

    name: ClassVar[str]
    drawn: ClassVar[frozenset[str]]  # the variables that are drawn anew for every local step

    def draw(self, images: Tensor, labels: Tensor, *, generator: torch.Generator) -> Private:
        """Everything private of one gradient step, the client's own random draws included."""
        ...

    def loss(self, predict: Predict, private: Private) -> Tensor:
        """Scalar mean loss over the batch; differentiable in every private variable."""
        ...

    def variables(self, knowledge: Knowledge) -> dict[str, Variable]:
        """Every private variable with its shape; raises MissingKnowledge where a shape cannot be known."""
        ...


@dataclass(frozen=True)
class Classification:
    """Mean cross entropy. Private: images (B,C,H,W) in [0, 1], labels (B,) int64 or class probabilities (B,K)."""

    name: ClassVar[str] = "classification"
    drawn: ClassVar[frozenset[str]] = frozenset()

    def draw(self, images: Tensor, labels: Tensor, *, generator: torch.Generator) -> Private:
        return {"images": images, "labels": labels}

    def loss(self, predict: Predict, private: Private) -> Tensor:
        return F.cross_entropy(predict(private["images"]), private["labels"])

    def variables(self, knowledge: Knowledge) -> dict[str, Variable]:
        batch, shape = _batch_and_shape(knowledge)
        classes = _required(knowledge.num_classes, "num_classes")
        return {
            "images": Variable((batch, *shape), 0.0, 1.0),
            "labels": Variable((batch, classes), discrete=True),
        }


STATISTICS = ("running_mean", "running_var")
"""Last parts of the names of BatchNorm's statistics: fedavg sends them along, and no defense touches them."""

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace")
"""The noise schedules of diffusers' DDPMScheduler; squaredcos_cap_v2 and laplace do not use beta_start and beta_end."""


@dataclass(frozen=True)
class Diffusion:
    """DDPM training. Private: images (B,C,H,W) in [0, 1], noise (B,C,H,W), timesteps (B,) in 0 … T−1.

    Source: Ho et al., DDPM (arXiv 2006.11239), Algorithm 1; GIDM, Algorithm 1: t and ε are drawn privately for every image.
    The loss is the mean over all elements of ‖target − model(√ᾱ_t·x + √(1−ᾱ_t)·ε, t)‖² with x = 2·images − 1, the range
    every diffusers pipeline works in (so the U-Net itself has no normalising layer). Real-valued timesteps are allowed:
    ᾱ is then interpolated linearly, which makes t a continuous unknown.
    """

    name: ClassVar[str] = "diffusion"
    drawn: ClassVar[frozenset[str]] = frozenset({"noise", "timesteps"})
    num_train_timesteps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"

    def __post_init__(self) -> None:
        if self.prediction_type not in ("epsilon", "v_prediction"):
            raise FedattackError(one_of("prediction_type", ("epsilon", "v_prediction"), self.prediction_type))
        if self.beta_schedule not in BETA_SCHEDULES:
            raise FedattackError(one_of("beta_schedule", BETA_SCHEDULES, str(self.beta_schedule)))
        if type(self.num_train_timesteps) is not int or self.num_train_timesteps < 2:
            raise FedattackError(must("num_train_timesteps", "a whole number of at least 2", self.num_train_timesteps))
        if not 0.0 < self.beta_start <= self.beta_end < 1.0:
            got = (self.beta_start, self.beta_end)
            raise FedattackError(must("(beta_start, beta_end)", "0 < beta_start <= beta_end < 1", got))
        _ = self.alphas_cumprod  # now: a table first read inside a torch.func transform would be a dead wrapper

    def scheduler(self) -> Any:
        """A new diffusers DDPMScheduler of these settings."""
        from diffusers import DDPMScheduler

        return DDPMScheduler(
            num_train_timesteps=self.num_train_timesteps,
            beta_start=self.beta_start,
            beta_end=self.beta_end,
            beta_schedule=self.beta_schedule,
            prediction_type=self.prediction_type,
        )

    @cached_property
    def alphas_cumprod(self) -> Tensor:
        """ᾱ_t, (T,) float64, from the diffusers scheduler of the same settings."""
        table: Tensor = torch.cumprod(1.0 - self.scheduler().betas.double(), dim=0)
        return table

    def draw(self, images: Tensor, labels: Tensor, *, generator: torch.Generator) -> Private:
        timesteps = torch.randint(0, self.num_train_timesteps, (len(images),), generator=generator)
        noise = torch.randn(images.shape, generator=generator, dtype=images.dtype)
        return {"images": images, "noise": noise.to(images.device), "timesteps": timesteps.to(images.device)}

    def loss(self, predict: Predict, private: Private) -> Tensor:
        noise, timesteps = private["noise"], private["timesteps"]
        clean = 2.0 * private["images"] - 1.0
        alpha_bar = self._alpha_bar(timesteps).to(clean.dtype).reshape(-1, 1, 1, 1)
        signal, spread = alpha_bar.sqrt(), (1.0 - alpha_bar).sqrt()
        target = noise if self.prediction_type == "epsilon" else signal * noise - spread * clean
        return (predict(signal * clean + spread * noise, timesteps) - target).square().mean()

    def variables(self, knowledge: Knowledge) -> dict[str, Variable]:
        """Also refuses known timesteps and noise that cannot be those of this task (FedattackError)."""
        batch, shape = _batch_and_shape(knowledge)
        draws = sum(len(indices) for indices in schedule(knowledge))
        if knowledge.timesteps is not None:
            self._check_timesteps(knowledge.timesteps, draws)
        if knowledge.noise is not None and tuple(knowledge.noise.shape) != (draws, *shape):
            raise FedattackError(
                must("the shape of the known noise", str((draws, *shape)), tuple(knowledge.noise.shape))
            )
        return {
            "images": Variable((batch, *shape), 0.0, 1.0),
            "noise": Variable((draws, *shape)),
            "timesteps": Variable((draws,), 0.0, float(self.num_train_timesteps - 1), discrete=True),
        }

    def check_model(self, model: nn.Module, image_shape: tuple[int, ...]) -> None:
        """Raise FedattackError where the model, which stays untouched, embeds timestep 0 but not the last one that is drawn."""
        probed = deepcopy(model).eval()
        some = next(tensor for tensor in probed.state_dict().values() if tensor.is_floating_point())
        image = torch.zeros(1, *image_shape, dtype=some.dtype, device=some.device)

        def out_of_range(timestep: int) -> IndexError | None:
            try:
                with torch.no_grad(), seeded_default_generator(0):
                    probed(image, torch.tensor([timestep], device=some.device))
            except IndexError as error:
                return error
            except Exception:  # whoever trains or attacks the model meets it, too
                return None
            return None

        if (error := out_of_range(self.num_train_timesteps - 1)) and out_of_range(0) is None:
            rule = f"at most the number of timesteps that {type(model).__name__} embeds"
            raise FedattackError(must("num_train_timesteps", rule, self.num_train_timesteps)) from error

    def _check_timesteps(self, timesteps: Tensor, draws: int) -> None:
        if tuple(timesteps.shape) != (draws,):
            rule = f"{draws}, one for every image of every local step (batch_size, local_batch_size, local_steps)"
            raise FedattackError(must("the number of known timesteps", rule, tuple(timesteps.shape)))
        low, high = float(timesteps.min()), float(timesteps.max())
        if not (low >= 0 and high <= self.num_train_timesteps - 1):
            rule = f"in 0 … {self.num_train_timesteps - 1} (num_train_timesteps is {self.num_train_timesteps})"
            raise FedattackError(must("known timesteps", rule, timesteps.tolist()))

    def _alpha_bar(self, timesteps: Tensor) -> Tensor:
        table = self.alphas_cumprod.to(timesteps.device)
        if not timesteps.is_floating_point():
            return table[timesteps]
        below = timesteps.detach().floor().clamp(0, self.num_train_timesteps - 2).long()
        weight = timesteps.to(table.dtype) - below
        return table[below] * (1.0 - weight) + table[below + 1] * weight


TASKS: dict[str, type[Any]] = {"classification": Classification, "diffusion": Diffusion}


def build_task(name: str, parameters: Mapping[str, Any] | None = None) -> Task:
    """A task by name with its parameters."""
    if name not in TASKS:
        raise FedattackError(one_of("task", TASKS, name))
    task: Task = TASKS[name](**(parameters or {}))
    return task


# ------------------------------------------------------------------------------------------------ local training
def bind(model: nn.Module, state: State) -> Predict:
    """The model as a function with `state` in place of its own weights; the model itself is not touched."""
    return partial(_call, model, state)


def parameter_names(model: nn.Module) -> list[str]:
    """Names of the tensors that training changes, in the model's order."""
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def simulate_gradient(
    model: nn.Module,
    sent: State,
    task: Task,
    batches: Sequence[Private],
    *,
    learning_rate: float | None = None,
    proximal_mu: float = 0.0,
    transformable: bool = True,
) -> State:
    """The pseudo-gradient of local SGD: (sent − weights after it) / learning_rate, summed without the subtraction.

    One batch is one gradient (FedSGD, Algorithm 1) and needs no learning rate; k batches are k steps of plain SGD unrolled
    (FedAvg), with FedProx's term μ·(w − sent) where `proximal_mu` is given. Differentiable in every private variable.

    transformable: usable under torch.func's vmap, jvp and the like; False gives the same numbers by plain autograd, which
    is a quarter faster on small models.
    """
    gradient_at = _loss_gradient if transformable else _loss_gradient_by_autograd
    return _local_sgd(model, sent, task, batches, learning_rate, proximal_mu, gradient_at)[0]


def simulate(
    model: nn.Module,
    sent: State,
    task: Task,
    batches: Sequence[Private],
    *,
    kind: UpdateKind,
    learning_rate: float | None = None,
    proximal_mu: float = 0.0,
) -> State:
    """What a client sends back: the gradient of one batch, or its weights after one SGD step a batch.

    Floating-point buffers in `sent` (running statistics) come back with the weights, as training in the model's present
    mode left them. Raises FedattackError where kind and number of batches do not fit together.
    """
    if kind == "gradient":
        if len(batches) != 1:
            raise FedattackError(must("batches of a gradient update", "exactly one", len(batches)))
        return simulate_gradient(model, sent, task, batches)
    if learning_rate is None:
        raise MissingKnowledge("learning_rate must be known for an update that carries weights")
    total, buffers = _local_sgd(model, sent, task, batches, learning_rate, proximal_mu, _loss_gradient)
    weights = {name: sent[name] - learning_rate * gradient for name, gradient in total.items()}
    return {name: weights.get(name, buffers.get(name, sent[name])) for name in sent}


def _local_sgd(
    model: nn.Module,
    sent: State,
    task: Task,
    batches: Sequence[Private],
    learning_rate: float | None,
    proximal_mu: float,
    gradient_at: Callable[[nn.Module, State, State, Task, Private], tuple[State, State]],
) -> tuple[State, State]:
    """The summed pseudo-gradient of the parameters, and the buffers as the last step left them."""
    if missing := [name for name in parameter_names(model) if name not in sent]:
        raise FedattackError(
            f"the weights lack {', '.join(missing[:3])}: is {type(model).__name__} really their model?"
        )
    trained = {name: sent[name] for name in parameter_names(model)}
    fixed = dict(model.named_parameters()) | dict(model.named_buffers()) | sent
    fixed = {name: tensor.detach() for name, tensor in fixed.items() if name not in trained}
    total, fixed = gradient_at(model, trained, fixed, task, batches[0])
    if len(batches) > 1 and learning_rate is None:
        raise MissingKnowledge("learning_rate must be known to unroll more than one local step")
    for private in batches[1:]:
        assert learning_rate is not None
        weights = {name: trained[name] - learning_rate * total[name] for name in trained}
        step, fixed = gradient_at(model, weights, fixed, task, private)
        shrink = 1.0 - learning_rate * proximal_mu
        total = {name: shrink * total[name] + step[name] for name in total}
    return total, fixed


def _loss_gradient(model: nn.Module, weights: State, fixed: State, task: Task, private: Private) -> tuple[State, State]:
    """∂ task.loss / ∂ weights, and `fixed` after the forward pass (BatchNorm writes its statistics into a copy)."""

    def loss_at(at: State) -> tuple[Tensor, State]:
        copies = {name: tensor.clone() for name, tensor in fixed.items()}
        return task.loss(bind(model, {**copies, **at}), private), copies

    gradient, after = grad(loss_at, has_aux=True)(weights)
    return gradient, after


def _loss_gradient_by_autograd(
    model: nn.Module, weights: State, fixed: State, task: Task, private: Private
) -> tuple[State, State]:
    """`_loss_gradient` without torch.func: not to be used under its transforms."""
    recorded = torch.is_grad_enabled()
    with torch.enable_grad():
        at = {name: w if w.requires_grad else w.detach().requires_grad_() for name, w in weights.items()}
        copies = {name: tensor.clone() for name, tensor in fixed.items()}
        loss = task.loss(bind(model, {**copies, **at}), private)
        gradient = torch.autograd.grad(loss, list(at.values()), create_graph=recorded, materialize_grads=True)
    return dict(zip(at, gradient, strict=True)), {name: tensor.detach() for name, tensor in copies.items()}


def batch_indices(num_examples: int, batch_size: int, steps: int) -> list[list[int]]:
    """Which examples each local step uses: `batch_size` of them, on round and round through the data.

    The client shuffles its examples once a round and then keeps the order, so an attacker who numbers its unknowns in that
    order loses nothing: batch_indices(5, 2, 3) is [[0, 1], [2, 3], [4, 0]].
    """
    return [
        [(step * batch_size + i) % num_examples for i in range(min(batch_size, num_examples))] for step in range(steps)
    ]


def schedule(knowledge: Knowledge) -> list[list[int]]:
    """The local steps as an attacker may assume them: `batch_indices` with one full batch a step where nothing is known."""
    batch, _ = _batch_and_shape(knowledge)
    return batch_indices(batch, knowledge.local_batch_size or batch, knowledge.local_steps or 1)


def split_steps(task: Task, private: Private, steps: Sequence[Sequence[int]]) -> list[Private]:
    """One `Private` a local step. Data is looked up by index, what the task draws anew is cut in consecutive pieces."""
    batches: list[Private] = []
    start = 0
    for indices in steps:
        stop = start + len(indices)
        batches.append(
            {name: v[start:stop] if name in task.drawn else _rows(v, list(indices)) for name, v in private.items()}
        )
        start = stop
    return batches


def _rows(tensor: Tensor, indices: list[int]) -> Tensor:
    return tensor if indices == list(range(len(tensor))) else tensor[indices]


def join_steps(task: Task, images: Tensor, labels: Tensor, batches: Sequence[Private]) -> dict[str, Tensor]:
    """The inverse of `split_steps`: the data once, the draws of all steps one after another."""
    joined = {"images": images, "labels": labels}
    for name in task.drawn:
        joined[name] = torch.cat([private[name] for private in batches])
    return joined


def _call(model: nn.Module, state: State, *inputs: Tensor) -> Tensor:
    output: Tensor = functional_call(model, state, inputs)
    return output


def _required(value: int | None, name: str) -> int:
    if value is None:
        raise MissingKnowledge(f"{name} must be known to say how large the unknowns are")
    return value


def _batch_and_shape(knowledge: Knowledge) -> tuple[int, tuple[int, int, int]]:
    if knowledge.image_shape is None:
        raise MissingKnowledge("image_shape must be known to say how large the unknowns are")
    return _required(knowledge.batch_size, "batch_size"), knowledge.image_shape

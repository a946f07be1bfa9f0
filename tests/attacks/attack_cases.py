"""Victims that the contract and the blindfold try every registered attack on, and settings that keep it cheap."""

import atexit
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from conftest import update_from
from torch import Tensor

from fedattack.checkpoints import save_weights
from fedattack.models import build_model
from fedattack.registry import ATTACKS, parameters_of
from fedattack.seeding import derive_generator
from fedattack.tasks import Diffusion, Task, build_task
from fedattack.types import Attack, Knowledge, Update

CLASSES = 4


@dataclass(frozen=True, eq=False)
class Case:
    """One victim: model, task and batch, with images of its own size."""

    name: str
    model: str
    options: Mapping[str, Any] = field(default_factory=dict)
    task: str = "classification"
    task_options: Mapping[str, Any] = field(default_factory=dict)
    shape: tuple[int, int, int] = (3, 8, 8)
    batch: int = 1
    mode: str = "train"
    dtype: torch.dtype = torch.float64

    @property
    def context(self) -> dict[str, Any]:
        return {
            "model": {"name": self.model, "options": dict(self.options)},
            "image_shape": list(self.shape),
            "num_classes": CLASSES,
            "mode": self.mode,
            "task": {"name": self.task, "options": dict(self.task_options)},
        }

    def build_task(self) -> Task:
        return build_task(self.task, self.task_options)

    def build_model(self, seed: int) -> torch.nn.Module:
        model = build_model(self.model, image_shape=self.shape, num_classes=CLASSES, seed=seed, **dict(self.options))
        return model.train(self.mode == "train")

    def update(self, images: Tensor, labels: Tensor, **settings: Any) -> Update:
        """The client's update of weights that no other model instance here has (seed 1)."""
        model = self.build_model(seed=1).to(self.dtype)
        return update_from(model, images, labels, task=self.build_task(), dtype=self.dtype, **settings)


UNET = {"block_out_channels": (8,), "attention": (), "mid_attention": False, "norm_num_groups": 4}
CASES = [
    Case("mlp", "mlp", {"hidden": (24,), "activation": "sigmoid"}),
    Case("mlp-odd", "mlp", {"hidden": (16,), "activation": "relu"}, shape=(1, 7, 5), dtype=torch.float32),
    Case("mlp-batch", "mlp", {"hidden": (24,), "activation": "relu"}, batch=3),
    Case("lenet", "lenet", {"channels": 4}),
    Case("batch-norm", "convnet-small", {"width": 4, "norm": "batch", "activation": "tanh"}, batch=2),
    Case("unet", "unet", UNET, task="diffusion", task_options={"num_train_timesteps": 20}, shape=(1, 8, 8)),
]


def cheap(name: str, most: int = 2, restarts: int = 2, **wanted: Any) -> Attack:
    """A registered attack with every count of iterations (or the like) at `most`, and those of `wanted` that it has."""
    parameters = parameters_of(ATTACKS.get(name))
    settings: dict[str, Any] = {}
    for parameter, default in parameters.items():
        counted = any(word in parameter for word in ("iterations", "steps", "epochs", "generations"))
        if counted and isinstance(default, int) and not isinstance(default, bool) and default > most:
            settings[parameter] = most
        if parameter == "restarts" and isinstance(default, int):
            settings[parameter] = restarts
    settings |= {key: value for key, value in wanted.items() if key in parameters}
    attack: Attack = ATTACKS.create(name, **settings)
    return attack


@cache
def _prior_of(shape: tuple[int, int, int], trained_on: bytes) -> str:
    halved = shape[1] % 2 == 0 and shape[2] % 2 == 0
    options = {**UNET, "block_out_channels": (8, 16) if halved else (8,)}
    model = build_model("unet", image_shape=shape, num_classes=None, seed=0, **options)
    task = Diffusion(num_train_timesteps=100, beta_end=0.2, prediction_type="v_prediction")
    optimizer, generator = torch.optim.Adam(model.parameters(), 3e-3), derive_generator(0, "prior")
    images = torch.frombuffer(bytearray(trained_on or bytes(4)), dtype=torch.float32)
    for _ in range(150 if trained_on else 0):
        images = images.reshape(-1, *shape)
        some = images[torch.randint(len(images), (16,), generator=generator)]
        optimizer.zero_grad()
        task.loss(model, task.draw(some, torch.zeros(16), generator=generator)).backward()
        optimizer.step()
    folder = Path(mkdtemp(prefix="fedattack-prior-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    save_weights(folder, model, task, dict(model.state_dict()))
    return str(folder)


def prior_of(shape: tuple[int, int, int], public: Tensor | None = None) -> str:
    """A folder with a small DDPM for images of this shape: random weights, or trained for seconds on public images."""
    trained_on = b"" if public is None else public.float().contiguous().numpy().tobytes()
    return _prior_of(tuple(shape), trained_on)


def facts(case: Case, attack: Attack, public: Tensor | None = None, **more: Any) -> Knowledge:
    """What a training server knows, and of the other fields those that the attack cannot start without."""
    steps_draws = case.batch
    everything = {
        "labels": torch.arange(case.batch) % CLASSES,
        "timesteps": torch.arange(steps_draws) % 5,
        "noise": torch.zeros(steps_draws, *case.shape),
        "defense": "none",
    }
    if "prior" in attack.needs:
        everything["prior"] = prior_of(case.shape)
    knowledge = Knowledge(
        image_shape=case.shape,
        batch_size=case.batch,
        num_classes=CLASSES,
        learning_rate=0.1,
        local_steps=1,
        local_batch_size=case.batch,
        proximal_mu=0.0,
        public_images=public,
    )
    needed = {name: value for name, value in everything.items() if name in attack.needs}
    return replace(knowledge, **{**needed, **more})

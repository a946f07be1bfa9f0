"""Which layers of a model can be inverted in closed form, said before any private image is seen.

Two answers. Counting: for every convolution its unknowns, its gradient and weight constraints, and how many filters would
make enough of them (`fedattack.constraints`). Trying: a client is played with public images and the update is inverted by
the registered attack "r-conv", which says what rank and condition each layer's equations had; weights that switch filters off
have less than the count promises.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedattack.constraints import Convolution
from fedattack.data import load_dataset
from fedattack.errors import FedattackError, NotApplicable, must
from fedattack.metrics import match_batch, psnr_db
from fedattack.models import build_model, misfits
from fedattack.registry import ATTACKS
from fedattack.seeding import derive_generator
from fedattack.tasks import Classification, simulate
from fedattack.types import Attack, Knowledge, State, Update

INVERTER = "r-conv"

CONTRADICTION = 1e-3
"""Relative misfit of a weight's gradient from which on something before was wrong: nobody adds noise to a probe."""


@dataclass(frozen=True)
class Layer:
    """One convolution, counted. filters_for_gradients, filters_for_weights: from which filters on these constraints alone
    are as many as the unknowns (None: never, some pixels meet no kernel position)."""

    name: str
    shape: Convolution
    filters_for_gradients: int | None
    filters_for_weights: int


@dataclass(frozen=True)
class Probe:
    """What the attack said of one played client: diagnostics by layer, PSNR of each image, or why it refused."""

    diagnostics: Mapping[str, float]
    psnr_db: tuple[float, ...] = ()
    refusal: str = ""

    def of(self, layer: str, figure: str) -> float | None:
        """A figure of a layer ("rank", "unknowns", "condition", "hybrid", …), None where it was not reached."""
        return self.diagnostics.get(f"{layer}.{figure}")

    def hidden(self, layer: str) -> int | None:
        """How many unknowns of a layer's input its equations left undetermined."""
        unknowns, rank = self.of(layer, "unknowns"), self.of(layer, "rank")
        return None if unknowns is None or rank is None else int(unknowns - rank)

    def solved(self, layer: str) -> bool:
        """Whether a layer's equations determined its whole input, and its weight's gradient agrees with the result."""
        return self.hidden(layer) == 0 and (self.of(layer, "gradient_residual") or 0.0) < CONTRADICTION


@dataclass(frozen=True)
class Analysis:
    """Convolutions in the order in which the model runs them, and the probes."""

    batch: int
    layers: tuple[Layer, ...]
    probes: tuple[Probe, ...]

    def verdict(self, layer: Layer) -> str:
        """One line: invertible or not, by which equations, and what would close the gap."""
        reached = [probe for probe in self.probes if probe.hidden(layer.name) is not None]
        if not reached:
            return "not reached"
        solved = [probe for probe in reached if probe.solved(layer.name)]
        if len(solved) == len(reached):
            hybrid = any(probe.of(layer.name, "hybrid") for probe in solved)
            how = "with its outputs too" if hybrid else "by gradients alone"
            return f"invertible {how}{self._often(len(solved))}"
        often = self._often(len(reached) - len(solved))
        most = max(probe.hidden(layer.name) or 0 for probe in reached)
        if not most:
            return f"equations contradict one another{often}: a layer behind was not determined"
        needed = layer.filters_for_gradients
        more = f"{needed} active filters would do" if needed is not None else "some pixels meet no kernel position"
        return f"up to {most} unknowns undetermined{often}; {more}"

    def _often(self, count: int) -> str:
        """Nothing for all probes; the others were refused before this layer, or ended otherwise."""
        return "" if count == len(self.probes) else f" in {count} of {len(self.probes)} probes"


def count_layers(model: nn.Module, image_shape: Sequence[int], batch: int = 1) -> tuple[Layer, ...]:
    """Every convolution that one forward pass runs, whatever stands between them."""
    found: list[Layer] = []

    def seen(name: str, module: nn.Conv2d, images: Tensor) -> None:
        shape = Convolution.of(module, images.shape[2], images.shape[3])
        found.append(Layer(name, shape, shape.filters_for_gradients(batch), shape.filters_for_weights()))

    def hook(name: str) -> Any:
        return lambda module, inputs: seen(name, module, inputs[0])

    handles = [
        module.register_forward_pre_hook(hook(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d)
    ]
    mode = model.training
    try:
        with torch.no_grad():
            some = next(model.parameters())
            model.eval()(torch.full((1, *image_shape), 0.5, dtype=some.dtype))
    finally:
        model.train(mode)
        for handle in handles:
            handle.remove()
    return tuple(found)


def analyse(
    name: str,
    options: Mapping[str, Any],
    images: Tensor,
    num_classes: int,
    *,
    batch: int = 1,
    seed: int = 0,
    training: bool = True,
    weights: State | None = None,
    dtype: torch.dtype = torch.float32,
) -> Analysis:
    """Count a registered model's constraints and try it on public images (N,C,H,W), `batch` of them to a probe.

    Every probe has initial weights and labels of its own, unless `weights` are given. dtype: in which the update is sent.
    """
    shape = (images.shape[1], images.shape[2], images.shape[3])
    model = build_model(name, image_shape=shape, num_classes=num_classes, seed=seed, **options)
    probes = [
        _probe(name, options, part, num_classes, seed + number, training, weights, dtype)
        for number, part in enumerate(torch.split(images, batch))
        if len(part) == batch
    ]
    return Analysis(batch, count_layers(model, shape, batch), tuple(probes))


def _probe(
    name: str,
    options: Mapping[str, Any],
    images: Tensor,
    num_classes: int,
    seed: int,
    training: bool,
    weights: State | None,
    dtype: torch.dtype,
) -> Probe:
    shape = (images.shape[1], images.shape[2], images.shape[3])
    model = build_model(name, image_shape=shape, num_classes=num_classes, seed=seed, **options).to(dtype)
    if weights is not None:
        if problems := misfits(model, weights, (name for name, _ in model.named_parameters())):
            raise FedattackError("these weights are not the model's: " + "; ".join(problems[:5]))
        model.load_state_dict(weights, strict=False)
    model.train(training)
    generator = derive_generator(seed, "analysis")
    labels = torch.randint(num_classes, (len(images),), generator=generator)
    sent = {key: tensor.detach().clone() for key, tensor in model.state_dict().items()}
    private = {"images": images.to(dtype), "labels": labels}
    received = simulate(model, sent, Classification(), [private], kind="gradient")
    received = {key: tensor.detach() for key, tensor in received.items()}
    update = Update(round=1, client="probe", sent=sent, received=received, kind="gradient", num_examples=len(images))
    known = Knowledge(image_shape=shape, batch_size=len(images), num_classes=num_classes)
    attack: Attack = ATTACKS.create(INVERTER, deficient="everywhere")
    try:
        found = attack.reconstruct(update, model, Classification(), known, generator=generator)
    except NotApplicable as refusal:
        return Probe({}, refusal=str(refusal))
    order = match_batch(found.images, images.float())
    return Probe(found.diagnostics, tuple(psnr_db(found.images[order], images.float()).tolist()))


def probe_images(data: str, image_shape: tuple[int, int, int], count: int) -> Tensor:
    """The first public images (count,C,H,W) of a data set, in the shape of a model's input."""
    channels, height, width = image_shape
    public = load_dataset(data, image_size=height).public
    if count > len(public):
        raise FedattackError(must("probes × batch", f"at most the {len(public)} public images of {data!r}", count))
    images = public.images(range(count))
    if images.shape[2:] != (height, width):
        images = F.interpolate(images, (height, width), mode="bilinear", antialias=True).clamp(0.0, 1.0)
    return images.mean(1, keepdim=True).expand(-1, channels, -1, -1) if images.shape[1] != channels else images


def as_records(analysis: Analysis) -> list[dict[str, Any]]:
    """One record a layer, for JSON: its shape, its counts, its verdict and what every probe said of it."""
    return [
        {
            "layer": layer.name,
            **{
                key: getattr(layer.shape, key) for key in ("channels", "height", "width", "filters", "kernel", "stride")
            },
            "unknowns": analysis.batch * layer.shape.unknowns,
            "gradient_constraints": layer.shape.gradient_constraints * layer.shape.channels,
            "filters_for_gradients": layer.filters_for_gradients,
            "filters_for_weights": layer.filters_for_weights,
            "verdict": analysis.verdict(layer),
            "probes": [
                {
                    "refusal": probe.refusal,
                    "psnr_db": list(probe.psnr_db),
                    **{
                        key.removeprefix(f"{layer.name}."): v
                        for key, v in probe.diagnostics.items()
                        if key.startswith(f"{layer.name}.")
                    },
                }
                for probe in analysis.probes
            ],
        }
        for layer in analysis.layers
    ]

"""What attacks on the dense layer that sees the image share: the layer, its gradient, what comes behind it, the answer.

What comes behind is found by watching one forward pass and checked by numbers, so nothing needs to be known about how the
model is written.
"""

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor, nn
from torch.func import functional_call

from attacks.disaggregation import DenseLayer, Disaggregated
from attacks.image_layer import ImageLayer, image_layer, whole_state
from attacks.mixing_equations import identity
from fedattack.errors import NotApplicable
from fedattack.seeding import seeded_default_generator
from fedattack.tasks import bind
from fedattack.types import Knowledge, Reconstruction, State, Update

SAMPLEWISE = (nn.Linear, nn.Identity, nn.Flatten, nn.LayerNorm)
NAMES: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.LeakyReLU: "leaky-relu",
    nn.Sigmoid: "sigmoid",
    nn.Tanh: "tanh",
    nn.GELU: "gelu",
    nn.SiLU: "silu",
    nn.ELU: "elu",
    nn.CELU: "celu",
    nn.Softplus: "softplus",
}
"""Activations by the names of fedattack.models.layers; each treats every number alone."""


@dataclass(frozen=True)
class Behind:
    """activation: a name of NAMES, "softmax" for a last layer, or "other". head: logits from pre-activations, or None."""

    activation: str
    head: Callable[[Tensor], Tensor] | None


def behind(model: nn.Module, sent: State, layer: str, probes: Tensor) -> Behind:
    """What follows the dense layer called `layer`, seen on probe images (n,C,H,W); weights are `sent`, in float64."""
    state = whole_state(model, sent)
    calls: list[tuple[str, nn.Module, Tensor, Tensor]] = []
    handles = []

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        return lambda module, inputs, output: calls.append((name, module, inputs[0].detach(), output.detach()))

    try:
        for name, module in model.named_modules():
            if not any(True for _ in module.children()):
                handles.append(module.register_forward_hook(watch(name)))
        with torch.no_grad(), seeded_default_generator(0):
            logits = bind(model, state)(probes.double())
    finally:
        for handle in handles:
            handle.remove()
    at = [i for i, call in enumerate(calls) if call[0] == layer]
    if len(at) != 1:
        return Behind("other", None)
    following = calls[at[0] + 1 :]
    before = calls[at[0]][3]
    if not following:
        return Behind("softmax", identity) if torch.equal(before, logits) else Behind("other", None)
    now, activation = before, ""
    for _, module, inputs, output in following:
        if inputs.shape[0] != len(probes) or not torch.equal(inputs.reshape(len(probes), -1), now.flatten(1)):
            return Behind(activation or "other", None)
        plain = isinstance(module, nn.Identity) or (isinstance(module, nn.Dropout) and not module.training)
        if not plain and not activation:
            activation = NAMES.get(type(module), "other")
        if not (plain or isinstance(module, SAMPLEWISE) or type(module) in NAMES):
            return Behind(activation, None)
        now = output
    if not torch.equal(now, logits):
        return Behind(activation or "other", None)
    stack = [
        (module, {k: state[f"{name}.{k}"] for k, _ in module.named_parameters()}) for name, module, _, _ in following
    ]

    def head(z: Tensor) -> Tensor:
        for module, own in stack:
            z = functional_call(module, own, (z,))
        return z

    return Behind(activation or "softmax", head if activation else identity)


def seen_layer(
    update: Update, model: nn.Module, knowledge: Knowledge, generator: torch.Generator
) -> tuple[DenseLayer, ImageLayer]:
    """The first dense layer that sees the image, and how it sees it. Raises NotApplicable where none does."""
    assert knowledge.image_shape is not None
    if update.kind == "weights" and (knowledge.local_steps or 1) > 1 and knowledge.batch_size != 1:
        raise NotApplicable("after several local steps the samples' gradients are of different weights")
    seen = image_layer(model, update.sent, knowledge.image_shape, generator)
    probes = torch.rand((3, *knowledge.image_shape), generator=generator, dtype=torch.float64)
    weight, bias = update.sent[f"{seen.name}.weight"], update.sent[f"{seen.name}.bias"]
    follows = behind(model, update.sent, seen.name, probes.to(weight.device))
    return DenseLayer(weight, bias, follows.activation, knowledge.image_shape, follows.head), seen


def layer_gradient(update: Update, layer: str, knowledge: Knowledge) -> tuple[Tensor, Tensor]:
    """Gradients of the layer's weight and bias in the type in which they came; of weights, at best as exact as float32 is."""
    gradient = update.gradient(knowledge.learning_rate)
    if missing := {f"{layer}.weight", f"{layer}.bias"} - set(gradient):
        raise NotApplicable(f"the update does not hold {' and '.join(sorted(missing))}")
    return gradient[f"{layer}.weight"], gradient[f"{layer}.bias"]


def reconstruction(
    found: Disaggregated, seen: ImageLayer, knowledge: Knowledge, begun: float, more: dict[str, float]
) -> Reconstruction:
    """Images from the layer's inputs."""
    assert knowledge.image_shape is not None
    pictures = (found.inputs - seen.offset) / seen.slope
    images = pictures.nan_to_num(0.5).reshape(-1, *knowledge.image_shape).clamp(0.0, 1.0).float()
    zeros = float((found.gradients.abs() < 1e-6 * found.gradients.abs().amax(1, keepdim=True)).double().mean())
    figures = (
        found.diagnostics
        | more
        | {
            "exact_images": float(found.exact),
            "relative_residual": found.residual,
            "zero_share": zeros,
        }
    )
    return Reconstruction(images=images, steps=1, seconds=perf_counter() - begun, diagnostics=figures)

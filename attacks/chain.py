"""A model read as a chain of layers up to its first dense layer, proved on probe images; a refusal names layer and reason.

The leaf modules are taken in the order in which one forward pass calls them. That they are a chain, and that every layer
does what this file thinks it does, is checked by numbers in float64: each layer takes what the one before gave, and the
gradients that the chain predicts for every layer's output and weight are those of autograd. So sums, concatenations, shared
weights and activations that are no modules are found out. Nothing is asked of what comes behind the first dense layer.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from fedattack.constraints import Convolution, input_gradient, output, weight_gradient
from fedattack.errors import FedattackError, NotApplicable
from fedattack.models.layers import Normalize
from fedattack.seeding import seeded_default_generator
from fedattack.tasks import bind
from fedattack.types import State

AGREE = 1e-7
"""Relative difference below which two float64 tensors are the same."""

OUTSIDE = 1e4
"""How many times larger than on the probes the values are on which a layer must still be the map that it seems to be."""


# ------------------------------------------------------------------------------------------------ activations
@dataclass(frozen=True)
class Activation:
    """An elementwise function A and what its output O = A(Z) says about Z.

    inverse: Z where O determines it, by `determined`. derivative: A'(Z) as a function of O. low, high: the open range of
    O. folded: outputs below 0 have two Z, of which the larger is given. other: A' at the smaller one, and A' on the other
    side of a kink at Z = 0, where O must be told from 0.
    """

    name: str
    forward: Callable[[Tensor], Tensor]
    inverse: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]
    low: float = -math.inf
    high: float = math.inf
    flat: bool = False  # below 0 all Z give O = 0
    folded: bool = False
    other: Callable[[Tensor], Tensor] | None = None

    def inside(self, outputs: Tensor, margin: float) -> Tensor:
        """Outputs moved into the range of A, by `margin` from its open ends."""
        low = self.low if self.low in (-math.inf, 0.0) and self.flat else self.low + margin
        return outputs.clamp(low, self.high - margin)

    def determined(self, outputs: Tensor) -> Tensor:
        """Where O determines Z, bool."""
        if self.flat:
            return outputs > 0
        known = (outputs > self.low) & (outputs < self.high)
        return known & (outputs >= 0) if self.folded else known


def relu() -> Activation:
    return Activation(
        "relu",
        F.relu,
        lambda o: o,
        lambda o: (o > 0).to(o),
        low=0.0,
        flat=True,
        other=lambda o: (o <= 0).to(o),
    )


def leaky_relu(slope: float) -> Activation:
    return Activation(
        "leaky-relu",
        lambda z: F.leaky_relu(z, slope),
        lambda o: torch.where(o > 0, o, o / slope),
        lambda o: torch.where(o > 0, torch.ones_like(o), slope),
        other=lambda o: torch.where(o > 0, slope, torch.ones_like(o)),
    )


def sigmoid() -> Activation:
    return Activation("sigmoid", torch.sigmoid, torch.logit, lambda o: o * (1 - o), low=0.0, high=1.0)


def tanh() -> Activation:
    return Activation("tanh", torch.tanh, torch.atanh, lambda o: 1 - o * o, low=-1.0, high=1.0)


def elu(alpha: float) -> Activation:
    return Activation(
        "elu",
        lambda z: F.elu(z, alpha),
        lambda o: torch.where(o > 0, o, torch.log1p(o.clamp_max(0.0) / alpha)),
        lambda o: torch.where(o > 0, torch.ones_like(o), o + alpha),
        low=-alpha,
    )


def celu(alpha: float) -> Activation:
    return Activation(
        "celu",
        lambda z: F.celu(z, alpha),
        lambda o: torch.where(o > 0, o, alpha * torch.log1p(o.clamp_max(0.0) / alpha)),
        lambda o: torch.where(o > 0, torch.ones_like(o), 1 + o / alpha),
        low=-alpha,
    )


def softplus(beta: float, threshold: float) -> Activation:
    """PyTorch's, which is the identity where β·Z exceeds the threshold."""
    return Activation(
        "softplus",
        lambda z: F.softplus(z, beta, threshold),
        lambda o: torch.where(beta * o > threshold, o, o + torch.log(-torch.expm1(-beta * o)) / beta),
        lambda o: torch.where(beta * o > threshold, torch.ones_like(o), -torch.expm1(-beta * o)),
        low=0.0,
    )


def folded(name: str, forward: Callable[[Tensor], Tensor]) -> Activation:
    """SiLU or GELU: falls to a minimum at some Z < 0 and rises from there on. Inverted by bisection on either side."""
    grid = torch.linspace(-4.0, 0.0, 4_000_001, dtype=torch.float64)
    bottom = float(grid[forward(grid).argmin()])
    floor = float(forward(torch.tensor(bottom, dtype=torch.float64)))

    def search(outputs: Tensor, rising: bool) -> Tensor:
        top = outputs.abs().max().clamp_min(1.0) + 1.0 if outputs.numel() else torch.ones(())
        low = torch.full_like(outputs, bottom if rising else -50.0)
        high = torch.full_like(outputs, float(top) if rising else bottom)
        for _ in range(80):
            middle = (low + high) / 2
            below = (forward(middle) < outputs) == rising
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2

    def slope(inputs: Tensor) -> Tensor:
        with torch.enable_grad():
            at = inputs.detach().requires_grad_()
            (found,) = torch.autograd.grad(forward(at).sum(), at)
        return found

    def inverse(outputs: Tensor) -> Tensor:
        return search(outputs, rising=True)

    return Activation(
        name,
        forward,
        inverse,
        lambda o: slope(inverse(o)),
        low=floor,
        folded=True,
        other=lambda o: torch.where(o < 0, slope(search(o, rising=False)), slope(inverse(o))),
    )


def activation_of(module: nn.Module) -> Activation | None:
    """The activation that a module computes, or None where it is none that is known here."""
    match module:
        case nn.ReLU():
            return relu()
        case nn.LeakyReLU() if module.negative_slope > 0:
            return leaky_relu(module.negative_slope)
        case nn.Sigmoid():
            return sigmoid()
        case nn.Tanh():
            return tanh()
        case nn.ELU() if module.alpha > 0:
            return elu(module.alpha)
        case nn.CELU() if module.alpha > 0:
            return celu(module.alpha)
        case nn.Softplus():
            return softplus(float(module.beta), float(module.threshold))
        case nn.SiLU():
            return folded("silu", F.silu)
        case nn.GELU():
            approximate = module.approximate
            return folded("gelu", lambda z: F.gelu(z, approximate=approximate))
    return None


# ------------------------------------------------------------------------------------------------ steps of a chain
@dataclass(frozen=True, eq=False)
class Reshape:
    """The same numbers in another shape (per sample): flatten, identity, dropout in evaluation."""

    name: str
    before: tuple[int, ...]
    after: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Affine:
    """slope·x + offset, elementwise; both of the sample's shape: normalisation, batch normalisation in evaluation."""

    name: str
    slope: Tensor
    offset: Tensor


@dataclass(frozen=True, eq=False)
class Activate:
    name: str
    activation: Activation


@dataclass(frozen=True, eq=False)
class Pool:
    """Average pooling without padding; before: (C,H,W) of its input."""

    name: str
    kernel: tuple[int, int]
    stride: tuple[int, int]
    before: tuple[int, int, int]

    def apply(self, inputs: Tensor) -> Tensor:
        return F.avg_pool2d(inputs, self.kernel, self.stride)

    def adjoint(self, outputs: Tensor) -> Tensor:
        """∂L/∂input from ∂L/∂output."""
        channels, height, width = self.before
        shape = Convolution(channels, height, width, channels, self.kernel, self.stride, groups=channels)
        return input_gradient(shape, self.weight(outputs), outputs)

    def weight(self, like: Tensor) -> Tensor:
        """The pooling as a convolution with one group a channel."""
        return torch.full((self.before[0], 1, *self.kernel), 1.0 / math.prod(self.kernel)).to(like)


@dataclass(frozen=True, eq=False)
class Convolve:
    """weight (D,C/groups,K,K) and bias (D,) are those that the client was sent, float64."""

    name: str
    shape: Convolution
    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True, eq=False)
class Dense:
    """The first dense layer. after: the name of the activation that takes its output, "output" where it is the model's
    output, "other" otherwise."""

    name: str
    weight: Tensor
    bias: Tensor
    after: str


Step = Reshape | Affine | Activate | Pool | Convolve


@dataclass(frozen=True, eq=False)
class Chain:
    """Steps from the image (C,H,W) to the input of the first dense layer, in the order of the forward pass."""

    image_shape: tuple[int, int, int]
    steps: tuple[Step, ...]
    dense: Dense
    outputs: int

    @property
    def convolutions(self) -> tuple[Convolve, ...]:
        return tuple(step for step in self.steps if isinstance(step, Convolve))

    def forward(self, images: Tensor) -> Tensor:
        """What reaches the first dense layer, (B,F), from images (B,C,H,W)."""
        for step in self.steps:
            images = forward(step, images)
        return images.flatten(1)


def forward(step: Step, inputs: Tensor) -> Tensor:
    """What a step gives for inputs (B, …)."""
    match step:
        case Reshape():
            return inputs.reshape(len(inputs), *step.after)
        case Affine():
            return step.slope * inputs + step.offset
        case Activate():
            return step.activation.forward(inputs)
        case Pool():
            return step.apply(inputs)
        case Convolve():
            found = output(step.shape, step.weight, inputs)
            return found if step.bias is None else found + step.bias[:, None, None]


def backward(step: Step, inputs: Tensor, gradient: Tensor) -> Tensor:
    """∂L/∂inputs from ∂L/∂outputs."""
    match step:
        case Reshape():
            return gradient.reshape(len(gradient), *step.before)
        case Affine():
            return step.slope * gradient
        case Activate():
            with torch.enable_grad():
                at = inputs.detach().requires_grad_()
                (slope,) = torch.autograd.grad(step.activation.forward(at).sum(), at)
            return slope * gradient
        case Pool():
            return step.adjoint(gradient)
        case Convolve():
            return input_gradient(step.shape, step.weight, gradient)


# ------------------------------------------------------------------------------------------------ reading a model
@dataclass
class _Call:
    name: str
    module: nn.Module
    inputs: Tensor | None
    outputs: Tensor


NORMS = (nn.GroupNorm, nn.LayerNorm, nn.modules.instancenorm._InstanceNorm, nn.LocalResponseNorm)
MAXIMA = (nn.MaxPool2d, nn.AdaptiveMaxPool2d, nn.FractionalMaxPool2d, nn.MaxPool1d, nn.LPPool2d)
DROPOUTS = (nn.modules.dropout._DropoutNd,)


def read_chain(model: nn.Module, sent: State, image_shape: tuple[int, int, int], generator: torch.Generator) -> Chain:
    """The chain that `model` with the weights `sent` is, in its present mode. Raises NotApplicable, naming the layer."""
    some = next(t for t in sent.values() if t.is_floating_point())
    state = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    state |= {name: tensor.detach().clone() for name, tensor in model.named_buffers()}
    state |= {name: tensor.detach().clone() for name, tensor in sent.items() if name in state}
    state = {n: t.to(some.device, torch.float64) if t.is_floating_point() else t for n, t in state.items()}
    weights = [name for name, _ in model.named_parameters() if name in state]
    for name in weights:
        state[name].requires_grad_()
    random = torch.rand((2, *image_shape), generator=generator, dtype=torch.float64)
    images = torch.cat([torch.zeros(1, *image_shape), torch.ones(1, *image_shape), random]).to(some.device)
    with _recorded(model) as calls, torch.enable_grad(), seeded_default_generator(0):
        logits = bind(model, state)(images.requires_grad_())
    if not isinstance(logits, Tensor):
        raise NotApplicable(f"the model must give one tensor, got {type(logits).__name__}")
    chain = _read(calls, images.detach(), image_shape, state, logits)
    _prove(chain, calls, images.detach(), state, weights, logits, generator)
    return chain


@contextmanager
def _recorded(model: nn.Module) -> Iterator[list[_Call]]:
    """Every call of a leaf module, in order, with copies of what went in and came out."""
    calls: list[_Call] = []
    before: dict[str, Tensor | None] = {}
    handles = []

    def entering(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            alone = len(inputs) == 1 and isinstance(inputs[0], Tensor)
            before[name] = inputs[0].detach().clone() if alone else None

        return hook

    def leaving(name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], outputs: Any) -> Any:
            if not isinstance(outputs, Tensor):
                raise NotApplicable(f"layer {name!r} ({type(module).__name__}) gives no single tensor")
            calls.append(_Call(name, module, before.pop(name, None), outputs))
            return outputs.clone()  # so that layers that work in place leave the copy here alone

        return hook

    try:
        for name, module in model.named_modules():
            if not list(module.children()):
                handles += [
                    module.register_forward_pre_hook(entering(name)),
                    module.register_forward_hook(leaving(name)),
                ]
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _read(calls: list[_Call], images: Tensor, image_shape: tuple[int, int, int], state: State, logits: Tensor) -> Chain:
    """The steps up to the first dense layer, by type; refuses what is no chain of layers that can be run backwards."""
    steps: list[Step] = []
    if not calls:
        raise NotApplicable("the model has no layers")
    for number, call in enumerate(calls):
        kind = type(call.module).__name__
        where = f"layer {call.name!r} ({kind})"
        if sum(other.module is call.module for other in calls) > 1:
            raise NotApplicable(f"{where} is used more than once: its gradient is a sum over its uses")
        if call.inputs is None:
            raise NotApplicable(f"{where} takes more than one tensor")
        if number == 0:
            steps += _entrance(call, images, image_shape)
        else:
            previous = calls[number - 1]
            if not _same(call.inputs, previous.outputs):
                raise NotApplicable(_no_chain(calls, number))
            before, after = tuple(previous.outputs.shape[1:]), tuple(call.inputs.shape[1:])
            if before != after:
                steps.append(Reshape(f"before {call.name}", before, after))
        if isinstance(call.module, nn.Linear):
            return Chain(image_shape, tuple(steps), _dense(calls, number, state, logits), logits.shape[-1])
        steps.append(_step(call, steps, state))
    raise NotApplicable("the model has no dense layer, so no layer gives its input away")


def _entrance(call: _Call, images: Tensor, image_shape: tuple[int, int, int]) -> list[Step]:
    """The elementwise affine map from the image to the first layer, read off a black and a white image."""
    assert call.inputs is not None
    if _same(call.inputs, images):
        return (
            [] if call.inputs.shape == images.shape else [Reshape("image", image_shape, tuple(call.inputs.shape[1:]))]
        )
    where = f"the image reaches layer {call.name!r} through something that is no elementwise affine map"
    if call.inputs.shape != images.shape:
        raise NotApplicable(where)
    offset, slope = call.inputs[0], call.inputs[1] - call.inputs[0]
    if not (slope.abs().min() > 0 and _close(slope * images + offset, call.inputs)):
        raise NotApplicable(where)
    return [Affine("image", slope, offset)]


def _step(call: _Call, steps: list[Step], state: State) -> Step:
    """One layer by its type. Raises NotApplicable with the reason why it cannot be run backwards."""
    module, inputs, outputs = call.module, call.inputs, call.outputs.detach()
    assert inputs is not None
    where = f"layer {call.name!r} ({type(module).__name__})"
    before, after = tuple(inputs.shape[1:]), tuple(outputs.shape[1:])
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        if module.training or module.running_mean is None:
            raise NotApplicable(f"{where} normalises by the statistics of the private batch itself (training mode)")
    elif isinstance(module, NORMS):
        raise NotApplicable(f"{where} normalises by the statistics of the private image itself")
    elif isinstance(module, MAXIMA):
        raise NotApplicable(f"{where} keeps only the largest of its inputs: the others leave no trace in its output")
    elif isinstance(module, DROPOUTS) and module.training and module.p > 0:
        raise NotApplicable(f"{where} drops inputs at random (training mode), and the server does not know which")
    elif isinstance(module, nn.Conv2d):
        return _convolution(call, state)
    elif isinstance(module, nn.AvgPool2d | nn.AdaptiveAvgPool2d) and before != after:
        return _pool(call, steps)
    elif (activation := activation_of(module)) is not None:
        return Activate(call.name, activation)
    if _same(inputs, outputs) and _holds_outside(call, state, lambda x: x.reshape(len(x), *after)):
        return Reshape(call.name, before, after)
    if isinstance(module, Normalize):
        slope = (1.0 / module.std.double()).expand(1, *before)[0].to(inputs)
        return Affine(call.name, slope, -module.mean.double().expand(1, *before)[0].to(inputs) * slope)
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return _batch_norm(call, state)
    if before == after and (fitted := _fitted_affine(inputs, outputs)) is not None:
        slope, offset = fitted
        if _holds_outside(call, state, lambda x: slope * x + offset):
            return Affine(call.name, slope, offset)
    raise NotApplicable(f"{where} is a kind of layer that cannot be run backwards here")


def _convolution(call: _Call, state: State) -> Convolve:
    module = call.module
    assert isinstance(module, nn.Conv2d)
    assert call.inputs is not None
    where = f"layer {call.name!r} (Conv2d)"
    if call.inputs.dim() != 4:
        raise NotApplicable(f"{where} takes no batch of images")
    if module.padding_mode != "zeros":
        raise NotApplicable(f"{where} pads by {module.padding_mode!r}, not by zeros")
    try:
        shape = Convolution.of(module, call.inputs.shape[2], call.inputs.shape[3])
    except FedattackError as error:
        raise NotApplicable(f"{where}: {error}") from error
    bias = _own(state, call.name, "bias") if module.bias is not None else None
    return Convolve(call.name, shape, _own(state, call.name, "weight"), bias)


def _pool(call: _Call, steps: list[Step]) -> Pool:
    """Behind a convolution and affine maps only: there the pooled sensitivity is the one at every pixel."""
    module = call.module
    assert isinstance(module, nn.AvgPool2d | nn.AdaptiveAvgPool2d)
    assert call.inputs is not None
    where = f"layer {call.name!r} ({type(module).__name__})"
    channels, height, width = call.inputs.shape[1:]
    if isinstance(module, nn.AdaptiveAvgPool2d):
        rows, columns = call.outputs.shape[2:]
        if height % rows or width % columns:
            raise NotApplicable(f"{where} averages over windows of different sizes")
        kernel = stride = (height // rows, width // columns)
    else:
        kernel, stride = _pair(module.kernel_size), _pair(module.stride)
        if _pair(module.padding) != (0, 0) or module.ceil_mode or module.divisor_override is not None:
            raise NotApplicable(f"{where} pads, rounds up or divides by a number of its own")
    for step in reversed(steps):
        if isinstance(step, Convolve):
            return Pool(call.name, kernel, stride, (channels, height, width))
        if isinstance(step, Activate):
            raise NotApplicable(
                f"{where} averages the outputs of the activation {step.name!r}: the slope at each pixel is not in the mean"
            )
        if isinstance(step, Pool):
            raise NotApplicable(f"{where} averages means, with no convolution between")
    raise NotApplicable(f"{where} averages the image itself before any convolution sees its pixels")


def _batch_norm(call: _Call, state: State) -> Affine:
    """Batch normalisation by running statistics, which the server knows."""
    module, inputs = call.module, call.inputs
    assert isinstance(module, nn.modules.batchnorm._BatchNorm)
    assert inputs is not None
    mean, variance = state[_child(call.name, "running_mean")], state[_child(call.name, "running_var")]
    slope = (variance + module.eps).rsqrt()
    shift = -mean * slope
    if module.affine:
        scale, offset = _own(state, call.name, "weight"), _own(state, call.name, "bias")
        slope, shift = slope * scale, shift * scale + offset
    if not slope.abs().min() > 0:
        raise NotApplicable(f"layer {call.name!r} (BatchNorm) multiplies a channel by zero")
    shape = tuple(inputs.shape[1:])
    index = (slice(None),) + (None,) * (len(shape) - 1)
    return Affine(call.name, slope[index].expand(shape).clone(), shift[index].expand(shape).clone())


def _fitted_affine(inputs: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor] | None:
    """Slope and offset of an elementwise affine map, or None where it is none or some element never varied."""
    high, low = inputs.argmax(0, keepdim=True), inputs.argmin(0, keepdim=True)
    rise = inputs.gather(0, high) - inputs.gather(0, low)
    if not bool((rise > 1e-6 * inputs.abs().max()).all()):
        return None
    slope = ((outputs.gather(0, high) - outputs.gather(0, low)) / rise)[0]
    offset = outputs[0] - slope * inputs[0]
    if slope.abs().min() > 0 and _close(slope * inputs + offset, outputs):
        return slope, offset
    return None


def _holds_outside(call: _Call, state: State, expected: Callable[[Tensor], Tensor]) -> bool:
    """Whether a layer is what it seems to be also far outside the values that the probes gave it: clamps are not."""
    assert call.inputs is not None
    own = {n: t.detach().clone() for n, t in (*call.module.named_parameters(), *call.module.named_buffers())}
    own |= {n: state[_child(call.name, n)].detach().clone() for n in own if _child(call.name, n) in state}
    own = {n: t.to(call.inputs) if t.is_floating_point() else t for n, t in own.items()}
    size = float(call.inputs.abs().max()) or 1.0
    drawn = torch.randn(call.inputs.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad(), seeded_default_generator(0):
        for factor in (-10.0, 10.0, OUTSIDE):
            for inputs in (factor * call.inputs, factor * size * drawn.to(call.inputs)):
                wanted = expected(inputs)
                try:
                    found = functional_call(call.module, own, (inputs.clone(),))
                except (RuntimeError, ValueError):  # it asks for something of its inputs
                    return False
                if not _close(wanted, found):
                    return False
    return True


def _dense(calls: list[_Call], number: int, state: State, logits: Tensor) -> Dense:
    call = calls[number]
    where = f"layer {call.name!r} (Linear)"
    assert isinstance(call.module, nn.Linear)
    assert call.inputs is not None
    if call.module.bias is None:
        raise NotApplicable(f"{where}, the first dense layer, has no bias, whose gradient would give its input away")
    if call.inputs.dim() != 2:
        raise NotApplicable(f"{where} is applied to many vectors of one image, so its gradient is a sum over them")
    after = "other"
    if _same(call.outputs, logits):
        after = "output"
    elif number + 1 < len(calls):
        following = calls[number + 1]
        known = activation_of(following.module)
        if known is not None and following.inputs is not None and _same(following.inputs, call.outputs):
            after = known.name
    weight, bias = (_own(state, call.name, part) for part in ("weight", "bias"))
    return Dense(call.name, weight, bias, after)


def _prove(
    chain: Chain,
    calls: list[_Call],
    images: Tensor,
    state: State,
    weights: list[str],
    logits: Tensor,
    generator: torch.Generator,
) -> None:
    """Compare every value and gradient that the chain predicts on the probes with those of autograd."""
    by_name = {call.name: call for call in calls}
    cotangent = torch.randn(logits.shape, generator=generator, dtype=torch.float64).to(logits.device)
    named = [step.name for step in chain.steps if step.name in by_name] + [chain.dense.name]
    wanted = [by_name[name].outputs for name in named] + [state[name] for name in weights]
    if not logits.requires_grad:
        raise NotApplicable("the model's output does not depend on its weights by differentiable functions")
    found = torch.autograd.grad(logits, wanted, cotangent, allow_unused=True)
    autograd: dict[str, Tensor | None] = dict(zip([*named, *weights], found, strict=True))
    values, at = [images], images
    for step in chain.steps:
        at = forward(step, at)
        if step.name in by_name and not _close(at, by_name[step.name].outputs.detach().reshape(at.shape)):
            raise NotApplicable(f"layer {step.name!r} computes something else than its type says")
        values.append(at)
    dense = chain.dense
    gradient = autograd[dense.name]
    assert gradient is not None
    _expect(autograd, _child(dense.name, "weight"), gradient.mT @ values[-1].flatten(1))
    gradient = (gradient @ dense.weight).reshape(values[-1].shape)
    for step, inputs in zip(reversed(chain.steps), reversed(values[:-1]), strict=True):
        if step.name in by_name:
            seen = autograd[step.name]
            if seen is None or not _close(gradient.reshape(seen.shape), seen):
                raise NotApplicable(
                    f"what layer {step.name!r} gives is used elsewhere too (a skip connection or a second branch)"
                )
        if isinstance(step, Convolve):
            _expect(autograd, _child(step.name, "weight"), weight_gradient(step.shape, inputs, gradient))
        gradient = backward(step, inputs, gradient)


def _expect(autograd: Mapping[str, Tensor | None], name: str, predicted: Tensor) -> None:
    found = autograd.get(name)
    if found is not None and not _close(predicted, found):
        raise NotApplicable(f"the weight {name!r} is used in other layers too: its gradient is a sum over them")


def _no_chain(calls: list[_Call], number: int) -> str:
    """Why layer `number` does not follow on the one before."""
    call, previous = calls[number], calls[number - 1]
    where = f"layer {call.name!r} ({type(call.module).__name__})"
    assert call.inputs is not None
    earlier = [(c.name, c.outputs.detach()) for c in calls[: number - 1]]
    for name, outputs in earlier:
        if _same(call.inputs, outputs):
            return f"{where} takes the output of {name!r}, which {previous.name!r} does not lead to: the model has branches"
    for name, outputs in earlier:
        if outputs.shape == previous.outputs.shape == call.inputs.shape:
            total = outputs + previous.outputs.detach()
            if any(_close(act(total), call.inputs) for act in (lambda t: t, F.relu)):
                return f"{where} takes a residual sum of {name!r} and {previous.name!r}: no chain of layers"
    if call.inputs[0].numel() > previous.outputs[0].numel():
        return f"{where} takes more than {previous.name!r} gives (a concatenation): no chain of layers"
    return (
        f"between {previous.name!r} and {where} the model computes something that is no layer of its own "
        "(an activation or pooling as a function, a sum): it cannot be read"
    )


def _own(state: State, layer: str, parameter: str) -> Tensor:
    """A parameter as the client was sent it. Raises NotApplicable where it is another layer's as well."""
    if (name := _child(layer, parameter)) not in state:
        raise NotApplicable(f"the weight {name!r} is used in other layers too: its gradient is a sum over them")
    return state[name].detach()


def _pair(value: Any) -> tuple[int, int]:
    return (int(value), int(value)) if isinstance(value, int) else (int(value[0]), int(value[1]))


def _child(name: str, parameter: str) -> str:
    return f"{name}.{parameter}" if name else parameter


def _same(a: Tensor, b: Tensor) -> bool:
    """The same numbers, sample by sample, whatever the shape."""
    a, b = a.detach(), b.detach()
    return a.numel() == b.numel() and len(a) == len(b) and torch.equal(a.flatten(), b.flatten())


def _close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and float((a - b).norm()) <= AGREE * max(float(b.norm()), 1e-300)

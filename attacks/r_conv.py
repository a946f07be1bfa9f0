"""R-CONV: a convolutional network's input by linear algebra, layer by layer, from the gradient of one image or a few.

Source: Eltaras, Malluhi, Savino, Di Carlo, Qayyum, R-CONV: An Analytical Approach for Efficient Data Reconstruction via
Convolutional Gradients, WISE 2024, arXiv 2406.04227 (Eq. 6 and 9), and R-CONV++, Computing 107, 2025, arXiv 2509.18871.
Differs from it: all rows by least squares instead of a square subset of them; the published code has the first algorithm
only, so the hybrid of gradient and weight constraints for large inputs and the joint solution for batches are our own
constructions from the same equations; whether the result reproduces the update is checked.
"""

import math
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import combinations
from time import perf_counter
from typing import ClassVar

import torch
from torch import Tensor, nn

from attacks.chain import Activate, Affine, Chain, Convolve, Pool, Reshape, Step, read_chain
from attacks.dense_layers import behind
from attacks.disaggregation import DenseLayer, disaggregate
from attacks.labels import infer_labels
from fedattack.constraints import (
    Convolution,
    GradientConstraints,
    Solved,
    WeightConstraints,
    input_gradient,
    pinch,
    relative,
    share_for,
    solve_gradient,
    solve_hybrid,
)
from fedattack.errors import FedattackError, NotApplicable, must, one_of
from fedattack.seeding import seeded_default_generator
from fedattack.tasks import Task, simulate_gradient
from fedattack.types import Knowledge, Progress, Reconstruction, State, Update, silent

MARGIN = 4 * torch.finfo(torch.float64).eps
"""How far from the ends of an activation's range an output is taken to be."""

CANDIDATES, FLIPS = 16, 3
"""Outputs of a filter whose slope is in doubt, and how many of them may turn out otherwise than they look."""

NOISY = 30.0
"""Times the rounding errors of an update, from which on what does not fit its dense layer is noise."""

BRANCH = 1e-5
"""Relative error of a bias gradient above which SiLU and GELU are taken to have been left of their minimum."""

EVEN = 0.05
"""Slopes of an activation that differ by less than this factor weigh its outputs alike."""

CERTAIN = 1e3
"""How many roundings a dense layer's gradient may be from rank one for its input to be called exact."""

CONSTRAINTS = ("auto", "gradient", "hybrid", "weights")
DEFICIENT = ("image", "refuse", "everywhere")


@dataclass(frozen=True)
class RConv:
    """Exact inversion of a chain of convolutions behind which a dense layer with a bias gives its input away.

    constraints: which equations hold a convolution's input: "gradient" (∂L/∂W), "hybrid" (those and the layer's output,
    where the activation lets it be known), "weights" (the output alone) or "auto": gradient constraints where they
    determine the input with a condition number below `condition`, else hybrid. deficient: where too few of them are
    independent, take the least-squares solution of least norm for the "image" only, "everywhere", or "refuse".
    """

    name: ClassVar[str] = "r-conv"
    needs: ClassVar[frozenset[str]] = frozenset({"image_shape", "batch_size"})
    tasks: ClassVar[frozenset[str]] = frozenset({"classification"})

    constraints: str = "auto"
    condition: float = 1e3
    deficient: str = "image"

    def __post_init__(self) -> None:
        for what, table, got in (
            ("constraints", CONSTRAINTS, self.constraints),
            ("deficient", DEFICIENT, self.deficient),
        ):
            if got not in table:
                raise FedattackError(one_of(what, table, got))
        if not self.condition >= 1:
            raise FedattackError(must("condition", "at least 1", self.condition))

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
        assert knowledge.image_shape is not None
        assert knowledge.batch_size is not None
        batch = one_step(update, knowledge)
        chain = read_chain(model, update.sent, knowledge.image_shape, generator)
        observed = Observed.of(update, knowledge.learning_rate)
        samples = dense_inputs(chain, observed, batch, update, model, knowledge, generator)
        weight = observed.of_layer(chain.dense.name)[0]
        observed = observed.heard(chain.dense.name, weight - samples.gradients.mT @ samples.inputs)
        inversion = invert(chain, observed, samples, attack=self, generator=generator, progress=progress)
        images = inversion.images.nan_to_num(0.5, 1.0, 0.0).clamp(0.0, 1.0)
        labels = labels_of(chain, samples, update, model, knowledge, generator)
        diagnostics = dict(inversion.diagnostics)
        losses: tuple[float, ...] = ()
        if labels is not None:
            cost = mismatch(update, model, task, images, labels)
            diagnostics["cost"], losses = cost, (cost,)
        rows = torch.arange(knowledge.batch_size) % batch  # a step may have used fewer images than the client has
        return Reconstruction(
            images=images.float()[rows],
            labels=None if labels is None else labels[rows],
            losses=losses,
            steps=len(chain.convolutions),
            seconds=perf_counter() - begun,
            diagnostics=diagnostics,
        )


# ------------------------------------------------------------------------------------------------ what was observed
def one_step(update: Update, knowledge: Knowledge) -> int:
    """How many images the one gradient in an update is of. Raises NotApplicable where it is a sum over local steps."""
    assert knowledge.batch_size is not None
    if update.kind == "weights" and (knowledge.local_steps or 1) != 1:
        raise NotApplicable(
            f"the update sums the gradients of {knowledge.local_steps} local steps, at weights that the server never saw"
        )
    return min(knowledge.batch_size, knowledge.local_batch_size or knowledge.batch_size)


@dataclass(frozen=True)
class Observed:
    """The gradient in float64 (up to one positive factor where no learning rate is known), the relative accuracy of the
    numbers of each tensor, and the gradient as it arrived."""

    gradient: State
    accuracy: dict[str, float]
    raw: State

    @classmethod
    def of(cls, update: Update, learning_rate: float | None = None) -> "Observed":
        """A difference of weights has lost the digits that it shares with the weights."""
        gradient, accuracy = update.gradient(learning_rate), {}
        for name, tensor in gradient.items():
            if not tensor.is_floating_point():
                continue
            lost = 1.0
            if update.kind == "weights":
                size = float((update.sent[name] - update.received[name]).abs().max()) if tensor.numel() else 0.0
                lost = max(1.0, float(update.sent[name].abs().max()) / size) if size > 0 else 1.0
            accuracy[name] = torch.finfo(tensor.dtype).eps * lost
        return cls({name: gradient[name].double() for name in accuracy}, accuracy, gradient)

    def of_layer(self, layer: str) -> tuple[Tensor, Tensor | None, float]:
        """Gradients of a layer's weight and bias and their accuracy. Raises NotApplicable where they were not sent."""
        weight, bias = (f"{layer}.{part}" if layer else part for part in ("weight", "bias"))
        if weight not in self.gradient:
            raise NotApplicable(f"the update holds no gradient of layer {layer!r} (frozen, or not sent)")
        return self.gradient[weight], self.gradient.get(bias), self.accuracy[weight]

    def heard(self, layer: str, residual: Tensor) -> "Observed":
        """With the noise that a dense layer's residual of rank one shows, taken to be as large in every other tensor."""
        weight, _, accuracy = self.of_layer(layer)
        rows, columns = weight.shape
        freedom = (rows - 1) * (columns - 1)
        sigma = float(residual.norm()) / freedom**0.5 if freedom else 0.0
        if not sigma > NOISY * accuracy * _rms(weight):
            return self
        noise = {name: min(1.0, sigma / max(_rms(tensor), 1e-300)) for name, tensor in self.gradient.items()}
        return replace(self, accuracy={name: max(self.accuracy[name], noise[name]) for name in noise})

    def raw_of(self, layer: str) -> tuple[Tensor, Tensor]:
        """Gradients of a layer's weight and bias in the type in which they arrived."""
        weight, bias = (f"{layer}.{part}" if layer else part for part in ("weight", "bias"))
        return self.raw[weight], self.raw[bias]


def _rms(tensor: Tensor) -> float:
    return float(tensor.square().mean().sqrt()) if tensor.numel() else 0.0


@dataclass(frozen=True)
class Samples:
    """Each sample's input to the first dense layer (B,F) and gradient of the mean loss by its output (B,M).

    exact: how many of them are certain; residual: of ∂L/∂W = Σ gradientᵀ·input, relative.
    """

    inputs: Tensor
    gradients: Tensor
    exact: int
    residual: float


def dense_inputs(
    chain: Chain,
    observed: Observed,
    batch: int,
    update: Update,
    model: nn.Module,
    knowledge: Knowledge,
    generator: torch.Generator,
) -> Samples:
    """What each sample gave to the first dense layer. One: x = ∂L/∂Wᵀ·∂L/∂b / ‖∂L/∂b‖², by least squares over all rows.

    Several: by `attacks.disaggregation`. Raises NotApplicable unless every sample is certain: the equations of a convolution
    hold for the sum over all of them.
    """
    name = chain.dense.name
    weight, bias, accuracy = observed.of_layer(name)
    if bias is None:
        raise NotApplicable(f"the update holds no gradient of the bias of layer {name!r}")
    if not bias.abs().max() > 0:
        raise NotApplicable(f"the bias gradient of layer {name!r} is zero: no row of it saw the image")
    if batch == 1:
        inputs = (bias @ weight / bias.square().sum())[None]
        residual = relative(weight - bias[:, None] * inputs, weight)
        return Samples(inputs, bias[None], int(residual < CERTAIN * accuracy), residual)
    probes = torch.rand((3, *chain.image_shape), generator=generator, dtype=torch.float64).to(weight.device)
    follows = behind(model, update.sent, name, probes)
    shape = next((step.before for step in reversed(chain.steps) if isinstance(step, Reshape)), ())
    image = (shape[0], shape[1], shape[2]) if len(shape) == 3 else None
    labels = knowledge.labels
    if labels is None and follows.activation not in ("relu", "softmax"):
        with suppress(NotApplicable):
            labels = infer_labels(update, model, knowledge, generator=generator)
    unscaled = update.kind == "weights" and knowledge.learning_rate is None
    blind = follows.activation != "relu" and (unscaled or (labels is None and follows.activation != "softmax"))
    found = disaggregate(
        *observed.raw_of(name),
        batch,
        layer=DenseLayer(chain.dense.weight, chain.dense.bias, follows.activation, image, follows.head),
        generator=generator,
        methods="independent" if blind else "auto",
        labels=labels,
    )
    if found.exact < batch:
        raise NotApplicable(
            f"layer {name!r} (Linear) gives {found.exact} of the {batch} images away for certain, and convolutions need all"
        )
    return Samples(found.inputs.double(), found.gradients.double(), found.exact, found.residual)


def labels_of(
    chain: Chain, samples: Samples, update: Update, model: nn.Module, knowledge: Knowledge, generator: torch.Generator
) -> Tensor | None:
    """Labels (B,) in the order of the samples: known for one image, or read off a dense layer that is the last."""
    if len(samples.inputs) == 1:
        if knowledge.labels is not None:
            return knowledge.labels[:1].long()
        with suppress(NotApplicable):
            return infer_labels(update, model, replace(knowledge, batch_size=1), generator=generator)
        return None
    return samples.gradients.argmin(1) if chain.dense.after == "output" else None


def mismatch(update: Update, model: nn.Module, task: Task, images: Tensor, labels: Tensor) -> float:
    """‖simulated − observed‖² / ‖observed‖² of the whole gradient, at the best positive scale for a weight difference."""
    sent = {n: t.double() if t.is_floating_point() else t for n, t in update.sent.items()}
    with seeded_default_generator(0):
        simulated = simulate_gradient(
            model, sent, task, [{"images": images.double(), "labels": labels}], transformable=False
        )
    observed = update.gradient(None)
    names = [name for name in simulated if name in observed]
    a = torch.cat([simulated[name].detach().flatten() for name in names])
    b = torch.cat([observed[name].double().flatten() for name in names])
    if update.kind == "weights":
        a = a * ((a @ b) / a.square().sum().clamp_min(1e-300)).clamp_min(0.0)
    return float((a - b).square().sum() / b.square().sum())


# ------------------------------------------------------------------------------------------------ down the chain
@dataclass(frozen=True)
class Inversion:
    """images (B,C,H,W) float64, not clamped, and what determined them, layer by layer."""

    images: Tensor
    diagnostics: dict[str, float]


@dataclass
class _Front:
    """How far the inversion has come, seen from above: a layer's outputs and the gradient by them, for every sample.

    known: where the values are true; trust: how sharply the next values above react to these,
    the weight of an equation on them; pool: averages that the values are of, while the gradient is at every pixel.
    """

    values: Tensor
    gradient: Tensor
    known: Tensor
    trust: Tensor
    bounded: Tensor  # bool: values that are upper bounds of the true ones (a ReLU's inactive outputs)
    pool: Pool | None = None

    @classmethod
    def at(cls, values: Tensor, gradient: Tensor) -> "_Front":
        """With every value known."""
        known = torch.ones_like(values, dtype=torch.bool)
        return cls(values, gradient, known, torch.ones_like(values), ~known)


def invert(
    chain: Chain,
    observed: Observed,
    samples: Samples,
    *,
    attack: RConv,
    generator: torch.Generator,
    progress: Progress = silent,
) -> Inversion:
    """Run a chain backwards from the inputs of its dense layer. Raises NotApplicable, naming the layer, where it must stop.

    attack: constraints, condition and deficient are its hyper-parameters'. generator: objectives of linear programs, where
    inequalities have to help.
    """
    diagnostics = {"dense.residual": samples.residual, "dense.exact": float(samples.exact)}
    front = _Front.at(samples.inputs, samples.gradients @ chain.dense.weight)
    accuracy = observed.of_layer(chain.dense.name)[2]
    layers, done = len(chain.convolutions) + 1, 1
    progress(done, layers, samples.residual)
    for number, step in reversed(list(enumerate(chain.steps))):
        match step:
            case Reshape():
                _reshape(front, step)
            case Affine():
                _unscale(front, step)
            case Activate():
                _deactivate(front, step, accuracy, _bias_below(chain.steps[:number], observed))
            case Pool():
                front.gradient, front.pool = step.adjoint(front.gradient), step
            case Convolve():
                below = chain.steps[:number]
                accuracy = max(accuracy, observed.of_layer(step.name)[2])
                solved, said = _solve(front, step, below, observed, accuracy, attack, generator)
                diagnostics |= said
                front = _Front.at(solved.inputs, input_gradient(step.shape, step.weight, front.gradient))
                done += 1
                progress(done, layers, solved.residual)
    return Inversion(front.values.reshape(-1, *chain.image_shape), diagnostics)


def _reshape(front: _Front, step: Reshape) -> None:
    shape = (len(front.values), *step.before)
    front.values, front.gradient = front.values.reshape(shape), front.gradient.reshape(shape)
    front.known, front.trust = front.known.reshape(shape), front.trust.reshape(shape)
    front.bounded = front.bounded.reshape(shape)


def _unscale(front: _Front, step: Affine) -> None:
    slope, offset = step.slope, step.offset
    if front.pool is not None:
        if not (bool((slope == slope[:, :1, :1]).all()) and bool((offset == offset[:, :1, :1]).all())):
            raise NotApplicable(f"layer {step.name!r} scales pixels differently before they are averaged")
        slope, offset = slope[:, :1, :1], offset[:, :1, :1]
    front.values, front.gradient = (front.values - offset) / slope, front.gradient * step.slope
    front.trust, front.bounded = front.trust * slope.abs(), front.bounded & (slope > 0)


@dataclass(frozen=True)
class _Total:
    """What the sensitivities behind an activation, times `factor` (C,1,1), must add up to for each filter: `sums` (C,)."""

    factor: Tensor
    sums: Tensor


def _bias_below(steps: tuple[Step, ...], observed: Observed) -> _Total | None:
    """The bias gradient of the convolution that an activation follows on, seen through affine maps and pooling."""
    factor: Tensor | float = 1.0
    for step in reversed(steps):
        match step:
            case Convolve():
                bias = observed.gradient.get(f"{step.name}.bias")
                if bias is None:
                    return None
                return _Total(torch.as_tensor(factor).to(bias) * torch.ones_like(bias)[:, None, None], bias)
            case Affine() if step.slope.dim() == 3 and bool((step.slope == step.slope[:, :1, :1]).all()):
                factor = factor * step.slope[:, :1, :1]
            case Pool():  # a mean hands on as much as it is given
                pass
            case _:
                return None
    return None


def _deactivate(front: _Front, step: Activate, accuracy: float, total: _Total | None) -> None:
    """Through an activation by its outputs alone: Z is never needed, A'(Z) is a function of A(Z).

    Where that function has two values (an output close to the kink, or below zero for SiLU and GELU), the bias gradient
    below decides; raises NotApplicable where it contradicts the larger Z and no few outputs explain it, and where SiLU or GELU
    need it and there is none.
    """
    activation, outputs = step.activation, front.values
    if activation.folded and total is None and bool((outputs < 0).any()):
        raise NotApplicable(
            f"layer {step.name!r} ({activation.name}) gives values below zero, each of two inputs, and no bias gradient of a "
            "convolution before it says which"
        )
    edge = 0.0
    if activation.flat:
        edge = threshold(outputs, accuracy)
    nearness = (outputs / edge).log().abs() if edge > 0 else outputs.abs()
    outputs = activation.inside(torch.where(outputs > edge, outputs, 0.0) if activation.flat else outputs, MARGIN)
    slope = activation.derivative(outputs)
    if activation.other is not None and total is not None:
        order = outputs if activation.folded else torch.where(nearness.isnan(), math.inf, nearness)
        slope, flipped, left = settle(slope, activation.other(outputs), front.gradient, total, order, accuracy)
        if activation.folded and left > BRANCH:
            raise NotApplicable(
                f"layer {step.name!r} ({activation.name}) takes values left of its minimum: its outputs do not say which"
            )
    else:
        flipped = torch.zeros_like(slope, dtype=torch.bool)
    front.known = activation.determined(outputs) & ~flipped
    front.bounded = ~front.known & ~flipped if activation.flat else torch.zeros_like(flipped)
    front.values = torch.where(front.known, activation.inverse(outputs), 0.0)
    front.gradient, front.trust = front.gradient * slope, front.trust * slope.abs()


def threshold(outputs: Tensor, accuracy: float) -> float:
    """Outputs of a ReLU below this are zeros with an error.

    The errors that are seen below zero tell their size: the largest of them, or up to thrice that as long as hardly one
    active output is so small (these being spread evenly over their root mean square).
    """
    below = float((-outputs).clamp_min(0.0).max())
    if not below > 0:
        return accuracy * float(outputs.abs().max())
    active = outputs[outputs > below]
    if not len(active):
        return below
    rare = 0.05 * float(active.square().mean().sqrt()) / len(active)
    return max(below, min(3.0 * below, rare))


def settle(
    slope: Tensor, other: Tensor, gradient: Tensor, total: _Total, order: Tensor, accuracy: float
) -> tuple[Tensor, Tensor, float]:
    """Choose between two slopes at up to FLIPS of the CANDIDATES outputs of each filter that come first in `order`, so that
    Σ gradient·slope·factor is the bias gradient. All (B,C,H,W).

    Returns the slopes, where they were exchanged, and the relative error left. A filter is changed only where its error
    becomes far smaller than chance would make it.
    """
    batch, channels = slope.shape[:2]
    terms = (gradient * total.factor).transpose(0, 1).reshape(channels, -1)
    now, then = (t.transpose(0, 1).reshape(channels, -1) for t in (slope, other))
    error = total.sums - (terms * now).sum(1)
    size = (terms * torch.maximum(now.abs(), then.abs())).square().sum(1).sqrt().clamp_min(1e-300)
    doubtful = error.abs() > 100 * accuracy * size
    if not bool(doubtful.any()):
        return slope, torch.zeros_like(slope, dtype=torch.bool), relative(error, total.sums)
    count = min(CANDIDATES, terms.shape[1])
    first = order.transpose(0, 1).reshape(channels, -1).argsort(dim=1, stable=True)[:, :count]
    gains = (terms * (then - now)).gather(1, first)
    subsets = [chosen for n in range(1, FLIPS + 1) for chosen in combinations(range(count), n)]
    sums = torch.stack([gains[:, list(chosen)].sum(1) for chosen in subsets], 1)
    left, best = (error[:, None] - sums).abs().min(1)
    better = (left < size * 0.01 / len(subsets)) & (left < 0.01 * error.abs()) & doubtful
    flipped = torch.zeros_like(now, dtype=torch.bool)
    for channel in better.nonzero().flatten().tolist():
        flipped[channel, first[channel, list(subsets[int(best[channel])])]] = True
    remaining = torch.where(better, left, error.abs())
    shape = (channels, batch, *slope.shape[2:])
    flipped = flipped.reshape(shape).transpose(0, 1)
    return torch.where(flipped, other, slope), flipped, relative(remaining, total.sums)


def _weight_constraints(front: _Front, step: Convolve) -> WeightConstraints:
    """The convolution's own equation at the outputs that are known; averaged outputs are those of a larger kernel."""
    shape, weight = step.shape, step.weight
    target = front.values if step.bias is None else front.values - step.bias[:, None, None]
    if front.pool is not None:
        shape, weight = pooled(shape, weight, front.pool)
    trust = torch.where(front.known, front.trust, 0.0)
    largest = float(trust.max())
    if largest > 0 and float(trust[front.known].min()) > EVEN * largest:
        trust = front.known.to(trust)  # nearly alike: then the equations are those of a plain convolution
    elif largest > 0:
        trust = trust / largest
    return WeightConstraints(shape, weight, target, trust)


def pooled(shape: Convolution, weight: Tensor, pool: Pool) -> tuple[Convolution, Tensor]:
    """Convolution and average pooling as one convolution: kernel s·(q − 1) + d·(K − 1) + 1, stride s·t for windows of q."""
    sides = [
        s * (q - 1) + d * (k - 1) + 1
        for s, q, d, k in zip(shape.stride, pool.kernel, shape.dilation, shape.kernel, strict=True)
    ]
    wide = weight.new_zeros(*weight.shape[:2], *sides)
    rows = [torch.arange(k) * d for k, d in zip(shape.kernel, shape.dilation, strict=True)]
    for i in range(pool.kernel[0]):
        for j in range(pool.kernel[1]):
            wide[:, :, (rows[0] + i * shape.stride[0])[:, None], rows[1] + j * shape.stride[1]] += weight
    joined = Convolution(
        shape.channels, shape.height, shape.width, shape.filters, (sides[0], sides[1]),
        (shape.stride[0] * pool.stride[0], shape.stride[1] * pool.stride[1]), shape.padding, groups=shape.groups,
    )  # fmt: skip
    return joined, wide / math.prod(pool.kernel)


def _solve(
    front: _Front,
    step: Convolve,
    below: tuple[Step, ...],
    observed: Observed,
    accuracy: float,
    attack: RConv,
    generator: torch.Generator,
) -> tuple[Solved, dict[str, float]]:
    """The input of one convolution, of all samples together, and what is to be said about it."""
    weight, bias, _ = observed.of_layer(step.name)
    gradient = GradientConstraints(step.shape, front.gradient, weight, accuracy)
    weights = _weight_constraints(front, step)
    solved = _choose(gradient, weights, accuracy, attack)
    if attack.constraints == "auto" and not solved.spectrum.full:
        solved = pinch(solved, *_range(below, solved.inputs), _inequalities(front, step), generator, accuracy)
    first = not any(isinstance(other, Convolve) for other in below)
    shape, batch = step.shape, gradient.batch
    alive = int((front.gradient != 0).any(3).any(2).any(0).sum())
    needed, spectrum = shape.filters_for_gradients(batch), solved.spectrum
    said = {
        "gradient_constraints": float(shape.gradient_constraints * shape.channels),
        "weight_constraints": float(weights.count),
        "unknowns": float(batch * shape.unknowns),
        "rank": float(spectrum.rank * (shape.channels // shape.groups if solved.kind == "gradient" else 1)),
        "sigma_max": spectrum.sigma_max,
        "sigma_min": spectrum.sigma_min,
        "condition": spectrum.condition,
        "hybrid": float(solved.kind != "gradient"),
        "inequalities": float(solved.kind == "inequalities"),
        "active_filters": float(alive),
        "residual": solved.residual,
        "gradient_residual": gradient.residual(solved.inputs),
    }
    if needed is not None:
        said["share_of_r_gap"] = needed / (batch * shape.filters_for_weights())
    if bias is not None:
        said["bias_residual"] = relative(front.gradient.sum((0, 2, 3)) - bias, bias)
    if not spectrum.full and not (attack.deficient == "everywhere" or (attack.deficient == "image" and first)):
        raise NotApplicable(_too_few(step, solved, said, needed))
    return solved, {f"{step.name}.{key}": value for key, value in said.items()}


def _range(below: tuple[Step, ...], inputs: Tensor) -> tuple[Tensor, Tensor]:
    """What a convolution's input must lie between, by what made it: an activation, or an affine map of the image."""
    infinite = torch.full_like(inputs, math.inf)
    maps: list[Affine] = []
    for step in reversed(below):
        match step:
            case Activate() if not maps:
                return torch.full_like(inputs, step.activation.low), torch.full_like(inputs, step.activation.high)
            case Affine() if step.slope.shape == inputs.shape[1:]:
                maps.append(step)
            case Reshape() if step.before == step.after:
                pass
            case _:
                return -infinite, infinite
    black, white = torch.zeros_like(inputs), torch.ones_like(inputs)
    for affine in reversed(maps):
        black, white = affine.slope * black + affine.offset, affine.slope * white + affine.offset
    return torch.minimum(black, white), torch.maximum(black, white)


def _inequalities(front: _Front, step: Convolve) -> WeightConstraints:
    """W ∗ x ≤ bound at a ReLU's inactive outputs."""
    constraints = _weight_constraints(front, step)
    return replace(constraints, trust=front.bounded.to(constraints.target))


def _choose(gradient: GradientConstraints, weights: WeightConstraints, accuracy: float, attack: RConv) -> Solved:
    """Gradient constraints where they are enough, else all that there is."""
    if attack.constraints == "weights":
        return solve_hybrid(None, weights, accuracy)
    if attack.constraints == "hybrid" and weights.count:
        return solve_hybrid(gradient, weights, accuracy)
    needed = gradient.shape.filters_for_gradients(gradient.batch)
    if attack.constraints == "auto" and weights.count and (needed is None or needed > gradient.shape.filters):
        return solve_hybrid(gradient, weights, accuracy)
    found = solve_gradient(gradient)
    good = found.spectrum.full and found.spectrum.condition <= min(attack.condition, 1.0 / share_for(accuracy))
    if good or attack.constraints == "gradient" or not weights.count:
        return found
    other = solve_hybrid(gradient, weights, accuracy)
    if found.spectrum.full and not (other.spectrum.full and other.spectrum.condition < found.spectrum.condition):
        return found
    return other


def _too_few(step: Convolve, solved: Solved, said: dict[str, float], needed: int | None) -> str:
    shape = step.shape
    many = f"{shape.filters} filters, {int(said['active_filters'])} of them active"
    rule = "no number of filters sees all pixels" if needed is None else f"{needed} active filters are needed"
    return (
        f"layer {step.name!r} (Conv2d): its {solved.kind} constraints have rank {int(said['rank'])} for "
        f"{int(said['unknowns'])} unknowns ({many}; for gradient constraints alone {rule})"
    )

"""Activation patterns as unknowns: how a search crosses the jumps of a piecewise linear network's gradient.

Which units of a ReLU network are on is its activation pattern. Inside one pattern a client's gradient is a smooth function
of the image; where a unit switches it jumps, and a search that follows slopes is caught between jumps. So a unit is given a
gate of its own,

    relu(z) → g·z,    g free, 1 for "on" and 0 for "off",

and image and gates are searched at once: free gates do not jump, and a wrong unit can be switched gradually. Only units near
their kink are free; those far from it are left as the image has them, and where all of these are right, the truth is an exact
solution. Max pooling has jumps of its own, which are left.

Source: our own. Gates that are separate from what they gate: Fiat, Malach, Shalev-Shwartz, Decoupling gating from
linearity, arXiv 1906.05032 (for training); here they are unknowns of an inversion.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attacks.smoothing import kinks
from fedattack.tasks import bind
from fedattack.types import State


class Gate(nn.Module):
    """(Leaky) ReLU with the units' states from outside, in the order of its calls; on its own states while `listening`."""

    def __init__(self, negative_slope: float = 0.0) -> None:
        super().__init__()
        self.negative_slope = negative_slope
        self.states: list[Tensor] = []
        self.listening = False

    def forward(self, input: Tensor) -> Tensor:
        state = (input > 0).to(input) if self.listening else self.states.pop(0)
        return input * (self.negative_slope + (1.0 - self.negative_slope) * state)


@dataclass(frozen=True)
class Gates:
    """A copy of a model whose kinks are gates. Units are counted in the order in which a forward pass meets them.

    inputs: (units,), what every unit is given for the images, in standard deviations of its layer. calls: gate and input
    shape of each call; a module called twice is met twice.
    """

    model: nn.Module
    inputs: Tensor
    calls: Sequence[tuple[Gate, torch.Size]]

    @staticmethod
    def of(model: nn.Module, state: State, images: Tensor) -> "Gates":
        """For images (B,C,H,W). The model is untouched. ReLUs called as functions are not seen."""
        twin = copy.deepcopy(model)
        heard: list[tuple[Gate, Tensor]] = []

        def listen(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            assert isinstance(module, Gate)
            heard.append((module, inputs[0].detach()))

        made: dict[nn.Module, Gate] = {}  # one gate for a module that stands at several places
        for name in kinks(twin):
            old = twin.get_submodule(name)
            gate = made.setdefault(old, Gate(float(old.negative_slope) if isinstance(old, nn.LeakyReLU) else 0.0))
            parent, _, leaf = name.rpartition(".")
            setattr(twin.get_submodule(parent), leaf, gate)
        hooks = [gate.register_forward_pre_hook(listen) for gate in made.values()]
        for gate in made.values():
            gate.listening = True
        with torch.no_grad():
            bind(twin, {name: tensor.clone() for name, tensor in state.items()})(images)
        for gate, hook in zip(made.values(), hooks, strict=True):
            gate.listening = False
            hook.remove()
        inputs = [z.reshape(-1) / z.std(correction=0).clamp_min(torch.finfo(z.dtype).tiny) for _, z in heard]
        return Gates(twin, torch.cat([images.new_zeros(0), *inputs]), [(gate, z.shape) for gate, z in heard])

    @property
    def states(self) -> Tensor:
        """(units,): 1 where a unit is on, else 0."""
        return (self.inputs > 0).to(self.inputs)

    def nearest(self, count: int) -> tuple[Tensor, Tensor]:
        """Indices of the units nearest to their kinks, and the chance that each is on.

        Their inputs are taken for as uncertain as half of the largest among them.
        """
        near = self.inputs.abs().argsort()[:count]
        inputs = self.inputs[near]
        width = (0.5 * inputs.abs().max()).clamp_min(torch.finfo(inputs.dtype).tiny)
        return near, torch.special.ndtr(inputs / width)

    def put(self, states: Tensor) -> None:
        """The units' states (units,) of the next forward pass."""
        for gate, _ in self.calls:
            gate.states.clear()
        sizes = [shape.numel() for _, shape in self.calls]
        for (gate, shape), part in zip(self.calls, torch.split(states, sizes), strict=True):
            gate.states.append(part.reshape(shape))

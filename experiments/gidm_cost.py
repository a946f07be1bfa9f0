"""What GIDM costs: seconds an iteration of both phases beside a plain loop, where they go, and memory.

    python -m experiments.gidm_cost [--size 32] [--channels 32 64] [--sampling-steps 10] [--iterations 3] [--repeats 5]

The plain loop is written from the paper's description and uses torch only: all sampling steps, the client's loss, its
gradient and the distance in one graph, one backward pass through it, Adam. The sampling network is a second copy, so that the
client's gradient does not run through it. The tidied loop freezes that copy and asks for the gradient of x alone, where
backward() computes those of all weights too. Same U-Net, same DDIM steps, same process, one thread; the loops take turns.
Seconds are CPU time of the process, so that other load counts less; the load average is printed. Memory is the rise of
the peak resident set (VmHWM in /proc) over that before the phase, each in a process of its own.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from statistics import median
from time import process_time
from typing import Any

import torch
from torch import Tensor

from attacks.gidm import GIDM, Decode, Phases, sampler_of
from attacks.matching import DISTANCES, Problem, objective, pose
from fedattack.jobs import torch_threads
from fedattack.models import build_model
from fedattack.priors import Prior, prior_of, step_bytes
from fedattack.seeding import derive_generator
from fedattack.tasks import Diffusion, simulate
from fedattack.types import Knowledge, Update, silent

TASK = Diffusion()
TIMESTEP = 100


# ------------------------------------------------------------------------------------------------ the plain loop
def plain_loop(
    net: Any,
    sampler: Any,
    observed: Sequence[Tensor],
    noise: Tensor,
    x: Tensor,
    times: Sequence[int],
    count: int,
    tidy: bool,
) -> None:
    """`count` iterations on the latent x, sampled at `times` (none: on the pixels x in [−1, 1] themselves)."""
    table = TASK.alphas_cumprod.float()
    timestep = torch.tensor([TIMESTEP])
    a = table[TIMESTEP]
    x = x.clone().requires_grad_()
    optimizer = torch.optim.Adam([x], lr=0.01)
    for _ in range(count):
        optimizer.zero_grad()
        image = x
        for now, then in zip(times, [*times[1:], -1], strict=False):
            now_a, then_a = table[now], table[then] if then >= 0 else torch.tensor(1.0)
            epsilon = sampler(image, torch.tensor([now]))
            clean = (image - (1 - now_a).sqrt() * epsilon) / now_a.sqrt()
            image = then_a.sqrt() * clean + (1 - then_a).sqrt() * epsilon
        loss = (noise - net(a.sqrt() * image + (1 - a).sqrt() * noise, timestep)).square().mean()
        dummy = torch.autograd.grad(loss, list(net.parameters()), create_graph=True)
        distance = sum(((one - other) ** 2).sum() for one, other in zip(dummy, observed, strict=True))
        if tidy:
            (x.grad,) = torch.autograd.grad(distance, x)  # type: ignore[arg-type]
        else:
            distance.backward()  # type: ignore[union-attr]
        optimizer.step()


# ------------------------------------------------------------------------------------------------ ours
class Setting:
    """One client's update of an untrained U-Net, everything known, and our phases on it."""

    def __init__(self, size: int, channels: Sequence[int], steps: int, memory_mib: float) -> None:
        shape = (3, size, size)
        self.net = build_model("unet", image_shape=shape, num_classes=None, seed=0, block_out_channels=tuple(channels))
        self.steps = steps
        images = torch.rand((1, *shape), generator=derive_generator(0, "images"))
        private = dict(TASK.draw(images, torch.zeros(1), generator=derive_generator(0, "client")))
        private["timesteps"] = torch.tensor([TIMESTEP])
        sent = {name: tensor.detach().clone() for name, tensor in self.net.state_dict().items()}
        received = {n: t.detach() for n, t in simulate(self.net, sent, TASK, [private], kind="gradient").items()}
        update = Update(1, "0", sent, received, "gradient", 1)
        knowledge = Knowledge(image_shape=shape, batch_size=1, noise=private["noise"], timesteps=private["timesteps"])
        self.observed = [received[name] for name, _ in self.net.named_parameters()]
        self.noise = private["noise"]
        self.latent = torch.randn((1, 1, *shape), generator=derive_generator(0, "latent"))
        self.problem: Problem = pose(update, self.net, TASK, knowledge)
        self.prior: Prior = prior_of(update, self.net, TASK, shape)
        self.attack = GIDM(sampling_steps=steps, clip=False, memory_mib=memory_mib)

    def decode(self, memory_mib: float | None = None) -> Decode:
        attack = self.attack if memory_mib is None else replace(self.attack, memory_mib=memory_mib)
        return sampler_of(attack, self.prior, self.latent, derive_generator(0))

    def ours(self, generative: bool, count: int, memory_mib: float | None = None) -> None:
        """`count` iterations; the one more forward pass at the end, which a phase of thousands does not feel, is left out."""
        phases = Phases(self.problem, DISTANCES["l2"], self.attack, silent)
        phases.search(self.latent, {}, self.decode(memory_mib) if generative else None, count, False)

    def times(self) -> list[int]:
        return [round(1000 - step * 1000 / self.steps) - 1 for step in range(self.steps)]


def seconds(call: Callable[[], None]) -> float:
    begun = process_time()
    call()
    return process_time() - begun


def compare(setting: Setting, iterations: int, repeats: int) -> None:
    """Seconds an iteration, from the difference between 1 + `iterations` iterations and 1, in turn."""
    flat = setting.latent[0]
    frozen, thawed = (deepcopy(setting.net).requires_grad_(grad) for grad in (False, True))

    def plain(sampler: Any, times: Sequence[int], tidy: bool) -> Callable[[int], None]:
        return lambda n: plain_loop(setting.net, sampler, setting.observed, setting.noise, flat, times, n, tidy)

    contenders: dict[str, Callable[[int], None]] = {
        "generative, plain loop": plain(thawed, setting.times(), False),
        "generative, plain loop tidied": plain(frozen, setting.times(), True),
        "generative, ours": lambda n: setting.ours(True, n),
        "generative, ours, every step run twice": lambda n: setting.ours(True, n, 0.0),
        "fine-tuning, plain loop": plain(frozen, [], False),
        "fine-tuning, plain loop tidied": plain(frozen, [], True),
        "fine-tuning, ours": lambda n: setting.ours(False, n),
    }
    spent: dict[str, list[float]] = {name: [] for name in contenders}
    for repeat in range(repeats + 1):
        for name, call in contenders.items():
            more = seconds(lambda call=call: call(1 + iterations)) - seconds(lambda call=call: call(1))
            if repeat:  # the first turn warms up
                spent[name].append(more / iterations)
    print("| loop | CPU seconds an iteration: median (range) | ÷ plain loop |\n|---|---|---|")
    for name, values in spent.items():
        base = median(spent[f"{name.split(',')[0]}, plain loop"])
        print(
            f"| {name} | {median(values):.3f} ({min(values):.3f} to {max(values):.3f}) | {median(values) / base:.2f} |"
        )


def split(setting: Setting, repeats: int) -> None:
    """Where an iteration of ours spends its time."""
    losses_of = objective(setting.problem, DISTANCES["l2"])
    print("\n| part of an iteration | generative, CPU seconds | run twice | fine-tuning |\n|---|---|---|---|")
    columns = []
    for memory_mib in (None, 0.0, "pixels"):
        parts: dict[str, list[float]] = {}
        decode = None if memory_mib == "pixels" else setting.decode(memory_mib)  # type: ignore[arg-type]
        for _ in range(repeats):
            x = setting.latent.clone().requires_grad_()
            marks = [process_time()]
            images = decode(x) if decode else x
            marks.append(process_time())
            at = images.detach().requires_grad_()
            losses = losses_of({"images": at})
            marks.append(process_time())
            (slope,) = torch.autograd.grad(losses.sum(), at)
            marks.append(process_time())
            if decode:
                torch.autograd.grad(images, x, slope)
            marks.append(process_time())
            names = ("sampler, forward", "client's gradient (forward and backward)", "its derivative", "sampler, back")
            for name, before, after in zip(names, marks, marks[1:], strict=False):
                parts.setdefault(name, []).append(after - before)
        columns.append({name: median(values) for name, values in parts.items()})
    for name in columns[0]:
        print(f"| {name} | " + " | ".join(f"{column[name]:.3f}" for column in columns) + " |")


# ------------------------------------------------------------------------------------------------ memory
def status(key: str) -> int:
    """VmRSS or VmHWM of this process, in KiB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1])


def memory_here(setting: Setting, memory_mib: float | None) -> None:
    """Print the rise of the peak over two iterations of the generative phase, or of fine-tuning, in MiB."""
    setting.ours(False, 1)  # whatever is allocated once
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    setting.ours(memory_mib is not None, 2, memory_mib)
    print((status("VmHWM") - before) / 1024)


def memory(chosen: argparse.Namespace) -> None:
    print("\n| sampling steps | all activations kept, MiB | every step run twice, MiB |\n|---|---|---|")

    def risen(steps: int, memory_mib: float) -> float:
        command = [sys.executable, "-m", "experiments.gidm_cost", "--size", str(chosen.size), "--channels"]
        command += [*map(str, chosen.channels), "--sampling-steps", str(steps), "--memory-here", str(memory_mib)]
        return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])

    for steps in chosen.memory_steps:
        print(f"| {steps} | {risen(steps, 1e9):.0f} | {risen(steps, 0.0):.0f} |", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--channels", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--sampling-steps", type=int, default=10)
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory-steps", type=int, nargs="*", default=[5, 10, 20, 50])
    parser.add_argument("--memory-here", type=float, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    with torch_threads(1):
        setting = Setting(chosen.size, chosen.channels, chosen.sampling_steps, 1024.0)
        if chosen.memory_here is not None:
            memory_here(setting, chosen.memory_here)
            return
        weights = sum(p.numel() for p in setting.net.parameters())
        kept = step_bytes(setting.prior, setting.latent[0]) / 2**20
        print(
            f"{weights} weights, {chosen.size}×{chosen.size}×3, {chosen.sampling_steps} DDIM steps of {kept:.1f} MiB each"
        )
        compare(setting, chosen.iterations, chosen.repeats)
        split(setting, chosen.repeats)
        print(f"\nload average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
        memory(chosen)


if __name__ == "__main__":
    main()

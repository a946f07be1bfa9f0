"""Attacks that behave and misbehave, named as "pool_attacks:Class". `mark` is a file that a run appends its pid to.

A run writes <mark>.begun when it starts and <mark>.done when it has come to its end: "exactly once" is one line in the latter.
"""

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from fedattack.types import Reconstruction, silent


@dataclass(frozen=True)
class Marked:
    """Writes both marks and returns an image of zeros; `gate`, if given, must exist before it ends."""

    mark: str = ""
    gate: str = ""
    name: ClassVar[str] = "marked"
    needs: ClassVar[frozenset[str]] = frozenset()
    tasks: ClassVar[frozenset[str]] = frozenset({"classification"})

    def reconstruct(self, update, model, task, knowledge, *, generator, progress=silent):
        self.write("begun")
        self.work(progress)
        self.write("done")
        return Reconstruction(images=torch.zeros(1, 1, 4, 4), losses=(0.5,), steps=3)

    def write(self, what):
        if self.mark:
            with Path(f"{self.mark}.{what}").open("a") as file:
                file.write(f"{os.getpid()}\n")

    def work(self, progress):
        for iteration in range(3):
            progress(iteration + 1, 3, 0.5)
        while self.gate and not Path(self.gate).exists():
            progress(3, 3, 0.5)
            time.sleep(0.02)


class Raises(Marked):
    def work(self, progress):
        raise RuntimeError("the attack has a bug")


class Exits(Marked):
    def work(self, progress):
        sys.exit(3)


class Needy(Marked):
    needs = frozenset({"labels"})


class Slow(Marked):
    """Runs until its time limit, saying so at every step."""

    def work(self, progress):
        while True:
            progress(1, 2, float("nan"))
            time.sleep(0.01)


class Mute(Marked):
    """Never comes back and never says anything."""

    def work(self, progress):
        while True:
            time.sleep(0.05)


class Killer(Marked):
    """Takes its process down, as a crash in a driver or the OOM killer does."""

    def work(self, progress):
        os._exit(1)


class Threads(Marked):
    """Says how many threads torch has."""

    def work(self, progress):
        Path(f"{self.mark}.threads").write_text(str(torch.get_num_threads()))

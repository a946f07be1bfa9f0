"""The first and the last thing of every run: write down what runs, and turn what it left into rows and a report."""

import platform
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from fedattack.config import Experiment, to_toml
from fedattack.store import RunFolder, private_folder, read_json, write_atomically, write_json

PACKAGES = ("fedattack", "flwr", "ray", "torch", "torchvision", "diffusers", "lpips", "scikit-image", "numpy")


@dataclass(frozen=True)
class Begun:
    """What is known of a run before it starts; `finish_run` completes it."""

    about: dict[str, Any]
    clock: float | None


def begin_run(run: RunFolder, experiment: Experiment, *, engine: str, command: str) -> Begun:
    """Make the run folder (mode 0700), write the resolved configuration and about.json."""
    private_folder(run.path)
    write_atomically(run.config, to_toml(experiment).encode())
    before = read_json(run.about) if run.about.exists() else {}
    about = {
        "name": experiment.name,
        "created": before.get("created") or _now(),
        "engine": engine,
        "command": command,
        "seed": sorted({cell.seed for cell in experiment.cells}),
        "versions": versions(),
        "wall_seconds": before.get("wall_seconds", 0.0),
    }
    write_json(run.about, about)
    return Begun(about, time.perf_counter())


def reopen_run(run: RunFolder) -> Begun:
    """For scoring a run again: what it says about itself stays, and no time is added."""
    return Begun(read_json(run.about) if run.about.exists() else {}, None)


def finish_run(run: RunFolder, experiment: Experiment, begun: Begun) -> Path:
    """Score, write rows, figures and the report; gives the report's path. Wall time adds up over resumed runs."""
    from fedattack.report import build_report
    from fedattack.report.figures import draw_figures
    from fedattack.scoring import score_run

    score_run(run, experiment)
    if begun.clock is not None:
        wall = begun.about["wall_seconds"] + time.perf_counter() - begun.clock
        write_json(run.about, {**begun.about, "finished": _now(), "wall_seconds": round(wall, 1)})
    draw_figures(run, experiment.figure)
    report: Path = build_report(run.path)
    return report


def versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    found = {"python": platform.python_version(), "platform": f"{sys.platform} {platform.machine()}"}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")

"""The sample grids of diffusion federations, round by round, as the checkpoints hold them: the files' bytes unchanged."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedattack.report.gallery import Frame, png_frame
from fedattack.report.summary import Row, case_of, defense_of, plain_number, text

ROUNDS = 12
"""Grids shown per federation: the last one, and earlier ones evenly spread."""

GRID_PIXELS = 360
"""A grid is enlarged by the largest whole factor that keeps its longer side within this."""


@dataclass(frozen=True, slots=True)
class Grids:
    """The grids of one federation in order of their rounds; `hidden` of them are not shown."""

    case: str
    defense: str
    federation: str
    note: str
    frames: tuple[Frame, ...]
    hidden: int


def sample_grids(history: Sequence[Row], run: Path) -> list[Grids]:
    """One entry for every federation of the history that drew samples."""
    found: dict[str, Grids] = {}
    for entry in history:
        federation = text(entry, "federation")
        if federation in found or not federation:
            continue
        folder = run / "federations" / federation / "checkpoints"
        paths = sorted(folder.glob("round-*/samples.png"), key=lambda path: path.parent.name) if folder.is_dir() else []
        shown = _spread(paths, ROUNDS)
        frames = [_grid(run, path) for path in shown]
        if frames:
            note = _note(_about(shown[-1]))
            hidden = len(paths) - len(shown)
            found[federation] = Grids(case_of(entry), defense_of(entry), federation, note, tuple(frames), hidden)
    return list(found.values())


def _grid(run: Path, path: Path) -> Frame:
    number = int(path.parent.name.rpartition("-")[2]) if path.parent.name.rpartition("-")[2].isdigit() else 0
    drawn = _about(path)
    spread = f", std {plain_number(drawn['std'], 3)}" if isinstance(drawn.get("std"), float) else ""
    name = f"round {number}"
    return png_frame(run, str(path.relative_to(run)), f"samples after {name}", f"{name}{spread}", GRID_PIXELS)


def _note(drawn: Mapping[str, Any]) -> str:
    if not drawn:
        return ""
    source = "the moving average of the global model" if drawn.get("drawn_from") == "average" else "the global model"
    return f"{drawn.get('count')} images drawn from {source} by {drawn.get('sampler')} in {drawn.get('steps')} steps"


def _about(path: Path) -> dict[str, Any]:
    try:
        drawn = json.loads((path.parent / "about.json").read_text())["samples"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return drawn if isinstance(drawn, dict) else {}


def _spread(paths: Sequence[Path], most: int) -> list[Path]:
    if len(paths) <= most:
        return list(paths)
    return [paths[round(i * (len(paths) - 1) / (most - 1))] for i in range(most)]

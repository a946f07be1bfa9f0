"""The pictures of a report: truth, reconstructions and baselines side by side, the files' bytes unchanged.

Pictures are chosen in the order of the rows, never by how good they look. The browser enlarges them by whole factors
(nearest neighbour); their grey levels are never touched.
"""

import base64
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedattack.report.summary import (
    BASELINES,
    BATCH_MEAN,
    EXACT_DB,
    Row,
    attack_of,
    case_of,
    defense_of,
    is_baseline,
    is_ok,
    number,
    numbers,
    per_image,
    plain_number,
    target_of,
    text,
    variant_of,
    variants,
)

TARGETS = 3
"""Updates shown per case and defense."""

IMAGES = 8
"""Images shown per update."""

PICTURES = 1500
"""Pictures in the whole report: a file of some megabytes."""

DISPLAY_PIXELS = 96
"""Pictures are enlarged by the largest whole factor that keeps their longer side within this."""

BASELINE_NOTES = {
    "nearest-public": "baseline, looks at the truth",
    BATCH_MEAN: "the truth's own mean, of all single images the least mean MSE: no baseline",
}

FILM_PIXELS = 80
"""The same for the pictures of an attack's way."""

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True, slots=True)
class Frame:
    """One picture, or an empty frame of the same size with the reason in `empty`. Sizes are in CSS pixels."""

    source: str
    width: int
    height: int
    caption: str
    alt: str
    empty: str = ""
    exact: bool = False


@dataclass(frozen=True, slots=True)
class Strip:
    """The pictures of one attack or baseline, a single one where it stands for the batch. `empty`: why there are none."""

    label: str
    note: str
    kind: str
    frames: tuple[Frame, ...]
    empty: str = ""


@dataclass(frozen=True, slots=True)
class Target:
    """One client's update in one round: `rows` pictures beside the truth, frames `height` tall, `hidden` images not shown."""

    title: str
    rows: int
    height: int
    truth: tuple[Frame, ...]
    strips: tuple[Strip, ...]
    hidden: int
    films: tuple[Strip, ...] = ()


@dataclass(frozen=True, slots=True)
class Group:
    """One case and defense, with `hidden` updates not shown."""

    case: str
    defense: str
    targets: tuple[Target, ...]
    hidden: int


def gallery(rows: Sequence[Row], run: Path, *, targets: int = TARGETS, images: int = IMAGES) -> list[Group]:
    """Groups in the order of the rows ("none" first in each case), capped at `targets`, `images` and PICTURES."""
    split = variants(rows)
    grouped: dict[str, dict[str, dict[tuple[str, str, str], list[Row]]]] = {}
    for row in rows:
        by_defense = grouped.setdefault(case_of(row), {})
        by_defense.setdefault(defense_of(row), {}).setdefault(target_of(row), []).append(row)
    groups, budget = [], PICTURES
    for case, by_defense in grouped.items():
        for defense in sorted(by_defense, key=lambda name: name != "none"):
            shown: list[Target] = []
            everything = by_defense[defense]
            for target, members in everything.items():
                if len(shown) == targets or budget <= 0:
                    break
                made = _target(target, members, run, images, split.get(case, ()))
                strips = (*made.strips, *made.films)
                budget -= sum(
                    bool(frame.source) for frame in (*made.truth, *(f for strip in strips for f in strip.frames))
                )
                shown.append(made)
            groups.append(Group(case, defense, tuple(shown), len(everything) - len(shown)))
    return groups


def _target(
    target: tuple[str, str, str], rows: Sequence[Row], run: Path, images: int, split: tuple[str, ...]
) -> Target:
    federation, client, round_ = target
    title = ", ".join(
        part for part in (client or "unnamed client", f"round {round_}" if round_ else "", federation) if part
    )
    truth = next((paths for row in rows if (paths := _paths(row, "truth"))), [])
    ordered = sorted(rows, key=lambda row: _order(row))
    total = max([len(truth), *(len(_paths(row, "reconstruction")) for row in ordered)])
    shown = max(1, min(images, total))
    width, height = _frame_size([*truth, *(path for row in ordered for path in _paths(row, "reconstruction"))], run)
    private = [
        _frame(run, path, f"true image {i + 1}", width, height, f"image {i + 1}")
        for i, path in enumerate(truth[:shown])
    ]
    strips = [_strip(row, run, shown, width, height, split) for row in ordered]
    films = tuple(film for row in ordered if not is_baseline(row) and (film := _film(row, run)))
    return Target(title, shown, height, tuple(private), tuple(strips), max(0, total - shown), films)


def _order(row: Row) -> tuple[bool, int, str]:
    name = text(row, "attack")
    return is_baseline(row), BASELINES.index(name) if name in BASELINES else len(BASELINES), attack_of(row)


def _strip(row: Row, run: Path, shown: int, width: int, height: int, split: tuple[str, ...]) -> Strip:
    label, spec = text(row, "attack") or attack_of(row), attack_of(row)
    kind = "baseline" if is_baseline(row) else "attack"
    parameters = spec.removeprefix(label).strip("()")
    note = ", ".join(part for part in (parameters, variant_of(row, split)) if part)
    if kind == "baseline":
        note = f"baseline {_parameters_of_control(row)}".strip()
        note = BASELINE_NOTES.get(label, note)
    if is_ok(row) and text(row, "represents") == "timesteps":
        return Strip(label, note, kind, (), _timesteps_alone(row))
    paths, psnr = _paths(row, "reconstruction"), per_image(row, "psnr_db")
    if not is_ok(row) or not paths:
        status = text(row, "status", "ok")
        reason = text(row, "error") or ("no pictures were saved" if status == "ok" else "no reason given")
        return Strip(label, note, kind, (), reason if status == "ok" else f"{status}: {reason}")
    if text(row, "represents") == "user":
        frame, to_mean = _one_for_all(row, run, paths[0], spec, width, height)
        return Strip(label, ", ".join(part for part in (note, to_mean) if part), kind, (frame,))
    frames = []
    for i in range(shown):
        value = psnr[i] if i < len(psnr) else None
        path = paths[i] if i < len(paths) else None
        name = f"{spec}, image {i + 1}, PSNR {plain_number(value)} dB"
        caption = "PSNR missing" if value is None else f"{plain_number(value)} dB"
        frames.append(_frame(run, path, name, width, height, caption, value is not None and value >= EXACT_DB))
    return Strip(label, note, kind, tuple(frames))


def _timesteps_alone(row: Row) -> str:
    """What stands in the place of the pictures of an attack that looks for timesteps."""
    accuracy = number(row.get("timestep_accuracy"))
    return "timesteps only" if accuracy is None else f"timesteps only: {100 * accuracy:.0f} % found"


def _one_for_all(row: Row, run: Path, path: str | None, spec: str, width: int, height: int) -> tuple[Frame, str]:
    """The one picture that stands for a batch: its PSNR to all of them, and that to the nearest, said to be chosen.

    Beside it the words for its PSNR to their mean, "" where that is not known.
    """
    psnr, told = numbers(row, "psnr_db"), row.get("representative")
    found = told if isinstance(told, Mapping) else {}
    nearest, to_mean = (number(found.get(name)) for name in ("nearest_psnr_db", "batch_mean_psnr_db"))
    mean = statistics.fmean(psnr) if psnr else None
    caption = f"for all: {plain_number(mean)} dB" if mean is not None else "PSNR missing"
    alt = (
        f"{spec}, one image for all {len(psnr)}, mean PSNR {plain_number(mean)} dB, to their mean {plain_number(to_mean)} dB, "
        f"nearest {plain_number(nearest)} dB (chosen by the truth)"
    )
    words = f"PSNR to their mean {plain_number(to_mean)} dB" if to_mean is not None else ""
    return _frame(run, path, alt, width, height, caption), words


def _parameters_of_control(row: Row) -> str:
    return text(row, "attack_spec").partition("(")[2].removesuffix(")") if text(row, "control") else ""


def _film(row: Row, run: Path) -> Strip | None:
    """The way of one image of an attack that kept it, step by step."""
    way = row.get("trajectory")
    if not isinstance(way, Mapping) or not isinstance(paths := way.get("images"), list):
        return None
    steps, psnr = (value if isinstance(value := way.get(name), list) else [] for name in ("steps", "psnr_db"))
    frames = []
    for i, path in enumerate(paths):
        first = psnr[i][0] if i < len(psnr) and isinstance(psnr[i], list) and psnr[i] else None
        value = float(first) if isinstance(first, int | float) else None
        caption = f"{steps[i] if i < len(steps) else '?'}: {plain_number(value)} dB"
        frames.append(png_frame(run, str(path), f"{attack_of(row)}, step {caption}", caption, FILM_PIXELS))
    place = way.get("image")
    note = f"{f'image {place + 1}' if isinstance(place, int) else 'one image'} on its way, by step"
    return Strip(attack_of(row), note, "attack", tuple(frames))


def _paths(row: Row, which: str) -> list[str | None]:
    images = row.get("images")
    paths = images.get(which) if isinstance(images, Mapping) else None
    return [str(path) if path else None for path in paths] if isinstance(paths, list | tuple) else []


def _frame(
    run: Path, path: str | None, alt: str, width: int, height: int, caption: str = "", exact: bool = False
) -> Frame:
    if path is None:
        return Frame("", width, height, caption, alt, "no image for this one")
    data = _read_png(run, path)
    if data is None:
        return Frame("", width, height, caption, alt, "picture file not found")
    own_width, own_height = _enlarged(data)
    source = "data:image/png;base64," + base64.b64encode(data).decode("ascii")
    return Frame(source, own_width, own_height, caption, alt, "", exact)


def png_frame(run: Path, path: str, alt: str, caption: str, pixels: int) -> Frame:
    """A picture on its own, enlarged by the largest whole factor that keeps its longer side within `pixels`."""
    data = _read_png(run, path)
    if data is None:
        return Frame("", pixels, pixels, caption, alt, "picture file not found")
    width, height = _enlarged(data, pixels)
    return Frame("data:image/png;base64," + base64.b64encode(data).decode("ascii"), width, height, caption, alt)


def _frame_size(paths: Sequence[str | None], run: Path) -> tuple[int, int]:
    """The size of the first picture that can be read: what an empty frame beside it measures."""
    data = next((found for path in paths if path and (found := _read_png(run, path))), None)
    return _enlarged(data) if data else (DISPLAY_PIXELS, DISPLAY_PIXELS)


def _read_png(run: Path, path: str) -> bytes | None:
    """The bytes of a PNG inside the run folder; None for anything else, since rows are not to be trusted with paths."""
    try:
        file = (run / path).resolve()
        if not file.is_relative_to(run.resolve()) or not file.is_file():
            return None
        data = file.read_bytes()
    except (OSError, ValueError):
        return None
    return data if data.startswith(PNG_MAGIC) and len(data) >= 24 else None


def _enlarged(png: bytes, pixels: int = DISPLAY_PIXELS) -> tuple[int, int]:
    """Width and height of the PNG's header, times the largest whole factor that stays within `pixels`."""
    width, height = int.from_bytes(png[16:20], "big"), int.from_bytes(png[20:24], "big")
    factor = max(1, pixels // max(width, height, 1))
    return width * factor, height * factor

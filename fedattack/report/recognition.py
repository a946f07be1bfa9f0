"""The table of what can be recognised in the pictures, from the field "recognised" of rows (see fedattack.recognition)."""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedattack.recognition import TOP
from fedattack.recognition_probes import NOISE
from fedattack.report.summary import (
    Cell,
    Row,
    attack_of,
    case_of,
    defense_of,
    is_baseline,
    is_ok,
    number,
    plain_number,
    summarise,
    target_of,
    variant_of,
    variants,
)

Facts = Mapping[str, Any]

CHOSEN = "pairs chosen with the truth: compare with the controls"
"""In place of chance, in batches above 1."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A figure; `value` is what it is sorted by, `note` what chance would give."""

    value: float | None
    shown: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class Line:
    """An attack or a baseline."""

    cell: Cell
    entries: tuple[Entry, ...]


@dataclass(frozen=True, slots=True)
class Recognised:
    """One case. heads: (title, small print) of every figure; yardsticks: what probes see on clean and noisy images; chance."""

    case: str
    heads: tuple[tuple[str, str], ...]
    yardsticks: tuple[tuple[str, tuple[str, ...]], ...]
    blocks: tuple[tuple[str, tuple[Line, ...]], ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Column:
    """One figure of a task: where its values are, what chance gives for the same pictures, and its yardsticks."""

    task: str
    title: str
    note: str
    values: str
    expected: str
    clean: str
    noisy: str
    chance: str
    combine: Callable[[Sequence[float]], float]
    share: bool = True


def recognised_tables(rows: Sequence[Row]) -> list[Recognised]:
    """One table for every case in which something was looked for."""
    split = variants(rows)
    groups: dict[tuple[str, str, str, str, bool], list[Row]] = {}
    for row in rows:
        if is_ok(row) and tasks_of(row):
            variant = "" if is_baseline(row) else variant_of(row, split.get(case_of(row), ()))
            groups.setdefault((case_of(row), defense_of(row), attack_of(row), variant, is_baseline(row)), []).append(
                row
            )
    cases: dict[str, dict[str, list[tuple[Line, list[Row]]]]] = {}
    columns = {
        case: _columns(row for key, group in groups.items() if key[0] == case for row in group) for case, *_ in groups
    }
    for cell in summarise(rows):
        group = groups.get((cell.case, cell.defense, cell.attack, cell.variant, cell.baseline_kind))
        if group:
            entries = tuple(_entry(column, group) for column in columns[cell.case])
            cases.setdefault(cell.case, {}).setdefault(cell.defense, []).append((Line(cell, entries), group))
    return [_table(case, columns[case], blocks) for case, blocks in cases.items()]


def _table(case: str, columns: Sequence[_Column], blocks: Mapping[str, Sequence[tuple[Line, list[Row]]]]) -> Recognised:
    rows = [row for lines in blocks.values() for _, group in lines for row in group]
    yardsticks = (
        ("clean images of the test part", [column.clean for column in columns]),
        (f"the same with noise of {NOISE:g}", [column.noisy for column in columns]),
        ("chance", [column.chance for column in columns]),
    )
    return Recognised(
        case=case,
        heads=tuple((column.title, column.note) for column in columns),
        yardsticks=tuple(
            (name, tuple(_span(column, rows, field) for column, field in zip(columns, fields, strict=True)))
            for name, fields in yardsticks
        ),
        blocks=tuple((defense, tuple(line for line, _ in lines)) for defense, lines in blocks.items()),
        notes=tuple(_notes(rows, list(dict.fromkeys(column.task for column in columns)))),
    )


def tasks_of(row: Row) -> dict[str, Facts]:
    """What was looked for in the row's pictures, with what was found."""
    found = row.get("recognised")
    return (
        {str(task): facts for task, facts in found.items() if isinstance(facts, Mapping)}
        if isinstance(found, Mapping)
        else {}
    )


def _columns(rows: Iterable[Row]) -> list[_Column]:
    tasks: dict[str, Facts] = {}
    for row in rows:
        for task, facts in tasks_of(row).items():
            tasks.setdefault(task, facts)
    found = []
    for task, facts in tasks.items():
        kind, _, column = task.partition(":")
        if kind == "face":
            found.append(_Column(task, "Face", "found", "hit", "", "clean", "noisy", "chance", statistics.fmean))
        elif kind == "attribute":
            found.append(
                _Column(task, column, "as in truth", "hit", "expected", "clean", "noisy", "chance", statistics.fmean)
            )
        elif kind == "identity":
            what, people = f"of {facts.get('people', '?')} people", "Person" if column in ("", "identity") else column
            found += [
                _Column(task, people, f"nearest {what}", "hit", "expected", "clean", "noisy", "chance", statistics.fmean),
                _Column(
                    task, people, f"among nearest {TOP}", f"top{TOP}", f"expected_top{TOP}", f"clean_top{TOP}",
                    f"noisy_top{TOP}", f"chance_top{TOP}", statistics.fmean,
                ),
                _Column(
                    task, people, f"median rank {what}", "rank", "expected_rank", "clean_rank", "noisy_rank", "chance_rank",
                    statistics.median, share=False,
                ),
            ]  # fmt: skip
    return found


def identified(task: str) -> bool:
    """Whether a task is about who somebody is, so that ranks are what counts."""
    return task.partition(":")[0] == "identity"


def _entry(column: _Column, group: Sequence[Row]) -> Entry:
    values = _values(group, column, column.values)
    if not values:
        return Entry(None, "–")
    value, shown = column.combine(values), ""
    if column.share:
        of_batches = all(_pairs(row, column) == "majority" for row in group)
        unit = "" if not of_batches else " batch" if len(values) == 1 else " batches"
        shown = f" ({round(sum(values))} of {len(values)}{unit})"
    shown = f"{figure(value, column.share)}{shown}"
    notes = []
    if expected := _values(group, column, column.expected):
        notes.append(f"chance {figure(column.combine(expected), column.share)}")
    if _any_chosen(column, group):
        notes.append("pairs chosen")
    if not column.share:
        return Entry(value, shown, "; ".join(notes))
    if commonest := _values(group, column, "commonest"):
        notes.append(f"commonest {figure(statistics.fmean(commonest), True)}")
    return Entry(value, shown, "; ".join(notes))


def _pairs(row: Row, column: _Column) -> object:
    return tasks_of(row).get(column.task, {}).get("pairs")


def _any_chosen(column: _Column, rows: Iterable[Row]) -> bool:
    """Whether the figure needs pairs (faces do not), and some were chosen with the truth."""
    return bool(column.expected) and any(_pairs(row, column) == "chosen" for row in rows)


def _values(rows: Iterable[Row], column: _Column, field: str) -> list[float]:
    """Of all images of all rows, those that have a value; a truth value counts 0 or 1."""
    found: list[float] = []
    for row in rows:
        values = tasks_of(row).get(column.task, {}).get(field) if field else None
        for value in values if isinstance(values, list | tuple) else ():
            as_number = float(value) if isinstance(value, bool) else number(value)
            if as_number is not None:
                found.append(as_number)
    return found


def _span(column: _Column, rows: Sequence[Row], field: str) -> str:
    """A yardstick; data sets of one case may differ. Where pairs were chosen that stands in place of chance."""
    found = sorted(
        {value for row in rows if (value := number(tasks_of(row).get(column.task, {}).get(field))) is not None}
    )
    if not found:
        return CHOSEN if field == column.chance and _any_chosen(column, rows) else "–"
    ends = list(dict.fromkeys(figure(value, column.share) for value in (found[0], found[-1])))
    return " to ".join(ends)


def figure(value: float, share: bool) -> str:
    """A share in percent, of two digits and never rounded up to all; a rank otherwise."""
    if not share:
        return plain_number(value, 0 if value == int(value) else 1)
    percent = 100 * value
    if 99 < percent < 100 and round(percent) == 100:
        return f"{plain_number(math.floor(10 * percent + 1e-9) / 10, 1)} %"  # not all
    digits = 0 if percent >= 10 or percent <= 0 else 1
    if 0 < percent < 0.995:
        digits = 1 - math.floor(math.log10(percent))
    return f"{plain_number(percent, digits)} %"


def _notes(rows: Sequence[Row], tasks: Sequence[str]) -> Iterable[str]:
    """What the probes are, what is no secret, how pairs were made, and how many true images nothing could be said about."""
    for task in tasks:
        facts = [found for row in rows if (found := tasks_of(row).get(task))]
        features = sorted(
            {
                f"{f['features']} features of {f.get('public_images')} public images"
                + (f", drawn of {f['drawn_of']} to bound time and memory" if "drawn_of" in f else "")
                for f in facts
                if "features" in f
            }
        )
        if features:
            yield f"{task}: {', '.join(features)}."
        if any(f.get("learned") is True for f in facts):
            yield f"{task}: this is what the federation learns; the update tells it without a picture."
        if task != "face" and any(f.get("pairs") == "chosen" for f in facts):
            yield f"{task}, batches above 1: {CHOSEN}; unrelated pictures are right more often than by chance, too."
        left: dict[tuple[str, ...], Facts] = {}
        for row in rows:
            counts = tasks_of(row).get(task, {}).get("left_out")
            if isinstance(counts, Mapping) and counts and not is_baseline(row):
                unit = "batch" if tasks_of(row)[task].get("pairs") == "majority" else "true image"
                left.setdefault((*target_of(row), unit), counts)
        reasons: dict[tuple[str, str], int] = {}
        for (*_, unit), counts in left.items():
            for reason, count in counts.items():
                reasons[str(reason), unit] = reasons.get((str(reason), unit), 0) + int(number(count) or 0)
        for (reason, unit), count in reasons.items():
            several = {"batch": "batches", "true image": "true images"}[unit]
            yield f"{task}: {count} {unit if count == 1 else several} left out: {reason}."

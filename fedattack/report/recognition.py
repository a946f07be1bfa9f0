"""The table of what can be recognised in the pictures, from the field "recognised" of rows (see fedattack.recognition)."""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
        if is_ok(row) and _tasks(row):
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
        ("the same with noise of 0.1", [column.noisy for column in columns]),
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


def _tasks(row: Row) -> dict[str, Facts]:
    found = row.get("recognised")
    return (
        {str(task): facts for task, facts in found.items() if isinstance(facts, Mapping)}
        if isinstance(found, Mapping)
        else {}
    )


def _columns(rows: Iterable[Row]) -> list[_Column]:
    tasks: dict[str, Facts] = {}
    for row in rows:
        for task, facts in _tasks(row).items():
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
                    task, people, "among nearest 5", "top5", "expected_top5", "clean_top5", "noisy_top5", "chance_top5",
                    statistics.fmean,
                ),
                _Column(
                    task, people, f"median rank {what}", "rank", "expected_rank", "clean_rank", "noisy_rank", "chance_rank",
                    statistics.median, share=False,
                ),
            ]  # fmt: skip
    return found


def _entry(column: _Column, group: Sequence[Row]) -> Entry:
    values = _values(group, column, column.values)
    if not values:
        return Entry(None, "–")
    value = column.combine(values)
    if not column.share:
        expected = _values(group, column, column.expected)
        return Entry(
            value, _figure(value, False), f"chance {_figure(column.combine(expected), False)}" if expected else ""
        )
    shown = f"{_figure(value, True)} ({round(sum(values))} of {len(values)})"
    notes = []
    if expected := _values(group, column, column.expected):
        notes.append(f"chance {_figure(statistics.fmean(expected), True)}")
    if commonest := _values(group, column, "commonest"):
        notes.append(f"commonest {_figure(statistics.fmean(commonest), True)}")
    return Entry(value, shown, "; ".join(notes))


def _values(rows: Iterable[Row], column: _Column, field: str) -> list[float]:
    """Of all images of all rows, those that have a value; a truth value counts 0 or 1."""
    found: list[float] = []
    for row in rows:
        values = _tasks(row).get(column.task, {}).get(field) if field else None
        for value in values if isinstance(values, list | tuple) else ():
            as_number = float(value) if isinstance(value, bool) else number(value)
            if as_number is not None:
                found.append(as_number)
    return found


def _span(column: _Column, rows: Iterable[Row], field: str) -> str:
    """A yardstick; data sets of one case may differ."""
    found = sorted(
        {value for row in rows if (value := number(_tasks(row).get(column.task, {}).get(field))) is not None}
    )
    if not found:
        return "–"
    ends = list(dict.fromkeys(_figure(value, column.share) for value in (found[0], found[-1])))
    return " to ".join(ends)


def _figure(value: float, share: bool) -> str:
    if not share:
        return plain_number(value, 0 if value == int(value) else 1)
    return f"{plain_number(100 * value, 0 if value >= 0.1 or value == 0 else 1)} %"


def _notes(rows: Sequence[Row], tasks: Sequence[str]) -> Iterable[str]:
    """What the probes are, and how many true images nothing could be said about."""
    for task in tasks:
        facts = [found for row in rows if (found := _tasks(row).get(task))]
        features = sorted(
            {f"{f['features']} features of {f.get('public_images')} public images" for f in facts if "features" in f}
        )
        if features:
            yield f"{task}: {', '.join(features)}."
        left: dict[tuple[str, ...], Facts] = {}
        for row in rows:
            counts = _tasks(row).get(task, {}).get("left_out")
            if isinstance(counts, Mapping) and counts and not is_baseline(row):
                left.setdefault(target_of(row), counts)
        reasons: dict[str, int] = {}
        for counts in left.values():
            for reason, count in counts.items():
                reasons[str(reason)] = reasons.get(str(reason), 0) + int(number(count) or 0)
        yield from (
            f"{task}: {count} true {'image' if count == 1 else 'images'} left out: {reason}."
            for reason, count in reasons.items()
        )

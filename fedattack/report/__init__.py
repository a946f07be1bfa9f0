"""A run folder as one HTML file that a colleague can open: no network, no other files, hostile text escaped.

`build_report` writes it; `summary` holds the arithmetic, `gallery` the pictures, `charts` the curves, `template` the
page; `montage` makes one picture for elsewhere. Run folder: config.toml, about.json, rows.jsonl, history.jsonl,
incidents.jsonl, figures.jsonl, images/*.png, figures/*; all may be missing.
"""

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedattack.config import FINAL
from fedattack.errors import FedattackError, must
from fedattack.report import summary
from fedattack.report.bounds import bound_charts, ranking
from fedattack.report.charts import Chart, Series, legend, line_chart
from fedattack.report.gallery import IMAGES, PICTURES, TARGETS, gallery, png_frame
from fedattack.report.montage import write_montage
from fedattack.report.recognition import recognised_tables
from fedattack.report.revealed import SIGNIFICANT, revealed
from fedattack.report.samples import sample_grids
from fedattack.report.summary import Cell, Row, markdown_table, summarise, write_table
from fedattack.report.template import SCRIPT, STYLE, TEMPLATE
from fedattack.report.trajectories import loss_points, ways

__all__ = ["build_report", "markdown_table", "read_lines", "summarise", "write_montage", "write_table"]

CURVES = 4
"""Loss curves drawn per attack and defense."""

FIGURE_PIXELS = 200
"""Side of the frame of a figure whose file is gone; figures are larger, and shown as they are."""

LINES = 200
"""Failures and incidents listed."""

TITLES = {
    "headline": "What leaked",
    "gallery": "Pictures",
    "numbers": "Attack by attack",
    "figures": "Figures of the recipe",
    "recognised": "What can be recognised",
    "bounds": "Bounds before any attack",
    "way": "Along the way",
    "losses": "Loss curves",
    "knowledge": "What the attacker knew",
    "failures": "What failed or did not apply",
    "training": "What the protection cost",
    "samples": "Samples during training",
    "provenance": "How this was made",
}


def build_report(run: Path, *, targets: int = TARGETS, images: int = IMAGES) -> Path:
    """Write run/report.html and return its path; `targets` updates per case and defense and `images` of each are shown.

    Reads whatever the folder holds: missing files, missing fields and lines that are not JSON are reported on the page.
    """
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    run = Path(run)
    if not run.is_dir():
        raise FedattackError(must("the run folder", "a folder that exists", str(run)))
    unreadable: dict[str, int] = {}
    rows, history, incidents, drawn = (
        read_lines(run / f"{name}.jsonl", unreadable) for name in ("rows", "history", "incidents", "figures")
    )
    about = _read_json(run / "about.json", unreadable)
    left_out, rows = _controls_left_out(rows), [dict(row) for row in summary.without_idle_controls(rows)]
    cells = summarise(rows)
    failures = _failures(rows)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "db": summary.plain_number,
        "signed": lambda value: summary.plain_number(value, sign=True),
        "small": summary.small_number,
        "percent": lambda value: f"{100 * min(max(value / summary.EXACT_DB, 0.0), 1.0):.1f}",
        "count": summary.count,
        "commas": lambda value: f"{value:,}",
        "defense": summary.defense_label,
        "labels": summary.label_text,
        "timesteps": summary.timestep_text,
    }
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    page = environment.from_string(TEMPLATE).render(
        policy=f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'",
        style=Markup(STYLE),
        script=Markup(SCRIPT),
        name=str(about.get("name") or run.resolve().name),
        intro=_intro(rows, history),
        titles=TITLES,
        sections=list(TITLES.items()),
        headlines=[_headline(line) for line in summary.headlines(cells)],
        shares=_shares,
        exact_db=summary.EXACT_DB,
        recognisable_db=summary.RECOGNISABLE_DB,
        recognisable_gain_db=summary.RECOGNISABLE_GAIN_DB,
        partly_gain_db=summary.PARTLY_GAIN_DB,
        cap_db=summary.PSNR_CAP_DB,
        caps={"targets": targets, "images": images, "pictures": PICTURES},
        groups=gallery(rows, run, targets=targets, images=images),
        tables=_tables(cells, rows),
        figures=_figures(drawn, run),
        recognised=recognised_tables(rows),
        revealed=revealed(rows),
        significant=SIGNIFICANT,
        controls=left_out,
        bounds=bound_charts(rows),
        ranking=ranking(rows),
        ways=ways(rows),
        loss_charts=_loss_charts(rows),
        knowledge=_knowledge(rows),
        priors=_priors(rows),
        failures=failures[:LINES],
        failures_hidden=max(0, len(failures) - LINES),
        missing=_missing(rows),
        incidents=[_incident(line) for line in incidents[:LINES]],
        incidents_hidden=max(0, len(incidents) - LINES),
        unreadable=", ".join(f"{count} in {name}" for name, count in unreadable.items()),
        training=_training(history, rows),
        samples=sample_grids(history, run),
        facts=_facts(about, rows),
        versions=_versions(about),
        config=_read_text(run / "config.toml"),
    )
    path = run / "report.html"
    path.write_text(page, encoding="utf-8", errors="replace")
    return path


# ------------------------------------------------------------------------------------------------ reading
def read_lines(path: Path, unreadable: dict[str, int] | None = None) -> list[dict[str, Any]]:
    """The JSON objects of a .jsonl file, [] without a file. Other lines are skipped and counted in `unreadable`."""
    found = []
    for line in _read_text(path).split("\n"):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            value = None
        if isinstance(value, dict):
            found.append(value)
        elif unreadable is not None:
            unreadable[path.name] = unreadable.get(path.name, 0) + 1
    return found


def _read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _read_json(path: Path, unreadable: dict[str, int]) -> dict[str, Any]:
    source = _read_text(path)
    try:
        value = json.loads(source) if source else {}
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, dict):
        return value
    unreadable[path.name] = 1
    return {}


# ------------------------------------------------------------------------------------------------ headline, table
def _intro(rows: Sequence[Row], history: Sequence[Row]) -> str:
    if not rows and history:
        rounds = max(
            (int(value) for line in history if (value := summary.number(line.get("round"))) is not None), default=0
        )
        federations = len({summary.text(line, "federation") for line in history})
        return f"Training only, no attack: {summary.count(federations, 'federation')}, {summary.count(rounds, 'round')} so far."
    if not rows:
        return "The run has no results yet."
    attacks = [row for row in rows if not summary.is_baseline(row)]
    kinds = {summary.text(row, "attack") for row in attacks}
    updates = {summary.target_of(row) for row in rows}
    cases = {summary.case_of(row) for row in rows}
    defenses = {summary.defense_of(row) for row in rows} - {"none"}
    done = sum(summary.is_ok(row) for row in attacks)
    parts = [
        summary.count(len(cases), "case"),
        summary.count(len(kinds), "attack"),
        summary.count(len(defenses), "defense"),
    ]
    return (
        f"{', '.join(parts)}: {done:,} of {summary.count(len(attacks), 'attack job')} on "
        f"{summary.count(len(updates), 'update')} gave a reconstruction."
    )


@dataclass(frozen=True, slots=True)
class _Line:
    case: str
    findings: tuple[summary.Finding, ...]
    reference: summary.Finding | None
    effects: str


def _headline(line: summary.Headline) -> _Line:
    effects = [
        f"with {summary.defense_label(f.defense)}: {summary.plain_number(f.effect_db, sign=True)} dB"
        f" ({f.best.attack} {summary.plain_number(f.best.psnr_db.mean)} dB, {f.best.verdict_words})"
        for f in line.findings
        if f.effect_db is not None and f.best and f.best.psnr_db
    ]
    words = "; ".join(effects)
    return _Line(line.case, line.findings, line.reference, words[:1].upper() + words[1:] + "." if words else "")


def _shares(cell: Cell) -> str:
    """How many images reach which verdict, and the range: an average hides the one client who lost everything."""
    shares = [
        f"{cell.verdicts[verdict]} {summary.describe(verdict, cell.baseline)}"
        for verdict in summary.VERDICTS
        if cell.verdicts.get(verdict)
    ]
    low, high = (cell.psnr_db.low, cell.psnr_db.high) if cell.psnr_db else (None, None)
    span = f"from {summary.plain_number(low)} to {summary.plain_number(high)} dB"
    return f"Of {summary.count(cell.images, 'image')}: {'; '.join(shares)} ({span})."


def _tables(cells: Sequence[Cell], rows: Sequence[Row]) -> list[dict[str, Any]]:
    tables: dict[str, dict[str, list[Cell]]] = {}
    for cell in cells:
        tables.setdefault(cell.case, {}).setdefault(cell.defense, []).append(cell)
    facts = _defense_facts(rows)
    return [
        {
            "case": case,
            "nets": sorted({net for lines in blocks.values() for cell in lines for net in cell.lpips}),
            "timesteps": summary.with_timesteps(cell for lines in blocks.values() for cell in lines),
            "blocks": [
                {"defense": defense, "cells": lines, "facts": facts.get((case, defense), "")}
                for defense, lines in blocks.items()
            ],
        }
        for case, blocks in tables.items()
    ]


def _defense_facts(rows: Iterable[Row]) -> dict[tuple[str, str], str]:
    """The figures of a defense, averaged over the updates it protected where they differ."""
    seen: dict[tuple[str, str], dict[str, list[Any]]] = {}
    for row in rows:
        facts = row.get("defense_facts")
        if isinstance(facts, Mapping):
            collected = seen.setdefault((summary.case_of(row), summary.defense_of(row)), {})
            for name, value in facts.items():
                collected.setdefault(str(name), []).append(value)
    return {key: ", ".join(_fact(name, values) for name, values in facts.items()) for key, facts in seen.items()}


def _fact(name: str, values: list[Any]) -> str:
    figures = [value for entry in values if (value := summary.number(entry)) is not None]
    if figures:
        mean = summary.small_number(sum(figures) / len(figures))
        return f"{name} {mean}" + (" (mean)" if max(figures) > min(figures) else "")
    return f"{name} {'/'.join(sorted({str(value) for value in values}))}"


# ------------------------------------------------------------------------------------------------ charts
def _figures(drawn: Iterable[Row], run: Path) -> list[dict[str, Any]]:
    """What the recipe asked for: its pictures in this page, the names of all its files, and what could not be drawn."""
    found = []
    for line in drawn:
        title, files = summary.text(line, "title", "figure"), summary.names(line, "files")
        frames = [png_frame(run, file, title, file, FIGURE_PIXELS) for file in files if file.endswith(".png")]
        tables = [text for file in files if file.endswith(".md") and (text := _read_table(run, file))]
        problems = summary.names(line, "problems")
        found.append({"title": title, "frames": frames, "tables": tables, "files": files, "problems": problems})
    return found


def _read_table(run: Path, file: str) -> str:
    """ "" where it is gone, or no file of this run."""
    path = (run / file).resolve()
    inside = path.is_relative_to(run.resolve()) and path.is_file()
    return path.read_text(errors="replace") if inside else ""


def _loss_charts(rows: Sequence[Row]) -> list[tuple[str, list[Chart]]]:
    split = summary.variants(rows)
    grouped: dict[str, dict[tuple[str, str], dict[str, list[Row]]]] = {}
    for row in rows:
        losses = row.get("losses")
        if not summary.is_baseline(row) and isinstance(losses, list) and len(losses) > 1:
            case = summary.case_of(row)
            key = (summary.attack_of(row), summary.variant_of(row, split.get(case, ())))
            grouped.setdefault(case, {}).setdefault(key, {}).setdefault(summary.defense_of(row), []).append(row)
    colours = _colours(summary.defense_of(row) for row in rows)
    found = []
    for case, attacks in grouped.items():
        charts = []
        for (attack, variant), by_defense in attacks.items():
            total = sum(len(members) for members in by_defense.values())
            series = [
                Series(
                    f"{', '.join(part for part in summary.target_of(row) if part)}", loss_points(row), colours[defense]
                )
                for defense, members in by_defense.items()
                for row in members[:CURVES]
            ]
            title = f"{attack} ({variant})" if variant else attack
            svg = line_chart(series, title=f"Loss of {title}, {case}", x_label="step", y_label="own loss", log=True)
            if svg:
                note = (
                    f"{len(series)} of {summary.count(total, 'job')}"
                    if total > len(series)
                    else summary.count(total, "job")
                )
                names = [(summary.defense_label(defense), colours[defense]) for defense in by_defense]
                charts.append(Chart(title, note, svg, legend(names)))
        if charts:
            found.append((case, charts))
    return found


def _colours(defenses: Iterable[str]) -> dict[str, int]:
    return {name: i for i, name in enumerate(dict.fromkeys(["none", *defenses]))}


def _training(history: Sequence[Row], rows: Sequence[Row]) -> list[dict[str, Any]]:
    by_federation = {summary.text(row, "federation"): summary.defense_of(row) for row in rows}
    grouped: dict[str, dict[tuple[str, str], list[Row]]] = {}
    for entry in history:
        federation = summary.text(entry, "federation")
        defense = summary.text(entry, "defense") or by_federation.get(federation, "")
        case = summary.case_of(entry) if summary.text(entry, "case") else "Training"
        grouped.setdefault(case, {}).setdefault((federation, defense), []).append(entry)
    blocks = []
    for case, federations in grouped.items():
        plain = [
            last for (_, defense), e in federations.items() if defense == "none" and (last := _last(e, "test_accuracy"))
        ]
        reference = sum(plain) / len(plain) if plain else None
        lines = []
        for (federation, defense), entries in federations.items():
            accuracy = _last(entries, "test_accuracy")
            cost = None if accuracy is None or reference is None or defense == "none" else 100 * (accuracy - reference)
            lines.append(
                {
                    "federation": federation,
                    "defense": defense,
                    "rounds": len({summary.text(entry, "round") for entry in entries} - {"0"}),
                    "accuracy": "–" if accuracy is None else f"{100 * accuracy:.1f} %",
                    "cost": summary.plain_number(cost, sign=True),
                    "test_loss": _last(entries, "test_loss"),
                    "train_loss": _last(entries, "train_loss"),
                }
            )
        blocks.append({"case": case, "lines": lines, "charts": _training_charts(case, federations)})
    return blocks


def _training_charts(case: str, federations: Mapping[tuple[str, str], list[Row]]) -> list[Chart]:
    several = len({defense for _, defense in federations}) < len(federations)
    labels = {key: key[0] if several or not key[1] else summary.defense_label(key[1]) for key in federations}
    charts = []
    for metric, title, scale in (
        ("test_accuracy", "Test accuracy, %", 100.0),
        ("test_loss", "Test loss", 1.0),
        ("train_loss", "Train loss", 1.0),
    ):
        series = [
            Series(labels[key], _history_points(entries, metric, scale), colour)
            for colour, (key, entries) in enumerate(federations.items())
        ]
        series = [one for one in series if one.points]
        svg = line_chart(series, title=f"{title} by round, {case}", x_label="round", y_label=title)
        if svg:
            charts.append(Chart(title, "", svg, legend([(one.name or "–", one.colour) for one in series])))
    return charts


def _history_points(entries: Iterable[Row], metric: str, scale: float = 1.0) -> tuple[tuple[float, float], ...]:
    points = [(summary.number(entry.get("round")), summary.number(entry.get(metric))) for entry in entries]
    return tuple(sorted((x, scale * y) for x, y in points if x is not None and y is not None))


def _last(entries: Iterable[Row], metric: str) -> float | None:
    points = _history_points(entries, metric)
    return points[-1][1] if points else None


# ------------------------------------------------------------------------------------------------ lists
def _priors(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Every prior once: what it was trained on, and how many of the attacked images were among that (None: not known).

    mirrored: whether all were compared mirrored too; reasons: why some were not compared.
    """
    found: dict[tuple[str, str], dict[str, Any]] = {}
    counted: set[tuple[str, ...]] = set()
    for row in rows:
        name, data, shared = summary.text(row, "prior"), row.get("prior_data"), row.get("prior_overlap")
        if not name or "prior" not in summary.names(row, "knowledge"):
            continue
        facts = ("dataset", "split", "images", "seed", "steps", "sha256")
        about = data if isinstance(data, Mapping) else {}
        told = ", ".join(f"{fact} {about[fact]}" for fact in facts if about.get(fact) is not None)
        prior = found.setdefault(
            (name, told), {"name": name, "about": told, "same": None, "compared": 0, "mirrored": True, "reasons": []}
        )
        prior["own"] = name == FINAL
        target = (name, told, *map(str, summary.target_of(row)))
        if isinstance(shared, Mapping) and target not in counted:
            counted.add(target)
            same, reason = summary.number(shared.get("same")), summary.text(shared, "reason")
            if same is not None:
                prior["same"] = (prior["same"] or 0) + int(same)
                prior["compared"] += int(summary.number(shared.get("compared")) or 0)
                prior["mirrored"] = prior["mirrored"] and shared.get("mirrored") is True
            elif reason and reason not in prior["reasons"]:
                prior["reasons"].append(reason)
    return list(found.values())


def _knowledge(rows: Iterable[Row]) -> list[dict[str, Any]]:
    jobs: dict[tuple[str, str, str, tuple[str, ...], tuple[str, ...]], int] = {}
    for row in rows:
        if not summary.is_baseline(row):
            oracles = summary.names(row, "oracles")
            known = [name for name in summary.names(row, "knowledge") if name not in oracles]
            who = summary.case_of(row), summary.attack_of(row), summary.text(row, "threat_model")
            key = (*who, tuple(known), tuple(oracles))
            jobs[key] = jobs.get(key, 0) + 1
    names = ("case", "attack", "threat_model", "known", "oracles")
    return [dict(zip(names, key, strict=True)) | {"jobs": count} for key, count in jobs.items()]


def _controls_left_out(rows: Iterable[Row]) -> list[dict[str, str]]:
    """Controls that an attack with a prior stands without, once for each case."""
    found: dict[tuple[str, str, str, str], None] = {}
    for row in rows:
        left_out = row.get("controls_left_out")
        for control, reason in left_out.items() if isinstance(left_out, Mapping) else ():
            found[summary.case_of(row), summary.attack_of(row), str(control), str(reason)] = None
        if summary.is_idle_control(row):
            for attack in summary.names(row, "control_of"):
                found[summary.case_of(row), attack, summary.attack_of(row), summary.text(row, "error")] = None
    return [dict(zip(("case", "attack", "control", "reason"), key, strict=True)) for key in found]


def _failures(rows: Iterable[Row]) -> list[dict[str, Any]]:
    found: dict[tuple[str, str, str, str, str], list[str]] = {}
    for row in rows:
        if not summary.is_ok(row):
            key = (
                summary.case_of(row),
                summary.defense_of(row),
                summary.attack_of(row),
                summary.text(row, "status"),
                summary.text(row, "error", "no reason given"),
            )
            _, client, round_ = summary.target_of(row)
            found.setdefault(key, []).append(", ".join(p for p in (client, f"round {round_}" if round_ else "") if p))
    names = ("case", "defense", "attack", "status", "error")
    return [dict(zip(names, key, strict=True)) | {"jobs": len(w), "first": w[0] or "–"} for key, w in found.items()]


def _missing(rows: Iterable[Row]) -> list[dict[str, Any]]:
    found: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        missing = row.get("missing")
        if isinstance(missing, Mapping):
            for metric, reason in missing.items():
                if metric in ("label_accuracy", "timestep_accuracy") and summary.is_baseline(row):
                    continue
                found.setdefault((summary.case_of(row), str(metric), str(reason)), []).append(summary.attack_of(row))
    return [
        {"case": case, "metric": metric, "reason": reason, "attacks": _some(attacks), "rows": len(attacks)}
        for (case, metric, reason), attacks in found.items()
    ]


def _some(names: Iterable[str], shown: int = 6) -> str:
    unique = list(dict.fromkeys(names))
    more = f" and {len(unique) - shown} more" if len(unique) > shown else ""
    return ", ".join(unique[:shown]) + more


def _incident(line: Row) -> dict[str, str]:
    problems = line.get("problems")
    listed = [str(p) for p in problems] if isinstance(problems, list) else [summary.text(line, "problems", "–")]
    fields = {name: summary.text(line, name, "–") for name in ("case", "federation", "client", "round")}
    return fields | {"problems": "\n".join(listed)}


def _facts(about: Mapping[str, Any], rows: Sequence[Row]) -> list[tuple[str, str]]:
    facts = [
        (str(k).replace("_", " "), _plain(v))
        for k, v in about.items()
        if k not in ("versions", "name") and v is not None
    ]
    seeds = {summary.text(row, "seed") for row in rows} - {""}
    if seeds:
        facts.append(("seeds of the jobs", _some(sorted(seeds), 4)))
    for name in (
        "model",
        "dataset",
        "task",
        "protocol",
        "strategy",
        "precision",
        "threat_model",
        "batch_size",
        "local_steps",
    ):
        values = dict.fromkeys(summary.text(row, name) for row in rows if summary.text(row, name))
        if values:
            facts.append((name.replace("_", " "), _some(values, 12)))
    return facts


def _plain(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.1f}"
    return json.dumps(value) if isinstance(value, dict | list) else str(value)


def _versions(about: Mapping[str, Any]) -> list[tuple[str, str]]:
    versions = about.get("versions")
    return sorted((str(k), str(v)) for k, v in versions.items()) if isinstance(versions, Mapping) else []

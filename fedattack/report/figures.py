"""Tables and figures that a recipe asks for, a [[figure]] each: metrics over methods, steps or what is known.

x and by name a field of rows.jsonl, an attack's option, or a dotted path (defense_facts.noise_std); y a metric per image
(psnr_db, ssim, mse, lpips.squeeze) or a number per row (seconds, diagnostics.loss). Values are pooled over images, clients,
rounds and seeds. Bars where x is text, lines where it is a number; whiskers are one standard deviation, dots the images;
dashed lines the baselines' means. pictures: truth beside reconstruction for one client, never rescaled.
"""

import io
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from fedattack.config import FigureSettings
from fedattack.errors import FedattackError, closest, must, one_of
from fedattack.registry import parse_spec
from fedattack.store import RunFolder, read_rows, write_atomically, write_rows

Row = dict[str, Any]
Key = tuple[Any, ...]

log = logging.getLogger("fedattack.report")

SHOWN = ("truth", "reconstruction")
"""What a row must have pictures of to stand in a strip: attacks that find timesteps alone have none."""


# ------------------------------------------------------------------------------------------------ drawing
def draw_figures(run: RunFolder, asked: Sequence[FigureSettings]) -> list[Row]:
    """Draw what the recipe asks for into figures/ and list it in figures.jsonl: title, files, and what could not be drawn.

    Never raises for a figure: what is wrong with it is a problem in its line, and the run is what it was.
    """
    drawn: list[Row] = []
    for settings in asked:
        try:
            problems = draw(load([run.path]), settings, run.figures)
        except FedattackError as error:
            problems = [str(error)]
        except Exception as error:  # a drawing library's own
            log.exception("figure %s", settings.file_name)
            problems = [f"{type(error).__name__}: {error}"]
        files = [str(path.relative_to(run.path)) for path in paths_of(settings, run.figures) if path.exists()]
        drawn.append({"title": settings.heading, "files": files, "problems": problems})
    if drawn or run.drawn.exists():
        write_rows(run.drawn, drawn)
    return drawn


def draw(rows: Sequence[Row], asked: FigureSettings, folder: Path) -> list[str]:
    """Write NAME.md, NAME.png and NAME-pictures.png; gives the reasons of what was left out: metrics that no row has.

    Raises FedattackError where nothing can be drawn; nothing of an earlier figure of that name is left then.
    """
    page, chart, strip = paths_of(asked, folder)
    for path in (page, chart, strip):
        path.unlink(missing_ok=True)
    for field in (asked.x, *asked.by):
        if all(look_up(row, field) is None for row in rows):
            known = sorted({key for row in rows for key in row} - {"folder"})
            if not known:
                raise FedattackError("there are no rows to draw")
            raise FedattackError(one_of("a field of the rows", known, field))
    lacking = {metric: _why_none(rows, metric) for metric in asked.y if not any(numbers(row, metric) for row in rows)}
    shown = [metric for metric in asked.y if metric not in lacking]
    if not shown:
        raise FedattackError("; ".join(lacking.values()))
    heading = f"# {asked.title}\n\n" if asked.title else ""
    write_atomically(page, f"{heading}{table(rows, asked.x, asked.y, asked.by)}\n".encode())
    figure(rows, asked.x, shown, asked.by, chart, asked.title)
    problems = list(lacking.values())
    if asked.pictures:
        try:
            pictures(rows, asked.x, asked.by, strip, asked.client)
        except FedattackError as error:
            problems.append(str(error))
    return problems


def paths_of(asked: FigureSettings, folder: Path) -> tuple[Path, Path, Path]:
    """Table, figure and pictures."""
    name = asked.file_name
    return folder / f"{name}.md", folder / f"{name}.png", folder / f"{name}-pictures.png"


def _why_none(rows: Sequence[Row], metric: str) -> str:
    """Why there is no number: the rows' own reasons, or the closest name that has one."""
    names = (metric, metric.replace(".", "-"), metric.partition(".")[0])
    reasons = {str(row["missing"][name]) for row in rows for name in names if name in (row.get("missing") or {})}
    why = f": {'; '.join(sorted(reasons)[:3])}" if reasons else closest(metric, sorted(_metrics(rows)))
    return f"no row has a number for {metric!r}{why}"


def _metrics(rows: Sequence[Row]) -> set[str]:
    return {path for row in rows for path in _paths(row) if numbers(row, path)}


def _paths(row: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in row.items():
        if isinstance(value, Mapping):
            yield from _paths(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


# ------------------------------------------------------------------------------------------------ reading rows
def load(runs: Sequence[Path]) -> list[Row]:
    """The rows of all runs, each with its run's name and folder, and the options of its attack beside its own fields."""
    rows: list[Row] = []
    for run in runs:
        if not (run / "rows.jsonl").is_file():
            raise FedattackError(must("RUN", "a run folder with rows.jsonl", str(run)))
        for row in read_rows(run / "rows.jsonl"):
            options = parse_spec(row["attack_spec"])[1] if row.get("kind") == "attack" else {}
            rows.append({**options, **row, "run": run.name, "folder": run})
    return rows


def look_up(row: Mapping[str, Any], path: str) -> Any:
    """A field, or one inside it by dots; a list becomes text, since groups are named by it; None where there is none."""
    value: Any = row
    for part in path.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    if isinstance(value, list | tuple):
        return " + ".join(map(str, value)) or "none"
    return value


def numbers(row: Mapping[str, Any], path: str) -> list[float]:
    """The values of a metric, one an image or one a row; those that are missing or not finite left out."""
    value: Any = row
    for part in path.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    values = value if isinstance(value, list) else [value]
    return [float(v) for v in values if isinstance(v, int | float) and math.isfinite(v)]


def grouped(rows: Sequence[Row], fields: Sequence[str]) -> dict[Key, list[Row]]:
    """Attack rows by the values of `fields`, numbers in ascending and names in first-seen order."""
    groups: dict[Key, list[Row]] = {}
    for row in rows:
        if row.get("kind") == "attack":
            groups.setdefault(tuple(look_up(row, field) for field in fields), []).append(row)
    ranks = [_ranks([key[i] for key in groups]) for i in range(len(fields))]
    return dict(sorted(groups.items(), key=lambda item: [rank[v] for rank, v in zip(ranks, item[0], strict=True)]))


def _ranks(values: Sequence[Any]) -> dict[Any, int]:
    distinct = list(dict.fromkeys(values))
    if all(isinstance(value, int | float) for value in distinct):
        distinct.sort()
    return {value: rank for rank, value in enumerate(distinct)}


def baseline_means(rows: Sequence[Row], metric: str) -> dict[str, float]:
    """Mean of every baseline over its images; each picture counted once, however many cells it stands beside."""
    found: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        if row.get("kind") == "baseline" and (values := numbers(row, metric)):
            found.setdefault(row["attack"], {})[row["job"]] = values
    return {name: mean(v for values in jobs.values() for v in values) for name, jobs in found.items()}


# ------------------------------------------------------------------------------------------------ table
def spread(values: Sequence[float]) -> str:
    """mean ± std (range)."""
    if not values:
        return "–"
    largest = max(map(abs, values))
    form = ".1f" if largest >= 10 else ".3f" if largest >= 0.05 else ".1e"
    deviation = stdev(values) if len(values) > 1 else 0.0
    return f"{mean(values):{form}} ± {deviation:{form}} ({min(values):{form}} to {max(values):{form}})"


def table(rows: Sequence[Row], x: str, ys: Sequence[str], by: Sequence[str]) -> str:
    """Markdown: a line for every group and x, then the baselines."""
    fields = [*by, x]
    lines = ["| " + " | ".join([*fields, "images", *ys, "not ok"]) + " |", "|---" * (len(fields) + len(ys) + 2) + "|"]
    for key, members in grouped(rows, fields).items():
        done = [row for row in members if row["status"] == "ok"]
        values = [[v for row in done for v in numbers(row, y)] for y in ys]
        count = max((len(v) for v in values), default=0)
        cells = [*map(_text, key), str(count), *map(spread, values), str(len(members) - len(done))]
        lines.append("| " + " | ".join(cells) + " |")
    names = dict.fromkeys(name for y in ys for name in baseline_means(rows, y))
    for name in names:
        means = [baseline_means(rows, y).get(name) for y in ys]
        cells = [*(["baseline"] * len(by)), name, "", *("–" if m is None else f"{m:.3g}" for m in means), ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else "–" if value is None else str(value)


# ------------------------------------------------------------------------------------------------ figure
def figure(rows: Sequence[Row], x: str, ys: Sequence[str], by: Sequence[str], path: Path, title: str = "") -> None:
    """A panel for each y: lines over a numeric x, bars over names, a colour for each group; one legend below all panels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cells = {key: [r for r in members if r["status"] == "ok"] for key, members in grouped(rows, [*by, x]).items()}
    xs = list(_ranks([key[0] for key in grouped([row for row in rows if row.get("status") == "ok"], [x])]))
    groups = list(dict.fromkeys(key[:-1] for key in cells))
    numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in xs)
    columns = min(len(ys), 2)
    lines = -(-len(ys) // columns)
    page = Figure(figsize=(6.0 * columns, 3.6 * lines + 0.5), layout="constrained")
    FigureCanvasAgg(page)
    page.suptitle(title)
    named: dict[str, Any] = {}
    styles: dict[str, str] = {}
    for number, y in enumerate(ys):
        axes = page.add_subplot(lines, columns, number + 1)
        for place, group in enumerate(groups):
            values = [[v for row in cells.get((*group, at), []) for v in numbers(row, y)] for at in xs]
            shown = [i for i, found in enumerate(values) if found]
            means = [mean(values[i]) for i in shown]
            errors = [stdev(values[i]) if len(values[i]) > 1 else 0.0 for i in shown]
            label = ", ".join(map(_text, group)) or None
            colour = f"C{place % 10}"
            if numeric:
                at = [float(xs[i]) for i in shown]
                axes.errorbar(at, means, errors, marker="o", markersize=4, capsize=3, color=colour, label=label)
            else:
                width = 0.8 / len(groups)
                at = [i - 0.4 + width * (place + 0.5) for i in shown]
                axes.bar(at, means, width * 0.92, yerr=errors, capsize=3, color=colour, alpha=0.55, label=label)
                for middle, i in zip(at, shown, strict=True):
                    axes.plot([middle] * len(values[i]), values[i], ".", markersize=3, color="black", alpha=0.5)
        for name, level in baseline_means(rows, y).items():
            style = styles.setdefault(name, ("--", ":", "-.")[len(styles) % 3])
            axes.axhline(level, linestyle=style, linewidth=1, color="grey", label=f"baseline {name}")
        if not numeric:
            axes.set_xticks(range(len(xs)), [_text(value) for value in xs], rotation=20 if len(xs) > 3 else 0)
            axes.set_xlim(-0.5, len(xs) - 0.5)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.grid(axis="y", alpha=0.3)
        handles, labels = axes.get_legend_handles_labels()
        named |= dict(zip(labels, handles, strict=True))
    if named:
        page.legend(named.values(), named.keys(), loc="outside lower center", ncols=3, fontsize="small")
    _save(page, path)


def pictures(rows: Sequence[Row], x: str, by: Sequence[str], path: Path, client: str = "") -> None:
    """Truth, then the reconstruction at every x, a line for each group: the first image of one client, pixels as they are."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.image import imread

    attacks = [row for row in rows if row.get("kind") == "attack" and row["status"] == "ok"]
    shown = [row for row in attacks if all(any((row.get("images") or {}).get(kind) or ()) for kind in SHOWN)]
    clients = sorted({str(row["client"]) for row in shown})
    chosen = client or next(iter(clients), "")
    if not clients:
        raise FedattackError("no attack that ended well has pictures and their truth")
    if chosen not in clients:
        raise FedattackError(must("client of the pictures", f"one of {', '.join(clients)}", chosen))
    cells = grouped([row for row in shown if str(row["client"]) == chosen], [*by, x])
    xs = list(_ranks([key[-1] for key in grouped(shown, [x])]))
    groups = list(dict.fromkeys(key[:-1] for key in cells))
    page = Figure(figsize=(1.5 * (len(xs) + 1), 1.75 * len(groups) + 0.3), layout="constrained")
    FigureCanvasAgg(page)
    for line, group in enumerate(groups):
        first = next(members[0] for key, members in cells.items() if key[:-1] == group)
        found = {at: cells[(*group, at)][0] for at in xs if (*group, at) in cells}
        frames = [("truth", first, "truth"), *((_text(at), found.get(at), "reconstruction") for at in xs)]
        for column, (title, row, kind) in enumerate(frames):
            axes = page.add_subplot(len(groups), len(frames), line * len(frames) + column + 1)
            axes.set_xticks([])
            axes.set_yticks([])
            file = row["images"][kind][0] if row is not None else None
            if row is None or file is None:
                axes.set_axis_off()
                continue
            axes.imshow(imread(row["folder"] / file), vmin=0.0, vmax=1.0, interpolation="nearest")
            psnr = numbers(row, "psnr_db")[:1] if kind == "reconstruction" else []
            axes.set_title(title if line == 0 else "", fontsize="small")
            axes.set_xlabel(f"{psnr[0]:.1f} dB" if psnr else "", fontsize="x-small")
            if column == 0:
                axes.set_ylabel("\n".join(map(_text, group)), fontsize="small")
    _save(page, path)


def _save(page: Any, path: Path) -> None:
    buffer = io.BytesIO()
    page.savefig(buffer, format="png", dpi=130)
    write_atomically(path, buffer.getvalue())

"""Table and figure of one or more runs, as a recipe asks for them: metrics over methods, steps or what is known.

    python -m experiments.figures RUN [RUN …] --x attack --y psnr_db ssim --by case oracles [--pictures] [--out FOLDER]

x and by name a field of rows.jsonl, an attack's option, or a dotted path (defense_facts.noise_std); y a metric per image
(psnr_db, ssim, mse, lpips.squeeze) or a number per row (seconds, diagnostics.loss). Values are pooled over images, clients,
rounds and seeds. Bars where x is text, lines where it is a number; whiskers are one standard deviation, dots the images;
dashed lines the baselines' means. --pictures: truth beside reconstruction for one client, never rescaled.
Writes NAME.md, NAME.png and NAME-pictures.png to FOLDER (RUN/figures), NAME from --name or the fields.
"""

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from fedattack.errors import FedattackError, must
from fedattack.registry import parse_spec
from fedattack.store import read_rows

Row = dict[str, Any]
Key = tuple[Any, ...]


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
def figure(rows: Sequence[Row], x: str, ys: Sequence[str], by: Sequence[str], path: Path) -> None:
    """A panel for each y: lines over a numeric x, bars over names, a colour for each group."""
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
        for place, (name, level) in enumerate(baseline_means(rows, y).items()):
            style = ("--", ":", "-.")[place % 3]
            axes.axhline(level, linestyle=style, linewidth=1, color="grey", label=f"baseline {name}")
        if not numeric:
            axes.set_xticks(range(len(xs)), [_text(value) for value in xs], rotation=20 if len(xs) > 3 else 0)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.grid(axis="y", alpha=0.3)
        if number == 0:
            axes.legend(fontsize="small")
    page.savefig(path, dpi=130)


def pictures(rows: Sequence[Row], x: str, by: Sequence[str], path: Path, client: str | None = None) -> None:
    """Truth, then the reconstruction at every x, a line for each group: the first image of one client, pixels as they are."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.image import imread

    attacks = [row for row in rows if row.get("kind") == "attack" and row["status"] == "ok"]
    shown = [row for row in attacks if (row.get("images") or {}).get("truth")]
    clients = sorted({str(row["client"]) for row in shown})
    chosen = client if client is not None else next(iter(clients), None)
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
            if row is None:
                axes.set_axis_off()
                continue
            axes.imshow(imread(row["folder"] / row["images"][kind][0]), vmin=0.0, vmax=1.0, interpolation="nearest")
            psnr = numbers(row, "psnr_db")[:1] if kind == "reconstruction" else []
            axes.set_title(title if line == 0 else "", fontsize="small")
            axes.set_xlabel(f"{psnr[0]:.1f} dB" if psnr else "", fontsize="x-small")
            if column == 0:
                axes.set_ylabel("\n".join(map(_text, group)), fontsize="small")
    page.savefig(path, dpi=130)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--x", required=True)
    parser.add_argument("--y", nargs="+", default=["psnr_db"])
    parser.add_argument("--by", nargs="*", default=[])
    parser.add_argument("--pictures", action="store_true", help="also the pictures of one client")
    parser.add_argument("--client", help="whose pictures; default: the first")
    parser.add_argument("--name", help="of the files")
    parser.add_argument("--out", type=Path, help="folder; default: RUN/figures of the first run")
    chosen = parser.parse_args(arguments)
    rows = load(chosen.runs)
    for field in [chosen.x, *chosen.by]:
        if all(look_up(row, field) is None for row in rows):
            known = sorted({key for row in rows for key in row} - {"folder"})
            raise FedattackError(must("a field of the rows", "one of " + ", ".join(known), field))
    for metric in chosen.y:
        if not any(numbers(row, metric) for row in rows):
            reasons = {json.dumps(row.get("missing")) for row in rows if row.get("missing")}
            raise FedattackError(f"no row has a number for {metric!r}; missing, by the rows: {sorted(reasons)[:3]}")
    name = chosen.name or "-".join([chosen.y[0], "over", chosen.x, *chosen.by]).replace(".", "-")
    folder = chosen.out or chosen.runs[0] / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    text = table(rows, chosen.x, chosen.y, chosen.by)
    (folder / f"{name}.md").write_text(text + "\n")
    figure(rows, chosen.x, chosen.y, chosen.by, folder / f"{name}.png")
    if chosen.pictures:
        pictures(rows, chosen.x, chosen.by, folder / f"{name}-pictures.png", chosen.client)
    print(text)
    print(f"\n{folder / name}.md .png")


if __name__ == "__main__":
    main()

"""How good an attack's images were along its way, beside the distance that it saw itself."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean

from fedattack.report import summary
from fedattack.report.charts import Chart, Series, legend, line_chart
from fedattack.report.summary import Row

Points = tuple[tuple[float, float], ...]


@dataclass(frozen=True, slots=True)
class Peak:
    """Over all images of the jobs of one attack under one defense: where their mean PSNR was best, and where it ended."""

    defense: str
    jobs: int
    step: int
    steps: int
    best: float
    end: float


@dataclass(frozen=True, slots=True)
class Way:
    """One attack in one case: curves by defense, and their peaks."""

    title: str
    charts: tuple[Chart, ...]
    lines: tuple[Peak, ...]


def ways(rows: Sequence[Row]) -> list[tuple[str, list[Way]]]:
    """For every case the attacks (no yardsticks) that kept images of their way."""
    split = summary.variants(rows)
    colours = {name: i for i, name in enumerate(dict.fromkeys(["none", *(summary.defense_of(row) for row in rows)]))}
    grouped: dict[str, dict[str, dict[str, list[Row]]]] = {}
    for row in rows:
        if summary.is_ok(row) and not summary.is_baseline(row) and psnr_on_the_way(row):
            case = summary.case_of(row)
            variant = summary.variant_of(row, split.get(case, ()))
            title = f"{summary.attack_of(row)} ({variant})" if variant else summary.attack_of(row)
            grouped.setdefault(case, {}).setdefault(title, {}).setdefault(summary.defense_of(row), []).append(row)
    return [
        (case, [_way(case, title, by_defense, colours) for title, by_defense in attacks.items()])
        for case, attacks in grouped.items()
    ]


def _way(case: str, title: str, by_defense: Mapping[str, list[Row]], colours: Mapping[str, int]) -> Way:
    peaks = []
    for defense, members in by_defense.items():
        if curve := _mean([psnr_on_the_way(row) for row in members]):
            step, best = max(curve, key=lambda point: point[1])
            peaks.append(Peak(defense, len(members), round(step), round(curve[-1][0]), best, curve[-1][1]))
    names = legend([(summary.defense_label(defense), colours[defense]) for defense in by_defense])
    nets = dict.fromkeys(net for members in by_defense.values() for row in members for net in _lpips(row))
    metrics: list[tuple[str, str, Callable[[Row], Points]]] = [("PSNR, dB", "PSNR", psnr_on_the_way)]
    metrics += [("SSIM", "SSIM", lambda row: _scored(row, _way_of(row).get("ssim")))]
    metrics += [(f"LPIPS ({net})", f"LPIPS ({net})", partial(_lpips_on_the_way, net=net)) for net in nets]
    metrics += [("Own distance", "Distance", loss_points)]
    charts = []
    for label, what, points in metrics:
        curves = {
            defense: [found for row in members if (found := points(row))] for defense, members in by_defense.items()
        }
        series = [Series(summary.defense_label(d), _mean(found), colours[d], "line") for d, found in curves.items()]
        own = points is loss_points
        svg = line_chart(
            series,
            title=f"{what} of {title}, {case}",
            x_label="step",
            y_label="distance" if own else label,
            log=own,
        )
        if svg:
            note = f"mean of {summary.count(sum(map(len, curves.values())), 'job')}" + ("" if own else _taken(series))
            charts.append(Chart(label, note, svg, names))
    return Way(title, tuple(charts), tuple(peaks))


def _taken(series: Sequence[Series]) -> str:
    """At how many steps of the way a metric was taken."""
    counts = sorted({len(one.points) for one in series if one.points})
    last = max(one.points[-1][0] for one in series if one.points)
    several = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else f"{counts[0]}"
    return f", taken at {several} of the steps up to {last:,.0f}"


def psnr_on_the_way(row: Row) -> Points:
    """(step, mean PSNR of the row's images there); () where the row has none."""
    return _scored(row, _way_of(row).get("psnr_db"))


def _lpips_on_the_way(row: Row, net: str) -> Points:
    return _scored(row, _lpips(row).get(net))


def _way_of(row: Row) -> Mapping[str, object]:
    way = row.get("trajectory")
    return way if isinstance(way, Mapping) else {}


def _lpips(row: Row) -> Mapping[str, object]:
    found = _way_of(row).get("lpips")
    return found if isinstance(found, Mapping) else {}


def _scored(row: Row, scores: object) -> Points:
    """(step, mean of the scores there), from a list of numbers for every kept step; () where they do not fit the steps."""
    steps = _way_of(row).get("steps")
    if not isinstance(steps, list) or not isinstance(scores, list) or len(steps) != len(scores):
        return ()
    points = []
    for step, values in zip(steps, scores, strict=True):
        listed = values if isinstance(values, list) else []
        figures = [number for value in listed if (number := summary.number(value)) is not None]
        if (place := summary.number(step)) is not None and figures:
            points.append((place, fmean(figures)))
    return tuple(points)


def loss_points(row: Row) -> Points:
    """(step, loss): the recorded losses are evenly spread over the steps."""
    losses = row.get("losses")
    if not isinstance(losses, list) or len(losses) < 2:
        return ()
    last = summary.number(row.get("steps")) or len(losses) - 1
    values = [(last * i / (len(losses) - 1), summary.number(loss)) for i, loss in enumerate(losses)]
    return tuple((step, loss) for step, loss in values if loss is not None)


def _mean(curves: Sequence[Points]) -> Points:
    """The mean over curves, at the steps that all of them have."""
    tables = [dict(curve) for curve in curves if curve]
    shared = [step for step in (tables[0] if tables else ()) if all(step in table for table in tables)]
    return tuple((step, fmean(table[step] for table in tables)) for step in sorted(shared))

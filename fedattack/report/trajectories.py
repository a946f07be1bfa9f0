"""How good an attack's images were along its way, beside the distance that it saw itself."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
    quality, distance, peaks = [], [], []
    for defense, members in by_defense.items():
        if not (curve := _mean([psnr_on_the_way(row) for row in members])):
            continue
        name = summary.defense_label(defense)
        quality.append(Series(name, curve, colours[defense], "line"))
        distance.append(Series(name, _mean([loss_points(row) for row in members]), colours[defense], "line"))
        step, best = max(curve, key=lambda point: point[1])
        peaks.append(Peak(defense, len(members), round(step), round(curve[-1][0]), best, curve[-1][1]))
    names = legend([(summary.defense_label(defense), colours[defense]) for defense in by_defense])
    jobs = f"mean of {summary.count(sum(len(members) for members in by_defense.values()), 'job')}"
    drawn = (
        ("PSNR, dB", line_chart(quality, title=f"PSNR of {title}, {case}", x_label="step", y_label="PSNR, dB")),
        (
            "Own distance",
            line_chart(distance, title=f"Distance of {title}, {case}", x_label="step", y_label="distance", log=True),
        ),
    )
    return Way(title, tuple(Chart(what, jobs, svg, names) for what, svg in drawn if svg), tuple(peaks))


def psnr_on_the_way(row: Row) -> Points:
    """(step, mean PSNR of the row's images there); () where the row has none."""
    way = row.get("trajectory")
    if not isinstance(way, Mapping):
        return ()
    steps, psnr = way.get("steps"), way.get("psnr_db")
    if not isinstance(steps, list) or not isinstance(psnr, list) or len(steps) != len(psnr):
        return ()
    points = []
    for step, values in zip(steps, psnr, strict=True):
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

"""Line charts as inline SVG: no library, no script; colours come from the page's CSS and follow its scheme."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

COLOURS = 8
"""Classes s0 … s7 of the style sheet; further series start again."""

WIDTH, HEIGHT = 440, 250
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 12, 40


@dataclass(frozen=True, slots=True)
class Series:
    """Points (x, y) in data units; `colour` counts through the palette, series of one colour belong together.

    style: "line", which has dots too where they are few, "dots" alone, "plain" or "dashed" lines without dots.
    """

    name: str
    points: tuple[tuple[float, float], ...]
    colour: int
    style: str = "line"


@dataclass(frozen=True, slots=True)
class Chart:
    """A drawn chart with what stands around it."""

    title: str
    note: str
    svg: str
    legend: str


def line_chart(
    series: Sequence[Series], *, title: str, x_label: str, y_label: str, log: bool = False, log_x: bool = False
) -> Markup:
    """One chart with axes; an empty string where no point can be drawn. On a log axis (`log`: of y) values ≤ 0 are left out."""
    drawn = []
    for one in series:
        points = [
            (math.log10(x) if log_x else x, y)
            for x, y in one.points
            if math.isfinite(x) and math.isfinite(y) and (y > 0 or not log) and (x > 0 or not log_x)
        ]
        if points:
            drawn.append((one, points))
    if not drawn:
        return Markup("")
    xs = [x for _, points in drawn for x, _ in points]
    ys = [math.log10(y) if log else y for _, points in drawn for _, y in points]
    x_low, x_high = _widen(min(xs), max(xs))
    y_low, y_high = _widen(min(ys), max(ys))
    if not log:
        y_low, y_high = (0.0 if 0 <= y_low < 0.5 * y_high else y_low), y_high
    margin = 0.04 * (y_high - y_low)
    y_high += margin
    y_low = y_low if y_low == 0 else y_low - margin

    def at_x(x: float) -> float:
        return LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

    def at_y(y: float) -> float:
        return HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)

    parts = [
        Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">').format(WIDTH, HEIGHT, title),
        Markup("<title>{}</title>").format(title),
    ]
    for value, label in _log_ticks(y_low, y_high) if log else _ticks(y_low, y_high):
        y = at_y(value)
        parts.append(
            Markup('<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>').format(LEFT, WIDTH - RIGHT, y, y)
        )
        parts.append(Markup('<text x="{}" y="{:.1f}" text-anchor="end">{}</text>').format(LEFT - 6, y + 4, label))
    for value, label in _log_ticks(x_low, x_high) if log_x else _ticks(x_low, x_high):
        parts.append(
            Markup('<text x="{:.1f}" y="{}" text-anchor="middle">{}</text>').format(at_x(value), HEIGHT - 22, label)
        )
    parts.append(
        Markup('<text x="{}" y="{}" text-anchor="middle" class="axis">{}</text>').format(
            (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 5, x_label
        )
    )
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(
        Markup('<text transform="translate(11 {}) rotate(-90)" text-anchor="middle" class="axis">{}</text>').format(
            middle, y_label
        )
    )
    for one, points in drawn:
        line = " ".join(f"{at_x(x):.1f},{at_y(math.log10(y) if log else y):.1f}" for x, y in points)
        colour = f"s{one.colour % COLOURS}"
        if len(points) > 1 and one.style != "dots":
            colour += " dashed" if one.style == "dashed" else ""
            parts.append(
                Markup('<polyline class="{}" points="{}"><title>{}</title></polyline>').format(colour, line, one.name)
            )
        if one.style == "dots" or (one.style == "line" and len(points) <= 12):
            for x, y in points:
                parts.append(
                    Markup('<circle class="{}" r="{}" cx="{:.1f}" cy="{:.1f}"><title>{}</title></circle>').format(
                        colour,
                        3.5 if one.style == "dots" else 2.5,
                        at_x(x),
                        at_y(math.log10(y) if log else y),
                        f"{one.name}: {y:.4g}",
                    )
                )
    parts.append(Markup("</svg>"))
    return Markup("").join(parts)


def legend(names: Sequence[tuple[str, int]]) -> Markup:
    """The names of the colours, (name, colour) each."""
    items = [
        Markup('<li><i class="swatch b{}"></i>{}</li>').format(colour % COLOURS, escape(name)) for name, colour in names
    ]
    return Markup('<ul class="legend">{}</ul>').format(Markup("").join(items))


def _widen(low: float, high: float) -> tuple[float, float]:
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _ticks(low: float, high: float, wanted: int = 5) -> list[tuple[float, str]]:
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    first = math.ceil(low / step - 1e-9)
    values = [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]
    digits = max(0, -math.floor(math.log10(step)))
    return [(v, (f"{v:.{digits}f}" if abs(v) < 1e5 else f"{v:.0e}").replace("-", "−")) for v in values]


def _log_ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Powers of ten inside [low, high] (both exponents), 1-2-5 steps where fewer than two powers fit."""
    first, last = math.ceil(low), math.floor(high)
    if last - first >= 1:
        stride = max(1, math.ceil((last - first) / 6))
        return [(float(e), f"1e{e}".replace("-", "−")) for e in range(first, last + 1, stride)]
    values = [m * 10.0**e for e in range(math.floor(low), math.ceil(high) + 1) for m in (1, 2, 5)]
    inside = [v for v in values if low <= math.log10(v) <= high]
    if len(inside) < 2:
        inside = [10.0**low, 10.0**high]
    return [(math.log10(v), f"{v:.3g}".replace("-", "−")) for v in inside]

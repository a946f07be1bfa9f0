"""What RV and the two bounds of fedattack.vulnerability say before any attack, beside what the attacks then reached."""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TypeVar

from fedattack.report import summary
from fedattack.report.charts import COLOURS, Chart, Series, legend, line_chart
from fedattack.report.summary import Row

Key = TypeVar("Key")

State = tuple[str, str]
"""A case and a round: one architecture in one state of training (for several clients, defenses and seeds, their mean)."""

ATTACKS = 5
"""Attacks drawn beside the bounds, those of the highest mean PSNR."""

ROUNDS = 4
"""Rounds of a case that are drawn: the last one, and earlier ones evenly spread."""

FEWEST_STATES = 4
"""From how many on their ranks are compared."""

RANKED = ("RV", "RV of an update of rms 1", "bound (b)")
"""What the measured PSNR is compared with."""

EXACT_P = 6
"""Up to how many states all orders are tried for the p-value; beyond, it is that of Student's t."""

OPTIMAL, FITTED = 0, 7
"""Colours of (b) and (a)."""


@dataclass(frozen=True, slots=True)
class Figure:
    """What a state is ranked by, high PSNR or RV first; `rank` 0 where it has no figure."""

    value: float | None
    shown: str
    rank: int


@dataclass(frozen=True, slots=True)
class Line:
    """One state. figures: RV, relative RV, bound (b), measured. best: the attack behind the measured figure."""

    case: str
    about: str
    updates: int
    figures: tuple[Figure, ...]
    best: str


@dataclass(frozen=True, slots=True)
class Ranking:
    """States in the order of bound (b), most leaking first; correlations: of RV, relative RV and (b) with what was measured."""

    lines: tuple[Line, ...]
    note: str
    correlations: tuple[str, ...]


# ------------------------------------------------------------------------------------------------ curves
def bound_charts(rows: Sequence[Row]) -> list[Chart]:
    """(a) and (b) as PSNR against σ for every state whose update was sent with noise, with the attacks as dots."""
    found = []
    for (case, round_), members in _shown(_by_state(rows)).items():
        series = bound_series(members)
        title = f"{case}, round {round_}" if round_ else case
        svg = line_chart(series, title=f"Bounds of {title}", x_label="σ of the noise", y_label="PSNR, dB", log_x=True)
        if svg:
            floors = _floors(members).values()
            note = summary.count(len({(floor["client"], floor["seed"]) for floor in floors}), "update") + " a defense"
            if hidden := sum(_told_scale(floor) is None for floor in floors):
                note += f"; (b) without {hidden} that tell nothing of some directions, or have no floor"
            found.append(Chart(title, note, svg, legend([(one.name, one.colour) for one in series])))
    return found


def bound_series(rows: Sequence[Row]) -> list[Series]:
    """(b), (a) and the dots of the attacks on one state; [] where no noise was added, or neither bound is known."""
    floors = list(_floors(rows).values())
    sigmas = [sigma for floor in floors if (sigma := _positive(floor, "noise_std"))]
    told = [20 * math.log10(scale) for floor in floors if (scale := _told_scale(floor))]
    norms = [20 * math.log10(rv) for floor in floors if (rv := _positive(floor, "rv"))]
    if not sigmas or not (told or norms):
        return []
    ends = min(sigmas) / 3.0, max(sigmas) * 3.0
    series = [_line("(b) Cramér-Rao", -fmean(told), ends, OPTIMAL, "plain")] if told else []
    series += [_line("(a) σ/RV", fmean(norms), ends, FITTED, "dashed")] if norms else []
    return series + _dots(rows)


def _line(name: str, at_one: float, ends: tuple[float, float], colour: int, style: str) -> Series:
    """PSNR falls by 20 dB for every tenfold σ; at_one: its value at σ = 1."""
    return Series(name, tuple((sigma, at_one - 20.0 * math.log10(sigma)) for sigma in ends), colour, style)


def _dots(rows: Sequence[Row]) -> list[Series]:
    points: dict[str, list[tuple[float, float]]] = {}
    for (attack, _), members in _group(rows, lambda row: (summary.attack_of(row), summary.defense_of(row))).items():
        sigmas = [math.log(sigma) for row in members if (sigma := _positive(_floor(row), "noise_std"))]
        psnr = [value for row in members for value in summary.numbers(row, "psnr_db")]
        if sigmas and psnr:
            points.setdefault(attack, []).append((math.exp(fmean(sigmas)), fmean(psnr)))
    best = sorted(points, key=lambda attack: -fmean(psnr for _, psnr in points[attack]))[:ATTACKS]
    return [
        Series(attack, tuple(sorted(points[attack])), 1 + place % (COLOURS - 2), "dots")
        for place, attack in enumerate(best)
    ]


# ------------------------------------------------------------------------------------------------ ranks
def ranking(rows: Sequence[Row]) -> Ranking | None:
    """Two states and more by RV and (b), beside the PSNR of the best attack; None for fewer, or where no floor is known.

    (b) and the measured PSNR are means over the defenses that add noise and that all states have; where there are none, (b)
    is that of noise of a hundredth of the update's root mean square, and measured is what attacks reach without a defense.
    """
    states = {
        state: members
        for state, members in _by_state(rows).items()
        if any(_positive(floor, "rms_per_sigma") or _positive(floor, "rv") for floor in _floors(members).values())
    }
    if len(states) < 2:
        return None
    noisy = [
        {summary.defense_of(row) for row in members if _positive(_floor(row), "noise_std")}
        for members in states.values()
    ]
    shared = set.intersection(*noisy)
    under = shared or {"none"}
    raw = {state: _figures(members, under, bool(shared)) for state, members in states.items()}
    columns = [_ranked([figures[0][i] for figures in raw.values()]) for i in range(4)]
    lines = []
    for place, ((case, round_), (_, best)) in enumerate(raw.items()):
        members = states[case, round_]
        figures = tuple(column[place] for column in columns)
        lines.append(Line(case, _training(members[0], round_), len(_floors(members)), figures, best))
    lines.sort(key=lambda line: line.figures[2].rank or len(lines) + 1)
    labels = ", ".join(summary.defense_label(defense) for defense in sorted(under))
    if shared:
        told = f"(b) and measured: means over {labels}."
    else:
        told = (
            "No defense adds noise in all of them: (b) is at σ of a hundredth of the update's root mean square, "
            "measured without a defense."
        )
    note = (
        f"Measured is the best attack's mean PSNR. {told} −∞: the update tells nothing of some directions of the image."
    )
    correlations = []
    for i, name in enumerate(RANKED):
        if words := _spearman([(figures[i], figures[3]) for figures, _ in raw.values()]):
            correlations.append(f"{name} {words}")
    return Ranking(tuple(lines), note, tuple(correlations))


def _training(row: Row, round_: str) -> str:
    """What the model was through before this round."""
    start = summary.text(row, "weights", "untrained")
    if not round_.isdigit() or int(round_) < 2:
        return start
    rounds = f"after {summary.count(int(round_) - 1, 'round')}"
    return rounds if start == "untrained" else f"{start}, {rounds}"


def _figures(rows: Sequence[Row], under: set[str], noisy: bool) -> tuple[tuple[float | None, ...], str]:
    """RV, relative RV, (b), measured; and the best attack by name."""
    floors = _floors(rows)
    rv = [value for floor in floors.values() if (value := _positive(floor, "rv"))]
    relative = [value for floor in floors.values() if (value := _positive(floor, "relative_rv"))]
    bounds = [
        bound
        for floor in floors.values()
        if not (noisy and floor["defense"] not in under) and (bound := _bound(floor, noisy)) is not None
    ]
    attacks: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        if summary.is_ok(row) and not summary.is_baseline(row) and summary.defense_of(row) in under:
            reached = attacks.setdefault(summary.attack_of(row), {}).setdefault(summary.defense_of(row), [])
            reached += summary.numbers(row, "psnr_db")
    means = {
        attack: fmean(fmean(psnr) for psnr in by_defense.values())
        for attack, by_defense in attacks.items()
        if set(by_defense) == under and all(by_defense.values())
    }
    best = max(means, key=lambda attack: means[attack], default="")
    figures = (max(rv, default=None), max(relative, default=None), fmean(bounds) if bounds else None, means.get(best))
    return figures, best or "–"


def _bound(floor: Row, noisy: bool) -> float | None:
    """(b) in dB at the defense's noise, or at a hundredth of the update's rms; −inf where directions are hidden."""
    scale, rms = _positive(floor, "rms_per_sigma"), _positive(floor, "update_rms")
    sigma = _positive(floor, "noise_std") if noisy else 0.01 * rms if rms else None
    if scale is None or not sigma:
        return None
    return -math.inf if _number(floor, "hidden") else -20.0 * math.log10(scale * sigma)


def _ranked(values: Sequence[float | None]) -> list[Figure]:
    """1 for the highest; equal ones share the better rank."""
    known = sorted((value for value in values if value is not None), reverse=True)
    return [
        Figure(value, _shown_number(value), 0 if value is None else 1 + known.index(value)) for value in values
    ]  # fmt: skip


def _shown_number(value: float | None) -> str:
    return "−∞" if value == -math.inf else summary.small_number(value)


def _spearman(pairs: Sequence[tuple[float | None, float | None]]) -> str:
    """Spearman's ρ with its two-sided p-value, "" for fewer than FEWEST_STATES pairs or where a side has one value only."""
    from scipy.stats import rankdata, spearmanr

    both = [(a, b) for a, b in pairs if a is not None and b is not None]
    if len(both) < FEWEST_STATES:
        return ""
    first, second = (rankdata(column) for column in zip(*both, strict=True))
    if len(set(first)) < 2 or len(set(second)) < 2:
        return ""
    rho, chance = (float(value) for value in spearmanr(first, second))
    if len(both) <= EXACT_P:
        orders = list(itertools.permutations(first))
        extreme = sum(abs(float(spearmanr(order, second)[0])) >= abs(rho) - 1e-9 for order in orders)
        chance = extreme / len(orders)
    return f"ρ = {summary.plain_number(rho, 2)} (p = {chance:.2g})"


# ------------------------------------------------------------------------------------------------ rows
def _by_state(rows: Iterable[Row]) -> dict[State, list[Row]]:
    """Rows of attacks that have a floor, by case and round."""
    good = [row for row in rows if not summary.is_baseline(row) and _floor(row)]
    return _group(good, lambda row: (summary.case_of(row), summary.text(row, "round")))


def _shown(states: Mapping[State, list[Row]]) -> dict[State, list[Row]]:
    """At most ROUNDS rounds of each case, the last among them."""
    kept: set[State] = set()
    for case in {case for case, _ in states}:
        own = [state for state in states if state[0] == case]
        few = min(ROUNDS, len(own))
        kept |= {own[len(own) - 1 - round(i * (len(own) - 1) / max(few - 1, 1))] for i in range(few)}
    return {state: members for state, members in states.items() if state in kept}


def _group(rows: Iterable[Row], key: Callable[[Row], Key]) -> dict[Key, list[Row]]:
    found: dict[Key, list[Row]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return found


def _floors(rows: Iterable[Row]) -> dict[tuple[str, ...], dict[str, object]]:
    """The floor of every update once, with its client, seed and defense."""
    return {
        summary.target_of(row): {
            **_floor(row),
            "client": summary.text(row, "client"),
            "seed": summary.text(row, "seed"),
            "defense": summary.defense_of(row),
        }
        for row in rows
    }


def _floor(row: Row) -> Mapping[str, object]:
    floor = row.get("floor")
    return floor if isinstance(floor, Mapping) else {}


def _number(floor: Mapping[str, object], name: str) -> float | None:
    return summary.number(floor.get(name))


def _positive(floor: Mapping[str, object], name: str) -> float | None:
    value = _number(floor, name)
    return value if value is not None and value > 0 else None


def _told_scale(floor: Mapping[str, object]) -> float | None:
    """rms error per σ where the update tells all directions of the image."""
    return None if _number(floor, "hidden") else _positive(floor, "rms_per_sigma")

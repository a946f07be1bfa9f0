"""What RV and the two bounds of fedattack.vulnerability say before any attack, beside what the attacks then reached.

`ranking` is the report's, of attacked updates; `predicted` that of `fedattack floor`, where nothing was attacked yet.
"""

import itertools
import math
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TypeVar

from fedattack.report import summary
from fedattack.report.charts import COLOURS, Chart, Series, legend, line_chart
from fedattack.report.summary import Row
from fedattack.vulnerability import cramer_rao_bound, overfitting_bound, psnr_of

Floor = Mapping[str, object]
Key = TypeVar("Key")

State = tuple[str, str]
"""A case and a round: one architecture in one state of training, all its clients, defenses and seeds together."""

ATTACKS = 5
"""Attacks drawn beside the bounds, those of the highest mean PSNR."""

ROUNDS = 4
"""Rounds of a case that are drawn: the last one, and earlier ones evenly spread."""

FEWEST_STATES = 4
"""From how many on their ranks are compared."""

RANKED = ("RV", "RV of an update of rms 1", "bound (b)")
"""What the measured PSNR is compared with."""

BOUND = RANKED.index("bound (b)")

NOISE = "gaussian-noise"
"""The part of a defense that decides σ; what is left of the defense decides what is sent before the noise."""

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
    """One state. figures: those of the ranking. best: the attack behind the measured figure, "–" where none was run."""

    case: str
    about: str
    updates: int
    figures: tuple[Figure, ...]
    best: str


@dataclass(frozen=True, slots=True)
class Ranking:
    """States in the order of bound (b), most leaking first; correlations: of RV, relative RV and (b) with what was measured.

    heads: names of the figures.
    """

    heads: tuple[str, ...]
    lines: tuple[Line, ...]
    note: str
    correlations: tuple[str, ...] = ()


# ------------------------------------------------------------------------------------------------ curves
def bound_charts(rows: Sequence[Row]) -> list[Chart]:
    """(a) and (b) as PSNR against σ, with the attacks as dots: for every state, and every clipping of updates with noise."""
    found = []
    for (case, round_), of_state in _shown(_by_state(rows)).items():
        for clipping, members in by_clipping(of_state).items():
            series = bound_series(members)
            title = f"{case}, round {round_}" if round_ else case
            title += f", {summary.defense_label(clipping)}" if clipping != "none" else ""
            svg = line_chart(
                series, title=f"Bounds of {title}", x_label="σ of the noise", y_label="PSNR, dB", log_x=True
            )
            if svg:
                note = _note(list(_floors(members).values()))
                found.append(Chart(title, note, svg, legend([(one.name, one.colour) for one in series])))
    return found


def by_clipping(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows by their defense without its noise, "none" where nothing is left; those whose noise is not modelled are left out."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        parts = summary.defense_of(row).split(" + ")
        rest = [part for part in parts if part.partition("(")[0] != NOISE]
        if len(rest) == len(parts) or _positive(_floor(row), "noise_std"):
            found.setdefault(" + ".join(rest) or "none", []).append(row)
    return found


def bound_series(rows: Sequence[Row]) -> list[Series]:
    """(b), (a) and the dots of the attacks on one state under one clipping, both lines as means in dB over the same floors.

    [] where no noise was added, or neither bound is known.
    """
    floors = list(_floors(rows).values())
    sigmas = [sigma for floor in floors if (sigma := _positive(floor, "noise_std"))]
    drawn = _drawn(floors)
    told = [scale for floor in drawn if (scale := _told_scale(floor))]
    norms = [rv for floor in drawn if (rv := _positive(floor, "rv"))]
    if not sigmas or not drawn:
        return []
    ends = min(sigmas) / 3.0, max(sigmas) * 3.0
    series = [_line("(b) Cramér-Rao", cramer_rao_bound, told, ends, OPTIMAL, "plain")] if told else []
    series += [_line("(a) σ/RV", overfitting_bound, norms, ends, FITTED, "dashed")] if norms else []
    return series + _dots(rows)


def _drawn(floors: Sequence[Floor]) -> list[Floor]:
    """Those with both bounds, else those with (b), else those with (a)."""
    told = [floor for floor in floors if _told_scale(floor)]
    normed = [floor for floor in floors if _positive(floor, "rv")]
    return [floor for floor in told if _positive(floor, "rv")] or told or normed


def _note(floors: Sequence[Floor]) -> str:
    """How many updates, and what is not known of them."""
    drawn = _drawn(floors)
    words = [summary.count(len({(floor["client"], floor["seed"]) for floor in floors}), "update") + " a defense"]
    if out := len(floors) - len(drawn):
        words.append(f"lines without {out} that tell nothing of some directions, or lack a figure")
    if open_ := sum(_at_least(floor) for floor in drawn):
        words.append(f"{summary.count(open_, 'floor')} known from one side only: (b) is at most what is drawn")
    if uncounted := sum(_uncounted(floor) for floor in drawn):
        words.append(f"directions that are not told were not counted for {uncounted}")
    return "; ".join(words)


def _line(
    name: str,
    bound: Callable[[float, float], float],
    facts: Sequence[float],
    ends: tuple[float, float],
    colour: int,
    style: str,
) -> Series:
    """bound(σ, fact) at both ends as PSNR, the mean over the floors' facts; straight in between on a log axis."""
    points = tuple((sigma, fmean(psnr_of(bound(sigma, fact)) for fact in facts)) for sigma in ends)
    return Series(name, points, colour, style)


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

    All are of the defenses that add noise and that all states have: RV the largest over their updates, (b) and the measured
    PSNR means. Where there are none, they are of updates without a defense, (b) at noise of a hundredth of the update's root
    mean square. A (b) of floors that are known from one side only ("≤") has no rank.
    """
    states = _known(rows)
    if len(states) < 2:
        return None
    noisy = {summary.defense_of(row) for row in rows if _positive(_floor(row), "noise_std")}  # where a floor is known
    shared = noisy.intersection(*({summary.defense_of(row) for row in members} for members in states.values()))
    under = shared or {"none"}
    raw = {state: _figures(members, under, bool(shared)) for state, members in states.items()}
    used = {state: _under(members, under) for state, members in states.items()}
    columns = _columns([figures for figures, _ in raw.values()], list(used.values()), {BOUND})
    labels = ", ".join(summary.defense_label(defense) for defense in sorted(under))
    if shared:
        told = f"All are of updates under {labels}."
    else:
        told = (
            "No defense adds noise in all of them: all are of updates without a defense, "
            "(b) at σ of a hundredth of the update's root mean square."
        )
    note = f"{told} RV is the largest of the updates, (b) and measured, the best attack's PSNR, are means. "
    note += _provisos(list(used.values()))
    correlations = []
    for i, name in enumerate(RANKED):
        pairs = [(a.value, b.value) for a, b in zip(columns[i], columns[3], strict=True)]
        if words := _spearman(pairs):
            known = sum(None not in pair for pair in pairs)
            correlations.append(f"{name} {words}" + (f" over {known} of them" if known < len(pairs) else ""))
    best = [name for _, name in raw.values()]
    return Ranking((*RANKED, "measured"), _lines(states, used, columns, BOUND, best), note, tuple(correlations))


def predicted(rows: Sequence[Row], sigma: float) -> Ranking | None:
    """Two states and more by RV and both bounds at noise σ, nothing being attacked; None for fewer.

    Of updates without a defense, or where a state has none of these, of those that only noise was added to: it is no part of
    the Jacobian. States whose updates were all clipped or otherwise changed are left out.
    """
    everything = _by_state(rows)
    clean = {state: list(_floors(_unchanged(members)).values()) for state, members in _known(rows).items()}
    used = {state: floors for state, floors in clean.items() if floors}
    if len(used) < 2:
        return None
    columns = _columns([_predicted(floors, sigma) for floors in used.values()], list(used.values()), {3, 4})
    at = f"σ={sigma:g}"
    heads = ("largest RV", "RV / update rms", f"(a) at {at}, dB", "(b) at 1 % of rms, dB", f"(b) at {at}, dB")
    note = (
        f"Before any attack, at the true images of {summary.count(sum(map(len, used.values())), 'update')} without a defense: "
        "RV = ‖∂gradient/∂images‖_F, the largest over a state's updates, and the PSNR that noise σ on every coordinate leaves "
        "by (a) σ/RV, at that RV, and by (b) Cramér-Rao, the mean over the updates; the highest leaks most. "
    )
    note += _provisos(list(used.values()))
    if out := len(everything) - len(used):
        note += f" Left out: {summary.count(out, 'state')} without a figure, or whose updates were changed by more than noise."
    return Ranking(heads, _lines({state: everything[state] for state in used}, used, columns, 4), note)


def _known(rows: Sequence[Row]) -> dict[State, list[Row]]:
    """Rows by state, of the states that have RV or (b)."""
    return {
        state: members
        for state, members in _by_state(rows).items()
        if any(_positive(floor, "rms_per_sigma") or _positive(floor, "rv") for floor in _floors(members).values())
    }


def _unchanged(rows: Sequence[Row]) -> list[Row]:
    """Those without a defense, else those under noise alone."""
    return [row for row in rows if summary.defense_of(row) == "none"] or by_clipping(rows).get("none", [])


def _columns(
    values: Sequence[Sequence[float | None]], used: Sequence[Sequence[Floor]], bounds: Container[int]
) -> list[list[Figure]]:
    """Figures by column, ranked, from those of every state; bounds: the columns that floors known from one side leave open."""
    at_most = [any(map(_at_least, floors)) for floors in used]
    return [_ranked(column, at_most if i in bounds else ()) for i, column in enumerate(zip(*values, strict=True))]


def _lines(
    states: Mapping[State, Sequence[Row]],
    used: Mapping[State, Sequence[Floor]],
    columns: Sequence[Sequence[Figure]],
    by: int,
    best: Sequence[str] = (),
) -> tuple[Line, ...]:
    """One line a state, sorted by one of the columns; those without a rank there come last."""
    lines = [
        Line(
            case,
            _training(members[0], round_),
            len(used[case, round_]),
            tuple(column[place] for column in columns),
            best[place] if best else "–",
        )
        for place, ((case, round_), members) in enumerate(states.items())
    ]
    return tuple(sorted(lines, key=lambda line: line.figures[by].rank or len(lines) + 1))


def _provisos(used: Sequence[Sequence[Floor]]) -> str:
    """What signs in a ranking mean, and what is not known of its floors."""
    floors = [floor for of_state in used for floor in of_state]
    note = "−∞: the update tells nothing of some directions of the image."
    if any(map(_at_least, floors)):
        note += " ≤: floors that are known from one side only, which are not ranked."
    if uncounted := sum(map(_uncounted, floors)):
        note += f" Directions that are not told were not counted for {summary.count(uncounted, 'update')}."
    if several := sum((_number(floor, "updates") or 1) > 1 for floor in floors):
        note += (
            f" (b) of {summary.count(several, 'update')} counts what the attacker has of the same images from earlier rounds, "
            "which tells more whatever the model's state."
        )
    return note


def _training(row: Row, round_: str) -> str:
    """What the model was through before this round."""
    start = summary.text(row, "weights", "untrained")
    if not round_.isdigit() or int(round_) < 2:
        return start
    rounds = f"after {summary.count(int(round_) - 1, 'round')}"
    return rounds if start == "untrained" else f"{start}, {rounds}"


def _figures(rows: Sequence[Row], under: set[str], noisy: bool) -> tuple[tuple[float | None, ...], str]:
    """The largest RV and relative RV, mean (b), measured, all of the defenses `under`; and the best attack by name."""
    floors = _under(rows, under)
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
    bound = _mean_bound(floors, lambda floor: _positive(floor, "noise_std") if noisy else _hundredth(floor))
    return (_largest(floors, "rv"), _largest(floors, "relative_rv"), bound, means.get(best)), best or "–"


def _predicted(floors: Sequence[Floor], sigma: float) -> tuple[float | None, ...]:
    """The largest RV and relative RV, (a) at σ and that RV, mean (b) at a hundredth of the update's rms and at σ."""
    rv = _largest(floors, "rv")
    fitted = None if rv is None else psnr_of(overfitting_bound(sigma, rv))
    bounds = _mean_bound(floors, _hundredth), _mean_bound(floors, lambda _: sigma)
    return rv, _largest(floors, "relative_rv"), fitted, *bounds


def _largest(floors: Iterable[Floor], name: str) -> float | None:
    return max((value for floor in floors if (value := _positive(floor, name))), default=None)


def _mean_bound(floors: Iterable[Floor], noise: Callable[[Floor], float | None]) -> float | None:
    """(b) in dB at each floor's noise, the mean over those that have it."""
    bounds = [bound for floor in floors if (bound := _bound(floor, noise(floor))) is not None]
    return fmean(bounds) if bounds else None


def _hundredth(floor: Floor) -> float | None:
    """σ of a hundredth of the update's root mean square."""
    rms = _positive(floor, "update_rms")
    return 0.01 * rms if rms else None


def _under(rows: Iterable[Row], under: set[str]) -> list[Floor]:
    return [floor for floor in _floors(rows).values() if floor["defense"] in under]


def _bound(floor: Floor, sigma: float | None) -> float | None:
    """(b) in dB at noise σ; −inf where directions are hidden."""
    scale = _positive(floor, "rms_per_sigma")
    if scale is None or not sigma:
        return None
    return -math.inf if _number(floor, "hidden") else psnr_of(cramer_rao_bound(sigma, scale))


def _ranked(values: Sequence[float | None], at_most: Sequence[bool] = ()) -> list[Figure]:
    """1 for the highest; equal ones share the better rank. at_most: which are no more than upper bounds, without a rank."""
    open_ = [i for i, bounded in enumerate(at_most) if bounded and values[i] not in (None, -math.inf)]
    known = sorted((value for i, value in enumerate(values) if value is not None and i not in open_), reverse=True)
    return [
        Figure(None, f"≤ {_shown_number(value)}", 0)
        if i in open_
        else Figure(value, _shown_number(value), 0 if value is None else 1 + known.index(value))
        for i, value in enumerate(values)
    ]


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


def _floors(rows: Iterable[Row]) -> dict[tuple[str, ...], Floor]:
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


def _floor(row: Row) -> Floor:
    floor = row.get("floor")
    return floor if isinstance(floor, Mapping) else {}


def _at_least(floor: Floor) -> bool:
    """Whether the error is still higher, and (b) lower, by an amount that is not known."""
    return floor.get("status") == "at least"


def _uncounted(floor: Floor) -> bool:
    """Whether there is a figure, but it is not known if directions are hidden."""
    return _number(floor, "hidden") is None and _positive(floor, "rms_per_sigma") is not None


def _number(floor: Floor, name: str) -> float | None:
    return summary.number(floor.get(name))


def _positive(floor: Floor, name: str) -> float | None:
    value = _number(floor, name)
    return value if value is not None and value > 0 else None


def _told_scale(floor: Floor) -> float | None:
    """rms error per σ where the update tells all directions of the image."""
    return None if _number(floor, "hidden") else _positive(floor, "rms_per_sigma")

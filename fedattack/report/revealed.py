"""Whether pictures tell more of a person than pictures that were made without the client's update: words for the headline.

Every attack is compared, client by client, with everything beside it that had not seen the update (controls, the mean image,
noise), and with chance; without any of the former nothing is claimed, since a picture that always shows the commonest person
beats chance. Baselines that were chosen with the truth do not count. Where pairs were chosen with the truth, only controls do:
they draw as varied pictures as the attack.
"""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fedattack.report.recognition import figure, identified, tasks_of
from fedattack.report.summary import (
    BATCH_MEAN,
    Row,
    attack_of,
    case_of,
    count,
    defense_label,
    defense_of,
    is_baseline,
    is_ok,
    names,
    number,
    text,
)

SIGNIFICANT = 0.05
"""Largest p-value at which a person counts as given away."""

RESAMPLES = 9999
"""Of the permutation test; it is exact up to 13 clients."""

SEES_TRUTH = ("nearest-public", BATCH_MEAN)
"""Baselines that look at the true images."""


@dataclass(frozen=True, slots=True)
class Revealed:
    """One thing that was looked for under one defense. badge: "told", "not shown" or "too few clients"; words: the sentence."""

    badge: str
    words: str

    @property
    def told(self) -> bool:
        return self.badge == "told"


@dataclass(frozen=True, slots=True)
class _Tried:
    """One attack. value: median rank, or share of hits; p: the largest over everything that it was compared with.

    blind: the best of what had not seen the update, None if there is none; chance: of these very pictures. given: whether the
    attack knew the labels that the federation learns, which are what was looked for.
    """

    attack: str
    value: float
    p: float
    clients: int
    blind: float | None
    chance: float | None
    learned: bool
    given: bool
    oracles: tuple[str, ...]


def revealed(rows: Sequence[Row]) -> dict[str, list[Revealed]]:
    """For each case, for each defense and each thing that was looked for (faces apart, which any prior draws)."""
    found: dict[str, list[Revealed]] = {}
    for case, defense, task in _looked_for(rows):
        here = [
            row
            for row in rows
            if is_ok(row) and (case_of(row), defense_of(row)) == (case, defense) and task in tasks_of(row)
        ]
        groups: dict[tuple[bool, str, str], list[Row]] = {}
        for row in here:
            pairs = str(tasks_of(row)[task].get("pairs", "given"))
            groups.setdefault((is_baseline(row), attack_of(row), pairs), []).append(row)
        blind = [
            (pairs, group)
            for (base, _, pairs), group in groups.items()
            if base and text(group[0], "attack") not in SEES_TRUTH and (pairs != "chosen" or text(group[0], "control"))
        ]
        tried = [
            result
            for (base, attack, pairs), group in groups.items()
            if not base
            and (result := _tried(task, attack, pairs, group, [other for alike, other in blind if alike == pairs]))
        ]
        if tried:
            found.setdefault(case, []).append(_sentence(task, defense, tried, here))
    return found


def _looked_for(rows: Iterable[Row]) -> list[tuple[str, str, str]]:
    """(case, defense, task) in the order of rows, without a defense first."""
    keys = dict.fromkeys(
        (case_of(row), defense_of(row), task) for row in rows if is_ok(row) for task in tasks_of(row) if task != "face"
    )
    return sorted(keys, key=lambda key: key[1] != "none")


def _tried(task: str, attack: str, pairs: str, group: Sequence[Row], blind: Sequence[Sequence[Row]]) -> _Tried | None:
    """None where there is nothing to compare with."""
    ranked = identified(task)
    found, chances = ("rank", ("expected_rank",)) if ranked else ("hit", ("expected", "commonest"))
    own = _by_client(task, found, group)
    rivals = [rival for other in blind if (rival := _by_client(task, found, other))]
    lucky = [] if pairs == "chosen" else [rival for field in chances if (rival := _by_client(task, field, group))]
    shared = [[(own[client], rival[client]) for client in own if client in rival] for rival in (*rivals, *lucky)]
    if not any(shared):
        return None
    combine = statistics.median if ranked else statistics.fmean
    best = min if ranked else max
    oracles = tuple(sorted({name for row in group for name in names(row, "oracles")}))
    learned = any(tasks_of(row)[task].get("learned") is True for row in group)
    return _Tried(
        attack=attack,
        value=combine(own.values()),
        p=max(_p_value(some, ranked) for some in shared if some),
        clients=min(len(some) for some in shared if some),
        blind=best(combine(rival.values()) for rival in rivals) if rivals else None,
        chance=best(combine(rival.values()) for rival in lucky) if lucky else None,
        learned=learned,
        given=learned and "labels" in oracles,
        oracles=oracles,
    )


def _by_client(task: str, field: str, group: Iterable[Row]) -> dict[str, float]:
    """Median rank or share of all of a client's pictures, of all rounds and seeds: its people are the same."""
    values: dict[str, list[float]] = {}
    for row in group:
        values.setdefault(text(row, "client"), []).extend(_numbers(tasks_of(row)[task].get(field)))
    combine = statistics.median if identified(task) else statistics.fmean
    return {client: combine(some) for client, some in values.items() if some}


def _numbers(values: object) -> list[float]:
    """Truth values count 0 or 1; what is no number is left out."""
    some = values if isinstance(values, list | tuple) else ()
    found = [float(value) if isinstance(value, bool) else number(value) for value in some]
    return [value for value in found if value is not None]


def _p_value(pairs: Sequence[tuple[float, float]], ranked: bool) -> float:
    """One-sided paired permutation test over clients that own values are no better than the rival's."""
    import numpy as np
    from scipy.stats import permutation_test

    gains = np.array([rival - own if ranked else own - rival for own, rival in pairs])
    if not gains.any():
        return 1.0
    if len(gains) == 1:  # the test needs two; one flip of a coin
        return 0.5 if gains[0] > 0 else 1.0
    result = permutation_test(
        (gains, np.zeros_like(gains)),
        lambda a, b, axis: np.mean(a - b, axis=axis),
        permutation_type="samples",
        alternative="greater",
        vectorized=True,
        n_resamples=RESAMPLES,
        rng=np.random.default_rng(0),
    )
    return float(result.pvalue)


def _sentence(task: str, defense: str, tried: Sequence[_Tried], rows: Sequence[Row]) -> Revealed:
    ranked = identified(task)
    best = min(tried, key=lambda one: (one.p, one.value if ranked else -one.value))
    p = min(1.0, best.p * len(tried))
    ahead = best.blind is not None and all(
        (best.value < rival if ranked else best.value > rival)
        for rival in (best.blind, best.chance)
        if rival is not None
    )
    if p <= SIGNIFICANT and ahead and not best.given:
        badge = "told"
    else:
        badge = "too few clients" if len(tried) * 0.5**best.clients > SIGNIFICANT else "not shown"
    what = ("Person" if task in ("identity", "identity:identity") else task.partition(":")[2].capitalize()) + (
        "" if defense == "none" else f", {defense_label(defense)}"
    )
    people = next((value for row in rows if (value := number(tasks_of(row)[task].get("people")))), None)
    beside = [f"chance {figure(best.chance, not ranked)}"] if best.chance is not None else []
    if best.blind is not None:
        beside.append(f"{figure(best.blind, not ranked)} at best in pictures made without this update")
    else:
        beside.append("no picture beside it that was made without this update")
    beside.append(
        f"{count(best.clients, 'client')}, p = {_p_text(p)}" + (f" for {len(tried)} attacks" if len(tried) > 1 else "")
    )
    place = (
        f"puts the right person at median rank {figure(best.value, False)}" + (f" of {people:.0f}" if people else "")
        if ranked
        else f"shows the right one in {figure(best.value, True)}"
    )
    who = best.attack if badge == "told" else f"the most telling attack, {best.attack},"
    words = f"{what}: {who} {place} ({'; '.join(beside)})"
    if best.given:
        words += "; it was given the labels, which say so"
    elif best.learned:
        words += "; it is what the federation learns, which the update tells without a picture"
    if best.oracles and not best.given:
        words += f"; it was given what a real server does not have: {', '.join(best.oracles)}"
    return Revealed(badge, words + ".")


def _p_text(p: float) -> str:
    return f"{p:.2g}" if p >= 0.001 else "0.001 or less"

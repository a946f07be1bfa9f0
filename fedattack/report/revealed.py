"""Whether pictures tell more of a person than pictures that were made without the client's update: words for the headline.

Every attack is compared, client by client, with everything beside it that had not seen the update: controls, the mean image,
noise, and chance. Baselines that were chosen with the truth do not count; pairs that were count only where both sides had that
help.
"""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fedattack.report.recognition import Facts, figure, identified, tasks_of
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
    number,
    text,
)

SIGNIFICANT = 0.05
"""Largest p-value at which a person counts as given away."""

RESAMPLES = 9999
"""Of the permutation test; it is exact up to 13 clients."""

SEES_TRUTH = ("nearest-public", BATCH_MEAN)
"""Baselines that look at the true images."""

Client = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Revealed:
    """One thing that was looked for under one defense. told: some attack's pictures told it. words: the sentence."""

    told: bool
    words: str


@dataclass(frozen=True, slots=True)
class _Tried:
    """One attack. value: median rank, or share of hits; p: the largest over everything that it was compared with."""

    attack: str
    value: float
    p: float
    clients: int
    blind: float | None
    chance: float | None
    learned: bool


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
            if base and text(group[0], "attack") not in SEES_TRUTH
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
    ranked, own = identified(task), _by_client(task, group)
    rivals = [_by_client(task, other) for other in blind]
    expected = {} if pairs == "chosen" else _by_client(task, group, chance=True)
    shares = [
        _p_value([(own[client], rival[client]) for client in own if client in rival], ranked)
        for rival in (*rivals, expected)
        if any(client in rival for client in own)
    ]
    if not shares:
        return None
    middles = [
        statistics.median(rival.values()) if ranked else statistics.fmean(rival.values()) for rival in rivals if rival
    ]
    combine = statistics.median if ranked else statistics.fmean
    return _Tried(
        attack=attack,
        value=combine(own.values()),
        p=max(shares),
        clients=len(own),
        blind=(min(middles) if ranked else max(middles)) if middles else None,
        chance=combine(expected.values()) if expected else None,
        learned=any(tasks_of(row)[task].get("learned") is True for row in group),
    )


def _by_client(task: str, group: Iterable[Row], *, chance: bool = False) -> dict[Client, float]:
    """Median rank or share of hits of all of a client's pictures, or what chance gives for the same pictures."""
    values: dict[Client, list[float]] = {}
    for row in group:
        facts = tasks_of(row)[task]
        some = (
            _chances(facts, identified(task)) if chance else _numbers(facts.get("rank" if identified(task) else "hit"))
        )
        values.setdefault((text(row, "federation"), text(row, "client")), []).extend(some)
    combine = statistics.median if identified(task) else statistics.fmean
    return {client: combine(some) for client, some in values.items() if some}


def _chances(facts: Facts, ranked: bool) -> list[float]:
    """For a class the better of chance and of always naming the commonest one."""
    if ranked:
        fixed = number(facts.get("chance_rank"))
        return _numbers(facts.get("expected_rank")) or ([] if fixed is None else [fixed])
    expected, commonest = _numbers(facts.get("expected")), _numbers(facts.get("commonest"))
    return max(expected, commonest, key=lambda some: statistics.fmean(some) if some else -1.0)


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
    told = p <= SIGNIFICANT
    what = ("Person" if task in ("identity", "identity:identity") else task.partition(":")[2].capitalize()) + (
        "" if defense == "none" else f", {defense_label(defense)}"
    )
    people = next((value for row in rows if (value := number(tasks_of(row)[task].get("people")))), None)
    beside = [f"chance {figure(best.chance, not ranked)}"] if best.chance is not None else []
    if best.blind is not None:
        beside.append(f"{figure(best.blind, not ranked)} at best in pictures made without this update")
    beside.append(
        f"{count(best.clients, 'client')}, p = {_p_text(p)}" + (f" for {len(tried)} attacks" if len(tried) > 1 else "")
    )
    place = (
        f"puts the right person at median rank {figure(best.value, False)}" + (f" of {people:.0f}" if people else "")
        if ranked
        else f"shows the right one in {figure(best.value, True)}"
    )
    who = best.attack if told else f"the most telling attack, {best.attack},"
    words = f"{what}: {who} {place} ({'; '.join(beside)})"
    if best.learned:
        words += "; it is what the federation learns, which the update tells without a picture"
    return Revealed(told, words + ".")


def _p_text(p: float) -> str:
    return f"{p:.2g}" if p >= 0.001 else "0.001 or less"

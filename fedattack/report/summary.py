"""From result rows to the numbers a reader compares: pure functions, no HTML.

A row is one attack (or baseline) on one client's update in one round, as a JSON object; every field may be missing.
Means are over all images of all rows, never over the best ones. Comparisons with a baseline are paired: the attack's
image and the baseline's image have the same truth.
"""

import csv
import json
import math
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedattack.errors import FedattackError, one_of

Row = Mapping[str, Any]
PerImage = list[float | None]

EXACT_DB = 60.0
"""From here on a picture is called exact: the error is 0.001 of the range, a quarter of an 8-bit grey level."""

RECOGNISABLE_DB = 20.0
"""An error of a tenth of the range; recognisable also needs RECOGNISABLE_GAIN_DB over the best baseline."""

RECOGNISABLE_GAIN_DB = 3.0
PARTLY_GAIN_DB = 1.0

PSNR_CAP_DB = 200.0
"""What `fedattack.metrics` gives for identical images; an infinite value in a row counts as this."""

VERDICTS = ("exact", "recognisable", "partly recovered", "hidden", "undecided")
"""Per image, strongest first. hidden: no better than the best baseline; undecided: weak, and there is no baseline."""

VARIANT_FIELDS = (
    "threat_model", "oracles", "precision", "model", "dataset", "task", "protocol", "strategy", "mods", "batch_size",
    "local_steps",
)  # fmt: skip
"""Fields that split a line of the table in two where they differ inside one case."""

BATCH_MEAN = "batch-mean"
"""The mean of the true images: of all single images the least mean MSE to them, never the baseline that verdicts go by."""

BASELINES = ("mean-image", "nearest-public", "noise", BATCH_MEAN)


# ------------------------------------------------------------------------------------------------ reading a row
def text(row: Row, key: str, default: str = "") -> str:
    """The field as text; `default` where it is missing, null or empty."""
    value = row.get(key)
    return default if value is None or value == "" else str(value)


def number(value: object) -> float | None:
    """A finite float, or None for anything else; booleans are not numbers."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def per_image(row: Row, metric: str) -> PerImage:
    """The metric's list in the truth's order, None where there is no number. `metric` is a field, or "lpips:<net>"."""
    field, _, net = metric.partition(":")
    values = row.get(field)
    if net:
        values = values.get(net) if isinstance(values, Mapping) else None
    if not isinstance(values, list | tuple):
        values = [] if number(values) is None else [values]
    if metric == "psnr_db":
        values = [PSNR_CAP_DB if v in (math.inf, "Infinity", "inf") else v for v in values]
    return [number(value) for value in values]


def numbers(row: Row, metric: str) -> list[float]:
    """`per_image` without the gaps."""
    return [value for value in per_image(row, metric) if value is not None]


def names(row: Row, key: str) -> list[str]:
    """A list-of-names field, sorted; empty where it is missing."""
    value = row.get(key)
    return sorted({str(v) for v in value}) if isinstance(value, list | tuple | set) else []


def is_baseline(row: Row) -> bool:
    return text(row, "kind") == "baseline" or (not text(row, "kind") and text(row, "attack") in BASELINES)


def is_ok(row: Row) -> bool:
    return text(row, "status", "ok") == "ok"


def attack_of(row: Row) -> str:
    """Name and parameters; a control that is a yardstick says so, since its parameters may be those of the attack itself."""
    name = text(row, "attack_spec") or text(row, "attack", "unnamed attack")
    return f"{name}, {text(row, 'control')}" if is_baseline(row) and text(row, "control") else name


def without_idle_controls(rows: Iterable[Row]) -> list[Row]:
    """Rows without those attacks that were only added as controls of others, and do not apply: nobody asked for them."""
    return [row for row in rows if not is_idle_control(row)]


def is_idle_control(row: Row) -> bool:
    return text(row, "control") == "peer" and text(row, "status") == "not-applicable"


def case_of(row: Row) -> str:
    return text(row, "case", "unnamed case")


def defense_of(row: Row) -> str:
    return text(row, "defense", "none")


def target_of(row: Row) -> tuple[str, str, str]:
    """Whose update was attacked: (federation, client, round) as text."""
    return text(row, "federation"), text(row, "client"), text(row, "round")


def defense_label(spec: str) -> str:
    """A defense as a reader says it: "gaussian-noise(sigma=0.01)" is "gaussian-noise σ=0.01"; chains keep their " + "."""
    if spec in ("", "none"):
        return "no defense"
    return " + ".join(_one_defense(part) for part in spec.split(" + "))


def _one_defense(spec: str) -> str:
    match = re.fullmatch(r"([^()]+)\((.*)\)", spec, re.DOTALL)
    label = f"{match[1]} {match[2]}".strip() if match else spec
    return re.sub(r"\bsigma=", "σ=", label).replace("epsilon=", "ε=")


def variants(rows: Sequence[Row]) -> dict[str, tuple[str, ...]]:
    """For each case the VARIANT_FIELDS that differ among its attack rows."""
    seen: dict[str, dict[str, set[str]]] = {}
    for row in rows:
        if not is_baseline(row):
            fields = seen.setdefault(case_of(row), {name: set() for name in VARIANT_FIELDS})
            for name in VARIANT_FIELDS:
                if text(row, name):
                    fields[name].add(text(row, name))
    return {case: tuple(n for n in VARIANT_FIELDS if len(fields[n]) > 1) for case, fields in seen.items()}


def variant_of(row: Row, fields: Iterable[str]) -> str:
    return ", ".join(value for value in (text(row, name) for name in fields) if value)


# ------------------------------------------------------------------------------------------------ one line of the table
@dataclass(frozen=True, slots=True)
class Spread:
    """Of all values: how many, mean, sample standard deviation (None for a single one), least and greatest."""

    count: int
    mean: float
    std: float | None
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread | None:
    """None for no values."""
    if not values:
        return None
    std = statistics.stdev(values) if len(values) > 1 else None
    return Spread(len(values), statistics.fmean(values), std, min(values), max(values))


@dataclass(frozen=True, slots=True)
class CellFloor:
    """The error floor over the updates behind a line: the PSNR that noise leaves to an unbiased attack without a prior.

    psnr_db: at the defense's noise, or at the rounding of what was sent (`rounding`). open: some floors are still higher,
    hence these PSNRs too generous. hidden: of how many image directions the update that hides most tells nothing. sigma: the
    geometric mean noise at which the floor passes target_db, and its share of the update's root mean square. without:
    updates whose floor is not known.
    """

    psnr_db: Spread | None
    rounding: bool
    open: bool
    hidden: int
    pixels: int
    sigma: float | None
    share: float | None
    target_db: float | None
    without: int

    @property
    def words(self) -> str:
        if self.hidden:
            return f"not identifiable: {self.hidden:,} of {self.pixels:,}"
        if self.psnr_db is None:
            return "not available" if self.without else "–"
        shown = f"{'≤ ' if self.open else ''}{plain_number(self.psnr_db.mean)}"
        return f"{shown} (rounding)" if self.rounding else shown


def cell_floor(rows: Sequence[Row]) -> CellFloor | None:
    """None where no row says anything of a floor."""
    floors = [floor for row in rows if isinstance(floor := row.get("floor"), Mapping)]
    if not floors:
        return None
    known = [floor for floor in floors if number(floor.get("rms_per_sigma")) is not None]
    noisy = [value for floor in known if (value := number(floor.get("floor_psnr_db"))) is not None]
    rounded = [value for floor in known if (value := number(floor.get("rounding_psnr_db"))) is not None]
    worst = max(known, key=lambda floor: number(floor.get("hidden")) or 0.0, default={})
    pairs = [
        (sigma, sigma / rms)
        for floor in known
        if (sigma := number(floor.get("sigma_at_target_db"))) and (rms := number(floor.get("update_rms")))
    ]
    return CellFloor(
        psnr_db=spread([min(value, PSNR_CAP_DB) for value in noisy or rounded]),
        rounding=not noisy,
        open=any(floor.get("status") == "at least" for floor in known),
        hidden=int(number(worst.get("hidden")) or 0),
        pixels=int(number(worst.get("pixels")) or 0),
        sigma=_geometric_mean([sigma for sigma, _ in pairs]),
        share=_geometric_mean([share for _, share in pairs]),
        target_db=next((value for floor in known if (value := number(floor.get("target_db"))) is not None), None),
        without=len(floors) - len(known),
    )


def _geometric_mean(values: Sequence[float]) -> float | None:
    return math.exp(statistics.fmean(math.log(value) for value in values)) if values else None


@dataclass(frozen=True, slots=True)
class Cell:
    """One attack or baseline against one defense in one case, over every image of every row.

    `gain_db` is the mean over images of PSNR minus that of `baseline` (the one of the highest mean PSNR) for the same
    truth. `verdicts` counts images by VERDICTS. `label_accuracy` is weighted by images; rows that were given the labels
    do not count, and `labels_given` says that there were some. `timestep_accuracy` likewise, weighted by batch size.
    `seconds` is a mean per row, `seconds_per_step` a quotient of sums.
    """

    case: str
    defense: str
    attack: str
    variant: str
    baseline_kind: bool
    statuses: dict[str, int]
    psnr_db: Spread | None
    ssim: float | None
    lpips: dict[str, float]
    mse_geometric: float | None
    mse_median: float | None
    label_accuracy: float | None
    labels_given: bool
    gain_db: float | None
    baseline: str | None
    baseline_db: float | None
    verdicts: dict[str, int]
    seconds: float | None
    seconds_per_step: float | None
    oracles: tuple[str, ...]
    floor: CellFloor | None = None
    control_of: tuple[str, ...] = ()
    timestep_accuracy: float | None = None
    timesteps_given: bool = False

    @property
    def jobs(self) -> int:
        return sum(self.statuses.values())

    @property
    def failed_jobs(self) -> int:
        return self.jobs - self.statuses.get("ok", 0)

    @property
    def images(self) -> int:
        return self.psnr_db.count if self.psnr_db else 0

    @property
    def exact(self) -> int:
        return self.verdicts.get("exact", 0)

    @property
    def verdict(self) -> str:
        """The strongest of VERDICTS that at least half of the images reach."""
        reached = 0
        for verdict in VERDICTS:
            reached += self.verdicts.get(verdict, 0)
            if reached and 2 * reached >= self.images:
                return verdict
        return "undecided"

    @property
    def verdict_words(self) -> str:
        """The verdict as a sentence's end: "no better than the mean image" names the baseline it was compared with."""
        return describe(self.verdict, self.baseline)


def describe(verdict: str, baseline: str | None) -> str:
    """A verdict in words, with the baseline it was compared with."""
    if verdict == "hidden":
        noun = {"mean-image": "the mean image", "nearest-public": "the nearest public image", "noise": "noise"}
        return f"no better than {noun.get(baseline or '', baseline or 'a baseline')}"
    return "undecided: no baseline" if verdict == "undecided" else verdict


def classify(psnr_db: float, baseline_db: float | None) -> str:
    """The verdict on one image, from its PSNR and the best baseline's PSNR for the same truth."""
    if psnr_db >= EXACT_DB:
        return "exact"
    if baseline_db is None:
        return "recognisable" if psnr_db >= RECOGNISABLE_DB else "undecided"
    if psnr_db >= RECOGNISABLE_DB and psnr_db - baseline_db >= RECOGNISABLE_GAIN_DB:
        return "recognisable"
    return "partly recovered" if psnr_db - baseline_db >= PARTLY_GAIN_DB else "hidden"


def summarise(rows: Sequence[Row]) -> list[Cell]:
    """One Cell per case, defense, attack (with its parameters) and variant.

    Order: cases as they appear; "none" first, then defenses as they appear; attacks from the highest mean PSNR down,
    those without a number next, baselines last.
    """
    rows = without_idle_controls(rows)
    split = variants(rows)
    groups: dict[tuple[str, str, str, str, bool], list[Row]] = {}
    for row in rows:
        base = is_baseline(row)
        variant = "" if base else variant_of(row, split.get(case_of(row), ()))
        groups.setdefault((case_of(row), defense_of(row), attack_of(row), variant, base), []).append(row)
    cases = _ranks(case_of(row) for row in rows)
    defenses = _ranks(["none", *(defense_of(row) for row in rows)])
    best = {key: _best_baseline(groups, *key) for key in {(k[0], k[1]) for k in groups}}
    cells = [_cell(key, group, *best[key[0], key[1]]) for key, group in groups.items()]
    return sorted(
        cells,
        key=lambda c: (
            cases[c.case],
            defenses[c.defense],
            c.baseline_kind,
            -(c.psnr_db.mean if c.psnr_db else -math.inf),
            c.attack,
            c.variant,
        ),
    )


def _ranks(values: Iterable[str]) -> dict[str, int]:
    return {value: rank for rank, value in enumerate(dict.fromkeys(values))}


Paired = dict[tuple[str, str, str], PerImage]


def _best_baseline(
    groups: Mapping[tuple[str, str, str, str, bool], list[Row]], case: str, defense: str
) -> tuple[str | None, Paired]:
    """Name of the baseline of the highest mean PSNR and its PSNR per target; (None, {}) where there is none.

    Only those compete that have a number for as many images as any: one that failed for some would leave these without.
    The batch's own mean is a bound and does not compete.
    """
    found: list[tuple[int, float, str, Paired]] = []
    for key, group in groups.items():
        if key[0] == case and key[1] == defense and key[4] and key[2] != BATCH_MEAN:
            values = [value for row in group for value in numbers(row, "psnr_db") if is_ok(row)]
            if values:
                paired = {target_of(row): per_image(row, "psnr_db") for row in group if is_ok(row)}
                covered = sum(value is not None for psnrs in paired.values() for value in psnrs)
                found.append((covered, statistics.fmean(values), key[2], paired))
    if not found:
        return None, {}
    *_, name, paired = max(found, key=lambda entry: entry[:2])
    return name, paired


def paired_values(row: Row, paired: Paired) -> list[tuple[float, float | None]]:
    """(PSNR, the baseline's PSNR for the same truth or None) of every image of the row that has a number."""
    own, base = per_image(row, "psnr_db"), paired.get(target_of(row), [])
    if len(base) != len(own):
        base = [None] * len(own)
    return [(a, b) for a, b in zip(own, base, strict=True) if a is not None]


def _cell(key: tuple[str, str, str, str, bool], group: list[Row], baseline: str | None, paired: Paired) -> Cell:
    case, defense, attack, variant, base = key
    good = [row for row in group if is_ok(row)]

    def every(metric: str) -> list[float]:
        return [value for row in good for value in numbers(row, metric)]

    def mean(values: Sequence[float]) -> float | None:
        return statistics.fmean(values) if values else None

    pairs = [pair for row in good for pair in paired_values(row, paired)]
    gains = [a - b for a, b in pairs if b is not None]
    nets = sorted({str(net) for row in good if isinstance(row.get("lpips"), Mapping) for net in row["lpips"]})
    lpips = {net: mean(every(f"lpips:{net}")) for net in nets}
    mse = every("mse")
    labels, labels_given = _share_found(good, "labels", "label_accuracy", lambda row: len(per_image(row, "psnr_db")))
    timesteps, timesteps_given = _share_found(
        good, "timesteps", "timestep_accuracy", lambda row: number(row.get("batch_size")) or 1
    )
    seconds = [value for row in good if (value := number(row.get("seconds"))) is not None]
    timed = [
        (duration, steps)
        for row in good
        if (duration := number(row.get("seconds"))) is not None and (steps := number(row.get("steps")))
    ]
    return Cell(
        case=case,
        defense=defense,
        attack=attack,
        variant=variant,
        baseline_kind=base,
        statuses=dict(Counter(text(row, "status", "ok") for row in group)),
        psnr_db=spread(every("psnr_db")),
        ssim=mean(every("ssim")),
        lpips={net: value for net, value in lpips.items() if value is not None},
        mse_geometric=math.exp(statistics.fmean(math.log(max(v, 1e-20)) for v in mse)) if mse else None,
        mse_median=statistics.median(mse) if mse else None,
        label_accuracy=labels,
        labels_given=labels_given,
        gain_db=mean(gains),
        baseline=baseline,
        baseline_db=mean([b for _, b in pairs if b is not None]),
        verdicts=dict(Counter(classify(a, b) for a, b in pairs)),
        seconds=mean(seconds),
        seconds_per_step=sum(t for t, _ in timed) / sum(n for _, n in timed) if timed else None,
        oracles=tuple(sorted({name for row in group for name in names(row, "oracles")})),
        floor=None if base else cell_floor(group),
        control_of=tuple(dict.fromkeys(name for row in group for name in names(row, "control_of"))),
        timestep_accuracy=timesteps,
        timesteps_given=timesteps_given,
    )


def _share_found(
    rows: Sequence[Row], oracle: str, metric: str, size: Callable[[Row], float]
) -> tuple[float | None, bool]:
    """Mean of a metric weighted by size, at least 1, over the rows that were not given the oracle; whether some were."""
    given = [oracle in names(row, "oracles") for row in rows]
    values = [
        (value, max(1.0, size(row)))
        for row, told in zip(rows, given, strict=True)
        if not told and (value := number(row.get(metric))) is not None
    ]
    return sum(v * n for v, n in values) / sum(n for _, n in values) if values else None, any(given)


# ------------------------------------------------------------------------------------------------ the headline
@dataclass(frozen=True, slots=True)
class Finding:
    """The best attack (highest mean PSNR over all its images) against one defense in one case, None if none succeeded.

    `effect_db` is its mean PSNR minus that of the best attack without a defense.
    """

    defense: str
    best: Cell | None
    effect_db: float | None


@dataclass(frozen=True, slots=True)
class Headline:
    """One case: the findings by defense, "none" first where it was run. `reference` is the first that has a number."""

    case: str
    findings: tuple[Finding, ...]

    @property
    def reference(self) -> Finding | None:
        return next((finding for finding in self.findings if finding.best is not None), None)


def headlines(cells: Sequence[Cell]) -> list[Headline]:
    """One Headline per case, from `summarise`. Attacks without any number can be nobody's best."""
    by_case: dict[str, dict[str, Cell | None]] = {}
    for cell in cells:
        best = by_case.setdefault(cell.case, {})
        best.setdefault(cell.defense, None)
        if not cell.baseline_kind and cell.psnr_db and best[cell.defense] is None:
            best[cell.defense] = cell
    found = []
    for case, best in by_case.items():
        plain = best.get("none")
        findings = []
        for defense, found_best in best.items():
            effect = None
            if defense != "none" and plain and plain.psnr_db and found_best and found_best.psnr_db:
                effect = found_best.psnr_db.mean - plain.psnr_db.mean
            findings.append(Finding(defense, found_best, effect))
        found.append(Headline(case, tuple(findings)))
    return found


# ------------------------------------------------------------------------------------------------ numbers as text
def plain_number(value: float | None, digits: int = 1, *, sign: bool = False) -> str:
    """A decimal number with a true minus sign; an en dash for None."""
    if value is None:
        return "–"
    shown = f"{value:+.{digits}f}" if sign else f"{value:.{digits}f}"
    return re.sub(r"^[-+](?=0(\.0*)?$)", "", shown).replace("-", "−")


def small_number(value: float | None) -> str:
    """Three significant digits, in scientific notation below 0.001; an en dash for None."""
    if value is None:
        return "–"
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        return f"{value:.3g}".replace("-", "−")
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa}e{int(exponent)}".replace("-", "−")


def count(n: int, noun: str) -> str:
    """ "1 image", "2 images"."""
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def markdown_table(rows: Sequence[Row]) -> str:
    """The attack × defense table as Markdown, for a README; the HTML report shows the same numbers."""
    head = [
        "case", "defense", "attack", "images", "PSNR dB, mean ± std (min to max)", "over best baseline, dB", "SSIM",
        "LPIPS", "label accuracy", "exact", "floor, dB", "seconds",
    ]  # fmt: skip
    cells = summarise(rows)
    timed = with_timesteps(cells)
    head[9:9] = ["timesteps found"] if timed else []
    lines = [head, ["---"] * 3 + ["---:"] * (len(head) - 3)]
    for cell in cells:
        name = f"{cell.attack} ({cell.variant})" if cell.variant else cell.attack
        lines.append(
            [
                cell.case,
                defense_label(cell.defense),
                f"*{name}*" if cell.baseline_kind else name,
                str(cell.images),
                _spread_text(cell.psnr_db),
                plain_number(cell.gain_db, sign=True),
                plain_number(cell.ssim, 3),
                ", ".join(f"{net} {value:.3f}" for net, value in cell.lpips.items()) or "–",
                label_text(cell),
                *([timestep_text(cell)] if timed else []),
                f"{cell.exact}/{cell.images}" if cell.images else "–",
                cell.floor.words if cell.floor else "–",
                plain_number(cell.seconds),
            ]
        )
    return "\n".join("| " + " | ".join(_markdown(entry) for entry in line) + " |" for line in lines) + "\n"


def label_text(cell: Cell) -> str:
    """Label accuracy in percent; "given" where every row that has a number was given the labels."""
    return _share_text(cell.label_accuracy, cell.labels_given)


def timestep_text(cell: Cell) -> str:
    """The same for the timesteps of diffusion clients."""
    return _share_text(cell.timestep_accuracy, cell.timesteps_given)


def with_timesteps(cells: Iterable[Cell]) -> bool:
    """Whether a table of these cells has a column for the timesteps found: some attack looked for them."""
    return any(cell.timestep_accuracy is not None for cell in cells)


def _share_text(share: float | None, given: bool) -> str:
    if share is not None:
        return f"{100 * share:.0f} %"
    return "given" if given else "–"


def _spread_text(value: Spread | None) -> str:
    if value is None:
        return "–"
    deviation = f" ± {plain_number(value.std)}" if value.std is not None else ""
    span = f" ({plain_number(value.low)} to {plain_number(value.high)})" if value.count > 1 else ""
    return f"{plain_number(value.mean)}{deviation}{span}"


def _markdown(entry: str) -> str:
    entry = entry.replace("\\", "\\\\").replace("|", "\\|").replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"\s+", " ", entry)


# ------------------------------------------------------------------------------------------------ files
def write_table(rows: Sequence[Row], path: Path) -> Path:
    """All rows as .csv or .parquet, one column per field in order of appearance, nested fields as JSON text.

    Text cells of a CSV that a spreadsheet would run as a formula (client names are not ours) start with an apostrophe.
    """
    writers: dict[str, Callable[[dict[str, list[Any]], Path], None]] = {".csv": _write_csv, ".parquet": _write_parquet}
    if path.suffix not in writers:
        raise FedattackError(one_of("suffix of the table", writers, path.suffix))
    fields = dict.fromkeys(key for row in rows for key in row)
    writers[path.suffix]({name: _column([row.get(name) for row in rows]) for name in fields}, path)
    return path


def _column(values: list[Any]) -> list[Any]:
    """One type a column: bool, int, float, or text (JSON where a value is nested or types are mixed)."""
    present = [value for value in values if value is not None]
    kinds = {type(value) for value in present}
    if kinds <= {int, float} and len(kinds) == 2:
        return [None if value is None else float(value) for value in values]
    if len(kinds) <= 1 and kinds <= {bool, int, float, str}:
        return values
    return [value if value is None or isinstance(value, str) else json.dumps(value, default=str) for value in values]


def _write_csv(columns: dict[str, list[Any]], path: Path) -> None:
    def safe(value: Any) -> Any:
        return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value

    with path.open("w", newline="", encoding="utf-8", errors="replace") as file:
        writer = csv.writer(file)
        writer.writerow([safe(name) for name in columns])
        writer.writerows([safe(value) for value in line] for line in zip(*columns.values(), strict=True))


def _write_parquet(columns: dict[str, list[Any]], path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({name: pyarrow.array(v) for name, v in columns.items()}), path)

"""The report: its arithmetic recomputed by hand, its pages against hostile and broken run folders."""

import base64
import csv
import hashlib
import json
import math
import re
import statistics
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from fedattack.errors import FedattackError
from fedattack.report import TITLES, build_report, read_lines, summary
from fedattack.report.bounds import bound_charts, bound_series, by_clipping, predicted, ranking
from fedattack.report.charts import Series, line_chart
from fedattack.report.gallery import gallery
from fedattack.report.summary import classify, defense_label, headlines, markdown_table, summarise, write_table
from fedattack.report.trajectories import ways

HOSTILE = '<script>alert("x")</script>'


def row(attack: str, psnr: list[float] | None, **fields: Any) -> dict[str, Any]:
    made = {
        "case": "dlg on LeNet", "federation": "fed", "client": "client-0", "round": 1, "attack": attack, "kind": "attack",
        "status": "ok", "defense": "none",
    }  # fmt: skip
    if psnr is not None:
        made |= {"psnr_db": psnr, "mse": [10 ** (-p / 10) for p in psnr], "ssim": [p / 100 for p in psnr]}
    return made | fields


def base(attack: str, psnr: list[float], **fields: Any) -> dict[str, Any]:
    return row(attack, psnr, kind="baseline", **fields)


NOISY = {"defense": "gaussian-noise(sigma=0.01)", "federation": "fed-noise"}
ROWS = [
    base("mean-image", [12.0, 14.0]),
    base("noise", [6.0, 7.0]),
    base("mean-image", [13.0, 15.0], client="client-1"),
    row("dlg", [70.0, 30.0], attack_spec="dlg(iterations=300)", seconds=2.0, steps=100, lpips={"squeeze": [0.1, 0.2]}),
    row("dlg", [80.0, 10.0], attack_spec="dlg(iterations=300)", seconds=4.0, steps=500, client="client-1"),
    row("gidm", [25.0, 25.0], oracles=["labels"], label_accuracy=1.0),
    row("gidm", [15.0, 16.5], label_accuracy=0.5, client="client-1"),
    row("analytic", None, status="not-applicable", error="no linear layer"),
    base("mean-image", [12.0, 14.0], **NOISY),
    row("dlg", [11.0, 12.0], attack_spec="dlg(iterations=300)", **NOISY),
]


def png(path: Path, seed: int, size: int = 8) -> bytes:
    from PIL import Image

    pixels = torch.rand(size, size, 3, generator=torch.Generator().manual_seed(seed))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((pixels * 255).byte().numpy()).save(path)
    return path.read_bytes()


def run_folder(path: Path, rows: list[dict[str, Any]], **lines: list[dict[str, Any]]) -> Path:
    path.mkdir(exist_ok=True)
    for name, entries in ({"rows": rows} | lines).items():
        (path / f"{name}.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def page_of(run: Path) -> str:
    return build_report(run).read_text(encoding="utf-8")


def words_of(page: str) -> str:
    body = re.sub(r"<(style|script)>.*?</\1>", "", page, flags=re.DOTALL)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", body))


# ------------------------------------------------------------------------------------------------ arithmetic
def test_a_cell_is_over_all_images() -> None:
    cells = {(c.defense, c.attack): c for c in summarise(ROWS)}
    dlg = cells["none", "dlg(iterations=300)"]
    values = [70.0, 30.0, 80.0, 10.0]
    assert dlg.psnr_db is not None
    assert (dlg.psnr_db.count, dlg.psnr_db.mean) == (4, statistics.fmean(values))
    assert dlg.psnr_db.std == pytest.approx(math.sqrt(sum((v - 47.5) ** 2 for v in values) / 3))
    assert (dlg.psnr_db.low, dlg.psnr_db.high) == (10.0, 80.0)
    assert dlg.baseline == "mean-image"
    assert dlg.baseline_db == 13.5
    assert dlg.gain_db == pytest.approx(((70 - 12) + (30 - 14) + (80 - 13) + (10 - 15)) / 4)
    assert dlg.mse_geometric == pytest.approx(10**-4.75)
    assert dlg.mse_median == pytest.approx((1e-3 + 1e-7) / 2)
    assert dlg.ssim == pytest.approx(0.475)
    assert dlg.lpips == {"squeeze": pytest.approx(0.15)}
    assert dlg.verdicts == {"exact": 2, "recognisable": 1, "hidden": 1}
    assert (dlg.verdict, dlg.exact) == ("exact", 2)
    assert dlg.seconds == 3.0
    assert dlg.seconds_per_step == pytest.approx(6.0 / 600)


def test_a_baseline_that_failed_for_some_targets_is_not_the_best() -> None:
    """A control without a result for client-1 would leave its images without a comparison."""
    control = [
        base("control", [50.0, 50.0]),
        row("control", None, kind="baseline", status="failed", error="out of memory", client="client-1"),
    ]
    dlg = next(c for c in summarise([*control, *ROWS]) if c.attack.startswith("dlg") and c.defense == "none")
    assert (dlg.baseline, dlg.baseline_db) == ("mean-image", 13.5)
    assert "undecided" not in dlg.verdicts
    whole = [*control, base("control", [51.0, 51.0], client="client-1")]
    dlg = next(c for c in summarise([*whole, *ROWS]) if c.attack.startswith("dlg") and c.defense == "none")
    assert (dlg.baseline, dlg.baseline_db) == ("control", 50.5)
    only = next(c for c in summarise([control[0], *ROWS[3:5]]) if not c.baseline_kind)
    assert (only.baseline, only.baseline_db) == ("control", 50.0)


@pytest.mark.parametrize(
    ("shared", "words"),
    [
        (
            {"compared": 2, "same": 1, "mirrored": True},
            "1 of 2 attacked images is among its training images (thumbnails, also mirrored, were compared)",
        ),
        (
            {"compared": 2, "same": 0, "mirrored": False},
            "0 of 2 attacked images are among its training images (thumbnails, not mirrored, were compared)",
        ),
        (
            {"compared": 2, "same": 0},
            "0 of 2 attacked images are among its training images (thumbnails, not mirrored, were compared)",
        ),
        (
            {
                "compared": 0,
                "same": None,
                "reason": "it was trained on images of 3 channels, those under attack have 1",
            },
            "among its training images is not known: it was trained on images of 3 channels, those under attack have 1.",
        ),
        (None, "Whether the attacked images are among its training images is not known."),
    ],
)
def test_what_was_compared_with_a_priors_images_is_said(
    tmp_path: Path, shared: dict[str, Any] | None, words: str
) -> None:
    fields = {"prior": "priors/faces", "knowledge": ["prior"], "prior_data": {"dataset": "faces"}}
    told = row("gidm", [20.0, 21.0], **fields, **({"prior_overlap": shared} if shared else {}))
    assert words in words_of(page_of(run_folder(tmp_path, [told])))


def test_given_labels_are_no_success() -> None:
    gidm = next(c for c in summarise(ROWS) if c.attack == "gidm")
    assert (gidm.label_accuracy, gidm.labels_given, gidm.oracles) == (0.5, True, ("labels",))
    assert summary.label_text(gidm) == "50 %"
    only = summarise([row("gidm", [25.0], oracles=["labels"], label_accuracy=1.0)])[0]
    assert summary.label_text(only) == "given"


def test_order_and_failures() -> None:
    cells = summarise(ROWS)
    names = [(c.defense, c.attack) for c in cells]
    assert names == [
        ("none", "dlg(iterations=300)"), ("none", "gidm"), ("none", "analytic"), ("none", "mean-image"), ("none", "noise"),
        (NOISY["defense"], "dlg(iterations=300)"), (NOISY["defense"], "mean-image"),
    ]  # fmt: skip
    assert (cells[2].jobs, cells[2].failed_jobs, cells[2].images, cells[2].verdict) == (1, 1, 0, "undecided")


def test_headline_gives_the_best_attack_and_the_defenses_effect() -> None:
    (line,) = headlines(summarise(ROWS))
    plain, noisy = line.findings
    assert line.reference is plain
    assert plain.best is not None
    assert plain.best.attack == "dlg(iterations=300)"
    assert plain.effect_db is None
    assert noisy.best is not None
    assert noisy.effect_db == pytest.approx(11.5 - 47.5)
    assert noisy.best.verdict_words == "no better than the mean image"


@pytest.mark.parametrize(
    ("psnr", "baseline", "verdict"),
    [
        (60.0, 70.0, "exact"), (59.9, 12.0, "recognisable"), (20.0, 17.0, "recognisable"), (20.0, 17.5, "partly recovered"),
        (19.0, 12.0, "partly recovered"), (12.9, 12.0, "hidden"), (25.0, None, "recognisable"), (12.0, None, "undecided"),
    ],
)  # fmt: skip
def test_verdict_of_one_image(psnr: float, baseline: float | None, verdict: str) -> None:
    assert classify(psnr, baseline) == verdict


def test_a_verdict_needs_half_of_the_images() -> None:
    cell = summarise([base("noise", [5.0] * 4), row("dlg", [200.0, 30.0, 5.0, 5.0])])[0]
    assert cell.verdict == "recognisable"
    cell = summarise([base("noise", [5.0] * 4), row("dlg", [200.0, 5.0, 5.0, 5.0])])[0]
    assert (cell.verdict, cell.exact) == ("hidden", 1)


def test_threat_models_of_one_attack_stay_apart() -> None:
    cells = summarise([row("dlg", [20.0], threat_model="strict"), row("dlg", [40.0], threat_model="oracle")])
    assert [(c.variant, c.images) for c in cells] == [("oracle", 1), ("strict", 1)]


def test_gaps_and_infinities() -> None:
    cell = summarise([row("dlg", None, psnr_db=[None, 30.0, float("inf"), float("nan"), "x", True])])[0]
    assert cell.psnr_db is not None
    assert (cell.psnr_db.count, cell.psnr_db.mean) == (2, 115.0)


def test_texts() -> None:
    assert defense_label("gaussian-noise(sigma=0.01)") == "gaussian-noise σ=0.01"
    assert defense_label("none") == "no defense"
    assert summary.plain_number(-23.44, sign=True) == "−23.4"
    assert summary.plain_number(-0.04, sign=True) == "0.0"
    assert summary.small_number(0.00001) == "1.0e−5"
    assert summary.plain_number(None) == "–"


# ------------------------------------------------------------------------------------------------ tables as files
def test_markdown_holds_the_same_numbers() -> None:
    table = markdown_table([*ROWS, row("a|b<i>\nc", [20.0])])
    lines = table.splitlines()
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
    assert "47.5 ± 33.0 (10.0 to 80.0)" in table
    assert "| +34.0 |" in table
    assert r"a\|b&lt;i> c" in table


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_write_table(tmp_path: Path, suffix: str) -> None:
    rows = [*ROWS, {"attack": "=cmd()", "round": 2.5, "missing": {"ssim": "too small"}}]
    path = write_table(rows, tmp_path / f"rows{suffix}")
    if suffix == ".csv":
        with path.open(newline="") as file:
            back: list[dict[str, Any]] = list(csv.DictReader(file))
        assert back[-1]["attack"] == "'=cmd()"
    else:
        import pyarrow.parquet

        back = pyarrow.parquet.read_table(path).to_pylist()
        assert back[-1]["attack"] == "=cmd()"
        assert back[-1]["round"] == 2.5
        assert back[-1]["client"] is None
    assert len(back) == len(rows)
    assert json.loads(back[0]["psnr_db"]) == [12.0, 14.0]
    assert json.loads(back[-1]["missing"]) == {"ssim": "too small"}


def test_write_table_refuses_other_files(tmp_path: Path) -> None:
    with pytest.raises(FedattackError, match=r"one of .csv, .parquet"):
        write_table(ROWS, tmp_path / "rows.cvs")


# ------------------------------------------------------------------------------------------------ the page
class Checker(HTMLParser):
    """Tags balance, nothing is loaded from elsewhere, every table row is as wide as its head."""

    VOID = frozenset({"meta", "img", "br", "link", "input", "hr"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.ids: list[str | None] = []
        self.scripts = 0
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        for name in ("src", "href", "srcset", "action", "data", "xlink:href"):
            assert (values.get(name) or "#").startswith(("#", "data:image/png;base64,")), values
        assert not any(name.startswith("on") for name in values)
        if tag == "img":
            self.images.append(values)
            assert values["alt"]
        self.scripts += tag == "script"
        if "id" in values:
            self.ids.append(values["id"])
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in ("line", "circle")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def check(page: str) -> Checker:
    checker = Checker()
    checker.feed(page)
    checker.close()
    assert checker.open == []
    assert checker.scripts == 1
    assert checker.ids == list(TITLES)
    assert not re.search(r"@import|url\(|https?://", page.replace("https://config.example", ""))
    script = re.search(r"<script>(.*)</script>", page, re.DOTALL)
    assert script is not None
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    assert f"'sha256-{digest}'" in page.replace("&#39;", "'")
    assert "prefers-color-scheme: dark" in page
    return checker


@pytest.fixture
def full_run(tmp_path: Path) -> Path:
    run = tmp_path / "run"
    truth = {"truth": ["images/t0.png", "images/t1.png"]}
    png(run / "images/t0.png", 0), png(run / "images/t1.png", 1), png(run / "images/r0.png", 2)
    rows = [
        entry | {"images": truth | {"reconstruction": ["images/r0.png", None]}} if entry["status"] == "ok" else entry
        for entry in ROWS
    ]
    rows[3] |= {"losses": [1.0 / (i + 1) for i in range(50)], "knowledge": ["image_shape"], "client": HOSTILE}
    rows[5] |= {"knowledge": ["image_shape", "labels"], "missing": {"ssim": f"too small {HOSTILE}"}}
    rows[9] |= {"defense_facts": {"noise_std": 0.01}}
    rows.append(row(HOSTILE, None, status="failed", error=f"ValueError: {HOSTILE}"))
    history = [
        {"case": "dlg on LeNet", "federation": f, "round": r, "test_accuracy": a * r / 2, "test_loss": 1 / r}
        for f, a in (("fed", 0.8), ("fed-noise", 0.7))
        for r in (1, 2)
    ]
    incidents = [{"federation": "fed", "round": 1, "client": HOSTILE, "problems": ["fc.bias must be finite, got nan"]}]
    run_folder(run, rows, history=history, incidents=incidents)
    (run / "config.toml").write_text(f'name = "{HOSTILE}"\nsite = "https://config.example"\n')
    about = {
        "name": HOSTILE,
        "seed": 7,
        "command": "fedattack run",
        "versions": {"torch": "2.15"},
        "wall_seconds": 12.5,
    }
    (run / "about.json").write_text(json.dumps(about))
    return run


def test_the_page_shows_every_section(full_run: Path) -> None:
    page = page_of(full_run)
    check(page)
    words = words_of(page)
    for title in TITLES.values():
        assert title in words
    assert "The best attack without a defense, dlg(iterations=300) , reaches 47.5 dB on average over 4 images" in words
    assert "With gaussian-noise σ=0.01: −36.0 dB (dlg(iterations=300) 11.5 dB, no better than the mean image)." in words
    assert "47.5 ± 33.0" in words
    assert "10.0 to 80.0" in words
    assert "noise_std 0.01" in words
    assert "not-applicable: no linear layer" in words
    assert "oracle: labels" in words
    assert "fc.bias must be finite, got nan" in words
    assert re.search(r"fed-noise gaussian-noise σ=0.01 2 70.0 % −10.0 0.5 –", words)
    assert "Keep this folder private." in words
    assert page.count("<svg") == 3
    assert "fedattack run" in words
    assert "torch 2.15" in words


def test_hostile_text_is_escaped(full_run: Path) -> None:
    page = page_of(full_run)
    assert HOSTILE not in page
    assert page.count("&lt;script&gt;") >= 6


def test_pictures_are_the_files_bytes(full_run: Path) -> None:
    page = page_of(full_run)
    images = check(page).images
    for name in ("t0", "t1", "r0"):
        data = (full_run / f"images/{name}.png").read_bytes()
        assert any(image["src"] == "data:image/png;base64," + base64.b64encode(data).decode() for image in images)
    assert {(image["width"], image["height"]) for image in images} == {("96", "96")}
    assert "image-rendering: pixelated" in page
    assert "no image for this one" in page


def test_paths_cannot_leave_the_run_folder(tmp_path: Path) -> None:
    secret = png(tmp_path / "secret.png", 3)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "not.png").write_text("no picture at all, but a file that is long enough")
    paths = ["../secret.png", str(tmp_path / "secret.png"), "not.png", "\0", "x" * 5000]
    run = run_folder(tmp_path / "run", [row("dlg", [20.0] * 5, images={"truth": paths, "reconstruction": paths})])
    page = page_of(run)
    assert check(page).images == []
    assert base64.b64encode(secret).decode() not in page
    assert "picture file not found" in page


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [{}],
        [ROWS[3]],
        [ROWS[7]],
        [row("dlg", None, status="failed", error="lone surrogate \ud800, line separator \u2028")],
        [base("noise", [5.0])],
        [{"case": None, "images": "x", "lpips": [1], "missing": [], "losses": "x", "knowledge": 3, "psnr_db": {"a": 1}}],
        [{"attack": "unheard-of", "status": "ok", "psnr_db": 12.5, "losses": [0, -1, None], "images": {"truth": None}}],
        [row("dlg", [20.0], losses=[1.0, None, 3.0], steps=0, defense_facts={"a": "b", "c": None}, round=None)],
    ],
)  # fmt: skip
def test_thin_and_broken_rows(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    check(
        page_of(run_folder(tmp_path / "run", rows, history=[{}, {"round": "x"}], incidents=[{}, {"problems": "one"}]))
    )
    markdown_table(rows)


def test_an_empty_folder_and_none(tmp_path: Path) -> None:
    page = page_of(tmp_path)
    check(page)
    assert "The run has no results yet." in page
    with pytest.raises(FedattackError, match="a folder that exists"):
        build_report(tmp_path / "nothing")


def test_unreadable_lines_are_counted(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(json.dumps(ROWS[3]).encode() + b'\n{"cut": \n[1]\n\xff\xfe\n')
    counts: dict[str, int] = {}
    assert len(read_lines(tmp_path / "rows.jsonl", counts)) == 1
    assert counts == {"rows.jsonl": 3}
    (tmp_path / "about.json").write_text("[]")
    assert "3 in rows.jsonl, 1 in about.json" in page_of(tmp_path)


def test_thousands_of_rows_are_capped_and_counted(tmp_path: Path) -> None:
    png(tmp_path / "images/t.png", 4)
    pictures = {"truth": ["images/t.png"] * 10, "reconstruction": ["images/t.png"] * 10}
    rows = [
        row("dlg", [20.0] * 10, client=f"client-{i}", images=pictures, losses=[2.0, 1.0], error=f"e{i}")
        for i in range(2000)
    ]
    rows += [row("gidm", None, client=f"client-{i}", status="failed", error=f"e{i}") for i in range(1000)]
    run = run_folder(tmp_path, rows)
    page = page_of(run)
    assert len(check(page).images) == 3 * 2 * 8
    words = words_of(page)
    assert "1,997 more updates not shown" in words
    assert "2 more images of this update not shown" in words
    assert "800 more kinds of failure not shown" in words
    assert "4 of 2,000 jobs" in words
    assert len(page) < 1_000_000
    (group,) = gallery(rows, run, targets=1, images=2)
    assert (len(group.targets), group.hidden, group.targets[0].rows, group.targets[0].hidden) == (1, 1999, 2, 8)


# ------------------------------------------------------------------------------------------------ charts
@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("values", [[1.0, 1.0], [1e-30, 1e30], [3.0], [0.0, -1.0, 5.0], [1.0, 1.1], [math.nan, 2.0]])
def test_charts_stay_inside_their_box(values: list[float], log: bool) -> None:
    svg = line_chart([Series("<b>", tuple(enumerate(values)), 9)], title='"t"', x_label="x", y_label="y", log=log)
    assert "<b>" not in svg
    for x, y in re.findall(r"(-?[\d.]+|nan|inf),(-?[\d.]+|nan|inf)", " ".join(re.findall(r'points="([^"]*)"', svg))):
        assert 0 <= float(x) <= 440
        assert 0 <= float(y) <= 250


def test_a_logarithmic_axis_of_x_and_styles() -> None:
    """σ = 1e-4, 1e-3, 1e-2 are evenly spaced; dots have no line, a plain line has no dots; σ = 0 has no place."""
    values = ((0.0, 1.0), (1e-4, 1.0), (1e-3, 2.0), (1e-2, 3.0))
    made = {
        style: line_chart([Series("s", values, 1, style)], title="t", x_label="x", y_label="y", log_x=True)
        for style in ("dots", "plain", "dashed")
    }
    xs = [float(x) for x in re.findall(r'cx="([\d.]+)"', made["dots"])]
    assert len(xs) == 3
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.2)
    assert "<polyline" not in made["dots"]
    assert "<circle" not in made["plain"] + made["dashed"]
    assert 'class="s1 dashed"' in made["dashed"]
    assert ">1e−3<" in made["dots"]


# ------------------------------------------------------------------------------------------------ bounds, ways, controls
def bounded(case: str, psnr: float, scale: float, rv: float, *, sigma: float = 0.1, **fields: Any) -> dict[str, Any]:
    """A row of one attack under noise σ; `scale` is the floor's error per σ, the update's rms is 2."""
    floor = {
        "rms_per_sigma": scale,
        "hidden": 0,
        "noise_std": sigma,
        "update_rms": 2.0,
        "rv": rv,
        "relative_rv": rv / 2,
    }
    return row("dlg", [psnr], case=case, **{"defense": f"gaussian-noise(sigma={sigma})", "floor": floor} | fields)


def test_bounds_against_sigma() -> None:
    """In closed form: (b) is −20·log10(σ·scale), (a) −20·log10(σ/RV), means in dB over two updates; dots at their σ."""
    rows = [
        bounded("MLP", 13.0, 2.0, 10.0, client="client-0"),
        bounded("MLP", 15.0, 0.5, 40.0, client="client-1"),
        bounded("MLP", 20.0, 2.0, 10.0, sigma=0.01, client="client-0", federation="other"),
        bounded("MLP", 30.0, 0.5, 40.0, sigma=0.01, client="client-1", federation="other"),
    ]
    optimal, fitted, dots = bound_series(rows)
    for sigma, psnr in optimal.points:
        assert psnr == pytest.approx(-20 * math.log10(sigma))
    for sigma, psnr in fitted.points:
        assert psnr == pytest.approx(-20 * math.log10(sigma / 20.0))
    assert [sigma for sigma, _ in optimal.points] == pytest.approx([0.01 / 3, 0.3])
    assert [(pytest.approx(sigma), psnr) for sigma, psnr in dots.points] == [(0.01, 25.0), (0.1, 14.0)]
    rows[0]["floor"] = {**rows[0]["floor"], "hidden": 3}
    assert bound_series(rows)[0].points[0][1] == pytest.approx(-20 * math.log10(0.01 / 3 * 2 ** (-1 / 3)))
    assert bound_series([bounded("MLP", 13.0, 2.0, 10.0, sigma=0.0)]) == []
    assert bound_series(rows)[1].points[0][1] == pytest.approx(-20 * math.log10(0.01 / 3 / (10 * 40 * 40) ** (1 / 3)))


def test_bounds_are_those_of_one_clipping(tmp_path: Path) -> None:
    """Clipping scales what is sent: a chart of its own, with floors and dots of no other; noise before it is not modelled."""
    clip, noise = "norm-clipping(max_norm=0.5)", "gaussian-noise(sigma=0.1)"
    rows = [
        bounded("MLP", 30.0, 2.0, 10.0, sigma=0.0, defense="none"),
        bounded("MLP", 13.0, 2.0, 10.0, federation="noisy"),
        bounded("MLP", 3.0, 20.0, 1.0, federation="clipped", defense=f"{clip} + {noise}"),
        bounded("MLP", 4.0, 9.0, 9.0, federation="other", defense=f"norm-clipping(max_norm=0.1) + {noise}"),
        bounded("MLP", 5.0, 7.0, 7.0, federation="before", defense=f"{noise} + {clip}"),
    ]
    rows[4]["floor"]["noise_std"] = None
    found = by_clipping(rows)
    assert list(found) == ["none", clip, "norm-clipping(max_norm=0.1)"]
    for members, scale, rv, psnr in zip(
        found.values(), (2.0, 20.0, 9.0), (10.0, 1.0, 9.0), (13.0, 3.0, 4.0), strict=True
    ):
        optimal, fitted, dots = bound_series(members)
        sigma = optimal.points[0][0]
        assert optimal.points[0][1] == pytest.approx(-20 * math.log10(sigma * scale))
        assert fitted.points[0][1] == pytest.approx(-20 * math.log10(sigma / rv))
        assert [value for _, value in dots.points] == [psnr]
    page = page_of(run_folder(tmp_path, rows))
    assert page.count('aria-label="Bounds of MLP') == 3
    assert "norm-clipping max_norm=0.5" in page


def test_floors_known_from_one_side_are_bounds_of_bounds(tmp_path: Path) -> None:
    """No rank, no part in the correlation, said in the notes; a floor whose hidden directions were not counted is said too."""
    rows = [bounded(f"model {i}", 30.0 - i, 10.0**i, 10.0**i, round=1) for i in range(5)]
    rows[1]["floor"] |= {"status": "at least", "hidden": None}
    rows[3]["floor"] |= {"status": "estimate", "hidden": None}
    found = ranking(rows)
    assert found is not None
    assert [line.case for line in found.lines] == ["model 0", "model 2", "model 3", "model 4", "model 1"]
    open_ = found.lines[-1].figures[2]
    assert (open_.value, open_.shown, open_.rank) == (None, "≤ 0", 0)
    assert [line.figures[2].rank for line in found.lines[:4]] == [1, 2, 3, 4]
    assert found.correlations[2] == "bound (b) ρ = 1.00 (p = 0.083) over 4 of them"
    assert "not counted for 2 updates" in found.note
    notes = {chart.title: chart.note for chart in bound_charts(rows)}
    assert "1 floor known from one side only" in notes["model 1, round 1"]
    assert "not counted for 1" in notes["model 1, round 1"]
    assert "one side" not in notes["model 3, round 1"]
    assert "not counted for 1" in notes["model 3, round 1"]
    assert "not counted" not in notes["model 0, round 1"]
    assert "≤ 0" in words_of(page_of(run_folder(tmp_path, rows)))


def test_a_rank_is_over_the_defenses_that_are_said() -> None:
    """Without shared noise these are the updates without a defense, for RV, (b) and what was measured alike."""
    rows = [
        bounded("a", 30.0, 1.0, 5.0, sigma=0.0, defense="none", client="client-0"),
        bounded("a", 28.0, 10.0, 7.0, sigma=0.0, defense="none", client="client-1"),
        bounded("a", 9.0, 1e-6, 900.0, federation="noisy"),
        bounded("b", 20.0, 2.0, 20.0, sigma=0.0, defense="none"),
    ]
    found = ranking(rows)
    assert found is not None
    first, second = found.lines
    assert (first.case, first.updates, second.updates) == ("b", 1, 2)
    expected = [7.0, 3.5, 20 * math.log10(50.0) - 10.0, 29.0]  # σ a hundredth of rms 2
    assert [figure.value for figure in second.figures] == pytest.approx(expected)
    assert "RV is the largest of the updates" in found.note


def test_a_state_whose_floor_took_too_long_is_ranked_by_the_rest() -> None:
    """What noise a defense adds is known from other states: this one lacks its bound, not its RV nor what was measured."""
    rows = [bounded("a", 30.0, 1.0, 5.0), bounded("b", 20.0, 2.0, 20.0)]
    slow = rows[1]["floor"]
    rows[1] |= {"floor": {name: slow[name] for name in slow if name in ("rv", "relative_rv", "update_rms")}}
    found = ranking(rows)
    assert found is not None
    assert [line.updates for line in found.lines] == [1, 1]
    bound = [line.figures[2] for line in found.lines]
    assert (bound[0].rank, bound[1].value) == (1, None)
    assert sorted(line.figures[3].value for line in found.lines) == [20.0, 30.0]


def test_states_are_ranked_before_and_after_the_attack(tmp_path: Path) -> None:
    """(b) has the order of what was measured, RV the opposite one; a state with a hidden direction comes last."""
    rows = [bounded(f"model {i}", 30.0 - i, 10.0**i, 10.0**i, round=1) for i in range(3)]
    last = bounded("model 3", 5.0, 1e-3, 1e9, round=4)
    rows += [last | {"floor": {**last["floor"], "hidden": 2}}, base("mean-image", [50.0], case="model 0")]
    found = ranking(rows)
    assert found is not None
    assert [line.case for line in found.lines] == [f"model {i}" for i in range(4)]
    assert [line.about for line in found.lines] == ["untrained"] * 3 + ["after 3 rounds"]
    figures = [[figure.value for figure in line.figures] for line in found.lines]
    assert figures[1] == [10.0, 5.0, pytest.approx(0.0), 29.0]
    assert found.lines[3].figures[2].shown == "−∞"
    assert [figure.rank for figure in found.lines[3].figures] == [1, 1, 4, 4]
    assert found.correlations == (
        "RV ρ = −1.00 (p = 0.083)",  # 2 of 24 orders
        "RV of an update of rms 1 ρ = −1.00 (p = 0.083)",
        "bound (b) ρ = 1.00 (p = 0.083)",
    )
    assert ranking(rows[:3]).correlations == ()  # type: ignore[union-attr]
    assert ranking(rows[:1]) is None
    words = words_of(page_of(run_folder(tmp_path, rows)))
    assert "bound (b) ρ = 1.00 (p = 0.083)" in words
    assert page_of(run_folder(tmp_path, rows)).count('aria-label="Bounds of model') == 4


def test_states_are_ranked_before_any_attack() -> None:
    """At a σ that was asked for: of updates without a defense, else of those under noise alone, never of clipped ones."""
    clip = "norm-clipping(max_norm=0.5) + gaussian-noise(sigma=0.1)"
    rows = [
        bounded("a", 0.0, 10.0, 5.0, sigma=0.0, defense="none", client="client-0", round=1),
        bounded("a", 0.0, 1.0, 8.0, sigma=0.0, defense="none", client="client-1", round=1),
        bounded("a", 0.0, 1e-6, 900.0, federation="noisy", round=1),
        bounded("a", 0.0, 0.1, 1.0, sigma=0.0, defense="none", round=3),
        bounded("b", 0.0, 1e-3, 20.0),
        bounded("c", 0.0, 1.0, 1.0, defense=clip),
        bounded("d", 0.0, 1e-6, 2.0, sigma=0.0, defense="none"),
    ]
    rows[-1]["floor"] |= {"status": "at least"}
    for line in rows:
        del line["attack"], line["kind"], line["psnr_db"]
    found = predicted(rows, 0.01)
    assert found is not None
    assert [(line.case, line.about, line.updates) for line in found.lines] == [
        ("b", "untrained", 1),
        ("a", "after 2 rounds", 1),
        ("a", "untrained", 2),
        ("d", "untrained", 1),
    ]
    b, later, first, open_ = found.lines
    louder = 20 * math.log10(2.0)  # 1 % of rms 2 beside σ = 0.01
    assert [figure.value for figure in b.figures] == pytest.approx(
        [20.0, 10.0, 20 * math.log10(2000), 100.0 - louder, 100.0]
    )
    assert [figure.value for figure in first.figures] == pytest.approx(
        [8.0, 4.0, 20 * math.log10(800), 30.0 - louder, 30.0]
    )
    assert [figure.rank for figure in later.figures] == [4, 4, 4, 2, 2]
    assert [figure.rank for figure in open_.figures] == [3, 3, 3, 0, 0]
    assert open_.figures[-1].shown == "≤ 160"
    assert "Left out: 1 state" in found.note
    assert "5 updates without a defense" in found.note
    assert predicted(rows[:3], 0.01) is None


def test_quality_that_rises_and_falls_is_shown(tmp_path: Path) -> None:
    """The mean over images and jobs; the end is what the attack reached, the best step what it could not know."""
    png(tmp_path / "images/a.png", 0)
    way = {"steps": [0, 5, 10], "image": 1, "images": ["images/a.png"] * 3}
    jobs = [
        row("gg-cdm", [9.0, 9.0], losses=[3.0, 2.0, 1.0], steps=10, trajectory=way | {"psnr_db": psnr}, client=client)
        for client, psnr in (
            ("a", [[5.0, 7.0], [20.0, 22.0], [9.0, 9.0]]),
            ("b", [[6.0, 6.0], [10.0, 8.0], [9.0, 9.0]]),
        )
    ]
    ((case, (found,)),) = ways(jobs)
    assert (case, found.title, len(found.charts)) == ("dlg on LeNet", "gg-cdm", 2)
    (peak,) = found.lines
    assert (peak.jobs, peak.step, peak.steps, peak.best, peak.end) == (2, 5, 10, 15.0, 9.0)
    page = page_of(run_folder(tmp_path, jobs))
    check(page)
    assert "5 of 10 15.0 9.0 6.0" in words_of(page)
    assert page.count("image 2 on its way, by step") == 2
    assert "5: 20.0 dB" in page
    broken = [{"steps": [1], "psnr_db": 3}, {"steps": ["x"], "psnr_db": [None]}, {"steps": [0], "psnr_db": [[None]]}, 7]
    assert ways([jobs[0] | {"trajectory": way} for way in broken]) == []
    check(page_of(run_folder(tmp_path, [jobs[0] | {"trajectory": way} for way in broken])))


def test_every_metric_of_the_way_has_its_panel(tmp_path: Path) -> None:
    """Beside PSNR and the own distance: SSIM and LPIPS where rows have them, each saying of how many jobs and steps."""
    way = {"steps": [0, 5, 10], "psnr_db": [[5.0], [8.0], [9.0]]}
    whole = way | {"ssim": [[0.1, 0.3], [0.4, 0.4], [0.5, 0.5]], "lpips": {"<squeeze>": [[0.9], [0.5], [0.25]]}}
    jobs = [
        row("gg-cdm", [9.0], losses=[3.0, 2.0, 1.0], steps=10, trajectory=found, client=client)
        for client, found in (("a", whole), ("b", way | {"ssim": [[0.2]], "lpips": 3}))
    ]
    ((_, (found,)),) = ways(jobs)
    assert [(chart.title, chart.note) for chart in found.charts] == [
        ("PSNR, dB", "mean of 2 jobs, taken at 3 of the steps up to 10"),
        ("SSIM", "mean of 1 job, taken at 3 of the steps up to 10"),
        ("LPIPS (<squeeze>)", "mean of 1 job, taken at 3 of the steps up to 10"),
        ("Own distance", "mean of 2 jobs"),
    ]
    ssim, lpips = found.charts[1].svg, found.charts[2].svg
    for svg, values in ((ssim, (0.2, 0.4, 0.5)), (lpips, (0.9, 0.5, 0.25))):
        assert [f"no defense: {value:.4g}" in svg for value in values] == [True] * 3
    page = page_of(run_folder(tmp_path, jobs))
    check(page)
    assert "<squeeze>" not in page
    words = words_of(page)
    assert "mean of 1 job, taken at 3 of the steps up to 10" in words
    assert [chart.title for chart in ways(jobs[1:])[0][1][0].charts] == ["PSNR, dB", "Own distance"]


def test_controls_are_told_from_what_they_control(tmp_path: Path) -> None:
    """A yardstick is not called like the attack; one that does not apply is a note, where it was asked for a failure."""
    spec = "gg-cdm(guidance='dps')"
    given = {"attack_spec": spec, "control_of": [spec]}
    peer = {"control": "peer", "control_of": [spec]}
    idle = {"status": "not-applicable", "error": "no dense layer"}
    rows = [
        row("gg-cdm", [20.0], attack_spec=spec, controls_left_out={"unrelated-update": "one client"}),
        row("gg-cdm, unrelated-update", [11.0], kind="baseline", control="unrelated-update", **given),
        row("inverting-gradients", [15.0], **peer),
        row("linear-leak", None, **peer | idle),
    ]
    names = {cell.attack: (cell.baseline_kind, cell.control_of) for cell in summarise(rows)}
    assert names == {
        spec: (False, ()),
        "inverting-gradients": (False, (spec,)),
        f"{spec}, unrelated-update": (True, (spec,)),
    }
    words = words_of(page_of(run_folder(tmp_path, rows)))
    assert "Every attack gave a result." in words
    assert "unrelated-update one client" in words
    assert "linear-leak no dense layer" in words
    assert "inverting-gradients control of gg-cdm" in words
    assert "linear-leak" not in markdown_table(rows)
    asked = words_of(page_of(run_folder(tmp_path, [*rows[:3], row("linear-leak", None, **idle)])))
    assert "Every attack gave a result." not in asked


def test_a_chart_without_points_is_nothing() -> None:
    assert line_chart([Series("a", ((0.0, -1.0),), 0)], title="t", x_label="x", y_label="y", log=True) == ""


def test_montage_shows_saved_pixels_unchanged(tmp_path):
    from PIL import Image

    from fedattack.errors import FedattackError
    from fedattack.report.montage import LABEL_WIDTH, TITLE_HEIGHT, write_montage

    (tmp_path / "images").mkdir()
    for name, value in (("truth", 90), ("found", 91)):
        Image.new("RGB", (7, 5), (value, value, value)).save(tmp_path / "images" / f"{name}.png")
    pictures = {"truth": ["images/truth.png"], "reconstruction": ["images/found.png"]}
    row = {"kind": "attack", "case": "c", "attack": "dlg", "defense": "none", "psnr_db": [12.5], "images": pictures}
    path = write_montage(tmp_path, [row], tmp_path / "out" / "m.png", columns=2, side=20)
    with Image.open(path) as sheet:
        assert sheet.getpixel((LABEL_WIDTH + 1, TITLE_HEIGHT + 1)) == (90, 90, 90)
        assert sheet.getpixel((LABEL_WIDTH + 1, TITLE_HEIGHT + 15 + 4 + 1)) == (91, 91, 91)
    with pytest.raises(FedattackError, match="no scored attack"):
        write_montage(tmp_path, [], tmp_path / "m.png")


def test_one_picture_for_a_batch_is_shown_once(tmp_path):
    """Beside all truths; the pictures of the next update stay below their own truths."""
    from PIL import Image

    from fedattack.report.montage import GAP, LABEL_WIDTH, TITLE_HEIGHT, write_montage

    (tmp_path / "images").mkdir()
    for name, value in (("a", 10), ("b", 20), ("c", 30), ("found", 91), ("next", 92)):
        Image.new("RGB", (20, 20), (value, value, value)).save(tmp_path / "images" / f"{name}.png")
    paths = {name: f"images/{name}.png" for name in ("a", "b", "c", "found", "next")}
    one = {"nearest": 1, "nearest_psnr_db": 17.0, "batch_mean_psnr_db": 21.5}
    told = {"represents": "user", "representative": one}
    first = {"truth": [paths["a"], paths["b"]], "reconstruction": [paths["found"]]}
    second = {"truth": [paths["c"]], "reconstruction": [paths["next"]]}
    rows = [
        row("user-level", [10.0, 17.0], images=first, **told),
        row("user-level", [9.0], images=second, client="client-1", **told),
        base("batch-mean", [18.0, 18.0], images={**first, "reconstruction": [paths["a"], paths["b"]]}),
        base("mean-image", [11.0, 11.0]),
    ]
    strips = gallery(rows, tmp_path)[0].targets[0].strips
    assert [len(strip.frames) for strip in strips if strip.label in ("user-level", "batch-mean")] == [1, 2]
    frame = next(strip for strip in strips if strip.label == "user-level").frames[0]
    assert frame.caption == "for all: 13.5 dB"
    assert frame.alt.endswith("mean PSNR 13.5 dB, to their mean 21.5 dB, nearest 17.0 dB (chosen by the truth)")
    assert next(strip for strip in strips if strip.label == "user-level").note == "PSNR to their mean 21.5 dB"
    assert "bound" not in next(strip for strip in strips if strip.label == "batch-mean").note
    assert next(cell for cell in summarise(rows) if cell.attack == "user-level").baseline == "mean-image"
    path = write_montage(tmp_path, rows, tmp_path / "m.png", columns=3, side=20)
    with Image.open(path) as sheet:
        line = TITLE_HEIGHT + 20 + GAP + 1
        shown = [sheet.getpixel((LABEL_WIDTH + 1 + number * (20 + GAP), line))[0] for number in range(3)]
    assert shown == [91, 255, 92]

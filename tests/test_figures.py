"""Tables and figures from rows: grouping, spread, baselines, whitespace where nothing was measured; [[figure]] in recipes."""

import json
from pathlib import Path
from statistics import stdev

import pytest
import torch
from typer.testing import CliRunner

from experiments.campaign import describe, run_campaign
from experiments.figures import main
from fedattack.cli import app
from fedattack.config import FigureSettings, load_config, parse_config, to_toml
from fedattack.errors import ConfigError, FedattackError
from fedattack.report import build_report
from fedattack.report.figures import (
    baseline_means,
    draw_figures,
    figure,
    grouped,
    load,
    look_up,
    numbers,
    pictures,
    spread,
    table,
)
from fedattack.store import RunFolder, read_rows, save_png

ROOT = Path(__file__).resolve().parents[1]
GIDM = sorted((ROOT / "experiments/recipes").glob("gidm-*.toml"))


def row(attack: str, psnr: list[float | None], oracles: list[str], client: int = 0, **more) -> dict:
    made = {
        "kind": "attack",
        "status": "ok",
        "attack": attack.split("(")[0],
        "attack_spec": attack,
        "client": str(client),
        "oracles": oracles,
        "psnr_db": psnr,
        "lpips": {"squeeze": [0.5]},
        "diagnostics": {"loss": 0.25},
        "job": f"{attack}-{client}-{oracles}",
    }
    return made | more


@pytest.fixture
def run(tmp_path):
    """A run folder with four attack rows, one that failed, and a baseline that stands beside two cells."""
    rows = [
        row("gidm(steps_of=20)", [10.0, 20.0], []),
        row("gidm(steps_of=5)", [30.0, None], []),
        row("dlg-dm(steps_of=20)", [12.5], ["noise", "timesteps"], 1),
        row("dlg-dm(steps_of=5)", [], ["noise", "timesteps"], 1, status="failed"),
        {"kind": "baseline", "status": "ok", "attack": "mean-image", "job": "b0", "psnr_db": [8.0, 9.0]},
        {"kind": "baseline", "status": "ok", "attack": "mean-image", "job": "b0", "psnr_db": [8.0, 9.0]},
    ]
    folder = tmp_path / "run"
    folder.mkdir()
    for number, made in enumerate(rows):
        names = {}
        for kind in ("truth", "reconstruction"):
            names[kind] = [f"{kind}-{number}.png"]
            save_png(folder / names[kind][0], torch.full((3, 4, 4), number / 10))
        made["images"] = names
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def test_fields_of_rows_options_of_attacks_and_dotted_paths(run):
    rows = load([run])
    assert [look_up(r, "steps_of") for r in rows[:4]] == [20, 5, 20, 5]
    assert look_up(rows[0], "oracles") == "none"
    assert look_up(rows[2], "oracles") == "noise + timesteps"
    assert look_up(rows[0], "diagnostics.loss") == 0.25
    assert look_up(rows[0], "no.such") is None
    assert rows[0]["run"] == "run"
    assert numbers(rows[1], "psnr_db") == [30.0]
    assert numbers(rows[0], "lpips.squeeze") == [0.5]
    assert numbers(rows[0], "attack") == []
    assert list(grouped(rows, ["attack", "steps_of"])) == [
        ("gidm", 5),
        ("gidm", 20),
        ("dlg-dm", 5),
        ("dlg-dm", 20),
    ]


def test_the_table_pools_images_and_counts_what_failed(run):
    rows = load([run])
    lines = table(rows, "steps_of", ["psnr_db", "diagnostics.loss"], ["attack"]).splitlines()
    assert lines[0] == "| attack | steps_of | images | psnr_db | diagnostics.loss | not ok |"
    assert "| gidm | 20 | 2 | 15.0 ± 7.1 (10.0 to 20.0) | 0.250 ± 0.000 (0.250 to 0.250) | 0 |" in lines
    assert "| dlg-dm | 5 | 0 | – | – | 1 |" in lines
    assert lines[-1] == "| baseline | mean-image |  | 8.5 | – |  |"
    assert baseline_means(rows, "psnr_db") == {"mean-image": 8.5}


def test_spread_is_the_sample_standard_deviation():
    values = [1.0, 2.0, 4.0]
    assert spread(values).startswith(f"{sum(values) / 3:.3f} ± {stdev(values):.3f}")
    assert spread([]) == "–"
    assert spread([1e-6, 3e-6]) == "2.0e-06 ± 1.4e-06 (1.0e-06 to 3.0e-06)"
    assert spread([5.0]) == "5.000 ± 0.000 (5.000 to 5.000)"


def test_files_are_written_for_names_and_numbers(run, capsys):
    from PIL import Image

    main([str(run), "--x", "attack", "--y", "psnr_db", "diagnostics.loss", "--by", "oracles", "--pictures"])
    main([str(run), "--x", "steps_of", "--by", "attack", "--name", "over-steps"])
    figures = run / "figures/more"
    name = "psnr_db-over-attack-oracles"
    assert (figures / f"{name}.md").read_text().strip() in capsys.readouterr().out
    for file in (f"{name}.png", f"{name}-pictures.png", "over-steps.png"):
        with Image.open(figures / file) as picture:
            assert picture.width > 300
            assert len(set(picture.convert("L").tobytes())) > 2  # something is drawn


def test_an_attack_that_failed_before_it_had_steps_leaves_the_axis_of_steps_alone(tmp_path, monkeypatch):
    rows = [row("gidm", [10.0], [], steps=25), row("gidm", [20.0], [], steps=50), row("gidm", [], [], status="failed")]
    monkeypatch.setattr("matplotlib.axes.Axes.bar", lambda *_, **__: pytest.fail("bars over numbers"))
    figure(rows, "steps", ["psnr_db"], ["attack"], tmp_path / "over-steps.png")
    assert (tmp_path / "over-steps.png").exists()


def test_one_legend_names_what_any_panel_draws_and_hides_nothing(tmp_path, monkeypatch):
    rows = [
        {"kind": "attack", "status": "ok", "attack": attack, "case": case, "psnr_db": value, "mse": [0.1]}
        for attack, value in (("one", [9.0, 11.0]), ("two", [20.0]))
        for case in ("a", "b")
    ]
    rows += [{"kind": "baseline", "status": "ok", "job": "0", "attack": "noise", "psnr_db": [8.0]}]
    rows += [{"kind": "baseline", "status": "ok", "job": "0", "attack": "mean-image", "psnr_db": [12.0], "mse": [0.2]}]
    pages = []
    monkeypatch.setattr("fedattack.report.figures._save", lambda page, path: pages.append(page))
    figure(rows, "attack", ["mse", "psnr_db"], ["case"], tmp_path / "legend.png")
    (page,) = pages
    assert all(axes.get_legend() is None for axes in page.axes)
    (legend,) = page.legends
    assert {text.get_text() for text in legend.get_texts()} == {"a", "b", "baseline noise", "baseline mean-image"}
    styles = {}
    for axes in page.axes:
        for line in axes.get_lines():
            if line.get_label().startswith("baseline"):
                styles.setdefault(line.get_label(), set()).add(line.get_linestyle())
    assert {name: len(seen) for name, seen in styles.items()} == {"baseline noise": 1, "baseline mean-image": 1}
    assert styles["baseline noise"] != styles["baseline mean-image"]


def test_what_is_not_there_is_named(run, tmp_path):
    with pytest.raises(FedattackError, match="a field of the rows must be one of"):
        main([str(run), "--x", "atack"])
    with pytest.raises(FedattackError, match="no row has a number for 'ssim'"):
        main([str(run), "--x", "attack", "--y", "ssim"])
    with pytest.raises(FedattackError, match="RUN must be a run folder"):
        main([str(tmp_path), "--x", "attack"])


def test_pictures_that_cannot_be_had_hide_no_other_reason(run, capsys):
    main([str(run), "--x", "attack", "--y", "psnr_db", "ssim", "--pictures", "--client", "7"])
    said = capsys.readouterr().out
    assert "no row has a number for 'ssim'" in said
    assert "client of the pictures must be one of 0, 1, got '7'" in said
    assert [path.name for path in (run / "figures/more").glob("*.png")] == ["psnr_db-over-attack.png"]


def test_an_attack_without_a_picture_takes_nobody_elses_away(run):
    """timestep-leak makes none, and who returns too few images leaves a gap."""
    rows = load([run])
    gone = {**rows[0], "attack": "timestep-leak", "images": {**rows[0]["images"], "reconstruction": [None]}}
    few = {
        **rows[0],
        "attack": "few",
        "images": {**rows[0]["images"], "reconstruction": [None, "reconstruction-1.png"]},
    }
    pictures([gone, few, *rows], "attack", [], run / "strip.png")
    assert (run / "strip.png").exists()


# ------------------------------------------------------------------------------------------------ what a recipe asks for
def test_a_figure_that_cannot_be_drawn_costs_the_others_nothing(run, monkeypatch):
    asked = [
        FigureSettings(x="attack", y=("psnr_db", "sim"), by=("oracles",), pictures=True, title="Both <i>"),
        FigureSettings(x="atack", name="typo"),
        FigureSettings(x="attack", y=("lpips.vgg",), name="no-weights"),
        FigureSettings(x="steps_of", name="over-steps"),
    ]
    rows = [json.loads(line) for line in (run / "rows.jsonl").read_text().splitlines()]
    rows[0]["ssim"], rows[0]["missing"] = [0.5, 0.5], {"lpips-vgg": "weights are not on this machine"}
    (run / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (run / "figures").mkdir()
    (run / "figures/typo.png").write_bytes(b"of an earlier run")
    both, typo, weights, steps = draw_figures(RunFolder(run), asked)
    name = "figures/psnr_db-over-attack-oracles"
    assert both["files"] == [f"{name}.md", f"{name}.png", f"{name}-pictures.png"]
    assert both["problems"] == ["no row has a number for 'sim' (did you mean 'ssim'?)"]
    assert (run / f"{name}.md").read_text().startswith("# Both <i>\n\n| oracles | attack | images | psnr_db | sim |")
    assert typo["files"] == []
    assert "a field of the rows must be one of" in typo["problems"][0]
    assert "(did you mean 'attack'?)" in typo["problems"][0]
    assert not (run / "figures/typo.png").exists(), "nothing old stands for what was not drawn"
    assert weights["problems"] == ["no row has a number for 'lpips.vgg': weights are not on this machine"]
    assert steps == {
        "title": "psnr_db over steps_of",
        "files": ["figures/over-steps.md", "figures/over-steps.png"],
        "problems": [],
    }
    assert list(read_rows(run / "figures.jsonl")) == [both, typo, weights, steps]
    page = build_report(run).read_text()
    assert "Both &lt;i&gt;" in page
    assert page.count('alt="Both &lt;i&gt;"') == 2
    assert "Not drawn in full: no row has a number for &#39;lpips.vgg&#39;" in page

    monkeypatch.setattr("matplotlib.axes.Axes.errorbar", lambda *_, **__: 1 / 0)
    (broken,) = draw_figures(RunFolder(run), asked[3:])
    assert broken["problems"] == ["ZeroDivisionError: division by zero"]
    assert broken["files"] == ["figures/over-steps.md"], "the table is there all the same"
    draw_figures(RunFolder(run), [])
    assert list(read_rows(run / "figures.jsonl")) == []


def test_what_is_wrong_with_a_figure_is_said_before_anything_runs():
    wrong = [{"x": "attack", "titel": "t"}, {"y": ["ssim"]}, {"x": "attack", "name": "../up"}, {"x": "a", "y": []}]
    with pytest.raises(ConfigError) as caught:
        parse_config({"figure": wrong}, file="f.toml")
    lines = str(caught.value).splitlines()
    assert lines[0] == "f.toml: figure.0.titel: unknown key (did you mean 'title'?)"
    assert lines[1].startswith("f.toml: figure.1.x: Field required")
    assert lines[2].startswith("f.toml: figure.2.name: String should match pattern")
    assert lines[3].startswith("f.toml: figure.3.y: Tuple should have at least 1 item")
    with pytest.raises(ConfigError, match=r"figure\.1\.name: must differ from those of the figures before it"):
        parse_config({"figure": [{"x": "attack"}, {"x": "attack", "pictures": True}]})


def test_a_run_draws_its_figures_and_draws_them_again(tmp_path, capsys):
    raw = {
        "data": {"options": {"image_size": 8}},
        "federation": {"clients": 2, "rounds": 1, "defense": ["none", "gaussian-noise(sigma=0.02)"]},
        "score": {"lpips": [], "floor": "off"},
        "model": {"name": "mlp", "options": {"hidden": [8]}},
        "attack": ["linear-leak"],
        "figure": [{"x": "defense", "y": ["psnr_db", "ssim"], "pictures": True, "name": "noise"}, {"x": "defence"}],
    }
    experiment = parse_config(raw)
    assert describe(experiment)[-2] == "figure noise: psnr_db, ssim over defense"
    summary = run_campaign(experiment, tmp_path / "run")
    assert summary.statuses == {"ok": 4}
    drawn = list(read_rows(summary.run.drawn))
    assert drawn[0]["files"] == ["figures/noise.md", "figures/noise.png", "figures/noise-pictures.png"]
    assert drawn[1]["files"] == []
    assert "did you mean 'defense'" in drawn[1]["problems"][0]
    assert "figures/noise.png" in summary.report.read_text()
    (summary.run.figures / "noise.png").unlink()

    (tmp_path / "again.toml").write_text(to_toml(experiment))
    assert load_config(tmp_path / "again.toml") == experiment
    done = CliRunner().invoke(app, ["run", str(tmp_path / "again.toml"), "--out", str(tmp_path / "run")])
    assert done.exit_code == 0, done.output
    assert f"figure: {summary.run.figures / 'noise.png'}" in done.output.replace("\n", "")
    assert (summary.run.figures / "noise.png").exists()


@pytest.mark.parametrize("recipe", GIDM, ids=lambda path: path.stem)
def test_recipes_of_gidm_say_what_they_draw(recipe):
    experiment = load_config(recipe, ["data.dataset=patches"])
    options = {key for cell in experiment.cells for attack in cell.attack for key in attack.parameters}
    fields = {"attack", "case", "steps", *options}
    assert experiment.figure
    for asked in experiment.figure:
        assert {asked.x, *asked.by} <= fields
        assert asked.pictures

"""Tables and figures from rows: grouping, spread, baselines, whitespace where nothing was measured."""

import json
from statistics import stdev

import pytest
import torch

from experiments.figures import baseline_means, figure, grouped, load, look_up, main, numbers, spread, table
from fedattack.errors import FedattackError
from fedattack.store import save_png


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
    figures = run / "figures"
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


def test_what_is_not_there_is_named(run, tmp_path):
    with pytest.raises(FedattackError, match="a field of the rows must be one of"):
        main([str(run), "--x", "atack"])
    with pytest.raises(FedattackError, match="no row has a number for 'ssim'"):
        main([str(run), "--x", "attack", "--y", "ssim"])
    with pytest.raises(FedattackError, match="RUN must be a run folder"):
        main([str(tmp_path), "--x", "attack"])
    with pytest.raises(FedattackError, match="client of the pictures must be one of 0, 1, got '7'"):
        main([str(run), "--x", "attack", "--pictures", "--client", "7"])

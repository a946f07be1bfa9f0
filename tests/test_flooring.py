"""The floors of a run: what stands between gradient and wire, what rows and report say, what is kept and what is not."""

import json
import math
import shutil

import pytest
import torch
from typer.testing import CliRunner

from experiments.campaign import run_campaign
from fedattack.cli import app
from fedattack.config import parse_config
from fedattack.errors import FedattackError, NotApplicable
from fedattack.flooring import Floors, Protection, target_of
from fedattack.models import build_model
from fedattack.planning import updates_of
from fedattack.report import markdown_table
from fedattack.report.summary import cell_floor, small_number, summarise
from fedattack.scoring import score_run
from fedattack.store import RunFolder, read_rows

NOISY = "norm-clipping(max_norm=0.5) + gaussian-noise(sigma=0.01)"
SMALL = {
    "seed": 5,
    "data": {"options": {"image_size": 8}},
    "model": {"name": "mlp", "options": {"hidden": [16]}},
    "federation": {"clients": 2, "rounds": 1, "defense": ["none", "gaussian-noise(sigma=0.01)", NOISY]},
    "score": {"lpips": []},
    "pool": {"workers": 0},
    "attack": ["linear-leak"],
}
DDPM = {
    "task": {"name": "diffusion", "options": {"num_train_timesteps": 50}},
    "model": {
        "name": "unet",
        "options": {"block_out_channels": [4], "attention": [], "mid_attention": False, "norm_num_groups": 2},
    },
    "data": {"options": {"image_size": 4}},
}


def experiment(*overrides: str, **sections):
    return parse_config({**SMALL, **sections}, overrides=overrides)


def floors_in(rows) -> dict[tuple[str, str], dict]:
    return {(row["defense"], row["client"]): row["floor"] for row in rows if row["kind"] == "attack"}


@pytest.fixture(scope="module")
def campaign(tmp_path_factory):
    """(run folder, experiment) of two clients under three defenses."""
    wanted = experiment()
    return run_campaign(wanted, tmp_path_factory.mktemp("floors") / "run").run, wanted


# ------------------------------------------------------------------------------------------------ what is modelled
@pytest.mark.parametrize(
    ("defense", "mods", "expected"),
    [
        ("none", [], Protection()),
        ("gaussian-noise(sigma=0.3) + gaussian-noise(sigma=0.4)", [], Protection(noise_std=0.5)),
        ("gaussian-noise(sigma=0.3, relative=True)", [], Protection(relative_std=0.3)),
        (
            "norm-clipping(max_norm=2.0) + norm-clipping(max_norm=1.0) + gaussian-noise(sigma=0.1)",
            [],
            Protection(clip_norm=1.0, noise_std=0.1),
        ),
        (
            "gaussian-noise(sigma=0.1) + norm-clipping(max_norm=1.0)",
            [],
            Protection(noise_std=0.1, unmodelled=("norm-clipping",)),
        ),
        ("none", ["fixedclipping"], Protection(unmodelled=("fixedclipping",))),
    ],
)
def test_clipping_then_noise_is_modelled_and_the_rest_named(defense, mods, expected):
    federation = {"clients": 1, "defense": defense}
    if mods:
        federation |= {"mods": mods, "protocol": "fedavg", "strategy": "dp-client-fixed"}
        federation["strategy_options"] = {"noise_multiplier": 0.0, "clipping_norm": 1.0}
    settings = experiment(federation=federation).cells[0]
    found = Protection.of(settings)
    assert found.noise_std == pytest.approx(expected.noise_std)
    assert (found.clip_norm, found.relative_std, found.unmodelled) == (
        expected.clip_norm,
        expected.relative_std,
        expected.unmodelled,
    )


def test_relative_noise_is_a_share_of_the_update():
    assert Protection(relative_std=0.3).sigma(0.2) == pytest.approx(0.06)
    assert Protection(noise_std=0.3).sigma(0.2) == 0.3


# ------------------------------------------------------------------------------------------------ rows
def test_rows_carry_the_floor_at_the_noise_of_their_defense(campaign):
    run, _ = campaign
    floors = floors_in(read_rows(run.rows))
    assert len(floors) == 6
    for client in ("client-0", "client-1"):
        plain, noisy, clipped = (floors[d, client] for d in ("none", "gaussian-noise(sigma=0.01)", NOISY))
        assert plain["status"] == noisy["status"] == "exact"
        assert plain["rank"] == plain["unknowns"] == plain["pixels"] == 192
        assert plain["noise_std"] is None
        assert plain["rounding_psnr_db"] > 120
        assert noisy["rms_per_sigma"] == plain["rms_per_sigma"]
        assert noisy["floor_rms"] == pytest.approx(0.01 * noisy["rms_per_sigma"])
        assert noisy["floor_psnr_db"] == pytest.approx(-20 * math.log10(noisy["floor_rms"]))
        assert noisy["sigma_at_target_db"] == pytest.approx(0.1 / noisy["rms_per_sigma"])
        norm = clipped["update_rms"] * clipped["equations"] ** 0.5
        assert norm == pytest.approx(0.5)
        assert clipped["rms_per_sigma"] > plain["rms_per_sigma"]


def test_rows_carry_rv_and_it_is_that_of_the_gradient(campaign):
    """Beside the floor and at no cost: the same figure as `vulnerability` by itself, of a clipped update a smaller one."""
    run, wanted = campaign
    rows = {(row["defense"], row["client"]): row for row in read_rows(run.rows) if row["kind"] == "attack"}
    plain, noisy, clipped = wanted.cells
    for path in updates_of(run.federation(plain.federation_id)):
        exact = target_of(run, plain, path).vulnerability()
        client = path.stem.rpartition("-round-")[0]
        row = rows["none", client]
        assert row["rv"] == pytest.approx(exact.rv, rel=1e-9)
        assert row["relative_rv"] == pytest.approx(exact.relative, rel=1e-9)
        assert rows[noisy.federation.defense, client]["rv"] == row["rv"]
        assert rows[clipped.federation.defense, client]["rv"] < row["rv"]


def test_floors_and_rv_are_those_of_the_state_that_was_sent(tmp_path):
    """Two rounds on the same images: what training did to the weights is all that differs."""
    federation = {"clients": 1, "rounds": 2, "same_examples": True, "learning_rate": 5.0}
    wanted = experiment(federation=federation)
    rows = [row for row in run_rows(wanted, tmp_path) if row["kind"] == "attack"]
    first, second = sorted(rows, key=lambda row: row["round"])
    for figure in ("rms_per_sigma", "rv", "relative_rv"):
        assert first["floor"][figure] != pytest.approx(second["floor"][figure], rel=1e-3)


def test_where_a_floor_takes_too_long_rv_is_estimated(campaign, tmp_path):
    """Seconds for a few directions, not for a floor; without score.rv not even for these; too few for either: no figure."""
    run = RunFolder(shutil.copytree(campaign[0].path, tmp_path / "run"))

    def rows(*overrides):
        shutil.rmtree(run.floors, ignore_errors=True)
        found = score_run(run, experiment(*overrides))
        return [row for row in found if row["kind"] == "attack" and row["defense"] == "none"]

    exact = {
        row["client"]: row["rv"] for row in read_rows(campaign[0].rows) if row.get("rv") and row["defense"] == "none"
    }
    for row in rows("score.floor_seconds=6e-3"):
        assert row["floor"]["status"] == "not available"
        assert 0.0 < row["floor"]["rv_error"] < 0.5
        assert row["rv"] == pytest.approx(exact[row["client"]], rel=5 * row["floor"]["rv_error"])
        assert "skipped" in row["missing"]["floor"]
    assert not any("rv" in row for row in rows("score.floor_seconds=6e-3", "score.rv=false"))
    assert not any("rv" in row for row in rows("score.floor_seconds=1e-9"))
    assert not any("rv" in row for row in rows("score.rv=false"))
    for before in (["score.floor_seconds=6e-3", "score.rv=false"], ["score.floor_seconds=1e-9"]):
        rows(*before)
        assert any("rv" in row for row in score_run(run, experiment("score.floor_seconds=6e-3")))


def test_no_attack_beats_it_by_more_than_chance(campaign):
    """linear-leak is an unbiased attack without a prior; what it reaches under noise stays below the floor's PSNR."""
    run, _ = campaign
    for row in read_rows(run.rows):
        if row["kind"] == "attack" and row["floor"]["noise_std"]:
            assert row["psnr_db"][0] < row["floor"]["floor_psnr_db"] + 1.0


def test_equal_updates_share_a_floor_and_nothing_is_computed_twice(campaign, monkeypatch):
    run, wanted = campaign
    assert len(list(run.floors.glob("*.json"))) == 4  # two clients, clipped and not
    before = list(read_rows(run.rows))
    monkeypatch.setattr("fedattack.flooring.error_floor", lambda *_, **__: pytest.fail("computed again"))
    score_run(run, wanted)
    assert list(read_rows(run.rows)) == before


def test_a_better_floor_replaces_a_bound_and_never_the_other_way_round(campaign, tmp_path):
    run, wanted = campaign
    settings = wanted.cells[0]
    path = updates_of(run.federation(settings.federation_id))[0]
    kept = run.floors / f"{target_of(run, settings, path).key}.json"
    exact = kept.read_text()
    kept.unlink()

    def row(method: str, seconds: float):
        return Floors(run, wanted, method=method, seconds_each=seconds).row(settings, path)

    assert row("auto", 1e-9)["status"] == "not available"
    assert "skipped: 192 unknowns" in row("auto", 1e-9)["reason"]
    assert row("probes", 0.01)["status"] == "at least"
    assert row("sketch", 1.0)["status"] == "estimate"
    assert row("auto", 1e-9)["status"] == "estimate"
    assert row("exact", 1.0)["status"] == "exact"
    assert row("probes", 0.01)["status"] == "exact"
    assert json.loads(kept.read_text())["rms_per_sigma"] == json.loads(exact)["rms_per_sigma"]


def test_a_kept_floor_without_rv_gets_it_and_stays(campaign, tmp_path):
    """As good a floor is no reason to replace it, and RV that is computed later is written beside it."""
    run, wanted = RunFolder(shutil.copytree(campaign[0].path, tmp_path / "run")), campaign[1]
    settings = wanted.cells[0]
    path = updates_of(run.federation(settings.federation_id))[0]
    kept = run.floors / f"{target_of(run, settings, path).key}.json"
    exact = json.loads(kept.read_text())
    old = {name: value for name, value in exact.items() if not name.startswith("jacobian")} | {"condition": 123.0}
    kept.write_text(json.dumps(old))
    assert Floors(run, wanted).row(settings, path)["rv"] == pytest.approx(exact["jacobian_norm"])
    assert json.loads(kept.read_text()) == exact | {"condition": 123.0}


def test_no_time_limit_is_remembered_as_none(campaign, tmp_path, monkeypatch):
    run, wanted = campaign
    settings, tries = wanted.cells[0], []
    path = updates_of(run.federation(settings.federation_id))[0]
    elsewhere = RunFolder(tmp_path)
    monkeypatch.setattr(RunFolder, "floors", elsewhere.path)

    def never(*_):
        tries.append(1)
        raise NotApplicable("never")

    monkeypatch.setattr("fedattack.flooring.Target.compute", never)
    for _ in range(2):
        row = Floors(run, wanted, method="auto", seconds_each=math.inf).row(settings, path)
        assert row["reason"] == "never"
    assert len(tries) == 1


def test_off_means_off(campaign):
    run, wanted = campaign
    off = wanted.model_copy(update={"score": wanted.score.model_copy(update={"floor": "off"})})
    assert all("floor" not in row for row in score_run(run, off))
    score_run(run, wanted)


def test_without_a_witness_there_is_no_floor(campaign, tmp_path):
    run, wanted = campaign
    settings = wanted.cells[0]
    path = tmp_path / "client-9-round-1.safetensors"
    path.write_bytes(updates_of(run.federation(settings.federation_id))[0].read_bytes())
    assert "no truth was recorded" in Floors(run, wanted).row(settings, path)["reason"]
    with pytest.raises(NotApplicable, match="no truth"):
        target_of(run, settings, path)


@pytest.mark.parametrize("protocol", ["fedsgd", "fedavg"])
def test_a_ddpm_with_its_noise_hidden_and_given(tmp_path, protocol):
    federation = {"clients": 1, "rounds": 1, "protocol": protocol}
    cases = [{"title": "hidden"}, {"title": "given", "threat": {"reveal": ["noise"]}}]
    wanted = experiment(**DDPM, federation=federation, case=cases, attack=[{"name": "dlg-dm", "iterations": 1}])
    rows = [row for row in run_rows(wanted, tmp_path / "run") if row["kind"] == "attack"]
    hidden, given = (row["floor"] for row in rows)
    assert (hidden["unknowns"], given["unknowns"]) == (96, 48)
    assert hidden["rms_per_sigma"] > given["rms_per_sigma"] > 0


def test_a_mean_of_several_clients(tmp_path):
    """Under SecAgg+ the server sees the mean of two updates: the floor is that of the joint batch."""
    federation = {"clients": 2, "rounds": 1, "protocol": "fedavg", "mods": ["secaggplus"]}
    row = next(row for row in run_rows(experiment(federation=federation), tmp_path / "run") if row["kind"] == "attack")
    assert row["client"] == "aggregate"
    assert row["floor"]["unknowns"] == 2 * 192
    assert row["floor"]["rounding_psnr_db"] is None


def run_rows(wanted, folder):
    return list(read_rows(run_campaign(wanted, folder).run.rows))


# ------------------------------------------------------------------------------------------------ report
@pytest.mark.parametrize("defense", [NOISY, "gaussian-noise(sigma=0.1, relative=True)"])
def test_what_went_by_each_clients_own_update_has_no_floor_for_their_mean(defense, campaign, tmp_path):
    run, _ = campaign
    (settings,) = experiment(federation={"clients": 2, "rounds": 1, "defense": defense}).cells
    source, there = run.federation(experiment().cells[0].federation_id), RunFolder(tmp_path)
    folder = there.federation(settings.federation_id)
    shutil.copytree(source.path, folder.path)
    mean = updates_of(folder)[0].rename(folder.updates / "aggregate-round-1.safetensors")
    with pytest.raises(NotApplicable, match="each client's own update"):
        target_of(there, settings, mean)


def test_the_report_shows_it_beside_every_attack(campaign):
    run, _ = campaign
    page = run.report.read_text()
    assert "Cramér-Rao" in page
    assert "(rounding)" in page
    assert "would keep" in page
    rows = list(read_rows(run.rows))
    for cell in summarise(rows):
        if cell.baseline_kind:
            assert cell.floor is None
        else:
            floors = [f for (defense, _), f in floors_in(rows).items() if defense == cell.defense]
            key = "rounding_psnr_db" if cell.defense == "none" else "floor_psnr_db"
            assert cell.floor.psnr_db.mean == pytest.approx(sum(f[key] for f in floors) / 2)
            assert cell.floor.words in markdown_table(rows)


def test_words_of_a_floor():
    known = {"rms_per_sigma": 2.0, "hidden": 0, "pixels": 12, "update_rms": 0.5, "target_db": 20.0, "status": "exact"}
    known |= {"floor_psnr_db": 30.04, "rounding_psnr_db": 150.0, "sigma_at_target_db": 0.05}

    def words(*floors) -> str:
        return cell_floor([{"floor": floor} for floor in floors]).words

    assert cell_floor([{}, {"floor": None}]) is None
    assert words(known) == "30.0"
    assert words(known, known | {"floor_psnr_db": 34.0, "status": "at least"}) == "≤ 32.0"
    assert words(known | {"floor_psnr_db": None}) == "150.0 (rounding)"
    assert words(known, known | {"hidden": 1024, "pixels": 3072}) == "not identifiable: 1,024 of 3,072"
    assert words({"status": "not available", "reason": "why"}) == "not available"
    assert words(known, {"status": "not available"}) == "30.0"
    found = cell_floor([{"floor": known}])
    assert (found.sigma, found.share) == (pytest.approx(0.05), pytest.approx(0.1))


# ------------------------------------------------------------------------------------------------ the command
def test_the_command_measures_a_run_that_is_there(campaign, tmp_path):
    run, _ = campaign
    target = tmp_path / "floors.json"
    done = CliRunner().invoke(app, ["floor", "--run", str(run.path), "--sigma", "1e-2,0.1", "--json", str(target)])
    assert done.exit_code == 0, done.output
    assert "192 / 192" in done.output
    lines = json.loads(target.read_text())
    assert len(lines) == 6
    assert {line["floor"]["status"] for line in lines} == {"exact"}


def test_the_command_states_vulnerability(campaign, tmp_path):
    """By finite differences of the gradient at the truth, pixel by pixel."""
    run, wanted = campaign
    done = CliRunner().invoke(app, ["floor", "--run", str(run.path), "--rv", "--json", str(tmp_path / "f.json")])
    assert done.exit_code == 0, done.output
    assert "times the gradient's rms" in done.output
    assert "ranking: needs two models or rounds" in done.output
    line = json.loads((tmp_path / "f.json").read_text())[0]
    cell = next(one for one in wanted.cells if one.federation.defense == line["defense"])
    path = run.federation(cell.federation_id).updates / f"{line['client']}-round-1.safetensors"
    target = target_of(run, cell, path)
    context = target.context
    shape, options = context["image_shape"], context["model"]["options"]
    model = build_model("mlp", image_shape=shape, num_classes=context["num_classes"], seed=0, **options).double()
    model.load_state_dict({name: tensor.double() for name, tensor in target.update.sent.items()})

    def gradient(pixels):
        loss = torch.nn.functional.cross_entropy(model(pixels.reshape(-1, *shape)), target.truth["labels"])
        return torch.cat([part.reshape(-1) for part in torch.autograd.grad(loss, list(model.parameters()))])

    at = target.truth["images"].double().reshape(-1)
    steps = 1e-5 * torch.eye(len(at), dtype=torch.float64)
    squares = [((gradient(at + step) - gradient(at - step)) / 2e-5).square().sum() for step in steps]
    assert line["vulnerability"]["rv"] == pytest.approx(float(sum(squares)) ** 0.5, rel=1e-5)
    plain = CliRunner().invoke(app, ["floor", "--run", str(run.path)])
    assert "RV" not in plain.output


def test_the_command_ranks_models_and_rounds_before_any_attack(tmp_path):
    """Two models in two rounds, by what the lines of its own JSON say of the updates without a defense."""
    config, target = tmp_path / "c.toml", tmp_path / "f.json"
    config.write_text(
        "attack = []\n[data]\noptions = { image_size = 4 }\n"
        '[federation]\nclients = 2\nrounds = 2\nlearning_rate = 5.0\ndefense = ["none", "norm-clipping(max_norm=1e-3)"]\n'
        '[[case]]\ntitle = "[narrow]"\nmodel = { name = "mlp", options = { hidden = [4] } }\n'
        '[[case]]\ntitle = "wide"\nmodel = { name = "mlp", options = { hidden = [32] } }\n'
    )
    done = CliRunner().invoke(app, ["floor", str(config), "--rv", "--sigma", "1e-4,1e-2", "--json", str(target)])
    assert done.exit_code == 0, done.output
    states = {}
    for line in json.loads(target.read_text()):
        if line["defense"] == "none":
            about = "untrained" if line["round"] == 1 else "after 1 round"
            states.setdefault(f"{line['case']}, {about}", []).append(line)
    left = {
        state: sum(-20 * math.log10(1e-4 * line["floor"]["rms_per_sigma"]) for line in lines) / len(lines)
        for state, lines in states.items()
    }
    table = done.output[done.output.index("Which model leaks most") :]
    shown = sorted(left, key=table.index)
    assert shown == sorted(left, key=lambda state: -left[state])
    assert len(shown) == 4
    assert "(b) at σ=0.0001, dB" in table
    for state in shown:
        words = next(line for line in table.splitlines() if state in line).split()
        rv = max(line["vulnerability"]["rv"] for line in states[state])
        relative = max(line["vulnerability"]["rv_over_update_rms"] for line in states[state])
        for value in (rv, relative, -20 * math.log10(1e-4 / rv), left[state]):
            assert small_number(value) in words
    assert "8 updates without a defense" in table
    assert "Left out" not in table


def test_there_is_no_vulnerability_of_weights(tmp_path):
    wanted = experiment(federation={"clients": 1, "rounds": 1, "protocol": "fedavg"}, attack=["linear-leak"])
    run = run_campaign(wanted, tmp_path / "run").run
    (path,) = updates_of(run.federation(wanted.cells[0].federation_id))
    with pytest.raises(NotApplicable, match="one client's gradient"):
        target_of(run, wanted.cells[0], path).vulnerability()


def test_the_command_trains_by_itself(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "c.toml"
    config.write_text(
        'attack = ["linear-leak"]\npool.workers = 2\n[model]\nname = "mlp"\noptions = { hidden = [8] }\n'
        "[data]\noptions = { image_size = 8 }\n[federation]\nclients = 1\nrounds = 1\n"
    )
    done = CliRunner().invoke(app, ["floor", str(config), "federation.batch_size=2", "--db", "30"])
    assert done.exit_code == 0, done.output
    assert "384" in done.output
    assert "σ* (30 dB)" in done.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.toml"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "needs a configuration, or --run"),
        (["--run", "nowhere"], "a folder that `fedattack run` made"),
        (["--method", "guess"], "--method must be one of"),
        (["--sigma", "0.1,-1"], "--sigma must be positive numbers"),
    ],
)
def test_mistakes_are_named(arguments, message, tmp_path):
    done = CliRunner().invoke(app, ["floor", *arguments])
    assert isinstance(done.exception, FedattackError)
    assert message in str(done.exception)


def test_floors_do_not_touch_global_randomness(campaign):
    run, wanted = campaign
    state = torch.random.get_rng_state()
    settings = wanted.cells[0]
    path = updates_of(run.federation(settings.federation_id))[0]
    target_of(run, settings, path).compute("sketch", 10.0, lambda *_: None)
    assert torch.equal(state, torch.random.get_rng_state())

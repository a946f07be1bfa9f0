"""The command line: help is quick because nothing heavy is imported, mistakes are one readable message, lists are complete."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from fedattack import registry
from fedattack.cli import Kind, app
from fedattack.errors import FedattackError
from fedattack.store import save_update
from fedattack.types import Update

ROOT = Path(__file__).resolve().parents[1]
QUICK = str(ROOT / "experiments/recipes/quick.toml")


def run_main(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    code = "from fedattack.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120, cwd=cwd
    )


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['fedattack', '--help']\n"
        "from fedattack.cli import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'flwr', 'ray', 'pydantic', 'numpy', 'diffusers', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)


@pytest.mark.parametrize("command", ["run", "attack", "report", "floor", "list"])
def test_every_command_explains_itself(command: str) -> None:
    result = CliRunner().invoke(app, [command, "--help"])
    assert result.exit_code == 0
    assert "Usage" in result.output


@pytest.mark.parametrize("kind", [kind.value for kind in Kind])
def test_lists_show_everything_with_its_summary(kind: str) -> None:
    result = CliRunner().invoke(app, ["list", kind])
    assert result.exit_code == 0, result.output
    for name in getattr(registry, kind.upper()).names():
        assert name in result.output.splitlines()
        assert registry.Registry.summary(getattr(registry, kind.upper()), name), f"{name} has no docstring"


def test_a_typo_is_one_message_and_exit_code_2(tmp_path) -> None:
    done = run_main("run", QUICK, "federation.rounds=1", "model.name=lenett", "federation.lerning_rate=1", cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "did you mean 'learning_rate'?" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_says_what_would_run_and_runs_nothing(tmp_path) -> None:
    done = run_main("run", QUICK, "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "2 clients × 2 rounds of fedsgd on patches" in done.stdout
    assert not list(tmp_path.iterdir())


def test_run_then_report(tmp_path) -> None:
    changes = ["pool.workers=0", "federation.rounds=1", 'attack=["linear-leak"]', "--out", str(tmp_path / "run")]
    done = run_main("run", QUICK, *changes, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "report:" in done.stdout
    assert "linear-leak" in done.stdout
    again = run_main(
        "report", str(tmp_path / "run"), "--csv", str(tmp_path / "r.csv"), "--parquet", str(tmp_path / "r.parquet")
    )
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "r.csv").read_text().count("\n") > 4
    assert (tmp_path / "r.parquet").stat().st_size > 0
    missing = run_main("report", str(tmp_path))
    assert missing.returncode == 2
    assert "run folder must be one that `fedattack run` made" in missing.stderr


SAYS = {
    "model": {"name": "mlp", "options": {"hidden": [4, 4]}},
    "task": {"name": "diffusion", "options": {"num_train_timesteps": 50}},
    "image_shape": [1, 2, 2],
    "num_classes": 3,
}


@pytest.fixture
def told(tmp_path, monkeypatch):
    """The result of `fedattack attack` on a file that says SAYS, and the context that its job would have."""
    contexts: list[dict[str, Any]] = []

    def run_job(job: Any, *_: Any, **__: Any) -> None:
        contexts.append(job.context)
        raise FedattackError("far enough")

    monkeypatch.setattr("fedattack.jobs.run_job", run_job)

    def attack(*arguments: str, **says: Any) -> tuple[str, dict[str, Any]]:
        path, weights = tmp_path / "c-round-1.safetensors", {"w": torch.zeros(2)}
        update = Update(round=1, client="c", sent=weights, received=weights, kind="gradient", num_examples=1)
        save_update(path, update, {name: value for name, value in (SAYS | says).items() if value})
        contexts.clear()
        out = str(tmp_path / "out")
        done = CliRunner().invoke(app, ["attack", str(path), "-a", "linear-leak", "-o", out, *arguments])
        assert isinstance(done.exception, FedattackError), done.output
        return done.output + str(done.exception), contexts[0] if contexts else {}

    return attack


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--task", "diffusion(beta_schedule='sigmoid')"],
            "--task must be what the update says, beta_schedule='linear' (the default), got beta_schedule='sigmoid'",
        ),
        (
            ["--task", "diffusion(num_train_timesteps=1000)"],
            "says, num_train_timesteps=50, got num_train_timesteps=1000",
        ),
        (["--task", "classification"], "--task must be what the update says, diffusion, got classification"),
        (["--model", "lenet"], "--model must be what the update says, mlp, got lenet"),
        (["--model", "mlp(hidden=[4])"], "--model must be what the update says, hidden=[4, 4], got hidden=[4]"),
        (["--image-shape", "1,2,3"], "--image-shape must be what the update says, [1, 2, 2], got [1, 2, 3]"),
        (["--num-classes", "4"], "--num-classes must be what the update says, 3, got 4"),
    ],
)
def test_attack_refuses_what_contradicts_the_update_unless_told_to_insist(told, arguments, message) -> None:
    said, context = told(*arguments)
    assert message in said
    assert "--override" in said
    assert not context
    said, context = told(*arguments, "--override")
    assert message in said
    assert "far enough" in said
    assert context != SAYS


def test_attack_names_all_contradictions_at_once(told) -> None:
    said, _ = told("--task", "diffusion(beta_start=0.1, beta_end=0.2)", "--num-classes", "4")
    assert [part in said for part in ("beta_start=0.1", "beta_end=0.2", "3, got 4")] == [True] * 3


def test_attack_takes_what_agrees_with_the_update_or_is_not_said_there(told) -> None:
    """Defaults and tuples are no contradiction, options that are not named stay, a part that is missing may be anything."""
    same = ("--task", "diffusion(beta_schedule='linear', beta_start=1e-4)", "--model", "mlp(hidden=(4, 4))")
    said, context = told(*same, "--image-shape", "1,2,2", "--num-classes", "3")
    assert "must be what" not in said
    task = {"num_train_timesteps": 50, "beta_schedule": "linear", "beta_start": 1e-4}
    assert context["task"] == {"name": "diffusion", "options": task}
    assert told("--model", "fedattack.models.mlp:mlp")[1]["model"]["options"] == {"hidden": [4, 4]}
    assert told("--task", "diffusion(beta_schedule='sigmoid')", "--override")[1]["task"]["options"] == {
        "num_train_timesteps": 50,
        "beta_schedule": "sigmoid",
    }
    assert told("--model", "lenet", "--override")[1]["model"] == {"name": "lenet", "options": {}}
    said, context = told("--model", "lenet", "--task", "diffusion(beta_schedule='sigmoid')", model=None, task=None)
    assert "must be what" not in said
    assert context["task"]["options"] == {"beta_schedule": "sigmoid"}


def test_attack_refuses_what_is_no_update(tmp_path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"no update")
    done = run_main("attack", str(tmp_path / "x.safetensors"), "-a", "dlg", "-o", str(tmp_path / "out"))
    assert done.returncode == 2
    assert "must be a safetensors file of fedattack" in done.stderr
    gone = run_main("attack", str(tmp_path / "gone.safetensors"), "-a", "dlg")
    assert gone.returncode == 2
    assert "no such file" in gone.stderr

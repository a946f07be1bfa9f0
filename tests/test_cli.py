"""The command line: help is quick because nothing heavy is imported, mistakes are one readable message, lists are complete."""

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedattack import registry
from fedattack.cli import Kind, app

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


def test_attack_refuses_what_is_no_update(tmp_path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"no update")
    done = run_main("attack", str(tmp_path / "x.safetensors"), "-a", "dlg", "-o", str(tmp_path / "out"))
    assert done.returncode == 2
    assert "must be a safetensors file of fedattack" in done.stderr
    gone = run_main("attack", str(tmp_path / "gone.safetensors"), "-a", "dlg")
    assert gone.returncode == 2
    assert "no such file" in gone.stderr

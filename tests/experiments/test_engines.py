"""In process, in Flower's simulation, and through `flwr run`: the same rows for the same seed."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments.campaign import run_campaign
from fedattack.config import load_config
from fedattack.store import read_rows

ROOT = Path(__file__).resolve().parents[2]
QUICK = ROOT / "experiments/recipes/quick.toml"
TIMES = {"seconds", "finished"}


def rows(run: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in TIMES} for row in read_rows(run / "rows.jsonl")]


def test_simulation_gives_the_rows_of_the_in_process_engine(tmp_path) -> None:
    """The in-process attacks run without Ray at all, the simulation's on actors beside the clients."""
    inside = load_config(QUICK, ["pool.workers=0"])
    run_campaign(inside, tmp_path / "inside")
    code = (
        "from pathlib import Path; from fedattack.config import load_config; from experiments.campaign import run_campaign;"
        f"run_campaign(load_config(Path({str(QUICK)!r}), ['engine=simulation']), Path({str(tmp_path / 'simulated')!r}))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300, cwd=tmp_path, capture_output=True)
    assert len(rows(tmp_path / "inside")) == 36
    assert rows(tmp_path / "simulated") == rows(tmp_path / "inside")


@pytest.mark.slow
def test_flwr_run_gives_the_rows_of_the_in_process_engine(tmp_path) -> None:
    """`flwr run .` as a user types it, from another folder, with its daemon taken down by pid afterwards."""
    run_campaign(load_config(QUICK, ["pool.workers=0"]), tmp_path / "inside")
    home = tmp_path / "home"
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": "39291",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    target = tmp_path / "run"
    command = [
        "flwr",
        "run",
        str(ROOT),
        "--stream",
        "--federation-config",
        "num-supernodes=2 client-resources-num-cpus=1",
    ]
    try:
        done = subprocess.run(
            [*command, "-c", f"run-dir='{target}'"],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=400,
        )
        deadline = time.monotonic() + 120
        while not (target / "report.html").exists() and time.monotonic() < deadline:
            time.sleep(1)
        assert (target / "report.html").exists(), done.stdout[-3000:] + done.stderr[-3000:]
        time.sleep(2)
        assert rows(target) == rows(tmp_path / "inside")
        assert "[tool.flwr.federations]" not in (ROOT / "pyproject.toml").read_text()
    finally:
        for process in _processes_with(home):
            os.kill(process, signal.SIGTERM)
        shutil.rmtree(home, ignore_errors=True)


@pytest.mark.slow
def test_fifty_clients_for_three_rounds_in_simulation(tmp_path) -> None:
    recipe = ROOT / "experiments/recipes/fifty-clients.toml"
    code = "from fedattack.cli import main; main()"
    arguments = ["run", str(recipe), "--out", str(tmp_path / "fifty")]
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, timeout=900, cwd=tmp_path, capture_output=True)
    attacks = [row for row in rows(tmp_path / "fifty") if row["kind"] == "attack"]
    assert len(attacks) == 150
    assert {(row["client"], row["round"]) for row in attacks} == {
        (f"client-{c}", r) for c in range(50) for r in (1, 2, 3)
    }
    assert min(row["psnr_db"][0] for row in attacks if row["status"] == "ok") > 60


def _processes_with(home: Path) -> list[int]:
    """Pids of processes whose FLWR_HOME is this test's own."""
    wanted = f"FLWR_HOME={home}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if wanted in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
            except OSError:
                continue
    return found

"""The deployment on loopback: the same rows as in process, true exit codes, refusals, faults, and nothing left running."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from experiments.campaign import run_campaign
from experiments.deployment import MARK, make_bundle
from fedattack.config import load_config
from fedattack.store import read_json, read_rows

RECIPE = """
name = "deployed"
seed = 5
[data]
dataset = "patches"
options = { image_size = 8 }
[federation]
clients = 2
rounds = 2
learning_rate = 0.05
[pool]
workers = 1
[score]
lpips = []
floor = "off"
[[case]]
title = "MLP"
model = { name = "mlp", options = { hidden = [32] } }
attack = ["linear-leak", { name = "idlg", iterations = 5, start = "grey" }]
"""
TIMES = {"seconds", "finished"}
COMMAND = [sys.executable, "-c", "from fedattack.cli import main; main()"]


@pytest.fixture
def recipe(tmp_path) -> Path:
    path = tmp_path / "deployed.toml"
    path.write_text(RECIPE)
    return path


def rows(run: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in TIMES} for row in read_rows(run / "rows.jsonl")]


def marked(value: str = "") -> list[int]:
    """Pids that carry the mark of a deployment (of this one)."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            variables = (entry / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if any(item.startswith(f"{MARK}={value}".encode()) for item in variables):
            found.append(int(entry.name))
    return found


# ------------------------------------------------------------------------------------------------ without any process
def test_the_bundle_that_nodes_get_holds_no_attack(tmp_path) -> None:
    bundle = make_bundle(tmp_path / "app")
    names = {path.relative_to(bundle).parts[0] for path in bundle.rglob("*") if path.is_file()}
    assert names == {"fedattack", "clients", "strategies", "pyproject.toml"}


def test_a_client_trains_without_attacks_server_code_and_ray(tmp_path) -> None:
    """What a client's container holds is enough: fedattack and clients, no ray, no attacks."""
    bundle = make_bundle(tmp_path / "app")
    (bundle / "strategies").rename(tmp_path / "strategies")
    code = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("attacks", "strategies", "experiments", "ray", "lpips", "jinja2"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse())
sys.path.insert(0, {str(bundle)!r})
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
from clients.client_app import train
import clients, fedattack
assert clients.__file__.startswith({str(bundle)!r}) and fedattack.__file__.startswith({str(bundle)!r})
from fedattack.cells import build_victim
from fedattack.config import Settings
settings = Settings.model_validate({{
    "data": {{"options": {{"image_size": 8}}}}, "federation": {{"clients": 2}}, "model": {{"name": "mlp"}}
}})
weights = build_victim(settings, (3, 8, 8), 8).state_dict()
asked = RecordDict({{
    "arrays": ArrayRecord(weights),
    "config": ConfigRecord({{"fedattack": settings.model_dump_json(exclude={{"attack"}}), "server-round": 1, "truth": ""}}),
}})
message = Message(content=asked, dst_node_id=1, message_type="train")
reply = train(message, Context(1, 1, {{"partition-id": 1, "num-partitions": 2}}, RecordDict(), {{}}))
assert not reply.has_error(), reply.error
print(len(next(iter(reply.content.array_records.values()))))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 0


# ------------------------------------------------------------------------------------------------ with all of them
@pytest.mark.slow
def test_a_deployment_gives_the_rows_of_the_in_process_engine_and_leaves_nothing_behind(recipe, tmp_path) -> None:
    """TLS, node keys, process isolation, attacks on a Ray head with a token: as a user types it."""
    run_campaign(load_config(recipe, ["pool.workers=0"]), tmp_path / "inside")
    before, run = set(marked()), tmp_path / "run"
    temporary = Path(tempfile.mkdtemp(prefix="t-", dir="/tmp"))
    done = subprocess.run(
        [*COMMAND, "deploy", str(recipe), "--out", str(run)],
        cwd=tmp_path,
        env={**os.environ, "TMPDIR": str(temporary)},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert sum(row["kind"] == "attack" and row["status"] == "ok" for row in rows(run)) == 8
    assert rows(run) == rows(tmp_path / "inside")
    assert set(marked()) <= before
    temporary.rmdir()  # nothing is left in it
    assert read_json(run / "about.json")["engine"] == "deployment"
    assert {path.stem for path in (run / "logs").iterdir()} == {
        *("superlink", "serverapp", "ray-head", "run"),
        *(f"{kind}-{client}" for kind in ("supernode", "clientapp") for client in (0, 1)),
    }
    assert run.stat().st_mode & 0o777 == 0o700

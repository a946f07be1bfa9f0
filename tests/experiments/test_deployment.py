"""The deployment on loopback: the same rows as in process, true exit codes, refusals, faults, and nothing left running."""

import http.client
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from flwr.common.config import parse_config_args
from typer.testing import CliRunner

from experiments import deployment
from experiments.campaign import Summary, run_campaign
from experiments.credentials import make_credentials
from experiments.deployment import (
    MARK,
    Component,
    Deployment,
    DeploymentError,
    Flower,
    deploy,
    free_ports,
    health,
    make_bundle,
    processes_of,
    run_deployed,
)
from fedattack.cli import app as command_line
from fedattack.config import load_config
from fedattack.errors import FedattackError
from fedattack.store import RunFolder, read_json, read_rows
from strategies.attack_pool import attempts_path, pool_status

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


def wait_for(
    condition: Callable[[], bool], seconds: float, explain: Callable[[], str] = lambda: "waited in vain"
) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, explain()
        time.sleep(0.05)


# ------------------------------------------------------------------------------------------------ without any process
@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["federation.rounds=none"], "federation.rounds"),
        (["federation.mods=['secaggplus']", "federation.protocol=fedavg"], "secaggplus needs engine"),
        (["federation.clients=[2, 3]"], "must be the same in all cells"),
        (["pool.workerz=1"], "unknown key"),
    ],
)
def test_a_wrong_configuration_starts_nothing(recipe, tmp_path, monkeypatch, overrides, said) -> None:
    monkeypatch.setattr(deployment, "Deployment", lambda *_, **__: pytest.fail("started"))
    done = CliRunner().invoke(command_line, ["deploy", str(recipe), *overrides, "--out", str(tmp_path / "run")])
    assert isinstance(done.exception, FedattackError)
    assert said in str(done.exception)
    assert not (tmp_path / "run").exists()


def test_dry_run_and_half_a_superlink(recipe, tmp_path) -> None:
    out = ["--out", str(tmp_path / "run")]
    done = CliRunner().invoke(command_line, ["deploy", str(recipe), "--dry-run", *out])
    assert done.exit_code == 0
    assert "2 clients × 2 rounds" in done.output
    assert not (tmp_path / "run").exists()
    done = CliRunner().invoke(command_line, ["deploy", str(recipe), "--superlink", "127.0.0.1:1"])
    assert "must be given together" in str(done.exception)
    (tmp_path / "data/client-0").mkdir(parents=True)
    done = CliRunner().invoke(command_line, ["deploy", str(recipe), "--data", str(tmp_path / "data"), *out])
    assert "a folder that holds client-1" in str(done.exception)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("result", "code"),
    [
        (({"ok": 8}, ()), 0),
        (({"ok": 7}, ("round 1, client-1: gone",)), 1),
        (({"failed": 8}, ()), 1),
        (({}, ()), 1),
        (DeploymentError("it died"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_exit_codes_are_true(recipe, tmp_path, monkeypatch, result, code) -> None:
    def deployed(*_: object, **__: object) -> Summary:
        if isinstance(result, BaseException):
            raise result
        run = RunFolder(tmp_path)
        run.rows.write_text("")
        return Summary(run, run.report, *result)

    monkeypatch.setattr(deployment, "deploy", deployed)
    done = CliRunner().invoke(command_line, ["deploy", str(recipe), "--out", str(tmp_path / "run")])
    assert done.exit_code == code
    assert ("gone" in done.output) == (len(result) == 2 and bool(result[1]) if isinstance(result, tuple) else False)


def test_a_superlink_that_is_not_there_is_said(recipe, tmp_path) -> None:
    make_credentials(tmp_path / "keys", 1)
    arguments = ["--superlink", f"127.0.0.1:{free_ports(1)[0]}", "--root-certificates", str(tmp_path / "keys/ca.pem")]
    done = CliRunner().invoke(command_line, ["deploy", str(recipe), *arguments, "--wait", "0.1"])
    assert done.exit_code == 1
    assert "was not ready" in done.output


def test_a_component_that_keeps_dying_ends_the_deployment_with_its_log(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(deployment, "MAX_DELAY_SECONDS", 0.01)
    script = "import sys; print('no such key'); sys.exit(3)"
    fragile = Component("fragile", [sys.executable, "-c", script], tmp_path / "log", tmp_path / "home", restarts=True)
    fragile.start()

    def restart_until_it_gives_up() -> None:
        while True:
            wait_for(lambda: fragile.died is not None, 20)
            fragile.restart()

    with pytest.raises(DeploymentError, match=r"(?s)fragile ended with code 3.*no such key"):
        restart_until_it_gives_up()
    assert (tmp_path / "log").read_text().split("\n").count("no such key") == 1 + deployment.MAX_RESTARTS


def test_deaths_long_ago_are_forgiven(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(deployment, "MAX_DELAY_SECONDS", 0.0)
    monkeypatch.setattr(deployment, "HEALTHY_SECONDS", 0.0)
    hardy = Component("hardy", ["true"], tmp_path / "log", tmp_path / "home", restarts=True)
    for _ in range(deployment.MAX_RESTARTS + 2):
        hardy.start()
        hardy.process.wait(20)
        hardy.restart()
        hardy.start_at = 0.0
    assert hardy.deaths == 1


def test_a_private_seed_is_not_logged(tmp_path) -> None:
    (tmp_path / "data/client-0").mkdir(parents=True)
    own = deployment.own_data(tmp_path / "data", 0)
    for told in (own, own + " witness=true"):
        node = Component("node", ["echo", "--node-config", told], tmp_path / "log", tmp_path / "home")
        node.start()
        node.process.wait(20)
    first, echoed, second, _ = (tmp_path / "log").read_text().splitlines()
    seed = own.partition("private-seed=")[2]
    assert seed.isdigit()
    assert seed in echoed  # the command itself is whole
    assert seed not in first + second
    assert "private-seed=…" in first
    assert second.endswith("private-seed=… witness=true'")


def test_certificates_of_a_deployment_outlast_a_long_campaign(tmp_path, monkeypatch) -> None:
    until = []

    def launch(self, name: str, *_: object, **__: object) -> None:
        for path in (self._state / "credentials").glob("*.pem"):
            until.append(x509.load_pem_x509_certificate(path.read_bytes()).not_valid_after_utc)
        raise DeploymentError("far enough")

    monkeypatch.setattr(Deployment, "launch", launch)
    with pytest.raises(DeploymentError, match="far enough"), Deployment(1, tmp_path):
        pass
    assert len(until) == 3
    assert min(until) - datetime.now(UTC) > timedelta(days=364)


SPOKEN = (
    """fedattack deploy r.toml "federation.mods=['fixedclipping']" 'attack=["dlg"]' 'case = "a b"' x=$HOME\\n""",
    "",
    """it's "quoted" \\" and \\U0001f600 or \t\n 😀é, then key=value config="other" .toml""",
    "ends.toml",
    "\\",
)


@pytest.mark.parametrize("command", SPOKEN)
def test_whatever_is_typed_passes_flowers_own_parser(tmp_path, monkeypatch, command) -> None:
    seen = []
    monkeypatch.setattr(Flower, "_json", lambda self, *arguments: seen.append(arguments) or {"run-id": "7"})
    config = {"config": command, "witness": True, "ray-address": "", "command": command}
    assert Flower("127.0.0.1:1", tmp_path / "ca.pem", tmp_path / "home").submit(tmp_path, config) == 7
    (arguments,) = seen
    assert parse_config_args([arguments[arguments.index("--run-config") + 1]]) == config


class Forgetful:
    """A SuperLink whose list of nodes cannot be had for a while."""

    def __init__(self, failures: int) -> None:
        self.failures = failures

    def health(self) -> str:
        return ""

    def online(self) -> list[str]:
        self.failures -= 1
        if self.failures >= 0:
            raise DeploymentError("flwr supernode list did not answer")
        return ["1", "2"]


def test_a_list_of_nodes_that_fails_once_is_asked_again_until_the_deadline(recipe, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(deployment.time, "sleep", lambda seconds: None)
    (tmp_path / "ca.pem").touch()
    monkeypatch.setattr(deployment, "Flower", lambda *_: Forgetful(2))
    with deployment.existing("there:1", tmp_path / "ca.pem", load_config(recipe)) as flower:
        assert flower.failures == -1
    monkeypatch.setattr(deployment, "Flower", lambda *_: Forgetful(10**9))
    with (
        pytest.raises(DeploymentError, match=r"not ready after 0\.05 s: flwr supernode list did not answer"),
        deployment.existing("there:1", tmp_path / "ca.pem", load_config(recipe), wait_seconds=0.05),
    ):
        pass
    up = Deployment(2, tmp_path)
    up.flower = Forgetful(2)
    up._await("superlink", up._absent)
    assert up.flower.failures == -1


class Unwell:
    """Flower's commands on a bad day: `answers` are verdicts, an exception is raised."""

    def __init__(self, *answers) -> None:
        self.answers, self.stopped = list(answers), []

    def submit(self, bundle: Path, config: dict) -> int:
        return 7

    def follow(self, run_id: int, log_file: Path) -> subprocess.Popen:
        return subprocess.Popen(["true"])

    def verdict(self, run_id: int) -> tuple[str, str]:
        answer = self.answers.pop(0)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def stop(self, run_id: int) -> None:
        self.stopped.append(run_id)


DEAF = DeploymentError("flwr ls did not answer")


@pytest.mark.parametrize(
    ("answers", "said", "stopped"),
    [
        ([DEAF, DEAF, ("finished:failed", "no heartbeat")], "finished:failed: no heartbeat", []),
        ([DEAF, DEAF, DEAF], "did not answer", [7]),
        ([("running", ""), ("finished:completed", "")], "without a report", []),
    ],
)
def test_flowers_verdict_is_heeded_and_a_busy_machine_forgiven(
    recipe, tmp_path, monkeypatch, answers, said, stopped
) -> None:
    monkeypatch.setattr(deployment, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(deployment.time, "sleep", lambda seconds: None)
    flower = Unwell(*answers)
    with pytest.raises(DeploymentError, match=said):
        run_deployed(load_config(recipe), RunFolder(tmp_path / "run"), flower)
    assert flower.stopped == stopped


def test_what_may_not_die_is_not_started_again(tmp_path) -> None:
    once = Component("once", [sys.executable, "-c", ""], tmp_path / "log", tmp_path / "home")
    once.start()
    wait_for(lambda: once.died is not None, 20)
    with pytest.raises(DeploymentError, match="once ended with code 0"):
        once.restart()


def test_closing_ends_what_ignores_it_and_what_it_started(tmp_path, monkeypatch) -> None:
    """A component that ignores SIGTERM, and its child in a session of its own."""
    script = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True);"
        "print(child.pid, flush=True); time.sleep(600)"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(deployment, "STOP_SECONDS", 0.5)
    up = Deployment(1, tmp_path)
    stubborn = up.launch("stubborn", [sys.executable, "-c", script])
    wait_for(lambda: len(stubborn.log.read_text().split("\n")) > 2, 20)
    assert len(marked(up.mark)) == 2
    up.close()
    assert not marked(up.mark)


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
    assert load_config(run / "config.toml").pool == load_config(recipe).pool  # the cluster of the day is no setting
    assert (run / "workers/0.json").exists()  # which only attack workers on Ray write
    assert set(marked()) <= before
    temporary.rmdir()  # nothing is left in it
    assert read_json(run / "about.json")["engine"] == "deployment"
    assert {path.stem for path in (run / "logs").iterdir()} == {
        *("superlink", "serverapp", "ray-head", "run"),
        *(f"{kind}-{client}" for kind in ("supernode", "clientapp") for client in (0, 1)),
    }
    assert run.stat().st_mode & 0o777 == 0o700


@pytest.mark.slow
def test_a_campaign_on_a_deployment_that_is_up_already(recipe, tmp_path) -> None:
    """As docker/run does it: register the keys (again), submit from another process, twice; no truth unless asked for."""
    with Deployment(2, tmp_path / "logs", attack_workers=1) as up:
        authority, keys = up.site.file("ca.pem"), str(up.site.credentials)
        enrol = [sys.executable, "-m", "experiments.deployment", up.site.superlink, authority, keys]
        done = subprocess.run(enrol, capture_output=True, text=True, timeout=120)
        assert done.stdout.split("\n")[:2] == ["supernode-0 is admitted", "supernode-1 is admitted"], done.stderr
        there = ["--superlink", up.site.superlink, "--root-certificates", authority, "--ray-address", up.ray_address]

        def campaign(*arguments: str) -> subprocess.CompletedProcess[str]:
            command = [*COMMAND, "deploy", str(recipe), "--out", str(tmp_path / "run"), *there, *arguments]
            return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)

        done = campaign("federation.clients=3", "--wait", "1")
        assert done.returncode == 1
        assert "2 of 3 nodes are online" in done.stderr
        done = campaign()
        assert done.returncode == 0, done.stdout + done.stderr
        found = [row for row in rows(tmp_path / "run") if row["kind"] == "attack"]
        assert [row["status"] for row in found] == ["ok"] * 8
        assert not list((tmp_path / "run").rglob("truth/*"))
        assert len(up.flower.online()) == 2
        again = campaign()
        assert again.returncode == 0
        assert [row for row in rows(tmp_path / "run") if row["kind"] == "attack"] == found
        assert (tmp_path / "run/logs/run.log").read_text().count("[ROUND 1/2]") == 1


@pytest.mark.slow
def test_who_is_refused(tmp_path) -> None:
    """An unknown node key, a stranger's authority, no TLS, a client's secret in the server's place, a key used twice."""
    stranger = tmp_path / "stranger"
    make_credentials(stranger, 1)
    with Deployment(1, tmp_path / "logs") as up:
        node, ports = up.site.supernode_command(0), iter(free_ports(5))

        def variant(name: str, **changes: str) -> Component:
            """Another SuperNode; an empty value leaves the option out."""
            changes |= {"port": str(next(ports))}
            kept = [word for word in node if word.partition("=")[0].lstrip("-") not in changes]
            return up.launch(name, [*kept, *(f"--{key}={value}" for key, value in changes.items() if value)])

        unknown = variant("unknown", **{"auth-supernode-private-key": str(stranger / "supernode-0.ecdsa")})
        misled = variant("misled", **{"root-certificates": str(stranger / "ca.pem")})
        keyless = variant("keyless", **{"auth-supernode-private-key": ""})
        twice = variant("twice")
        plain = [
            word for word in node if word.split("=")[0] in ("flower-supernode", "--isolation", "--superlink", "--host")
        ]
        bare = up.launch("bare", [*plain, "--insecure", "--max-retries=1", f"--port={next(ports)}"])
        server = up.site.serverapp_command()[:-1]
        thief = up.launch("thief", [*server, f"--superexec-auth-secret-file={up.site.file('supernode-0.secret')}"])
        guest = up.launch("guest", server)
        for refused in (unknown, misled, keyless, twice, bare, thief, guest):
            wait_for(lambda it=refused: it.died is not None, 90, refused.explain)
        assert "Failed to activate SuperNode" in unknown.log.read_text()
        assert "CERTIFICATE_VERIFY_FAILED" in misled.log.read_text()
        assert "All SuperNodes must be" in keyless.log.read_text()
        assert "Failed to activate SuperNode" in twice.log.read_text()
        assert len(up.flower.online()) == 1
        assert "CERTIFICATE_VERIFY_FAILED" in health(up.site.superlink, stranger / "ca.pem")
        mistaken = Flower(up.site.superlink, stranger / "ca.pem", tmp_path / "home")
        with pytest.raises(DeploymentError, match="supernode list failed"):
            mistaken.online()
        with pytest.raises((OSError, http.client.HTTPException)):
            urllib.request.urlopen(f"http://{up.site.superlink}/health", timeout=5)
    assert not marked(up.mark)


@pytest.mark.slow
def test_whatever_is_killed_a_rerun_ends_with_the_rows_of_an_undisturbed_run(recipe, tmp_path) -> None:
    """The ServerApp in training, the Ray head in attacking, then an attack worker in the middle of a job."""
    slow = "[{name = 'inverting-gradients', iterations = 3000, restarts = 1}, 'linear-leak']"
    experiment = load_config(recipe, [f"attack={slow}"])
    run_campaign(load_config(recipe, [f"attack={slow}", "pool.workers=0"]), tmp_path / "inside")
    run = RunFolder(tmp_path / "run")

    def attempt(strike: Callable[[Deployment, set[int]], bool]) -> Summary:
        rounds: set[int] = set()
        struck: list[bool] = []
        with Deployment(2, run.path / "logs", attack_workers=1, node_config=lambda client: "witness=true") as up:

            def watch() -> None:
                up.check()
                if not struck and strike(up, rounds):
                    struck.append(True)

            try:
                return run_deployed(
                    experiment,
                    run,
                    up.flower,
                    ray_address=up.ray_address,
                    witness=True,
                    watch=watch,
                    on_round=lambda settings, number, figures: rounds.add(number),
                )
            finally:
                assert struck
                struck_pids[:] = [pid for pid in struck_pids if Path(f"/proc/{pid}").exists()]

    struck_pids: list[int] = []

    def kill(up: Deployment, word: str) -> bool:
        for pid in processes_of(up.mark, set()):
            if word in Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode():
                os.kill(pid, signal.SIGKILL)
                struck_pids.append(pid)
                return True
        return False

    with pytest.raises(DeploymentError, match="finished:failed"):
        attempt(lambda up, rounds: 1 in rounds and kill(up, "flwr-serverapp"))
    with pytest.raises(DeploymentError, match="ray-head"):
        attempt(lambda up, rounds: 2 in rounds and bool(pool_status(run).running) and kill(up, "gcs_server"))
    victims: list[str] = []

    def kill_worker(up: Deployment, rounds: set[int]) -> bool:
        running = pool_status(run).running
        if running:
            os.kill(running[0].pid, signal.SIGKILL)
            victims.append(running[0].job)
        return bool(running)

    summary = attempt(kill_worker)
    assert not summary.lost
    assert rows(run.path) == rows(tmp_path / "inside")
    assert len(list(read_rows(attempts_path(run, victims[0])))) >= 2
    assert not struck_pids


@pytest.mark.slow
def test_a_node_that_is_killed_comes_back_and_one_that_lacks_a_package_is_said(recipe, tmp_path) -> None:
    experiment, run = load_config(recipe, ["pool.workers=0"]), RunFolder(tmp_path / "run")
    with Deployment(2, run.path / "logs") as up:
        node = up.components["supernode-1"]
        killed: list[int] = []

        def watch() -> None:
            up.check()
            if not killed and "Receiving: train message" in node.log.read_text():
                killed.append(node.pid)
                os.kill(node.pid, signal.SIGKILL)

        summary = run_deployed(experiment, run, up.flower, watch=watch)
        assert node.pid not in killed
    assert [line.split(":")[1].strip().split(",")[0] for line in summary.lost] == ["round 1"]
    assert "Node Unavailable" in summary.lost[0]
    assert "Node Unavailable" in (run.path / "report.html").read_text()
    assert {(row["client"], row["round"]) for row in rows(run.path) if row["kind"] == "attack"} == {
        ("client-0", 1),
        ("client-0", 2),
        ("client-1", 2),
    }

    broken = tmp_path / "broken"
    (broken / "skimage").mkdir(parents=True)
    (broken / "skimage/__init__.py").write_text("raise ModuleNotFoundError(\"No module named 'skimage'\")\n")
    lame = {"clientapp-1": {"PYTHONPATH": str(broken)}}
    summary = deploy(load_config(recipe, ["pool.workers=0"]), tmp_path / "lame", witness=False, environment=lame)
    assert len(summary.lost) == 2
    assert all("skimage" in line for line in summary.lost)
    assert not list((tmp_path / "lame").rglob("truth/*"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_outlives_the_launcher(recipe, tmp_path, number) -> None:
    """Interrupted it takes everything down itself; killed it cannot, so the processes go by themselves (Linux)."""
    mark = {**os.environ, "TMPDIR": tempfile.mkdtemp(prefix="t-", dir="/tmp")}
    before = set(marked())
    with subprocess.Popen([*COMMAND, "deploy", str(recipe), "--out", str(tmp_path / "run")], env=mark) as launcher:
        wait_for(lambda: (tmp_path / "run/logs/clientapp-1.log").exists(), 120)
        launcher.send_signal(number)
        code = launcher.wait(120)
    assert code == (130 if number != signal.SIGKILL else -signal.SIGKILL)
    wait_for(lambda: set(marked()) <= before, 0.1 if number != signal.SIGKILL else 30)
    if number != signal.SIGKILL:
        assert not list(Path(mark["TMPDIR"]).iterdir())
    shutil.rmtree(mark["TMPDIR"])

"""A whole Flower deployment on loopback: TLS, node keys, every component a process of its own; all of it gone at the end.

    with Deployment(clients=2, logs=Path("logs"), attack_workers=1) as deployment:
        run_deployed(experiment, run, deployment.flower, watch=deployment.check)

`Deployment` starts what experiments/topology.py lists, waits until every node is online, starts a SuperNode or SuperExec that
dies again (as docker's `restart: on-failure` would), and stops everything by pid. `run_deployed` submits the app to it, or to
any SuperLink that is up already, and gives Flower's verdict as an error or none, which Flower's own exit code is not.
"""

import argparse
import ctypes
import json
import logging
import os
import re
import secrets
import shlex
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any

from experiments.campaign import Summary, forget_failures
from experiments.credentials import make_credentials
from experiments.topology import (
    ATTACK_RESOURCE,
    QUIET,
    RAY_HEAD,
    SERVERAPP,
    SUPERLINK,
    Site,
    clientapp_name,
    ray_environment,
    ray_head_command,
    supernode_name,
)
from fedattack.config import Experiment, Settings, to_toml
from fedattack.errors import FedattackError, must
from fedattack.store import RunFolder, private_folder, read_rows, write_atomically
from strategies.attack_pool import OnStatus, pool_status
from strategies.federation import OnRound, groups_of
from strategies.server_app import APP_ROOT, require_deployable

log = logging.getLogger("fedattack.deployment")

BUNDLED = ("fedattack", "clients", "strategies")
"""What travels to the nodes. No attack does: the server has them installed."""

MAX_RESTARTS = 8
MAX_DELAY_SECONDS = 20.0
"""A component that died is started again after 1, 2, 4, … seconds. The SuperLink refuses a node whose former process it still
takes to be alive, which is up to a minute after it was killed."""
HEALTHY_SECONDS = 600.0
"""What ran for so long before it died is well: its earlier deaths are forgiven."""
STOP_SECONDS = 10.0
ASK_SECONDS = 15.0
LOOK_SECONDS = 1.0
MARK = "FEDATTACK_DEPLOYMENT"
"""Environment variable that every process of one deployment carries, so that none is missed at the end."""


class DeploymentError(FedattackError):
    """A component did not start, died for good, or refused; or the run failed."""


# ------------------------------------------------------------------------------------------------ Flower's command line
@dataclass(frozen=True)
class Flower:
    """Flower's commands against one SuperLink. `home` (FLWR_HOME) is made here and holds nothing but this connection."""

    address: str
    root_certificates: Path
    home: Path

    def __post_init__(self) -> None:
        private_folder(self.home)
        connection = (
            f'[superlink]\ndefault = "deployment"\n\n[superlink.deployment]\naddress = "{self.address}"\n'
            f"root-certificates = {json.dumps(str(self.root_certificates.resolve()))}\n"
        )
        write_atomically(self.home / "config.toml", connection.encode())

    def health(self, *, timeout: float = 3.0) -> str:
        """ "" where the SuperLink answers over TLS, else why it does not."""
        return health(self.address, self.root_certificates, timeout=timeout)

    def register(self, public_key: Path, name: str) -> None:
        """Admit a node. A key that is registered already stays so."""
        answer = self._json("supernode", "register", str(public_key), "--name", name, check=False)
        if not answer.get("success") and "already in use" not in json.dumps(answer):
            raise DeploymentError(f"{name} could not be registered: {_reason(answer)}")

    def online(self) -> list[str]:
        """Ids of the nodes that are connected now."""
        nodes = self._json("supernode", "list").get("nodes", [])
        return [str(node["node-id"]) for node in nodes if node.get("status") == "online"]

    def submit(self, bundle: Path, config: Mapping[str, str | bool]) -> int:
        """Start a run; gives its id."""
        told = " ".join(f"{key}={_toml_value(value)}" for key, value in config.items())
        return int(self._json("run", str(bundle), "--run-config", told)["run-id"])

    def verdict(self, run_id: int) -> tuple[str, str]:
        """Status and details of a run: ("finished:completed", …), ("finished:failed", …), ("running", …), …"""
        found = self._json("ls", "--run-id", str(run_id))["runs"][0]
        return str(found["status"]), str(found.get("status-details") or "")

    def follow(self, run_id: int, log_file: Path) -> "subprocess.Popen[bytes]":
        """A process that writes the run's log to a file and ends about when the run does."""
        with log_file.open("ab") as file:
            return subprocess.Popen(
                ["flwr", "log", str(run_id), "--stream"],
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                preexec_fn=_die_with_parent,
            )

    def stop(self, run_id: int) -> None:
        self._json("stop", str(run_id), check=False)

    def _json(self, *arguments: str, check: bool = True) -> dict[str, Any]:
        command = ["flwr", *arguments, "--format", "json"]
        try:
            done = subprocess.run(
                command,
                env=self._environment(),
                cwd=self.home,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=120,
            )
        except subprocess.TimeoutExpired as error:
            raise DeploymentError(f"flwr {arguments[0]} {arguments[1]} did not answer in 120 seconds") from error
        try:
            answer: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])
        except ValueError:
            answer = {"success": False, "error-message": (done.stderr or done.stdout).strip()[-2000:]}
        if check and (done.returncode or answer.get("success") is False):
            raise DeploymentError(f"flwr {arguments[0]} {arguments[1]} failed: {_reason(answer)}")
        return answer

    def _environment(self) -> dict[str, str]:
        return _environment(FLWR_HOME=str(self.home))


def _toml_value(value: str | bool) -> str:
    """As TOML for Flower's parser, which ends a string at the next quote, escaped or not: quotes, backslashes and whatever is
    not printable ASCII are given by their code points."""
    if isinstance(value, bool):
        return json.dumps(value)
    return '"' + "".join(c if " " <= c <= "~" and c not in '"\\' else f"\\U{ord(c):08x}" for c in value) + '"'


def health(address: str, root_certificates: Path, *, timeout: float = 3.0) -> str:
    """ "" where the server at host:port answers /health over TLS with a certificate of this authority, else why not."""
    try:
        context = ssl.create_default_context(cafile=str(root_certificates))
        with urllib.request.urlopen(f"https://{address}/health", context=context, timeout=timeout):
            return ""
    except (OSError, ValueError) as error:
        return str(error)


def make_bundle(folder: Path) -> Path:
    """The Flower app as it travels to the nodes: no attacks, no recipes, no experiments."""
    for package in BUNDLED:
        for source in sorted((APP_ROOT / package).rglob("*.py")):
            target = folder / source.relative_to(APP_ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
    included = ", ".join(json.dumps(f"{package}/**/*.py") for package in BUNDLED)
    write_atomically(
        folder / "pyproject.toml",
        f"""\
[project]
name = "fedattack"
version = "{_version()}"
dependencies = []

[tool.flwr.app]
publisher = "fedattack"
fab-include = [{included}]

[tool.flwr.app.components]
serverapp = "strategies.server_app:app"
clientapp = "clients.client_app:app"

[tool.flwr.app.config]
config = ""
run-dir = ""
overrides = ""
command = ""
witness = false
ray-address = ""
ray-resource = ""
""".encode(),
    )
    return folder


# ------------------------------------------------------------------------------------------------ processes
@dataclass
class Component:
    """One process of a deployment, its log, and whether it may be started again after it died.

    The log leaves private seeds out of the command; the process list shows them to every user of this machine while it runs.
    """

    name: str
    command: Sequence[str]
    log: Path
    home: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    restarts: bool = False
    process: "subprocess.Popen[bytes] | None" = None
    deaths: int = 0
    start_at: float = 0.0
    started_at: float = 0.0

    def start(self) -> None:
        private_folder(self.home)
        private_folder(self.log.parent)
        with self.log.open("ab") as file:
            told = re.sub(r"private-seed=[^'\"\s]+", "private-seed=…", shlex.join(self.command))
            file.write(f"$ {told}\n".encode())
            file.flush()
            self.started_at = time.monotonic()
            self.process = subprocess.Popen(
                self.command,
                env=_environment(FLWR_HOME=str(self.home), **self.environment),
                cwd=self.home,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a Ctrl-C in the terminal is for the launcher alone
                preexec_fn=_die_with_parent,
            )

    @property
    def pid(self) -> int:
        return self.process.pid if self.process else 0

    @property
    def died(self) -> int | None:
        """Its exit code where it ended, None while it runs."""
        return self.process.poll() if self.process else None

    def restart(self) -> None:
        """Note that it died, and start it again after its delay. Raises DeploymentError where it dies again and again."""
        if not self.start_at:
            self.deaths = 1 if time.monotonic() - self.started_at >= HEALTHY_SECONDS else self.deaths + 1
            if not self.restarts or self.deaths > MAX_RESTARTS:
                raise DeploymentError(self.explain())
            delay = min(MAX_DELAY_SECONDS, 2.0 ** (self.deaths - 1))
            log.warning("%s; it is started again in %.0f s", self.explain().partition(";")[0], delay)
            self.start_at = time.monotonic() + delay
        elif time.monotonic() >= self.start_at:
            self.start_at = 0.0
            self.start()

    def explain(self) -> str:
        code = self.died
        how = (
            "is running" if code is None else f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        )
        return f"{self.name} {how}; the end of {self.log}:\n{_tail(self.log)}"


class Deployment:
    """The processes of a deployment on loopback, up between `with` and its end.

    clients: SuperNodes 0 … clients - 1, each with its ClientApp's SuperExec.
    logs: folder of one log a process.
    attack_workers: room for so many on a Ray head of its own; 0: no Ray.
    node_config: more of the node config of a client, e.g. lambda client: f'dataset="images:/data/{client}"'.
    environment: further variables for components by name; for tests.
    Raises DeploymentError with the reason and the end of the log where a component does not come up.
    """

    def __init__(
        self,
        clients: int,
        logs: Path,
        *,
        attack_workers: int = 0,
        node_config: Callable[[int], str] = lambda client: "",
        environment: Mapping[str, Mapping[str, str]] | None = None,
        start_seconds: float = 180.0,
    ) -> None:
        self._clients, self._logs, self._attack_workers = clients, logs.resolve(), attack_workers
        self._node_config, self._more = node_config, environment or {}
        self._start_seconds = start_seconds
        self._mark = secrets.token_hex(8)
        self._state = Path()
        self.components: dict[str, Component] = {}
        self.ray_address = ""
        self.ray_token = ""

    # ---- life
    def __enter__(self) -> "Deployment":
        self._state = _short_folder()
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _start(self) -> None:
        credentials = self._state / "credentials"
        make_credentials(credentials, self._clients)
        ports = free_ports(1 + self._clients + (1 if self._attack_workers else 0))
        self.site = Site(
            credentials=PurePosixPath(credentials),
            bind="127.0.0.1",
            superlink=f"127.0.0.1:{ports[0]}",
            supernodes=tuple(f"127.0.0.1:{port}" for port in ports[1 : 1 + self._clients]),
        )
        self.flower = Flower(self.site.superlink, credentials / "ca.pem", self._state / "home" / "flwr")
        self.launch(SUPERLINK, self.site.superlink_command())
        server: dict[str, str] = {}
        if self._attack_workers:
            self.ray_address, self.ray_token = f"127.0.0.1:{ports[-1]}", self.site.file("ray.token")
            server = ray_environment(self.ray_token)
            more = (f"--temp-dir={self._state / 'ray'}",)
            command = ray_head_command(ports[-1], attack_workers=self._attack_workers, more=more)
            self.launch(RAY_HEAD, command, server)
        self._await(SUPERLINK, self.flower.health)
        for client in range(self._clients):
            name = supernode_name(client)
            self.flower.register(credentials / f"{name}.ecdsa.pub", name)
        self.launch(SERVERAPP, self.site.serverapp_command(), server, restarts=True)
        for client in range(self._clients):
            command = self.site.supernode_command(client, self._node_config(client))
            self.launch(supernode_name(client), command, restarts=True)
        for client in range(self._clients):
            one_thread = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
            command = self.site.clientapp_command(client)
            self.launch(clientapp_name(client), command, one_thread, restarts=True)
        if self._attack_workers:
            self._await(RAY_HEAD, self._ray_problem)
        for client in range(self._clients):
            address = self.site.supernodes[client]
            self._await(supernode_name(client), lambda at=address: health(at, credentials / "ca.pem"))
        self._await(SUPERLINK, self._absent)

    def launch(
        self, name: str, command: Sequence[str], environment: Mapping[str, str] | None = None, *, restarts: bool = False
    ) -> Component:
        """Start one more component; `close` stops it with the others."""
        component = Component(
            name,
            command,
            self._logs / f"{name}.log",
            self._state / "home" / name,
            {**(environment or {}), MARK: self._mark, "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2"}
            | dict(self._more.get(name, {})),
            restarts,
        )
        self.components[name] = component
        component.start()
        return component

    def check(self) -> None:
        """Start what died again; raises DeploymentError for what must not die, or dies again and again."""
        _heed()
        for component in self.components.values():
            if component.died is not None:
                component.restart()

    def close(self) -> None:
        """Stop every process, last started first: asked, then killed. Nothing of this deployment runs afterwards."""
        with _undisturbed():
            running = [item for item in reversed(list(self.components.values())) if item.process]
            for component in running:
                with suppress(ProcessLookupError):
                    if component.died is None:
                        component.process.terminate()  # type: ignore[union-attr]
            end = time.monotonic() + STOP_SECONDS
            for component in running:
                with suppress(subprocess.TimeoutExpired):
                    component.process.wait(max(0.1, end - time.monotonic()))  # type: ignore[union-attr]
            while left := processes_of(self._mark, {item.pid for item in running}):
                for pid in left:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                for component in running:
                    component.process.poll()  # type: ignore[union-attr]
                time.sleep(0.05)
            if self._state != Path():
                shutil.rmtree(self._state, ignore_errors=True)

    @property
    def mark(self) -> str:
        """Value of the environment variable by which the processes of this deployment are known."""
        return self._mark

    # ---- readiness
    def _await(self, name: str, problem: Callable[[], str]) -> None:
        """Until `problem` says "", unless the component dies or takes too long."""
        end = time.monotonic() + self._start_seconds
        while said := problem():
            _heed()
            for component in self.components.values():
                if component.died is not None:
                    raise DeploymentError(component.explain())
            if time.monotonic() > end:
                component = self.components[name]
                waited = f"{name} was not ready after {self._start_seconds:g} seconds ({said})"
                raise DeploymentError(f"{waited}; the end of {component.log}:\n{_tail(component.log)}")
            time.sleep(0.1)

    def _ray_problem(self) -> str:
        text = self.components[RAY_HEAD].log.read_text(errors="replace")
        return "" if "will now block forever" in text else "still starting"

    def _absent(self) -> str:
        return _missing(self.flower, self._clients)


def processes_of(mark: str, sessions: set[int]) -> list[int]:
    """Pids of the processes of a deployment that still run: by the mark in their environment, or by their session."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            state, _, _, session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
            marked = f"{MARK}={mark}".encode() in (entry / "environ").read_bytes().split(b"\0")
        except (OSError, ValueError):
            continue
        if state != "Z" and (marked or int(session) in sessions):
            found.append(int(entry.name))
    return found


# ------------------------------------------------------------------------------------------------ a campaign on it
def deploy(
    experiment: Experiment,
    folder: Path,
    *,
    retry_failed: bool = False,
    witness: bool = True,
    on_round: OnRound | None = None,
    on_status: OnStatus | None = None,
    on_line: Callable[[str], None] = log.info,
    data: Path | None = None,
    environment: Mapping[str, Mapping[str, str]] | None = None,
) -> Summary:
    """Bring a deployment up on loopback, run an experiment on it, take it down. A rerun goes on where an earlier one stopped.

    witness: clients write the truth beside the copies, as in a simulation, so that the report has scores. It is never about
    data of a node's own.
    data: folder with client-0, client-1, …: each node's own images.
    """
    require_deployable(experiment)
    clients = experiment.cells[0].federation.clients
    own = [own_data(data, client) for client in range(clients)] if data is not None else [""] * clients
    run = RunFolder(folder.resolve())
    private_folder(run.path)
    own_ray = experiment.pool.workers if not experiment.pool.address else 0

    with _interruptible():
        deployment = Deployment(
            clients,
            run.path / "logs",
            attack_workers=own_ray,
            node_config=lambda client: " ".join(filter(None, ("witness=true" if witness else "", own[client]))),
            environment=environment,
        )
        begun = time.monotonic()
        with deployment:
            on_line(
                f"up in {time.monotonic() - begun:.0f} s: {len(deployment.components)} processes, logs in {run.path / 'logs'}"
            )
            return run_deployed(
                experiment,
                run,
                deployment.flower,
                ray_address=deployment.ray_address,
                retry_failed=retry_failed,
                witness=witness,
                watch=deployment.check,
                on_round=on_round,
                on_status=on_status,
            )


def own_data(folder: Path, client: int) -> str:
    """Node config of a client that trains on its own images, with a seed that the server does not learn.

    It stands on the SuperNode's command line, which every user of this machine can see in the process list.
    """
    images = folder.resolve() / f"client-{client}"
    if not images.is_dir():
        raise FedattackError(must("--data", f"a folder that holds client-{client}", str(folder)))
    return f'dataset="images:{images}" private-seed={secrets.randbelow(2**62)}'


def run_deployed(
    experiment: Experiment,
    run: RunFolder,
    flower: Flower,
    *,
    ray_address: str = "",
    retry_failed: bool = False,
    witness: bool = False,
    watch: Callable[[], None] = lambda: None,
    on_round: OnRound | None = None,
    on_status: OnStatus | None = None,
) -> Summary:
    """Submit an experiment to a SuperLink that is up, wait, and give what it left in the run folder, which both sides see.

    Raises DeploymentError where the run did not complete, whatever Flower's exit code says; what it did is kept, and a rerun
    goes on. An interrupt stops the run.
    """
    require_deployable(experiment)
    if retry_failed:
        forget_failures(run, experiment)
    recipe = run.path / "recipe.toml"
    write_atomically(recipe, to_toml(experiment).encode())
    history = _History(run, experiment, on_round)
    begun = time.time()
    with tempfile.TemporaryDirectory(prefix="fedattack-app-") as bundle:
        command = "fedattack " + shlex.join(sys.argv[1:])
        told: dict[str, str | bool] = {"config": str(recipe), "run-dir": str(run.path), "command": command}
        told |= {"witness": witness, "ray-address": ray_address, "ray-resource": ATTACK_RESOURCE if ray_address else ""}
        run_id = flower.submit(make_bundle(Path(bundle)), told)
    log_file = private_folder(run.path / "logs") / "run.log"

    def look() -> None:
        _heed()
        watch()
        history.tell()
        if on_status is not None:
            on_status(pool_status(run))

    try:
        status, details = _wait(flower, run_id, log_file, look)
    except BaseException:
        with suppress(Exception):
            flower.stop(run_id)
        raise
    history.tell()
    if status != "finished:completed":
        raise DeploymentError(
            f"the run ended as {status}: {details or 'no details'}; the end of {log_file}:\n{_tail(log_file)}"
        )
    if not run.report.exists() or run.report.stat().st_mtime < begun:
        raise DeploymentError(f"the run ended without a report; the end of {log_file}:\n{_tail(log_file)}")
    statuses = Counter(str(row["status"]) for row in read_rows(run.rows) if row.get("kind") == "attack")
    return Summary(run, run.report, dict(statuses), lost=_lost(run, experiment))


def _wait(flower: Flower, run_id: int, log_file: Path, look: Callable[[], None]) -> tuple[str, str]:
    """The run's verdict once it has ended. Its log ends when it does, so Flower is asked then, and now and then anyway.

    Flower's answers may fail on a busy machine; the third failure in a row is an error.
    """
    follower, asked, failures = flower.follow(run_id, log_file), time.monotonic(), 0
    try:
        while True:
            look()
            over = follower.poll() is not None
            if over or time.monotonic() - asked > ASK_SECONDS:
                try:
                    status, details = flower.verdict(run_id)
                    failures = 0
                except DeploymentError:
                    failures += 1
                    if failures == 3:
                        raise
                    status, details = "unknown", ""
                if status.startswith("finished"):
                    return status, details
                asked = time.monotonic()
                if over:
                    time.sleep(1.0)
                    follower = flower.follow(run_id, log_file)
            time.sleep(LOOK_SECONDS)
    finally:
        follower.terminate()
        follower.wait()


def _lost(run: RunFolder, experiment: Experiment) -> tuple[str, ...]:
    """What the server wrote down about replies that did not come or could not be copied, a line each."""
    lines = []
    for cells in groups_of(experiment):
        for incident in read_rows(run.federation(cells[0].federation_id).incidents):
            lines.append(
                f"{cells[0].title}: round {incident['round']}, {incident['client']}: {incident['problems'][0]}"
            )
    return tuple(lines)


class _History:
    """Tells of rounds as they appear in the run folder; not of those that were there before."""

    def __init__(self, run: RunFolder, experiment: Experiment, on_round: OnRound | None) -> None:
        self._on_round = on_round
        self._files: list[tuple[Settings, Path]] = [
            (cells[0], run.federation(cells[0].federation_id).history) for cells in groups_of(experiment)
        ]
        self._seen: dict[Path, set[int]] = {path: set() for _, path in self._files}
        for _, number, _, path in self._rows():
            self._seen[path].add(number)

    def tell(self) -> None:
        for settings, number, figures, path in self._rows():
            if number not in self._seen[path]:
                self._seen[path].add(number)
                if self._on_round is not None:
                    self._on_round(settings, number, figures)

    def _rows(self) -> Iterator[tuple[Settings, int, dict[str, float], Path]]:
        for settings, path in self._files:
            if path.exists():
                for row in list(read_rows(path)):
                    yield settings, int(row["round"]), {k: v for k, v in row.items() if k != "round"}, path


@contextmanager
def existing(
    superlink: str, root_certificates: Path, experiment: Experiment, *, wait_seconds: float = 120.0
) -> Iterator[Flower]:
    """Flower's commands against a SuperLink that is up, once it has the nodes that the experiment needs."""
    require_deployable(experiment)
    if not root_certificates.is_file():
        raise FedattackError(must("--root-certificates", "a PEM file", str(root_certificates)))
    needed, end = experiment.cells[0].federation.clients, time.monotonic() + wait_seconds
    with _interruptible(), tempfile.TemporaryDirectory(prefix="fedattack-flwr-") as home:
        flower = Flower(superlink, root_certificates, Path(home))
        while problem := flower.health() or _missing(flower, needed):
            if time.monotonic() > end:
                raise DeploymentError(f"the SuperLink at {superlink} was not ready after {wait_seconds:g} s: {problem}")
            _heed()
            time.sleep(1.0)
        yield flower


def _missing(flower: Flower, needed: int) -> str:
    """ "" where so many nodes are online, else what is missing. Flower's command may fail on a busy machine: so it says."""
    try:
        online = len(flower.online())
    except DeploymentError as error:
        return str(error)
    return "" if online >= needed else f"{online} of {needed} nodes are online"


# ------------------------------------------------------------------------------------------------ helpers
def _environment(**more: str) -> dict[str, str]:
    """This process's environment with Flower's commands on PATH, and plugins in the current folder importable last."""
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    python = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH", ""), str(Path.cwd()))))
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_ADDRESS", "FLWR_"))}
    return {**kept, **QUIET, "PATH": path, "PYTHONPATH": python, **more}


def _die_with_parent() -> None:
    """In a child before it becomes its command: SIGTERM when the launcher dies, however it dies (Linux only)."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def _short_folder() -> Path:
    """A temporary folder below which Ray's sockets fit: their paths may have 107 bytes, about 70 of which are Ray's own."""
    usual = tempfile.gettempdir()
    root = usual if len(usual) < 20 or not Path("/tmp").is_dir() else "/tmp"  # noqa: S108 (made with mode 0700)
    return Path(tempfile.mkdtemp(prefix="fedattack-", dir=root))


def free_ports(number: int) -> list[int]:
    """So many TCP ports of 127.0.0.1 that nobody listens on now."""
    held = [socket.socket() for _ in range(number)]
    try:
        for item in held:
            item.bind(("127.0.0.1", 0))
        return [item.getsockname()[1] for item in held]
    finally:
        for item in held:
            item.close()


def _tail(path: Path, lines: int = 15) -> str:
    if not path.exists():
        return "(no log)"
    return "\n".join("    " + line for line in path.read_text(errors="replace").splitlines()[-lines:])


def _reason(answer: Mapping[str, Any]) -> str:
    return str(answer.get("error-message") or answer.get("error") or dict(answer))


def _version() -> str:
    from fedattack import __version__

    return __version__


@contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM ends this process the way Ctrl-C does, so that what it started goes with it.

    Python drops an exception that a signal raises while a process is being forked, so loops ask `_heed`, too.
    """

    def interrupt(number: int, frame: Any) -> None:
        _INTERRUPTED.set()
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _INTERRUPTED.clear()
    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        _INTERRUPTED.clear()
        for number, handler in before.items():
            signal.signal(number, handler)


_INTERRUPTED = threading.Event()


def _heed() -> None:
    """Raises KeyboardInterrupt if there was one that got lost."""
    if _INTERRUPTED.is_set():
        raise KeyboardInterrupt


@contextmanager
def _undisturbed() -> Iterator[None]:
    """A second Ctrl-C does not cut the cleaning up short."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _register() -> None:
    parser = argparse.ArgumentParser(description="Admit the nodes whose public keys lie in a folder to a SuperLink.")
    parser.add_argument("superlink", help="host:port")
    parser.add_argument("root_certificates", type=Path)
    parser.add_argument("keys", type=Path, help="folder with supernode-*.ecdsa.pub")
    given = parser.parse_args()
    keys = sorted(given.keys.glob("supernode-*.ecdsa.pub"))
    if not keys:
        raise SystemExit(must("keys", "a folder with supernode-*.ecdsa.pub", str(given.keys)))
    with tempfile.TemporaryDirectory(prefix="fedattack-flwr-") as home:
        flower = Flower(given.superlink, given.root_certificates, Path(home))
        for key in keys:
            name = key.name.removesuffix(".ecdsa.pub")
            flower.register(key, name)
            print(f"{name} is admitted")


if __name__ == "__main__":
    _register()

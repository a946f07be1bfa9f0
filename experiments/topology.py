"""What a deployment consists of: the command of every component, once, for processes on loopback and for containers.

    SuperLink ──TLS, node key──┬─ SuperNode 0 ──TLS, secret── SuperExec: client 0's ClientApp
        │                      └─ SuperNode 1 ──TLS, secret── SuperExec: client 1's ClientApp
        └──TLS, secret── SuperExec: the ServerApp, with the attack pool ──token── Ray head and workers: the attacks

Every component is a process of its own (Flower's isolation mode "process"). experiments/deployment.py starts them here;
docker/compose.yml runs the same commands in containers, which a test compares word by word.
"""

import json
from dataclasses import dataclass
from pathlib import PurePosixPath

SUPERLINK = "superlink"
SERVERAPP = "serverapp"
RAY_HEAD = "ray-head"
RAY_WORKER = "ray-worker"
ATTACK_RESOURCE = "attack"
"""A Ray node offers as many of this custom resource as it may hold attack workers; nothing else can land there."""

QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
"""The environment of every component: no telemetry, no update check, nothing installed at run time."""


def supernode_name(client: int) -> str:
    return f"supernode-{client}"


def clientapp_name(client: int) -> str:
    return f"clientapp-{client}"


@dataclass(frozen=True)
class Site:
    """Where the components of one deployment find their files and one another."""

    credentials: PurePosixPath
    """Folder of `make_credentials`, as the components see it."""
    bind: str
    """Address on which servers listen."""
    superlink: str
    """host:port of the SuperLink, for those who connect to it."""
    supernodes: tuple[str, ...]
    """host:port of each SuperNode, for its SuperExec."""
    database: str = ""
    """Path of the SuperLink's state; empty: in memory."""

    def file(self, name: str) -> str:
        return str(self.credentials / name)

    # ---- Flower
    def superlink_command(self) -> list[str]:
        """Control, Fleet and Runtime API on one port; admits registered node keys and SuperExecs with its secret only."""
        return [
            "flower-superlink",
            "--isolation=process",
            "--enable-supernode-auth",
            "--disable-runtime-dependency-installation",
            *self._server(SUPERLINK, self.superlink),
            *([f"--database={self.database}"] if self.database else []),
        ]

    def serverapp_command(self) -> list[str]:
        """Starts a process for the ServerApp of every run that is submitted."""
        return self._superexec(SUPERLINK, self.superlink)

    def supernode_command(self, client: int, config: str = "") -> list[str]:
        """config: more of the node config, such as 'dataset="images:/data" private-seed=5'."""
        name, config = supernode_name(client), f" {config}" if config else ""
        return [
            "flower-supernode",
            "--isolation=process",
            f"--superlink={self.superlink}",
            f"--root-certificates={self.file('ca.pem')}",
            f"--auth-supernode-private-key={self.file(name + '.ecdsa')}",
            f"--node-config=partition-id={client} num-partitions={len(self.supernodes)}{config}",
            *self._server(name, self.supernodes[client]),
        ]

    def clientapp_command(self, client: int) -> list[str]:
        """Starts a process for every message to this client."""
        return self._superexec(supernode_name(client), self.supernodes[client])

    def _server(self, name: str, address: str) -> list[str]:
        return [
            f"--host={self.bind}",
            f"--port={address.rpartition(':')[2]}",
            f"--ssl-certfile={self.file(name + '.pem')}",
            f"--ssl-keyfile={self.file(name + '.key')}",
            f"--ssl-ca-certfile={self.file('ca.pem')}",
            f"--superexec-auth-secret-file={self.file(name + '.secret')}",
        ]

    def _superexec(self, name: str, address: str) -> list[str]:
        return [
            "flower-superexec",
            f"--runtime-api-address={address}",
            f"--root-certificates={self.file('ca.pem')}",
            f"--superexec-auth-secret-file={self.file(name + '.secret')}",
        ]


# ---------------------------------------------------------------- the attacks' own Ray cluster
def ray_environment(token: str) -> dict[str, str]:
    """For head, workers and the ServerApp: whoever does not have the token (a file) is refused. Ray binds all addresses."""
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": token}


def ray_head_command(port: int, *, attack_workers: int = 0, more: tuple[str, ...] = ()) -> list[str]:
    """attack_workers: how many may live on the head's own machine; none where there are worker nodes."""
    return ["ray", "start", "--head", f"--port={port}", "--include-dashboard=false", *_ray_node(attack_workers), *more]


def ray_worker_command(head: str, attack_workers: int) -> list[str]:
    """A machine of attack workers. Its GPUs are found by Ray itself."""
    return ["ray", "start", f"--address={head}", *_ray_node(attack_workers)]


def _ray_node(attack_workers: int) -> list[str]:
    offered = json.dumps({ATTACK_RESOURCE: attack_workers}) if attack_workers else "{}"
    return [
        "--num-cpus=0",
        f"--resources={offered}",
        "--object-store-memory=100000000",  # jobs are files: nothing of ours travels through Ray
        "--disable-usage-stats",
        "--block",
    ]

"""What of docker/compose.yml depends on the number of clients: `python -m experiments.compose --clients 4 docker/site`.

Writes site/clients.yml (for each client a SuperNode, the SuperExec of its ClientApp, and their network) and what
site/credentials lacks. Commands are those of experiments/topology.py.
"""

import argparse
import json
import re
import secrets
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from experiments.credentials import make_credentials
from experiments.topology import SUPERLINK, Site, clientapp_name, supernode_name
from fedattack.errors import FedattackError, must
from fedattack.store import write_atomically

SUPERLINK_PORT = 8000
SUPERNODE_PORT = 9094
RAY_PORT = 6379
SECRETS = PurePosixPath("/run/secrets")

HEADER = """\
# Made by `python -m experiments.compose`, which docker/up calls. Do not edit: it is written anew for another number of clients.
x-hardened: &hardened
  user: "${FEDATTACK_UID:?start with docker/up}:${FEDATTACK_GID:?start with docker/up}"
  read_only: true
  cap_drop: [ALL]
  security_opt: ["no-new-privileges:true"]
  restart: unless-stopped
  init: true
  tmpfs: ["/tmp", "/home/app:mode=1777"]

x-supernode: &supernode
  <<: *hardened
  image: fedattack/flower:${FEDATTACK_TAG:-dev}
  depends_on:
    register: { condition: service_completed_successfully }
  healthcheck: &reachable
    test:
      - CMD
      - python
      - -c
      - >-
        import os, ssl, urllib.request as web;
        web.urlopen("https://" + os.environ["SERVER"] + "/health", timeout=3,
        context=ssl.create_default_context(cafile="/run/secrets/ca.pem"))
    interval: 10s
    timeout: 5s
    retries: 12
  deploy: { resources: { limits: { cpus: "1", memory: 2g, pids: 256 } } }

x-clientapp: &clientapp
  <<: *hardened
  image: fedattack/client:${FEDATTACK_TAG:-dev}
  build: { context: .., dockerfile: docker/Dockerfile, target: client }
  healthcheck: *reachable
  deploy:
    resources:
      limits: { cpus: "${FEDATTACK_CLIENT_CPUS:-1}", memory: "${FEDATTACK_CLIENT_MEMORY:-3g}", pids: 256 }
"""


def docker_site(clients: int) -> Site:
    """Where the containers find their files and one another."""
    return Site(
        credentials=SECRETS,
        bind="0.0.0.0",
        superlink=f"{SUPERLINK}:{SUPERLINK_PORT}",
        supernodes=tuple(f"{supernode_name(client)}:{SUPERNODE_PORT}" for client in range(clients)),
        database="/state/superlink.db",
    )


def clients_yaml(clients: int, data: str = "", seeds: Sequence[int] = ()) -> str:
    """The compose file of so many clients.

    data: folder on the host with client-0, client-1, …: each client trains on its own, mounted read-only, with a private seed
    of its own (`seeds`), which the server does not learn. Relative to docker/ if it begins with ./ or ../ (without either,
    compose would take it for a volume's name), and without a colon, at which compose splits.
    """
    if clients < 1:
        raise FedattackError(must("clients", "at least 1", clients))
    if data and not re.fullmatch(r"(/|\.{1,2}/|~/)[^:]*", f"{data}/"):
        raise FedattackError(must("data", "a folder that begins with /, ./, ../ or ~/ and has no colon", data))
    if data and len(seeds) < clients:
        raise FedattackError(must("seeds", f"one for each of {clients} clients", len(seeds)))
    site, services, networks, files = docker_site(clients), [], [], []
    for client in range(clients):
        node, app, network = supernode_name(client), clientapp_name(client), f"client-{client}"
        own = f'dataset="images:/data" private-seed={seeds[client]}' if data else ""
        mount = f"    volumes: [{_quoted(f'{data}/client-{client}:/data:ro')}]\n" if data else ""
        mine = ["ca.pem", *(f"{node}.{kind}" for kind in ("pem", "key", "secret", "ecdsa"))]
        files += mine[1:]
        services.append(f"""\
  {node}:
    <<: *supernode
    command:
{_items(site.supernode_command(client, own))}
    environment: {{ SERVER: "localhost:{SUPERNODE_PORT}" }}
    secrets: [{", ".join(mine)}]
    networks: [federation, {network}]

  {app}:
    <<: *clientapp
    command:
{_items(site.clientapp_command(client))}
    environment: {{ SERVER: "{site.supernodes[client]}", OMP_NUM_THREADS: "1", MKL_NUM_THREADS: "1" }}
    secrets: [ca.pem, {node}.secret]
{mount}    depends_on:
      {node}: {{ condition: service_healthy }}
    networks: [{network}]
""")
        networks.append(f"  {network}: {{ internal: true }}")
    public = [f"{supernode_name(client)}.ecdsa.pub" for client in range(clients)]
    listed = [f"  {name}: {{ file: ./site/credentials/{name} }}" for name in (*files, *public)]
    register = f"  register:\n    secrets: [{', '.join(public)}]\n"
    return "\n".join((HEADER, "services:", *services, register, "networks:", *networks, "", "secrets:", *listed, ""))


def _items(command: Sequence[str]) -> str:
    return "\n".join(f"      - {_quoted(part)}" for part in command)


def _quoted(text: str) -> str:
    """A YAML string; `$` is doubled, since compose would take it for a variable."""
    return json.dumps(text.replace("$", "$$"), ensure_ascii=False)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Keys and compose file of N clients.")
    parser.add_argument("site", type=Path, help="folder for clients.yml and credentials/, e.g. docker/site")
    parser.add_argument("--clients", type=int, required=True)
    parser.add_argument(
        "--data", default="", help="folder on the host with client-0, client-1, …: images of the clients' own"
    )
    given = parser.parse_args()
    make_credentials(given.site / "credentials", given.clients)
    drawn = [secrets.randbelow(2**62) for _ in range(given.clients)]
    write_atomically(given.site / "clients.yml", clients_yaml(given.clients, given.data, drawn).encode())

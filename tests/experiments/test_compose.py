"""docker/: compose files, Dockerfile and scripts say what `fedattack deploy` does, name only what exists, and are tight."""

import fnmatch
import importlib.util
import json
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from experiments.compose import RAY_PORT, clients_yaml, docker_site
from experiments.credentials import make_credentials
from experiments.topology import QUIET, ray_environment, ray_head_command, ray_worker_command
from fedattack.errors import FedattackError

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "docker"
CLIENTS = 3

spec = importlib.util.spec_from_file_location("docker_requirements", DOCKER / "requirements.py")
assert spec
assert spec.loader
docker_requirements = importlib.util.module_from_spec(spec)
spec.loader.exec_module(docker_requirements)


def resolved(value):
    """A compose value with ${NAME:-default} replaced by the default, as compose does without an .env."""
    if isinstance(value, dict):
        return {key: resolved(item) for key, item in value.items()}
    if isinstance(value, list):
        return [resolved(item) for item in value]
    if isinstance(value, str):
        return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", value).replace("$$", "$")
    return value


@pytest.fixture(scope="module")
def compose() -> dict:
    return resolved(yaml.safe_load((DOCKER / "compose.yml").read_text()))


@pytest.fixture(scope="module")
def clients() -> dict:
    return resolved(yaml.safe_load(clients_yaml(CLIENTS)))


@pytest.fixture(scope="module")
def services(compose, clients) -> dict:
    """Both files as compose merges them: lists of secrets are joined."""
    merged = {**compose["services"]}
    for name, service in clients["services"].items():
        before = merged.get(name, {})
        merged[name] = {**before, **service, "secrets": before.get("secrets", []) + service.get("secrets", [])}
    return merged


# ------------------------------------------------------------------------------------------------ one source of truth
def test_every_flower_command_is_that_of_fedattack_deploy(services) -> None:
    site = docker_site(CLIENTS)
    assert services["superlink"]["command"] == site.superlink_command()
    assert services["serverapp"]["command"] == site.serverapp_command()
    for client in range(CLIENTS):
        assert services[f"supernode-{client}"]["command"] == site.supernode_command(client)
        assert services[f"clientapp-{client}"]["command"] == site.clientapp_command(client)
    assert f"partition-id=2 num-partitions={CLIENTS}" in str(services["supernode-2"]["command"])


def test_every_ray_command_is_that_of_fedattack_deploy(services) -> None:
    assert services["ray-head"]["command"] == ray_head_command(RAY_PORT)
    assert services["ray-worker"]["command"] == ray_worker_command(f"ray-head:{RAY_PORT}", 1)
    token = ray_environment("/run/secrets/ray.token")
    for name in ("ray-head", "ray-worker", "serverapp"):
        assert services[name]["environment"].items() >= token.items()
        assert "ray.token" in services[name]["secrets"]
    assert services["serverapp"]["environment"]["RAY_HEAD"] == f"ray-head:{RAY_PORT}"
    joining = (DOCKER / "join-ray.sh").read_text()
    for option in ray_worker_command("$RAY_HEAD", 0)[2:]:
        if option != "--block":
            plain = joining.replace('"', "").replace("'", "")
            assert option in plain, option


def test_the_images_carry_the_environment_of_every_component() -> None:
    text = (DOCKER / "Dockerfile").read_text()
    for name, value in QUIET.items():
        assert f"{name}={value}" in text


def test_what_registers_and_submits_is_what_there_is(services) -> None:
    register = services["register"]["command"]
    assert register == [
        "python",
        "-m",
        "experiments.deployment",
        "superlink:8000",
        "/run/secrets/ca.pem",
        "/run/secrets",
    ]
    assert set(services["register"]["secrets"]) == {"ca.pem", *(f"supernode-{i}.ecdsa.pub" for i in range(CLIENTS))}
    help_text = subprocess.run(
        [sys.executable, "-c", "from fedattack.cli import main; main()", "deploy", "--help"],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"},
        timeout=120,
    ).stdout
    for word in services["campaign"]["entrypoint"]:
        if word.startswith("--"):
            assert word.split("=")[0] in help_text


def test_another_number_of_clients_is_one_number_and_own_data_stays_with_its_client() -> None:
    for wrong in (0, -1):
        with pytest.raises(FedattackError, match="at least 1"):
            clients_yaml(wrong)
    with pytest.raises(FedattackError, match="one for each"):
        clients_yaml(2, "/data", [1])
    found = yaml.safe_load(clients_yaml(10, "/srv/data", list(range(100, 110))))["services"]
    assert len(found) == 2 * 10 + 1
    assert found["clientapp-7"]["volumes"] == ["/srv/data/client-7:/data:ro"]
    assert 'dataset="images:/data" private-seed=107' in str(found["supernode-7"]["command"])
    assert not any("/srv/data" in json.dumps(service) for name, service in found.items() if "clientapp" not in name)


@pytest.mark.parametrize("wrong", ["srv/data", "data", ".hidden/data", "/srv:ro/data"])
def test_a_data_folder_that_compose_would_take_for_something_else_is_refused(wrong) -> None:
    with pytest.raises(FedattackError, match="data must be"):
        clients_yaml(1, wrong, [1])


@pytest.mark.parametrize("folder", ["./data", "../data", "~/data", '/srv/a "b"\\c', "/srv/$HOME/dätä"])
def test_a_data_folder_reaches_compose_as_it_is(folder) -> None:
    found = resolved(yaml.safe_load(clients_yaml(1, folder, [1])))["services"]
    assert found["clientapp-0"]["volumes"] == [f"{folder}/client-0:/data:ro"]


# ------------------------------------------------------------------------------------------------ names that exist
def test_every_secret_is_defined_and_is_a_file_that_is_made(compose, clients, services, tmp_path) -> None:
    make_credentials(tmp_path, CLIENTS)
    made = {path.name for path in tmp_path.iterdir()}
    defined = {**compose["secrets"], **clients["secrets"]}
    for name, secret in defined.items():
        assert secret["file"] == f"./site/credentials/{name}"
        assert name in made
    for service in services.values():
        assert set(service.get("secrets", [])) <= set(defined)
    assert "ca.key" not in defined  # what signs is given to nobody
    for name, service in services.items():
        for path in re.findall(r"/run/secrets/([\w.-]+)", json.dumps(service)):
            assert path in service["secrets"], f"{name} reads {path}"


def test_a_clients_keys_are_given_to_that_client_only(services) -> None:
    for client in range(CLIENTS):
        holders = {
            name
            for name, service in services.items()
            for secret in service.get("secrets", [])
            if secret.startswith(f"supernode-{client}.") and not secret.endswith(".pub")
        }
        assert holders == {f"supernode-{client}", f"clientapp-{client}"}
        assert services[f"clientapp-{client}"]["secrets"] == ["ca.pem", f"supernode-{client}.secret"]


def test_networks_dependencies_targets_and_variables_exist(compose, clients, services) -> None:
    networks = {**compose["networks"], **clients["networks"]}
    targets = set(re.findall(r"^FROM \S+ AS (\S+)$", (DOCKER / "Dockerfile").read_text(), re.M))
    for name, service in services.items():
        if not name.startswith("register") or "image" in service:
            image = re.fullmatch(r"fedattack/(\w+):dev", service["image"])
            assert image, name
            assert image[1] in targets
            if "build" in service:
                assert service["build"]["target"] == image[1]
                assert (DOCKER / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
        assert set(service.get("networks", [])) <= set(networks)
        assert set(service.get("depends_on", {})) <= set(services)
        for other, condition in service.get("depends_on", {}).items():
            if condition["condition"] == "service_healthy":
                assert "healthcheck" in services[other]
    example = (DOCKER / ".env.example").read_text()
    text = "".join((DOCKER / name).read_text() for name in ("compose.yml", "compose.gpu.yml")) + clients_yaml(1)
    known = set(re.findall(r"^(\w+)=", example, re.M))
    assert set(re.findall(r"(?<!\$)\$\{(\w+)", text)) <= known


def test_what_the_dockerfile_copies_exists_and_reaches_the_builder() -> None:
    lines = (ROOT / ".dockerignore").read_text().split()
    for copied in re.findall(r"^COPY (?!--from)(?:--\S+ )?(.+)$", (DOCKER / "Dockerfile").read_text(), re.M):
        for source in copied.split()[:-1]:
            assert (ROOT / source).exists(), source
            assert any(line[1:] == source or source.startswith(line[1:] + "/") for line in lines if line[0] == "!")
    for private in ("docker/site/credentials/ca.key", "runs/demo/report.html", ".git/config", "docker/.env"):
        kept = [line for line in lines if line[0] == "!" and fnmatch.fnmatch(private, line[1:] + "*")]
        assert lines[0] == "*"
        assert not kept


# ------------------------------------------------------------------------------------------------ tight
def test_every_service_is_hardened_and_limited(services) -> None:
    for name, service in services.items():
        assert service["user"].startswith("${FEDATTACK_UID:?"), name  # no default: never root by accident
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert "privileged" not in service
        if "profiles" not in service:
            limits = service["deploy"]["resources"]["limits"]
            assert {"cpus", "memory", "pids"} <= set(limits)
        for volume in service.get("volumes", []):
            assert "docker.sock" not in volume


def test_one_port_is_published_and_only_on_loopback(services) -> None:
    published = {name: service["ports"] for name, service in services.items() if "ports" in service}
    assert published == {"superlink": ["127.0.0.1:8000:8000"]}
    assert not any("network_mode" in service and service["network_mode"] == "host" for service in services.values())


def test_who_can_reach_whom(compose, clients, services) -> None:
    inside = {
        name for name, network in {**compose["networks"], **clients["networks"]}.items() if network.get("internal")
    }
    assert inside == {"federation", "attacks", *(f"client-{i}" for i in range(CLIENTS))}
    for client in range(CLIENTS):
        assert services[f"clientapp-{client}"]["networks"] == [f"client-{client}"]
        assert services[f"supernode-{client}"]["networks"] == ["federation", f"client-{client}"]
    assert {name for name, service in services.items() if "attacks" in service.get("networks", [])} == {
        "serverapp",
        "ray-head",
        "ray-worker",
    }


def test_long_running_services_say_whether_they_are_well(services) -> None:
    for name, service in services.items():
        if service["restart"] != "no":
            assert service["healthcheck"]["test"][0] == "CMD", name
            if service["healthcheck"]["test"][1] == "python":
                compile(service["healthcheck"]["test"][3], name, "exec")


def test_the_gpu_is_for_the_attack_worker_alone(services) -> None:
    gpu = resolved(yaml.safe_load((DOCKER / "compose.gpu.yml").read_text()))
    assert set(gpu["services"]) == {"ray-worker"}
    devices = gpu["services"]["ray-worker"]["deploy"]["resources"]["reservations"]["devices"]
    assert [device["capabilities"] for device in devices] == [["gpu"]]
    assert not any("reservations" in json.dumps(service) for service in services.values())


# ------------------------------------------------------------------------------------------------ images
def test_images_get_what_pyproject_names_and_attackers_and_clients_less() -> None:
    found = {
        role: docker_requirements.requirements(role, ROOT / "pyproject.toml")
        for role in ("flower", "client", "server", "attacker")
    }
    names = {role: {docker_requirements.name_of(line) for line in lines} for role, lines in found.items()}
    assert names["flower"] == {"flwr"}
    assert "flwr[simulation]" in str(found["server"])
    assert "ray" not in names["client"]
    assert "[simulation]" not in str(found["client"])
    assert names["attacker"] >= {"torch", "ray", "safetensors", "diffusers", "pydantic"}
    assert "flwr" not in names["attacker"]
    assert all(left <= names["server"] for left in docker_requirements.LEFT_OUT.values())


def test_an_attack_runs_with_what_its_image_holds(tmp_path) -> None:
    """An attack worker's code, without any package that its image lacks."""
    app = tmp_path / "app"
    for package in ("fedattack", "attacks", "strategies"):
        shutil.copytree(ROOT / package, app / package, ignore=shutil.ignore_patterns("__pycache__"))
    modules = {"scikit-image": "skimage", "flwr-datasets": "flwr_datasets"}
    refused = [modules.get(name, name) for name in docker_requirements.LEFT_OUT["attacker"]] + [
        "experiments",
        "clients",
    ]
    code = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {refused!r}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse())
sys.path.insert(0, {str(app)!r})
import torch
from pathlib import Path
from fedattack.jobs import Job
from fedattack.models import build_model
from fedattack.store import RunFolder, save_update
from fedattack.types import Update
from strategies.attack_pool import AttackWorker
import attacks, strategies
assert attacks.__file__.startswith({str(app)!r}) and strategies.__file__.startswith({str(app)!r})
context = {{"model": {{"name": "mlp", "options": {{"hidden": [3]}}}}, "image_shape": [1, 4, 4], "num_classes": 2,
           "task": {{"name": "classification"}}}}
model = build_model("mlp", image_shape=(1, 4, 4), num_classes=2, seed=0, hidden=[3])
sent = {{name: tensor.detach() for name, tensor in model.named_parameters()}}
run = RunFolder(Path({str(tmp_path / "run")!r}))
update = Path({str(tmp_path / "update.safetensors")!r})
save_update(update, Update(1, "client-0", sent, {{n: torch.ones_like(t) for n, t in sent.items()}}, "gradient", 1), context)
known = {{"image_shape": [1, 4, 4], "batch_size": 1, "num_classes": 2}}
Job("one", str(update), "linear-leak", {{}}, known, context=context).save(run.jobs)
worker = AttackWorker(str(run.path), 0, 1)
print(worker.run("one", "session", 3))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["ok"], (tmp_path / "run/results").exists() and [
        path.read_text() for path in (tmp_path / "run/results").rglob("*.json")
    ]


# ------------------------------------------------------------------------------------------------ scripts
@pytest.fixture
def site(tmp_path) -> Path:
    """A copy of docker/, and a `docker` that only writes down how it is called."""
    shutil.copytree(DOCKER, tmp_path / "docker", ignore=shutil.ignore_patterns("site", ".env", "__pycache__"))
    fake = tmp_path / "bin" / "docker"
    fake.parent.mkdir()
    fake.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n')
    fake.chmod(0o755)
    return tmp_path


def call(site: Path, script: str, *arguments: str) -> tuple[int, list[str]]:
    (site / "calls").unlink(missing_ok=True)
    path = f"{site / 'bin'}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run([site / "docker" / script, *arguments], env={**os.environ, "PATH": path}, cwd="/", timeout=30)
    calls = (site / "calls").read_text().splitlines() if (site / "calls").exists() else []
    return done.returncode, calls


def test_one_command_up_one_to_run_one_down(site) -> None:
    example = (DOCKER / ".env.example").read_text()
    (site / "docker/.env").write_text(example.replace("_UID=", "_UID=1000").replace("_GID=", "_GID=1000"))
    code, calls = call(site, "up", "7")
    assert code == 0
    assert calls == [
        "compose --file compose.yml --profile tools build prepare",
        "compose --file compose.yml --profile tools run --rm prepare",
        "compose --profile tools build",  # with site/clients.yml, which names the clients' image
        "compose up --detach --wait --remove-orphans",
    ]
    assert "FEDATTACK_CLIENTS=7\n" in (site / "docker/.env").read_text()
    assert (site / "docker/site/state").stat().st_mode & 0o777 == 0o700
    assert (site / "runs").stat().st_mode & 0o777 == 0o700
    assert call(site, "run", "quick.toml", "federation.rounds=1") == (
        0,
        ["compose --profile tools run --rm campaign --out /runs/quick quick.toml federation.rounds=1"],
    )
    assert call(site, "run")[0] != 0
    assert call(site, "down") == (0, ["compose --profile tools down --remove-orphans"])


@pytest.mark.skipif(os.getuid() != 0, reason="needs to be root")
def test_up_does_not_run_containers_as_root_by_itself(site) -> None:
    code, calls = call(site, "up")
    assert (code, calls) == (2, [])
    assert not (site / "docker/.env").exists()


@pytest.mark.skipif(os.getuid() == 0, reason="needs to be no root")
def test_up_makes_the_containers_run_as_the_user(site) -> None:
    assert call(site, "up")[0] == 0
    assert f"FEDATTACK_UID={os.getuid()}\n" in (site / "docker/.env").read_text()


def test_scripts_are_programs() -> None:
    for name in ("up", "run", "down", "join-ray.sh"):
        assert (DOCKER / name).stat().st_mode & stat.S_IXUSR
        assert (DOCKER / name).read_text().startswith("#!/bin/sh\n")
        subprocess.run(["sh", "-n", DOCKER / name], check=True)

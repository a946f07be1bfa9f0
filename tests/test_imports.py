"""Import boundaries, each in a process of its own: attacks and jobs also run on machines that have only torch."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("flwr", "ray", "flwr_datasets", "datasets", "diffusers", "lpips", "skimage", "opacus", "matplotlib")
SERVER_ONLY = (*HEAVY, "pydantic", "typer", "rich", "jinja2", "pyarrow", "pandas", "scipy", "torchvision", "PIL")

BLOCKER = """
import sys

class Blind:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in {blocked!r} else self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Blind(finder) for finder in sys.meta_path]
for name in {blocked!r}:
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"{{name}} could be imported: this test proves nothing")
"""

SMALL_RUN = """
import torch
from fedattack.models import build_model
from fedattack.registry import ATTACKS
from fedattack.seeding import derive_generator
from fedattack.tasks import Classification, simulate
from fedattack.types import Knowledge, Update

torch.set_num_threads(1)
shape, task = (1, 4, 4), Classification()
model = build_model("mlp", image_shape=shape, num_classes=3, seed=0, hidden=(8,), activation="sigmoid")
image = torch.rand((1, *shape), generator=derive_generator(0, "image"))
private = {"images": image, "labels": torch.tensor([1])}
sent = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
received = simulate(model, sent, task, [private], kind="gradient")
update = Update(round=1, client="0", sent=sent, received=received, kind="gradient")
known = Knowledge(image_shape=shape, batch_size=1, num_classes=3)
for name, parameters in (("linear-leak", {}), ("idlg", {"iterations": 20, "start": "grey"})):
    attack = ATTACKS.create(name, **parameters)
    found = attack.reconstruct(update, model, task, known, generator=derive_generator(0, name))
    assert float((found.images - image).abs().max()) < 1e-2, name
"""


def run(code: str, *options: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter in the repository's root."""
    done = subprocess.run(
        [sys.executable, *options, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def blocker(blocked: tuple[str, ...]) -> str:
    return BLOCKER.format(blocked=blocked)


def test_attacks_import_and_run_where_there_is_only_torch():
    """Every registered attack module imports, and a closed form and a search find their image."""
    every = "import importlib, attacks\nfor target in attacks.ATTACKS.values():\n"
    every += "    module, _, name = target.partition(':')\n    getattr(importlib.import_module(module), name)\n"
    run(blocker(SERVER_ONLY) + every + SMALL_RUN)


def test_jobs_run_without_flower_ray_and_pydantic(tmp_path):
    code = blocker(SERVER_ONLY) + SMALL_RUN
    code += f"""
from pathlib import Path
from fedattack.jobs import Job, run_job
from fedattack.store import save_update
folder = Path({str(tmp_path)!r})
context = {{"model": {{"name": "mlp", "options": {{"hidden": [8], "activation": "sigmoid"}}}},
           "image_shape": list(shape), "num_classes": 3, "task": {{"name": "classification"}}}}
save_update(folder / "u.safetensors", update, context)
job = Job(job="j", update=str(folder / "u.safetensors"), attack="linear-leak",
          knowledge={{"image_shape": list(shape), "batch_size": 1, "num_classes": 3}}, device="cpu")
outcome = run_job(job, folder / "results")
assert outcome.status == "ok", outcome.error
"""
    run(code)


def test_no_attack_names_a_forbidden_room():
    """The attacks' own sources import fedattack, torch, attacks and the standard library only."""
    import ast

    allowed = {"fedattack", "attacks", "torch", *sys.stdlib_module_names}
    inside_functions = {"diffusers"}
    for path in sorted((ROOT / "attacks").rglob("*.py")):
        tree = ast.parse(path.read_text())
        top = {id(node) for node in tree.body}
        for node in ast.walk(tree):
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path.name}: relative import"
                modules = [node.module or ""]
            for module in modules:
                root = module.partition(".")[0]
                assert root in allowed or (root in inside_functions and id(node) not in top), f"{path.name}: {module}"


@pytest.mark.parametrize(
    "module", ["fedattack", "fedattack.jobs", "fedattack.knowledge", "fedattack.registry", "fedattack.store", "attacks"]
)
def test_no_heavy_module_is_imported_by_the_shared_language(module):
    code = f"import sys, {module}\nprint(sorted(set(sys.modules) & {set(HEAVY)!r}))"
    assert run(code).stdout.strip() == "[]"


def test_registry_and_errors_need_no_torch():
    code = "import sys, fedattack.errors, fedattack.registry, attacks\nprint('torch' in sys.modules)"
    assert run(code).stdout.strip() == "False"


@pytest.mark.skipif(not (ROOT / "fedattack" / "cli").exists(), reason="there is no command line yet")
def test_the_command_line_starts_without_torch():
    """`fedattack --help` answers at once: torch, Flower and Ray are imported by the commands that need them."""
    done = run("import fedattack.cli", "-X", "importtime")
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines() if "|" in line}
    assert "fedattack" in imported
    assert not imported & {"torch", "flwr", "ray", "numpy", *HEAVY}

"""Everything on disk: updates, truths and reconstructions as safetensors, rows as JSON lines, and the run folder.

No pickle anywhere. Files appear whole or not at all (written beside, then renamed), so a killed process leaves nothing
half-written and a rerun can trust what it finds. Folders that hold private data are created with mode 0700.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedattack.errors import FedattackError, MalformedUpdate, must
from fedattack.types import Reconstruction, Update

_TENSOR_FIELDS = ("labels", "timesteps", "timestep_posterior", "noise", "trajectory")


# ------------------------------------------------------------------------------------------------ plain files
def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that no reader ever sees a part of it; parent folders are made with mode 0700."""
    private_folder(path.parent)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    beside.write_bytes(data)
    beside.replace(path)


def private_folder(path: Path) -> Path:
    """The folder, made with its parents for this user only if it is not there."""
    for folder in (*reversed(path.parents), path):
        if not folder.is_dir():
            folder.mkdir(mode=0o700, exist_ok=True)
    return path


def write_json(path: Path, value: Any) -> None:
    write_atomically(path, (json.dumps(value, indent=1, sort_keys=True, default=str, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """JSON lines. NaN and infinities have no place in JSON: they are written as null."""
    lines = [json.dumps(finite(row), default=str, allow_nan=False) for row in rows]
    write_atomically(path, "".join(line + "\n" for line in lines).encode())


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Add a line; one that a crash cut off before it is closed first, so that this one is whole."""
    private_folder(path.parent)
    with path.open("a+b") as file:
        size = file.seek(0, os.SEEK_END)
        if size and (file.seek(size - 1), file.read(1))[1] != b"\n":
            file.write(b"\n")
        file.write((json.dumps(finite(row), default=str, allow_nan=False) + "\n").encode())


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a JSON lines file; none where it does not exist. A last line cut off by a crash is passed over."""
    if not path.exists():
        return
    for line in path.read_text().splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue


def write_tensors(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """A safetensors file; `about` (JSON) travels in its header under "fedattack"."""
    from safetensors.torch import save_file

    private_folder(path.parent)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    flat = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    save_file(flat, beside, metadata={"fedattack": json.dumps(dict(about), sort_keys=True)})
    beside.replace(path)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and `about` of a file that `write_tensors` wrote. Raises FedattackError where it is none."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get("fedattack", "{}"))
            if not isinstance(about, dict):
                raise FedattackError(must(f"the header of {path}", "a JSON object", about))
            return {name: file.get_tensor(name) for name in file.keys()}, about  # noqa: SIM118 (it is no dict)
    except FileNotFoundError as error:
        raise FedattackError(must(str(path), "an existing safetensors file", "no such file")) from error
    except (SafetensorError, json.JSONDecodeError, OSError) as error:
        raise FedattackError(must(str(path), "a safetensors file of fedattack", str(error))) from error


# ------------------------------------------------------------------------------------------------ updates
def save_update(path: Path, update: Update, context: Mapping[str, Any] | None = None) -> None:
    """One self-contained file: what was sent and what came back; `context` says how to rebuild model and task."""
    tensors = {f"sent/{name}": tensor for name, tensor in update.sent.items()}
    tensors |= {f"received/{name}": tensor for name, tensor in update.received.items()}
    about = {
        "type": "update",
        "round": update.round,
        "client": update.client,
        "kind": update.kind,
        "num_examples": update.num_examples,
        "context": dict(context or {}),
    }
    write_tensors(path, tensors, about)


def load_update(path: Path) -> tuple[Update, dict[str, Any]]:
    """The update and the context it was saved with. Raises MalformedUpdate where the file is something else."""
    tensors, about = read_tensors(path)
    if about.get("type") != "update":
        raise MalformedUpdate(must(str(path), "a file of type 'update'", about.get("type")))
    parts: dict[str, dict[str, Tensor]] = {"sent": {}, "received": {}}
    try:
        for name, tensor in tensors.items():
            part, _, rest = name.partition("/")
            parts[part][rest] = tensor
        update = Update(
            round=about["round"],
            client=about["client"],
            sent=parts["sent"],
            received=parts["received"],
            kind=about["kind"],
            num_examples=about["num_examples"],
        )
        return update, dict(about["context"])
    except (KeyError, TypeError, ValueError) as error:
        raise MalformedUpdate(f"{path} lacks a part of an update: {error}") from error


@dataclass
class UpdateFolder:
    """The simplest sink of a curious server: every copied update becomes one file in a folder.

    `context` is written into every file (model, task, training facts), so that a file is enough to attack it later.
    """

    path: Path
    context: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.path = Path(self.path)

    def __call__(self, update: Update) -> Path:
        path = self.file(update)
        save_update(path, update, self.context)
        return path

    def file(self, update: Update) -> Path:
        """Where an update of this client and round goes."""
        return self.path / f"{update_name(update.client, update.round)}.safetensors"

    def digest(self, update: Update) -> str | None:
        """SHA-256 of that file as it is now, None where there is none."""
        path = self.file(update)
        if not path.exists():
            return None
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def update_name(client: str, server_round: int) -> str:
    """ "client-3-round-1": how a client's files of one round are called, everywhere; safe as a file name.

    Names that had to be changed for that get a digest, so that no two clients share a file.
    """
    safe = re.sub(r"[^A-Za-z0-9_.-]", "_", client)[:80]
    if safe != client:
        safe += "-" + hashlib.sha256(client.encode(errors="replace")).hexdigest()[:8]
    return f"{safe}-round-{server_round}"


# ------------------------------------------------------------------------------------------------ reconstructions
def save_reconstruction(path: Path, found: Reconstruction) -> None:
    tensors = {"images": found.images}
    tensors |= {name: getattr(found, name) for name in _TENSOR_FIELDS if getattr(found, name) is not None}
    about = {
        "type": "reconstruction",
        "losses": [finite(loss) for loss in found.losses],
        "steps": found.steps,
        "seconds": found.seconds,
        "diagnostics": finite(found.diagnostics),
        "represents": found.represents,
        "trajectory_steps": list(found.trajectory_steps),
    }
    write_tensors(path, tensors, about)


def load_reconstruction(path: Path) -> Reconstruction:
    tensors, about = read_tensors(path)
    if about.get("type") != "reconstruction" or "images" not in tensors:
        raise FedattackError(must(str(path), "a file of type 'reconstruction'", about.get("type")))
    return Reconstruction(
        images=tensors["images"],
        labels=tensors.get("labels"),
        timesteps=tensors.get("timesteps"),
        timestep_posterior=tensors.get("timestep_posterior"),
        noise=tensors.get("noise"),
        trajectory=tensors.get("trajectory"),
        trajectory_steps=tuple(about.get("trajectory_steps", ())),
        losses=tuple(float("nan") if loss is None else loss for loss in about["losses"]),
        steps=about["steps"],
        seconds=about["seconds"],
        diagnostics={k: float("nan") if v is None else v for k, v in about["diagnostics"].items()},
        represents=about.get("represents", "images"),
    )


def save_png(path: Path, image: Tensor) -> None:
    """An image (C,H,W) in [0, 1] pixel by pixel as PNG: clamped and rounded to 8 bits, never stretched."""
    from io import BytesIO

    from PIL import Image

    pixels = (image.detach().cpu().double().clamp(0, 1) * 255).round().to(torch.uint8)
    array = pixels[0].numpy() if len(pixels) == 1 else pixels[:3].permute(1, 2, 0).numpy()
    buffer = BytesIO()
    Image.fromarray(array).save(buffer, format="PNG")
    write_atomically(path, buffer.getvalue())


# ------------------------------------------------------------------------------------------------ the run folder
@dataclass(frozen=True)
class FederationFolder:
    """What one federation of a run leaves behind. `truth` is written by the witness, read by metrics and oracles only."""

    path: Path

    @property
    def updates(self) -> Path:
        return self.path / "updates"

    @property
    def truth(self) -> Path:
        return self.path / "truth"

    @property
    def public_images(self) -> Path:
        return self.path / "public.safetensors"

    @property
    def settings(self) -> Path:
        return self.path / "settings.json"

    @property
    def history(self) -> Path:
        return self.path / "history.jsonl"

    @property
    def incidents(self) -> Path:
        return self.path / "incidents.jsonl"

    @property
    def model(self) -> Path:
        return self.path / "model.safetensors"

    @property
    def progress(self) -> Path:
        """Where an interrupted federation stands after its last completed round."""
        return self.path / "progress.safetensors"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def checkpoint(self, server_round: int) -> Path:
        """The folder of the checkpoint after a round: "round-012"."""
        return self.checkpoints / f"round-{server_round:03d}"

    @property
    def done(self) -> Path:
        """Its existence says that the federation trained to its end."""
        return self.path / "done.json"


@dataclass(frozen=True)
class RunFolder:
    """One run: federations, attack jobs, results, rows, pictures, report."""

    path: Path

    def federation(self, name: str) -> FederationFolder:
        return FederationFolder(self.path / "federations" / name)

    @property
    def jobs(self) -> Path:
        return self.path / "jobs"

    @property
    def results(self) -> Path:
        return self.path / "results"

    @property
    def scores(self) -> Path:
        return self.path / "scores"

    @property
    def floors(self) -> Path:
        return self.path / "floors"

    @property
    def images(self) -> Path:
        return self.path / "images"

    @property
    def config(self) -> Path:
        return self.path / "config.toml"

    @property
    def about(self) -> Path:
        return self.path / "about.json"

    @property
    def rows(self) -> Path:
        return self.path / "rows.jsonl"

    @property
    def figures(self) -> Path:
        return self.path / "figures"

    @property
    def drawn(self) -> Path:
        """A line for each figure that the recipe asks for: its files, or why there are none."""
        return self.path / "figures.jsonl"

    @property
    def report(self) -> Path:
        return self.path / "report.html"


def finite(value: Any) -> Any:
    """A JSON value with NaN and infinities, which JSON does not know, as None."""
    if isinstance(value, float):
        return value if abs(value) < float("inf") else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value

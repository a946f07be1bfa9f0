"""What is on disk: round trips, damaged files, atomicity, modes and names."""

import json
import math
import os
import stat
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedattack import store
from fedattack.errors import FedattackError, MalformedUpdate
from fedattack.store import (
    FederationFolder,
    RunFolder,
    UpdateFolder,
    append_row,
    finite,
    load_reconstruction,
    load_update,
    private_folder,
    read_json,
    read_rows,
    read_tensors,
    save_png,
    save_reconstruction,
    save_update,
    update_name,
    write_atomically,
    write_json,
    write_rows,
    write_tensors,
)
from fedattack.types import Reconstruction, Update


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def an_update(**changes: object) -> Update:
    sent = {
        "conv.weight": torch.randn(2, 3, 5, 5, dtype=torch.float64),
        "norm.num_batches_tracked": torch.tensor(7),
        "half": torch.randn(3).half(),
        "brain": torch.randn(3).bfloat16(),
        "empty": torch.empty(0, 4),
        "a/b/c": torch.tensor([1.5]),
        "": torch.tensor([2.5]),
    }
    received = {name: tensor + 1 for name, tensor in sent.items()}
    update = Update(round=3, client="client 7/é", sent=sent, received=received, kind="gradient", num_examples=0)
    return replace(update, **changes)


def assert_same_state(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert torch.equal(found[name], tensor), name


# ------------------------------------------------------------------------------------------------ round trips
@pytest.mark.parametrize("changes", [{}, {"num_examples": None}, {"kind": "weights"}, {"received": {}}, {"sent": {}}])
def test_updates_come_back_as_they_were(tmp_path, changes):
    update, context = an_update(**changes), {"model": {"name": "mlp", "options": {"hidden": [3]}}, "none": None}
    path = tmp_path / "u.safetensors"
    save_update(path, update, context)
    found, found_context = load_update(path)
    assert (found.round, found.client, found.kind, found.num_examples) == (
        update.round,
        update.client,
        update.kind,
        update.num_examples,
    )
    assert_same_state(found.sent, update.sent)
    assert_same_state(found.received, update.received)
    assert found_context == context


def test_views_shared_and_graph_tensors_can_be_saved(tmp_path):
    """A state dict may hold tied weights, transposed views and tensors that require a gradient."""
    base = torch.arange(12.0).reshape(3, 4)
    state = {"tied": base, "again": base, "view": base.T, "slice": base[:, 1], "leaf": base.clone().requires_grad_()}
    update = Update(round=1, client="0", sent=state, received=state, kind="weights")
    save_update(tmp_path / "u.safetensors", update)
    found, _ = load_update(tmp_path / "u.safetensors")
    for name, tensor in state.items():
        assert torch.equal(found.sent[name], tensor.detach())


def test_nan_and_infinity_in_tensors_survive(tmp_path):
    state = {"w": torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0])}
    save_update(tmp_path / "u.safetensors", Update(round=1, client="0", sent=state, received={}, kind="gradient"))
    found, _ = load_update(tmp_path / "u.safetensors")
    assert found.sent["w"].numpy().tobytes() == state["w"].numpy().tobytes()


@pytest.mark.parametrize("batch", [0, 1, 3])
def test_reconstructions_come_back_as_they_were(tmp_path, batch):
    found = Reconstruction(
        images=torch.rand(batch, 3, 7, 5),
        labels=torch.arange(batch),
        timesteps=torch.arange(batch) + 5,
        noise=torch.randn(batch, 3, 7, 5, dtype=torch.float64),
        losses=(1.0, float("nan"), 0.25, float("inf")),
        steps=4,
        seconds=1.5,
        diagnostics={"loss": 0.25, "spread": float("nan")},
        represents="user",
        trajectory=torch.rand(2, batch, 3, 7, 5),
        trajectory_steps=(0, 3),
    )
    path = tmp_path / "r.safetensors"
    save_reconstruction(path, found)
    again = load_reconstruction(path)
    for name in ("images", "labels", "timesteps", "noise", "trajectory"):
        assert torch.equal(getattr(again, name), getattr(found, name))
        assert getattr(again, name).dtype == getattr(found, name).dtype
    assert again.losses[0] == 1.0
    assert again.losses[2] == 0.25
    assert math.isnan(again.losses[1])
    assert math.isnan(again.losses[3])  # JSON has no infinity either: not finite is all that is kept
    assert (again.steps, again.seconds, again.diagnostics["loss"]) == (4, 1.5, 0.25)
    assert math.isnan(again.diagnostics["spread"])
    assert again.represents == "user"
    assert again.trajectory_steps == (0, 3)


def test_a_bare_reconstruction_has_none_where_it_had_none(tmp_path):
    save_reconstruction(tmp_path / "r.safetensors", Reconstruction(images=torch.rand(1, 1, 2, 2)))
    again = load_reconstruction(tmp_path / "r.safetensors")
    assert again.labels is again.timesteps is again.noise is again.trajectory is None
    assert again.trajectory_steps == ()
    assert again.losses == ()
    assert again.diagnostics == {}
    assert again.represents == "images"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@given(st.lists(st.dictionaries(st.text(max_size=4), json_values, max_size=3), max_size=4))
@settings(max_examples=60, deadline=None)
def test_rows_round_trip_with_null_for_what_json_does_not_know(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    write_rows(path, rows)
    assert list(read_rows(path)) == [finite(row) for row in rows]
    for row in rows:
        append_row(path, row)
    assert list(read_rows(path)) == [finite(row) for row in [*rows, *rows]]


def test_finite():
    assert finite({"a": float("nan"), "b": [float("-inf"), 1.5], "c": (1, "x")}) == {
        "a": None,
        "b": [None, 1.5],
        "c": [1, "x"],
    }


# ------------------------------------------------------------------------------------------------ damage
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "u.safetensors"
    save_update(path, an_update(), {"model": 1})
    return path


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 9, 100, -1, -100])
def test_truncated_files_are_house_errors(tmp_path, keep):
    path = saved(tmp_path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(FedattackError, match=r"u\.safetensors"):
        load_update(path)


@pytest.mark.parametrize(
    "content",
    [b"not a safetensors file at all", b"\xff" * 64, b"\x00" * 64, (2**62).to_bytes(8, "little") + b"{}"],
)
def test_files_of_another_kind_are_house_errors(tmp_path, content):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    for load in (load_update, load_reconstruction, read_tensors):
        with pytest.raises(FedattackError, match=r"x\.safetensors"):
            load(path)


def test_missing_files_and_folders_are_house_errors(tmp_path):
    for load in (load_update, load_reconstruction, read_tensors):
        with pytest.raises(FedattackError, match="no such file"):
            load(tmp_path / "nothing.safetensors")
        with pytest.raises(FedattackError):
            load(tmp_path)


def test_a_file_of_the_wrong_type_is_refused(tmp_path):
    save_reconstruction(tmp_path / "r.safetensors", Reconstruction(images=torch.rand(1, 1, 2, 2)))
    with pytest.raises(MalformedUpdate, match="type 'update'"):
        load_update(tmp_path / "r.safetensors")
    with pytest.raises(FedattackError, match="type 'reconstruction'"):
        load_reconstruction(saved(tmp_path))


@pytest.mark.parametrize("header", ["{", "[]", "7", "null"])
def test_a_foreign_header_is_a_house_error(tmp_path, header):
    from safetensors.torch import save_file

    path = tmp_path / "foreign.safetensors"
    save_file({"w": torch.zeros(2)}, path, metadata={"fedattack": header})
    for load in (load_update, load_reconstruction):
        with pytest.raises(FedattackError):
            load(path)


def test_foreign_tensors_and_missing_facts_are_house_errors(tmp_path):
    about = {"type": "update", "round": 1, "client": "0", "kind": "gradient", "num_examples": 1, "context": {}}
    path = tmp_path / "u.safetensors"
    write_tensors(path, {"neither sent nor received": torch.zeros(1)}, about)
    with pytest.raises(FedattackError):
        load_update(path)
    del about["round"]
    write_tensors(path, {"sent/w": torch.zeros(1)}, about)
    with pytest.raises(FedattackError):
        load_update(path)


# ------------------------------------------------------------------------------------------------ atomicity
def test_a_killed_writer_leaves_the_old_file_and_a_part_that_nobody_reads(tmp_path, monkeypatch):
    path = saved(tmp_path)
    before = path.read_bytes()

    def killed(self: Path, target: Path) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    for write in (
        lambda: save_update(path, an_update(client="other")),
        lambda: write_atomically(path, b"new"),
        lambda: write_json(path, {}),
        lambda: write_rows(path, [{}]),
    ):
        with pytest.raises(KeyboardInterrupt):
            write()
    monkeypatch.undo()
    assert path.read_bytes() == before
    left = [p for p in tmp_path.iterdir() if p != path]
    assert left, "the case must leave a part behind"
    assert all(p.name.startswith(".") and p.name.endswith(".part") for p in left)
    assert list(tmp_path.glob("*.safetensors")) == [path]
    load_update(path)
    save_update(path, an_update(client="other"))
    assert load_update(path)[0].client == "other"


def test_a_failing_save_leaves_no_file(tmp_path):
    with pytest.raises(TypeError):
        write_tensors(tmp_path / "x.safetensors", {"w": torch.zeros(1)}, {"about": object()})
    assert not (tmp_path / "x.safetensors").exists()
    with pytest.raises(ValueError):
        write_json(tmp_path / "x.json", {"nan": float("nan")})
    assert not (tmp_path / "x.json").exists()


def test_nothing_beside_the_file_stays_after_a_good_write(tmp_path):
    saved(tmp_path)
    write_json(tmp_path / "x.json", {"b": 1, "a": Path("p")})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["u.safetensors", "x.json"]
    assert read_json(tmp_path / "x.json") == {"a": "p", "b": 1}


# ------------------------------------------------------------------------------------------------ modes
@pytest.fixture
def open_umask():
    before = os.umask(0o000)
    yield
    os.umask(before)


def test_new_folders_are_for_their_owner_only(tmp_path, open_umask):
    for number, write in enumerate(
        (
            lambda folder: save_update(folder / "u.safetensors", an_update()),
            lambda folder: write_json(folder / "x.json", {}),
            lambda folder: append_row(folder / "rows.jsonl", {}),
            lambda folder: write_rows(folder / "rows.jsonl", [{}]),
            private_folder,
        )
    ):
        folder = tmp_path / f"new{number}"
        write(folder)
        assert mode_of(folder) == 0o700


def test_new_parents_are_for_their_owner_only_too(tmp_path, open_umask):
    """A run folder is made by the first file below it; its updates, truth and pictures are all private."""
    save_update(tmp_path / "run" / "federations" / "f" / "updates" / "u.safetensors", an_update())
    for folder in ("run", "run/federations", "run/federations/f", "run/federations/f/updates"):
        assert mode_of(tmp_path / folder) == 0o700, folder


def test_a_folder_that_is_there_keeps_its_mode(tmp_path, open_umask):
    (tmp_path / "there").mkdir(mode=0o755)
    assert private_folder(tmp_path / "there") == tmp_path / "there"
    assert mode_of(tmp_path / "there") == 0o755


# ------------------------------------------------------------------------------------------------ rows
def test_a_last_line_cut_off_is_passed_over(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_rows(path, [{"a": 1}, {"a": 2}])
    whole = path.read_text()
    for cut in range(len('{"a": 1}\n') + 1, len(whole) - 1):
        path.write_text(whole[:cut])
        assert list(read_rows(path)) == [{"a": 1}]
    path.write_text(whole[:-1])  # only the newline is missing: the row is whole
    assert list(read_rows(path)) == [{"a": 1}, {"a": 2}]


def test_a_row_appended_after_a_crash_is_not_lost(tmp_path):
    """A cut line has no newline at its end; the next append must not grow onto it."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"a": ')
    append_row(path, {"a": 3})
    append_row(path, {"a": 4})
    assert list(read_rows(path)) == [{"a": 1}, {"a": 3}, {"a": 4}]


def test_rows_of_no_file_are_none(tmp_path):
    assert list(read_rows(tmp_path / "none.jsonl")) == []


# ------------------------------------------------------------------------------------------------ names
HOSTILE = [
    "../../etc/passwd",
    "/etc/passwd",
    "..",
    "a/b",
    "a\\b",
    "a\0b",
    "x" * 500,
    "",
    "é ✓",
    "a\nb",
    "~",
    "$(rm)",
    "*",
]


@pytest.mark.parametrize("client", HOSTILE)
def test_hostile_client_names_stay_in_their_folder(tmp_path, client):
    sink = UpdateFolder(tmp_path / "updates", {"model": 1})
    path = sink(an_update(client=client, round=2))
    assert path.parent == tmp_path / "updates"
    assert path.resolve().parent == (tmp_path / "updates").resolve()
    assert len(path.name) < 255
    assert path.suffix == ".safetensors"
    found, context = load_update(path)
    assert found.client == client
    assert context == {"model": 1}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["updates"]


@given(st.text(max_size=120), st.integers(0, 10**9))
@settings(max_examples=100, deadline=None)
def test_update_names_are_plain(client, server_round):
    name = update_name(client, server_round)
    assert name.endswith(f"-round-{server_round}")
    assert not set(name) & set("/\\\0\n \"'$*~:")
    assert len(name) < 110
    assert name not in (".", "..")


def test_ordinary_clients_keep_their_name():
    assert update_name("3", 1) == "3-round-1"
    assert update_name("client-3", 12) == "client-3-round-12"
    assert len({update_name(str(client), 1) for client in range(200)}) == 200


def test_no_two_clients_share_a_file():
    """One client's update would silently replace another's; a foreign Flower app may name its clients freely."""
    clients = ["a/b", "a_b", "a b", "x" * 90, "x" * 91]
    assert len({update_name(client, 1) for client in clients}) == len(clients)


# ------------------------------------------------------------------------------------------------ pictures and folders
def test_png_is_pixel_by_pixel_and_never_stretched(tmp_path):
    import numpy
    from PIL import Image

    grey_blob = torch.full((3, 7, 5), 0.5) + 0.01 * torch.rand(3, 7, 5)
    save_png(tmp_path / "a.png", grey_blob)
    pixels = numpy.asarray(Image.open(tmp_path / "a.png"))
    assert pixels.shape == (7, 5, 3)
    assert (pixels == (grey_blob.permute(1, 2, 0).double() * 255).round().numpy()).all()
    save_png(tmp_path / "b.png", torch.tensor([[[-1.0, 0.0, 2.0]]]))
    assert numpy.asarray(Image.open(tmp_path / "b.png")).tolist() == [[0, 0, 255]]


def test_truth_and_updates_are_different_folders(tmp_path):
    federation = RunFolder(tmp_path).federation("f")
    assert isinstance(federation, FederationFolder)
    assert federation.truth.parent == federation.updates.parent == federation.path
    paths = [federation.truth, federation.updates, federation.public_images, federation.settings, federation.model]
    assert len(set(paths)) == len(paths)


def test_headers_are_json_and_no_pickle_is_read(tmp_path):
    path = saved(tmp_path)
    length = int.from_bytes(path.read_bytes()[:8], "little")
    header = json.loads(path.read_bytes()[8 : 8 + length])
    assert json.loads(header["__metadata__"]["fedattack"])["type"] == "update"
    assert "pickle" not in Path(store.__file__).read_text().replace("No pickle", "")

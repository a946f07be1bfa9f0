"""The benchmark at toy settings: rows, table, and the words where breaching is not there."""

import pytest

from experiments import benchmark as bench
from fedattack.errors import FedattackError
from fedattack.store import read_rows

OURS = ["inverting-gradients", "dlg", "idlg"]


def test_rows_and_table_without_breaching(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(bench, "find_spec", lambda name: None)
    said: list[str] = []
    rows = bench.benchmark(
        images=2, iterations=40, methods=[*OURS, "breaching-ig"], data="patches", out=tmp_path, say=said.append
    )
    assert bench.NOT_INSTALLED in said
    assert [row["method"] for row in rows] == OURS * 2
    assert all(row["status"] == "ok" and row["wall_ms"] > 0 and row["cpu_ms"] > 0 for row in rows)
    assert [row["iterations"] for row in rows if row["method"] == "inverting-gradients"] == [41, 41]
    assert list(read_rows(tmp_path / "rows.jsonl")) == rows
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert len(lines) == 2 + len(OURS)
    assert all(line.count("|") == len(bench.HEADER) + 1 and line.endswith("| – |") for line in lines[2:])


def test_the_ratio_is_taken_image_by_image() -> None:
    def row(method: str, image: int, wall_ms: float) -> dict:
        base = {"method": method, "image": image, "status": "ok", "restarts": 1, "iterations": 1, "seconds": 1.0}
        return base | {"psnr_db": 20.0, "wall_ms": wall_ms, "cpu_ms": wall_ms}

    rows = [row("dlg", 0, 1.0), row("breaching-dlg", 0, 2.0), row("dlg", 1, 30.0), row("breaching-dlg", 1, 60.0)]
    assert "| 0.50 (0.50) |" in bench.table(rows).splitlines()[2]
    rows[1]["status"], rows[1]["error"] = "failed", "ValueError: a | b"
    assert "| 0.50 (0.50) |" in bench.table(rows).splitlines()[2]


def test_demo_settings_are_those_of_the_recipe() -> None:
    assert bench.demo_settings("dlg")["start"] == "grey"
    assert set(bench.demo_settings("inverting-gradients")) == {"iterations", "learning_rate", "tv_weight"}


def test_unknown_method_is_refused_by_name() -> None:
    with pytest.raises(FedattackError, match="dlg"):
        bench.benchmark(methods=["dgl"], say=lambda text: None)


def test_breaching_attacks_the_same_victim() -> None:
    pytest.importorskip("breaching")
    names = ["breaching-ig", "breaching-dlg", "breaching-idlg"]
    rows = bench.benchmark(images=1, iterations=40, methods=names, data="patches", say=lambda text: None)
    assert [row["error"] for row in rows] == ["", "", ""]
    assert all(row["iterations"] >= 40 for row in rows)

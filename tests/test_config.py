"""Configurations: what a person may write, how lists multiply, and that every mistake is named at once."""

import pytest

from fedattack.config import Experiment, load_config, parse_config, to_toml
from fedattack.errors import ConfigError

BASE = {"name": "x", "model": {"name": "mlp"}, "attack": ["linear-leak"]}


def problems(raw, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_config(raw, file="f.toml", overrides=overrides)
    return str(caught.value).split("\n")


def test_defaults_are_a_runnable_experiment() -> None:
    experiment = parse_config({})
    assert len(experiment.cells) == 1
    assert experiment.engine == "in-process"
    assert experiment.cells[0].federation.strategy_name == "fedsgd"


def test_lists_multiply_and_collections_do_not() -> None:
    raw = BASE | {
        "seed": [1, 2],
        "federation": {"defense": ["none", "gaussian-noise(sigma=0.1)"], "batch_size": [1, 2, 4]},
        "capture": {"rounds": [1, 2]},
        "threat": {"reveal": ["labels"]},
    }
    cells = parse_config(raw).cells
    assert len(cells) == 12
    assert {(c.seed, c.federation.defense, c.federation.batch_size) for c in cells} == {
        (s, d, b) for s in (1, 2) for d in ("none", "gaussian-noise(sigma=0.1)") for b in (1, 2, 4)
    }
    assert all(c.capture.rounds == (1, 2) for c in cells)
    assert len({c.federation_id for c in cells}) == 12
    assert len({c.title for c in cells}) == 3, (
        "seeds are pooled, defenses set side by side: neither is a case of its own"
    )


def test_cases_are_laid_over_the_rest() -> None:
    raw = BASE | {
        "federation": {"clients": 3, "rounds": 7},
        "case": [
            {"title": "a", "federation": {"rounds": 1}},
            {"title": "b", "model": {"name": "lenet"}, "attack": ["dlg", "idlg"]},
        ],
    }
    a, b = parse_config(raw).cells
    assert (a.title, a.federation.clients, a.federation.rounds, a.model.name) == ("a", 3, 1, "mlp")
    assert (b.title, b.federation.clients, b.federation.rounds, b.model.name) == ("b", 3, 7, "lenet")
    assert [attack.name for attack in b.attack] == ["dlg", "idlg"]


def test_overrides_win_over_cases() -> None:
    raw = BASE | {"case": [{"title": "a", "federation": {"rounds": 1}}, {"title": "b", "federation": {"rounds": 2}}]}
    cells = parse_config(
        raw, overrides=["federation.rounds=9", "seed=[4, 5]", "data.dataset=patches", "pool.workers=3"]
    )
    assert [c.federation.rounds for c in cells.cells] == [9, 9, 9, 9]
    assert sorted(c.seed for c in cells.cells) == [4, 4, 5, 5]
    assert cells.pool.workers == 3


def test_attacks_share_a_federation_but_a_seed_does_not() -> None:
    one, two, three = (
        parse_config(BASE | change).cells[0]
        for change in ({}, {"attack": ["dlg"], "threat": {"reveal": ["labels"]}}, {"seed": 1})
    )
    assert one.federation_id == two.federation_id != three.federation_id


def test_every_problem_is_named_with_file_and_key_and_closest_name() -> None:
    raw = {
        "nmae": "x",
        "data": {"dataset": "patchs", "options": {"image_sise": 3}},
        "model": {"name": "lenett"},
        "federation": {"lerning_rate": 1.0, "clients": 0},
        "attack": ["dgl", {"name": "dlg", "iteration": 3}],
    }
    found = "\n".join(problems(raw))
    for part in (
        "f.toml: nmae: unknown key (did you mean 'name'?)",
        "lerning_rate: unknown key (did you mean 'learning_rate'?)",
    ):
        assert part in found
    assert "f.toml: federation.clients:" in found
    later = raw | {"federation": {}}
    later.pop("nmae")
    found = "\n".join(problems(later))
    for part in (
        "did you mean 'patches'",
        "did you mean 'lenet'",
        "did you mean 'dlg'",
        "'iteration' (did you mean 'iterations'?)",
    ):
        assert part in found, found
    assert len(found.split("\n")) == 4


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        ({"federation": {"local_steps": 2}}, "local_steps: must be 1 under fedsgd"),
        ({"federation": {"mods": ["fixedclipping"]}}, "need protocol = 'fedavg'"),
        ({"federation": {"defense": "gausian-noise(sigma=1)"}}, "did you mean 'gaussian-noise'"),
        ({"federation": {"defense": "gaussian-noise"}}, "parameter 'sigma' must be given"),
        ({"federation": {"defense": "gaussian-noise(sigma=1"}}, "must be"),
        ({"federation": {"strategy": "fedadm"}}, "did you mean 'fedadam'"),
        ({"federation": {"strategy": "fedavgm", "strategy_options": {"momentum": 1}}}, "server_momentum"),
        ({"threat": {"model": "servr"}}, "did you mean 'server'"),
        ({"threat": {"reveal": ["label"]}}, "did you mean 'labels'"),
        ({"task": {"name": "difusion"}}, "did you mean 'diffusion'"),
        ({"task": {"name": "diffusion"}, "attack": ["linear-leak"]}, "attacks classification only"),
        ({"federation": {"batch_size": 4, "examples": 2}}, "at most the images used in a round"),
        (
            {"federation": {"strategy": "fedadam"}},
            "fedadam cannot average gradients: set federation.protocol = 'fedavg'",
        ),
        ({"federation": {"protocol": "fedavg", "strategy": "fedsgd"}}, "fedsgd cannot average weights"),
        (
            {"federation": {"protocol": "fedavg", "mods": ["fixedclipping"]}},
            "strategy 'dp-client-fixed' and mod 'fixedclipping' only make sense together",
        ),
        ({"federation": {"defense": "gaussian-noise(sigma=-1)"}}, "sigma must be at least 0"),
        ({"federation": {"defense": "gaussian-noise(sigma=1)+norm-clipping(max_norm=1)"}}, 'joined by " + "'),
        ({"data": {"partition": "iidd"}}, "did you mean 'iid'"),
        ({"data": {"partition": "dirichlet", "partition_options": {"alfa": 1}}}, "did you mean 'alpha'"),
        ({"data": {"dataset": "npz:/no/such/file.npz"}}, "no such file or folder"),
        ({"model": {"name": "resnet18", "options": {"norm": "bach"}}}, "did you mean 'batch'"),
        ({"model": {"name": "unet"}}, "unet is no model for task classification"),
        ({"task": {"name": "diffusion"}, "attack": ["dlg"]}, "mlp is no model for task diffusion"),
        ({"attack": [{"name": "dlg", "distance": "l3"}]}, "distance must be one of"),
        ({"attack": [{"name": "dlg", "start": "gray"}]}, "did you mean 'grey'"),
        ({"attack": [{"name": "dlg", "iterations": [1, 2]}]}, "iterations must be a whole number"),
        ({"attack": ["fedattack.types:Defense"]}, "is no attack, it lacks"),
        ({"case": {"title": "x"}}, "case must be written [[case]]"),
        ({"engine": "simulator"}, "engine"),
        ({"precision": "float16"}, "precision"),
        ({"cells": []}, "cells: unknown key"),
        ({"case": [{"model": {"nam": "mlp"}}]}, "case[0].model.nam: unknown key (did you mean 'name'?)"),
    ],
)
def test_one_problem(raw, says: str) -> None:
    assert says in "\n".join(problems(BASE | raw))


def test_bad_overrides_are_named() -> None:
    assert "override must be key=value, got 'rounds'" in problems(BASE, "rounds")
    assert any(
        "federation.round: unknown key (did you mean 'rounds'?)" in line
        for line in problems(BASE, "federation.round=3")
    )


def test_the_resolved_configuration_reads_back_to_the_same(tmp_path) -> None:
    raw = BASE | {
        "seed": [1, 2],
        "model": {"name": "mlp", "options": {"hidden": [8, 4], "activation": "sigmoid"}},
        "attack": [{"name": "dlg", "iterations": 7, "precision": "float32"}, "linear-leak"],
        "federation": {"defense": "gaussian-noise(sigma=0.1) + norm-clipping(max_norm=3)", "protocol": "fedavg"},
        "threat": {"reveal": ["labels"]},
    }
    experiment = parse_config(raw)
    path = tmp_path / "config.toml"
    path.write_text(to_toml(experiment))
    again = load_config(path)
    assert again == experiment
    assert [c.federation_id for c in again.cells] == [c.federation_id for c in experiment.cells]


def test_files_that_are_none(tmp_path) -> None:
    with pytest.raises(ConfigError, match="existing TOML file"):
        load_config(tmp_path / "no.toml")
    (tmp_path / "bad.toml").write_text("a = = 1")
    with pytest.raises(ConfigError, match=r"bad\.toml"):
        load_config(tmp_path / "bad.toml")


def test_wrong_keys_do_not_hide_wrong_values() -> None:
    found = "\n".join(problems(BASE | {"federation": {"lerning_rate": 1}, "attack": ["dgl"]}))
    assert "did you mean 'learning_rate'" in found
    assert "did you mean 'dlg'" in found


def test_cells_are_told_apart() -> None:
    """Identical cells run once; cells of one title that differ in more than seed and defense are numbered."""
    same = parse_config(BASE | {"case": [{}, {}]})
    assert len(same.cells) == 1
    raw = BASE | {"case": [{}, {"federation": {"batch_size": 4}}, {"threat": {"reveal": ["labels"]}}]}
    assert [c.title for c in parse_config(raw).cells] == [
        "mlp (classification)",
        "mlp (classification) (2)",
        "mlp (classification) (3)",
    ]
    seeds = parse_config(BASE | {"seed": [1, 2], "title": "t"}).cells
    assert len(seeds) == 2


def test_an_empty_experiment_has_its_own_defaults() -> None:
    assert Experiment().pool.workers == 0

"""The table of one image for a batch: which images make a batch, what a row says, which controls stand beside an attack."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from experiments import user_level
from experiments.user_level import ATTACK, Batch, another, evaluations, groups, line, main, prior_alone, told
from fedattack.data import ImageData
from fedattack.prior_training import PriorSettings, train_prior
from fedattack.registry import parse_spec
from fedattack.types import Reconstruction


def faces(people: int = 6, each: int = 5) -> ImageData:
    pixels = torch.randint(0, 256, (people * each, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    users = torch.arange(people).repeat_interleave(each)
    return ImageData(pixels.to(torch.uint8), users % 2, ("female", "male"), users, "faces")


def test_a_batch_is_of_one_person_one_gender_or_anybody():
    data = faces()
    for similarity, column in (("person", data.users), ("gender", data.labels)):
        found = list(groups(data, 4, similarity, 3, 0))
        assert len(found) == 3
        assert all(len(rows) == 4 and len(column[rows].unique()) == 1 for _, rows in found)
    assert len({rows.tolist()[0] for _, rows in groups(data, 5, "person", 6, 0)}) == 6
    anybody = [rows for _, rows in groups(data, 20, "random", 2, 0)]
    assert all(len(rows.unique()) == 20 for rows in anybody)
    assert list(groups(data, 6, "person", 3, 0)) == []  # nobody has so many


def batch(value: float, label: int = 0) -> Batch:
    return Batch(torch.full((2, 3, 8, 8), value), torch.full((2,), label), str(value))


def test_the_rank_counts_batches_that_are_nearer():
    batches = [batch(value) for value in (0.2, 0.5, 0.8)]
    guess = Reconstruction(images=torch.full((1, 3, 8, 8), 0.55), represents="user")
    ranks = [told(guess, number, batches, [])["rank"] for number in range(3)]
    assert ranks == [1.0, 0.0, 0.5]
    row = told(guess, 1, batches, [])
    assert row["to_mean_db"] == pytest.approx(26.02, abs=0.01)
    assert row["psnr_db"] == pytest.approx([row["to_mean_db"]] * 2, abs=1e-3)


def test_ties_count_half_and_one_batch_has_no_rank():
    guess = Reconstruction(images=torch.full((1, 3, 8, 8), 0.5), represents="user")
    equal = [batch(0.25) for _ in range(5)]
    assert [told(guess, number, equal, [])["rank"] for number in range(5)] == [0.5] * 5
    assert told(guess, 0, [batch(0.25), batch(0.75), batch(0.5)], [])["rank"] == 0.75
    alone = told(guess, 0, equal[:1], [])
    assert alone["rank"] is None
    shown = line([alone | {"similarity": "person", "batch": 2, "attack": "a"}])
    assert shown.split(" | ")[7] == "–"


def test_images_that_are_no_ones_mean_have_no_rank_and_no_distance_to_it():
    found = Reconstruction(images=torch.rand(2, 3, 8, 8))
    row = told(found, 0, [batch(0.2), batch(0.8)], [])
    assert (row["to_mean_db"], row["rank"]) == (None, None)
    assert len(row["psnr_db"]) == 2


def test_the_unrelated_batch_is_of_the_same_gender():
    people = [batch(value / 10, value % 2) for value in range(5)]
    assert [another(people, number, "random").name for number in range(5)] == ["0.1", "0.2", "0.3", "0.4", "0.0"]
    assert [another(people, number, "gender").name for number in range(5)] == ["0.2", "0.3", "0.4", "0.1", "0.0"]
    assert another(people[:2], 0, "gender") is None
    assert another(people[:1], 0, "person") is None


def test_controls_of_attacks_that_have_none_and_budgets_of_those_that_have():
    assert prior_alone(ATTACK) == "user-level(guidance='none')"
    assert parse_spec(prior_alone("user-level(distance='l2', kappa=1e999)"))[1] == {
        "distance": "l2",
        "guidance": "none",
    }
    for spec in ("user-level(guidance='none')", "inverting-gradients"):
        assert prior_alone(spec) is None
        assert evaluations(spec) == 0
    assert evaluations("user-level(steps=30, restarts=4)") == 120


def test_every_target_has_a_start_of_its_own(monkeypatch):
    """The same noise for everybody would show one sample of the prior as many; what leads the attack does not change it."""
    drawn = []

    class Noise:
        def reconstruct(self, update, model, task, knowledge, *, generator):
            drawn.append(torch.rand(1, generator=generator).item())
            return Reconstruction(images=torch.zeros(1, 3, 8, 8))

    monkeypatch.setattr(user_level, "ATTACKS", SimpleNamespace(create=lambda name: Noise()))
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 2))
    a, b = batch(0.2), batch(0.8)
    for by, target in ((a, a), (b, a), (b, b)):
        user_level.run("noise", by, target, model, 2, torch.zeros(1, 3, 8, 8), "prior", 0)
    assert drawn[0] == drawn[1] != drawn[2]


def test_every_attack_stands_beside_its_controls(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(user_level, "LEAST", 1)
    data = faces(people=12)
    file = tmp_path / "faces.npz"
    prior = PriorSettings("patches", size=8, channels=(8, 16), steps=1, batch=4, timesteps=20)
    train_prior(prior, tmp_path / "prior", samples=0)
    pixels = data.pixels.permute(0, 2, 3, 1).numpy()
    np.savez(file, x=pixels, identity=data.users.numpy(), male=data.labels.numpy().astype(np.uint8))
    arguments = [
        *("--data", f"npz:{file}", "--size", "8", "--prior", str(tmp_path / "prior"), "--model", "mlp(hidden=[8])"),
        *("--batches", "3", "--users", "1", "--joint", "3"),
        *("--attack", "user-level(steps=2)", "--train", "1", "--out", str(tmp_path / "rows.jsonl")),
        *("--pictures", str(tmp_path / "pictures")),
    ]
    main(arguments)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["attack"].split(":")[0] for row in rows] == [
        "mean public face",
        "batch-mean",
        "user-level(steps=2)",
        "user-level(steps=2, guidance='none'), prior alone",
        "user-level(steps=2), unrelated",
        "one image without a prior",
        "jointly",
        "mean of jointly",
    ]
    assert "(iterations=2, start='grey'" in rows[5]["attack"], "as often as the attack"
    assert all(len(row["psnr_db"]) == row["batch"] == 3 for row in rows)
    assert rows[1]["to_mean_db"] == 200.0
    assert rows[2]["loss"] != rows[4]["loss"], "another person's update"
    assert capsys.readouterr().out.count("\n") == 2 + len(rows)
    assert len(list((tmp_path / "pictures").glob("*attack*.png"))) == 5

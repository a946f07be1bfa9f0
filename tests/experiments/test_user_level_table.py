"""The table of one image for a batch: which images make a batch, what a row says, which controls stand beside an attack."""

import json

import numpy as np
import pytest
import torch

from experiments.user_level import ATTACK, Batch, groups, main, prior_alone, told
from fedattack.data import ImageData
from fedattack.prior_training import PriorSettings, train_prior
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


def test_the_rank_counts_batches_that_are_nearer():
    images = [torch.full((2, 3, 8, 8), value) for value in (0.2, 0.5, 0.8)]
    batches = [Batch(image, torch.zeros(2).long(), str(i)) for i, image in enumerate(images)]
    guess = Reconstruction(images=torch.full((1, 3, 8, 8), 0.55), represents="user")
    ranks = [told(guess, number, batches, [])["rank"] for number in range(3)]
    assert ranks == [1.0, 0.0, 0.5]
    row = told(guess, 1, batches, [])
    assert row["to_mean_db"] == pytest.approx(26.02, abs=0.01)
    assert row["psnr_db"] == pytest.approx([row["to_mean_db"]] * 2, abs=1e-3)


def test_every_attack_stands_beside_its_controls(tmp_path, capsys):
    data = faces(people=12)
    file = tmp_path / "faces.npz"
    prior = PriorSettings("patches", size=8, channels=(8, 16), steps=1, batch=4, timesteps=20)
    train_prior(prior, tmp_path / "prior", samples=0)
    pixels = data.pixels.permute(0, 2, 3, 1).numpy()
    np.savez(file, x=pixels, identity=data.users.numpy(), male=data.labels.numpy().astype(np.uint8))
    arguments = [
        *("--data", f"npz:{file}", "--size", "8", "--prior", str(tmp_path / "prior"), "--model", "mlp(hidden=[8])"),
        *("--batches", "3", "--users", "1", "--joint", "3", "--joint-attack", "inverting-gradients(iterations=2)"),
        *("--attack", "user-level(steps=2)", "--train", "1", "--out", str(tmp_path / "rows.jsonl")),
        *("--pictures", str(tmp_path / "pictures")),
    ]
    main(arguments)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["attack"].split(":")[0] for row in rows] == [
        "mean public face",
        "batch-mean (bound)",
        "user-level(steps=2)",
        "user-level(steps=2, guidance='none'), prior alone",
        "user-level(steps=2), unrelated",
        "one image without a prior",
        "jointly",
        "mean of these",
    ]
    assert all(len(row["psnr_db"]) == row["batch"] == 3 for row in rows)
    assert rows[1]["to_mean_db"] == 200.0
    assert rows[2]["loss"] != rows[4]["loss"], "another person's update"
    assert capsys.readouterr().out.count("\n") == 2 + len(rows)
    assert prior_alone(ATTACK) == "user-level(guidance='none')"
    assert len(list((tmp_path / "pictures").glob("*attack*.png"))) == 5

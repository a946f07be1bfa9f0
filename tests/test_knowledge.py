"""Threat models: what is shown, what is hidden, and that an oracle enters only by its name."""

from dataclasses import fields

import pytest
import torch

from fedattack.errors import FedattackError
from fedattack.knowledge import FIELDS, ORACLES, THREAT_MODELS, build_knowledge, visible_fields
from fedattack.types import Knowledge

FACTS = {
    "image_shape": (3, 7, 5),
    "batch_size": 2,
    "num_classes": 4,
    "learning_rate": 0.1,
    "local_steps": 1,
    "local_batch_size": 2,
    "proximal_mu": 0.0,
    "defense": "none",
    "prior": "p",
    "public_images": torch.zeros(1, 3, 7, 5),
    "history": (),
}
TRUTH = {
    "images": torch.rand(2, 3, 7, 5),
    "labels": torch.tensor([1, 2]),
    "timesteps": torch.tensor([3, 4]),
    "noise": torch.zeros(2, 3, 7, 5),
}


def untold() -> dict[str, torch.Tensor]:
    raise AssertionError("the truth was read without an oracle")


def test_the_fields_and_oracles_are_those_of_the_type():
    assert {f.name for f in fields(Knowledge)} == FIELDS
    assert {"labels", "timesteps", "noise"} == ORACLES
    assert set(FACTS) == FIELDS - ORACLES


def test_presets():
    assert THREAT_MODELS["server"] == FIELDS - ORACLES - {"defense"}
    assert THREAT_MODELS["informed-server"] == FIELDS - ORACLES
    assert THREAT_MODELS["labels-known"] & ORACLES == {"labels"}
    assert THREAT_MODELS["everything-known"] == FIELDS
    assert {name for name, shown in THREAT_MODELS.items() if shown & ORACLES} == {"labels-known", "everything-known"}


def test_reveal_and_hide():
    assert visible_fields("server") == THREAT_MODELS["server"]
    assert visible_fields("server", reveal=["noise"]) == THREAT_MODELS["server"] | {"noise"}
    assert visible_fields("server", hide=["batch_size"]) == THREAT_MODELS["server"] - {"batch_size"}
    assert "labels" not in visible_fields("everything-known", reveal=["labels"], hide=["labels"])


def test_unknown_names_offer_the_closest():
    with pytest.raises(FedattackError, match="did you mean 'labels-known'"):
        visible_fields("labels-knwon")
    with pytest.raises(FedattackError, match="did you mean 'timesteps'"):
        visible_fields("server", reveal=["timestep"])
    with pytest.raises(FedattackError, match="did you mean 'labels'"):
        visible_fields("server", hide=["label"])
    with pytest.raises(FedattackError, match="images"):
        visible_fields("server", reveal=["images"])


@pytest.mark.parametrize("threat_model", ["server", "informed-server"])
def test_the_truth_is_not_read_without_an_oracle(threat_model):
    known = build_knowledge(visible_fields(threat_model), FACTS, untold)
    assert not known.known() & ORACLES
    assert known.known() == THREAT_MODELS[threat_model]


@pytest.mark.parametrize("oracle", sorted(ORACLES))
def test_an_oracle_is_given_by_its_name_alone(oracle):
    known = build_knowledge(visible_fields("server", reveal=[oracle]), FACTS, lambda: TRUTH)
    assert known.known() & ORACLES == {oracle}
    assert torch.equal(getattr(known, oracle), TRUTH[oracle])


def test_hidden_oracles_do_not_read_the_truth():
    visible = visible_fields("everything-known", hide=ORACLES)
    assert not build_knowledge(visible, FACTS, untold).known() & ORACLES


def test_hidden_facts_stay_hidden():
    known = build_knowledge(visible_fields("server", hide=["batch_size", "public_images"]), FACTS, untold)
    assert known.batch_size is None
    assert known.public_images is None
    assert known.defense is None
    assert known.num_classes == 4


def test_no_truth_no_oracle():
    """In a deployment there is no witness: a threat model with oracles then has them unknown, not made up."""
    known = build_knowledge(visible_fields("everything-known"), FACTS)
    assert not known.known() & ORACLES


@pytest.mark.parametrize("smuggled", ["labels", "noise", "timesteps", "images", "label"])
def test_facts_of_a_server_hold_no_oracle(smuggled):
    for visible in (visible_fields("server"), visible_fields("everything-known")):
        with pytest.raises(FedattackError, match=smuggled):
            build_knowledge(visible, {**FACTS, smuggled: torch.zeros(1)}, lambda: TRUTH)


def test_known_names_the_fields_with_a_value():
    assert Knowledge().known() == frozenset()
    assert Knowledge(batch_size=1, proximal_mu=0.0).known() == {"batch_size", "proximal_mu"}

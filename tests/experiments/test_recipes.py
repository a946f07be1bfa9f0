"""What recipes promise: the published guidance by a diffusion prior (gg-cdm) never stands without its controls."""

import tomllib
from pathlib import Path

import pytest

from fedattack.config import controls_left_out, parse_config

RECIPES = Path(__file__).resolve().parents[2] / "experiments/recipes"
PRIORS = [path for path in sorted(RECIPES.glob("gg-cdm*.toml")) if path.stem != "gg-cdm-victims"]


@pytest.mark.parametrize("recipe", PRIORS, ids=lambda path: path.stem)
def test_every_guidance_stands_beside_all_its_controls(recipe) -> None:
    raw = tomllib.loads(recipe.read_text()) | {"data": {"options": {"image_size": 16}}}
    for case in raw["case"]:
        case.get("model", {}).pop("weights", None)  # of victims that are not trained here
    for cell in parse_config(raw).cells:
        guided = [attack for attack in cell.attack if attack.name == "gg-cdm" and not attack.yardstick]
        assert guided
        for attack in guided:
            assert attack.parameters.get("guidance") != "none", "the prior alone is a yardstick, no attack"
            assert controls_left_out(cell, attack) == {}
            beside = {other.control for other in cell.attack if attack.spec in other.control_of}
            assert {"prior-alone", "unrelated-update"} <= beside
            assert {"linear-leak", "inverting-gradients"} <= {
                other.name for other in cell.attack if attack.spec in other.control_of
            }

"""What can be said of a model before any data is seen: counts by formula, ranks and pictures by playing a client."""

import json
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from fedattack.analysis import Analysis, Probe, analyse, count_layers, probe_images
from fedattack.cli import app
from fedattack.errors import FedattackError
from fedattack.models import build_model

SHAPE = (3, 8, 8)


@pytest.fixture(scope="module")
def images():
    return probe_images("patches", SHAPE, 4)


def chain(filters, **options):
    """Two convolutions of stride 2 and 1, the first of which has as many filters as its outputs need."""
    return {"filters": (12, filters), "strides": (2, 1), "activation": ("leaky-relu", "relu"), **options}


SOLVED = {"conv0.rank": 5.0, "conv0.unknowns": 5.0, "conv0.gradient_residual": 1e-7}


def chain_model():
    return build_model("conv-chain", image_shape=SHAPE, num_classes=4, seed=0, **chain(8))


def test_counts_follow_the_formula():
    """D_min = ceil((H/s)(W/s) / ⌊K/s⌋²) for gradients, C·s² for outputs."""
    model = build_model("conv-chain", image_shape=(3, 32, 32), num_classes=10, seed=0, architecture="letnet")
    layers = count_layers(model, (3, 32, 32))
    assert [layer.name for layer in layers] == ["conv0", "conv1", "conv2", "conv3"]
    assert [layer.filters_for_gradients for layer in layers] == [64, 16, 3, 3]
    assert [layer.filters_for_weights for layer in layers] == [12, 48, 16, 12]
    assert [layer.filters_for_gradients for layer in count_layers(model, (3, 32, 32), batch=2)] == [128, 32, 6, 6]


def test_a_model_that_leaks_everything_is_called_invertible(images):
    found = analyse("conv-chain", chain(8), images[:2], 4, dtype=torch.float64)
    assert [found.verdict(layer).split()[0] for layer in found.layers] == ["invertible", "invertible"]
    assert len(found.probes) == 2
    assert min(value for probe in found.probes for value in probe.psnr_db) > 100


def test_a_layer_with_too_few_filters_is_found_with_what_it_lacks(images):
    found = analyse("conv-chain", chain(4, kernels=(5, 1)), images[:2], 4, dtype=torch.float64)
    first, second = found.layers
    assert second.filters_for_gradients == 16  # 4×4 pixels, 1×1 kernels
    assert "16 active filters would do" in found.verdict(second)
    assert max(probe.hidden("conv1") for probe in found.probes) > 0
    assert not found.verdict(second).startswith("invertible")
    assert "contradict one another" in found.verdict(first)


def test_what_is_no_chain_is_counted_all_the_same(images):
    found = analyse("resnet18", {"width": 4, "norm": "group"}, images[:1], 4)
    assert len(found.layers) > 15
    assert all(probe.refusal for probe in found.probes)
    assert found.verdict(found.layers[0]).startswith("not reached")


def test_a_probe_says_what_is_left():
    probe = Probe({"a.rank": 3.0, "a.unknowns": 5.0})
    assert (probe.hidden("a"), probe.hidden("b")) == (2, None)


def test_refused_probes_are_not_left_out():
    """A dense layer of few neurons does not give every batch away."""
    found = Analysis(2, count_layers(chain_model(), SHAPE), (Probe({}, refusal="no"), Probe(SOLVED, (90.0, 80.0))))
    assert found.verdict(found.layers[0]) == "invertible by gradients alone in 1 of 2 probes"
    contradiction = Probe({**SOLVED, "conv0.gradient_residual": 0.1})
    assert "contradict one another in 1 of 2 probes" in replace(found, probes=(contradiction, Probe(SOLVED))).verdict(
        found.layers[0]
    )


def test_weights_of_another_model_are_refused(images):
    with pytest.raises(FedattackError, match="these weights are not the model's"):
        analyse("lenet", {}, images[:1], 4, weights={"totally.wrong": torch.zeros(3)})


def test_public_images_are_brought_to_the_shape():
    assert probe_images("patches", (1, 7, 5), 3).shape == (3, 1, 7, 5)
    with pytest.raises(FedattackError, match=r"probes × batch must be at most the \d+ public images"):
        probe_images("patches", SHAPE, 10**6)


def test_the_command(tmp_path):
    out = tmp_path / "analysis.json"
    spec = "conv-chain(filters=(12, 8), strides=(2, 1), activation=('leaky-relu', 'relu'))"
    arguments = ["analyse", spec, "--image-shape", "3,8,8", "--num-classes", "4", "--probes", "1", "--json", str(out)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "invertible" in result.output
    assert [line["layer"] for line in json.loads(out.read_text())] == ["conv0", "conv1"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["letnet"], "did you mean"),
        (["lenet", "--image-shape", "3,8"], "three whole numbers"),
        (["lenet", "--probes", "0"], "--probes must be a whole number of at least 1"),
        (["lenet", "--precision", "float16"], "--precision must be one of"),
    ],
)
def test_what_the_command_refuses(arguments, said):
    result = CliRunner().invoke(app, ["analyse", *arguments])
    assert isinstance(result.exception, FedattackError)
    assert said in str(result.exception)

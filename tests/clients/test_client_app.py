"""The client: what it sends is what simulate says, its defenses and Flower's own mods act, its draws are its own."""

import json

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, RecordDict

from clients.client_app import client_seed, make_client_app, truth_folder
from clients.training import choose_examples, client_name, defend, train_locally
from fedattack.cells import build_victim, client_shares, initial_state, load_splits
from fedattack.config import Settings
from fedattack.registry import STRATEGIES
from fedattack.store import read_tensors
from fedattack.tasks import simulate, split_steps
from strategies import HonestButCurious
from strategies.in_process_grid import InProcessGrid, quiet_flower

SMALL = {
    "seed": 5,
    "data": {"dataset": "patches", "options": {"image_size": 16}},
    "model": {"name": "mlp", "options": {"hidden": [8]}},
}


def cell(**changes) -> Settings:
    return Settings.model_validate(SMALL | changes)


def train_round(settings: Settings, tmp_path=None, rounds: int = 1, strategy=None):
    """Run a federation of the cell in process; gives the copied updates and Flower's result."""
    seen = []
    splits = load_splits(settings)
    model = build_victim(settings, splits.private.image_shape, splits.private.num_classes)
    inner = strategy or STRATEGIES.create(
        settings.federation.strategy_name, federation=settings.federation, **settings.federation.strategy_options
    )
    kind = "gradient" if settings.federation.protocol == "fedsgd" else "weights"
    incidents = []
    wrapped = HonestButCurious(inner, seen.append, kind=kind, on_incident=incidents.append)
    config = {"fedattack": settings.model_dump_json(exclude={"attack", "threat", "capture", "title"})}
    config["truth"] = str(tmp_path) if tmp_path else ""
    with quiet_flower():
        result = wrapped.start(
            InProcessGrid(make_client_app(), settings.federation.clients),
            ArrayRecord(initial_state(model)),
            num_rounds=rounds,
            train_config=ConfigRecord(config),
        )
    assert not incidents, incidents
    return seen, result


@pytest.mark.parametrize("protocol", ["fedsgd", "fedavg"])
@pytest.mark.parametrize("task", ["classification", "diffusion"])
def test_what_arrives_is_what_simulate_says_of_the_truth(protocol: str, task: str, tmp_path) -> None:
    """Client and attacker share one `simulate`: from the witness's private variables it gives the update to the last bit."""
    model = (
        {"name": "unet", "options": {"block_out_channels": [8, 8], "norm_num_groups": 4}}
        if task == "diffusion"
        else None
    )
    steps = 2 if protocol == "fedavg" else 1
    settings = cell(
        task={"name": task},
        **({"model": model} if model else {}),
        federation={
            "clients": 2,
            "rounds": 1,
            "protocol": protocol,
            "batch_size": 2,
            "local_steps": steps,
            "examples": 4 // (3 - steps),
        },
    )
    seen, _ = train_round(settings, tmp_path)
    assert [u.client for u in seen] == ["client-0", "client-1"]
    splits = load_splits(settings)
    victim = build_victim(settings, splits.private.image_shape, splits.private.num_classes)
    for update in seen:
        truth, about = read_tensors(tmp_path / f"{update.client}-round-1.safetensors")
        assert about["type"] == "truth"
        assert set(truth) == {"images", "labels"} | ({"noise", "timesteps"} if task == "diffusion" else set())
        schedule = [[0, 1], [2, 3]] if steps == 2 else [[0, 1]]
        private = {k: v for k, v in truth.items() if task != "diffusion" or k != "labels"}
        batches = split_steps(settings.task.build(), private, schedule)
        expected = simulate(
            victim,
            update.sent,
            settings.task.build(),
            batches,
            kind=update.kind,
            learning_rate=settings.federation.learning_rate,
        )
        assert set(expected) == set(update.received)
        for name, tensor in expected.items():
            torch.testing.assert_close(update.received[name], tensor, rtol=0, atol=0)


def test_timesteps_and_noise_are_drawn_anew_for_every_client_round_and_image(tmp_path) -> None:
    settings = cell(
        task={"name": "diffusion"},
        model={"name": "unet", "options": {"block_out_channels": [8, 8], "norm_num_groups": 4}},
        federation={"clients": 3, "rounds": 2, "batch_size": 4},
    )
    train_round(settings, tmp_path, rounds=2)
    drawn = [read_tensors(path)[0] for path in sorted(tmp_path.glob("*.safetensors"))]
    assert len(drawn) == 6
    timesteps = torch.cat([truth["timesteps"] for truth in drawn])
    assert len(timesteps.unique()) > 18
    assert timesteps.min() >= 0
    assert timesteps.max() <= 999
    assert len({float(truth["noise"].sum()) for truth in drawn}) == 6


def test_fedsgd_takes_the_step_it_promises() -> None:
    settings = cell(federation={"clients": 3, "rounds": 1, "batch_size": 2, "learning_rate": 0.5})
    seen, result = train_round(settings)
    final = result.arrays.to_torch_state_dict()
    for name, start in seen[0].sent.items():
        mean = sum(update.received[name] for update in seen) / 3
        torch.testing.assert_close(final[name], start - 0.5 * mean)


def test_clients_use_different_images_and_other_ones_every_round() -> None:
    settings = cell(federation={"clients": 2, "batch_size": 4})
    data = load_splits(settings).private.subset(client_shares(settings)[0])
    first = choose_examples(data, settings, "client-0", 1, seed=1)
    assert len(set(first)) == 4
    assert first == choose_examples(data, settings, "client-0", 1, seed=1)
    assert first != choose_examples(data, settings, "client-0", 2, seed=1)
    assert first != choose_examples(data, settings, "client-1", 1, seed=1)
    shares = client_shares(settings)
    assert not set(shares[0].tolist()) & set(shares[1].tolist())


@pytest.mark.parametrize("protocol", ["fedsgd", "fedavg"])
def test_noise_on_the_update_has_the_stated_size_at_the_server(protocol: str) -> None:
    federation = {"clients": 2, "rounds": 1, "protocol": protocol, "batch_size": 2}
    quiet, _ = train_round(cell(federation=federation))
    noisy, _ = train_round(cell(federation=federation | {"defense": "gaussian-noise(sigma=0.01)"}))
    noise = torch.cat(
        [(n.received[k] - q.received[k]).flatten() for q, n in zip(quiet, noisy, strict=True) for k in q.received]
    )
    assert float(noise.std()) == pytest.approx(0.01, rel=0.05)
    assert abs(float(noise.mean())) < 1e-3
    first, second = (
        torch.cat([(n.received[k] - q.received[k]).flatten() for k in q.received])
        for q, n in zip(quiet, noisy, strict=True)
    )
    assert abs(float(torch.corrcoef(torch.stack([first, second]))[0, 1])) < 0.1, "clients share their noise"


def test_defenses_act_in_the_order_in_which_they_are_written() -> None:
    update = {"w": torch.ones(10000)}
    clip_last = cell(federation={"defense": "gaussian-noise(sigma=1.0) + norm-clipping(max_norm=1.0)"})
    noise_last = cell(federation={"defense": "norm-clipping(max_norm=1.0) + gaussian-noise(sigma=1.0)"})
    assert float(defend(update, {}, clip_last, client="c", server_round=1, seed=0)["w"].norm()) == pytest.approx(
        1.0, rel=1e-4
    )
    assert float(defend(update, {}, noise_last, client="c", server_round=1, seed=0)["w"].norm()) > 50


def _change_norm(update) -> float:
    return float(torch.cat([(update.received[k] - update.sent[k]).flatten() for k in update.sent]).norm())


def test_flowers_own_mods_work_unchanged() -> None:
    """Fixed and adaptive clipping with the strategies that speak to them, and local differential privacy."""
    base = {"clients": 4, "rounds": 1, "protocol": "fedavg", "batch_size": 2, "local_steps": 2, "learning_rate": 1.0}
    plain, _ = train_round(cell(federation=base))
    assert max(map(_change_norm, plain)) > 0.05
    fixed = base | {
        "strategy": "dp-client-fixed",
        "strategy_options": {"noise_multiplier": 0.0, "clipping_norm": 0.05},
        "mods": ["fixedclipping"],
    }
    clipped, _ = train_round(cell(federation=fixed))
    assert max(map(_change_norm, clipped)) <= 0.05 * 1.001
    adaptive = base | {
        "strategy": "dp-client-adaptive",
        "strategy_options": {"noise_multiplier": 0.0, "initial_clipping_norm": 0.04},
        "mods": ["adaptiveclipping"],
    }
    clipped, _ = train_round(cell(federation=adaptive))
    assert max(map(_change_norm, clipped)) <= 0.04 * 1.001
    local = base | {"mods": ["localdp(clipping_norm=0.05, sensitivity=0.001, epsilon=1.0, delta=1e-5)", "arrays-size"]}
    private, _ = train_round(cell(federation=local))
    assert 0.05 < max(map(_change_norm, private)) < 1.5


def test_fedprox_clients_add_the_proximal_term() -> None:
    base = {"clients": 2, "rounds": 1, "protocol": "fedavg", "strategy": "fedprox", "batch_size": 1, "local_steps": 3}
    base |= {"learning_rate": 0.01}
    free, _ = train_round(cell(federation=base | {"strategy_options": {"proximal_mu": 0.0}}))
    held, _ = train_round(cell(federation=base | {"strategy_options": {"proximal_mu": 50.0}}))
    assert _change_norm(held[0]) < 0.95 * _change_norm(free[0])


def test_a_node_brings_its_own_data_and_seed(tmp_path) -> None:
    import numpy as np

    own = tmp_path / "own.npz"
    pixels = np.random.default_rng(0).integers(0, 255, (40, 16, 16, 3), dtype=np.uint8)
    np.savez(own, x=pixels, y=np.arange(40) % 8)
    settings = cell(federation={"clients": 1, "rounds": 1, "batch_size": 3})
    config = {"fedattack": settings.model_dump_json(), "truth": str(tmp_path / "truth")}
    updates = []
    for seed in (1, 2):
        grid = InProcessGrid(make_client_app(), 1, node_config={"dataset": f"npz:{own}", "private-seed": seed})
        splits = load_splits(settings)
        arrays = ArrayRecord(initial_state(build_victim(settings, splits.private.image_shape, 8)))
        strategy = HonestButCurious(STRATEGIES.create("fedsgd", federation=settings.federation), updates.append)
        with quiet_flower():
            strategy.start(grid, arrays, num_rounds=1, train_config=ConfigRecord(config))
    assert not torch.equal(updates[0].received["linear0.weight"], updates[1].received["linear0.weight"])
    assert not (tmp_path / "truth").exists(), "nobody may have a node write down its own images"


def test_a_witness_stands_in_simulations_only(tmp_path) -> None:
    """What a server asks for is not enough: the node must be a simulated one, with no data and no seed of its own."""

    def context(**node_config):
        return Context(
            run_id=1, node_id=1, node_config={"partition-id": 0, **node_config}, state=RecordDict(), run_config={}
        )

    wanted = str(tmp_path / "truth")
    assert truth_folder(context(witness=True), wanted) == tmp_path / "truth"
    assert truth_folder(context(witness=True), "") is None
    assert truth_folder(context(), wanted) is None, "a deployment"
    assert truth_folder(context(witness=True, dataset="images:/data"), wanted) is None
    assert truth_folder(context(witness=True, **{"private-seed": 3}), wanted) is None


def test_a_clients_draws_cannot_be_repeated_without_its_images() -> None:
    settings = cell(federation={"clients": 2})
    splits, shares = load_splits(settings).private, client_shares(settings)
    context = Context(run_id=1, node_id=1, node_config={"partition-id": 0}, state=RecordDict(), run_config={})
    seeds = [client_seed(context, settings, splits.subset(share)) for share in shares]
    assert seeds[0] != seeds[1]
    assert seeds[0] == client_seed(context, settings, splits.subset(shares[0]))
    other = splits.subset(shares[0])
    other.pixels[0, 0, 0, 0] += 1
    assert client_seed(context, settings, other) != seeds[0]


def test_two_equal_defenses_draw_different_noise() -> None:
    settings = cell(federation={"defense": "gaussian-noise(sigma=0.1) + gaussian-noise(sigma=0.1)"})
    noise = defend({"w": torch.zeros(100_000)}, {}, settings, client="c", server_round=1, seed=0)["w"]
    assert float(noise.std()) == pytest.approx(0.1 * 2**0.5, rel=0.02)


def test_defenses_leave_running_statistics_alone() -> None:
    settings = cell(federation={"protocol": "fedavg", "defense": "gaussian-noise(sigma=1.0)"})
    update = {"bn.weight": torch.zeros(5), "bn.running_mean": torch.zeros(5), "bn.running_var": torch.ones(5)}
    sent = {name: tensor.clone() for name, tensor in update.items()}
    defended = defend(update, sent, settings, client="c", server_round=1, seed=0)
    assert torch.equal(defended["bn.running_var"], update["bn.running_var"])
    assert not torch.equal(defended["bn.weight"], update["bn.weight"])


def test_without_a_witness_folder_nothing_is_written(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = cell(federation={"clients": 1})
    data = load_splits(settings).private
    sent = initial_state(build_victim(settings, data.image_shape, data.num_classes))
    result = train_locally(settings, sent, data, client=client_name(0), server_round=1, seed=0)
    assert set(result.update) == set(sent)
    assert not list(tmp_path.iterdir())
    assert "truth" not in json.loads(settings.model_dump_json())

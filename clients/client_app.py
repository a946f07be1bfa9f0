"""The Flower ClientApp: one app for both tasks and both protocols, in process, in simulation and in deployment.

Its settings arrive with every message (key "fedattack" of the ConfigRecord), so the same object serves every cell of a
campaign. Defenses and Flower's own mods are chained around the training function in the order in which they are listed.
A node may bring its own data ("dataset" in its node config) and its own seed ("private-seed"); in a deployment it should.
"""

import sys
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from clients.training import client_name, defend, train_locally
from fedattack.cells import client_shares, evaluate, load_splits
from fedattack.config import Settings
from fedattack.data import ImageData, load_dataset
from fedattack.errors import FedattackError, must
from fedattack.jobs import torch_threads
from fedattack.registry import MODS, parse_spec
from fedattack.seeding import derive_seed, seeded_global_generators

Handler = Callable[[Message, Context], Message]
Mod = Callable[[Message, Context, Handler], Message]


def settings_of(message: Message) -> Settings:
    """The cell's settings as the server sent them."""
    return Settings.model_validate_json(str(_config(message)["fedattack"]))


def defense_mod(message: Message, context: Context, call_next: Handler) -> Message:
    """The cell's own defenses as a Flower mod: what leaves the client is what they make of the update."""
    settings, sent = settings_of(message), _arrays(message).to_torch_state_dict()
    reply = call_next(message, context)
    if reply.has_error() or not settings.federation.defenses():
        return reply
    partition_id, seed = partition_id_of(context), client_seed(context, settings, private_data(settings, context))
    update = _arrays(reply).to_torch_state_dict()
    with torch_threads(1):
        defended = defend(
            update,
            sent,
            settings,
            client=client_name(partition_id),
            server_round=int(_config(message)["server-round"]),
            seed=seed,
        )
    key = next(iter(reply.content.array_records))
    reply.content[key] = ArrayRecord(defended)
    return reply


def flower_mod(spec: str) -> Mod:
    """One of Flower's own mods: "fixedclipping", "localdp(clipping_norm=1.0, sensitivity=…, epsilon=…, delta=…)"."""
    name, parameters = parse_spec(spec)
    found = MODS.get(name)
    made: Mod = MODS.create(name, **parameters) if isinstance(found, type) else found
    return made


def configured_mods(message: Message, context: Context, call_next: Handler) -> Message:
    """Chain the mods that this message's settings name around the training: Flower's outermost, then our defenses."""
    chain: list[Mod] = [*(flower_mod(spec) for spec in settings_of(message).federation.mods), defense_mod]
    handler = reduce(_wrapped, reversed(chain), call_next)
    settings = settings_of(message)
    seed = client_seed(context, settings, private_data(settings, context))
    with seeded_global_generators(derive_seed(seed, "mods", int(_config(message)["server-round"]))):
        return handler(message, context)  # Flower's local DP draws from numpy's global generator


def train(message: Message, context: Context) -> Message:
    """One round of local training."""
    config, settings = _config(message), settings_of(message)
    partition_id, data = partition_id_of(context), private_data(settings, context)
    with torch_threads(1):
        result = train_locally(
            settings,
            _arrays(message).to_torch_state_dict(),
            data,
            client=client_name(partition_id),
            server_round=int(config["server-round"]),
            seed=client_seed(context, settings, data),
            proximal_mu=float(config.get("proximal-mu", 0.0)),
            truth=truth_folder(context, str(config.get("truth", ""))),
        )
    metrics = {"train-loss": result.loss, "num-examples": result.num_examples, "partition-id": partition_id}
    return _reply(message, {"arrays": ArrayRecord(result.update), "metrics": MetricRecord(metrics)})


def evaluate_locally(message: Message, context: Context) -> Message:
    """Loss and accuracy of the global model on the client's own images."""
    settings = settings_of(message)
    data = private_data(settings, context)
    with torch_threads(1):
        figures = evaluate(settings, _arrays(message).to_torch_state_dict(), data)
    metrics = {f"eval-{name}": value for name, value in figures.items()} | {"num-examples": len(data)}
    return _reply(message, {"metrics": MetricRecord(metrics)})


def private_data(settings: Settings, context: Context) -> ImageData:
    """The node's own data set where its node config names one, else its share of the cell's."""
    own = str(context.node_config.get("dataset", ""))
    if own:
        return load_dataset(own, **settings.data.options).private
    partition_id, shares = partition_id_of(context), client_shares(settings)
    if partition_id >= len(shares):
        raise FedattackError(
            must("partition-id of a node", f"below the number of clients, {len(shares)}", partition_id)
        )
    return load_splits(settings).private.subset(shares[partition_id])


def truth_folder(context: Context, wanted: str) -> Path | None:
    """Where the witness may write: where the server says, but only in a simulation, and never about a node's own data.

    A simulation is the in-process engine (which says so in the node config) or Flower's, whose clients live in Ray workers.
    """
    ray = sys.modules.get("ray")
    simulated = bool(context.node_config.get("witness")) or (ray is not None and ray.is_initialized())
    own = "dataset" in context.node_config or "private-seed" in context.node_config
    return Path(wanted) if wanted and simulated and not own else None


def make_client_app() -> ClientApp:
    """A new ClientApp; tests and in-process runs make their own, `flwr run` uses `app` below."""
    client_app = ClientApp()
    client_app.train(mods=[configured_mods])(train)
    client_app.evaluate()(evaluate_locally)
    return client_app


app = make_client_app()


def _wrapped(call_next: Handler, mod: Mod) -> Handler:
    return lambda message, context: mod(message, context, call_next)


def _config(message: Message) -> ConfigRecord:
    return next(iter(message.content.config_records.values()))


def _arrays(message: Message) -> ArrayRecord:
    return next(iter(message.content.array_records.values()))


def partition_id_of(context: Context) -> int:
    """Which client a node is; every engine and deployment says it in the node config."""
    if "partition-id" not in context.node_config:
        raise FedattackError(must("node config", "given a partition-id", dict(context.node_config)))
    return int(context.node_config["partition-id"])


def client_seed(context: Context, settings: Settings, data: ImageData) -> int:
    """The client's own root seed, from which its batches, its t and ε, and its defenses' noise are drawn.

    The node's "private-seed" where it has one; else a function of the run's seed and of the client's images, so that nobody
    who does not have them can draw the same noise and take it off again.
    """
    own = context.node_config.get("private-seed")
    return derive_seed(int(own), "client") if own is not None else derive_seed(settings.seed, "client", data.digest())


def _reply(message: Message, content: dict[str, Any]) -> Message:
    return Message(content=RecordDict(content), reply_to=message)

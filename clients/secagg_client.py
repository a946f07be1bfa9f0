"""The client under SecAgg+ (Bell et al., CCS 2020, as Flower implements it): the server sees masked vectors.

Flower 1.41 has SecAgg+ in its older path only (a client_fn ClientApp and a workflow), so this is a second, thin ClientApp
around the very same local training and defenses.
"""

from dataclasses import dataclass

import numpy as np
import torch
from flwr.app import Context
from flwr.client import NumPyClient
from flwr.client.mod import secaggplus_mod
from flwr.clientapp import ClientApp

from clients.client_app import client_seed, partition_id_of, private_data, truth_folder
from clients.training import client_name, defend, train_locally
from fedattack.config import Settings
from fedattack.jobs import torch_threads

Scalar = bool | bytes | float | int | str


@dataclass(frozen=True)
class SecAggPlus:
    """Flower's SecAgg+: so many key shares a client, of which `reconstruction_threshold` unmask one that dropped out."""

    num_shares: int = 3
    reconstruction_threshold: int = 2


class SecAggClient(NumPyClient):
    """Local training for one message; weights travel as a list in the order of their names in the settings' message."""

    def __init__(self, context: Context) -> None:
        self.context = context

    def fit(
        self, parameters: list[np.ndarray], config: dict[str, Scalar]
    ) -> tuple[list[np.ndarray], int, dict[str, Scalar]]:
        settings = Settings.model_validate_json(str(config["fedattack"]))
        names = str(config["names"]).split(",")
        sent = {name: torch.from_numpy(np.asarray(array).copy()) for name, array in zip(names, parameters, strict=True)}
        data, truth = private_data(settings, self.context), truth_folder(self.context, str(config["truth"]))
        who = {
            "client": client_name(partition_id_of(self.context)),
            "server_round": int(config["server-round"]),
            "seed": client_seed(self.context, settings, data),
        }
        with torch_threads(1):
            result = train_locally(settings, sent, data, truth=truth, **who)  # type: ignore[arg-type]
            update = defend(result.update, sent, settings, **who)  # type: ignore[arg-type]
        return [update[name].numpy() for name in names], result.num_examples, {"train-loss": result.loss}


def make_secagg_client_app() -> ClientApp:
    """A ClientApp whose updates leave it masked."""
    return ClientApp(client_fn=lambda context: SecAggClient(context).to_client(), mods=[secaggplus_mod])

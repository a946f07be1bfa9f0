"""Federated averaging under SecAgg+: the server sees masked vectors and, at the end of a round, their mean.

What is left to attack is that mean: it is copied as one update of a client called "aggregate" with the images of all
clients behind it. Numbers of examples and losses of single clients still arrive in clear.
"""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, Context, RecordDict
from flwr.common import FitRes, Parameters, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.server import LegacyContext, ServerConfig
from flwr.server.client_proxy import ClientProxy
from flwr.server.strategy import FedAvg
from flwr.server.workflow import DefaultWorkflow, SecAggPlusWorkflow
from flwr.serverapp import Grid

from fedattack.config import Settings
from fedattack.registry import MODS, parse_spec
from fedattack.types import State, Update

AGGREGATE = "aggregate"


class _CuriousAverage(FedAvg):
    """FedAvg of Flower's older path that copies the only thing it is shown: the mean of a round."""

    def __init__(
        self, like: State, sink: Callable[[Update], Any], on_failure: Callable[..., Any], **options: Any
    ) -> None:
        super().__init__(**options)
        self.like, self.sink, self.on_failure = like, sink, on_failure
        self.current: State = {}
        self.losses: dict[int, float] = {}

    def configure_fit(self, server_round: int, parameters: Parameters, client_manager: Any) -> Any:
        self.current = _state(self.like, parameters)
        return super().configure_fit(server_round, parameters, client_manager)

    def aggregate_fit(
        self, server_round: int, results: list[tuple[ClientProxy, FitRes]], failures: list[Any]
    ) -> tuple[Parameters | None, dict[str, Any]]:
        if failures:
            self.on_failure(server_round, f"{len(failures)} clients failed")
        if not results:
            return None, {}
        mean = results[0][1].parameters  # every result carries the same mean, already weighted
        examples = sum(result.num_examples for _, result in results)
        self.losses[server_round] = sum(
            float(result.metrics.get("train-loss", 0.0)) * result.num_examples for _, result in results
        ) / max(examples, 1)
        self.sink(Update(server_round, AGGREGATE, self.current, _state(self.like, mean), "weights", examples))
        return mean, {}


def train_under_secagg(
    grid: Grid,
    settings: Settings,
    state: State,
    config: dict[str, str],
    *,
    sink: Callable[[Update], Any],
    measure: Callable[[int, ArrayRecord], Any],
    on_failure: Callable[[int, str], Any],
) -> tuple[State, dict[int, float]]:
    """Run all rounds; gives the final weights and the mean training loss of every round."""
    names = list(state)
    name, parameters = parse_spec(settings.federation.mods[0])
    protocol = MODS.create(name, **parameters)
    clients = settings.federation.clients
    final = dict(state)

    def evaluate(server_round: int, arrays: list[np.ndarray], _: dict[str, Any]) -> None:
        final.update(_state(state, ndarrays_to_parameters(arrays)))
        measure(server_round, ArrayRecord(dict(final)))

    strategy = _CuriousAverage(
        state,
        sink,
        on_failure,
        fraction_evaluate=0.0,
        min_fit_clients=clients,
        min_available_clients=clients,
        initial_parameters=ndarrays_to_parameters([state[name].numpy() for name in names]),
        on_fit_config_fn=lambda number: {**config, "names": ",".join(names), "server-round": number},
        evaluate_fn=evaluate,
    )
    context = LegacyContext(
        context=Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={}),
        config=ServerConfig(num_rounds=settings.federation.rounds),
        strategy=strategy,
    )
    workflow = SecAggPlusWorkflow(
        num_shares=protocol.num_shares, reconstruction_threshold=protocol.reconstruction_threshold
    )
    before = random.getstate()  # the workflow draws its neighbours from the global generator: leave it as it was
    try:
        DefaultWorkflow(fit_workflow=workflow)(grid, context)
    finally:
        random.setstate(before)
    return final, strategy.losses


def _state(like: State, parameters: Parameters) -> State:
    """Named tensors in the types of `like`: unmasking gives float64 whatever was sent."""
    arrays = parameters_to_ndarrays(parameters)
    return {name: torch.from_numpy(np.array(a)).to(like[name].dtype) for name, a in zip(like, arrays, strict=True)}

"""The engines that run the same ServerApp and ClientApp: in this process, and in Flower's simulation.

The other ways, `flwr run .` and deployments (experiments/deployment.py starts one), go through the `app` objects of
strategies/server_app.py and clients/client_app.py and need nothing from here.
"""

import os

from flwr.clientapp import ClientApp

from clients.client_app import make_client_app
from clients.secagg_client import make_secagg_client_app
from fedattack.config import Experiment, Settings
from fedattack.store import RunFolder
from strategies.attack_pool import AttackPool, OnStatus
from strategies.federation import OnRound, groups_of, run_federations
from strategies.in_process_grid import InProcessGrid, quiet_flower
from strategies.server_app import make_server_app

QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


def run_in_process(
    experiment: Experiment, run: RunFolder, *, on_round: OnRound | None = None, on_status: OnStatus | None = None
) -> None:
    """Clients one after another in this process; attacks on the pool, which uses Ray only if it is told to."""
    with AttackPool(run, experiment.pool) as pool, quiet_flower():
        for cells in groups_of(experiment):
            part = experiment.model_copy(update={"cells": tuple(cells)})
            grid = InProcessGrid(_client_app(part), cells[0].federation.clients)
            run_federations(grid, part, run, pool, on_round=on_round)
        pool.drain(on_status=on_status)


def run_in_simulation(
    experiment: Experiment, run: RunFolder, *, on_round: OnRound | None = None, on_status: OnStatus | None = None
) -> None:
    """Flower's simulation: one Ray actor a core trains clients, the attack pool lives in the same Ray cluster.

    The only caller of flwr.simulation.run_simulation, which Flower calls deprecated but which alone gives a true error.
    """
    from flwr.simulation import run_simulation

    os.environ.update(QUIET)
    if experiment.pool.address:
        os.environ["RAY_ADDRESS"] = experiment.pool.address
    init_args = {"log_to_driver": False} | ({} if "RAY_ADDRESS" in os.environ else {"num_cpus": os.cpu_count() or 1})
    backend = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}, "init_args": init_args}
    for part in _parts(experiment):
        with quiet_flower():
            run_simulation(
                make_server_app(part, run, on_round=on_round, on_status=on_status),
                _client_app(part),
                part.cells[0].federation.clients,
                backend_config=backend,
            )


def _parts(experiment: Experiment) -> list[Experiment]:
    """Cells that can share one simulation: the same number of clients, and all or none under SecAgg+."""
    parts: dict[tuple[int, bool], list[Settings]] = {}
    for cell in experiment.cells:
        parts.setdefault((cell.federation.clients, cell.federation.secure_aggregation), []).append(cell)
    return [experiment.model_copy(update={"cells": tuple(cells)}) for cells in parts.values()]


def _client_app(experiment: Experiment) -> ClientApp:
    """SecAgg+ lives in Flower's older message path and needs a ClientApp of that kind."""
    return make_secagg_client_app() if experiment.cells[0].federation.secure_aggregation else make_client_app()


ENGINES = {"in-process": run_in_process, "simulation": run_in_simulation}

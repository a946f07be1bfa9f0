"""The Flower ServerApp: for `flwr run .`, for `fedattack run` with engine = "simulation", and for deployment.

`app` reads its configuration from the run config of `flwr run` (keys config, run-dir, overrides); `make_server_app` takes it
as arguments. Both train every federation of the configuration, drain the attack pool, and leave a run folder.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedattack.config import Experiment, load_config
from fedattack.errors import ConfigError, must
from fedattack.store import RunFolder
from strategies.attack_pool import AttackPool, OnStatus
from strategies.federation import OnRound, run_federations

APP_ROOT = Path(__file__).resolve().parent.parent


def make_server_app(
    experiment: Experiment, run: RunFolder, *, on_round: OnRound | None = None, on_status: OnStatus | None = None
) -> ServerApp:
    """A ServerApp that runs this experiment into this folder inside Flower's simulation."""
    server_app = ServerApp()

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        serve(grid, experiment, run, on_round=on_round, on_status=on_status)

    return server_app


def serve(
    grid: Grid,
    experiment: Experiment,
    run: RunFolder,
    *,
    witness: bool = True,
    on_round: OnRound | None = None,
    on_status: OnStatus | None = None,
) -> None:
    """Train, copy, attack; every job has an outcome when this returns (Flower shuts Ray down right afterwards)."""
    with AttackPool(run, experiment.pool, wait_for_ray=_simulated(grid)) as pool:
        run_federations(grid, experiment, run, pool, witness=witness, on_round=on_round)
        pool.drain(on_status=on_status)


def _simulated(grid: Grid) -> bool:
    """Whether this is Flower's simulation, where clients share this disk and Ray is starting in another thread."""
    return type(grid).__name__ == "InMemoryGrid"


def read_run_config(run_config: Mapping[str, Any]) -> tuple[Experiment, RunFolder]:
    """The experiment and the run folder that a run config names; a relative recipe is looked up here, then in the app."""
    named = Path(str(run_config.get("config", "")))
    places = [named] if named.is_absolute() else [Path.cwd() / named, APP_ROOT / named]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise ConfigError(must("config", "a TOML file in " + " or ".join(str(p.parent) for p in places), str(named)))
    experiment = load_config(path, str(run_config.get("overrides", "")).split())
    require_deployable(experiment)
    folder = str(run_config.get("run-dir", "")) or os.environ.get("FEDATTACK_RUN_DIR", "") or f"runs/{experiment.name}"
    return experiment, RunFolder(Path(folder).resolve())


def require_deployable(experiment: Experiment) -> None:
    """Raises ConfigError for what cannot be one Flower run: one set of nodes, one ClientApp, Flower's present message path."""
    clients = {cell.federation.clients for cell in experiment.cells}
    if len(clients) > 1:
        raise ConfigError(f"federation.clients must be the same in all cells under `flwr run`, got {sorted(clients)}")
    if any(cell.federation.secure_aggregation for cell in experiment.cells):
        raise ConfigError("federation.mods: secaggplus needs engine = 'in-process' or 'simulation', not `flwr run`")


def on_cluster(experiment: Experiment, run_config: Mapping[str, Any]) -> Experiment:
    """The experiment with its attacks on the Ray cluster that the run config names, if it names one (it is no setting that
    would belong into the run folder)."""
    address, resource = (str(run_config.get(key, "")) for key in ("ray-address", "ray-resource"))
    pool = experiment.pool.model_copy(update={"address": address, "resource": resource})
    return experiment.model_copy(update={"pool": pool}) if address else experiment


app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """`flwr run .` and deployments: the whole road, report included.

    In a deployment, clients write the truth only where the run config and their own node config both say `witness=true`.
    """
    from fedattack.finishing import begin_run, finish_run

    experiment, run = read_run_config(context.run_config)
    simulated = _simulated(grid)
    command = str(context.run_config.get("command", "")) or "flwr run ."
    begun = begin_run(run, experiment, engine="flwr run" if simulated else "deployment", command=command)
    attacked = on_cluster(experiment, context.run_config)
    serve(grid, attacked, run, witness=simulated or bool(context.run_config.get("witness", False)))
    finish_run(run, experiment, begun)

"""Train the federations of an experiment on a Grid, copy the updates, hand the copies to the attack pool."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from flwr.serverapp import Grid

from fedattack.cells import build_victim, evaluate, initial_state, load_splits
from fedattack.config import Experiment, Settings
from fedattack.jobs import outcome_path, torch_threads
from fedattack.planning import job_id, plan_jobs, prepare_federation, update_context, updates_of
from fedattack.registry import STRATEGIES
from fedattack.seeding import derive_seed, seeded_global_generators
from fedattack.store import FederationFolder, RunFolder, UpdateFolder, append_row, write_json, write_tensors
from fedattack.types import State, Update
from strategies.attack_pool import AttackPool
from strategies.honest_but_curious import HonestButCurious, Incident
from strategies.inspection import to_state

PUBLIC_STORED = 1024
"""Public images kept with a federation at least, so that a later cell may be given more than an earlier one."""

OnRound = Callable[[Settings, int], None]
Sink = Callable[[Update], None]
Measure = Callable[[int, ArrayRecord], MetricRecord]
Report = Callable[[Incident], None]


def groups_of(experiment: Experiment) -> list[list[Settings]]:
    """Cells that share a federation, in the order in which they are written."""
    groups: dict[str, list[Settings]] = {}
    for settings in experiment.cells:
        groups.setdefault(settings.federation_id, []).append(settings)
    return list(groups.values())


def run_federations(
    grid: Grid,
    experiment: Experiment,
    run: RunFolder,
    pool: AttackPool,
    *,
    witness: bool = True,
    on_round: OnRound | None = None,
) -> None:
    """Every federation that is not done yet, one after another; attacks start as soon as there is a copy.

    `witness` asks the clients to write the truth beside the copies, which only makes sense where they share this disk.
    """
    for cells in groups_of(experiment):
        folder = run.federation(cells[0].federation_id)
        if folder.done.exists():
            for path in updates_of(folder):
                _submit(cells, run, pool, path, experiment.pool.timeout_seconds)
        else:
            _run_federation(grid, cells, run, pool, experiment.pool.timeout_seconds, witness, on_round)


def _run_federation(
    grid: Grid,
    cells: Sequence[Settings],
    run: RunFolder,
    pool: AttackPool,
    timeout_seconds: float,
    witness: bool,
    on_round: OnRound | None,
) -> None:
    settings = cells[0]
    folder = run.federation(settings.federation_id)
    _clear(folder)
    splits = load_splits(settings)
    shape, classes = splits.private.image_shape, splits.private.num_classes
    public = max(PUBLIC_STORED, *(cell.threat.public_images for cell in cells))
    prepare_federation(settings, folder, splits.public.images(range(min(public, len(splits.public)))))
    save = UpdateFolder(folder.updates, update_context(settings, shape, classes))

    def sink(update: Update) -> None:
        before = save.digest(update)
        path = save(update)
        if before not in (None, save.digest(update)):
            _forget_outcomes(cells, run, path)  # of a run that was cut off and now went another way
        _submit(cells, run, pool, path, timeout_seconds)

    def on_incident(incident: Incident) -> None:
        append_row(folder.incidents, asdict(incident))

    def measure(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        with torch_threads(1):
            figures = evaluate(settings, to_state(arrays), splits.test)
        named = {f"test_{name}": value for name, value in figures.items()}
        append_row(folder.history, {"round": server_round, **named})
        if on_round is not None:
            on_round(settings, server_round)
        return MetricRecord(dict(named))

    state = initial_state(build_victim(settings, shape, classes))
    config = {
        "fedattack": settings.model_dump_json(exclude={"attack", "threat", "capture", "title"}),
        "truth": str(folder.truth.resolve()) if witness else "",
    }
    train = _train_under_secagg if settings.federation.secure_aggregation else _train
    final, losses = train(grid, settings, state, config, sink, measure, on_incident)
    for server_round, loss in losses.items():
        append_row(folder.history, {"round": server_round, "train_loss": loss})
    write_tensors(folder.model, final, {"type": "model", "rounds": settings.federation.rounds})
    write_json(folder.done, {"rounds": settings.federation.rounds, "updates": len(updates_of(folder))})


def _train(
    grid: Grid, settings: Settings, state: State, config: dict[str, str], sink: Sink, measure: Measure, report: Report
) -> tuple[State, dict[int, float]]:
    """Flower's message path: any strategy, wrapped."""
    federation = settings.federation
    inner = STRATEGIES.create(federation.strategy_name, federation=federation, **federation.strategy_options)
    strategy = HonestButCurious(
        inner,
        sink,
        rounds=settings.capture.rounds,
        clients=settings.capture.clients,
        kind="gradient" if federation.protocol == "fedsgd" else "weights",
        on_incident=report,
    )
    # Flower samples clients and draws server-side noise from the global generators
    with seeded_global_generators(derive_seed(settings.seed, "server")):
        result = strategy.start(
            grid,
            ArrayRecord(dict(state)),
            num_rounds=federation.rounds,
            train_config=ConfigRecord(dict(config)),
            evaluate_config=ConfigRecord({"fedattack": config["fedattack"]}),
            evaluate_fn=measure,
        )
    losses = {number: float(record["train-loss"]) for number, record in result.train_metrics_clientapp.items()}
    return to_state(result.arrays) if len(result.arrays) else state, losses


def _train_under_secagg(
    grid: Grid, settings: Settings, state: State, config: dict[str, str], sink: Sink, measure: Measure, report: Report
) -> tuple[State, dict[int, float]]:
    """Flower's older path, in which SecAgg+ lives: only the mean of a round can be copied."""
    from strategies.secure_aggregation import train_under_secagg

    def wanted(update: Update) -> None:
        if not settings.capture.rounds or update.round in settings.capture.rounds:
            sink(update)

    return train_under_secagg(
        grid,
        settings,
        state,
        config,
        sink=wanted,
        measure=measure,
        on_failure=lambda number, problem: report(Incident(number, "server", (problem,))),
    )


def _submit(cells: Sequence[Settings], run: RunFolder, pool: AttackPool, path: Path, timeout_seconds: float) -> None:
    for cell in cells:
        for job in plan_jobs(cell, run, path, timeout_seconds=timeout_seconds):
            pool.submit(job)


def _forget_outcomes(cells: Sequence[Settings], run: RunFolder, path: Path) -> None:
    for cell in cells:
        for attack in cell.attack:
            outcome_path(run.results, job_id(cell, path, attack)).unlink(missing_ok=True)


def _clear(folder: FederationFolder) -> None:
    """A federation that was cut off trains anew from its first round; attacks on copies that come out the same stay."""
    for path in (folder.history, folder.incidents):
        path.unlink(missing_ok=True)

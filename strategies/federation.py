"""Train the federations of an experiment on a Grid, copy the updates, hand the copies to the attack pool."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedattack.cells import build_victim, evaluate, load_splits, starting_weights
from fedattack.checkpoints import Checkpointer, digest_of
from fedattack.config import FINAL, Experiment, Settings
from fedattack.errors import FedattackError, MissingDependency
from fedattack.jobs import Job, outcome_path, torch_threads
from fedattack.planning import job_id, plan_jobs, prepare_federation, update_context, updates_of
from fedattack.priors import folder_of, on_hub
from fedattack.registry import STRATEGIES
from fedattack.seeding import derive_seed, seeded_global_generators
from fedattack.store import (
    FederationFolder,
    RunFolder,
    UpdateFolder,
    append_row,
    read_json,
    read_rows,
    read_tensors,
    write_json,
    write_rows,
    write_tensors,
)
from fedattack.tasks import Diffusion
from fedattack.types import State, Update
from strategies.attack_pool import AttackPool
from strategies.honest_but_curious import HonestButCurious, Incident
from strategies.inspection import to_state
from strategies.resuming import (
    CountedRounds,
    Progress,
    has_own_start,
    load_progress,
    restore_memory,
    save_progress,
    why_not_resumable,
)

log = logging.getLogger("fedattack.server")

PUBLIC_STORED = 1024
"""Public images kept with a federation at least, so that a later cell may be given more than an earlier one."""

SERVER_ONLY: dict[str, Any] = {
    **dict.fromkeys(("attack", "threat", "capture", "checkpoint", "title"), True),
    "model": {"weights"},
}
"""Settings that clients have no use for and are not told."""

OnRound = Callable[[Settings, int, Mapping[str, float]], None]
"""Called after every round (0: before the first) with its figures: test_loss, train_loss, samples drawn, …"""

Sink = Callable[[Update], None]
Measure = Callable[[int, ArrayRecord, float | None], dict[str, float]]
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
    _fetch_priors(experiment)
    for cells in groups_of(experiment):
        folder = run.federation(cells[0].federation_id)
        if _is_done(cells[0], folder):
            for path in updates_of(folder):
                _submit(cells, run, pool, path, experiment.pool.timeout_seconds)
        else:
            _run_federation(grid, cells, run, pool, experiment.pool.timeout_seconds, witness, on_round)


def _fetch_priors(experiment: Experiment) -> None:
    """Models of the hub that attacks will ask for, before any training; one that cannot be had fails the attacks alone."""
    names = {cell.threat.prior for cell in experiment.cells if cell.attack}
    for name in sorted(name for name in names if name and name != FINAL and on_hub(name)):
        log.info("prior %s: from the hub", name)
        try:
            folder_of(name)
        except MissingDependency as error:
            log.warning("%s", error)


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
    federation, folder = settings.federation, run.federation(settings.federation_id)
    splits = load_splits(settings)
    shape, classes = splits.private.image_shape, splits.private.num_classes
    public = max(PUBLIC_STORED, *(cell.threat.public_images for cell in cells))
    prepare_federation(settings, folder, splits.public.images(range(min(public, len(splits.public)))))
    save = UpdateFolder(folder.updates, update_context(settings, shape, classes))
    waiting = [cell for cell in cells if cell.threat.prior == FINAL]  # for the model that this training ends with
    prompt = [cell for cell in cells if cell not in waiting]
    victim = build_victim(settings, shape, classes)
    if isinstance(task := settings.task.build(), Diffusion):
        task.check_model(victim, shape)
    keeper = _checkpointer(settings, folder)

    progress = _progress_of(settings, folder)
    _rewind(folder, progress.completed if progress else -1)
    copied = [path for path in updates_of(folder) if progress and _round_of(path) <= progress.completed]
    for path in copied:
        _submit(prompt, run, pool, path, timeout_seconds)
    if progress and keeper.average is not None and progress.about["steps"]:
        keeper.average.restore(progress.extra, progress.about["steps"])

    def sink(update: Update) -> None:
        before = save.digest(update)
        path = save(update)
        copied.append(path)
        if before not in (None, save.digest(update)):
            _forget_outcomes(cells, run, path)  # of a run that was cut off and now went another way
        _submit(prompt, run, pool, path, timeout_seconds)

    def on_incident(incident: Incident) -> None:
        append_row(folder.incidents, asdict(incident))

    def measure(server_round: int, arrays: ArrayRecord, train_loss: float | None) -> dict[str, float]:
        state = to_state(arrays)
        with torch_threads(1):
            figures = {f"test_{name}": value for name, value in evaluate(settings, state, splits.test).items()}
            if train_loss is not None:
                figures["train_loss"] = train_loss
            if server_round:
                keeper.after_round(server_round, state)
        append_row(folder.history, {"round": server_round, **figures})
        return figures

    def keep(server_round: int, arrays: ArrayRecord, strategy: Strategy) -> None:
        average = keeper.average
        about = {"weights": _weights_digest(settings), "steps": average.about["steps"] if average else 0}
        extra = average.state if average else {}
        save_progress(folder.progress, server_round, arrays, strategy, extra=extra, about=about)

    def tell(server_round: int, figures: Mapping[str, float]) -> None:
        if on_round is not None:
            on_round(settings, server_round, figures)

    state = to_state(progress.arrays) if progress else starting_weights(settings, victim)
    config = {
        "fedattack": settings.model_dump_json(exclude=SERVER_ONLY),
        "truth": str(folder.truth.resolve()) if witness and settings.capture.enabled else "",
    }
    if federation.secure_aggregation:
        final = _train_under_secagg(grid, settings, state, config, sink, measure, tell, on_incident, folder)
    else:
        final = _train(grid, settings, state, config, sink, measure, keep, tell, on_incident, folder, progress)
    for path in updates_of(folder):
        if path not in copied:
            path.unlink()  # of a run that was cut off and had drawn other clients
    write_tensors(folder.model, final, {"type": "model", "rounds": federation.rounds})
    if keeper.due(federation.rounds) and not folder.checkpoint(federation.rounds).exists():
        keeper.after_round(federation.rounds, final)  # a strategy whose own `start` measures nothing
    done = {"rounds": federation.rounds, "updates": len(updates_of(folder)), "weights": _weights_digest(settings)}
    write_json(folder.done, done)
    folder.progress.unlink(missing_ok=True)
    for path in updates_of(folder):
        _submit(waiting, run, pool, path, timeout_seconds)


def _train(
    grid: Grid,
    settings: Settings,
    state: State,
    config: dict[str, str],
    sink: Sink,
    measure: Measure,
    keep: Callable[[int, ArrayRecord, Strategy], None],
    tell: Callable[[int, Mapping[str, float]], None],
    report: Report,
    folder: FederationFolder,
    progress: Progress | None,
) -> State:
    """Flower's message path: any strategy, wrapped; from the first round, or from where `progress` says."""
    federation = settings.federation
    inner = _strategy(settings)
    if progress:
        restore_memory(inner, progress)
    curious = HonestButCurious(
        inner,
        sink if settings.capture.enabled else _nowhere,
        rounds=settings.capture.rounds,
        clients=settings.capture.clients,
        kind="gradient" if federation.protocol == "fedsgd" else "weights",
        on_incident=report,
    )
    seed, completed = derive_seed(settings.seed, "server"), progress.completed if progress else 0
    strategy = curious if has_own_start(inner) else CountedRounds(curious, seed=seed, completed=completed)
    losses = strategy.metrics if isinstance(strategy, CountedRounds) else {}
    resumable = not _why_anew(settings, inner)

    def evaluate_fn(counted: int, arrays: ArrayRecord) -> MetricRecord | None:
        if counted == 0 and progress:
            return None  # done and written down before the interruption
        number = completed + counted
        figures = measure(number, arrays, float(losses[number]["train-loss"]) if number in losses else None)
        if resumable:
            keep(number, arrays, inner)
        tell(number, figures)
        return MetricRecord(dict(figures))

    arrays = progress.arrays if progress else ArrayRecord(dict(state))
    if completed == federation.rounds:
        return state
    # Flower samples clients and draws server-side noise from the global generators
    with seeded_global_generators(seed):
        result = strategy.start(
            grid,
            arrays,
            num_rounds=federation.rounds - completed,
            train_config=ConfigRecord(dict(config)),
            evaluate_config=ConfigRecord({"fedattack": config["fedattack"]}),
            evaluate_fn=evaluate_fn,
        )
    for number, record in result.train_metrics_clientapp.items():
        if not isinstance(strategy, CountedRounds):
            append_row(folder.history, {"round": number, "train_loss": float(record["train-loss"])})
    return to_state(result.arrays) if len(result.arrays) else state


def _train_under_secagg(
    grid: Grid,
    settings: Settings,
    state: State,
    config: dict[str, str],
    sink: Sink,
    measure: Measure,
    tell: Callable[[int, Mapping[str, float]], None],
    report: Report,
    folder: FederationFolder,
) -> State:
    """Flower's older path, in which SecAgg+ lives: only the mean of a round can be copied."""
    from strategies.secure_aggregation import train_under_secagg

    def wanted(update: Update) -> None:
        if settings.capture.enabled and (not settings.capture.rounds or update.round in settings.capture.rounds):
            sink(update)

    def measured(server_round: int, arrays: ArrayRecord) -> None:
        tell(server_round, measure(server_round, arrays, None))

    final, losses = train_under_secagg(
        grid,
        settings,
        state,
        config,
        sink=wanted,
        measure=measured,
        on_failure=lambda number, problem: report(Incident(number, "server", (problem,))),
    )
    for number, loss in losses.items():
        append_row(folder.history, {"round": number, "train_loss": loss})
    return final


def _nowhere(update: Update) -> None:
    """The sink of a server that is not curious."""


def _strategy(settings: Settings) -> Strategy:
    federation = settings.federation
    made: Strategy = STRATEGIES.create(federation.strategy_name, federation=federation, **federation.strategy_options)
    return made


def _checkpointer(settings: Settings, folder: FederationFolder) -> Checkpointer:
    data = load_splits(settings).private
    return Checkpointer(
        settings.checkpoint,
        folder,
        build_victim(settings, data.image_shape, data.num_classes),
        settings.task.build(),
        data.image_shape,
        rounds=settings.federation.rounds,
        seed=settings.seed,
    )


def _is_done(settings: Settings, folder: FederationFolder) -> bool:
    """Whether the federation trained to its end, from the weights that are at model.weights now (or were, if none are)."""
    if not folder.done.exists():
        return False
    before, now = read_json(folder.done).get("weights", ""), _weights_digest(settings)
    if now and before != now:
        log.warning("federation %s trains anew: %s has changed", settings.federation_id, settings.model.weights)
        folder.done.unlink()
        return False
    if settings.task.name == "diffusion" and not folder.checkpoint(settings.federation.rounds).exists():
        if settings.checkpoint.ema:
            log.warning("federation %s trains anew: its last checkpoint is gone", settings.federation_id)
            folder.done.unlink()
            return False
        _checkpointer(settings, folder).after_round(settings.federation.rounds, read_tensors(folder.model)[0])
    return True


def _weights_digest(settings: Settings) -> str:
    return digest_of(Path(settings.model.weights)) if settings.model.weights else ""


def _why_anew(settings: Settings, strategy: Strategy) -> str:
    """Why this federation can only start from its first round, "" if it can go on from any."""
    if settings.federation.secure_aggregation:
        return "SecAgg+ keeps its masks in memory only"
    if own := [mod for mod in settings.federation.mods if ":" in mod.split("(")[0]]:
        return f"what the mod {own[0]} remembers between rounds is not known"
    return why_not_resumable(strategy)


def _progress_of(settings: Settings, folder: FederationFolder) -> Progress | None:
    """Where an interrupted federation stands, None if it starts from its first round (the reason is logged)."""
    if not folder.history.exists():
        return None
    name = settings.federation_id
    try:
        if reason := _why_anew(settings, _strategy(settings)):
            raise FedattackError(reason)
        progress = load_progress(folder.progress)
        if progress.about["weights"] != _weights_digest(settings):
            raise FedattackError(f"{settings.model.weights} has changed")
    except FedattackError as reason:
        log.warning("federation %s starts anew from its first round: %s", name, reason)
        return None
    log.info("federation %s goes on after round %d", name, progress.completed)
    return progress


def _rewind(folder: FederationFolder, completed: int) -> None:
    """Forget what was written about rounds after `completed`; copies of theirs stay, their attacks too if they come out
    the same."""
    if completed < 0:
        folder.progress.unlink(missing_ok=True)
    for path in (folder.history, folder.incidents):
        if path.exists():
            rows = [row for row in read_rows(path) if row["round"] <= completed]
            write_rows(path, rows) if rows else path.unlink()


def _round_of(path: Path) -> int:
    return int(path.stem.rpartition("-round-")[2])


def _submit(cells: Sequence[Settings], run: RunFolder, pool: AttackPool, path: Path, timeout_seconds: float) -> None:
    for cell in cells:
        for job in plan_jobs(cell, run, path, timeout_seconds=timeout_seconds):
            if _prior_changed(run, job):
                outcome_path(run.results, job.job).unlink(missing_ok=True)
            pool.submit(job)


def _prior_changed(run: RunFolder, job: Job) -> bool:
    """Whether an earlier run of this job had another prior than the one that is at its place now (if both are known)."""
    before, now = run.jobs / f"{job.job}.json", job.facts["prior_digest"]
    return bool(now) and before.exists() and (Job.load(before).facts.get("prior_digest") or now) != now


def _forget_outcomes(cells: Sequence[Settings], run: RunFolder, path: Path) -> None:
    for cell in cells:
        for attack in cell.attack:
            outcome_path(run.results, job_id(cell, path, attack)).unlink(missing_ok=True)

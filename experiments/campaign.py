"""Run a configuration from beginning to end: federations, attacks, scores, report. Interrupted runs go on where they were."""

import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.engines import ENGINES
from fedattack.config import AttackSettings, Experiment, load_config
from fedattack.finishing import begin_run, finish_run
from fedattack.jobs import load_outcome, outcome_path
from fedattack.planning import jobs_of
from fedattack.store import RunFolder, read_rows
from strategies.attack_pool import OnStatus
from strategies.federation import OnRound, groups_of


@dataclass(frozen=True)
class Summary:
    """What a run left behind: its folder, its report, and how many attack jobs ended how."""

    run: RunFolder
    report: Path
    statuses: dict[str, int]
    lost: tuple[str, ...] = ()
    """Of a deployment: replies that did not come or could not be copied, a line each."""


def run_campaign(
    experiment: Experiment,
    folder: Path,
    *,
    retry_failed: bool = False,
    on_round: OnRound | None = None,
    on_status: OnStatus | None = None,
) -> Summary:
    """Run an experiment into `folder`. Federations and jobs that are done are skipped; failed jobs stay as they are.

    retry_failed: forget the outcomes of jobs that failed or ran out of time, so that they run again.
    """
    run = RunFolder(folder.resolve())
    command = "fedattack " + shlex.join(sys.argv[1:])
    begun = begin_run(run, experiment, engine=experiment.engine, command=command)
    if retry_failed:
        forget_failures(run, experiment)
    ENGINES[experiment.engine](experiment, run, on_round=on_round, on_status=on_status)
    report = finish_run(run, experiment, begun)
    statuses = Counter(str(row["status"]) for row in read_rows(run.rows) if row.get("kind") == "attack")
    return Summary(run, report, dict(statuses))


def load_run(folder: Path) -> Experiment:
    """The experiment of a run folder, as it was resolved when it ran."""
    return load_config(RunFolder(folder).config)


def describe(experiment: Experiment) -> Sequence[str]:
    """What a run will do, a line a federation and a figure."""
    federations = [
        f"{cells[0].title}: {cells[0].federation.clients} clients × {cells[0].federation.rounds} rounds of "
        f"{cells[0].federation.protocol} on {cells[0].data.dataset}, defense {cells[0].federation.defense}; "
        f"attacks: {', '.join(sorted({_spec(attack) for cell in cells for attack in cell.attack})) or 'none'}"
        for cells in groups_of(experiment)
    ]
    return [*federations, *(f"figure {figure.file_name}: {figure.heading}" for figure in experiment.figure)]


def _spec(attack: AttackSettings) -> str:
    return f"{attack.spec} ({attack.control})" if attack.control else attack.spec


def forget_failures(run: RunFolder, experiment: Experiment) -> None:
    """Forget the outcomes of jobs that failed or ran out of time, so that they run again."""
    for settings in experiment.cells:
        for _, job in jobs_of(settings, run):
            outcome = load_outcome(run.results, job)
            if outcome is not None and outcome.status in ("failed", "timeout"):
                outcome_path(run.results, job).unlink()

"""`fedattack floor`: the error floors of a run's updates."""

import math
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fedattack.cli.shared import by_name, say_round
from fedattack.errors import FedattackError


def floor(
    config: Annotated[
        Path | None,
        typer.Argument(help="A TOML configuration, e.g. experiments/recipes/demo.toml; not needed with --run."),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Changes as key=value, e.g. federation.rounds=1 model.name=lenet.")
    ] = None,
    run: Annotated[
        Path | None,
        typer.Option("--run", help="A finished run folder: its updates are measured, its report can show it."),
    ] = None,
    sigma: Annotated[
        str, typer.Option(help="Noise to state the floor at, e.g. 1e-3,1e-2; the defense's own comes first.")
    ] = "1e-3,1e-2",
    db: Annotated[float, typer.Option(help="The PSNR whose least noise σ* is stated.")] = 20.0,
    method: Annotated[
        str, typer.Option(help="auto, exact, sketch (close to exact, less memory) or probes (least, a bound at worst).")
    ] = "auto",
    seconds: Annotated[
        float, typer.Option(help="Under auto and probes, seconds an update may take, estimated by counting operations.")
    ] = 600.0,
    rv: Annotated[
        bool,
        typer.Option("--rv", help="Also state RV = ‖∂gradient/∂images‖_F of every update, and rank models and rounds."),
    ] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write everything as JSON.")] = None,
) -> None:
    """How well could any unbiased attack do? The Cramér-Rao floor of every update, before any attack is run.

    CONFIG is trained in a temporary folder (its attacks are left out), or --run names a folder that was. For each update:
    how many of the unknowns (pixels, and DDPM noise where hidden) it tells, the condition number, rms pixel error per unit of
    noise σ on every coordinate, the update's own rms, the PSNR that σ leaves, and σ*, the noise from which on no unbiased
    attack without a prior reaches --db. Noise-free updates are limited by the rounding of what is sent. Labels and timesteps
    count as known. Where the attacker is given earlier updates of the same images (threat.history), the floor is that of all
    of them together. With --rv, models and their states of training (rounds) are ranked by how much they leak, before any
    attack.
    """
    from tempfile import TemporaryDirectory

    from fedattack.config import load_config
    from fedattack.errors import must, one_of
    from fedattack.floor import METHODS
    from fedattack.store import RunFolder, finite, write_json

    if method not in METHODS:
        raise FedattackError(one_of("--method", METHODS, method))
    sigmas = _sigmas(sigma)
    if config is None and run is None:
        raise FedattackError("floor needs a configuration, or --run with a run folder")
    if run is not None and not RunFolder(run).config.exists():
        raise FedattackError(must("--run", "a folder that `fedattack run` made (with a config.toml)", str(run)))
    experiment = load_config(config or RunFolder(run or Path()).config, overrides or [])
    if run is not None:
        lines = _floor_lines(RunFolder(run.resolve()), experiment, method, seconds, db, rv)
    else:
        with TemporaryDirectory(prefix="fedattack-floor-") as folder:
            target = RunFolder(Path(folder) / "run")
            plain = [cell.model_copy(update={"attack": ()}) for cell in experiment.cells]
            pool = experiment.pool.model_copy(update={"workers": 0})
            trained = experiment.model_copy(update={"cells": tuple(plain), "pool": pool})
            by_name("experiments.engines").run_in_process(trained, target, on_round=say_round)
            lines = _floor_lines(target, experiment, method, seconds, db, rv)
    _print_floors(lines, sigmas, db)
    if rv:
        _print_ranking(lines, sigmas[0])
    if json_file is not None:
        write_json(json_file, finite(lines))
        typer.echo(f"floors: {json_file}")
    if not any("rms_per_sigma" in line["floor"] for line in lines):
        raise typer.Exit(1)


def _sigmas(text: str) -> list[float]:
    from fedattack.errors import must

    try:
        found = [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        found = []
    if not found or min(found) <= 0:
        raise FedattackError(must("--sigma", "positive numbers such as 1e-3,1e-2", text))
    return found


def _floor_lines(run: Any, experiment: Any, method: str, seconds: float, db: float, rv: bool) -> list[dict[str, Any]]:
    """One line an update of every cell that differs in more than its attacks, with a bar that counts derivatives."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from fedattack.flooring import Floors
    from fedattack.planning import cell_facts, updates_of

    cells = {
        (cell.federation_id, "noise" in cell.threat.visible(), cell.threat.earlier): cell
        for cell in reversed(experiment.cells)
    }
    score = experiment.score.model_copy(update={"floor_db": db})
    experiment = experiment.model_copy(update={"cells": tuple(reversed(cells.values())), "score": score})
    floors = Floors(run, experiment, method=method, seconds_each=seconds)
    targets = [(cell, path) for cell in experiment.cells for path in updates_of(run.federation(cell.federation_id))]
    if not targets:
        raise FedattackError("there is no copied update to measure: did the run finish?")
    lines = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True) as bar:
        whole, one = bar.add_task("updates", total=len(targets)), bar.add_task("", total=None)
        for cell, path in targets:
            bar.reset(one, description=f"{cell.title}: {path.stem}")
            row = floors.row(cell, path, lambda done, total, _: bar.update(one, completed=done, total=total))
            client, _, number = path.stem.rpartition("-round-")
            line = cell_facts(cell) | {"client": client, "round": int(number), "floor": row}
            lines.append(line | ({"vulnerability": _vulnerability_of(run, cell, path)} if rv else {}))
            bar.advance(whole)
    return lines


def _vulnerability_of(run: Any, cell: Any, path: Path) -> dict[str, Any]:
    """RV of an update: rv, rv_over_update_rms, relative_error; or the reason why there is none."""
    from fedattack.flooring import target_of

    try:
        found = target_of(run, cell, path).vulnerability()
    except FedattackError as reason:
        return {"reason": str(reason)}
    return {"rv": found.rv, "rv_over_update_rms": found.relative, "relative_error": found.relative_error}


def _vulnerability_words(about: dict[str, Any]) -> str:
    from fedattack.report.summary import small_number

    if "rv" not in about:
        return f"no RV: {about['reason']}"
    error = f" ± {100 * about['relative_error']:.1f} %" if about["relative_error"] else ""
    return (
        f"RV {small_number(about['rv'])}{error}, {small_number(about['rv_over_update_rms'])} times the gradient's rms"
    )


def _print_floors(lines: list[dict[str, Any]], sigmas: list[float], db: float) -> None:
    from rich.console import Console
    from rich.table import Table

    from fedattack.report.summary import defense_label, plain_number, small_number

    def decibel(floor: dict[str, Any], noise: float) -> str:
        if floor["hidden"]:
            return "–"
        value = -20.0 * math.log10(noise * floor["rms_per_sigma"])
        return ("≤ " if floor["status"] == "at least" else "") + plain_number(value)

    console = Console(width=None if sys.stdout.isatty() else 180)
    for title, defense in dict.fromkeys((line["case"], line["defense"]) for line in lines):
        table = Table(title=f"{title} · {defense_label(defense)}", title_justify="left")
        own = "rounding" if defense == "none" else "defense's σ"
        heads = ["update", "method", "rank / unknowns", "condition", "rms per σ", "update rms", f"dB at {own}"]
        for head in [*heads, *(f"dB at σ={s:g}" for s in sigmas), f"σ* ({db:g} dB)", "σ*/update rms"]:
            table.add_column(head, justify="left" if head in ("update", "method") else "right", no_wrap=True)
        notes = []
        for line in (item for item in lines if (item["case"], item["defense"]) == (title, defense)):
            floor, name = line["floor"], f"{line['client']}, round {line['round']}"
            if about := line.get("vulnerability"):
                notes.append(f"{name}: {_vulnerability_words(about)}")
            if "rms_per_sigma" not in floor:
                notes.append(f"{name}: {floor['reason']}")
                table.add_row(name, "not available")
                continue
            if (together := floor.get("updates", 1)) > 1:
                notes.append(
                    f"{name}: of {together} updates together, whose attacker has the earlier ones; σ is this one's"
                )
            if floor["note"]:
                notes.append(f"{name}: {floor['note']}")
            if floor["hidden"]:
                hidden = f"{floor['hidden']:,} of {floor['pixels']:,} image directions"
                notes.append(f"{name}: not identifiable: {hidden}; rms per σ is over the others")
            at_own = floor["floor_psnr_db"] if floor["noise_std"] else floor["rounding_psnr_db"]
            error = f" ± {100 * floor['relative_error']:.1f} %" if floor["relative_error"] else ""
            bound = "≥ " if floor["status"] == "at least" else ""
            star = floor["sigma_at_target_db"]
            table.add_row(
                name,
                floor["method"],
                f"{'?' if floor['rank'] is None else format(floor['rank'], ',')} / {floor['unknowns']:,}",
                small_number(floor["condition"]),
                f"{bound}{small_number(floor['rms_per_sigma'])}{error}",
                small_number(floor["update_rms"]),
                plain_number(at_own),
                *(decibel(floor, s) for s in sigmas),
                small_number(star) if star else "–",
                small_number(star / floor["update_rms"]) if star and floor["update_rms"] else "–",
            )
        console.print(table)
        for note in dict.fromkeys(notes):
            typer.echo(f"  {note}")


def _print_ranking(lines: list[dict[str, Any]], sigma: float) -> None:
    """Which model and state leak most, as the report ranks them, from the RV that was stated and the floors."""
    from rich.console import Console
    from rich.table import Table

    from fedattack.report.bounds import predicted

    found = predicted([line | {"floor": _with_stated_rv(line)} for line in lines], sigma)
    if found is None:
        typer.echo("ranking: needs two models or rounds with an RV or a floor of updates without a defense")
        return
    console = Console(width=None if sys.stdout.isatty() else 180, markup=False)
    table = Table(title="Which model leaks most, by (b) (ranks in brackets)", title_justify="left")
    for head in ("model and state", "updates", *found.heads):
        table.add_column(head, justify="left" if head == "model and state" else "right", no_wrap=True)
    for line in found.lines:
        figures = (f"{figure.shown} ({figure.rank})" if figure.rank else figure.shown for figure in line.figures)
        table.add_row(f"{line.case}, {line.about}", str(line.updates), *figures)
    console.print(table)
    typer.echo(f"  {found.note}")


def _with_stated_rv(line: dict[str, Any]) -> dict[str, Any]:
    """The floor with RV of the gradient, which is the one stated, in place of RV of what was sent."""
    floor = {name: value for name, value in line["floor"].items() if name not in ("rv", "relative_rv", "rv_error")}
    about = line["vulnerability"]
    return floor | ({"rv": about["rv"], "relative_rv": about["rv_over_update_rms"]} if "rv" in about else {})

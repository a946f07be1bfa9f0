"""Configurations: one TOML file describes federations, defenses, attacks and what the attacker knows.

    name = "demo"                          [[case]]
    [model]                                title = "dlg on LeNet"
    name = "lenet"                         model.name = "lenet"
    [federation]                           attack = [{ name = "dlg", iterations = 100 }]
    defense = ["none", "gaussian-noise(sigma=0.01)"]

Every `[[case]]` is laid over the rest of the file. A list where one value is expected multiplies: each value makes cells of
its own. All problems of all cells are reported at once, with file and key, before anything starts.
"""

import hashlib
import itertools
import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fedattack.errors import ConfigError, FedattackError, UnknownName, closest, one_of
from fedattack.knowledge import visible_fields
from fedattack.registry import (
    ATTACKS,
    DATASETS,
    DEFENSES,
    MODELS,
    MODS,
    STRATEGIES,
    Registry,
    format_spec,
    parameter_problems,
    parse_spec,
)
from fedattack.seeding import derive_seed
from fedattack.tasks import TASKS, Task, build_task
from fedattack.types import Control, ControlKind

Options = dict[str, Any]

FINAL = "final"
"""The value of threat.prior that stands for the model with which the federation ends."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DataSettings(_Section):
    """Which images, and how they are dealt out to the clients."""

    dataset: str = Field("patches", description="a name from `fedattack list datasets`, npz:PATH or images:FOLDER")
    options: Options = Field(default_factory=dict, description="parameters of the data set's loader (image_size, …)")
    partition: str = Field("iid", description="iid, dirichlet, by-label, shard, by-user")
    partition_options: Options = Field(default_factory=dict)


class ModelSettings(_Section):
    """The victim."""

    name: str = "lenet"
    options: Options = Field(default_factory=dict)
    weights: str = Field(
        "", description="start from these: a diffusers pipeline or U-Net folder, or a model.safetensors; empty: random"
    )
    mode: Literal["train", "eval"] = Field("train", description="mode of BatchNorm and dropout during local training")


class TaskSettings(_Section):
    name: str = "classification"
    options: Options = Field(default_factory=dict)

    def build(self) -> Task:
        return build_task(self.name, self.options)


class FederationSettings(_Section):
    """How the federation trains. A defense is "name(key=value)", several are joined by " + "."""

    clients: int = Field(4, ge=1)
    rounds: int = Field(2, ge=1)
    protocol: Literal["fedsgd", "fedavg"] = Field("fedsgd", description="clients send the gradient, or their weights")
    strategy: str = Field("", description="a name from `fedattack list strategies`; empty: that of the protocol")
    strategy_options: Options = Field(default_factory=dict)
    learning_rate: float = Field(0.1, gt=0, description="of the server under fedsgd, of the clients under fedavg")
    batch_size: int = Field(1, ge=1, description="images of one local step")
    local_steps: int = Field(1, ge=1, description="SGD steps a round under fedavg")
    examples: int = Field(0, ge=0, description="images a client uses in a round; 0: batch_size × local_steps")
    same_examples: bool = Field(False, description="whether a client uses the same images in every round")
    defense: str = "none"
    mods: tuple[str, ...] = Field((), description="Flower's own client mods: fixedclipping, adaptiveclipping, …")

    @property
    def images_per_round(self) -> int:
        return self.examples or self.batch_size * self.local_steps

    @property
    def secure_aggregation(self) -> bool:
        """Whether clients mask their updates with SecAgg+."""
        return any(parse_spec(mod)[0] == "secaggplus" for mod in self.mods)

    @property
    def strategy_name(self) -> str:
        return self.strategy or self.protocol

    def defenses(self) -> list[tuple[str, Options]]:
        """(name, parameters) of every defense, in the order in which they act."""
        specs = [parse_spec(part) for part in self.defense.split(" + ")]
        return [spec for spec in specs if spec[0] != "none"]


class CaptureSettings(_Section):
    """Which updates the curious server copies; empty means all."""

    rounds: tuple[int, ...] = ()
    clients: tuple[int, ...] = ()
    enabled: bool = Field(True, description="false: copy nothing and write no truth (training for its own sake)")


class CheckpointSettings(_Section):
    """What training leaves behind for later use, in checkpoints/round-… of the federation's folder."""

    every: int = Field(0, ge=0, description="rounds between checkpoints; 0: only one, at the end")
    ema: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="decay of a moving average of the global model over rounds, saved beside it; 0: none",
    )
    samples: int = Field(0, ge=0, description="images drawn from a DDPM at every checkpoint (from the average, if any)")
    sample_steps: int = Field(50, ge=1, description="steps of the DDIM sampler that draws them")


class ThreatSettings(_Section):
    """What the attacker knows: a preset, fields added, fields removed."""

    model: str = "server"
    reveal: tuple[str, ...] = ()
    hide: tuple[str, ...] = ()
    public_images: int = Field(256, ge=0, description="how many public images the attacker has")
    prior: str = Field(
        "",
        description='a diffusers DDPM the attacker has: a folder, a hub name "org/name", or "final": what this federation '
        "ends with (its moving average where there is one; attacks then start when training is over); empty: none",
    )

    history: int = Field(
        0, ge=0, description="how many earlier updates of the client the attacker takes to hold the same images"
    )

    def visible(self) -> frozenset[str]:
        return visible_fields(self.model, self.reveal, self.hide)

    @property
    def earlier(self) -> int:
        """How many earlier updates of the client the attacker is given at most."""
        return self.history if "history" in self.visible() else 0


UNRELATED, PEER = "unrelated-update", "peer"


class AttackSettings(BaseModel):
    """One attack: its name, and any of its parameters beside it.

    An attack that names controls (see fedattack.types.Control) gets them as attacks of their own behind it, each once, however
    many ask for it; `controls = false` is without.
    """

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str
    controls: bool | None = Field(
        None,
        strict=True,
        description="whether to add the attack's controls; by default all that are possible; false once they are added",
    )
    control: Literal["", ControlKind] = Field("", description="what kind of control this is; set for the added ones")
    control_of: tuple[str, ...] = Field((), description="the attacks that it is a control of")

    @property
    def parameters(self) -> Options:
        return dict(self.model_extra or {})

    @property
    def spec(self) -> str:
        return format_spec(self.name, self.parameters)

    @property
    def shown(self) -> str:
        """The name in rows and reports."""
        return f"{self.name}, {self.control}" if self.yardstick else self.name

    @property
    def yardstick(self) -> bool:
        """Whether it does not attack the update at all: what a prior makes of nothing, or of another client's update."""
        return self.control not in ("", PEER)


class PoolSettings(_Section):
    """Where attacks run."""

    workers: int = Field(0, ge=0, description="Ray actors; 0: in this process, one attack after another")
    gpus_per_worker: float = Field(0.0, ge=0)
    threads_per_worker: int = Field(1, ge=1)
    queue: int = Field(4, ge=1, description="jobs handed to a worker ahead of time; the rest wait on disk")
    timeout_seconds: float = Field(3600.0, gt=0, description="of one attack on one update")
    address: str = Field("", description="an external Ray cluster, e.g. 127.0.0.1:6379; empty: a local one")
    resource: str = Field(
        "",
        description="custom resource of that cluster, of which every worker takes 1: only nodes that offer it get any",
    )


class ScoreSettings(_Section):
    """What is computed beside PSNR and SSIM: LPIPS where the weights are on this machine, and the error floor."""

    lpips: tuple[Literal["alex", "vgg", "squeeze"], ...] = ("alex", "vgg", "squeeze")
    floor: Literal["auto", "exact", "sketch", "probes", "off"] = Field(
        "auto", description="how the error floor of every update is computed; auto: the best that fits in floor_seconds"
    )
    floor_seconds: float = Field(
        20.0,
        gt=0,
        description="for all floors of a run together under auto and probes, shared evenly; of one core, estimated by "
        "counting operations",
    )
    rv: bool = Field(
        True,
        description="state RV = ‖∂update/∂images‖_F beside the floor, which gives it for nothing; where the floor takes too "
        "long, by some random directions within its seconds",
    )
    floor_db: float = Field(20.0, description="the PSNR whose least noise is stated: from there on the floor hides it")
    recognise: tuple[str, ...] = Field(
        (),
        description='what is looked for in the pictures, beside chance: "face", "attribute:COLUMN" (a label of the data set), '
        '"identity" (who is nearest in a public gallery); about half a minute for each data set',
    )


class Settings(_Section):
    """One cell: one federation and the attacks on its updates."""

    title: str = ""
    seed: int = Field(0, ge=0)
    precision: Literal["float32", "float64"] = "float32"
    data: DataSettings = Field(default_factory=DataSettings)
    model: ModelSettings = Field(default_factory=ModelSettings)
    task: TaskSettings = Field(default_factory=TaskSettings)
    federation: FederationSettings = Field(default_factory=FederationSettings)
    capture: CaptureSettings = Field(default_factory=CaptureSettings)
    checkpoint: CheckpointSettings = Field(default_factory=CheckpointSettings)
    threat: ThreatSettings = Field(default_factory=ThreatSettings)
    attack: tuple[AttackSettings, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _attack_names(cls, raw: Any) -> Any:
        """Allow attack = ["dlg", {name = "idlg", iterations = 10}]."""
        if isinstance(raw, dict) and isinstance(raw.get("attack"), list | tuple):
            raw = raw | {"attack": _with_controls([_attack_table(item) for item in raw["attack"]], raw)}
        return raw

    @property
    def federation_id(self) -> str:
        """A name for the federation of this cell: the same settings (attacks aside) give the same name."""
        relevant = self.model_dump(mode="json", exclude={"attack", "title", "threat", "checkpoint"})
        if self.checkpoint != CheckpointSettings():
            relevant["checkpoint"] = self.checkpoint.model_dump(mode="json")
        silent = {("model", "weights"): "", ("capture", "enabled"): True, ("federation", "same_examples"): False}
        for (section, key), value in silent.items():  # left out where they say nothing
            if relevant[section][key] == value:
                del relevant[section][key]
        digest = hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()[:10]
        return f"{self.model.name.replace(':', '.')}-{self.federation.protocol}-{digest}"


class FigureSettings(_Section):
    """A table and a figure of the run's rows, drawn when it ends: `y` over `x`, apart by `by` (fedattack/report/figures.py)."""

    x: str = Field(min_length=1, description="a field of rows.jsonl, an attack's option, or a dotted path")
    y: tuple[str, ...] = Field(("psnr_db",), min_length=1, description="metrics, a panel and a column each")
    by: tuple[str, ...] = Field((), description="fields that tell groups apart: colours, lines of the table")
    pictures: bool = Field(False, description="also a strip of pictures, truth beside reconstruction, of one client")
    client: str = Field("", description="whose pictures; empty: the first")
    name: str = Field("", pattern=r"^(\w[\w.-]*)?$", description="of the files in figures/; empty: from the fields")
    title: str = Field("", description="above the table and the figure")

    @property
    def file_name(self) -> str:
        return self.name or re.sub(r"[^\w-]+", "-", "-".join([self.y[0], "over", self.x, *self.by]))

    @property
    def heading(self) -> str:
        """The title, or what is drawn."""
        apart = f", by {', '.join(self.by)}" if self.by else ""
        return self.title or f"{', '.join(self.y)} over {self.x}{apart}"


class Experiment(_Section):
    """A whole file: the run's own settings and its cells."""

    name: str = "run"
    engine: Literal["in-process", "simulation"] = "in-process"
    pool: PoolSettings = Field(default_factory=PoolSettings)
    score: ScoreSettings = Field(default_factory=ScoreSettings)
    figure: tuple[FigureSettings, ...] = Field((), description="[[figure]] tables: what is drawn when the run ends")
    cells: tuple[Settings, ...] = ()


@dataclass(frozen=True)
class _Source:
    """Where a raw value came from, for messages."""

    file: str
    prefix: str = ""

    def at(self, key: str) -> str:
        return f"{self.file}: {self.prefix}{key}"


# ------------------------------------------------------------------------------------------------ reading
def load_config(path: Path, overrides: Sequence[str] = ()) -> Experiment:
    """Read a TOML file with "key=value" overrides. Raises ConfigError listing every problem."""
    if not path.is_file():
        raise ConfigError(f"config must be an existing TOML file, got {str(path)!r}")
    try:
        raw = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: {error}") from error
    return parse_config(raw, file=str(path), overrides=overrides)


def parse_config(raw: Mapping[str, Any], *, file: str = "config", overrides: Sequence[str] = ()) -> Experiment:
    """The experiment behind a nested dict. Raises ConfigError listing every problem with its file and key."""
    problems: list[str] = []
    base = json.loads(json.dumps(raw, default=str))
    cases = base.pop("case", [{}]) or [{}]
    if not isinstance(cases, list) or not all(isinstance(case, dict) for case in cases):
        raise ConfigError(f"{file}: case must be written [[case]], one table a case, got {type(cases).__name__}")
    forced: Options = {}
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            problems.append(f"override must be key=value, got {override!r}")
            continue
        _put(forced, key.strip(), toml_value(value.strip()))
    run_level = {key: value for key, value in _merge(base, forced).items() if key in Experiment.model_fields}
    base = {key: value for key, value in base.items() if key not in Experiment.model_fields}
    forced = {key: value for key, value in forced.items() if key not in Experiment.model_fields}
    if "cells" in run_level:
        problems.append(f"{file}: cells: unknown key{closest('case', ['case'])}")
        run_level.pop("cells")

    cells: list[Settings] = []
    for number, case in enumerate(cases):
        source = _Source(file, f"case[{number}]." if "case" in raw else "")
        merged = _merge(_merge(base, case), forced)
        for axes, cell in _multiply(merged):
            try:
                settings = Settings.model_validate(cell)
            except ValidationError as error:
                problems += _explain(error, Settings, source)
                try:  # what is left without the wrong keys may have problems of its own
                    settings = Settings.model_validate(_without(cell, [item["loc"] for item in error.errors()]))
                except ValidationError:
                    continue
            settings = settings.model_copy(update={"title": _title(settings, axes)})
            problems += [problem for problem in check_settings(settings, source) if problem not in problems]
            cells.append(settings)
    try:
        experiment = Experiment.model_validate(run_level)
    except ValidationError as error:
        problems += _explain(error, Experiment, _Source(file))
        experiment = Experiment()
    names = [figure.file_name for figure in experiment.figure]
    problems += [
        f"{file}: figure.{number}.name: must differ from those of the figures before it, got {name!r}"
        for number, name in enumerate(names)
        if any(name in files or f"{name}-pictures" in files for files in ((n, f"{n}-pictures") for n in names[:number]))
    ]
    problems += [
        f"{file}: score.recognise: {problem}" for problem in recognise_problems(experiment.score.recognise, cells)
    ]
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))
    return experiment.model_copy(update={"cells": tuple(_told_apart(cells))})


def check_settings(settings: Settings, source: _Source | None = None) -> list[str]:
    """Everything that can be known to be wrong before anything starts; one line a problem."""
    source = source or _Source("config")
    federation = settings.federation
    problems: list[str] = []

    def check(
        key: str, registry: Registry, name: str, parameters: Mapping[str, Any], given: Sequence[str] = ()
    ) -> None:
        try:
            target = registry.get(name)
            wrong = parameter_problems(target, {**dict.fromkeys(given), **parameters})
        except FedattackError as error:
            wrong = [str(error)]
        problems.extend(source.at(f"{key}: {problem}") for problem in wrong)

    name, given = settings.data.dataset, settings.data.options
    if ":" in name and name.split(":", 1)[0] in ("npz", "images"):
        name, path = name.split(":", 1)
        given = {"path": path, **given}
    check("data.dataset", DATASETS, name, given)
    if (
        name in ("npz", "images")
        and isinstance(given.get("path"), str)
        and not Path(given["path"]).expanduser().exists()
    ):
        problems.append(source.at(f"data.dataset: no such file or folder: {given['path']!r}"))
    wrong = _partition_problems(settings.data)
    problems.extend(source.at(f"data.partition: {problem}") for problem in wrong)
    check("model.name", MODELS, settings.model.name, settings.model.options, ("image_shape", "num_classes"))
    if not problems:
        problems.extend(source.at(f"model: {problem}") for problem in _model_problems(settings))
    if settings.task.name not in TASKS:
        problems.append(source.at("task.name: " + one_of("task", TASKS, settings.task.name)))
    else:
        wrong = parameter_problems(TASKS[settings.task.name], settings.task.options)
        problems.extend(source.at(f"task.options: {problem}") for problem in wrong)
        if not wrong:
            problems.extend(source.at(problem) for problem in _task_problems(settings))
    check("federation.strategy", STRATEGIES, federation.strategy_name, federation.strategy_options, ("federation",))
    try:
        for defense, parameters in federation.defenses():
            check("federation.defense", DEFENSES, defense, parameters)
            if not problems:
                DEFENSES.create(defense, **parameters)
    except (FedattackError, TypeError) as error:
        joined = ' (several are joined by " + ", with spaces)' if ")+" in federation.defense else ""
        problems.append(source.at(f"federation.defense: {error}{joined}"))
    problems.extend(source.at(f"federation.{problem}") for problem in _strategy_problems(federation))
    for number, mod in enumerate(federation.mods):
        key = f"federation.mods[{number}]"
        try:
            name, parameters = parse_spec(mod)
            takes_parameters = isinstance(MODS.get(name), type)
        except FedattackError as error:
            problems.append(source.at(f"{key}: {error}"))
            continue
        if takes_parameters:
            check(key, MODS, name, parameters)
        elif parameters:
            problems.append(source.at(f"{key}: {name} takes no parameters"))
        if name == "secaggplus" and (len(federation.mods) > 1 or federation.strategy_name != "fedavg"):
            problems.append(source.at(f"{key}: secaggplus must be the only mod, with strategy = 'fedavg'"))
    if federation.protocol == "fedsgd":
        if federation.local_steps != 1:
            problems.append(source.at("federation.local_steps: must be 1 under fedsgd, which sends one gradient"))
        if federation.mods:
            problems.append(
                source.at(
                    "federation.mods: Flower's mods clip or mask weight differences; they need protocol = 'fedavg'"
                )
            )
    if federation.batch_size > federation.images_per_round:
        problems.append(source.at("federation.batch_size: must be at most the images used in a round (examples)"))
    if settings.attack and not settings.capture.enabled:
        problems.append(source.at("capture.enabled: must be true where there are attacks, which need copies"))
    try:
        settings.threat.visible()
    except FedattackError as error:
        problems.append(source.at(f"threat: {error}"))
    for number, attack in enumerate(settings.attack):
        key = f"attack[{number}]"
        check(key, ATTACKS, attack.name, attack.parameters)
        try:
            found = ATTACKS.get(attack.name)
            if lacking := [part for part in ("name", "needs", "tasks", "reconstruct") if not hasattr(found, part)]:
                problems.append(source.at(f"{key}: {attack.name} is no attack, it lacks {', '.join(lacking)}"))
                continue
            if not parameter_problems(found, attack.parameters):
                ATTACKS.create(attack.name, **attack.parameters)
        except (FedattackError, TypeError) as error:
            if not isinstance(error, UnknownName):
                problems.append(source.at(f"{key}: {error}"))
            continue
        if attack.controls is not False and not attack.control:
            named, wrong = _controls_of({"name": attack.name, **attack.parameters}, settings.task.name)
            problems.extend(source.at(f"{key}: {problem}") for problem in wrong)
            if attack.controls and not named and not wrong:
                problems.append(source.at(f"{key}: {attack.name} names no controls with these settings"))
        if attack.control == UNRELATED and (reason := _no_other_update(federation, settings.capture)):
            problems.append(source.at(reason))
        if settings.task.name in TASKS and settings.task.name not in found.tasks:
            problems.append(source.at(f"{key}: {attack.name} attacks {', '.join(sorted(found.tasks))} only"))
    return problems


def controls_left_out(settings: Settings, attack: AttackSettings) -> dict[str, str]:
    """Controls that the attack names and the cell does not run, by kind, each with the reason; peers go by their names."""
    if attack.yardstick:
        return {}
    there = {_identity(other.model_dump()) for other in settings.attack}
    reasons = {UNRELATED: _no_other_update(settings.federation, settings.capture)}
    refused = attack.controls is False and not any(attack.spec in other.control_of for other in settings.attack)
    why = "controls = false" if refused else "not planned in this run"
    return {
        (table["name"] if table["control"] == PEER else table["control"]): reasons.get(table["control"]) or why
        for table in _controls_of({"name": attack.name, **attack.parameters}, settings.task.name)[0]
        if _identity(table) not in there
    }


def _no_other_update(federation: FederationSettings, capture: CaptureSettings) -> str:
    """Why no second client's update of a round will be there, behind the key to blame; "" where one will."""
    clients = set(range(federation.clients))
    if len(clients) < 2:
        return "federation.clients: must be at least 2: controls need another client's update"
    if len(clients & set(capture.clients or clients)) < 2:
        last, got = federation.clients - 1, list(capture.clients)
        return f"capture.clients: must name at least two of the clients, 0 to {last} (controls), got {got}"
    if federation.secure_aggregation:
        return "federation.mods: must be without secaggplus where another client's update is needed (controls)"
    return ""


def recognise_problems(tasks: Sequence[str], cells: Sequence[Settings]) -> list[str]:
    """What is wrong with score.recognise: unknown tasks, twice the same, and labels that no data set of the cells has."""
    from fedattack.recognition_probes import parse_task

    problems = []
    for number, task in enumerate(tasks):
        try:
            kind, column = parse_task(task)
        except FedattackError as error:
            problems.append(str(error))
            continue
        if task in tasks[:number]:
            problems.append(f"{task!r} must be given once")
        lacking = {}
        for cell in cells:
            data = cell.data.model_dump_json(include={"dataset", "options"})
            try:
                lacking[data] = "" if kind == "face" else _lacks(cell.data, column)
            except FedattackError:
                continue  # a data set that cannot be opened is reported as such
        if lacking and all(lacking.values()):
            problems += dict.fromkeys(lacking.values())
    return problems


def _lacks(data: DataSettings, column: str) -> str:
    """ "" where the data set has the column, or only reading it would tell."""
    from fedattack.data import label_columns

    columns = label_columns(data.dataset, **data.options)
    if columns is None or column in columns:
        return ""
    return one_of(f"label of {data.dataset.rpartition('/')[2]} to recognise", columns, column)


def _partition_problems(data: DataSettings) -> list[str]:
    from fedattack.data.partition import SCHEMES

    if data.partition not in SCHEMES:
        return [one_of("partition scheme", SCHEMES, data.partition)]
    given = {"data": None, "clients": 1, "seed": 0, **data.partition_options}
    return parameter_problems(SCHEMES[data.partition], given)


def _model_problems(settings: Settings) -> list[str]:
    """A model of the house is built and called once, on an empty image of the configured size."""
    if ":" in settings.model.name:
        return []
    size = settings.data.options.get("image_size", 32)
    if not isinstance(size, int):
        return []
    options = json.dumps(settings.model.options, sort_keys=True)
    problem = _try_model(settings.model.name, options, settings.task.name, size)
    return [problem] if problem else []


@lru_cache(maxsize=64)
def _try_model(name: str, options: str, task: str, size: int) -> str:
    import torch

    from fedattack.models import build_model

    try:
        model = build_model(name, image_shape=(3, size, size), num_classes=10, seed=0, **json.loads(options)).eval()
    except (FedattackError, TypeError, ValueError) as error:
        return str(error)
    image = torch.zeros(1, 3, size, size)
    try:
        with torch.no_grad():
            output = model(image, torch.zeros(1)) if task == "diffusion" else model(image)
    except TypeError:
        return f"{name} is no model for task {task}"
    fits = output.shape == image.shape if task == "diffusion" else output.ndim == 2
    return "" if fits else f"{name} is no model for task {task}"


def _task_problems(settings: Settings) -> list[str]:
    """Values of the task's options, and what must agree with the task: starting weights, checkpoints, prior."""
    from fedattack.checkpoints import weights_problems

    try:
        task = settings.task.build()
    except (FedattackError, TypeError) as error:
        return [f"task.options: {error}"]
    problems: list[str] = []
    if settings.model.weights:
        problems += [f"model.weights: {problem}" for problem in weights_problems(Path(settings.model.weights), task)]
    checkpoint, prior = settings.checkpoint, settings.threat.prior
    if task.name != "diffusion":
        if checkpoint.samples:
            problems.append(f"checkpoint.samples: only a DDPM can draw images, must be 0 for task {task.name!r}")
        if prior == FINAL:
            problems.append(f"threat.prior: the final model of task {task.name!r} is no DDPM")
    elif checkpoint.samples and checkpoint.sample_steps > (T := settings.task.options.get("num_train_timesteps", 1000)):
        problems.append(f"checkpoint.sample_steps: must be at most num_train_timesteps ({T})")
    if prior and prior != FINAL:
        found = Path(prior).expanduser()
        if found.exists() and not (found / "model_index.json").is_file():
            problems.append(
                f"threat.prior: must be the folder of a diffusers pipeline (model_index.json), got {prior!r}"
            )
        elif not found.exists() and not re.fullmatch(r"[\w.-]+/[\w.-]+", prior):
            problems.append(
                f"threat.prior: must be an existing folder, a hub name org/name or {FINAL!r}, got {prior!r}"
            )
    return problems


def _strategy_problems(federation: FederationSettings) -> list[str]:
    """Protocol, strategy and mods that contradict one another."""
    problems, name = [], federation.strategy_name
    if ":" not in name and (name == "fedsgd") != (federation.protocol == "fedsgd"):
        sent = "gradients" if federation.protocol == "fedsgd" else "weights"
        other = "fedavg" if federation.protocol == "fedsgd" else "fedsgd"
        problems.append(f"strategy: {name} cannot average {sent}: set federation.protocol = {other!r}")
    mods = {mod.split("(")[0].strip() for mod in federation.mods}
    for strategy, mod in (("dp-client-fixed", "fixedclipping"), ("dp-client-adaptive", "adaptiveclipping")):
        if (name == strategy) != (mod in mods):
            problems.append(f"mods: strategy {strategy!r} and mod {mod!r} only make sense together")
    return problems


def model_seed(settings: Settings) -> int:
    """The seed of the initial weights."""
    return derive_seed(settings.seed, "model")


def to_toml(experiment: Experiment) -> str:
    """The resolved configuration, every default spelled out, one [[case]] a cell; reads back to the same experiment."""
    dump = experiment.model_dump(mode="json", exclude={"cells"})
    lines = [f"{key} = {_toml_text(value)}" for key, value in dump.items()]
    for cell in experiment.cells:
        lines += ["", "[[case]]"]
        lines += [f"{key} = {_toml_text(value)}" for key, value in cell.model_dump(mode="json").items()]
    return "\n".join(lines) + "\n"


# ------------------------------------------------------------------------------------------------ helpers
def _attack_table(item: Any) -> Any:
    if not isinstance(item, str):
        return item
    name, parameters = parse_spec(item)
    return {"name": name, **parameters}


_ABOUT_CONTROLS = ("controls", "control", "control_of")


def _bare(table: Options) -> Options:
    """An attack's own parameters."""
    return {key: value for key, value in table.items() if key not in ("name", *_ABOUT_CONTROLS)}


def _with_controls(tables: Sequence[Any], raw: Options) -> list[Any]:
    """Attacks, and behind them the controls that they name; one that is there already is not added again."""
    alone = _without_other_update(raw)
    written: list[Any] = []
    added: dict[str, Options] = {}
    of: dict[str, list[str]] = {}
    for table in tables:
        asked: Any = False
        if isinstance(table, dict) and not table.get("control"):  # a resolved file says what is no control, too
            asked = table.get("controls", False if "control" in table else None)
        acts = asked is None or asked is True  # what is no truth value is refused where settings are validated
        controls, wrong = _controls_of(table, _task_name(raw)) if acts else ([], [])
        written.append(table | {"controls": False} if controls and not wrong else table)
        for control in controls:
            if asked or control["control"] != UNRELATED or not alone:
                added.setdefault(_identity(control), control)
                of.setdefault(_identity(control), []).append(format_spec(table["name"], _bare(table)))
    there = {_identity(table) for table in written if isinstance(table, dict)}
    everything = [*written, *(control for key, control in added.items() if key not in there)]
    for place, table in enumerate(everything):
        if isinstance(table, dict) and (names := of.get(_identity(table))):
            everything[place] = table | {"control_of": list(dict.fromkeys([*table.get("control_of", ()), *names]))}
    return everything


def _identity(table: Options) -> str:
    """What a control runs; an attack that was written as one of its own is a peer."""
    kind = table.get("control") or PEER
    return json.dumps([kind, table.get("name"), _bare(table)], sort_keys=True, default=str)


def _controls_of(table: Options, task: str) -> tuple[list[Options], list[str]]:
    """The controls that an attack names, as attack tables, without those that do not attack the task; and what is wrong."""
    try:
        attack = ATTACKS.create(str(table.get("name")), **_bare(table))
    except (FedattackError, TypeError):  # reported where the attack itself is checked
        return [], []
    at = f"controls of {table['name']}"
    try:
        named: Sequence[Control] = tuple(attack.controls()) if hasattr(attack, "controls") else ()
    except Exception as error:  # whatever a plugin raises
        return [], [f"{at}: {type(error).__name__}: {error}"]
    made, wrong = [], []
    for control in named:
        name = control.attack or table["name"]
        try:
            found = ATTACKS.get(name)
        except (FedattackError, ImportError) as error:
            wrong.append(f"{at}: {error}")
            continue
        if task in getattr(found, "tasks", (task,)):  # what is no attack is reported where it is checked
            parameters = _bare(table) if control.parameters is None else dict(control.parameters)
            made.append({"name": name, **parameters, "control": control.kind})
    return made, wrong


def _task_name(raw: Options) -> str:
    task = raw.get("task")
    return str(task.get("name", TaskSettings().name)) if isinstance(task, dict) else TaskSettings().name


def _without_other_update(raw: Options) -> bool:
    """Whether the raw settings leave no second client's update; wrong settings are reported elsewhere."""
    try:
        federation = FederationSettings.model_validate(raw.get("federation", {}))
        return bool(_no_other_update(federation, CaptureSettings.model_validate(raw.get("capture", {}))))
    except (ValidationError, FedattackError):
        return False


def _merge(below: Any, above: Any) -> Any:
    if isinstance(below, dict) and isinstance(above, dict):
        return {key: _merge(below.get(key), above[key]) if key in above else below[key] for key in (below | above)}
    return below if above is None else above


def _without(cell: Options, locations: Sequence[tuple[int | str, ...]]) -> Options:
    """The cell without the keys at these locations (a location that leads into a list takes the whole list away)."""
    kept: Options = json.loads(json.dumps(cell))
    for location in locations:
        table: Any = kept
        path = [part for part in location if isinstance(part, str)]
        for part in path[:-1]:
            table = table.get(part, {}) if isinstance(table, dict) else {}
        if path and isinstance(table, dict):
            table.pop(path[-1], None)
    return kept


def _told_apart(cells: Sequence[Settings]) -> Iterator[Settings]:
    """Every cell once; cells of one title that differ in more than seed and defense get a number behind it."""
    variants: dict[str, list[str]] = {}
    seen: list[Settings] = []
    for cell in cells:
        if cell in seen:
            continue
        seen.append(cell)
        federation = cell.federation.model_copy(update={"defense": "none"})
        key = cell.model_copy(update={"seed": 0, "federation": federation}).model_dump_json()
        known = variants.setdefault(cell.title, [])
        if key not in known:
            known.append(key)
        number = known.index(key) + 1
        yield cell if number == 1 else cell.model_copy(update={"title": f"{cell.title} ({number})"})


def _put(table: Options, dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for parent in parents:
        table = table.setdefault(parent, {})
    table[last] = value


def toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _toml_text(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(k)} = {_toml_text(v)}" for k, v in value.items() if v is not None) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml_text(item) for item in value) + "]"
    return json.dumps(str(value), ensure_ascii=False)


def _multiply(raw: Options) -> Iterator[tuple[list[tuple[str, Any]], Options]]:
    """Cells of a raw configuration: every list that stands where one value is expected is an axis."""
    axes = list(_axes(raw, Settings))
    for values in itertools.product(*(choices for _, choices in axes)):
        cell = json.loads(json.dumps(raw))
        for (key, _), value in zip(axes, values, strict=True):
            _put(cell, key, value)
        yield [(key, value) for (key, _), value in zip(axes, values, strict=True)], cell


def _title(settings: Settings, axes: list[tuple[str, Any]]) -> str:
    """The case's title, or model and task where it has none, with its axis values. Seeds and defenses are no cases of
    their own: the report pools the one and sets the other side by side.
    """
    pooled = ("federation.defense", "seed", "model.name")
    values = [f"{key.split('.')[-1]}={value}" for key, value in axes if key not in pooled]
    models = [settings.model.name] if settings.title and any(key == "model.name" for key, _ in axes) else []
    return " · ".join([settings.title or f"{settings.model.name} ({settings.task.name})", *models, *values])


def _axes(raw: Any, model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, list[Any]]]:
    for name, info in model.model_fields.items():
        if not isinstance(raw, dict) or name not in raw:
            continue
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from _axes(raw[name], kind, f"{prefix}{name}.")
        elif isinstance(raw[name], list) and raw[name] and not _is_collection(kind):
            yield f"{prefix}{name}", raw[name]


def _is_collection(kind: Any) -> bool:
    return get_origin(kind) in (tuple, list, dict) or any(_is_collection(part) for part in get_args(kind))


def _explain(error: ValidationError, model: type[BaseModel], source: _Source) -> list[str]:
    lines = []
    for item in error.errors():
        location = [str(part) for part in item["loc"]]
        key = ".".join(location)
        if item["type"] == "extra_forbidden":
            lines.append(source.at(f"{key}: unknown key{closest(location[-1], _keys_at(model, location[:-1]))}"))
        else:
            lines.append(source.at(f"{key}: {item['msg']}, got {item['input']!r}"))
    return lines


def _keys_at(model: type[BaseModel], location: Sequence[str]) -> list[str]:
    for part in location:
        if part.isdecimal():  # a place in a list of tables
            continue
        info = model.model_fields.get(part)
        kind = info.annotation if info else None
        kind = next((one for one in get_args(kind) if one is not Ellipsis), kind)
        if not (isinstance(kind, type) and issubclass(kind, BaseModel)):
            return []
        model = kind
    names = list(model.model_fields)
    return [*names, *(n for n in Experiment.model_fields if n != "cells"), "case"] if model is Settings else names

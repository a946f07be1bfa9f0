"""name -> class: the house's own string tables first, then entry points, then "package.module:Class".

Nothing is imported before it is asked for. An entry point or a table can never silently replace a built-in name.
"""

import ast
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cached_property
from importlib import import_module
from importlib.metadata import entry_points
from inspect import Parameter, getdoc, signature
from typing import Any

from fedattack.errors import FedattackError, UnknownName, closest, one_of


@dataclass(frozen=True)
class Registry:
    """One kind of plugin. `table` names the dict of built-ins as "module:NAME", `group` the entry points."""

    kind: str
    table: str
    group: str

    @cached_property
    def _targets(self) -> Mapping[str, str]:
        targets: dict[str, str] = dict(_load(self.table))
        for entry in entry_points(group=self.group):
            if entry.name in targets and targets[entry.name] != entry.value:
                raise FedattackError(
                    f"{self.kind} {entry.name!r} is registered twice: {targets[entry.name]} and {entry.value} (entry point)"
                )
            targets[entry.name] = entry.value
        return targets

    def names(self) -> list[str]:
        """All registered names, sorted."""
        return sorted(self._targets)

    def get(self, name: str) -> Any:
        """The object behind a registered name or a "module:Class" reference.

        Raises UnknownName with the closest match, or the import's own error.
        """
        if name in self._targets:
            return _load(self._targets[name])
        if ":" in name:
            try:
                return _load(name)
            except (ImportError, AttributeError) as error:
                raise UnknownName(f"{self.kind} {name!r} cannot be imported: {error}") from error
        raise UnknownName(one_of(self.kind, self._targets, name) + '; or "module:Class" for your own')

    def create(self, name: str, /, **parameters: Any) -> Any:
        """Call the class or factory with parameters; unknown or missing ones are refused by name before the call."""
        target = self.get(name)
        problems = parameter_problems(target, parameters)
        if problems:
            raise FedattackError(f"{self.kind} {name!r}: " + "; ".join(problems))
        return target(**parameters)

    def summary(self, name: str) -> str:
        """First line of the docstring."""
        return (getdoc(self.get(name)) or "").strip().split("\n")[0]

    def parameters(self, name: str) -> dict[str, Any]:
        """Parameter names with their defaults (`...` where there is none)."""
        return parameters_of(self.get(name))


ATTACKS = Registry("attack", "attacks:ATTACKS", "fedattack.attacks")
DEFENSES = Registry("defense", "clients.defenses:DEFENSES", "fedattack.defenses")
MODELS = Registry("model", "fedattack.models:MODELS", "fedattack.models")
DATASETS = Registry("dataset", "fedattack.data:DATASETS", "fedattack.datasets")
MODS = Registry("mod", "clients.mods:MODS", "fedattack.mods")
STRATEGIES = Registry("strategy", "strategies:STRATEGIES", "fedattack.strategies")


def parameters_of(target: Callable[..., Any]) -> dict[str, Any]:
    """Names and defaults that a class or function takes, `...` where a value must be given."""
    if is_dataclass(target):
        return {
            f.name: f.default
            if f.default is not MISSING
            else (f.default_factory() if f.default_factory is not MISSING else ...)
            for f in fields(target)
            if f.init
        }
    return {
        p.name: ... if p.default is Parameter.empty else p.default
        for p in signature(target).parameters.values()
        if p.kind in (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
    }


def parameter_problems(target: Callable[..., Any], given: Mapping[str, Any]) -> list[str]:
    """What is wrong with calling `target` with `given`: unknown names (closest offered) and missing ones."""
    if any(p.kind is Parameter.VAR_KEYWORD for p in signature(target).parameters.values()):
        return []
    allowed = parameters_of(target)
    problems = [f"unknown parameter {name!r}{closest(name, allowed)}" for name in given if name not in allowed]
    problems += [
        f"parameter {name!r} must be given" for name, default in allowed.items() if default is ... and name not in given
    ]
    return problems


def parse_spec(text: str) -> tuple[str, dict[str, Any]]:
    """Read "name" or "name(key=value, …)" with literal values: "gaussian-noise(sigma=1e-3)"."""
    name, bracket, rest = text.strip().partition("(")
    if not bracket:
        return name.strip(), {}
    try:
        call = ast.parse(f"f({rest}", mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
            raise ValueError("only key=value arguments")
        keys = [keyword.arg for keyword in call.keywords]
        if None in keys or len(set(keys)) < len(keys):
            raise ValueError("every key must be given once, by name")
        return name.strip(), {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
    except (SyntaxError, ValueError) as error:
        raise FedattackError(f'{text!r} must be "name" or "name(key=value, …)": {error}') from error


def format_spec(name: str, parameters: Mapping[str, Any]) -> str:
    """The inverse of `parse_spec`."""
    inside = ", ".join(f"{key}={_literal(value)}" for key, value in parameters.items())
    return f"{name}({inside})" if inside else name


def _literal(value: Any) -> str:
    """repr, with infinities as literals that Python reads back."""
    return (
        {float("inf"): "1e999", float("-inf"): "-1e999"}.get(value) or repr(value)
        if isinstance(value, float)
        else repr(value)
    )


def _load(target: str) -> Any:
    module, _, attribute = target.partition(":")
    return getattr(import_module(module), attribute)

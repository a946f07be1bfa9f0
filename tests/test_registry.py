"""Names to classes: tables, entry points, "module:Class"; specs as text, which are data and never code."""

from dataclasses import dataclass, field
from importlib.metadata import EntryPoint

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fedattack.registry as registry_module
from fedattack.errors import FedattackError, UnknownName
from fedattack.registry import (
    ATTACKS,
    DATASETS,
    DEFENSES,
    MODELS,
    STRATEGIES,
    Registry,
    format_spec,
    parameter_problems,
    parameters_of,
    parse_spec,
)


@dataclass(frozen=True)
class Plugin:
    """A plugin of one's own.

    More about it.
    """

    size: int
    scale: float = 0.5
    parts: list[int] = field(default_factory=lambda: [1])
    derived: int = field(default=0, init=False)


def factory(shape: tuple[int, ...], width: int = 3) -> tuple[object, ...]:
    """A factory."""
    return shape, width


def anything(**options: object) -> dict[str, object]:
    return options


TABLE = {"plugin": f"{__name__}:Plugin", "factory": f"{__name__}:factory", "broken": "no_such_module:Thing"}


@pytest.fixture
def table() -> Registry:
    return Registry("thing", f"{__name__}:TABLE", "fedattack.test-things")


def test_names_are_sorted_and_nothing_is_imported_for_them(table):
    assert table.names() == ["broken", "factory", "plugin"]


def test_get_create_summary_parameters(table):
    assert table.get("plugin") is Plugin
    assert table.create("plugin", size=3) == Plugin(3)
    assert table.create("factory", shape=(1,), width=2) == ((1,), 2)
    assert table.summary("plugin") == "A plugin of one's own."
    assert table.parameters("plugin") == {"size": ..., "scale": 0.5, "parts": [1]}
    assert table.parameters("factory") == {"shape": ..., "width": 3}


def test_module_class_of_your_own(table):
    assert table.get(f"{__name__}:Plugin") is Plugin
    assert table.create(f"{__name__}:Plugin", size=1, scale=2.0) == Plugin(1, 2.0)
    for wrong in ("no_such_module:X", f"{__name__}:NoSuchClass"):
        with pytest.raises(UnknownName, match=r"thing .* cannot be imported"):
            table.get(wrong)


@pytest.mark.parametrize("typo", ["plugn", "plug-in", "Plugin", "factry"])
def test_a_typo_offers_the_closest_name(table, typo):
    wanted = "factory" if typo.startswith("f") else "plugin"
    with pytest.raises(UnknownName, match=f"did you mean '{wanted}'") as caught:
        table.get(typo)
    assert "broken, factory, plugin" in str(caught.value)
    assert "module:Class" in str(caught.value)


def test_a_name_like_nothing_offers_nothing(table):
    with pytest.raises(UnknownName) as caught:
        table.get("qqqqqq")
    assert "did you mean" not in str(caught.value)


def test_wrong_parameters_are_all_named_before_the_call(table):
    with pytest.raises(FedattackError) as caught:
        table.create("plugin", scael=1.0, colour="red")
    text = str(caught.value)
    assert "'scael' (did you mean 'scale'?)" in text
    assert "'colour'" in text
    assert "'size' must be given" in text
    with pytest.raises(FedattackError, match="derived"):
        table.create("plugin", size=1, derived=2)


def test_a_target_that_takes_anything_is_given_anything():
    assert parameter_problems(anything, {"x": 1}) == []


def test_an_entry_point_adds_a_name_and_never_replaces_one(monkeypatch):
    def with_entries(*entries: EntryPoint) -> Registry:
        monkeypatch.setattr(registry_module, "entry_points", lambda group: entries)
        return Registry("thing", f"{__name__}:TABLE", "fedattack.test-things")

    more = with_entries(EntryPoint("extra", f"{__name__}:factory", "fedattack.test-things"))
    assert more.get("extra") is factory
    assert "extra" in more.names()
    same = with_entries(EntryPoint("plugin", TABLE["plugin"], "fedattack.test-things"))
    assert same.get("plugin") is Plugin
    other = with_entries(EntryPoint("plugin", f"{__name__}:factory", "fedattack.test-things"))
    with pytest.raises(FedattackError, match="registered twice"):
        other.names()
    twice = with_entries(
        EntryPoint("extra", f"{__name__}:factory", "fedattack.test-things"),
        EntryPoint("extra", f"{__name__}:Plugin", "fedattack.test-things"),
    )
    with pytest.raises(FedattackError, match="registered twice"):
        twice.names()


@pytest.mark.parametrize("registry", [ATTACKS, DEFENSES, MODELS, DATASETS, STRATEGIES], ids=lambda r: r.kind)
def test_every_built_in_name_leads_somewhere(registry):
    for name in registry.names():
        target = registry.get(name)
        assert callable(target), name
        assert registry.summary(name), f"{name} has no docstring"
        assert isinstance(parameters_of(target), dict)


# ------------------------------------------------------------------------------------------------ specs
def test_parse_spec_examples():
    assert parse_spec("dlg") == ("dlg", {})
    assert parse_spec(" dlg ") == ("dlg", {})
    assert parse_spec("dlg()") == ("dlg", {})
    assert parse_spec("gaussian-noise(sigma=1e-3)") == ("gaussian-noise", {"sigma": 1e-3})
    wanted = {"a": -1, "b": (1, "x)"), "c": None, "d": [True], "e": {"k": 0.5}}
    assert parse_spec("my.module:Class(a=-1, b=(1, 'x)'), c=None, d=[True], e={'k': 0.5})") == (
        "my.module:Class",
        wanted,
    )


literals = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.tuples(inner, inner) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)
keys = st.from_regex(r"[a-z][a-z_]{0,7}", fullmatch=True).filter(lambda k: k.isidentifier() and not _keyword(k))


def _keyword(text: str) -> bool:
    import keyword

    return keyword.iskeyword(text)


@given(st.from_regex(r"[a-z][a-z0-9-]{0,9}", fullmatch=True), st.dictionaries(keys, literals, max_size=3))
@settings(max_examples=100, deadline=None)
def test_format_is_the_inverse_of_parse(name, parameters):
    assert parse_spec(format_spec(name, parameters)) == (name, parameters)


@pytest.mark.parametrize("value", [float("inf"), float("-inf")])
def test_infinite_parameters_survive_a_spec(value):
    """clip(norm=inf) is a natural way to say "no clipping"; a Job's spec is made by format_spec."""
    assert parse_spec(format_spec("clip", {"norm": value})) == ("clip", {"norm": value})


@pytest.mark.parametrize(
    "text",
    [
        "dlg(",
        "dlg(a=1",
        "dlg(1)",
        "dlg(a)",
        "dlg(a=b)",
        "dlg(a=__import__('os').system('true'))",
        "dlg(a=open('x'))",
        "dlg(a=[x for x in ()])",
        "dlg(**{'a': 1})",
        "dlg(*[1])",
        "dlg(a=1)(b=2)",
        "dlg(a=1).b",
        "dlg(a=1) or f(b=2)",
        "dlg(a=1), f(b=2)",
        "dlg(a=lambda: 1)",
        "dlg(a=f'{1}')",
        "dlg(a=1, a=2)",
    ],
)
def test_code_and_nonsense_are_refused(text):
    with pytest.raises(FedattackError, match="name"):
        parse_spec(text)

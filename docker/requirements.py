"""What an image needs of the project's dependencies, from pyproject.toml: `python requirements.py ROLE pyproject.toml`."""

import re
import sys
import tomllib
from pathlib import Path

LEFT_OUT: dict[str, set[str]] = {
    "server": set(),
    "client": {"ray", "lpips", "jinja2"},
    "attacker": {
        "flwr",
        "flwr-datasets",
        "opacus",
        "scikit-image",
        "lpips",
        "jinja2",
        "matplotlib",
        "pyarrow",
        "typer",
    },
}
"""Dependencies that a role's code never imports. A client's flwr is the one without Ray."""


def requirements(role: str, pyproject: Path) -> list[str]:
    """Lines of a requirements file. "flower" is Flower alone, for SuperLink and SuperNodes."""
    wanted = tomllib.loads(pyproject.read_text())["project"]["dependencies"]
    if role == "flower":
        return [without_extra(line) for line in wanted if name_of(line) == "flwr"]
    kept = [line for line in wanted if name_of(line) not in LEFT_OUT[role]]
    return kept if role == "server" else [without_extra(line) for line in kept]


def name_of(requirement: str) -> str:
    return re.split(r"[\[<>=!~; ]", requirement, maxsplit=1)[0].lower()


def without_extra(requirement: str) -> str:
    return re.sub(r"\[.*?\]", "", requirement)


if __name__ == "__main__":
    print("\n".join(requirements(sys.argv[1], Path(sys.argv[2]))))

"""Table and figure of one or more runs that are there already; a recipe asks for its own by [[figure]] tables.

    python -m experiments.figures RUN [RUN …] --x attack --y psnr_db ssim --by case oracles [--pictures] [--out FOLDER]

What x, y and by may name, and what is drawn: fedattack/report/figures.py. Writes NAME.md, NAME.png and NAME-pictures.png to
FOLDER (RUN/figures/more, beside the recipe's own), NAME from --name or the fields.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from fedattack.config import FigureSettings
from fedattack.report.figures import draw, load, paths_of


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--x", required=True)
    parser.add_argument("--y", nargs="+", default=["psnr_db"])
    parser.add_argument("--by", nargs="*", default=[])
    parser.add_argument("--pictures", action="store_true", help="also the pictures of one client")
    parser.add_argument("--client", default="", help="whose pictures; default: the first")
    parser.add_argument("--name", default="", help="of the files")
    parser.add_argument("--title", default="", help="above the table and the figure")
    parser.add_argument("--out", type=Path, help="folder; default: RUN/figures/more of the first run")
    chosen = vars(parser.parse_args(arguments))
    runs, folder = chosen.pop("runs"), chosen.pop("out")
    folder = folder or runs[0] / "figures" / "more"
    try:
        asked = FigureSettings(**chosen)
    except ValidationError as error:
        parser.error("; ".join(f"--{item['loc'][0]}: {item['msg']}" for item in error.errors()))
    problems = draw(load(runs), asked, folder)
    written = [path for path in paths_of(asked, folder) if path.exists()]
    print(written[0].read_text())
    print(*problems, *written, sep="\n")


if __name__ == "__main__":
    main()

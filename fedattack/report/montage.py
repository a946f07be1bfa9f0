"""One picture of a run for a README or a paper: the truth above what every attack made of it, with and without defense.

Pixels are enlarged by a whole factor and never rescaled in value: a grey blob looks grey.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedattack.errors import FedattackError
from fedattack.report.summary import Row, defense_label

GAP, LABEL_WIDTH, TITLE_HEIGHT = 4, 330, 26


def write_montage(run: Path, rows: Sequence[Row], path: Path, *, columns: int = 8, side: int = 96) -> Path:
    """Write a PNG with a line of pictures for every case and defense: its first `columns` updates in the run's order.

    `side` is the least width of a picture in pixels. Raises FedattackError where there is no picture to show.
    """
    from matplotlib import get_data_path
    from PIL import Image, ImageDraw, ImageFont

    lines = _lines(rows, columns)
    if not lines:
        raise FedattackError("the run has no scored attack to show")
    with Image.open(run / str(lines[0][1][0])) as first:
        factor = max(1, -(-side // first.width))
        width, height = first.width * factor, first.height * factor
    page = (
        LABEL_WIDTH + columns * (width + GAP),
        sum(height + GAP + (TITLE_HEIGHT if line[2] else 0) for line in lines),
    )
    sheet = Image.new("RGB", page, "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.truetype(Path(get_data_path(), "fonts/ttf/DejaVuSans.ttf"), 14)
    top = 0
    for label, pictures, title in lines:
        if title:
            draw.text((0, top + 4), title, fill="black", font=font)
            top += TITLE_HEIGHT
        draw.multiline_text((12, top + height // 2 - 24), label, fill="#444444", font=font, spacing=4)
        for number, name in enumerate(pictures):
            if name is None:
                continue
            with Image.open(run / name) as picture:
                shown = picture.convert("RGB").resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(shown, (LABEL_WIDTH + number * (width + GAP), top))
        top += height + GAP
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
    return path


def _lines(rows: Sequence[Row], columns: int) -> list[tuple[str, list[str | None], str]]:
    """(label, picture paths, title of a new case or "") of every line: the truth of a case, then attack × defense."""
    groups: dict[str, dict[tuple[str, str], list[Row]]] = {}
    for row in rows:
        if (
            row.get("kind") == "attack"
            and row.get("represents") != "timesteps"
            and (row.get("images") or {}).get("truth")
        ):
            key = (str(row.get("attack")), str(row.get("defense")))
            groups.setdefault(str(row.get("case")), {}).setdefault(key, []).append(row)
    lines: list[tuple[str, list[str | None], str]] = []
    for case, found in groups.items():
        truth = _pictures(next(iter(found.values())), "truth")
        lines.append(("truth", truth[:columns], case))
        for (attack, defense), members in found.items():
            values = [value for row in members for value in row.get("psnr_db") or [] if value is not None]
            mean = f"{sum(values) / len(values):.1f} dB, mean of {len(values)} images" if values else "not scored"
            label = f"{attack}\n{defense_label(defense)}\n{mean}"
            lines.append((label, _pictures(members, "reconstruction")[:columns], ""))
    return lines


def _pictures(rows: Sequence[Row], kind: str) -> list[Any]:
    """Paths in the truth's order; a picture that stands for a whole batch comes once, gaps in the others' places (None)."""
    found: list[Any] = []
    for row in rows:
        paths = [name for name in row["images"].get(kind) or [] if name]
        one_for_all = kind == "reconstruction" and row.get("represents") == "user" and paths
        found += [*paths, *[None] * (len(row["images"].get("truth") or []) - len(paths))] if one_for_all else paths
    return found

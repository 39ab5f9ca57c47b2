"""The look of every picture, and the kinds of files that pictures are written to."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec

Given = ParamSpec("Given")

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
"""Those of the style in their order."""

COLUMNS = 4
"""Small panels that stand beside one another."""

_LETTERS = 136  # of titles for which small panels beside one another have room

PICTURES = {".png": "a picture", ".svg": "sharp at any size", ".pdf": "for print"}
"""What is written to files by the ends of their names."""

# Without the time of writing, the same numbers give the same file.
_NO_DATE = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}, ".png": {}}


def styled(draw: Callable[Given, None]) -> Callable[Given, None]:
    """Let a function draw in the style of the project."""

    @wraps(draw)
    def drawn(*args: Given.args, **options: Given.kwargs) -> None:
        from matplotlib import style

        with style.context(Path(__file__).with_name("surgeon.mplstyle")):
            draw(*args, **options)

    return drawn


def save(figure: Any, file: Path) -> None:
    """Write a figure of matplotlib to a file of one of the kinds `PICTURES`."""
    figure.savefig(file, metadata=_NO_DATE[file.suffix])


def panel_title(path: str, words: str, count: int) -> str:
    """The title of one of so many small panels: a path, shortened if there is no room, and words behind it."""
    return short_path(path, _LETTERS // min(COLUMNS, count) - len(words)) + words


def short_path(path: str, most: int) -> str:
    """A path of at most so many letters, if it can be: `encoder.layer.0.attention.query` → `…0…query`.

    The number of the layer and the end are kept.
    """
    parts, shown = path.split("."), path
    number = next((place for place, part in enumerate(parts) if part.isdigit()), 0)
    for start in range(1, len(parts)):
        if len(shown) <= most:
            break
        kept = f"…{parts[number]}" if 0 < number < start else ""
        shown = f"{kept}…{'.'.join(parts[start:])}"
    return shown


def small_panels(figure: Any, count: int) -> list[Any]:
    """Make so many axes of one scale, whose both axes are shares, in rows of at most `COLUMNS`."""
    from matplotlib.ticker import PercentFormatter

    columns = min(COLUMNS, count)
    grid = figure.subplots(-(-count // columns), columns, squeeze=False, sharex=True, sharey=True).flat
    for axes in grid[count:]:
        axes.set_visible(False)
    for axes in grid[:count]:
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, 0))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, 0))
    return list(grid[:count])

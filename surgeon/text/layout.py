"""The building blocks of all views: aligned tables, indented blocks, headings, notes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

_MANY = 10_000
MODEL = "(the model itself)"


def grid(*columns: Literal["left", "right"], header: Sequence[str] = ()) -> Table:
    """An aligned table without lines."""
    table = Table(box=None, show_header=bool(header), header_style="dim", padding=(0, 2, 0, 0), pad_edge=False)
    for index, justify in enumerate(columns):
        table.add_column(header[index] if header else "", justify=justify, overflow="fold")
    return table


def indented(content: RenderableType, by: int = 2) -> Padding:
    """Content moved to the right, wrapped lines included."""
    return Padding(content, (0, 0, 0, by))


class Fitting:
    """Shows the first of several forms that fits the width, else the last."""

    def __init__(self, *forms: RenderableType) -> None:
        self.forms = forms

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        room = options.update(width=_MANY)
        fits = (form for form in self.forms if Measurement.get(console, room, form).maximum <= options.max_width)
        yield next(fits, self.forms[-1])


def heading(text: str, note: str = "") -> Text:
    """A bold line, with a note in the ordinary weight."""
    line = Text(text, style="bold")
    return line.append(f"  {note}", style="not bold dim") if note else line


def sentences(notes: Iterable[str], *, indent: int = 2, sign: str = "note: ") -> Group:
    """Notes with a paragraph for each."""
    return Group(*(indented(Text.assemble((sign, "yellow"), note), indent) for note in notes))


def refused(path: str, reason: str) -> Text:
    """A candidate that was left unchanged, and why."""
    return Text.assemble(("refused ", "yellow"), (path, "cyan"), f": {reason}")


def dim(text: str) -> Text:
    """Less important text."""
    return Text(text, style="dim")

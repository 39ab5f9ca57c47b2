"""The building blocks of all views: aligned tables, indented blocks, headings, notes."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Column, Table
from rich.text import Text

_MANY = 10_000
_GAP = 2
_HANGING = 4
MODEL = "(the model itself)"


class Grid(Table):
    """An aligned table without lines that breaks no words.

    Where it is too wide, cells are wrapped between words. Where their longest words do not fit beside one another
    either, each row becomes a paragraph.
    """

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        room = options.max_width - _GAP * (len(self.columns) - 1)
        least, most = zip(*(self._measured(column, console, options) for column in self.columns), strict=True)
        if sum(least) > room:
            yield from self._paragraphs(console, options.max_width)
            return
        for column, width in zip(self.columns, _shared_out(least, most, room), strict=True):
            column.width = width
        try:
            yield from list(super().__rich_console__(console, options))
        finally:
            for column in self.columns:
                column.width = None

    def _measured(self, column: Column, console: Console, options: ConsoleOptions) -> tuple[int, int]:
        """The widths of the longest word and of the longest cell."""
        cells = [*column.cells, *([column.header] if self.show_header else [])]
        found = [Measurement.get(console, options.update(width=_MANY), cell) for cell in cells]
        return max((one.minimum for one in found), default=0), max((one.maximum for one in found), default=0)

    def _paragraphs(self, console: Console, width: int) -> Iterator[RenderableType]:
        """Every row as a paragraph, with the names of columns before their values.

        What a row begins with is its own name, unless it is a number.
        """
        names = [_one_line(_as_text(column.header, console)) if self.show_header else Text() for column in self.columns]
        for row in zip(*(column.cells for column in self.columns), strict=True):
            cells = [_as_text(cell, console) for cell in row]
            parts = [
                Text.assemble((f"{name} ", "dim"), cell) if name and (number or cell.plain[:1].isdigit()) else cell
                for number, (name, cell) in enumerate(zip(names, cells, strict=True))
                if cell
            ]
            for number, line in enumerate(_lines(parts, console, width)):
                yield Padding(line, (0, 0, 0, 0 if number == 0 else _HANGING))


def _lines(parts: Sequence[Text], console: Console, width: int) -> list[Text]:
    """Put parts beside one another where there is room. A part is broken only if it is longer than a line.

    All lines but the first will be indented.
    """
    lines: list[Text] = []
    for part in parts:
        if lines and lines[-1].cell_len + _GAP + part.cell_len <= width - (_HANGING if lines[1:] else 0):
            lines[-1] = Text.assemble(lines[-1], " " * _GAP, part)
        else:
            fits = not lines and part.cell_len <= width
            lines.extend(part.wrap(console, width if fits else max(1, width - _HANGING)))
    return lines


def _one_line(header: Text) -> Text:
    """The header of a column that was broken by hand: `com-\\npiled` is `compiled`, `of\\nlimit` is `of limit`."""
    return Text(re.sub(r"-\n|\n(?=_)|^\n", "", header.plain).replace("\n", " "))


def _as_text(cell: RenderableType, console: Console) -> Text:
    """A cell of a table as one line."""
    return cell.copy() if isinstance(cell, Text) else console.render_str(str(cell))


def _shared_out(least: Sequence[int], most: Sequence[int], room: int) -> list[int]:
    """Widths between the least and the most of each column that use the room as evenly as they can."""
    widths = list(least)
    while sum(widths) < room and (short := [index for index, width in enumerate(widths) if width < most[index]]):
        widths[min(short, key=lambda index: widths[index])] += 1
    return widths


def grid(*columns: Literal["left", "right"], header: Sequence[str] = ()) -> Table:
    """An aligned table without lines."""
    table = Grid(box=None, show_header=bool(header), header_style="dim", padding=(0, _GAP, 0, 0), pad_edge=False)
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


def next_command(purpose: str, *words: str) -> Group:
    """What to do next: `Next, to see it:` and the command on a line of its own."""
    return Group(Text(f"Next, {purpose}:"), code(shlex.join(["surgeon", *words]), style="bold"))


def code(text: str, *, style: str = "") -> Text:
    """Lines to copy. They are indented, and neither wrapped nor cut."""
    lines = "\n".join(f"  {line}" for line in text.splitlines())
    return Text(lines, style=style, no_wrap=True, overflow="ignore")


def dim(text: str) -> Text:
    """Less important text."""
    return Text(text, style="dim")

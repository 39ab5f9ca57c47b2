"""Progress in a notebook: HTML that changes in its place, so that no widgets are needed."""

from __future__ import annotations

import html
import math
import time
from dataclasses import dataclass
from typing import Any

from surgeon.display.base import Display
from surgeon.display.words import seconds, values_text
from surgeon.progress import Progress

_SECONDS = 0.2  # between changes
_SHORT, _SHORT_OPEN = 0.5, 2.0  # seconds; what took less is not worth a line, the second if it was not counted


@dataclass
class _Row:
    """What is shown of one piece of work. took: the seconds it took; None while it runs."""

    moment: Progress
    started: float
    took: float | None = None


class Cells(Display):
    """A line for each piece of work below the cell. If the work took long, it stays there with the time."""

    def __init__(self) -> None:
        self._rows: list[_Row] = []
        self._handle: Any = None
        self._drawn = -math.inf

    def progress(self, moment: Progress) -> None:
        """Show a line. The time left is that of the steps so far."""
        now = time.monotonic()
        row = next((row for row in self._rows if row.took is None and row.moment.what == moment.what), None)
        if row is None:
            self._end_running()
            self._rows.append(row := _Row(moment, now))
            self._drawn = -math.inf
        row.moment = moment
        if moment.done >= moment.total > 0:
            row.took, self._drawn = now - row.started, -math.inf
        if now - self._drawn >= _SECONDS:
            self._draw()

    def close(self) -> None:
        """Show every line with the time that it took."""
        self._end_running()
        self._draw()

    def _end_running(self) -> None:
        for row in self._rows:
            if row.took is None:
                row.took = time.monotonic() - row.started
        self._rows = [row for row in self._rows if (row.took or 0.0) >= (_SHORT if row.moment.total else _SHORT_OPEN)]

    def _draw(self) -> None:
        if not self._rows and self._handle is None:
            return
        from IPython import display

        show: Any = display.display  # not annotated
        shown = {
            "text/plain": "\n".join(f"{row.moment.what}: {_words(row)}" for row in self._rows),
            "text/html": "".join(_html(row) for row in self._rows),
        }
        self._drawn = time.monotonic()
        if self._handle is None:
            self._handle = show(shown, raw=True, display_id=True)
        else:
            self._handle.update(shown, raw=True)


def _words(row: _Row) -> str:
    moment, values = row.moment, values_text(row.moment)
    if row.took is not None:
        return ", ".join((seconds(row.took), *values))
    spent = time.monotonic() - row.started
    if not moment.total:
        return "..."
    left = f"{seconds(round(spent / moment.done * (moment.total - moment.done)))} left" if moment.done else ""
    return ", ".join(filter(None, (f"{moment.done}/{moment.total}", left, *values)))


def _html(row: _Row) -> str:
    moment, bar = row.moment, ""
    if row.took is None:
        length = f' max="{moment.total}" value="{moment.done}"' if moment.total else ""
        bar = f'<progress style="width: 10em; vertical-align: middle"{length}></progress> '
    return f"<div>{html.escape(moment.what)} {bar}<small>{html.escape(_words(row))}</small></div>"

"""Progress as lines, where nothing can move: in a pipe, in a file, or on a terminal without colours."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.text import Text

from surgeon.display.base import Display
from surgeon.display.words import values_text
from surgeon.progress import Progress, Tell

_SECONDS = 10.0  # between lines
_PARTS = 5  # of the work, each of which gets a line


def print_words(console: Console, text: Text) -> None:
    """Print text that breaks between words on a terminal, and nowhere else.

    A line that is indented, such as a command to copy, stays whole.
    """
    for line in text.split("\n", allow_blank=True):
        console.print(line, soft_wrap=not console.is_terminal or line.plain.startswith("  "))


class Lines(Display):
    """A line for each step, and for long work one now and then."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._last: dict[str, tuple[float, int]] = {}

    def waiting(self, what: str) -> None:
        """Print what is being done."""
        print_words(self._console, Text(f"{what} ..."))

    @contextmanager
    def stage(self, what: str) -> Iterator[Tell | None]:
        """Print what is being done. Its progress gets lines only if it takes long."""
        self.waiting(what)
        started = time.monotonic()

        def tell(moment: Progress) -> None:
            if time.monotonic() - started >= _SECONDS:
                self.progress(moment)

        yield tell

    def progress(self, moment: Progress) -> None:
        """Print the first step, the last one, one in each fifth of the work, and one every few seconds."""
        if moment.total and self._due(moment, first=True):
            self._print_moment(moment)

    def _due(self, moment: Progress, *, first: bool) -> bool:
        """Whether to print a line. first: of the first report too."""
        now = time.monotonic()
        if moment.what not in self._last:
            self._last[moment.what] = (now, 0)
            return first
        if moment.done >= moment.total:
            del self._last[moment.what]
            return True
        then, part = self._last[moment.what]
        reached = _PARTS * moment.done // moment.total
        if now - then < _SECONDS and (reached == part or now - then < 1.0):
            return False
        self._last[moment.what] = (now, reached)
        return True

    def _print_moment(self, moment: Progress) -> None:
        line = "  ".join((moment.what, f"{moment.done}/{moment.total}", *values_text(moment)))
        print_words(self._console, Text(line, style="dim"))

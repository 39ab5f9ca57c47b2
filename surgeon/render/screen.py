"""The only module that prints: answers on stdout, progress and warnings on stderr; styled, plain or as JSON."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, Literal

from rich.console import Console, RenderableType
from rich.text import Text

from surgeon.display.base import Display
from surgeon.display.choose import console_on_stderr, display_on
from surgeon.display.lines import print_words
from surgeon.display.words import seconds
from surgeon.json_values import schema_name, to_json
from surgeon.progress import Progress, Tell
from surgeon.text.plain import UNBOUNDED, plain_text

Mode = Literal["rich", "plain", "json"]


class Screen:
    """The output of a command; there is one screen per run.

    mode: None means "rich" if stdout is a terminal, else "plain". quiet: show no progress. verbose: show the log too.
    silent: show nothing at all, as in a process beside the main one. command: its words, for the time left.
    """

    def __init__(
        self,
        mode: Mode | None = None,
        *,
        verbose: int = 0,
        quiet: bool = False,
        silent: bool = False,
        command: str = "",
    ) -> None:
        self.mode: Mode = "plain" if silent else mode or ("rich" if sys.stdout.isatty() else "plain")
        self.quiet = quiet or silent
        self.verbose = verbose
        self.silent = silent
        console = console_on_stderr(colours=self.mode != "plain", quiet=silent)
        self._err = console
        moving = self.mode == "rich"
        self._display = Display() if self.quiet else display_on(console, moving=moving, command=command)

    # --- answers

    def show(self, content: RenderableType) -> None:
        """Print an answer, or a part of it, for people. In JSON mode nothing is printed."""
        if self.mode == "json":
            return
        with self._display.hidden():
            if self.mode == "plain":
                self.write(plain_text(content, self._plain_width()))
            else:
                # A terminal's width is only known to rich where the terminal is; a forced width comes from COLUMNS.
                Console(highlight=False, emoji=False, force_terminal=True).print(content, crop=False)

    def result(self, value: Any) -> None:
        """Print the answer for programs. Only JSON mode prints it."""
        if self.mode == "json":
            with self._display.hidden():
                self.write(json.dumps(to_json(value), indent=1, ensure_ascii=False))

    def write(self, text: str) -> None:
        """Print text on stdout as it stands, in every mode."""
        if self.silent:
            return
        sys.stdout.write(text + "\n")
        sys.stdout.flush()

    def _plain_width(self) -> int:
        return Console().width if sys.stdout.isatty() else UNBOUNDED

    # --- progress

    def waiting(self, what: str) -> None:
        """Show what is being done until anything else is shown."""
        self._display.waiting(what)

    def stage(self, what: str) -> AbstractContextManager[Tell | None]:
        """Show what is being done while it runs. Gives what to tell the progress of it."""
        return self._display.stage(what)

    def progress(self, moment: Progress) -> None:
        """Show the progress of long work: a bar on a terminal, else a line now and then."""
        self._display.progress(moment)

    def close(self) -> None:
        """Take the progress off the screen."""
        self._display.close()

    # --- warnings, the log, errors

    def warn(self, text: str) -> None:
        """Print a warning on stderr."""
        self._print_error(Text.assemble(("warning: ", "yellow"), text))

    def say(self, text: str) -> None:
        """Print a remark on stderr, unless quiet."""
        if not self.quiet:
            self._print_error(Text(text))

    def error(self, text: str, *, kind: str, exit_code: int) -> None:
        """Print an error on stderr, and in JSON mode also as JSON on stdout."""
        self.close()
        self._print_error(Text.assemble(("error: ", "bold red"), text))
        if self.mode == "json":
            error = {"type": kind, "message": text, "exit_code": exit_code}
            self.write(json.dumps({"schema": schema_name("error"), "error": error}, indent=1, ensure_ascii=False))

    def _print_error(self, text: Text) -> None:
        # A line that is printed on the console of the display is put above what moves.
        print_words(self._err, text)

    @contextlib.contextmanager
    def logging(self) -> Iterator[None]:
        """Show the toolkit's log on stderr while a command runs: warnings always, the rest with --verbose."""
        handler = _Handler(self)
        handler.setLevel((logging.WARNING, logging.INFO, logging.DEBUG)[min(self.verbose, 2)])
        log = logging.getLogger("surgeon")
        before = log.level, log.propagate
        log.addHandler(handler)
        log.setLevel(handler.level)
        log.propagate = False
        try:
            yield
        finally:
            log.removeHandler(handler)
            log.setLevel(before[0])
            log.propagate = before[1]
            self.close()


class _Handler(logging.Handler):
    def __init__(self, screen: Screen) -> None:
        super().__init__()
        self._screen = screen
        self._started = time.monotonic()

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING:
            self._screen.warn(record.getMessage())
        else:
            self._screen.say(f"[{seconds(time.monotonic() - self._started)}] {record.getMessage()}")

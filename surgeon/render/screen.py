"""The only module that prints: answers on stdout, progress and warnings on stderr; styled, plain or as JSON."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import time
from collections.abc import Iterator
from typing import Any, Literal

from rich.console import Console, RenderableType
from rich.progress import BarColumn, SpinnerColumn, Task, TaskID, TextColumn
from rich.progress import Progress as Bars
from rich.table import Column, Table
from rich.text import Text

from surgeon.json_values import schema_name, to_json
from surgeon.progress import Progress
from surgeon.text.plain import UNBOUNDED, plain_text
from surgeon.text.summary import seconds

Mode = Literal["rich", "plain", "json"]
_LINE_SECONDS = 10.0
_LINES_PER_FIT = 5


class Screen:
    """The output of a command; there is one screen per run.

    mode: None means "rich" if stdout is a terminal, else "plain". quiet: show no progress. verbose: show the log too.
    silent: show nothing at all, as in a process beside the main one.
    """

    def __init__(
        self, mode: Mode | None = None, *, verbose: int = 0, quiet: bool = False, silent: bool = False
    ) -> None:
        self.mode: Mode = "plain" if silent else mode or ("rich" if sys.stdout.isatty() else "plain")
        self.quiet = quiet or silent
        self.verbose = verbose
        self.silent = silent
        colours = _colours(self.mode, sys.stderr)
        self._err = Console(stderr=True, highlight=False, emoji=False, color_system=colours, quiet=silent)
        self._bars: Bars | None = None
        self._tasks: dict[str, TaskID] = {}
        self._last_line: dict[str, tuple[float, int]] = {}
        self._live = sys.stderr.isatty() and self.mode != "plain" and not quiet

    # --- answers

    def show(self, content: RenderableType) -> None:
        """Print an answer, or a part of it, for people. In JSON mode nothing is printed."""
        if self.mode == "json":
            return
        with self._without_bars():
            if self.mode == "plain":
                self.write(plain_text(content, self._plain_width()))
            else:
                # A terminal's width is only known to rich where the terminal is; a forced width comes from COLUMNS.
                Console(highlight=False, emoji=False, force_terminal=True).print(content)

    def result(self, value: Any) -> None:
        """Print the answer for programs. Only JSON mode prints it."""
        if self.mode == "json":
            with self._without_bars():
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

    @contextlib.contextmanager
    def stage(self, what: str) -> Iterator[None]:
        """Show what is being done while it runs."""
        if self.quiet:
            yield
            return
        if not self._live:
            self._err.print(Text(f"{what} ..."), soft_wrap=True)
            yield
            return
        bars = self._running()
        task = bars.add_task(what, total=None, values="")
        try:
            yield
        finally:
            bars.remove_task(task)

    def progress(self, moment: Progress) -> None:
        """Show the progress of long work: a bar on a terminal, else a line now and then.

        Both show the losses now and then.
        """
        if self.quiet:
            return
        values = "  ".join(
            f"{name} {value:,}" if isinstance(value, int) else f"{name} {value:.3g}"
            for name, value in moment.values.items()
        )
        if self._live:
            bars, first = self._running(), values.partition("  ")[0]
            if moment.what not in self._tasks:
                self._tasks[moment.what] = bars.add_task(moment.what, total=moment.total, values=first)
            bars.update(self._tasks[moment.what], completed=moment.done, values=first)
            if moment.done >= moment.total:
                bars.remove_task(self._tasks.pop(moment.what))
        if self._due(moment):
            line = f"{moment.what}  {moment.done}/{moment.total}  {values}".rstrip()
            self._print_error(Text(line, style="dim"))

    def _due(self, moment: Progress) -> bool:
        """Whether to print a line: at the first and last step, after each fifth of the work, and every few seconds."""
        now = time.monotonic()
        if moment.what not in self._last_line:
            self._last_line[moment.what] = (now, 0)
            return not self._live
        if moment.done >= moment.total:
            del self._last_line[moment.what]
            return True
        then, fifth = self._last_line[moment.what]
        reached = _LINES_PER_FIT * moment.done // max(1, moment.total)
        if now - then < _LINE_SECONDS and (reached == fifth or now - then < 1.0):
            return False
        self._last_line[moment.what] = (now, reached)
        return True

    def _running(self) -> Bars:
        if self._bars is None:
            # Answers go to stdout directly. Rich would redirect them to stderr.
            self._bars = Bars(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                _Bar(bar_width=12),
                TextColumn("[dim]{task.fields[values]}", table_column=Column(no_wrap=True, overflow="ellipsis")),
                console=self._err,
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._bars.start()
        return self._bars

    @contextlib.contextmanager
    def _without_bars(self) -> Iterator[None]:
        """Take the bars off the screen while something else is printed."""
        if self._bars is None:
            yield
            return
        self._bars.stop()
        try:
            yield
        finally:
            self._bars.start()

    def close(self) -> None:
        """Take the progress off the screen."""
        if self._bars is not None:
            self._bars.stop()
            self._bars = None
            self._tasks.clear()

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
        if self._bars is not None:
            self._bars.console.print(text, soft_wrap=True)
        else:
            self._err.print(text, soft_wrap=True)

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


class _Bar(BarColumn):
    """A bar with the steps done and the time left; for work of unknown length, the time so far."""

    def render(self, task: Task) -> Any:
        """The bar of one task."""
        if task.total is None:
            return Text(seconds(task.elapsed or 0.0), style="dim")
        left = "" if task.time_remaining is None else f" {seconds(round(task.time_remaining))} left"
        count = Text(f"{task.completed:.0f}/{task.total:.0f}{left}", style="dim", no_wrap=True)
        made = Table.grid(padding=(0, 1))
        made.add_row(super().render(task), count)
        return made


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


def _colours(mode: Mode, stream: Any) -> Literal["auto"] | None:
    return "auto" if mode != "plain" and stream.isatty() else None

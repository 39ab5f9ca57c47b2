"""Progress on a terminal: a line that moves for each step that is under way, with the time left."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, Task, TaskID, TextColumn
from rich.progress import Progress as Rows
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text

from surgeon.display import durations
from surgeon.display.lines import Lines
from surgeon.display.words import seconds, values_text
from surgeon.progress import Progress, Tell

_WIDTH = 12  # letters, of a bar
_ROOM = 80  # columns from which a value has room beside the time left


class Bars(Lines):
    """Bars and spinners. A thread of their own moves them, also while the main one imports or traces.

    console: must hold its file itself. What work writes to stderr is silenced at times, and bars are not.
    command: the words of the command. Its steps are expected to take as long as the last time. Without one, only
        `waiting` is.
    """

    def __init__(self, console: Console, command: str = "") -> None:
        super().__init__(console)
        self._command = command
        self._rows: Rows | None = None
        self._told: tuple[str, TaskID] | None = None

    def waiting(self, what: str) -> None:
        """Show what is being done, and how long it takes, until anything else is shown."""
        self._end_told()
        self._told = what, self._add(what, same_for_all=True)

    @contextmanager
    def stage(self, what: str) -> Iterator[Tell | None]:
        """Show what is being done, and how long it takes, while it runs."""
        self._end_told()
        task = self._add(what)
        try:
            yield lambda moment: self._update(task, moment)
        except BaseException:
            self._end(task, whole=False)
            raise
        self._end(task)

    def progress(self, moment: Progress) -> None:
        """Show a bar until another work is told of, and print the latest values, if there are any, now and then.

        A bar that is full stays as well: something always moves while a command works.
        """
        if self._told is None or self._told[0] != moment.what or self._begins_anew(self._told[1], moment):
            self._end_told()
            self._told = moment.what, self._add(moment.what, moment.total)
        self._update(self._told[1], moment)
        if moment.total and moment.values and self._due(moment, first=False):
            self._print_moment(moment)

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """Take the bars off the screen while something else is printed. Stages come back, other work is over."""
        self._end_told()
        if self._rows is None:
            yield
            return
        self._rows.stop()
        try:
            yield
        finally:
            self._rows.start()

    def close(self) -> None:
        """Take the bars off the screen."""
        if self._rows is not None:
            self._rows.stop()
            self._rows = self._told = None

    # --- rows

    def _running(self) -> Rows:
        if self._rows is None:
            # Answers go to stdout directly. Rich would redirect them to stderr.
            self._rows = Rows(
                _Spinner(),
                TextColumn("{task.description}", markup=False),
                _Bar(bar_width=_WIDTH if self._console.width >= _ROOM else _WIDTH // 2),
                TextColumn("[dim]{task.fields[values]}", table_column=Column(no_wrap=True, overflow="ellipsis")),
                console=self._console,
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._rows.start()
        return self._rows

    def _add(self, what: str, total: int = 0, *, same_for_all: bool = False) -> TaskID:
        command = "" if same_for_all else self._command
        known = not total and (same_for_all or bool(command))
        expected = durations.expected(what, command) if known else None
        rows = self._running()
        task = rows.add_task(
            what, total=total or None, values="", expected=expected, command=command if known else None
        )
        rows.refresh()  # at once: the next moment may be long
        return task

    def _update(self, task: TaskID, moment: Progress) -> None:
        values = next(iter(values_text(moment)), "") if self._console.width >= _ROOM else ""
        if moment.total and self._is_open(task):
            self._remember(task)
            self._running().reset(task)  # what is counted now has a speed of its own
        self._running().update(task, completed=moment.done, total=moment.total or None, values=values)

    def _end(self, task: TaskID, *, whole: bool = True) -> None:
        """Take a row away. whole: what it stands for was done, so the time that it took is kept."""
        if self._rows is None or task not in self._rows.task_ids:
            return
        if whole and self._is_open(task):
            self._remember(task)
        self._rows.remove_task(task)

    def _end_told(self) -> None:
        if self._told is not None:
            self._end(self._told[1])
            self._told = None

    def _task(self, task: TaskID) -> Task:
        return next(found for found in self._running().tasks if found.id == task)

    def _remember(self, task: TaskID) -> None:
        found = self._task(task)
        if found.fields["command"] is not None:
            durations.remember(found.description, found.elapsed or 0.0, found.fields["command"])

    def _begins_anew(self, task: TaskID, moment: Progress) -> bool:
        """Whether a report is of other work than a row whose steps are all done."""
        return self._task(task).finished and not moment.done >= moment.total > 0

    def _is_open(self, task: TaskID) -> bool:
        """Whether it is not known how many steps it takes."""
        return self._task(task).total is None


class _Spinner(SpinnerColumn):
    """A spinner that goes on where all steps are done, since what follows may take a while."""

    def render(self, task: Task) -> Any:
        """The spinner of one task."""
        return self.spinner.render(task.get_time())


class _Bar(BarColumn):
    """A bar with the steps done and the time left.

    For work of unknown length it shows the time so far, or how much is left if it takes as long as the last time.
    """

    def render(self, task: Task) -> Any:
        """The bar of one task."""
        bar, words = super().render(task), f"{task.completed:.0f}/{task.total or 0:.0f}"
        left = task.time_remaining
        if task.total is None:
            expected, elapsed = task.fields["expected"], task.elapsed or 0.0
            if expected is None or elapsed >= expected:
                return Text(seconds(elapsed), style="dim")
            bar, words = ProgressBar(expected, elapsed, width=self.bar_width), ""
            left = max(1, round(expected - elapsed))
        shown = [] if left is None or task.finished else [f"{seconds(round(left))} left"]
        made = Table.grid(padding=(0, 1))
        made.add_row(bar, Text(" ".join([word for word in (words, *shown) if word]), style="dim", no_wrap=True))
        return made

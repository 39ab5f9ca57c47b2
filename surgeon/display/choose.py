"""Choose the display that fits where the progress is shown."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from rich.console import Console

from surgeon import processes
from surgeon.display.base import Display
from surgeon.display.lines import Lines
from surgeon.display.notebook import Cells
from surgeon.display.terminal import Bars

Given = ParamSpec("Given")
Result = TypeVar("Result")


def display_on(console: Console, *, moving: bool, command: str = "") -> Display:
    """Return a display on stderr. moving: bars if the terminal can show them, else lines. command: see `Bars`."""
    dumb = os.environ.get("TERM") in ("dumb", "unknown") or bool(os.environ.get("NO_COLOR"))
    return Bars(console, command) if moving and not dumb and console.file.isatty() else Lines(console)


def console_on_stderr(*, colours: bool = True, quiet: bool = False) -> Console:
    """Return a console on what is stderr now, which goes on writing there while others silence `sys.stderr`."""
    system = "auto" if colours and sys.stderr.isatty() else None
    return Console(file=sys.stderr, highlight=False, emoji=False, color_system=system, quiet=quiet)  # type: ignore[arg-type]


def _display() -> Display:
    """The display of functions that were called with `progress=True`."""
    if not processes.is_main():
        return Display()
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if getattr(shell, "kernel", None) is not None:
        return Cells()
    return display_on(console_on_stderr(), moving=True)


def shows_progress(function: Callable[Given, Result]) -> Callable[Given, Result]:
    """Let a function with an argument `progress` show a display if it is True. Inside, it is then a function."""

    @functools.wraps(function)
    def shown(*args: Given.args, **kwargs: Given.kwargs) -> Result:
        if kwargs.get("progress") is not True:
            return function(*args, **kwargs)
        display = _display()
        told: dict[str, Any] = {**kwargs, "progress": display.progress}
        try:
            return function(*args, **told)
        finally:
            display.close()

    return shown

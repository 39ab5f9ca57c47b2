"""Show the answer of a command that can also write it to files."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from surgeon.cli.app import Run

if TYPE_CHECKING:
    from rich.console import RenderableType


def answer(
    run: Run, found: object, view: "RenderableType", files: Sequence[Path] | None, draw: Callable[[Path], None]
) -> None:
    """Show an answer, write it to the requested files, and print it as JSON with `--output json`.

    view: the answer for people. draw: draws the answer to a file that is not `.json`.

    Raises:
        SaveError: a file cannot be written.
    """
    from surgeon.render.files import write_result

    run.screen.show(view)
    for file in files or ():
        write_result(run.labelled(found), file, draw)
        run.screen.say(f"Written to {file}.")
    run.answer(found)

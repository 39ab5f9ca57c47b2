"""Progress of a long piece of work."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Progress:
    """One report on long work: its name, the steps done and in total, and the latest values to show.

    total: 0 while it is not known.
    """

    what: str
    done: int
    total: int
    values: dict[str, float] = field(default_factory=dict)


Tell = Callable[[Progress], None]
"""What is called with every report."""

ShowProgress = Tell | bool | None
"""What long work takes as `progress`: True shows a display (see `surgeon.display`), a function gets every report."""


def renamed(tell: ShowProgress, rename: Callable[[str], str]) -> Tell | None:
    """Return what tells of the same progress under another name; None if it is not told of by a function."""
    return (lambda moment: tell(replace(moment, what=rename(moment.what)))) if callable(tell) else None


Stage = Callable[[str], AbstractContextManager[Tell | None]]
"""What is entered with the name of a step. It gives what is told the progress of the step, if anything is."""


def unshown(_: str) -> AbstractContextManager[None]:
    """A `Stage` that shows nothing."""
    return nullcontext()

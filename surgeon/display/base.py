"""What every display does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from surgeon.progress import Progress, Tell


class Display:
    """Shows what is being done and how far it is. This one shows nothing."""

    def waiting(self, what: str) -> None:
        """Show what is being done until anything else is shown."""

    @contextmanager
    def stage(self, what: str) -> Iterator[Tell | None]:
        """Show what is being done while it runs. Gives what to tell the progress of it, if that is shown."""
        yield None

    def progress(self, moment: Progress) -> None:
        """Show the progress of long work."""

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """Take everything off the screen while something else is printed."""
        yield

    def close(self) -> None:
        """End. Nothing is left that moves."""

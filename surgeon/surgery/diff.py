"""What a pipeline changed, pass by pass."""

from __future__ import annotations

from dataclasses import dataclass

from surgeon.passes.report import PassDiff
from surgeon.text.diff import Detail, diff_text


@dataclass(frozen=True)
class Diff:
    """What each pass changed between a model and its rewritten graph. `str()` gives it as plain text."""

    passes: tuple[PassDiff, ...]

    def text(self, detail: Detail = "sites") -> str:
        """The diff as plain text: a line per site ("sites"), only the totals ("stat"), or every node ("full")."""
        return diff_text(self.passes, detail)

    def __str__(self) -> str:
        return self.text()

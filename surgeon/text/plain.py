"""Turn views into plain text."""

from __future__ import annotations

import io
from collections.abc import Sequence

from rich.console import Console, RenderableType

from surgeon.passes.report import PassDiff
from surgeon.text.diff import Detail, diff_view

# Plain text is never wrapped or cut, so that programs can read it line by line.
UNBOUNDED = 10_000


def diff_text(passes: Sequence[PassDiff], detail: Detail = "sites") -> str:
    """The pass-by-pass diff as plain text."""
    return plain_text(diff_view(passes, detail))


def plain_text(content: RenderableType, width: int = UNBOUNDED) -> str:
    """Render `content` without colours, at most `width` characters wide."""
    stream = io.StringIO()
    console = Console(file=stream, width=width, color_system=None, force_terminal=False, highlight=False, emoji=False)
    console.print(content, soft_wrap=False)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines())

"""Turn views into plain text."""

from __future__ import annotations

import io

from rich.console import Console, RenderableType

# Plain text is never wrapped or cut, so that programs can read it line by line.
UNBOUNDED = 10_000


def plain_text(content: RenderableType, width: int = UNBOUNDED) -> str:
    """Render `content` without colours, at most `width` characters wide."""
    stream = io.StringIO()
    console = Console(file=stream, width=width, color_system=None, force_terminal=False, highlight=False, emoji=False)
    console.print(content, soft_wrap=False)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines())

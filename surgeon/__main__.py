"""The command line: `surgeon`, `python -m surgeon`.

A command shows at once that it works. Only then is all imported that reads options, which takes longer.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from surgeon.render.screen import Screen

# Options after which another screen may be needed than one without options. Short ones may be written together.
_OTHER_SCREEN = re.compile(r"--(help|quiet|output|version)\b.*|-[a-z]*[hq][a-z]*")


def main() -> None:
    """Run the command line."""
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show an arrow gets a question mark instead of an error.
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    begun = _begun(sys.argv[1:])
    try:
        from surgeon.cli import main as run

        run(begun)
    finally:
        if begun is not None:
            begun.close()


def _begun(words: list[str]) -> Screen | None:
    """Show that work begins; None where nothing can move, and where another screen may be asked for.

    `surgeon.cli` says the same for all commands, later.
    """
    moves = sys.stdout.isatty() and sys.stderr.isatty() and os.environ.get("WORLD_SIZE", "1") == "1"
    if not moves or not words or any(map(_OTHER_SCREEN.fullmatch, words)):
        return None
    if not words[0].isidentifier() or not (Path(__file__).with_name("cli") / f"{words[0]}.py").is_file():
        return None
    from surgeon.render.screen import Screen

    screen = Screen(command=shlex.join(words))
    screen.waiting("reading the passes" if words[0] == "passes" else "loading PyTorch")
    return screen


if __name__ == "__main__":
    main()

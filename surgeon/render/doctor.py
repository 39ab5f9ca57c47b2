"""The view of the result of `surgeon doctor`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from surgeon.jobs.doctor import Check
from surgeon.text.layout import dim, grid


def doctor_view(checks: Sequence[Check]) -> RenderableType:
    """Show each check, what it found, and how to fix what is wrong."""
    signs = {"ok": Text("✓", style="green"), "note": Text("·", style="dim"), "failed": Text("✗", style="bold red")}
    table = grid("left", "left", "left")
    for check in checks:
        table.add_row(signs[check.state], check.name, check.found)
        if check.advice:
            table.add_row("", "", Text(check.advice, style="yellow" if check.state == "failed" else "dim"))
    failed = Counter(check.state for check in checks)["failed"]
    end = Text("Everything works.", style="green") if not failed else Text(f"{failed} problem(s) found.", style="red")
    return Group(table, end, dim("To report a problem, paste this."))

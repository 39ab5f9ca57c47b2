"""How `surgeon explain` shows its result."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from surgeon.jobs.explain import Explanation
from surgeon.text.layout import MODEL, grid, heading, indented


def explanation_view(passes: Sequence[Explanation]) -> RenderableType:
    """For every pass, each candidate: changed, or why not."""
    lines: list[RenderableType] = []
    for one in passes:
        total = len(one.matched) + len(one.rejected)
        if not total:
            lines += [heading(one.name, f"finds no {one.looks_for}"), Text("")]
            continue
        lines.append(heading(one.name, f"changes {len(one.matched)} of {total} candidates"))
        table = grid("left", "left", "left")
        for path, what in one.matched:
            table.add_row(Text("✓", style="green"), Text(path or MODEL, style="cyan"), what)
        for rejection in one.rejected:
            reason = Text.assemble(rejection.reason, (f" [{rejection.code}]", "dim"))
            table.add_row(Text("✗", style="red"), Text(rejection.path or MODEL, style="cyan"), reason)
        lines += [indented(table), Text("")]
    return Group(*lines[:-1])

"""The view of the result of `surgeon explain`."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from surgeon.jobs.explain import Explanation
from surgeon.text.layout import MODEL, grid, heading, indented


def explanation_view(passes: Sequence[Explanation]) -> RenderableType:
    """Show for each pass which candidates it changes, and why it leaves the others."""
    lines: list[RenderableType] = []
    for explanation in passes:
        total = len(explanation.matched) + len(explanation.rejected)
        if not total:
            lines += [heading(explanation.name, f"finds no {explanation.looks_for}"), Text("")]
            continue
        lines.append(heading(explanation.name, f"changes {len(explanation.matched)} of {total} candidates"))
        table = grid("left", "left", "left")
        for match in explanation.matched:
            table.add_row(Text("✓", style="green"), Text(match.path or MODEL, style="cyan"), match.what)
        for rejection in explanation.rejected:
            reason = Text.assemble(rejection.reason, (f" [{rejection.code}]", "dim"))
            table.add_row(Text("✗", style="red"), Text(rejection.path or MODEL, style="cyan"), reason)
        lines += [indented(table), Text("")]
    return Group(*lines[:-1])

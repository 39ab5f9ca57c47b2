"""The view of two models that `surgeon diff` compares."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Group, RenderableType
from rich.text import Text

from surgeon.jobs.diff import Comparison, SiteSide
from surgeon.render.numbers import add_numbers
from surgeon.text.diff import Detail, graph_diff_view
from surgeon.text.layout import MODEL, dim, grid, sentences
from surgeon.text.summary import join_like, number, percent


def comparison_view(found: Comparison, detail: Detail) -> RenderableType:
    """Show two models side by side."""
    (first, second), (a, b) = found.names, found.costs
    table = grid("left", "right", "right", "left", header=("", first, second, ""))
    add_numbers(table, "parameters", a.parameters, b.parameters)
    add_numbers(table, "multiply-adds", a.multiply_adds, b.multiply_adds)
    if a.executed is not None or b.executed is not None:
        add_numbers(table, "  that ran", a.executed_multiply_adds, b.executed_multiply_adds)
        table.add_row("  of what can be skipped", percent(a.executed) or "-", percent(b.executed) or "-", "")
    lines: list[RenderableType] = [table]
    if found.difference is not None:
        lines.append(Text(f"The outputs differ by {found.difference:.1e}, relative, on {first}'s example inputs."))
    notes = dict.fromkeys([*a.notes, *b.notes, *([found.note] if found.note else [])])
    if notes:
        lines.append(sentences(notes, indent=0))
    if detail != "stat" and found.sites:
        header = ("site", "", first, second, "parameters", "mult-adds/token", "ran")
        table = grid("left", "right", "left", "left", "left", "left", "left", header=header)
        rows = list(found.sites.items())
        joined = [(path, 1, place) for place, (path, _) in enumerate(rows)] if detail == "full" else join_like(rows)
        for label, count, place in joined:
            old, new = rows[place][1]
            same = old is not None and new is not None and old.what == new.what
            table.add_row(
                Text(label or MODEL, style="cyan"),
                dim(f"×{count}" if count > 1 else ""),
                Text(old.what if old else "-", style="" if same else "red"),
                Text(new.what if new else "-", style="" if same else "green"),
                _pair(old, new, lambda side: number(side.parameters)),
                _pair(old, new, lambda side: number(side.multiply_adds)),
                _pair(old, new, lambda side: percent(side.executed)),
            )
        lines += [Text(""), table]
    if found.nodes is not None:
        lines += [Text(""), graph_diff_view(found.nodes)]
    return Group(*lines)


def _pair(old: SiteSide | None, new: SiteSide | None, what: Callable[[SiteSide], str]) -> str:
    before, after = (what(side) if side is not None else "" for side in (old, new))
    return before if before == after else f"{before or '-'} → {after or '-'}"

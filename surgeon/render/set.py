"""The view of the result of `surgeon set`."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.text import Text

from surgeon.jobs.set import SetResult
from surgeon.text.layout import grid, sentences


def set_view(found: SetResult) -> RenderableType:
    """Show what is set for each layer, and the value before where it changed."""
    layers = found.layers.values()
    header = ["layer", "tau", "rule"]
    if any(knobs.compensated for change in layers for knobs in (change.before, change.after)):
        header.append("compensated")
    table = grid(*(["left"] * len(header)), header=header)  # type: ignore[arg-type]
    for path, change in found.layers.items():
        before, after = (
            (f"{knobs.tau:.3g}", knobs.rule or "", "yes" if knobs.compensated else "no")
            for knobs in (change.before, change.after)
        )
        cells = (new if old == new else f"{old} → {new}" for old, new in zip(before, after, strict=True))
        table.add_row(Text(path, style="cyan"), *list(cells)[: len(header) - 1])
    lines: list[RenderableType] = [table, sentences(found.notes, indent=0)]
    if found.directory is not None:
        lines.append(Text.assemble("Saved to ", (str(found.directory), "bold"), "."))
    return Group(*lines)

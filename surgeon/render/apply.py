"""The view of the result of `surgeon apply`."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.text import Text

from surgeon.display.words import seconds
from surgeon.jobs.apply import Applied
from surgeon.render.numbers import INTERVALS, add_numbers, agreement_line
from surgeon.text.layout import code, dim, grid, sentences
from surgeon.text.quality import change_words, measured_on, with_interval
from surgeon.text.summary import number, percent


def applied_view(applied: Applied) -> RenderableType:
    """Show what all passes changed together, where the result is, and what to do next.

    Each pass was shown when it was done.
    """
    before, after = applied.before, applied.after
    table = grid("left", "right", "right", "left", header=("", "before", "after", ""))
    add_numbers(table, "parameters", before.parameters, after.parameters)
    add_numbers(table, "multiply-adds", before.multiply_adds, after.multiply_adds)
    if after.executed is not None:
        share = percent(after.executed_multiply_adds / before.multiply_adds) if before.multiply_adds else ""
        table.add_row(
            "  that ran", number(before.executed_multiply_adds), number(after.executed_multiply_adds),
            dim(
                f"{share} of before; {percent(after.executed)} of what can be skipped (example inputs, padding counted)"
            ),
        )  # fmt: skip
    if applied.quality is not None:
        old, new = applied.quality
        moved = f"{change_words(new.change)} " if new.change is not None else ""
        table.add_row(old.name, with_interval(old), with_interval(new), dim(f"{moved}on {measured_on(new)}"))
    lines: list[RenderableType] = [table]
    if applied.agreement:
        lines.append(agreement_line(applied.agreement, "the model before"))
    if applied.quality is not None or applied.agreement:
        lines.append(dim(INTERVALS))
    lines.append(sentences([*applied.notes, *after.notes], indent=0))
    time_taken = seconds(applied.seconds)
    if applied.directory is None:
        lines.append(Text(f"Dry run, {time_taken}: nothing was trained and nothing was saved."))
    else:
        lines.append(Text.assemble("Saved to ", (str(applied.directory), "bold"), f" in {time_taken}."))
    command, purpose = applied.next
    lines.append(Text.assemble("Next, ", purpose, ":"))
    lines.append(code(command, style="bold"))
    return Group(*lines)

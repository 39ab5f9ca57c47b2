"""The view of the result of `surgeon demo`."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.text import Text

from surgeon.jobs.demo import Demo
from surgeon.measure.sweep import Dense
from surgeon.render.sweep import sweep_view
from surgeon.text.layout import next_command


def demo_view(made: Demo) -> RenderableType:
    """Show quality against cost, and where the result is."""
    before = made.surgery.reports[0].before
    return Group(
        sweep_view(made.points, Dense(None if before is None else before.multiply_adds, made.dense)),
        Text.assemble("\nSaved to ", (str(made.directory), "bold"), "."),
        next_command("to see what changed", "diff", str(made.directory)),
    )

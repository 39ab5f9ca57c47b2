"""The view of the result of `surgeon tune`."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.text import Text

from surgeon.jobs.tune import TuningResult
from surgeon.render.numbers import quality_value
from surgeon.text.layout import grid, sentences
from surgeon.text.summary import percent


def tuned_view(found: TuningResult) -> RenderableType:
    """Show the tau of each layer, and what tuning gained over one tau for all layers."""
    tuned = found.tuned
    table = grid("left", "right", "right", header=("layer", "tau", "experts that run"))
    for path, tau in tuned.taus.items():
        table.add_row(Text(path, style="cyan"), f"{tau:.3g}", percent(tuned.shares[path]))
    unit = "multiply-adds" if found.metric == "flops" else "time"
    summary = grid("left", "right", "right", header=("", f"{unit}, of dense", "damage, nats"))
    summary.add_row(f"one tau, {tuned.uniform:.3g}", percent(tuned.uniform_cost), f"{tuned.uniform_damage:.4g}")
    summary.add_row("a tau for each layer", percent(tuned.cost), f"{tuned.damage:.4g}")
    lines: list[RenderableType] = [table, Text(""), summary]
    if found.quality is not None:
        every, chosen = found.quality
        lines.append(
            Text(f"{every.name}: {quality_value(chosen)} within the budget, {quality_value(every)} with every expert.")
        )
    lines.append(sentences(found.notes, indent=0))
    lines.append(Text.assemble("Saved to ", (str(found.directory), "bold"), "."))
    return Group(*lines)

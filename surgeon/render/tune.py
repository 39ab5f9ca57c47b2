"""The view of the result of `surgeon tune`."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.text import Text

from surgeon.jobs.tune import TuningResult
from surgeon.render.numbers import INTERVALS, agreement_line
from surgeon.text.layout import dim, grid, next_command, sentences
from surgeon.text.quality import change_words, measured_on, with_interval
from surgeon.text.summary import percent

_AGREED_WITH = {"dense": "the dense model", "tau 0": "the surgery at tau 0"}


def tuned_view(found: TuningResult) -> RenderableType:
    """Show the tau of each layer, and what tuning gained over one tau for all layers."""
    tuned = found.tuned
    table = grid("left", "right", "right", header=("layer", "tau", "ran"))
    for path, tau in tuned.taus.items():
        table.add_row(
            Text(path, style="cyan"), "dense" if path in tuned.dense else f"{tau:.3g}", percent(tuned.shares[path])
        )
    unit = "multiply-adds" if found.metric == "flops" else "time"
    summary = grid("left", "right", "right", header=("", f"{unit}, of dense", f"damage, {tuned.unit}"))
    summary.add_row(f"one tau, {tuned.uniform:.3g}", percent(tuned.uniform_cost), f"{tuned.uniform_damage:.4g}")
    summary.add_row("a tau for each layer", percent(tuned.cost), f"{tuned.damage:.4g}")
    lines: list[RenderableType] = [table, Text(""), summary]
    if found.quality is not None:
        every, chosen = found.quality
        if every not in found.agreement and chosen not in found.agreement:
            words = f"{every.name}: {with_interval(chosen)} within the budget, {with_interval(every)} at tau 0"
            change = "" if chosen.change is None else f"; {change_words(chosen.change)} from the dense model"
            lines.append(Text(f"{words}{change}; on {measured_on(chosen)}."))
        if found.agreement:
            lines.append(agreement_line(found.agreement, _AGREED_WITH[found.agreed_with]))
        lines.append(dim(INTERVALS))
    lines.append(sentences(found.notes, indent=0))
    lines.append(Text.assemble("Saved to ", (str(found.directory), "bold"), "."))
    if set(tuned.taus) - set(tuned.dense):
        lines.append(next_command("to time it", "bench", "surgery", str(found.directory)))
    return Group(*lines)

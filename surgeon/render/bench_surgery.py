"""The view of the result of `surgeon bench surgery`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Group, RenderableType
from rich.text import Text

from surgeon.jobs.bench_surgery import SurgeryBenchmark
from surgeon.render.bench import factor, machine_lines, machine_name, milliseconds
from surgeon.render.bench_plot import Panel, Plot
from surgeon.text.layout import grid, heading, sentences
from surgeon.text.summary import percent

_LINEAR_UP_TO = 8  # longest over shortest time of a surgery, so that lines can be told apart


def surgery_view(found: SurgeryBenchmark) -> RenderableType:
    """Show the dense model, and a row for each tau."""
    times = found.times
    header = ("tau", "experts that ran", "ours", "ours, compiled", "torch", "gain")
    table = grid("left", "right", "right", "right", "right", "right", header=header)
    for setting in times.settings:
        tau = "as stored" if setting.tau is None else f"{setting.tau:g}"
        table.add_row(
            tau,
            percent(setting.executed),
            Text(milliseconds(setting.ours), style="bold"),
            Text(milliseconds(setting.compiled), style="bold"),
            milliseconds(setting.torch),
            factor(setting.gain),
        )
    lines: list[RenderableType] = [*machine_lines(found.machine), Text(""), heading(found.model, found.called_with)]
    if times.dense is not None:
        compiled = "" if times.compiled is None else f", compiled {milliseconds(times.compiled)} ms"
        lines.append(Text(f"dense model: {milliseconds(times.dense)} ms{compiled}"))
    legend = "Times are medians in milliseconds for one call. torch: with the torch backend instead of the kernels."
    legend += " gain: the faster of the dense times over the faster of ours." if times.dense is not None else ""
    return Group(*lines, table, sentences((legend, *found.notes), indent=0))


def surgery_plot(found: SurgeryBenchmark) -> Plot:
    """Plot one panel: the dense model and the settings, by the share of the experts that ran."""
    times = found.times
    # The stored tau may be among the given ones: each share gets one point.
    by_share = {setting.executed: setting for setting in times.settings}
    settings = [by_share[share] for share in sorted(by_share)]
    lines: dict[str, Sequence[float | None]] = {
        "dense": [times.dense] * len(settings),
        "compiled": [times.compiled] * len(settings),
        "torch": [setting.torch for setting in settings],
        "ours": [setting.ours for setting in settings],
        "ours_compiled": [setting.compiled for setting in settings],
    }
    panel = Panel(found.called_with, [setting.executed for setting in settings], lines)
    drawn = [value for line in lines.values() for value in line if value is not None]
    return Plot(
        f"{Path(found.model).name}, {machine_name(found.machine)}", [panel], log=max(drawn) > _LINEAR_UP_TO * min(drawn)
    )

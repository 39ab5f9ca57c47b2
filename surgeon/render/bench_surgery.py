"""The view of the result of `surgeon bench surgery`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Group, RenderableType
from rich.text import Text

from surgeon.jobs.bench_surgery import EngineBenchmark, SurgeryBenchmark
from surgeon.render.bench import factor, machine_lines, machine_name, milliseconds
from surgeon.render.bench_plot import Panel, Plot
from surgeon.text.layout import grid, heading, sentences
from surgeon.text.summary import percent

_LINEAR_UP_TO = 8  # longest over shortest time of a surgery, so that lines can be told apart


def surgery_view(found: SurgeryBenchmark) -> RenderableType:
    """Show the dense model, and a row for each tau."""
    times = found.times
    header = ("tau", "ran", "ours", "ours, compiled", "torch", "gain")
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


def engines_view(found: EngineBenchmark) -> RenderableType:
    """Show a row for each model in each engine, the fastest first."""
    table = grid("left", "left", "left", "right", "right", header=("engine", "model", "stored in", "ms", "differs by"))
    rows = [row for row in found.found.rows if row.milliseconds is not None]
    for row in sorted(rows, key=lambda row: row.milliseconds or 0.0):
        style = "bold" if row.experts else ""
        table.add_row(
            row.engine,
            Text("with experts" if row.experts else "dense", style=style),
            row.numbers,
            Text(milliseconds(row.milliseconds), style=style),
            percent(row.error),
        )
    lines: list[RenderableType] = [
        *machine_lines(found.machine),
        Text(""),
        heading(found.model, found.called_with),
        table,
    ]
    notes = ["Times are medians in milliseconds for one call. differs by: ‖difference‖ / ‖output of the dense model‖."]
    if found.gain is not None:
        notes.append(f"The fastest with experts is {found.gain:.2f} times as fast as the fastest dense one.")
    notes += [
        f"{row.engine}, {'with experts' if row.experts else 'dense'}, {row.numbers}: {row.why}"
        for row in found.found.rows
        if row.milliseconds is None
    ]
    notes.append(", ".join(f"{name} {version}" for name, version in found.found.versions.items()) + ".")
    return Group(*lines, sentences((*notes, *found.notes), indent=0))


def surgery_plot(found: SurgeryBenchmark) -> Plot:
    """Plot one panel: the dense model and the settings, by the share that ran of what can be skipped."""
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

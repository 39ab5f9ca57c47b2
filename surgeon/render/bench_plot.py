"""Benchmarks as files: numbers as JSON, times against the selected share as PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import singledispatch
from itertools import groupby
from pathlib import Path
from typing import Any

from surgeon.bench.machine import Machine
from surgeon.jobs.bench_predict import LayerBenchmark, ModelBenchmark, SurgeryBenchmark
from surgeon.render.files import write_result

_WIDTH, _HEIGHT = 3.6, 2.8  # inches, of a panel
_MOST_COLUMNS = 4  # of panels, where there is a choice
_LINEAR_UP_TO = 8  # between the shortest and the longest time of a surgery, so that every line can be told
_LABELS = {
    "compiled": "dense, compiled",
    "masked": "dense, masked",
    "ours_dense": "ours, every expert on",
    "ours_compiled": "ours, compiled",
}
# A method looks the same in every panel, also where others did not run.
_STYLES: dict[str, dict[str, Any]] = {
    "dense": {"color": "black"},
    "compiled": {"color": "grey"},
    "masked": {"color": "tab:blue"},
    "loop": {"color": "tab:orange"},
    "grouped_mm": {"color": "tab:green"},
    "published": {"color": "tab:purple"},
    "torch": {"color": "tab:brown"},
    "ours": {"color": "tab:red", "lw": 2.5, "zorder": 3},
    "ours_dense": {"color": "lightcoral"},
    "ours_compiled": {"color": "darkred", "lw": 2.5, "zorder": 3},
    "limit": {"color": "tab:red", "ls": "--", "marker": ""},
}


@dataclass(frozen=True)
class Panel:
    """Milliseconds against the selected share: a line each. A value is None where a method did not run."""

    title: str
    shares: Sequence[float]
    lines: Mapping[str, Sequence[float | None]]


@dataclass(frozen=True)
class _Plot:
    title: str
    panels: list[Panel] = field(default_factory=list)
    columns: int = 1
    log: bool = True  # times of several orders of magnitude


def write_benchmark(found: LayerBenchmark | SurgeryBenchmark | ModelBenchmark, file: Path) -> None:
    """Write a benchmark to a `.json` or a `.png` file; raises as `write_result`."""
    write_result(found, file, lambda: _draw(_plot(found), file))


@singledispatch
def _plot(found: Any) -> _Plot:
    raise TypeError(type(found).__name__)


@_plot.register
def _of_layer(found: LayerBenchmark) -> _Plot:
    panels = []
    several = {cell.mask for cell in found.cells}
    columns = len({cell.size for cell in found.cells}) * len(several)
    ordered, dtypes = found.cells, {cell.dtype for cell in found.cells}
    if columns * len(dtypes) <= _MOST_COLUMNS:  # dtypes side by side
        columns *= len(dtypes)
        tokens_of = list(dict.fromkeys(cell.tokens for cell in ordered))
        ordered = sorted(ordered, key=lambda cell: tokens_of.index(cell.tokens))
    for (dtype, tokens, size, mask), group in groupby(ordered, lambda c: (c.dtype, c.tokens, c.size, c.mask)):
        cells = sorted(group, key=lambda cell: cell.executed)
        lines: dict[str, Sequence[float | None]] = {
            name: [cell.methods[name].milliseconds for cell in cells] for name in cells[0].methods
        }
        lines["limit"] = [cell.limit for cell in cells]
        title = f"{dtype}, {tokens:,} token{'s' * (tokens != 1)}, experts of {size}"
        panels.append(Panel(title + (f", {mask}" if len(several) > 1 else ""), [c.executed for c in cells], lines))
    title = f"One layer {found.width} → {found.hidden} → {found.width}, {_where(found.machine)}"
    return _Plot(title, panels, columns)


def _where(machine: Machine) -> str:
    return machine.gpu or f"{machine.processor}, {machine.threads} thread{'s' * (machine.threads != 1)}"


@_plot.register
def _of_surgery(found: SurgeryBenchmark) -> _Plot:
    times = found.times
    # What is stored may be one of the taus that were given: a share has one point.
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
    return _Plot(
        f"{Path(found.model).name}, {_where(found.machine)}", [panel], log=max(drawn) > _LINEAR_UP_TO * min(drawn)
    )


@_plot.register
def _of_model(found: ModelBenchmark) -> _Plot:
    panels = []
    for (dtype, tokens, size), group in groupby(found.points, lambda p: (p.dtype, p.tokens, p.size)):
        points = sorted(group, key=lambda point: point.share)
        lines = {"dense": [point.dense for point in points], "ours": [point.ours for point in points]}
        title = f"{dtype}, {tokens:,} token{'s' * (tokens != 1)}, experts of {size}"
        panels.append(Panel(title, [point.share for point in points], lines))
    title = f"{found.device.title}, layer {found.width} → {found.hidden}: a model, not a measurement"
    return _Plot(title, panels, len({point.size for point in found.points}))


def _draw(plot: _Plot, file: Path) -> None:
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    rows = -(-len(plot.panels) // plot.columns)
    size = (max(6.0, _WIDTH * plot.columns), _HEIGHT * rows + 0.8)
    figure = Figure(figsize=size, layout="constrained")
    # Of one row the times are comparable: only the experts differ.
    grid = figure.subplots(rows, plot.columns, squeeze=False, sharex=True, sharey="row")
    drawn: dict[str, Any] = {}
    for axes, panel in zip(grid.flat, plot.panels, strict=True):
        shares = [100 * share for share in panel.shares]
        for name, values in panel.lines.items():
            points = [(share, value) for share, value in zip(shares, values, strict=True) if value is not None]
            if points:
                style = {"marker": "o", "ms": 3, "lw": 1.2, **_STYLES[name]}
                (drawn[name],) = axes.plot(*zip(*points, strict=True), **style)
        if plot.log:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
        else:
            axes.set_ylim(bottom=0)
        axes.set_xlim(left=0)
        axes.set_title(panel.title, fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
    for axes in grid[-1]:
        axes.set_xlabel("experts selected, %", fontsize=9)
    for axes in grid[:, 0]:
        axes.set_ylabel("milliseconds", fontsize=9)
    figure.suptitle(plot.title, fontsize=10)
    labels = [_LABELS.get(name, name.replace("_", " ")) for name in drawn]
    figure.legend(
        drawn.values(), labels, loc="outside lower center", ncols=min(5, len(drawn)), frameon=False, fontsize=8
    )
    figure.savefig(file, dpi=130)

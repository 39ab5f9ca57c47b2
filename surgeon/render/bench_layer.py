"""The view of the result of `surgeon bench layer`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from rich.console import Group, RenderableType
from rich.text import Text

from surgeon.bench.grid import Cell
from surgeon.bench.machine import Machine
from surgeon.bench.methods import METHODS
from surgeon.jobs.bench_layer import LayerBenchmark
from surgeon.render.bench import count, factor, machine_lines, machine_name, milliseconds
from surgeon.render.bench_plot import Panel, Plot
from surgeon.text.layout import dim, grid, heading, indented, sentences
from surgeon.text.summary import number, percent

_MOST_COLUMNS = 4  # of panels, where there is a choice
# Two lines each, so that all of them fit 100 columns.
_NAMES = {
    "dense": "\ndense",
    "compiled": "com-\npiled",
    "masked": "\nmasked",
    "loop": "\nloop",
    "grouped_mm": "grouped\n_mm",
    "published": "pub-\nlished",
    "torch": "\ntorch",
    "ours": "\nours",
    "ours_dense": "ours,\nall on",
    "ours_int8": "ours,\nint8",
    "ours_int4": "ours,\nint4",
    "ours_fp8": "ours,\nfp8",
    "openvino": "open-\nvino",
    "openvino_weights": "openvino\nweights",
    "onnxruntime": "onnx-\nruntime",
    "torchao": "torch-\nao",
}
_LEGEND = (
    "Times are medians in milliseconds for one layer, with its weights not in a cache. dense / ours: the faster of "
    "dense and compiled, over ours. engine / int8: the fastest other engine over ours, int8, whose time includes its "
    "router. ours, all on: every expert runs, without the dense product. all on / ours stands before its highest "
    "possible value, 1 / share.",
    "of limit: the least time that the machine needs, over ours. The limit is arithmetic (a) for the selected "
    "multiply-adds, or memory (m) for reading the selected weights, in both cases without what ReLU switched off. "
    "error: the largest difference in the column from float64, relative to the largest output.",
)


def layer_view(found: LayerBenchmark) -> RenderableType:
    """Show a block for each dtype, number of tokens, size and mask, with a row for each share."""
    kind = f"{'gated ' if found.gated else ''}{found.activation}"
    layer = f"Layer {found.width} → {found.hidden} → {found.width}, {kind}, random weights."
    blocks: list[RenderableType] = [*machine_lines(found.machine), Text(layer)]
    if found.untimed:
        blocks.append(Text(_incomplete(found), style="yellow"))
    for (dtype, tokens, size, mask), cells in groupby(found.cells, lambda c: (c.dtype, c.tokens, c.size, c.mask)):
        what = f"{dtype}, {count(tokens, 'token')}, {count(found.hidden // size, 'expert')} × {size}"
        blocks += [Text(""), heading(what, f"{mask} selection"), _block(list(cells))]
    legend = (*_LEGEND, *_calls(found.machine), *_slow_types(found.machine))
    return Group(*blocks, Text(""), sentences(legend, indent=0))


def _incomplete(found: LayerBenchmark) -> str:
    return f"Incomplete: {found.untimed} of {len(found.cells) + found.untimed} layers were not timed."


def _calls(machine: Machine) -> list[str]:
    """Say how a call is timed."""
    if machine.gpu is None:
        return [
            "Before each timed call, caches are emptied and another layer is run, as in a model. Up to 16 tokens are "
            "timed through 8 layers in sequence, and the time shown is that of one layer."
        ]
    waiting = ", ".join(name for name, method in METHODS.items() if method.waits)
    return [
        f"Calls are replayed from CUDA graphs, except those in which Python waits for the GPU: {waiting}. Without a "
        "graph, small calls take as long as Python takes to start their kernels."
    ]


def _slow_types(machine: Machine) -> list[str]:
    """Warn where torch has no fast product for a half type, which makes every method that uses it slow."""
    rates = machine.gemm
    return [
        f"torch multiplies {name} at {number(rate)}FLOP/s here, and float32 at {number(rates['float32'])}FLOP/s. This "
        "makes its dense layer slow: compare ours with ours, all on. The limit is that of float32."
        for name, rate in rates.items()
        if rate < rates["float32"] / 2
    ]


def _block(cells: Sequence[Cell]) -> RenderableType:
    names = [name for name in cells[0].methods if any(cell.methods[name].milliseconds for cell in cells)]
    compared = any(cell.gain is not None for cell in cells)
    engines = any(cell.int8_gain is not None for cell in cells)
    beside = any(cell.kernel_gain is not None for cell in cells)
    limited = any(cell.of_limit is not None for cell in cells)
    header = ["\nshare", *(_NAMES[name] for name in names)]
    header += (
        ["dense\n/ours"] * compared + ["engine\n/int8"] * engines + ["all on\n/ours"] * beside + ["of\nlimit"] * limited
    )
    table = grid(*(["right"] * len(header)), header=header)  # type: ignore[arg-type]
    for cell in cells:
        row: list[RenderableType] = [percent(cell.share)]
        for name in names:
            row.append(Text(milliseconds(cell.methods[name].milliseconds), style="bold" if name == "ours" else ""))
        row += (
            [factor(cell.gain)] * compared
            + [factor(cell.int8_gain)] * engines
            + [_of(cell.kernel_gain, cell.ceiling)] * beside
        )
        row += [f"{percent(cell.of_limit)} {cell.limited_by[0]}"] * limited
        table.add_row(*row)
    worst = (max((c.methods[name].error or 0.0 for c in cells), default=0.0) for name in names)
    table.add_row(dim("error"), *(dim(f"{error:.0e}") for error in worst))
    reasons = {name: timing.why for cell in cells for name, timing in cell.methods.items() if timing.why}
    return Group(table, *(indented(dim(f"{name} did not run: {why}"), 0) for name, why in reasons.items()))


def _of(gain: float | None, ceiling: float) -> str:
    return "" if gain is None else f"{_short(gain)}/{_short(ceiling)}"


def _short(value: float) -> str:
    return f"{value:.1f}" if value < 9.95 else f"{value:.0f}"


def layer_plot(found: LayerBenchmark) -> Plot:
    """Plot a panel for each dtype, number of tokens, size and mask."""
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
        title = f"{dtype}, {count(tokens, 'token')}, experts of {size}"
        panels.append(Panel(title + (f", {mask}" if len(several) > 1 else ""), [c.executed for c in cells], lines))
    title = f"One layer {found.width} → {found.hidden} → {found.width}, {machine_name(found.machine)}"
    if found.untimed:
        title += f"\n{_incomplete(found)}"
    return Plot(title, panels, columns)

"""How benchmarks look: layers by every method, saved surgeries end to end, and what a model of a GPU predicts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import singledispatch
from itertools import groupby
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from surgeon.bench.grid import Cell
from surgeon.bench.machine import Machine
from surgeon.bench.methods import METHODS
from surgeon.jobs.bench_predict import LayerBenchmark, ModelBenchmark, Predicted, SurgeryBenchmark
from surgeon.kernels.gpu_model.devices import Device
from surgeon.text.layout import dim, grid, heading, indented, sentences
from surgeon.text.summary import number, percent

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
}
_LEGEND = (
    "Milliseconds of a layer, the median, its weights not in a cache. dense / ours: the faster of dense and compiled. "
    "ours, all on: every expert, never by the dense product; what it is over ours stands beside what it could be, "
    "1 / share.",
    "of limit: what the machine needs at least for the selected multiply-adds (a) or for reading the selected weights "
    "(m), over ours. error: the largest of the column, from float64, relative to the largest output.",
)
_MODEL_LEGEND = (
    "Milliseconds of ours, how many times that is faster than dense, and what bounds it: a arithmetic, m memory, "
    "c cache, s adding up, l launches. up to: the share above which dense is faster. way: how "
    "ours is computed, see the assumptions.",
    "At equal shares larger experts are rarely slower; smaller ones need a smaller share for the same quality, which "
    "this does not know: compare across shares.",
)


@singledispatch
def benchmark_view(found: Any) -> RenderableType:
    """A benchmark as tables."""
    raise TypeError(type(found).__name__)


@benchmark_view.register
def layer_view(found: LayerBenchmark) -> RenderableType:
    """A block for each dtype, number of tokens, size and mask, with a row for each share."""
    kind = f"{'gated ' if found.gated else ''}{found.activation}"
    layer = f"Layer {found.width} → {found.hidden} → {found.width}, {kind}, random weights."
    blocks: list[RenderableType] = [*_machine(found.machine), Text(layer)]
    for (dtype, tokens, size, mask), cells in groupby(found.cells, lambda c: (c.dtype, c.tokens, c.size, c.mask)):
        what = f"{dtype}, {_count(tokens, 'token')}, {_count(found.hidden // size, 'expert')} × {size}"
        blocks += [Text(""), heading(what, f"{mask} selection"), _block(list(cells))]
    legend = (*_LEGEND, *_calls(found.machine), *_slow_types(found.machine))
    return Group(*blocks, Text(""), sentences(legend, indent=0))


def _calls(machine: Machine) -> list[str]:
    """What a call is."""
    if machine.gpu is None:
        return [
            "Caches are emptied and another layer is run before what is timed, as in a model. Up to 16 tokens are "
            "timed through 8 layers one after another; the time is that of one."
        ]
    waiting = ", ".join(name for name, method in METHODS.items() if method.waits)
    return [
        f"Calls are replayed from CUDA graphs, but for those in which Python waits for the GPU: {waiting}. Without a "
        "graph, small calls take as long as Python takes to start their kernels."
    ]


def _slow_types(machine: Machine) -> list[str]:
    """What to know where torch has no fast product for a half type, so that every method that uses it looks bad."""
    rates = machine.gemm
    return [
        f"torch multiplies {name} at {number(rate)}FLOP/s here, float32 at {number(rates['float32'])}FLOP/s. Its dense "
        "layer is slow for that reason: compare ours with ours, all on. The limit is that of float32."
        for name, rate in rates.items()
        if rate < rates["float32"] / 2
    ]


def _block(cells: Sequence[Cell]) -> RenderableType:
    names = [name for name in cells[0].methods if any(cell.methods[name].milliseconds for cell in cells)]
    compared = any(cell.gain is not None for cell in cells)
    beside = any(cell.kernel_gain is not None for cell in cells)
    limited = any(cell.of_limit is not None for cell in cells)
    header = ["\nshare", *(_NAMES[name] for name in names)]
    header += ["dense\n/ours"] * compared + ["all on\n/ours"] * beside + ["of\nlimit"] * limited
    table = grid(*(["right"] * len(header)), header=header)  # type: ignore[arg-type]
    for cell in cells:
        row: list[RenderableType] = [percent(cell.share)]
        for name in names:
            row.append(Text(_ms(cell.methods[name].milliseconds), style="bold" if name == "ours" else ""))
        row += [_gain(cell.gain)] * compared + [_of(cell.kernel_gain, cell.ceiling)] * beside
        row += [f"{percent(cell.of_limit)} {cell.limited_by[0]}"] * limited
        table.add_row(*row)
    worst = (max((c.methods[name].error or 0.0 for c in cells), default=0.0) for name in names)
    table.add_row(dim("error"), *(dim(f"{error:.0e}") for error in worst))
    reasons = {name: one.why for cell in cells for name, one in cell.methods.items() if one.why}
    return Group(table, *(indented(dim(f"{name} did not run: {why}"), 0) for name, why in reasons.items()))


@benchmark_view.register
def surgery_view(found: SurgeryBenchmark) -> RenderableType:
    """The dense model, and a row for each tau."""
    times = found.times
    header = ("tau", "experts that ran", "ours", "ours, compiled", "torch", "gain")
    table = grid("left", "right", "right", "right", "right", "right", header=header)
    for setting in times.settings:
        tau = "as stored" if setting.tau is None else f"{setting.tau:g}"
        compiled = "" if setting.compiled is None else _ms(setting.compiled)
        table.add_row(
            tau, percent(setting.executed), Text(_ms(setting.ours), style="bold"), Text(compiled, style="bold"),
            _ms(setting.torch), _gain(setting.gain),
        )  # fmt: skip
    lines: list[RenderableType] = [*_machine(found.machine), Text(""), heading(found.model, found.called_with)]
    if times.dense is not None:
        compiled = "" if times.compiled is None else f", compiled {_ms(times.compiled)} ms"
        lines.append(Text(f"dense model: {_ms(times.dense)} ms{compiled}"))
    legend = "Milliseconds of a call, the median. torch: with the torch backend instead of the kernels."
    legend += " gain: the faster of the dense models over the faster of ours." if times.dense is not None else ""
    return Group(*lines, table, sentences((legend, *found.notes), indent=0))


@benchmark_view.register
def model_view(found: ModelBenchmark) -> RenderableType:
    """What is known of the device, a block for each dtype and number of tokens, and what was assumed."""
    kind = ", gated" if found.gated else ""
    lines: list[RenderableType] = [
        Text("A model, not a measurement.", style="bold yellow"),
        devices_view([found.device]),
        Text(f"\nLayer {found.width} → {found.hidden} → {found.width}{kind}."),
    ]
    for advice in found.advice:
        points = [p for p in found.points if (p.dtype, p.tokens) == (advice.dtype, advice.tokens)]
        first = points[0]
        what = f"{advice.dtype}, {_count(advice.tokens, 'token')}"
        lines += [Text(""), heading(what, f"dense {_ms(first.dense)} ms, bound by {first.dense_bound}")]
        shares = list(advice.best)
        table = grid(
            *(["right"] * (2 + len(shares))),  # type: ignore[arg-type]
            "left",
            header=("size", *(percent(share) for share in shares), "up to", "way"),
        )
        for size, limit in advice.break_even.items():
            row = {p.share: p for p in points if p.size == size}
            way = row[shares[0]].way
            table.add_row(str(size), *(_prediction(row[share]) for share in shares), percent(limit), way)
        best = ("dense" if size is None else str(size) for size in advice.best.values())
        table.add_row(dim("best"), *(Text(one, style="bold") for one in best), "", "")
        lines.append(table)
    return Group(
        *lines, Text(""), sentences(_MODEL_LEGEND, indent=0), sentences(found.assumptions, indent=0, sign="assumed: ")
    )


def devices_view(devices: Iterable[Device]) -> RenderableType:
    """Every figure of the devices, and where it is from."""
    table = grid("left", "left", "right", "left", header=("device", "figure", "", "source"))
    for device in devices:
        rows = (
            ("bf16, fp16", f"{number(device.rates['bfloat16'])}FLOP/s", f"{device.source}, without sparsity"),
            ("fp32", f"{number(device.rates['float32'])}FLOP/s", device.source),
            ("memory", f"{number(device.memory)}B/s", device.source),
            ("L2 cache", f"{number(device.cache_size)}B", device.cache_sources[0]),
            ("", f"{number(device.cache)}B/s", device.cache_sources[1]),
        )
        for index, (figure, value, source) in enumerate(rows):
            name = Text(device.name if index == 0 else "", style="bold")
            table.add_row(name, figure, value, source)
    return table


def _machine(machine: Machine) -> list[RenderableType]:
    where = machine.gpu or f"{machine.processor}, {_count(machine.threads, 'thread')}"
    using = machine.torch if machine.gpu else f"{machine.torch}, {machine.instruction_set}"
    lines = [Text(f"{where}; torch {using}; kernels: {machine.kernels}.")]
    if machine.bandwidth is not None:
        rates = ", ".join(f"{number(rate)}FLOP/s in {name}" for name, rate in machine.gemm.items())
        lines.append(Text(f"Its limits, measured: {rates}; {number(machine.bandwidth)}B/s from memory."))
    if machine.clock == "thread":
        lines.append(Text("Times are the thread's own, without what other work took."))
    return list(lines)


def _prediction(point: Predicted) -> Text:
    colour = "green" if point.gain >= 1.0 else "red"
    return Text.assemble(f"{_ms(point.ours)} ", (f"{point.gain:.2f}×", colour), f" {point.ours_bound[0]}")


def _gain(gain: float | None) -> Text:
    if gain is None:
        return Text("")
    return Text(f"{gain:.2f}×", style="green" if gain >= 1.0 else "red")


def _of(gain: float | None, ceiling: float) -> str:
    return "" if gain is None else f"{_short(gain)}/{_short(ceiling)}"


def _short(value: float) -> str:
    return f"{value:.1f}" if value < 9.95 else f"{value:.0f}"


def _ms(milliseconds: float | None) -> str:
    if milliseconds is None:
        return ""
    digits = 0 if milliseconds >= 99.95 else 1 if milliseconds >= 9.995 else 2 if milliseconds >= 0.9995 else 3
    return f"{milliseconds:.{digits}f}"


def _count(value: int, what: str) -> str:
    return f"{value:,} {what}{'s' * (value != 1)}"

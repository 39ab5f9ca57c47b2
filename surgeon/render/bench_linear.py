"""The view of the result of `surgeon bench linear`."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.text import Text

from surgeon.jobs.bench_linear import LinearBenchmark
from surgeon.render.bench import factor, machine_lines
from surgeon.text.layout import grid, sentences
from surgeon.text.summary import percent

_LEGEND = (
    "Times are medians in microseconds for one layer. warm: its weights are in the caches; cold: they are not. gain: "
    "the faster of dense and compiled, over ours. rows: the inputs that some token of the call keeps, whose weights "
    "are read. int8: the dense layer beside it is in float32."
)


def linear_view(found: LinearBenchmark) -> RenderableType:
    """Show a row for each layer."""
    times = [f"{state}: {method}" for state in ("warm", "cold") for method in ("dense", "compiled", "ours", "gain")]
    header = ("layer", "dtype", "tokens", "kept", "rows", *(name.replace(": ", ":\n") for name in times))
    table = grid("left", "left", *["right"] * 11, header=header)  # type: ignore[arg-type]
    for cell in found.cells:
        row = [f"{cell.d_in} → {cell.d_out}", cell.dtype, f"{cell.tokens:,}", percent(cell.kept), percent(cell.rows)]
        entries: list[str | Text] = [*row]
        for state, gain in ((cell.warm, cell.warm_gain), (cell.cold, cell.cold_gain)):
            entries += [_microseconds(state["dense"]), _microseconds(state["compiled"])]
            entries += [Text(_microseconds(state["ours"]), style="bold"), factor(gain)]
        table.add_row(*entries)
    error = max(cell.error for cell in found.cells)
    legend = (_LEGEND, f"Ours differs from float64 by at most {error:.0e} of the largest output.")
    return Group(*machine_lines(found.machine), Text(""), table, sentences(legend, indent=0))


def _microseconds(milliseconds: float) -> str:
    value = 1000 * milliseconds
    return f"{value:,.0f}" if value >= 99.5 else f"{value:.1f}"

"""The view of the result of `surgeon bench predict`."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby

from rich.console import Group, RenderableType
from rich.text import Text

from surgeon.jobs.bench_predict import LayerPrediction, Predicted
from surgeon.kernels.gpu_model.devices import Device
from surgeon.render.bench import count, factor, milliseconds
from surgeon.render.bench_plot import Panel, Plot
from surgeon.text.layout import dim, grid, heading, sentences
from surgeon.text.summary import number, percent

_LEGEND = (
    "Each entry gives the milliseconds of ours, its speed-up over dense, and what bounds it: arithmetic (a), memory "
    "(m), cache (c), sums (s) or launches (l). up to: the share above which dense is faster. way: how ours is "
    "computed; see the assumptions.",
    "At equal shares, larger experts are rarely slower. Smaller experts need a smaller share for the same quality, "
    "which this model does not predict: compare across shares.",
)


def prediction_view(found: LayerPrediction) -> RenderableType:
    """Show the figures of the device, a block for each dtype and number of tokens, and the assumptions."""
    kind = ", gated" if found.gated else ""
    lines: list[RenderableType] = [
        Text("A model, not a measurement.", style="bold yellow"),
        devices_view([found.device]),
        Text(f"\nLayer {found.width} → {found.hidden} → {found.width}{kind}."),
    ]
    for advice in found.advice:
        points = [p for p in found.points if (p.dtype, p.tokens) == (advice.dtype, advice.tokens)]
        first = points[0]
        what = f"{advice.dtype}, {count(advice.tokens, 'token')}"
        lines += [Text(""), heading(what, f"dense {milliseconds(first.dense)} ms, bound by {first.dense_bound}")]
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
        table.add_row(dim("best"), *(Text(size, style="bold") for size in best), "", "")
        lines.append(table)
    return Group(
        *lines, Text(""), sentences(_LEGEND, indent=0), sentences(found.assumptions, indent=0, sign="assumed: ")
    )


def devices_view(devices: Iterable[Device]) -> RenderableType:
    """Show every figure of the devices, with its source."""
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


def _prediction(point: Predicted) -> Text:
    return Text.assemble(f"{milliseconds(point.ours)} ", factor(point.gain), f" {point.ours_bound[0]}")


def prediction_plot(found: LayerPrediction) -> Plot:
    """Plot a panel for each dtype, number of tokens and size."""
    panels = []
    for (dtype, tokens, size), group in groupby(found.points, lambda p: (p.dtype, p.tokens, p.size)):
        points = sorted(group, key=lambda point: point.share)
        lines = {"dense": [point.dense for point in points], "ours": [point.ours for point in points]}
        title = f"{dtype}, {count(tokens, 'token')}, experts of {size}"
        panels.append(Panel(title, [point.share for point in points], lines))
    title = f"{found.device.title}, layer {found.width} → {found.hidden}: a model, not a measurement"
    return Plot(title, panels, len({point.size for point in found.points}))

"""The view of the result of `surgeon sweep`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Group, RenderableType
from rich.text import Text

from surgeon.jobs.sweep import Swept
from surgeon.measure.sweep import Dense, Point
from surgeon.render.numbers import items_of, quality_value
from surgeon.text.layout import dim, grid, sentences
from surgeon.text.summary import number, percent


def swept_view(swept: Swept) -> RenderableType:
    """Show quality and cost at every setting, and the notes on them."""
    return Group(sweep_view(swept.points, swept.dense), sentences(swept.notes, indent=0))


def sweep_view(points: Sequence[Point], dense: Dense) -> RenderableType:
    """Show quality and cost at every setting, for the dense model, and with the oracle router."""
    first = points[0]
    name = first.quality.name
    several = len({point.rule for point in points}) > 1
    timed = any(point.milliseconds is not None for point in points)
    columns = [
        ("router", "left", any(point.router == "oracle" for point in points)),
        ("rule", "left", several or first.rule != "max"),
        ("tau", "left", True),
        (name, "right", True),
        ("", "right", True),
        ("experts that ran", "right", True),
        ("converted layers", "right", True),
        ("multiply-adds", "right", True),
        ("of dense", "right", any(point.relative is not None for point in points)),
        ("ms", "right", timed),
    ]
    shown = [index for index, (_, _, wanted) in enumerate(columns) if wanted]
    table = grid(*(columns[i][1] for i in shown), header=tuple(columns[i][0] for i in shown))  # type: ignore[arg-type]

    def add(*cells: RenderableType) -> None:
        table.add_row(*(cells[index] for index in shown))

    base = (dense.quality or first.quality).value
    if dense.multiply_adds is not None:
        quality = "" if dense.quality is None else quality_value(dense.quality)
        add("", "", "dense", quality, "", "", "100%", number(dense.multiply_adds), "100%", _milliseconds(dense))
    for point in points:
        moved = point.quality.value - base
        worse = moved < 0 if point.quality.higher_is_better else moved > 0
        tau = "as stored" if point.tau is None else f"{point.tau:g}" + (" (all experts)" if point.tau == 0 else "")
        add(
            "oracle" if point.router == "oracle" else "",
            point.rule,
            tau,
            quality_value(point.quality),
            Text(f"{moved:+.2g}" if moved else "", style="red" if worse else "green"),
            percent(point.executed),
            percent(point.layers),
            number(point.multiply_adds),
            percent(point.relative),
            _milliseconds(point),
        )
    measured = (
        f"{name} on {first.quality.items} {items_of(name)}. converted layers: their multiply-adds, including routers, "
        "as a share of the dense layers'. multiply-adds: of the whole model, for the example inputs."
    )
    lines: list[RenderableType] = [table, sentences([measured], indent=0)]
    if dense.quality is None:
        lines.append(dim("The dense model's quality on this data is not known. Give the model with --dense."))
    return Group(*lines)


def _milliseconds(timed: Point | Dense) -> str:
    return "" if timed.milliseconds is None else f"{timed.milliseconds:.1f}"


def draw_sweep(swept: Swept, file: Path) -> None:
    """Draw quality against cost to a `.png` file: a curve for each rule and router."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    relative = all(point.relative is not None for point in swept.points)
    curves: dict[str, list[Point]] = {}
    for point in swept.points:
        if point.tau is not None:
            name = f"rule {point.rule}" + (", oracle router" if point.router == "oracle" else "")
            curves.setdefault(name, []).append(point)
    for name, points in curves.items():
        style = "--" if "oracle" in name else "-"
        axes.plot(
            [_cost(p, relative) for p in points], [p.quality.value for p in points], f"{style}o", ms=4, label=name
        )
    stored = [point for point in swept.points if point.tau is None and point.router == "own"]
    if stored:
        costs = [_cost(p, relative) for p in stored]
        axes.plot(costs, [p.quality.value for p in stored], "*", ms=12, label="as stored")
    if swept.dense.quality is not None:
        axes.axhline(swept.dense.quality.value, color="grey", lw=1, label="dense model")
    quality = swept.points[0].quality
    axes.set_xlabel("multiply-adds of the whole model" + (", share of dense" if relative else ""))
    axes.set_ylabel(f"{quality.name} on {quality.items:,} items")
    if not quality.higher_is_better:
        axes.invert_yaxis()
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(file, dpi=150)


def _cost(point: Point, relative: bool) -> float:
    return point.relative if relative and point.relative is not None else float(point.multiply_adds)

"""The view of the result of `surgeon sweep`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Group, RenderableType
from rich.text import Text

from surgeon.data.quality import TELLING, Change
from surgeon.jobs.sweep import Swept
from surgeon.measure.sweep import Dense, Point
from surgeon.render.numbers import INTERVALS
from surgeon.text.layout import dim, grid, sentences
from surgeon.text.quality import change_words, measured_on, with_interval
from surgeon.text.summary import number, percent


def swept_view(swept: Swept) -> RenderableType:
    """Show quality and cost at every setting, and the notes on them."""
    return Group(sweep_view(swept.points, swept.dense), sentences(swept.notes, indent=0))


def sweep_view(points: Sequence[Point], dense: Dense) -> RenderableType:
    """Show quality and cost at every setting, for the dense model, and with the oracle router."""
    first = points[0]
    several = len({point.rule for point in points}) > 1
    timed = any(point.milliseconds is not None for point in points)
    agreed = [quality.name for quality in first.agreement if quality.name != first.quality.name]
    alone = any(point.layer is not None for point in points)
    columns = [
        ("layer", "left", alone),
        ("router", "left", any(point.router == "oracle" for point in points)),
        ("rule", "left", several or first.rule not in ("", "max")),  # "" without experts
        ("tau", "left", True),
        (first.quality.name, "right", True),
        ("change", "right", any(point.quality.change is not None for point in points)),
        *((name, "right", True) for name in agreed),
        ("ran", "right", True),
        ("converted layers", "right", True),
        ("multiply-adds", "right", True),
        ("of dense", "right", any(point.relative is not None for point in points)),
        ("ms", "right", timed),
    ]
    shown = [index for index, (_, _, wanted) in enumerate(columns) if wanted]
    table = grid(*(columns[i][1] for i in shown), header=tuple(columns[i][0] for i in shown))  # type: ignore[arg-type]

    def add(*cells: RenderableType) -> None:
        table.add_row(*(cells[index] for index in shown))

    if dense.multiply_adds is not None:
        quality = "" if dense.quality is None else with_interval(dense.quality)
        add(
            "", "", "", "dense", quality, "", *("" for _ in agreed), "", "100%", number(dense.multiply_adds), "100%",
            milliseconds_text(dense),
        )  # fmt: skip
    for point in points:
        tau = "as stored" if point.tau is None else f"{point.tau:g}" + (" (everything)" if point.tau == 0 else "")
        add(
            point.layer or "",
            "oracle" if point.router == "oracle" else "",
            point.rule,
            tau,
            with_interval(point.quality),
            change_text(point.quality.change, higher_is_better=point.quality.higher_is_better),
            *(with_interval(quality) for quality in point.agreement if quality.name in agreed),
            percent(point.executed if point.layer is None else point.shares[point.layer]),
            percent(point.layers),
            number(point.multiply_adds),
            percent(point.relative),
            milliseconds_text(point),
        )
    lines: list[RenderableType] = [table, sentences([_words(points, dense)], indent=0)]
    if dense.quality is None and not first.agreement:
        lines.append(dim("The dense model's quality on this data is not known. Give the model with --dense."))
    return Group(*lines)


def change_text(change: Change | None, *, higher_is_better: bool) -> Text:
    """A difference of qualities: red or green only if it is more than chance."""
    better = change is not None and (change.value > 0) == higher_is_better
    style = "" if change is None or not change.telling else "green" if better else "red"
    return Text(change_words(change), style=style)


def _words(points: Sequence[Point], dense: Dense) -> str:
    """What the columns mean."""
    first = points[0]
    words = [f"{first.quality.name} on {measured_on(first.quality)}. {INTERVALS}"]
    changes = [point.quality.change for point in points if point.quality.change is not None]
    if changes:
        words.append("change: from the dense model on the same samples.")
        if changes[0].samples < TELLING:
            words.append(f"On fewer than {TELLING} samples no change is called better or worse.")
    alone = any(point.layer is not None for point in points)
    if alone:
        words.append("One layer at a time has a tau; the others run everything.")
    words += [
        f"ran: of the multiply-adds that {'this layer' if alone else 'layers'} can skip.",
        "converted layers: their multiply-adds, including routers, as a share of the dense layers'.",
        "multiply-adds: of the whole model, for the example inputs.",
    ]
    return " ".join(words)


def milliseconds_text(timed: Point | Dense) -> str:
    """The time of a call; nothing if it was not timed."""
    return "" if timed.milliseconds is None else f"{timed.milliseconds:.1f}"


def draw_sweep(swept: Swept, file: Path) -> None:
    """Draw quality against cost to a `.png` file: a curve for each rule and router."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    relative = all(point.relative is not None for point in swept.points)
    alone = any(point.layer is not None for point in swept.points)
    colours = colormaps["viridis"]
    curves: dict[str, list[Point]] = {}
    for point in swept.points:
        if point.tau is not None and (point.layer is not None or not alone):
            curves.setdefault(_curve(point), []).append(point)
    for place, (name, points) in enumerate(curves.items()):
        style = "--" if "oracle" in name else "-"
        costs, values = [_cost(p, relative) for p in points], [p.quality.value for p in points]
        # Layers from the first, dark, to the last, light.
        colour = colours(place / len(curves)) if alone else None
        (line,) = axes.plot(costs, values, f"{style}o", ms=4, label=name, color=colour)
        lows = [p.quality.low for p in points if p.quality.low is not None]
        highs = [p.quality.high for p in points if p.quality.high is not None]
        if len(lows) == len(highs) == len(costs) and not alone:
            axes.fill_between(costs, lows, highs, color=line.get_color(), alpha=0.12, lw=0)
    stored = [point for point in swept.points if point.tau is None and point.router == "own"]
    if stored:
        costs = [_cost(p, relative) for p in stored]
        axes.plot(costs, [p.quality.value for p in stored], "*", ms=12, label="as stored")
    if swept.dense.quality is not None:
        axes.axhline(swept.dense.quality.value, color="grey", lw=1, label="dense model")
    quality = swept.points[0].quality
    whole = "multiply-adds of the whole model" + (", share of dense" if relative else "")
    axes.set_xlabel("share of its experts or inputs that the layer runs" if alone else whole)
    axes.set_ylabel(f"{quality.name} on {measured_on(quality)}")
    if not quality.higher_is_better:
        axes.invert_yaxis()
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=7 if alone else None)
    figure.savefig(file, dpi=150)


def _curve(point: Point) -> str:
    """The name of the curve that a point belongs to."""
    if point.layer is not None:
        return point.layer
    oracle = ", oracle router" if point.router == "oracle" else ""
    return (f"rule {point.rule}" if point.rule else "this surgery") + oracle


def _cost(point: Point, relative: bool) -> float:
    if point.layer is not None:
        return point.shares[point.layer]
    return point.relative if relative and point.relative is not None else float(point.multiply_adds)

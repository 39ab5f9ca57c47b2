"""The view of the result of `surgeon sweep`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Group, RenderableType
from rich.text import Text

from surgeon.data.quality import TELLING, Change
from surgeon.jobs.sweep import Swept
from surgeon.measure.compare import Comparison
from surgeon.measure.curves import Curve, curves_of
from surgeon.measure.read_off import Kept, kept_at
from surgeon.measure.sweep import Dense, Point
from surgeon.render.frontier_plot import draw_frontier
from surgeon.render.layers_plot import draw_layers
from surgeon.render.numbers import INTERVALS
from surgeon.text.layout import dim, grid, next_command, sentences
from surgeon.text.quality import change_words, measured_on, with_interval
from surgeon.text.summary import number, percent


def swept_view(swept: Swept) -> RenderableType:
    """Show quality and cost at every setting, and the notes on them."""
    lines = [sweep_view(swept.points, swept.dense), sentences(swept.notes, indent=0)]
    if not any(point.layer is not None for point in swept.points):
        lines.append(next_command("to store a tau", "set", swept.model, "--tau", "TAU"))
    return Group(*lines)


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
    """Draw a picture: quality against cost for each rule and router, or against what each layer alone runs."""
    if any(point.layer is not None for point in swept.points):
        draw_layers(swept, file)
        return
    quality, name = swept.dense.quality, Path(swept.model).name
    factor = 0.99 if swept.points[0].quality.higher_is_better else 1 / 0.99
    wanted = math.nan if quality is None else factor * quality.value
    curves = tuple(_with_kept(curve, wanted) for curve in curves_of({name: swept.points}))
    stored = next((point for point in swept.points if point.tau is None and point.router == "own"), None)
    shown = {} if stored is None else {name: stored}
    found = Comparison(swept.task, 0.99, wanted, swept.dense, curves, shown)
    draw_frontier(found, file, title=f"{name} on {swept.data}")


def _with_kept(curve: Curve, wanted: float) -> Curve:
    """A curve with what it costs to keep a quality, without intervals; as it is if that quality is unknown."""
    if math.isnan(wanted):
        return curve
    values = [point.quality.value for point in curve.points]
    whole = [point.relative for point in curve.points]

    def kept(costs: Sequence[float]) -> Kept | None:
        return kept_at(costs, values, wanted, higher_is_better=curve.points[0].quality.higher_is_better)

    known = [cost for cost in whole if cost is not None]
    layers = kept([point.layers for point in curve.points])
    return replace(curve, layers=layers, whole=kept(known) if len(known) == len(whole) else None)

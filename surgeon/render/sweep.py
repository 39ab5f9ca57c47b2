"""How quality against cost looks: sweeps, tuned budgets, what is set, the demo."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from surgeon.measure.sweep import Dense
from surgeon.text.layout import dim, grid, sentences
from surgeon.text.summary import number, percent

if TYPE_CHECKING:
    from surgeon.data.losses import Quality
    from surgeon.measure.sweep import Point


def quality_value(quality: Quality) -> str:
    """A quality as a number."""
    return f"{quality.value:.3f}" if quality.name == "accuracy" else f"{quality.value:.4g}"


def items_of(quality_name: str) -> str:
    """What a quality is the mean of."""
    return "samples" if quality_name == "accuracy" else "tokens"


def sweep_view(points: Sequence[Point], dense: Dense) -> RenderableType:
    """Quality and cost at every setting, the dense model's and the oracle's beside them."""
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
        f"{name} on {first.quality.items} {items_of(name)}; converted layers: their multiply-adds, routers "
        "included, of the dense layers'; multiply-adds: of the whole model, for the example inputs"
    )
    lines: list[RenderableType] = [table, sentences([measured], indent=0)]
    if dense.quality is None:
        lines.append(dim("The dense model's quality on this data is not known: give the model with --dense."))
    return Group(*lines)


def _milliseconds(timed: Point | Dense) -> str:
    return "" if timed.milliseconds is None else f"{timed.milliseconds:.1f}"


def quality_line(what: str, quality: Quality) -> RenderableType:
    """`dense model: accuracy 0.97 on 360 samples`."""
    measured = f"{quality.name} {quality_value(quality)} on {quality.items} {items_of(quality.name)}"
    return Text.assemble((what, "bold"), f": {measured}\n")

"""The picture of which layers quality depends on: one layer after another skips, while the others run everything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from surgeon.jobs.sweep import Swept
from surgeon.measure.sweep import Point
from surgeon.render.style import save, styled
from surgeon.text.quality import measured_on

_LINE = 0.055  # of the height of the axes, a line of text
_NAMED = 4  # layers that are called by name: those that quality depends on most


Named = tuple[str, tuple[float, float], Any]
"""The path of a layer, the first point of its line, and its colour."""


@styled
def draw_layers(swept: Swept, file: Path) -> None:
    """Draw quality against what a layer runs, a line for each layer from the first, dark, to the last, light."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    layers: dict[str, list[Point]] = {}
    for point in swept.points:
        if point.layer is not None:
            layers.setdefault(point.layer, []).append(point)
    quality = swept.points[0].quality
    sign = 1.0 if quality.higher_is_better else -1.0
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    axes = figure.subplots()
    worst = sorted(layers, key=lambda path: min(sign * point.quality.value for point in layers[path]))[:_NAMED]
    shades = colormaps["viridis"]
    named: list[Named] = []
    for place, (path, points) in enumerate(layers.items()):
        colour = shades(0.9 * place / max(1, len(layers) - 1))
        ordered = sorted((point.shares[path], point.quality.value) for point in points)
        axes.plot(*zip(*ordered, strict=True), "-o", color=colour)
        if path in worst:
            named.append((path, ordered[0], colour))
    if swept.dense.quality is not None:
        axes.axhline(swept.dense.quality.value, color="0.25", lw=1)
        axes.annotate("dense", (1.0, swept.dense.quality.value), (0, 3), textcoords="offset points", ha="right")
    values = [point.quality.value for points in layers.values() for point in points]
    # No less than what is worth a difference: an interval, or 2% of the quality.
    width = 0.0 if quality.low is None or quality.high is None else quality.high - quality.low
    least = max(width, 0.02 * max(map(abs, values)))
    middle = (max(values) + min(values)) / 2
    reach = max(max(values) - min(values), least) * 0.55
    axes.set_ylim(*sorted((middle - sign * reach, middle + sign * reach), reverse=not quality.higher_is_better))
    axes.set_xlim(-0.45, 1.05)
    _annotate(axes, named)
    axes.set_xticks([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, 0))
    axes.set_xlabel("what the layer runs of its experts or inputs; the others run everything")
    axes.set_ylabel(f"{quality.name} on {measured_on(quality)}")
    figure.suptitle(f"{Path(swept.model).name} on {swept.data}, one layer at a time", x=0.01, ha="left", weight="bold")
    figure.supxlabel(
        "lines: layers, dark the first and light the last; the most sensitive have names", fontsize=8, color="0.4"
    )
    save(figure, file)


def _annotate(axes: Any, named: list[Named]) -> None:
    """Write the names of lines to the left of them, so far apart that none lies on another."""
    bottom, top = sorted(axes.get_ylim())
    least = _LINE * (top - bottom)
    left, at = min((x for _, (x, _), _ in named), default=0.0) - 0.03, float("-inf")
    for path, (x, y), colour in sorted(named, key=lambda one: one[1][1]):
        at = max(y - (len(named) - 1) / 2 * least if at == float("-inf") else y, at + least)
        axes.annotate(
            path, (x, y), (left, at), textcoords="data", ha="right", va="center", color=colour, weight="bold",
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.6, "relpos": (1, 0.5)},
        )  # fmt: skip

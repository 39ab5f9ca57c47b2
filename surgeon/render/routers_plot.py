"""The picture of how well routers predict: scores against true norms, and the energy that is lost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from surgeon.measure.routing import RouterLayer
from surgeon.render.style import COLOURS, COLUMNS, panel_title, save, small_panels, styled
from surgeon.text.summary import percent


@styled
def draw_routers(layers: Sequence[RouterLayer], file: Path, *, title: str) -> None:
    """Draw for each layer how often which score meets which true norm, and the energy lost, beside the oracle's."""
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    rows = -(-len(layers) // COLUMNS)
    heights = [2.1 * rows + 0.4, 0.3 * len(layers) + 1.1]
    figure = Figure(figsize=(9, sum(heights) + 0.6), layout="constrained")
    upper, lower = figure.subfigures(2, 1, squeeze=False, height_ratios=heights)[:, 0]
    shares = [np.array(layer.pairs, dtype=float) / max(1, sum(map(sum, layer.pairs))) for layer in layers]
    least = min(float(part[part > 0].min()) for part in shares)
    scale = LogNorm(least, max(float(part.max()) for part in shares))
    for axes, layer, part in zip(small_panels(upper, len(layers)), layers, shares, strict=True):
        axes.imshow(
            np.where(part > 0, part, np.nan), origin="lower", extent=(0, 1, 0, 1), cmap="cividis", norm=scale,
            aspect="auto",
        )  # fmt: skip
        axes.plot([0, 1], [0, 1], color=COLOURS[1], lw=0.8)
        axes.set_title(panel_title(layer.path, "", len(layers)), fontsize=7)
        axes.grid(visible=False)
    upper.supxlabel("score, of the token's largest (line: as it should be; light: many experts)", fontsize=8)
    upper.supylabel("true norm, of the token's largest", fontsize=8)
    axes = lower.subplots()
    places = np.arange(len(layers))
    for offset, name, colour, values in (
        (-0.18, "oracle", COLOURS[4], [layer.oracle for layer in layers]),
        (0.18, "router", COLOURS[0], [layer.lost for layer in layers]),
    ):
        bars = axes.barh(places + offset, values, height=0.34, color=colour, label=name)
        axes.bar_label(bars, [percent(value) for value in values], padding=2, fontsize=7)
    axes.set_yticks(places, [layer.path for layer in layers], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlim(0, max(0.01, 1.12 * max(max(layer.oracle, layer.lost) for layer in layers)))
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, 1))
    axes.set_xlabel("energy lost: share of the squared norms that skipped experts have, at equal numbers of experts")
    axes.grid(axis="y", visible=False)
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0)
    figure.suptitle(title, x=0.01, ha="left", weight="bold")
    save(figure, file)

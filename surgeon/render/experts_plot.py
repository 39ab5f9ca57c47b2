"""The picture of how many experts, inputs or neurons tokens run: a histogram for each layer, and all in one map."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from surgeon.measure.load import LayerLoad
from surgeon.render.style import COLOURS, COLUMNS, panel_title, save, small_panels, styled
from surgeon.text.summary import percent

_BINS = 20


@styled
def draw_experts(layers: Sequence[LayerLoad], file: Path, *, title: str) -> None:
    """Draw a histogram of the share that tokens run for each layer, and below them a map of layers by share."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    rows = -(-len(layers) // COLUMNS)
    heights = [1.5 * rows + 0.4, 0.22 * len(layers) + 1.4]
    figure = Figure(figsize=(9, sum(heights) + 0.6), layout="constrained")
    upper, lower = figure.subfigures(2, 1, squeeze=False, height_ratios=heights)[:, 0]
    binned = np.stack([_binned(layer) for layer in layers])
    edges = np.linspace(0, 1, _BINS + 1)
    for axes, layer, shares in zip(small_panels(upper, len(layers)), layers, binned, strict=True):
        axes.stairs(shares, edges, fill=True, color=COLOURS[0])
        mean = layer.executed.mean / layer.experts
        axes.axvline(mean, color=COLOURS[1])
        axes.set_title(panel_title(layer.path, f": {percent(mean)}", len(layers)), fontsize=7)
    what = " or ".join(dict.fromkeys(layer.unit for layer in layers))
    upper.supxlabel(f"share of its {what} that a token runs (line and number: mean)", fontsize=8)
    upper.supylabel("tokens", fontsize=8)
    axes = lower.subplots()
    drawn = axes.imshow(binned, aspect="auto", cmap="cividis", vmin=0, extent=(0, 1, len(layers) - 0.5, -0.5))
    axes.grid(visible=False)
    axes.set_yticks(range(len(layers)), [layer.path for layer in layers], fontsize=7)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, 0))
    axes.set_xlabel(f"share of its {what} that a token runs")
    lower.colorbar(drawn, ax=axes, label="tokens", format=PercentFormatter(1.0, 0))
    figure.suptitle(title, x=0.01, ha="left", weight="bold")
    save(figure, file)


def _binned(layer: LayerLoad) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """The share of the tokens in each of `_BINS` bins of the share that they run."""
    places = np.minimum(np.arange(layer.experts + 1) * _BINS // layer.experts, _BINS - 1)
    return np.bincount(places, np.array(layer.histogram) / layer.tokens, _BINS).astype(np.float64)

"""The view of the result of `surgeon load`, and its picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Group, RenderableType
from rich.text import Text

from surgeon.jobs.load import Loaded, LoadMap
from surgeon.measure.load import LayerLoad, Spread
from surgeon.render.style import COLOURS, save, styled
from surgeon.text.layout import dim, grid, sentences
from surgeon.text.summary import percent

_BLOCKS = "▁▂▃▄▅▆▇█"
_BINS = 16
# From white to blue: the load of a token against the largest of its sample.
_SHADES = ("#ffffff", "#e3eef8", "#c3dbee", "#95c1de", "#5b9fcb", "#2b7ab5", "#08519c")
_DARK = 5  # from this shade on letters are white


def loaded_view(found: Loaded) -> RenderableType:
    """Show the distributions of each layer, and the tokens of a text in shades of their load."""
    parts: list[RenderableType] = []
    if found.layers:
        parts += [_layers(found.layers), sentences([_words(found)], indent=0)]
    if found.shown is not None and found.shown.texts:
        parts += [*([Text("")] if parts else []), *_shaded(found.shown)]
    elif found.shown is not None:
        loads = found.shown.loads
        least, mean, most = (percent(value) for value in (min(loads), sum(loads) / len(loads), max(loads)))
        parts.append(Text(f"A patch runs {mean} of what can be skipped in the mean, from {least} to {most}."))
    return Group(*parts, sentences(found.notes, indent=0))


def _layers(layers: Sequence[LayerLoad]) -> RenderableType:
    header = ["layer", f"{_kinds(layers)} that ran", "quartiles", "none … all", "active neurons", "quartiles"]
    sides: list[Literal["left", "right"]] = ["right", "right"]
    shown = 6 if any(layer.active for layer in layers) else 4
    table = grid("left", "right", "right", "left", *sides[: shown - 4], header=header[:shown])
    for layer in layers:
        cells = [f"{_spread(layer.executed)} of {layer.experts}", _quartiles(layer.executed), _bars(layer.histogram)]
        active = layer.active
        cells += ["", ""] if active is None else [f"{_spread(active)} of {layer.neurons}", _quartiles(active)]
        table.add_row(Text(layer.path, style="cyan"), *cells[: shown - 1])
    return table


def _kinds(layers: Sequence[LayerLoad]) -> str:
    """What the layers run: `experts`, `inputs`, or `experts, inputs`."""
    return ", ".join(sorted({layer.unit for layer in layers}))


def _spread(spread: Spread) -> str:
    return f"{spread.mean:.1f} ± {spread.deviation:.1f}"


def _quartiles(spread: Spread) -> str:
    return ", ".join(map(str, spread.quartiles))


def _bars(histogram: Sequence[int]) -> str:
    """A histogram in one line; a bin with a single token is still seen."""
    bins = [int(part.sum()) for part in np.array_split(np.array(histogram), min(_BINS, len(histogram)))]
    top = max(bins)
    return "".join(" " if not count else _BLOCKS[(len(_BLOCKS) - 1) * count // top] for count in bins)


def _words(found: Loaded) -> str:
    tokens = sorted({layer.tokens for layer in found.layers})
    counted = f"{tokens[0]:,}" if len(tokens) == 1 else f"{tokens[0]:,} to {tokens[-1]:,}"
    what = _kinds(found.layers).replace(", ", " or ")
    active = (
        " active: above a hundredth of the token's largest activation, whether or not the expert runs."
        if any(layer.active for layer in found.layers)
        else ""
    )
    return (
        f"over {counted} tokens of {found.data}: mean ± standard deviation, and the numbers that a quarter, half and "
        f"three quarters of the tokens do not exceed. none … all: the tokens by the {what} that they run.{active}"
    )


def _shaded(shown: LoadMap) -> list[RenderableType]:
    """Every token in the shade of its load, with the number."""
    top, line = max(shown.loads), Text()
    for text, load in zip(shown.texts, shown.loads, strict=True):
        shade = round((len(_SHADES) - 1) * load / top) if top else 0
        letters = "#ffffff" if shade >= _DARK else "#000000"
        line.append(text.strip() or repr(text), style=f"{letters} on {_SHADES[shade]}")
        line.append(f" {percent(load)}  ", style="dim")
    return [line, dim("The share of the multiply-adds that can be skipped that each token runs, over the layers.")]


@styled
def draw_load(found: Loaded, file: Path) -> None:
    """Draw a picture: a histogram of what each layer ran, active neurons, and the map of the sample."""
    from matplotlib.figure import Figure

    parts = [name for name, wanted in (("layers", found.layers), ("map", found.shown)) if wanted]
    rows = -(-len(found.layers) // 4)
    heights = {"layers": 1.9 * rows + 2.4, "map": 2.6 if found.shown is None or found.shown.rows else 1.8}
    figure = Figure(figsize=(9, sum(heights[name] for name in parts)), layout="constrained")
    made = figure.subfigures(len(parts), 1, squeeze=False, height_ratios=[heights[name] for name in parts])[:, 0]
    for part, name in zip(made, parts, strict=True):
        if name == "layers":
            _draw_layers(part, found.layers)
        elif found.shown is not None:
            draw_map(part, found.shown)
    save(figure, file)


def _draw_layers(figure: Any, layers: Sequence[LayerLoad]) -> None:
    rows = -(-len(layers) // 4)
    upper, lower = figure.subfigures(2, 1, height_ratios=[1.9 * rows, 2.4])
    grid = upper.subplots(rows, 4, squeeze=False, sharey=True)
    for axes, layer in zip(grid.flat, layers, strict=False):
        shares = np.array(layer.histogram) / layer.tokens
        axes.bar(range(len(shares)), 100 * shares, width=1.0, color=COLOURS[0])
        axes.axvline(layer.executed.mean, color=COLOURS[1], lw=1)
        axes.set_xlim(-0.5, layer.experts + 0.5)
        axes.set_title(layer.path, fontsize=8)
        axes.tick_params(labelsize=7)
    for axes in grid.flat[len(layers) :]:
        axes.set_visible(False)
    upper.supxlabel(f"{_kinds(layers)} that a token runs (line: mean)", fontsize=8)
    upper.supylabel("tokens, %", fontsize=8)
    axes = lower.subplots()
    ran = [(place, one.executed, one.experts) for place, one in enumerate(layers)]
    active = [(place, one.active, one.neurons) for place, one in enumerate(layers) if one.active and one.neurons]
    for offset, colour, label, spreads in (
        (-0.15, COLOURS[0], f"{_kinds(layers)} that ran", ran),
        (0.15, COLOURS[1], "active neurons", active),
    ):
        if not spreads:
            continue
        places, sizes = np.array([place for place, _, _ in spreads]), np.array([whole for _, _, whole in spreads])
        boxes = [[one.smallest, *one.quartiles, one.largest] for _, one, _ in spreads] / sizes[:, None] * 100
        stats = [dict(zip(("whislo", "q1", "med", "q3", "whishi"), row, strict=True)) for row in boxes]
        drawn = axes.bxp(
            stats, positions=places + offset, widths=0.25, showfliers=False, patch_artist=True,
            boxprops={"facecolor": colour, "alpha": 0.5}, medianprops={"color": "black"}, manage_ticks=False,
        )  # fmt: skip
        drawn["boxes"][0].set_label(label)
    axes.set_xticks(range(len(layers)), [one.path for one in layers], rotation=30, ha="right", fontsize=7)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("share of the layer's, %", fontsize=8)
    axes.tick_params(axis="y", labelsize=7)
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0)
    axes.set_title("box: quartiles; whiskers: all tokens", fontsize=7, loc="left", color="0.4")
    axes.grid(axis="y", alpha=0.25)


def draw_map(figure: Any, shown: LoadMap) -> None:
    """Draw the map of one sample into a figure of matplotlib: an image beside its patches, or a bar for each token."""
    label = "share of the multiply-adds that can be skipped"
    if shown.rows:
        left, right = figure.subplots(1, 2)
        left.imshow(shown.picture, cmap="gray", vmin=0, vmax=1)
        heat = right.imshow(np.reshape(shown.loads, (shown.rows, -1)), cmap="viridis", vmin=0)
        figure.colorbar(heat, ax=[left, right], label=label, shrink=0.9)
        for axes in (left, right):
            axes.set_xticks([])
            axes.set_yticks([])
        return
    axes = figure.subplots()
    axes.bar(range(len(shown.loads)), [100 * load for load in shown.loads], color=COLOURS[0])
    axes.set_xticks(range(len(shown.texts)), shown.texts, rotation=60, ha="right", fontsize=7)
    axes.set_ylabel("share that ran, %", fontsize=8)

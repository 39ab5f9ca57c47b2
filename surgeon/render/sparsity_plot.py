"""The picture of how sparse the activations of each layer became."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from surgeon.render.style import COLOURS, save, styled
from surgeon.text.summary import percent
from surgeon.training.penalty import Sparsity


@styled
def draw_sparsity(layers: Mapping[str, tuple[Sparsity, Sparsity]], file: Path, *, title: str) -> None:
    """Draw the share of active neurons of each layer before and after training, as an arrow from one to the other."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    figure = Figure(figsize=(8, 0.28 * len(layers) + 1.5), layout="constrained")
    axes = figure.subplots()
    for place, (before, after) in enumerate(layers.values()):
        axes.plot([before.active, after.active], [place, place], color="0.7", lw=2, zorder=1)
        axes.annotate(
            percent(after.active), (after.active, place), (0, 5), textcoords="offset points", ha="center", fontsize=7
        )
    for name, colour, values in (
        ("before", "0.5", [before.active for before, _ in layers.values()]),
        ("after", COLOURS[0], [after.active for _, after in layers.values()]),
    ):
        axes.plot(values, range(len(layers)), "o", ms=6, color=colour, label=name)
    axes.set_yticks(range(len(layers)), list(layers), fontsize=7)
    axes.set_ylim(len(layers) - 0.5, -0.7)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, 0))
    axes.set_xlabel("active neurons: above a hundredth of the token's largest, mean over tokens")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0)
    figure.suptitle(title, x=0.01, ha="left", weight="bold")
    save(figure, file)

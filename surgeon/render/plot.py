"""The pictures of `surgeon plot`, which a report shows too."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from surgeon.jobs.load import LoadMap
from surgeon.jobs.plot import Kind, sparsified, tried
from surgeon.render.experts_plot import draw_experts
from surgeon.render.load import draw_map
from surgeon.render.routers_plot import draw_routers
from surgeon.render.sparsity_plot import draw_sparsity
from surgeon.render.style import COLOURS, save, styled
from surgeon.render.sweep import draw_sweep
from surgeon.surgery.record import Record
from surgeon.surgery.trials import Trial
from surgeon.text.summary import percent


def draw_recorded(kind: Kind, name: str, record: Record, file: Path) -> None:
    """Draw a picture that needs no data. name: of the surgery.

    Raises:
        UsageError: the record has nothing of this kind.
    """
    if kind == "sparsity":
        draw_sparsity(sparsified(record), file, title=f"{name}: active neurons before and after training")
    else:
        draw_trials(tried(record), file, title=f"{name}: the settings that were tried")


@styled
def draw_samples(samples: Sequence[LoadMap], file: Path, *, title: str) -> None:
    """Draw the maps of samples below one another."""
    from matplotlib.figure import Figure

    if samples[0].rows:
        figure = Figure(figsize=(2.2 * len(samples) + 1.0, 4.6), layout="constrained")
        _draw_images(figure, samples)
    else:
        figure = Figure(figsize=(9, 2.2 * len(samples) + 0.4), layout="constrained")
        parts = figure.subfigures(len(samples), 1, squeeze=False)[:, 0]
        for part, sample in zip(parts, samples, strict=True):
            draw_map(part, sample)
    figure.suptitle(title, x=0.01, ha="left", weight="bold")
    save(figure, file)


def _draw_images(figure: Any, samples: Sequence[LoadMap]) -> None:
    """Draw images in a row, and below them what their patches run, all in the same colours."""
    from matplotlib.ticker import PercentFormatter

    grid = figure.subplots(2, len(samples), squeeze=False)
    most = max(max(sample.loads) for sample in samples)
    for (picture, heat), sample in zip(grid.T, samples, strict=True):
        picture.imshow(sample.picture, cmap="gray", vmin=0, vmax=1)
        loads = np.reshape(sample.loads, (sample.rows, -1))
        drawn = heat.imshow(loads, cmap="cividis", vmin=0, vmax=most)
        picture.set_title(f"{percent(float(loads.mean()))} in the mean")
        for axes in (picture, heat):
            axes.set_xticks([])
            axes.set_yticks([])
            axes.grid(visible=False)
    figure.colorbar(drawn, ax=grid[1], label="share that a patch runs", format=PercentFormatter(1.0, 0))


@styled
def draw_trials(trials: Sequence[Trial], file: Path, *, title: str) -> None:
    """Draw the loss of every setting at equal cost, each after its longest trial."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.3 * len(trials) + 1.4), layout="constrained")
    axes = figure.subplots()
    for place, trial in enumerate(trials):
        if trial.loss is None:
            axes.annotate(trial.why, (0.01, place), xycoords=("axes fraction", "data"), va="center", fontsize=7)
            continue
        bar = axes.barh(place, trial.loss, height=0.6, color=COLOURS[0])
        axes.bar_label(bar, [f"{trial.loss:.3g} after {trial.steps} steps"], padding=2, fontsize=7)
    axes.set_yticks(range(len(trials)), [trial.name for trial in trials], fontsize=7)
    axes.invert_yaxis()
    axes.margins(x=0.25)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("loss on a validation part of the training data, at equal cost of the layers")
    figure.suptitle(title, x=0.01, ha="left", weight="bold")
    save(figure, file)


DRAW: Mapping[Kind, Callable[[Any, Path, str], None]] = {
    "pareto": lambda found, file, _: draw_sweep(found, file),
    "layers": lambda found, file, _: draw_sweep(found, file),
    "experts": lambda found, file, title: draw_experts(found, file, title=title),
    "routers": lambda found, file, title: draw_routers(found, file, title=title),
    "compute": lambda found, file, title: draw_samples(found, file, title=title),
}
"""Draws what was measured to a file, under a title."""

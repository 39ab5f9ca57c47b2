"""Results as files: tables as JSON, curves as PNG."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from surgeon.errors import SaveError
from surgeon.render.screen import to_json

if TYPE_CHECKING:
    from surgeon.jobs.sweep import Swept
    from surgeon.measure.sweep import Point


def write_result(result: object, file: Path, draw: Callable[[], None]) -> None:
    """Write a result to a `.json` file, or let it be drawn to a `.png`.

    Raises:
        SaveError: the file cannot be written.
    """
    try:
        if file.suffix == ".json":
            file.write_text(json.dumps(to_json(result), indent=1), encoding="utf-8")
        else:
            draw()
    except OSError as error:
        raise SaveError(f"Cannot write {file}: {error.strerror or error}.") from error


def write_swept(swept: Swept, file: Path) -> None:
    """Write a sweep to a `.json` or a `.png` file; raises as `write_result`."""
    write_result(swept, file, lambda: _plot(swept, file))


def _plot(swept: Swept, file: Path) -> None:
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

"""Plots of benchmarks: times against the selected share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from surgeon.render.style import COLOURS, save, styled

_WIDTH, _HEIGHT = 3.6, 2.8  # inches, of a panel
_LETTERS = 7.0  # size of names, in points
_LINE = 0.062  # of a panel's height, between two names
_BLUE, _RED, _GREEN, _PINK, _SKY, _YELLOW = COLOURS


class _Style(NamedTuple):
    """How a method looks in every panel, also where others did not run, and what it is called there.

    The dense layer is black and grey, ours is blue, and other ways to run experts and other engines have the rest.
    """

    name: str
    colour: str
    dashes: str = "-"
    width: float = 1.2


_STYLES = {
    "dense": _Style("dense", "0.1"),
    "compiled": _Style("dense, compiled", "0.45"),
    "masked": _Style("dense, masked", "0.45", ":"),
    "loop": _Style("loop", _YELLOW),
    "grouped_mm": _Style("grouped mm", _GREEN),
    "published": _Style("published", _PINK),
    "torch": _Style("torch", _RED),
    "ours": _Style("ours", _BLUE, "-", 2.5),
    "ours_dense": _Style("ours, every expert on", _SKY),
    "ours_compiled": _Style("ours, compiled", _SKY, "-", 2.5),
    "ours_int8": _Style("ours, int8", _BLUE, "-.", 2.5),
    "ours_int4": _Style("ours, int4", _SKY, "-.", 2.5),
    "ours_fp8": _Style("ours, float8", _BLUE, ":", 2.5),
    "openvino": _Style("OpenVINO, int8", _GREEN),
    "openvino_weights": _Style("OpenVINO, int8 weights", _GREEN, "--"),
    "onnxruntime": _Style("ONNX Runtime, int8", _YELLOW),
    "torchao": _Style("torchao, int8", _PINK),
    "limit": _Style("limit", _BLUE, "--"),
}


@dataclass(frozen=True)
class Panel:
    """Milliseconds against the selected share, with a line for each method.

    A value is None where the method did not run.
    """

    title: str
    shares: Sequence[float]
    lines: Mapping[str, Sequence[float | None]]


@dataclass(frozen=True)
class Plot:
    """Panels in rows of `columns`."""

    title: str
    panels: list[Panel] = field(default_factory=list)
    columns: int = 1
    log: bool = True  # times of several orders of magnitude

    @styled
    def draw(self, file: Path) -> None:
        """Draw the plot to a picture. Names stand where lines end, in the last panel of a row that has the line."""
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine

        rows = -(-len(self.panels) // self.columns)
        size = (max(6.0, _WIDTH * self.columns + 1.2), _HEIGHT * rows + 0.6)
        figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(wspace=0.04))
        # Times are comparable within a row: only the experts differ.
        grid = figure.subplots(rows, self.columns, squeeze=False, sharex=True, sharey="row")
        for axes, panel in zip(grid.flat, self.panels, strict=True):
            self._draw_panel(axes, panel)
        for axes in grid[-1]:
            axes.set_xlabel("experts selected")
        for row, first in zip(grid, range(0, len(self.panels), self.columns), strict=True):
            row[0].set_ylabel("milliseconds")
            named = _named_in(self.panels[first : first + self.columns])
            for axes, panel, names in zip(row[:-1], self.panels[first:], named[:-1], strict=False):
                _write_inside(axes, panel, names)
            _write_beside(row[-1], self.panels[first + len(named) - 1], named[-1])
        figure.suptitle(self.title, x=0.01, ha="left", weight="bold")
        save(figure, file)

    def _draw_panel(self, axes: Any, panel: Panel) -> None:
        from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, PercentFormatter

        for name, values in panel.lines.items():
            style, points = _STYLES[name], _points(panel.shares, values)
            if points:
                marker = "" if name == "limit" else "o"
                axes.plot(
                    *zip(*points, strict=True), style.dashes, color=style.colour, lw=style.width, marker=marker, ms=3,
                    zorder=2 + style.width,
                )  # fmt: skip
        if self.log:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
        else:
            axes.set_ylim(bottom=0)
        axes.set_xlim(0, 1.0)
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, 0))
        axes.set_title(panel.title)


def _points(shares: Sequence[float], values: Sequence[float | None]) -> list[tuple[float, float]]:
    """Where the method ran."""
    return [(share, value) for share, value in zip(shares, values, strict=True) if value is not None]


def _named_in(panels: Sequence[Panel]) -> list[list[str]]:
    """The methods that are named in each panel of a row: in the last one that they ran in."""
    last = {
        name: place
        for place, panel in enumerate(panels)
        for name, values in panel.lines.items()
        if _points(panel.shares, values)
    }
    return [[name for name in panel.lines if last.get(name) == place] for place, panel in enumerate(panels)]


def _write_inside(axes: Any, panel: Panel, names: Sequence[str]) -> None:
    """Write names above the ends of their lines."""
    for name in names:
        end = _points(panel.shares, panel.lines[name])[-1]
        axes.annotate(
            _STYLES[name].name, end, (0, 4), textcoords="offset points", ha="right", color=_STYLES[name].colour,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5},
            fontsize=_LETTERS,
        )  # fmt: skip


def _write_beside(axes: Any, panel: Panel, names: Sequence[str]) -> None:
    """Write names at the right, in the colours of their lines, each as near to the end of its line as others allow."""
    ends = {name: _points(panel.shares, panel.lines[name])[-1] for name in names}
    heights = {name: _height(axes, end[1]) for name, end in ends.items()}
    order = sorted(names, key=heights.__getitem__)
    for name, height in zip(order, spread([heights[name] for name in order], _LINE), strict=True):
        axes.annotate(
            _STYLES[name].name, ends[name], (1.05, height), textcoords="axes fraction", va="center",
            color=_STYLES[name].colour, fontsize=_LETTERS, weight="bold" if _STYLES[name].width > 2 else "normal",
            arrowprops={"arrowstyle": "-", "color": _STYLES[name].colour, "lw": 0.5, "relpos": (0, 0.5)},
            annotation_clip=False,
        )  # fmt: skip


def _height(axes: Any, value: float) -> float:
    """Where a value stands in a panel, from 0 at the bottom to 1 at the top."""
    return float(axes.transAxes.inverted().transform(axes.transData.transform((1.0, value)))[1])


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Move sorted places as little as it takes for a gap between all of them, around the middle of each crowd."""
    crowds: list[list[float]] = []  # of places, each of which is then evenly spaced around its mean
    for place in places:
        crowds.append([place])
        while len(crowds) > 1 and _first(crowds[-1], gap) - _last(crowds[-2], gap) < gap:
            crowds[-2:] = [crowds[-2] + crowds[-1]]
    return [_first(crowd, gap) + number * gap for crowd in crowds for number in range(len(crowd))]


def _first(crowd: Sequence[float], gap: float) -> float:
    return sum(crowd) / len(crowd) - gap * (len(crowd) - 1) / 2


def _last(crowd: Sequence[float], gap: float) -> float:
    return _first(crowd, gap) + gap * (len(crowd) - 1)

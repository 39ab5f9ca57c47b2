"""Plots of benchmarks: times against the selected share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgeon.render.style import save, styled

_WIDTH, _HEIGHT = 3.6, 2.8  # inches, of a panel
_LABELS = {
    "compiled": "dense, compiled",
    "masked": "dense, masked",
    "ours_dense": "ours, every expert on",
    "ours_compiled": "ours, compiled",
    "ours_int8": "ours, int8",
    "ours_int4": "ours, int4",
    "ours_fp8": "ours, float8",
    "openvino": "OpenVINO, int8",
    "openvino_weights": "OpenVINO, int8 weights",
    "onnxruntime": "ONNX Runtime, int8",
    "torchao": "torchao, int8",
}
# A method looks the same in every panel, also where others did not run.
_STYLES: dict[str, dict[str, Any]] = {
    "dense": {"color": "black"},
    "compiled": {"color": "grey"},
    "masked": {"color": "tab:blue"},
    "loop": {"color": "tab:orange"},
    "grouped_mm": {"color": "tab:green"},
    "published": {"color": "tab:purple"},
    "torch": {"color": "tab:brown"},
    "ours": {"color": "tab:red", "lw": 2.5, "zorder": 3},
    "ours_dense": {"color": "lightcoral"},
    "ours_compiled": {"color": "darkred", "lw": 2.5, "zorder": 3},
    "ours_int8": {"color": "tab:cyan", "lw": 2.5, "zorder": 3},
    "ours_int4": {"color": "darkcyan", "lw": 2.5, "zorder": 3},
    "ours_fp8": {"color": "steelblue", "lw": 2.5, "zorder": 3},
    "openvino": {"color": "tab:olive"},
    "openvino_weights": {"color": "tab:pink"},
    "onnxruntime": {"color": "navy"},
    "torchao": {"color": "teal"},
    "limit": {"color": "tab:red", "ls": "--", "marker": ""},
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
        """Draw the plot to a picture."""
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

        rows = -(-len(self.panels) // self.columns)
        size = (max(6.0, _WIDTH * self.columns), _HEIGHT * rows + 0.8)
        figure = Figure(figsize=size, layout="constrained")
        # Times are comparable within a row: only the experts differ.
        grid = figure.subplots(rows, self.columns, squeeze=False, sharex=True, sharey="row")
        drawn: dict[str, Any] = {}
        for axes, panel in zip(grid.flat, self.panels, strict=True):
            shares = [100 * share for share in panel.shares]
            for name, values in panel.lines.items():
                points = [(share, value) for share, value in zip(shares, values, strict=True) if value is not None]
                if points:
                    style = {"marker": "o", "ms": 3, "lw": 1.2, **_STYLES[name]}
                    (drawn[name],) = axes.plot(*zip(*points, strict=True), **style)
            if self.log:
                axes.set_yscale("log")
                axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
                axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
                axes.yaxis.set_minor_formatter(NullFormatter())
            else:
                axes.set_ylim(bottom=0)
            axes.set_xlim(left=0)
            axes.set_title(panel.title)
        for axes in grid[-1]:
            axes.set_xlabel("experts selected, %")
        for axes in grid[:, 0]:
            axes.set_ylabel("milliseconds")
        figure.suptitle(self.title)
        labels = [_LABELS.get(name, name.replace("_", " ")) for name in drawn]
        figure.legend(drawn.values(), labels, loc="outside lower center", ncols=min(5, len(drawn)))
        save(figure, file)

"""The picture of quality against cost, of the whole model and of the converted layers, for `compare` and `sweep`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from surgeon.measure.compare import Comparison
from surgeon.measure.curves import Curve
from surgeon.measure.sweep import Point
from surgeon.render.style import COLOURS, save, styled
from surgeon.text.quality import measured_on

_WIDEST = 1.15  # with every expert on, some layers cost more than dense: nobody would run that
_NAME, _TAU = 9.0, 7.0  # sizes of letters, in points
_BESIDE_NAME = ((8, -12), (8, 8), (8, -24), (8, 20), (8, -36), (8, 32), (8, -48))
_BESIDE_TAU = ((-3, 5), (-3, -11))

What = Literal["whole", "layers"]
_WORDS: dict[What, str] = {"whole": "the whole model", "layers": "the converted layers"}


@styled
def draw_frontier(
    found: Comparison, file: Path, *, title: str, spread: str = "95% intervals", measured: str | None = None
) -> None:
    """Draw a picture. Neither axis shows less than what is worth a difference.

    found: if it has a task but no dense quality, that one is unknown and not drawn, nor is the quality to keep.
    spread: what the intervals are. measured: what the quality was measured on, if its numbers do not tell.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    figure = Figure(figsize=(10.5, 4.6), layout="constrained")
    quality = found.curves[0].points[0].quality
    known = all(point.relative is not None for curve in found.curves for point in curve.points)
    shown: list[What] = ["whole", "layers"] if known else ["layers"]
    grid = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    panels = [_Panel(axes, found, what) for axes, what in zip(grid, shown, strict=True)]
    for panel in panels:
        panel.draw()
    if quality.higher_is_better and _at_most_one(found):
        grid[0].yaxis.set_major_formatter(PercentFormatter(1.0, None))
    grid[0].set_ylabel(f"{quality.name} on {measured or measured_on(quality)}")
    dashed = "; dashed: oracle router" if any(curve.router == "oracle" for curve in found.curves) else ""
    stars = "; stars: as stored" if found.stored else ""
    kept = any(curve.whole or curve.layers for curve in found.curves)
    diamonds = "; diamonds: what keeps the quality, its interval below" if kept else ""
    figure.suptitle(title, x=0.01, ha="left", weight="bold")
    words = f"small numbers: tau; vertical lines: {spread}{diamonds}{stars}{dashed}"
    figure.supxlabel(words, fontsize=8, color="0.4")
    # Names and values of tau stand where nothing else does, which is known only once all is laid out.
    figure.draw_without_rendering()
    for panel in panels:
        panel.write()
    save(figure, file)


@dataclass
class _Box:
    """Where something is written, in pixels."""

    left: float
    bottom: float
    width: float
    height: float

    def meets(self, other: _Box) -> bool:
        return (
            self.left < other.left + other.width
            and other.left < self.left + self.width
            and self.bottom < other.bottom + other.height
            and other.bottom < self.bottom + self.height
        )


@dataclass
class _Panel:
    axes: Any
    found: Comparison
    what: What
    taken: list[_Box] = field(default_factory=list)

    @property
    def colours(self) -> dict[str, str]:
        names = dict.fromkeys(curve.surgery for curve in self.found.curves)
        return {name: COLOURS[at % len(COLOURS)] for at, name in enumerate(names)}

    def cost(self, point: Point) -> float:
        return point.layers if self.what == "layers" or point.relative is None else point.relative

    def draw(self) -> None:
        from matplotlib.ticker import PercentFormatter

        axes, found = self.axes, self.found
        widest = max(self.cost(point) for curve in found.curves for point in curve.points)
        axes.set_xlim(0, min(_WIDEST, max(1.05, widest + 0.02)))
        axes.set_ylim(*_limits(found))
        self._draw_dense()
        own = [curve for curve in found.curves if curve.router == "own"]
        for curve in found.curves:
            self._draw_curve(curve)
        for number, curve in enumerate(own):
            self._draw_kept(curve, number + 1)
        for name, point in found.stored.items():
            axes.plot(
                self.cost(point),
                point.quality.value,
                "*",
                ms=12,
                color=self.colours[name],
                mec="black",
                mew=0.6,
                zorder=4,
            )
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, 0))
        axes.set_xlabel(f"multiply-adds of {_WORDS[self.what]}, share of dense")

    def _draw_dense(self) -> None:
        """The dense model's quality with its interval, and the quality to keep."""
        quality, axes = self.found.dense.quality, self.axes
        value = _dense_value(self.found)
        if value is None:
            return
        axes.axhline(value, color="0.25", lw=1)
        if quality is not None and quality.low is not None and quality.high is not None:
            axes.axhspan(quality.low, quality.high, color="0.5", alpha=0.1, lw=0)
        axes.axhline(self.found.wanted, color="0.25", lw=0.9, ls=":")

    def _draw_curve(self, curve: Curve) -> None:
        axes, colour, oracle = self.axes, self.colours[curve.surgery], curve.router == "oracle"
        points = sorted(curve.points, key=self.cost)
        costs, values = [self.cost(point) for point in points], [point.quality.value for point in points]
        axes.plot(costs, values, "--" if oracle else "-", marker="" if oracle else "o", ms=4, lw=1.5, color=colour)
        for point, cost in zip(points, costs, strict=True):
            if not oracle and point.quality.low is not None and point.quality.high is not None:
                axes.vlines(cost, point.quality.low, point.quality.high, color=colour, lw=1, alpha=0.3)

    def _draw_kept(self, curve: Curve, number: int) -> None:
        """What keeps the quality: a diamond, or an arrow if something cheaper may; intervals lie below one another."""
        kept = curve.whole if self.what == "whole" else curve.layers
        if kept is None:
            return
        axes, wanted, colour = self.axes, self.found.wanted, self.colours[curve.surgery]
        if kept.low is not None:
            bottom, top = axes.get_ylim()
            below = wanted - 0.011 * number * (top - bottom)
            high = axes.get_xlim()[1] if kept.high is None else kept.high
            axes.plot([kept.low, high], [below, below], color=colour, lw=2, alpha=0.8, solid_capstyle="butt")
        axes.plot(kept.share, wanted, "<" if kept.at_most else "D", ms=6, mfc="white", mec=colour, mew=1.5, zorder=5)

    def write(self) -> None:
        """Write the names of lines and curves, and the values of tau at points, where there is room."""
        low, high = sorted(self.axes.get_ylim())
        right, found = self.axes.get_xlim()[1], self.found
        wanted = f"{100 * found.keep:g}% of dense" if _higher(found) else f"dense / {found.keep:g}"
        dense = _dense_value(found)
        for text, value in () if dense is None else (("dense", dense), (wanted, found.wanted)):
            self._beside(text, right, value, [(-0.62 * 8 * len(text), 3), (-0.62 * 8 * len(text), -10)], "0.25", 8.0)
        rules = {(curve.surgery, curve.rule) for curve in found.curves}
        several = len(rules) > len({name for name, _ in rules})
        visible: list[tuple[Curve, list[Point]]] = []
        for curve in found.curves:
            inside = [p for p in curve.points if low <= p.quality.value <= high and self.cost(p) <= _WIDEST]
            visible.append((curve, sorted(inside, key=self.cost)))
        for curve, points in visible:
            name = curve.surgery + (f", {curve.rule}" if several else "")
            # On the right of the cheapest point, or else on its left.
            offsets = [*_BESIDE_NAME, *((-8 - 0.62 * _NAME * len(name), up) for _, up in _BESIDE_NAME)]
            for point in points[:1] if curve.router == "own" else ():
                self._at(name, point, offsets, curve, _NAME, weight="bold")
        for curve, points in visible:
            for point in points if curve.router == "own" else ():
                if point.tau is None:  # each layer has its own
                    continue
                self._at(f"{point.tau:g}", point, _BESIDE_TAU, curve, _TAU)

    def _at(
        self, text: str, point: Point, offsets: Sequence[tuple[float, float]], curve: Curve, size: float, **style: Any
    ) -> None:
        self._beside(text, self.cost(point), point.quality.value, offsets, self.colours[curve.surgery], size, **style)

    def _beside(
        self,
        text: str,
        x: float,
        y: float,
        offsets: Sequence[tuple[float, float]],
        colour: str,
        size: float,
        **style: Any,
    ) -> None:
        """Write at the first of these offsets, in points, where there is room. Without room nothing is written."""
        from matplotlib.patheffects import withStroke

        scale, halo = self.axes.figure.dpi / 72, [withStroke(linewidth=2, foreground="white")]
        across, up = self.axes.transData.transform((x, y))
        inside = self.axes.get_window_extent()
        for dx, dy in offsets:
            box = _Box(across + dx * scale, up + dy * scale, 0.62 * size * len(text) * scale, 1.2 * size * scale)
            fits = inside.y0 <= box.bottom and box.bottom + box.height <= inside.y1 and box.left >= inside.x0
            if fits and box.left + box.width <= inside.x1 + 1 and not any(map(box.meets, self.taken)):
                self.taken.append(box)
                self.axes.annotate(
                    text, (x, y), (dx, dy), textcoords="offset points", fontsize=size, color=colour, zorder=6,
                    path_effects=halo, **style,
                )  # fmt: skip
                return


def _limits(found: Comparison) -> tuple[float, float]:
    """The qualities at the lower and the upper end: some intervals around the dense one, and the best of each curve."""
    qualities = [point.quality for curve in found.curves for point in curve.points]
    sign, dense = 1.0 if _higher(found) else -1.0, _dense_value(found)
    wanted = found.wanted
    if dense is None:
        dense = wanted = max(sign * quality.value for quality in qualities) * sign
    # Where quality is lost, intervals may be as wide as they like.
    near = [one for one in qualities if sign * (one.value - dense) > -0.06 * abs(dense)]
    widths = [one.high - one.low for one in near if one.low is not None and one.high is not None]
    widest = max(widths, default=0.0)
    reach = max(0.06 * abs(dense), 3 * abs(wanted - dense), 1.2 * widest)
    best = [max(sign * point.quality.value for point in curve.points) for curve in found.curves]
    bottom = min(sign * dense - reach, *(value - reach / 4 for value in best))
    top = max(sign * dense + reach / 4, *(value + max(reach / 6, 0.55 * widest) for value in best))
    if _higher(found) and _at_most_one(found):
        top = min(top, 1.0 + reach / 10)
        if min(quality.value for quality in qualities) >= 0:  # a cosine may be below
            bottom = max(bottom, -reach / 10)
    return sign * bottom, sign * top


def _dense_value(found: Comparison) -> float | None:
    """The dense model's quality, None if it is unknown; where it is agreement, its own with itself."""
    if found.dense.quality is not None:
        return found.dense.quality.value
    if found.task is not None:
        return None
    return 1.0 if _higher(found) else 0.0


def _higher(found: Comparison) -> bool:
    return found.curves[0].points[0].quality.higher_is_better


def _at_most_one(found: Comparison) -> bool:
    return all(point.quality.value <= 1.0 for curve in found.curves for point in curve.points)

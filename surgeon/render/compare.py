"""The view of the result of `surgeon compare`, and its files: tables for people, numbers, and a picture."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Group, RenderableType
from rich.text import Text

from surgeon.data.quality import Change, Quality
from surgeon.jobs.compare import Compared
from surgeon.measure.compare import Comparison
from surgeon.measure.curves import Curve
from surgeon.measure.read_off import Difference, Kept
from surgeon.measure.sweep import Point
from surgeon.render.frontier_plot import draw_frontier
from surgeon.render.numbers import INTERVALS
from surgeon.render.style import PICTURES
from surgeon.render.sweep import change_text, milliseconds_text
from surgeon.text.layout import grid, sentences
from surgeon.text.quality import measured_on, quality_value, with_interval
from surgeon.text.summary import percent

FILES = {".json": "numbers", ".csv": "a line for each setting", ".md": "tables", **PICTURES}


@dataclass(frozen=True)
class _Table:
    """Columns with their headers; a column that is empty in every row is left out."""

    header: tuple[str, ...]
    rows: list[tuple[str | Text, ...]]
    left: int  # columns of words, which stand on the left

    def shown(self) -> Iterator[tuple[int, str]]:
        return ((at, name) for at, name in enumerate(self.header) if any(str(row[at]) for row in self.rows))

    def view(self) -> RenderableType:
        shown = list(self.shown())
        sides = ["left" if at < self.left else "right" for at, _ in shown]
        table = grid(*sides, header=[name for _, name in shown])  # type: ignore[arg-type]
        for row in self.rows:
            table.add_row(*(row[at] for at, _ in shown))
        return table

    def markdown(self) -> str:
        shown = list(self.shown())
        rows = [[name for _, name in shown], ["---"] * len(shown)]
        rows += [[str(row[at]).replace("|", "\\|") for at, _ in shown] for row in self.rows]
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def compared_view(compared: Compared) -> RenderableType:
    """Show what each surgery costs to keep the quality, and then every setting."""
    found = compared.found
    return Group(
        _kept_table(found).view(),
        sentences([_words(found)], indent=0),
        Text(""),
        _settings_table(found).view(),
        sentences([_settings_words(found), *compared.notes], indent=0),
    )


def write_comparison(compared: Compared, file: Path) -> None:
    """Write tables to a `.md` file, a line for each setting to a `.csv` file, or draw a picture."""
    found = compared.found
    if file.suffix == ".md":
        parts = [_kept_table(found).markdown(), _words(found), _settings_table(found).markdown()]
        parts += [_settings_words(found), *compared.notes]
        file.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    elif file.suffix == ".csv":
        with file.open("w", newline="", encoding="utf-8") as stream:
            csv.writer(stream).writerows(_lines(found))
    else:
        draw_frontier(found, file, title=f"{' and '.join(compared.surgeries)} on {compared.data}")


def _kept_table(found: Comparison) -> _Table:
    """What it costs to keep the quality."""
    several, first = len({curve.rule for curve in found.curves}) > 1, found.curves[0]
    at = f"at {100 * found.keep:g}%"
    header = (
        "surgery", "rule", "router", f"converted layers {at}", f"whole model {at}", f"than {first.surgery}, points",
        f"{_quality(found).name} at the cost of {first.surgery}", "ms",
    )  # fmt: skip
    dense = "" if found.dense.milliseconds is None else f"{found.dense.milliseconds:.1f}"
    rows: list[tuple[str | Text, ...]] = [("dense", "", "", "100%", "100%", "", "", dense)]
    for curve in found.curves:
        rows.append(
            (
                curve.surgery,
                curve.rule if several else "",
                "oracle" if curve.router == "oracle" else "",
                _kept(curve.layers),
                _kept(curve.whole),
                _points(curve.cost_difference),
                change_text(curve.quality_difference, higher_is_better=_quality(found).higher_is_better),
                "" if curve.milliseconds is None else f"{curve.milliseconds:.1f}",
            )
        )
    return _Table(header, rows, 3)


def _settings_table(found: Comparison) -> _Table:
    """Every setting that was measured."""
    several = len({curve.rule for curve in found.curves}) > 1
    quality = _quality(found)
    agreed = [one.name for one in found.curves[0].points[0].agreement if one.name != quality.name]
    header = (
        "surgery", "rule", "router", "tau", quality.name, "change", *agreed, "ran", "converted layers",
        "whole model", "ms",
    )  # fmt: skip
    rows: list[tuple[str | Text, ...]] = []
    if found.dense.quality is not None:
        empty = ("",) * (1 + len(agreed))
        dense = (with_interval(found.dense.quality), *empty, "", "100%", "100%", milliseconds_text(found.dense))
        rows.append(("dense", "", "", "", *dense))
    for name, curve, point in _settings(found):
        rows.append(
            (
                name,
                point.rule if several else "",
                "oracle" if curve is not None and curve.router == "oracle" else "",
                "as stored" if point.tau is None else f"{point.tau:g}",
                with_interval(point.quality),
                change_text(point.quality.change, higher_is_better=quality.higher_is_better),
                *(with_interval(one) for one in point.agreement if one.name in agreed),
                percent(point.executed),
                percent(point.layers),
                percent(point.relative),
                milliseconds_text(point),
            )
        )
    return _Table(header, rows, 4)


def _settings(found: Comparison) -> Iterator[tuple[str, Curve | None, Point]]:
    """The settings of each curve, and after the last curve of a surgery its stored setting."""
    for at, curve in enumerate(found.curves):
        yield from ((curve.surgery, curve, point) for point in curve.points)
        last = all(other.surgery != curve.surgery for other in found.curves[at + 1 :])
        if last and curve.surgery in found.stored:
            yield curve.surgery, None, found.stored[curve.surgery]


def _lines(found: Comparison) -> Iterator[list[object]]:
    """The lines of a `.csv` file."""
    yield [
        "surgery", "rule", "router", "tau", "quality", "value", "low", "high", "samples", "change", "change_low",
        "change_high", "executed", "layers", "whole", "multiply_adds", "milliseconds",
    ]  # fmt: skip
    dense = found.dense
    yield ["dense", "", "", "", *_quality_cells(dense.quality), "", "", "", "", 1.0, 1.0, dense.multiply_adds,
           dense.milliseconds]  # fmt: skip
    for name, curve, point in _settings(found):
        change = point.quality.change
        yield [
            name, point.rule, point.router if curve is not None else "own",
            "stored" if point.tau is None else point.tau, *_quality_cells(point.quality), *_change_cells(change),
            point.executed, point.layers, point.relative, point.multiply_adds, point.milliseconds,
        ]  # fmt: skip


def _quality_cells(quality: Quality | None) -> list[object]:
    return [""] * 5 if quality is None else [quality.name, quality.value, quality.low, quality.high, quality.samples]


def _change_cells(change: Change | None) -> list[object]:
    return [""] * 3 if change is None else [change.value, change.low, change.high]


def _quality(found: Comparison) -> Quality:
    return found.curves[0].points[0].quality


def _kept(kept: Kept | None) -> str:
    """`≤ 8.4% [7.1, 9.9]`; a dash if the quality is not kept."""
    if kept is None:
        return "—"
    value = f"{'≤ ' * kept.at_most}{100 * kept.share:.1f}%"
    return value + _bounds(kept.low, kept.high, "")


def _points(difference: Difference | None) -> str:
    """Percentage points."""
    if difference is None:
        return ""
    sign = {"at least": "≥ ", "at most": "≤ ", None: ""}[difference.bound]
    return f"{sign}{100 * difference.value:+.1f}" + _bounds(difference.low, difference.high, "+")


def _bounds(low: float | None, high: float | None, sign: str) -> str:
    if low is None and high is None:
        return ""
    low_text, high_text = ("—" if one is None else f"{100 * one:{sign}.1f}" for one in (low, high))
    return f" [{low_text}, {high_text}]"


def _words(found: Comparison) -> str:
    """What is kept, and what the columns of the first table mean."""
    quality = _quality(found)
    wanted = quality_value(replace(quality, value=found.wanted))
    share = f"{100 * found.keep:g}%"
    if found.dense.quality is None:
        words = [f"{share} of full agreement with the dense model is to be kept, on {measured_on(quality)}."]
    else:
        times = f"{share} of it" if quality.higher_is_better else f"{1 / found.keep:.4g} times it"
        words = [
            f"The dense model has {quality.name} {with_interval(found.dense.quality)} on {measured_on(quality)}; "
            f"{times} is {wanted}."
        ]
    words += [
        "The columns show at which share of the dense multiply-adds a surgery keeps that, on the line between two "
        "settings, routers included.",
        "≤: the cheapest setting keeps it. —: no setting does.",
        INTERVALS,
    ]
    return " ".join(words)


def _settings_words(found: Comparison) -> str:
    quality = _quality(found)
    words = [f"{quality.name} on {measured_on(quality)}."]
    if quality.change is not None:
        words.append("change: from the dense model on the same samples.")
    words.append("converted layers, whole model: multiply-adds that ran, as a share of the dense ones.")
    return " ".join(words)

"""Parts of views that several commands share: costs and qualities."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from surgeon.data.quality import Change, Quality
from surgeon.text.layout import dim
from surgeon.text.summary import growth, number


def add_numbers(table: Table, name: str, before: int, after: int) -> None:
    """Add a row of two numbers and the relative change between them."""
    table.add_row(name, number(before), number(after), dim(growth(before, after)))


_SHARES = ("accuracy", "exact match", "top-1 agreement", "cosine")


def quality_value(quality: Quality) -> str:
    """A quality as a number."""
    return f"{quality.value:.3f}" if quality.name in _SHARES else f"{quality.value:.4g}"


def with_interval(quality: Quality) -> str:
    """A quality with its 95% interval: `0.951 [0.93, 0.97]`."""
    if quality.low is None or quality.high is None:
        return quality_value(quality)
    return f"{quality_value(quality)} [{quality.low:.3g}, {quality.high:.3g}]"


def change_words(change: Change | None) -> str:
    """A difference with its 95% interval: `-0.012 [-0.02, -0.004]`; nothing if there is none."""
    if change is None:
        return ""
    return f"{change.value:+.2g} [{change.low:+.2g}, {change.high:+.2g}]" if change.value or change.low else "0"


def measured_on(quality: Quality) -> str:
    """What a quality was measured on: `360 samples`, or `1,200 tokens of 40 samples`."""
    items = f"{quality.items:,} {quality.unit}"
    return items if quality.unit == "samples" else f"{items} of {quality.samples:,} samples"


def quality_line(what: str, quality: Quality) -> RenderableType:
    """`dense model: accuracy 0.97 [0.95, 0.98] on 360 samples`."""
    measured = f"{quality.name} {with_interval(quality)} on {measured_on(quality)}"
    return Text.assemble((what, "bold"), f": {measured}\n")


def agreement_line(agreement: Sequence[Quality], other: str) -> RenderableType:
    """`agreement with the dense model: top-1 agreement 0.97 [0.95, 0.98], KL divergence 0.01 [...], on 360 samples`."""
    numbers = ", ".join(f"{quality.name} {with_interval(quality)}" for quality in agreement)
    return Text(f"agreement with {other}: {numbers}, on {measured_on(agreement[0])}")


INTERVALS = "In brackets: 95% intervals."

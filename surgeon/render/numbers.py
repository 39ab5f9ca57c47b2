"""Parts of views that several commands share: costs and qualities."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from surgeon.data.quality import Quality
from surgeon.text.layout import dim
from surgeon.text.quality import measured_on, with_interval
from surgeon.text.summary import growth, number


def add_numbers(table: Table, name: str, before: int, after: int) -> None:
    """Add a row of two numbers and the relative change between them."""
    table.add_row(name, number(before), number(after), dim(growth(before, after)))


def quality_line(what: str, quality: Quality) -> RenderableType:
    """`dense model: accuracy 0.97 [0.95, 0.98] on 360 samples`."""
    measured = f"{quality.name} {with_interval(quality)} on {measured_on(quality)}"
    return Text.assemble((what, "bold"), f": {measured}\n")


def agreement_line(agreement: Sequence[Quality], other: str) -> RenderableType:
    """`agreement with the dense model: top-1 agreement 0.97 [0.95, 0.98], KL divergence 0.01 [...], on 360 samples`."""
    numbers = ", ".join(f"{quality.name} {with_interval(quality)}" for quality in agreement)
    return Text(f"agreement with {other}: {numbers}, on {measured_on(agreement[0])}")


INTERVALS = "In brackets: 95% intervals."

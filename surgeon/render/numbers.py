"""Parts of views that several commands share: costs and qualities."""

from __future__ import annotations

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from surgeon.data.losses import Quality
from surgeon.text.layout import dim
from surgeon.text.summary import growth, number


def add_numbers(table: Table, name: str, before: int, after: int) -> None:
    """Add a row of two numbers and the relative change between them."""
    table.add_row(name, number(before), number(after), dim(growth(before, after)))


def quality_value(quality: Quality) -> str:
    """A quality as a number."""
    return f"{quality.value:.3f}" if quality.name == "accuracy" else f"{quality.value:.4g}"


def items_of(quality_name: str) -> str:
    """The items that a quality is averaged over."""
    return "samples" if quality_name == "accuracy" else "tokens"


def quality_line(what: str, quality: Quality) -> RenderableType:
    """`dense model: accuracy 0.97 on 360 samples`."""
    measured = f"{quality.name} {quality_value(quality)} on {quality.items} {items_of(quality.name)}"
    return Text.assemble((what, "bold"), f": {measured}\n")

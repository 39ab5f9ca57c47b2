"""Options of passes: how a field of a pass is declared, and values that differ between sites."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeAlias, TypeVar

from surgeon.graph.patterns import first_fit

Value = TypeVar("Value")


PerSite: TypeAlias = Value | dict[str, Value]
"""An option with one value for every site, or values by path, patterns with * allowed; the first that fits counts."""


def for_site(value: PerSite[Value] | None, path: str) -> Value | None:
    """The value of an option for one site, None if it has none."""
    return first_fit(value, path) if isinstance(value, dict) else value


def option(default: Any, help: str) -> Any:
    """A field of a pass that is also its command-line option, with the sentence that explains it."""
    return dataclasses.field(default=default, metadata={"help": help})

"""Gather what a report shows of saved surgeries, without loading any model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from surgeon.errors import UsageError
from surgeon.surgery.artifact import load_diff
from surgeon.surgery.diff import Diff
from surgeon.surgery.record import Record, read_record


@dataclass(frozen=True)
class Reported:
    """A saved surgery in a report. name: how the report calls it. path: of its directory."""

    name: str
    path: Path
    record: Record
    diff: Diff


def report(directories: Sequence[str]) -> list[Reported]:
    """Read saved surgeries for a report.

    Args:
        directories: of the surgeries, each as a path or as NAME=PATH.

    Raises:
        UsageError: two have the same name.
        LoadError: a directory is not a saved surgery, or a file in it is damaged.
    """
    found: list[Reported] = []
    for given in directories:
        name, equals, place = given.partition("=")
        path = Path(place if equals else given)
        name = name if equals else path.name or str(path.resolve().name)
        if any(other.name == name for other in found):
            raise UsageError(f"Two surgeries are called {name}. Name them, such as first={path}.")
        found.append(Reported(name, path, read_record(path), load_diff(path)))
    return found

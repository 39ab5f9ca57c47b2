"""Gather what a report shows of saved surgeries: their records without loading any model, and what data tell."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from surgeon.errors import UsageError
from surgeon.jobs.apply import Applied
from surgeon.jobs.open_model import Opened
from surgeon.jobs.plot import Kind, Measured, Told, fitting, measured, title
from surgeon.surgery.artifact import load_diff
from surgeon.surgery.diff import Diff
from surgeon.surgery.record import Record, read_record


@dataclass(frozen=True)
class Reported:
    """A saved surgery in a report.

    name: how the report calls it. path: of its directory. measured: what was measured on data, by the kind of picture,
    and title: on what; empty without data.
    """

    name: str
    path: Path
    record: Record
    diff: Diff
    measured: Mapping[Kind, Measured] = field(default_factory=dict)
    title: str = ""


def with_data(surgery: Reported, opened: Opened, progress: Told = None) -> Reported:
    """Add what is measured on the held-out data. What this surgery has nothing to show for is left out.

    opened: the surgery, with data.
    """
    found: dict[Kind, Measured] = {}
    kinds = fitting(opened)
    if not kinds:
        return surgery
    for kind in kinds:
        # Only maps of samples may be impossible: of layers that run on no tokens.
        with contextlib.suppress(UsageError) if kind == "compute" else contextlib.nullcontext():
            found[kind] = measured(kind, opened, progress)
    return replace(surgery, measured=found, title=title(opened))


def of_applied(applied: Applied, opened: Opened, progress: Told = None) -> list[Reported]:
    """Report on what `surgeon apply` has just saved, with what the data tell, if it had any.

    opened: the model before.
    """
    directory = applied.directory
    assert directory is not None
    found = report([str(directory)])
    if opened.data is None:
        return found
    after = replace(opened, spec=str(directory), graph=applied.surgery.graph, record=found[0].record)
    return [with_data(found[0], after, progress)]


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

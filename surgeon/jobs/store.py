"""Store a surgery: check the target directory, and save to it."""

from __future__ import annotations

import os
from pathlib import Path

from surgeon.data.quality import Quality
from surgeon.directories import OVERWRITE, restore
from surgeon.errors import SaveError, UsageError
from surgeon.jobs.open_model import Opened
from surgeon.surgery.artifact import save
from surgeon.surgery.diff import Diff
from surgeon.surgery.record import RECORD, MeasuredQuality, earlier_passes, make_record


def check_target(directory: Path, model: str | None = None, *, overwrite: bool) -> None:
    """Check before the work that the result can be written.

    Raises:
        UsageError: the directory is the model's own, or has content that must not be replaced.
        SaveError: its parent cannot be written to.
    """
    where = directory.resolve()
    restore(where)
    if model is not None and Path(model).resolve() in (where, *where.parents):
        raise UsageError(f"{directory} is the model itself, which is never changed. Give another directory with -o.")
    if directory.exists() and not directory.is_dir():
        raise UsageError(f"{directory} is a file. Give a directory for the result with -o.")
    if directory.is_dir() and any(directory.iterdir()):
        if not (directory / RECORD).exists():
            raise UsageError(f"{directory} is not empty and not a saved surgery. Give another directory with -o.")
        if not overwrite:
            raise UsageError(f"{directory} exists.", **OVERWRITE)
    check_parent(directory)


def check_parent(directory: Path) -> None:
    """Check that a directory can be made.

    Raises:
        SaveError: its parent cannot be written to.
    """
    parent = next(parent for parent in directory.resolve().parents if parent.exists())
    if not os.access(parent, os.W_OK | os.X_OK):
        raise SaveError(f"Cannot write {directory}: you have no permission to write to {parent}.")


def store(opened: Opened, out: Path | None, quality: tuple[Quality, Quality] | None = None) -> Path:
    """Save an opened surgery as it is now. Returns its directory.

    Args:
        out: the directory; by default the surgery that was opened is replaced, whole or not at all.
        quality: of the dense model and of the surgery as it is now, on the opened data; None if it was not measured.

    Raises:
        SaveError: as `surgeon.surgery.artifact.save`.
    """
    assert opened.record is not None, "only a surgery that was loaded from a directory is stored again"
    passes = earlier_passes(opened.graph)
    recipe = opened.record.recipe
    measured = None
    if quality is not None and opened.data is not None:
        before = opened.record.quality  # its scores hold for the same data
        measured = MeasuredQuality(*quality, opened.data.fingerprint, scores="" if before is None else before.scores)
    record = make_record(
        opened.graph, [pass_.report for pass_ in passes], origin=opened.origin, seed=recipe.seed or 0, data=recipe.data,
        quality=measured,
    )  # fmt: skip
    return save(
        opened.graph, Path(opened.spec) if out is None else out, inputs=opened.inputs, record=record,
        diff=Diff.joined(passes, (), ()), origin=opened.origin, overwrite=out is None,
    )  # fmt: skip

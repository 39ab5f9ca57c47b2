"""Where a surgery is stored: whether it can be, and putting it there."""

from __future__ import annotations

import os
from pathlib import Path

from surgeon.data.losses import Quality
from surgeon.errors import SaveError, UsageError
from surgeon.graph.snapshot import snapshot
from surgeon.jobs.open_model import Opened
from surgeon.surgery.artifact import RECORD, save
from surgeon.surgery.pipeline import Surgery


def check_target(directory: Path, model: str | None = None, *, overwrite: bool) -> None:
    """Find out before the work whether the result can be written.

    Raises:
        UsageError: the directory is the model's own, or has content that is not to be replaced.
        SaveError: its parent cannot be written to.
    """
    where = directory.resolve()
    if model is not None and Path(model).resolve() in (where, *where.parents):
        raise UsageError(f"{directory} is the model itself, which is never changed. Give another directory with -o.")
    if directory.exists() and not directory.is_dir():
        raise UsageError(f"{directory} is a file. Give a directory for the result with -o.")
    if directory.is_dir() and any(directory.iterdir()):
        if not (directory / RECORD).exists():
            raise UsageError(f"{directory} holds something else than a saved surgery. Give another one with -o.")
        if not overwrite:
            raise UsageError(f"{directory} exists. Give another directory with -o, or replace it with --overwrite.")
    parent = next(parent for parent in where.parents if parent.exists())
    if not os.access(parent, os.W_OK | os.X_OK):
        raise SaveError(f"Cannot write {directory}: no permission to write to {parent}.")


def store(opened: Opened, out: Path | None, quality: tuple[Quality, Quality] | None = None) -> Path:
    """Save an opened surgery as it is now; returns where.

    Args:
        out: where to; by default it replaces the one that was opened, whole or not at all.
        quality: of the dense model and of the surgery as it is now, on the opened data, if it was measured.

    Raises:
        SaveError: as `surgeon.surgery.artifact.save`.
    """
    recipe = (opened.record or {}).get("recipe", {})
    surgery = Surgery(
        opened.graph, [], opened.inputs, [snapshot(opened.graph)], int(recipe.get("seed", 0)), recipe.get("data"),
        opened.origin, opened.graph.meta.get("earlier_passes", ()),
    )  # fmt: skip
    if quality is not None and opened.data is not None:
        surgery.quality = *quality, opened.data.fingerprint
    return save(surgery, Path(opened.spec) if out is None else out, overwrite=out is None)

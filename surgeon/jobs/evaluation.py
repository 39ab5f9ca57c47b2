"""The task and data that quality is measured on, why it cannot be measured, and what is recorded of the dense model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from surgeon.data.batch import Batch
from surgeon.data.losses import Quality, guessed_task
from surgeon.graph.agreement import call_reproducibly
from surgeon.jobs.open_model import Opened


def task_for(opened: Opened, batches: Iterable[Any]) -> str | None:
    """The model's task: the known one, else a guess from its outputs for the first batch and from the labels."""
    if opened.task is not None:
        return opened.task
    batch = Batch.from_any(next(iter(batches)))
    return guessed_task(call_reproducibly(opened.graph, batch.args, batch.kwargs), batch.labels)


def eval_task(opened: Opened) -> str | None:
    """The task to measure; None if it is unknown, no data is held out, or that data has no labels."""
    if opened.data is None or opened.data.eval is None:
        return None
    batch = Batch.from_any(next(iter(opened.data.eval)))
    if batch.labels is None and opened.task != "causal-lm":
        return None
    return task_for(opened, opened.data.eval)


def eval_batches(opened: Opened) -> list[Batch]:
    """The held-out part of the data; all of it if nothing is held out."""
    assert opened.data is not None
    data = opened.data
    return [Batch.from_any(item) for item in (data.eval if data.eval is not None else data.train)]


def dense_multiply_adds(opened: Opened) -> int | None:
    """The multiply-adds before the surgery, from its record; None if they are not recorded."""
    reports = () if opened.record is None else opened.record.passes
    return reports[0].before.multiply_adds if reports and reports[0].before is not None else None


def recorded_quality(opened: Opened) -> Quality | None:
    """The dense model's recorded quality, if it was measured on the data that is given now."""
    found = None if opened.record is None else opened.record.quality
    if found is None or opened.data is None or found.data != opened.data.fingerprint:
        return None
    return found.before


def why_unmeasured(opened: Opened) -> str:
    """Tell the user why `eval_task` is None."""
    if opened.data is None or opened.data.eval is None:
        return "Quality was not measured: no data was held out for it."
    if Batch.from_any(next(iter(opened.data.eval))).labels is None:
        return "Quality was not measured: the data has no labels."
    return "Quality was not measured: the model's task is not known. Give it with --task."


def other_data(opened: Opened) -> tuple[str, ...]:
    """Warn the user if the data, or how it is read, differs from what the surgery was made with."""
    recorded = None if opened.record is None else opened.record.recipe.fingerprint
    if opened.data is None or recorded in (None, opened.data.fingerprint):
        return ()
    return (
        "The data, or how it is read (--seed, --limit, --eval-fraction, ...), differs from what the surgery was made "
        "with: the surgery may have been trained on what is held out now.",
    )

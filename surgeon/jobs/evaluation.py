"""What quality is measured by and on, why it cannot be measured, and what is recorded of the dense model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from surgeon.data.batch import Batch
from surgeon.data.imitation import made_for
from surgeon.data.losses import KINDS, blank_of, guessed_task
from surgeon.data.quality import Kind, Quality, Scores
from surgeon.errors import LoadError
from surgeon.graph.agreement import call_reproducibly
from surgeon.graph.traced import TracedGraph
from surgeon.jobs.open_model import Opened
from surgeon.measure.judge import Criteria, Verdict, judge
from surgeon.models.tasks import TASKS, needs_labels
from surgeon.progress import Tell
from surgeon.surgery.record import MeasuredQuality
from surgeon.tracing.trace import TraceInfo


def criteria_for(opened: Opened, batches: Iterable[Any]) -> Criteria:
    """What the model is judged by: its task if the batches have labels for it, and its agreement with the dense model.

    The task is the known one, else a guess from the outputs for the first batch and from the labels. Where the dense
    model is imitated, it is that of the model's class.
    """
    batch = Batch.from_any(next(iter(batches)))
    info: TraceInfo = opened.graph.meta["trace"]
    known = [task for task in (opened.task, info.task) if needs_labels(task)]
    task = known[0] if known else None
    if task is None and batch.labels is not None:
        task = guessed_task(call_reproducibly(opened.graph, batch.args, batch.kwargs), batch.labels)
    labelled = batch.labels is not None or (task is not None and TASKS[task].loss == "next-token")
    outputs = task or made_for(opened.task, info.task)
    return Criteria(task if labelled else None, blank_of(opened.origin.config), outputs)


def eval_criteria(opened: Opened) -> Criteria | None:
    """What to judge by on the held-out data; None if none is held out."""
    if opened.data is None or opened.data.eval is None:
        return None
    return criteria_for(opened, opened.data.eval)


def eval_batches(opened: Opened) -> list[Batch]:
    """The held-out part of the data; all of it if nothing is held out."""
    return list(held_out(opened))


def held_out(opened: Opened) -> Iterator[Batch]:
    """Read what `eval_batches` gives, batch by batch."""
    assert opened.data is not None
    data = opened.data
    return map(Batch.from_any, data.eval if data.eval is not None else data.train)


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


def recorded_scores(opened: Opened, kind: Kind | None) -> Scores | None:
    """The dense model's recorded scores of this kind on the samples that are given now, as `recorded_quality`.

    Raises:
        LoadError: they are damaged.
    """
    found = recorded_quality(opened)
    if kind is None or found is None or found.name != kind.name:
        return None
    assert opened.record is not None
    assert opened.record.quality is not None
    try:
        return Scores.unpacked(opened.record.quality.scores, kind)
    except ValueError as error:
        raise LoadError(f"{opened.spec}: the recorded scores of the dense model are damaged: {error}.") from error


def kind_of(criteria: Criteria) -> Kind | None:
    """What the quality of the task is; None without labels."""
    return None if criteria.task is None else KINDS[TASKS[criteria.task].loss]


def judge_before(opened: Opened, criteria: Criteria, tell: Tell | None = None) -> Verdict:
    """Judge the opened model on the held-out data, if there are labels. It agrees with itself."""
    if criteria.task is None:
        return Verdict(None)
    return judge(opened.graph, eval_batches(opened), criteria, progress=tell)


def judge_after(
    graph: TracedGraph, opened: Opened, criteria: Criteria, before: Verdict, tell: Tell | None = None
) -> Verdict:
    """Judge what became of the opened model on the held-out data, and compare it with `before`."""
    return judge(graph, eval_batches(opened), criteria, dense=opened.graph, scores=before.scores, progress=tell)


def both_qualities(before: Verdict | None, after: Verdict | None) -> tuple[Quality, Quality] | None:
    """The qualities of the task; None if they were not measured."""
    if before is None or after is None or before.quality is None or after.quality is None:
        return None
    return before.quality, after.quality


def measured_quality(opened: Opened, before: Verdict, after: Verdict) -> MeasuredQuality:
    """What to record. A model that is a surgery itself is compared with its dense model, if that was recorded."""
    assert opened.data is not None
    quality, scores = after.quality, before.scores
    if after.scores is not None and recorded_quality(opened) is not None:
        scores = recorded_scores(opened, after.scores.kind) or scores
        quality = after.scores.quality(scores)
    packed = "" if scores is None else scores.packed()
    return MeasuredQuality(before.quality, quality, opened.data.fingerprint, after.agreement, packed)


def why_unmeasured(opened: Opened, criteria: Criteria | None) -> tuple[str, ...]:
    """Tell the user why the quality was not measured, or not that of the task; () if it was, or the task has none."""
    if criteria is None:
        return ("Quality was not measured: no data was held out for it.",)
    if criteria.task is not None or (opened.task is not None and not needs_labels(opened.task)):
        return ()
    assert opened.data is not None
    assert opened.data.eval is not None
    if Batch.from_any(next(iter(opened.data.eval))).labels is None:
        return ("Only agreement was measured: the data has no labels.",)
    return ("Only agreement was measured: the model's task is not known. Give it with --task.",)


def other_data(opened: Opened) -> tuple[str, ...]:
    """Warn the user if the data, or how it is read, differs from what the surgery was made with."""
    recorded = None if opened.record is None else opened.record.recipe.fingerprint
    if opened.data is None or recorded in (None, opened.data.fingerprint):
        return ()
    return (
        "The data, or how it is read (--seed, --limit, --eval-fraction, ...), differs from what the surgery was made "
        "with: the surgery may have been trained on what is held out now.",
    )

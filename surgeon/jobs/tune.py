"""Find and store the tau of each layer that meets a budget."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from surgeon.data.batch import first_batches
from surgeon.data.quality import Quality
from surgeon.dynamic.knobs import compensated as compensated_layers
from surgeon.errors import UsageError
from surgeon.jobs.evaluation import (
    dense_multiply_adds,
    eval_batches,
    eval_criteria,
    kind_of,
    other_data,
    recorded_quality,
    recorded_scores,
    why_unmeasured,
)
from surgeon.jobs.open_model import Opened
from surgeon.jobs.set import compensation_notes
from surgeon.jobs.store import store
from surgeon.measure.compensation import compensate
from surgeon.measure.judge import Criteria, judge
from surgeon.measure.sweep import Point, time_settings
from surgeon.measure.sweep import sweep as run_sweep
from surgeon.measure.tuning import Metric, Tuned, check_budget
from surgeon.measure.tuning import tune as run_tuning
from surgeon.passes import Densify
from surgeon.progress import Progress, Tell, renamed
from surgeon.surgery.pipeline import Pipeline


@dataclass(frozen=True)
class TuningResult:
    """What tuning found, and where it was saved.

    quality: on the held-out data, at tau 0 and with the tau found; None if it was not measured. Without labels
    it is agreement. agreement, agreed_with: with the dense model if it was given, else with the surgery itself at
    tau 0. notes: remarks for the user.
    """

    model: str
    directory: Path
    budget: float
    metric: Metric
    tuned: Tuned
    quality: tuple[Quality, Quality] | None
    notes: tuple[str, ...] = ()
    agreement: tuple[Quality, ...] = ()
    agreed_with: Literal["dense", "tau 0"] = "tau 0"


def check_tuning(budget: float, metric: Metric, *, has_dense: bool, densify: bool = False) -> None:
    """Refuse options that cannot work, before anything is loaded.

    Raises:
        UsageError: as `surgeon.measure.tuning.check_budget`; the metric is "ms" and there is no dense model, or layers
            are to become dense.
    """
    check_budget(budget)
    if metric == "ms" and not has_dense:
        raise UsageError("--metric ms compares with the time of the dense model. Give the model with --dense.")
    if metric == "ms" and densify:
        raise UsageError("--densify counts multiply-adds. Give --metric flops.")


def tune(
    opened: Opened,
    budget: float,
    *,
    metric: Metric = "flops",
    samples: int = 512,
    compensated: bool = False,
    densify: bool = False,
    out: Path | None = None,
    dense: Opened | None = None,
    progress: Tell | None = None,
) -> TuningResult:
    """Find a tau for each layer within a budget, on training data, and store it in the surgery.

    Args:
        budget: share of the dense model's cost. samples: number of training samples on which damage is measured.
        compensated: also add the mean output of skipped experts (`surgeon.measure.compensation`).
        densify: put layers that then run everything back into their dense form (`surgeon.passes.Densify`).
        out: directory for the tuned surgery; by default it replaces the one that was opened.
        dense: the model before the surgery, whose time "ms" compares with, and with which agreement is measured.

    Raises:
        UsageError: as `check_tuning` and `surgeon.measure.tuning.tune`.
        SaveError: as `surgeon.surgery.artifact.save`.
    """
    check_tuning(budget, metric, has_dense=dense is not None, densify=densify)
    assert opened.data is not None
    calibration = first_batches(opened.data.train, samples)
    whole: float | None = dense_multiply_adds(opened)
    if metric == "ms" and dense is not None:
        whole = time_settings(dense.graph, calibration[0], [lambda: None])[0]
    earlier = compensated_layers(opened.graph)
    tuned = run_tuning(
        opened.graph,
        calibration,
        budget,
        inputs=opened.inputs,
        dense=whole,
        metric=metric,
        task=opened.task,
        densify=densify,
        progress=progress,
    )
    if compensated:
        compensate(opened.graph, calibration)
    notes = [*other_data(opened), *compensation_notes(opened.graph, earlier, wanted=compensated)]
    if not any(tuned.taus.values()):
        notes.append(
            f"A budget of {budget:.0%} allows everything. At tau 0 the model costs {tuned.cost:.1%} of the dense one."
        )
    criteria = eval_criteria(opened)
    points = None if criteria is None else _measured(opened, criteria, dense, progress)
    before = None if criteria is None or criteria.task is None else recorded_quality(opened)
    notes.extend(why_unmeasured(opened, criteria))
    if tuned.dense:
        opened = _densified(opened, tuned.dense)
    if progress is not None:
        progress(Progress(f"saving {opened.spec if out is None else out}", 0, 0))
    directory = store(opened, out, None if points is None or before is None else (before, points[1].quality))
    return TuningResult(
        opened.spec,
        directory,
        budget,
        metric,
        tuned,
        None if points is None else (points[0].quality, points[1].quality),
        tuple(notes),
        () if points is None else points[1].agreement,
        "tau 0" if dense is None else "dense",
    )


def _densified(opened: Opened, paths: tuple[str, ...]) -> Opened:
    """Put layers back into their dense form, and add that to the passes that were run."""
    surgery = Pipeline([Densify(only=paths)]).run(opened.graph, inputs=opened.inputs, origin=opened.origin)
    surgery.graph.meta["earlier_passes"] = surgery.diff().passes
    return replace(opened, graph=surgery.graph.eval())


def _measured(opened: Opened, criteria: Criteria, dense: Opened | None, progress: Tell | None) -> tuple[Point, Point]:
    """Quality at tau 0 and with the stored setting, on the held-out data."""
    batches = eval_batches(opened)
    scores = recorded_scores(opened, kind_of(criteria))
    if dense is not None and criteria.task is not None:
        scores = judge(dense.graph, batches, criteria, progress=renamed(progress, lambda _: "dense model")).scores
    every, chosen = run_sweep(
        opened.graph, batches, criteria.task, [0.0, None], inputs=opened.inputs, progress=progress,
        dense=None if dense is None else dense.graph, dense_scores=scores, blank=criteria.blank,
    )  # fmt: skip
    return every, chosen

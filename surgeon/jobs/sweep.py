"""Weigh a saved surgery's quality against its cost: measure it at several settings, and tune it to a budget."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from surgeon.data.batch import Batch, first_batches
from surgeon.data.losses import Quality, evaluate
from surgeon.errors import SaveError, UsageError
from surgeon.jobs.open_model import Opened
from surgeon.jobs.quality import eval_task, other_data, task_for, why_unmeasured
from surgeon.jobs.set import compensation_notes
from surgeon.jobs.store import store
from surgeon.kernels.selection import check_rule
from surgeon.measure.compensation import compensate
from surgeon.measure.sweep import Dense, Point, time_settings, usual_taus
from surgeon.measure.sweep import sweep as run_sweep
from surgeon.measure.tuning import Metric, Tuned, check_budget
from surgeon.measure.tuning import tune as run_tuning
from surgeon.moe.module import compensated as compensated_layers
from surgeon.moe.module import get_rule, get_tau
from surgeon.passes.report import PassReport, Progress, dense_layers


@dataclass(frozen=True)
class Swept:
    """Quality and cost of a saved surgery at several settings, and of the dense model."""

    model: str
    data: str
    task: str
    dense: Dense
    points: list[Point]
    notes: tuple[str, ...] = ()


def parse_taus(text: str | None) -> tuple[float, ...] | None:
    """`"0.1,0.2"` → (0.0, 0.1, 0.2), None for those that suit the rules.

    Raises:
        UsageError: not numbers from 0 to 1.
    """
    if text is None:
        return None
    try:
        taus = [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        taus = []
    if not taus or not all(0.0 <= tau <= 1.0 for tau in taus):
        raise UsageError(f"--tau {text}: give numbers from 0 to 1, for example --tau 0,0.05,0.1.")
    return tuple(dict.fromkeys((0.0, *taus)))


def parse_rules(text: str | None) -> tuple[str, ...] | None:
    """`"max,top_k"` → ("max", "top_k"), None for the surgery's own.

    Raises:
        UsageError: there is no such rule.
    """
    if text is None:
        return None
    rules = tuple(part.strip() for part in text.split(",") if part.strip())
    for rule in rules:
        check_rule(rule)
    return rules


def check_files(files: Sequence[Path]) -> None:
    """Refuse files that cannot be written, before anything is measured.

    Raises:
        UsageError: neither .json nor .png. SaveError: there is no such directory, or no permission.
    """
    for file in files:
        if file.suffix not in (".json", ".png"):
            raise UsageError(f"{file}: a table is written as .json, a plot as .png.")
        if not os.access(file.parent, os.W_OK | os.X_OK) or file.is_dir():
            raise SaveError(f"Cannot write {file}: there is no such directory, or no permission to write there.")


def sweep(
    opened: Opened,
    taus: Sequence[float] | None = None,
    *,
    rules: Sequence[str] | None = None,
    oracle: bool = True,
    timed: bool = False,
    dense: Opened | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Swept:
    """Measure a model with experts at each setting, on the held-out part of its data or, without one, on all of it.

    The setting that is stored in it is measured too.

    Args:
        taus: by default those of `surgeon.measure.sweep.usual_taus`.
        dense: the model before the surgery, to be measured beside it; else its quality is taken from the record, if it
            was measured on the same data.

    Raises:
        UsageError: the model has no experts; the task is unknown. DataError: there are no labels.
    """
    task, batches = _task(opened), _batches(opened)
    multiply_adds = dense_multiply_adds(opened)
    points = run_sweep(
        opened.graph, batches, task, taus, inputs=opened.inputs, rules=rules, timed=timed,
        stored=not _among(opened, taus, rules), routers=("own", "oracle") if oracle else ("own",),
        dense_multiply_adds=multiply_adds, dense_layers=_dense_layers(opened), progress=progress,
    )  # fmt: skip
    assert opened.data is not None
    beside = Dense(multiply_adds, recorded_quality(opened))
    if dense is not None:
        milliseconds = time_settings(dense.graph, batches[0], [lambda: None])[0] if timed else None
        beside = Dense(multiply_adds, evaluate(dense.graph, batches, task), milliseconds)
    return Swept(opened.spec, opened.data.description, task, beside, points, other_data(opened))


def _among(opened: Opened, taus: Sequence[float] | None, rules: Sequence[str] | None) -> bool:
    """Whether what is stored is one of these settings: one tau and one rule for all layers, both among them."""
    own_taus, own_rules = set(get_tau(opened.graph).values()), set(get_rule(opened.graph).values())
    # With own rules they stay, whatever they are. At 0 every expert runs, whatever the rule.
    if rules is not None and own_taus != {0.0} and (len(own_rules) > 1 or not own_rules <= set(rules)):
        return False
    if taus is None:
        taus = usual_taus(opened.graph)
    return len(own_taus) == 1 and any(abs(tau - own) < 1e-6 for tau in taus for own in own_taus)


@dataclass(frozen=True)
class TuningResult:
    """What tuning found, and where it was saved.

    quality: on the held-out data, before (every expert) and after; None if it was not measured. notes: why
    it was not, and what the user may not expect.
    """

    model: str
    directory: Path
    budget: float
    metric: Metric
    tuned: Tuned
    quality: tuple[Quality, Quality] | None
    notes: tuple[str, ...] = ()


def check_tuning(budget: float, metric: Metric, *, has_dense: bool) -> None:
    """Refuse what cannot work before anything is loaded.

    Raises:
        UsageError: as `surgeon.measure.tuning.check_budget`; "ms" without the dense model.
    """
    check_budget(budget)
    if metric == "ms" and not has_dense:
        raise UsageError("--metric ms compares with the dense model's time: give it with --dense MODEL.")


def tune(
    opened: Opened,
    budget: float,
    *,
    metric: Metric = "flops",
    samples: int = 512,
    compensated: bool = False,
    out: Path | None = None,
    dense: Opened | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> TuningResult:
    """Find a tau for each layer within a budget, on training data, and store it in the surgery.

    Args:
        budget: share of the dense model's cost. samples: of the training data, on which damage is measured.
        compensated: also add the mean of what is skipped (`surgeon.measure.compensation`).
        out: where the tuned surgery goes; by default it replaces the one that was opened.
        dense: the model before the surgery, which "ms" needs as the yardstick.

    Raises:
        UsageError: as `check_tuning` and `surgeon.measure.tuning.tune`.
        SaveError: as `surgeon.surgery.artifact.save`.
    """
    check_tuning(budget, metric, has_dense=dense is not None)
    assert opened.data is not None
    calibration = first_batches(opened.data.train, samples)
    whole: float | None = dense_multiply_adds(opened)
    if metric == "ms" and dense is not None:
        whole = time_settings(dense.graph, calibration[0], [lambda: None])[0]
    earlier = compensated_layers(opened.graph)
    tuned = run_tuning(
        opened.graph, calibration, budget, inputs=opened.inputs, dense=whole, metric=metric, progress=progress
    )
    if compensated:
        compensate(opened.graph, calibration)
    notes = [*other_data(opened), *compensation_notes(opened.graph, earlier, wanted=compensated)]
    if not any(tuned.taus.values()):
        notes.append(
            f"Every expert fits a budget of {budget:.0%}: with tau 0 the model costs {tuned.cost:.1%} of the dense one."
        )
    quality, task = None, eval_task(opened)
    if task is not None:
        every, chosen = run_sweep(
            opened.graph, _batches(opened), task, [0.0, None], inputs=opened.inputs, progress=progress
        )
        quality = every.quality, chosen.quality
    else:
        notes.append(why_unmeasured(opened))
    before = recorded_quality(opened)
    directory = store(opened, out, None if quality is None or before is None else (before, quality[1]))
    return TuningResult(opened.spec, directory, budget, metric, tuned, quality, tuple(notes))


def _dense_layers(opened: Opened) -> dict[str, float]:
    return dense_layers(PassReport.from_json(report) for report in (opened.record or {}).get("passes", ()))


def dense_multiply_adds(opened: Opened) -> int | None:
    """The multiply-adds before the surgery, from its record."""
    before = ((opened.record or {}).get("passes") or [{}])[0].get("before")
    return None if before is None else int(before["multiply_adds"])


def recorded_quality(opened: Opened) -> Quality | None:
    """The dense model's quality, if it was measured on the data that is given now."""
    found = (opened.record or {}).get("quality")
    if found is None or opened.data is None or found["data"] != opened.data.fingerprint:
        return None
    return Quality(**found["before"])


def _batches(opened: Opened) -> list[Batch]:
    assert opened.data is not None
    data = opened.data
    return [Batch.from_any(item) for item in (data.eval if data.eval is not None else data.train)]


def _task(opened: Opened) -> str:
    task = task_for(opened, _batches(opened))
    if task is None:
        raise UsageError("What is the model for? Its quality cannot be measured without --task.")
    return task

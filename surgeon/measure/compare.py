"""Compare surgeries and their dense model on the same samples: curves of quality against cost, and what quality costs.

What it costs to keep a share of the dense model's quality is read off on each curve (`surgeon.measure.curves`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from surgeon.data.batch import Batch, read_batches
from surgeon.data.imitation import made_for
from surgeon.data.losses import evaluating
from surgeon.data.quality import Scores
from surgeon.display.choose import shows_progress
from surgeon.dynamic.site import find_dynamic, no_dynamic
from surgeon.errors import DataError, UsageError
from surgeon.graph.calls import as_args_kwargs
from surgeon.json_values import Plain
from surgeon.measure.curves import Curve, curves_of, read_off
from surgeon.measure.judge import Criteria, judge
from surgeon.measure.meter import measure
from surgeon.measure.sweep import Dense, Point, choose_setting, knobs_restored, sweep, time_in_turns
from surgeon.models.tasks import needs_labels
from surgeon.progress import ShowProgress, Tell, renamed
from surgeon.tracing.trace import class_task


@dataclass(frozen=True, repr=False)
class Comparison(Plain):
    """Surgeries and their dense model on the same samples.

    task: whose quality was measured; None if it is the agreement with the dense model.
    keep: the share of the dense quality to keep; a loss may be 1/keep times the dense one. wanted: that quality.
    stored: by surgery, its stored setting, if that is none of its curves' points.
    unmeasured: surgeries that are missing because the run was stopped. untimed: it was stopped before times were known.
    """

    task: str | None
    keep: float
    wanted: float
    dense: Dense
    curves: tuple[Curve, ...]
    stored: Mapping[str, Point]
    unmeasured: tuple[str, ...] = ()
    untimed: bool = False

    def __repr__(self) -> str:
        names = ", ".join(dict.fromkeys(curve.surgery for curve in self.curves))
        return f"<Comparison: {names}; keeping {self.keep:.3g} of the dense quality>"

    @property
    def stopped(self) -> bool:
        """Whether something is missing because the run was stopped."""
        return bool(self.unmeasured) or self.untimed


@shows_progress
def compare(
    surgeries: Mapping[str, nn.Module],
    batches: Iterable[Any],
    task: str | None,
    *,
    keep: float = 0.99,
    taus: Sequence[float] | None = None,
    rules: Sequence[str] | None = None,
    oracle: bool = False,
    timed: bool = False,
    stored: Collection[str] = (),
    inputs: Any = None,
    dense: nn.Module | None = None,
    dense_scores: Scores | None = None,
    dense_multiply_adds: int | None = None,
    dense_layers: Mapping[str, Mapping[str, float]] | None = None,
    blank: int = 0,
    progress: ShowProgress = None,
) -> Comparison:
    """Sweep several surgeries of one dense model on the same batches, and read off what keeps its quality.

    Ctrl-C ends it with the surgeries that are done by then.

    Args:
        surgeries: graphs with experts, by name. The first is the one that the others are compared with.
        batches: held-out data, in any form that `Batch.from_any` takes.
        task, taus, rules: as in `surgeon.sweep`. oracle: also with the true norms of the experts'
            outputs.
        keep: share of the dense model's quality to keep, above 0 and at most 1. A loss may be 1/keep times the dense
            model's.
        timed: also time calls; all settings of all surgeries, and the dense model, take turns.
        stored: surgeries whose stored setting is measured too.
        inputs: example inputs on which multiply-adds are counted, by default the first batch.
        dense: the model before the surgeries. Without it give `dense_scores` (of `surgeon.measure.judge.judge`) on the
            same batches, and `dense_multiply_adds` of a call on the inputs as far as they are known.
        dense_layers, blank: as in `sweep`; dense_layers by the name of the surgery.

    Returns:
        A curve for each surgery and rule, and what the wanted quality costs on it.

    Raises:
        UsageError: there is no surgery, one has no layers that skip, `keep` is out of range, or the dense model's
            quality cannot be known.
        DataError: labels are missing, or there are no batches.
        KeyboardInterrupt: it was stopped before a surgery was done.
    """
    check_keep(keep)
    _check_surgeries(surgeries)
    batches = read_batches(batches)
    own_task = task if needs_labels(task) else None
    if dense is None and (own_task is None or dense_scores is None):
        raise UsageError("The dense model's quality on this data is not known. Give the dense model.")
    if not batches:
        raise DataError("There are no batches to compare the surgeries on.")
    args, kwargs = (batches[0].args, batches[0].kwargs) if inputs is None else as_args_kwargs(inputs)
    if dense is not None:
        dense_multiply_adds = measure(dense, args, kwargs)[0].multiply_adds
        if own_task is not None:
            made_as = made_for(task, class_task(next(iter(surgeries.values()))))
            dense_scores = judge(
                dense, batches, Criteria(own_task, blank, made_as), progress=renamed(progress, lambda _: "dense model")
            ).scores
    found: dict[str, list[Point]] = {}
    milliseconds, untimed = None, timed
    try:
        for name, graph in surgeries.items():
            found[name] = sweep(
                graph, batches, task, taus, inputs=(args, kwargs), rules=rules, stored=name in stored, blank=blank,
                routers=("own", "oracle") if oracle else ("own",), dense=dense,
                dense_scores=dense_scores if own_task is not None else None,
                dense_multiply_adds=dense_multiply_adds, dense_layers=(dense_layers or {}).get(name),
                progress=_named(progress, name),
            )  # fmt: skip
        if timed:
            found, milliseconds = _timed(surgeries, found, batches[0], dense, own_rules=rules is None)
            untimed = False
    except KeyboardInterrupt:
        if not found:
            raise
    measured = [point.scores for points in found.values() for point in points if point.scores is not None]
    scores = _agreeing(measured[0]) if dense_scores is None or own_task is None else dense_scores
    if not all(torch.equal(one.items, scores.items) for one in measured):
        raise UsageError("The scores of the dense model are of other samples than the batches.")
    factor, quality = keep if scores.kind.higher_is_better else 1.0 / keep, scores.quality()
    return Comparison(
        own_task,
        keep,
        factor * quality.value,
        Dense(dense_multiply_adds, None if own_task is None else quality, milliseconds),
        tuple(read_off(curves_of(found), scores, factor)),
        {name: point for name, points in found.items() for point in points if point.tau is None},
        tuple(name for name in surgeries if name not in found),
        untimed,
    )


def _check_surgeries(surgeries: Mapping[str, nn.Module]) -> None:
    if not isinstance(surgeries, Mapping):
        raise UsageError('compare takes graphs by name, such as {"mine": surgery.graph}.')
    if not surgeries:
        raise UsageError("There is no surgery to compare. Give at least one.")
    for name, graph in surgeries.items():
        if not find_dynamic(graph):
            raise no_dynamic(name, "tau changes nothing")


def check_keep(keep: float) -> None:
    """Refuse a share to keep that is none.

    Raises:
        UsageError: it is not above 0 and at most 1.
    """
    if not isinstance(keep, int | float) or not 0.0 < keep <= 1.0:
        raise UsageError(
            f"The share of the dense quality to keep is {keep}, but must be above 0 and at most 1: 0.99 stands for "
            "99%, and of a loss for 1/0.99 times as much."
        )


def _named(progress: ShowProgress, name: str) -> Tell | None:
    return renamed(progress, lambda what: f"{what} {name}")


def _agreeing(scores: Scores) -> Scores:
    """The dense model's agreement with itself."""
    same = scores.items if scores.kind.higher_is_better else torch.zeros_like(scores.items)
    return replace(scores, totals=same.clone())


def _timed(
    surgeries: Mapping[str, nn.Module],
    found: Mapping[str, list[Point]],
    batch: Batch,
    dense: nn.Module | None,
    *,
    own_rules: bool,
) -> tuple[dict[str, list[Point]], float | None]:
    """The points with their milliseconds, and those of the dense model.

    All take turns, so that a slow moment of the machine meets all of them. own_rules: the points have the graphs' own.
    """
    keys = [(name, at) for name, points in found.items() for at, point in enumerate(points) if point.router == "own"]
    with ExitStack() as restored:
        knobs = {name: restored.enter_context(knobs_restored(surgeries[name])) for name in found}
        choices: list[tuple[nn.Module, Callable[[], None]]] = []
        for name, at in keys:
            graph, point = surgeries[name], found[name][at]
            rule = None if own_rules or point.tau is None else point.rule
            choices.append((graph, partial(choose_setting, graph, knobs[name], rule, point.tau)))
        if dense is not None:
            restored.enter_context(evaluating(dense))
            choices.append((dense, lambda: None))
        times = time_in_turns(choices, batch)
    of_point = dict(zip(keys, times, strict=False))
    made = {
        name: [replace(point, milliseconds=of_point.get((name, at))) for at, point in enumerate(points)]
        for name, points in found.items()
    }
    return made, None if dense is None else times[-1]

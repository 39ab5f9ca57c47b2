"""Measure a saved surgery's quality and cost at several settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from surgeon.dynamic.knobs import get_rule, get_tau
from surgeon.errors import UsageError
from surgeon.graph.calls import as_args_kwargs
from surgeon.jobs.evaluation import (
    criteria_for,
    dense_multiply_adds,
    eval_batches,
    kind_of,
    other_data,
    recorded_quality,
    recorded_scores,
)
from surgeon.jobs.open_model import Opened
from surgeon.kernels.selection import check_rule
from surgeon.measure.judge import judge
from surgeon.measure.meter import measure
from surgeon.measure.sweep import Dense, Point, RouterChoice, time_settings, usual_taus
from surgeon.measure.sweep import sweep as run_sweep
from surgeon.moe.site import find_moes
from surgeon.passes.report import dense_layers
from surgeon.progress import Tell, renamed


@dataclass(frozen=True)
class Swept:
    """Quality and cost of a saved surgery at several settings, and of the dense model.

    task: whose quality was measured; None if the data has no labels and quality is agreement.
    """

    model: str
    data: str
    task: str | None
    dense: Dense
    points: list[Point]
    notes: tuple[str, ...] = ()


def parse_taus(text: str | None) -> tuple[float, ...] | None:
    """`"0.1,0.2"` → (0.0, 0.1, 0.2); None for the values that suit the rules.

    Raises:
        UsageError: a value is not a number from 0 to 1.
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
    """`"max,top_k"` → ("max", "top_k"); None for the surgery's own.

    Raises:
        UsageError: a rule does not exist.
    """
    if text is None:
        return None
    rules = tuple(part.strip() for part in text.split(",") if part.strip())
    for rule in rules:
        check_rule(rule)
    return rules


def sweep(
    opened: Opened,
    taus: Sequence[float] | None = None,
    *,
    rules: Sequence[str] | None = None,
    oracle: bool = True,
    each_layer: bool = False,
    timed: bool = False,
    dense: Opened | None = None,
    progress: Tell | None = None,
) -> Swept:
    """Measure a model that skips at each setting, on the held-out data. If nothing is held out, use all of the data.

    The stored setting is measured too.

    Args:
        taus: by default those of `surgeon.measure.sweep.usual_taus`.
        oracle: also select by the true norms.
        each_layer: let one layer after another have each tau, while the others run everything. Then the stored setting
            and the oracle are left out.
        dense: the model before the surgery, to be measured as well. Without it, its quality is taken from the record if
            it was measured on the same data.

    Raises:
        UsageError: the model has no layers that skip, or there are labels of an unknown task.
    """
    batches = eval_batches(opened)
    criteria = criteria_for(opened, batches)
    if criteria.task is None and batches[0].labels is not None:
        raise UsageError(
            "The model's task is not known, so its quality cannot be measured. Give it with --task, or --task imitate "
            "to measure the agreement with the dense model."
        )
    multiply_adds, notes = dense_multiply_adds(opened), list(other_data(opened))
    beside = Dense(multiply_adds, recorded_quality(opened))
    scores = recorded_scores(opened, kind_of(criteria))
    if dense is not None:
        milliseconds = time_settings(dense.graph, batches[0], [lambda: None])[0] if timed else None
        if criteria.task is not None:
            verdict = judge(dense.graph, batches, criteria, progress=renamed(progress, lambda _: "dense model"))
            beside, scores = Dense(multiply_adds, verdict.quality, milliseconds), verdict.scores
        else:
            beside = Dense(multiply_adds, None, milliseconds)
    elif criteria.task is None:
        notes.append(
            "Agreement is with this surgery at tau 0. To compare with the model before the surgery, give it with "
            "--dense."
        )
    routers: tuple[RouterChoice, ...] = (
        ("own", "oracle") if oracle and not each_layer and find_moes(opened.graph) else ("own",)
    )
    points = run_sweep(
        opened.graph, batches, criteria.task, taus, inputs=opened.inputs, rules=rules, timed=timed,
        stored=not each_layer and not is_among(opened, taus, rules), routers=routers, each_layer=each_layer,
        dense=None if dense is None else dense.graph, dense_scores=scores, blank=criteria.blank,
        dense_multiply_adds=multiply_adds, dense_layers=dense_layers_of(opened), progress=progress,
    )  # fmt: skip
    assert opened.data is not None
    cost, _ = measure(opened.graph, *as_args_kwargs(opened.inputs))
    return Swept(opened.spec, opened.data.description, criteria.task, beside, points, (*notes, *cost.notes))


def is_among(opened: Opened, taus: Sequence[float] | None, rules: Sequence[str] | None) -> bool:
    """Whether the stored setting is among these: one tau and one rule for all layers, both in the lists."""
    own_taus, own_rules = set(get_tau(opened.graph).values()), set(get_rule(opened.graph).values())
    # Without given rules the stored ones are used. At tau 0 everything runs, whatever the rule.
    if rules is not None and own_taus != {0.0} and (len(own_rules) > 1 or not own_rules <= set(rules)):
        return False
    if taus is None:
        taus = usual_taus(opened.graph)
    return len(own_taus) == 1 and any(abs(tau - own) < 1e-6 for tau in taus for own in own_taus)


def dense_layers_of(opened: Opened) -> dict[str, float]:
    """The cost of the dense layers, by the path of their experts (`surgeon.passes.report.dense_layers`)."""
    return dense_layers(() if opened.record is None else opened.record.passes)

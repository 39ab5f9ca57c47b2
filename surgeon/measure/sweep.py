"""Measure quality against cost of a graph at several values of tau, with its own routers or the oracle router."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from typing import Any, Literal

import torch
from torch import nn

from surgeon.data.batch import Batch, read_batches
from surgeon.data.imitation import made_for
from surgeon.data.losses import device_of, evaluating
from surgeon.data.padding import token_mask
from surgeon.data.quality import Quality, Scores
from surgeon.display.choose import shows_progress
from surgeon.dynamic.knobs import Knobs, get_knobs, get_rule, set_knobs, set_rule, set_tau
from surgeon.dynamic.site import find_dynamic, no_dynamic
from surgeon.errors import UsageError
from surgeon.exits.halting import HaltSite
from surgeon.exits.site import find_exits
from surgeon.graph.calls import as_args_kwargs
from surgeon.json_values import NOT_IN_JSON, Plain
from surgeon.measure.cost import LayerRun
from surgeon.measure.judge import Criteria, Judge
from surgeon.measure.meter import ExpertMeter, clock, measure
from surgeon.models.tasks import needs_labels
from surgeon.progress import Progress, ShowProgress
from surgeon.tracing.trace import class_task

RouterChoice = Literal["own", "oracle"]
_USUAL_TAUS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5)
# For the rule top_k, tau is the share of the experts that is skipped.
_TOP_K_TAUS = (0.0, 0.25, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
# Below, no sum of scores reaches 1; at 1/2 halting is as published.
_HALTING_TAUS = (0.0, 0.2, 0.3, 0.4, 0.45, 0.5, 0.6, 0.7, 0.8, 0.95)
_REPEATS = 5


@dataclass(frozen=True)
class Point(Plain):
    """The quality and the cost at one setting.

    tau: the value of tau, or None for the graph's own values of tau and rule. rule: the selection rule.
    router: "own", or "oracle" for the true norms of the experts' outputs, which no router can beat by much.
    quality: the quality on the data, compared with the dense model's if that is known. Without labels it is the first
        agreement.
    executed: the share of the experts' multiply-adds that ran, without padding.
    layers: multiply-adds of the converted layers and their routers, over those of the dense layers they replaced.
    multiply_adds: multiply-adds of one whole call on the example inputs at that share.
    relative: multiply_adds over the dense model's, None if those are unknown.
    milliseconds: the time of one call on the first batch, None if it was not timed.
    shares: the share of its experts that each layer ran, by path.
    agreement: with the dense model's outputs: top-1 and KL divergence of logits, the cosine of other outputs.
    scores: of the quality, on each sample; not in JSON.
    layer: the only layer that has this tau, while the others run everything; None if all have it.
    """

    tau: float | None
    quality: Quality
    executed: float
    layers: float
    multiply_adds: int
    relative: float | None
    rule: str = "max"
    router: RouterChoice = "own"
    milliseconds: float | None = None
    shares: Mapping[str, float] = field(default_factory=dict)
    agreement: tuple[Quality, ...] = ()
    scores: Scores | None = field(default=None, repr=False, compare=False, metadata=NOT_IN_JSON)
    layer: str | None = None


class Points(list[Point]):
    """What a sweep measured, a point for each setting. A notebook shows it as a table."""

    def __repr__(self) -> str:
        if not self:
            return "<Points: none>"
        first, ran = self[0].quality, [point.executed for point in self]
        found = [point.quality.value for point in self]
        return (
            f"<Points: {len(self)} settings, {first.name} {min(found):.3g} to {max(found):.3g}, "
            f"{min(ran):.0%} to {max(ran):.0%} ran>"
        )


@dataclass(frozen=True)
class Dense(Plain):
    """The cost and the quality of the dense model, for comparison.

    multiply_adds: multiply-adds of one call on the example inputs, None if they are unknown.
    quality: the quality on the same data, None if it is unknown.
    milliseconds: the time of one call on the first batch, None if it was not timed.
    """

    multiply_adds: int | None
    quality: Quality | None = None
    milliseconds: float | None = None


@shows_progress
def sweep(
    graph: nn.Module,
    batches: Iterable[Batch],
    task: str | None,
    taus: Sequence[float | None] | None = None,
    *,
    inputs: Any,
    stored: bool = False,
    rules: Sequence[str] | None = None,
    routers: Sequence[RouterChoice] = ("own",),
    each_layer: bool = False,
    timed: bool = False,
    dense: nn.Module | None = None,
    dense_scores: Scores | None = None,
    blank: int = 0,
    dense_multiply_adds: int | None = None,
    dense_layers: Mapping[str, float] | None = None,
    progress: ShowProgress = None,
) -> Points:
    """Measure quality and cost at each tau, on all batches. The graph's own tau and rule are restored afterwards.

    Args:
        task: one of `surgeon.models.tasks.TASKS`, whose quality is measured on labels. None, or one that imitates,
            needs no labels: then quality is agreement with `dense`, or without it with this graph at tau 0.
        taus: values of tau, by default `usual_taus` of each rule. None stands for the graph's own tau and rule, and is
            measured once for all rules.
        inputs: example inputs on which multiply-adds are counted.
        stored: also measure the graph's own tau and rule.
        rules: names from `surgeon.kernels.selection.RULES`, by default the graph's own rules.
        routers: "own", "oracle", or both.
        each_layer: let one layer after another have each tau, while the others run everything.
        timed: also time calls, taking turns between the settings.
        dense: the model before the surgery. Agreement with it is measured at each setting.
        dense_scores: its scores on the labels of the same batches (`surgeon.measure.judge.judge`), to compare with.
        blank: for the task "ctc", the class that stands for no character.
        dense_multiply_adds: the multiply-adds of the dense model on the example inputs.
        dense_layers: the cost of the dense layers, as multiply-adds for one token, by the path of their experts. The
            default is the cost of all experts, which differs if a layer was first replaced by one with another cost.
        progress: True shows it, a function is called with each `Progress`.

    Raises:
        UsageError: the graph has no layers that skip, there is no such rule, or a tau is outside [0, 1].
        DataError: labels are missing.
    """
    sites = find_dynamic(graph)
    if not sites:
        raise no_dynamic("The model", "tau changes nothing")
    for name, values in (("taus", taus), ("rules", rules)):
        if values is not None and (isinstance(values, str) or not isinstance(values, Sequence)):
            raise UsageError(f"{name} is {values!r}, but must be a list.")
    batches = read_batches(batches)
    layers = [site.path for site in sites] if each_layer else [None]
    combined = [
        (router, None if tau is None else rule, tau, layer if tau else None)
        for router, rule, layer in product(routers, rules or (None,), layers)
        for tau in (*(usual_taus(graph, rule) if taus is None else taus), *((None,) if stored else ()))
    ]
    settings = list(dict.fromkeys(combined))
    own_task = task if needs_labels(task) else None
    criteria = Criteria(own_task, blank, made_for(task, class_task(graph)))
    points = []
    if callable(progress):
        progress(Progress("sweep", 0, 0))
    with knobs_restored(graph) as own, evaluating(graph if dense is None else dense):
        counter = _Counter(graph, inputs)

        def choose(rule: str | None, tau: float | None, layer: str | None = None) -> None:
            choose_setting(graph, own, rule, tau, layer)

        def outputs_of_dense(batch: Batch) -> Any:
            if dense is None and own_task is not None:
                return None
            if dense is None:
                choose(None, 0.0)
            moved = batch.to(device_of(graph))
            return (graph if dense is None else dense)(*moved.args, **moved.kwargs)

        meters, judges = [], []
        for router, rule, tau, layer in settings:
            choose(rule, tau, layer)
            meters.append(ExpertMeter(graph, oracle=router == "oracle"))
            judges.append(Judge(criteria))
        # All settings of a batch in turn, so that the dense model runs once.
        for index, given in enumerate(batches):
            expected = outputs_of_dense(given)
            for number, (_, rule, tau, layer) in enumerate(settings):
                choose(rule, tau, layer)
                for batch, outputs in run_batches(meters[number], [given]):
                    judges[number].add(outputs, batch, expected)
                if callable(progress):
                    done, total = index * len(settings) + number + 1, len(settings) * len(batches)
                    progress(Progress("sweep", done, total, {} if tau is None else {"tau": tau}))
        for (router, rule, tau, layer), meter, marks in zip(settings, meters, judges, strict=True):
            multiply_adds = counter.multiply_adds(meter.layers)
            verdict = marks.verdict(dense_scores)
            points.append(
                Point(
                    tau,
                    verdict.first,
                    executed_share(meter.layers),
                    layers_share(meter.layers, dense_layers),
                    multiply_adds,
                    None if not dense_multiply_adds else multiply_adds / dense_multiply_adds,
                    " ".join(dict.fromkeys(own.rules.values())) if rule is None else rule,
                    router,
                    shares={path: layer.share for path, layer in meter.layers.items()},
                    agreement=verdict.agreement,
                    scores=verdict.first_scores,
                    layer=layer,
                )
            )
        if timed:
            calls = [partial(choose, *setting) for router, *setting in settings if router == "own"]
            times = iter(time_settings(graph, batches[0], calls))
            points = [replace(p, milliseconds=next(times)) if p.router == "own" else p for p in points]
    return Points(points)


def choose_setting(graph: nn.Module, own: Knobs, rule: str | None, tau: float | None, layer: str | None = None) -> None:
    """Set one rule and one tau for all layers; where one is None, the graph's own.

    layer: the path of the only one that gets this tau, while the others run everything.
    """
    set_knobs(graph, own)
    if rule is not None:
        set_rule(graph, rule)
    if tau is not None:
        set_tau(graph, tau if layer is None else {layer: tau, "*": 0.0})


def usual_taus(graph: nn.Module, rule: str | None = None) -> tuple[float, ...]:
    """Return the default values of tau for this rule, or for the graph's own rules."""
    if all(isinstance(site, HaltSite) for site in find_dynamic(graph)):
        return _HALTING_TAUS
    rules = set(get_rule(graph).values()) if rule is None else {rule}
    # Without experts, tau is the share of the inputs that linear layers skip, or how unsure early exits may be.
    return _TOP_K_TAUS if rules <= {"top_k"} and not find_exits(graph) else _USUAL_TAUS


@contextmanager
def knobs_restored(graph: nn.Module) -> Iterator[Knobs]:
    """Set evaluation mode and give the graph's settings. Restore the mode and the settings at the end."""
    knobs, training = get_knobs(graph), graph.training
    graph.eval()
    try:
        yield knobs
    finally:
        set_knobs(graph, knobs)
        graph.train(training)


def run_batches(meter: ExpertMeter, batches: Iterable[Batch]) -> Iterable[tuple[Batch, Any]]:
    """Yield each batch, moved to the graph's device, with its output. The meter counts all tokens except padding."""
    device = device_of(meter.module)
    with torch.no_grad():
        for batch in (given.to(device) for given in batches):
            meter.token_mask = lambda lead, batch=batch: token_mask(batch, lead)
            yield batch, meter.call(batch.args, batch.kwargs)


def executed_share(layers: Mapping[str, LayerRun]) -> float:
    """Return the share of the experts' multiply-adds that ran."""
    everything = sum(layer.multiply_adds for layer in layers.values())
    return sum(layer.executed_multiply_adds for layer in layers.values()) / everything if everything else 1.0


def layers_share(layers: Mapping[str, LayerRun], dense: Mapping[str, float] | None = None) -> float:
    """Return the executed multiply-adds of the converted layers and routers over those of the replaced dense layers.

    dense: multiply-adds of the dense layers per token, by path. The default for a layer is the cost of all its experts.
    """
    dense = dense or {}
    everything = sum(
        layer.tokens * dense[path] if path in dense else layer.multiply_adds + layer.tokens * layer.gate
        for path, layer in layers.items()
    )
    ran = sum(layer.executed_multiply_adds + layer.tokens * layer.per_token for layer in layers.values())
    return ran / everything if everything else 1.0


class _Counter:
    """Counts the multiply-adds of one call on the example inputs, given the share of each layer that runs."""

    def __init__(self, graph: nn.Module, inputs: Any) -> None:
        args, kwargs = as_args_kwargs(inputs)
        self._all, self._layers = measure(graph, args, kwargs)

    def multiply_adds(self, layers: Mapping[str, LayerRun]) -> int:
        skipped = sum((1.0 - layers[path].share) * layer.multiply_adds for path, layer in self._layers.items())
        return int(self._all.multiply_adds - skipped)


def time_settings(
    graph: nn.Module, batch: Batch, choices: Sequence[Callable[[], None]], repeats: int = _REPEATS
) -> list[float]:
    """Return the median milliseconds of a call for each choice. The choices take turns, and this is repeated."""
    return time_in_turns([(graph, choose) for choose in choices], batch, repeats)


def time_in_turns(
    choices: Sequence[tuple[nn.Module, Callable[[], None]]], batch: Batch, repeats: int = _REPEATS
) -> list[float]:
    """Return the median milliseconds of a call of each model, which is made ready by the function beside it.

    The models take turns, and this is repeated.
    """
    times: list[list[float]] = [[] for _ in choices]
    with torch.no_grad():
        for _ in range(repeats + 1):
            for found, (model, choose) in zip(times, choices, strict=True):
                device = device_of(model)
                moved = batch.to(device)
                choose()
                started = clock(device)
                model(*moved.args, **moved.kwargs)
                found.append(1000 * (clock(device) - started))
    return [statistics.median(found[1:]) for found in times]

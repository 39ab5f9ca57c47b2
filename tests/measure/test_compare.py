"""Comparisons of surgeries: the numbers of their sweeps, read off alike, on the same samples."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import surgeon
from surgeon.data.batch import Batch
from surgeon.dynamic.knobs import get_rule, get_tau, set_rule, set_tau
from surgeon.errors import DataError, UsageError
from surgeon.graph.ownership import own_parameters
from surgeon.graph.traced import TracedGraph, fork
from surgeon.measure.compare import Comparison, compare
from surgeon.measure.judge import Criteria, judge
from surgeon.measure.meter import measure
from surgeon.measure.read_off import kept_at
from surgeon.measure.sweep import sweep
from surgeon.passes import Moeify
from surgeon.progress import Progress
from surgeon.surgery.pipeline import Pipeline
from tests.small_models import WIDTH, Plain, Wrapped, labelled_vectors, stack, vectors

TASK, TAUS = "classification", (0.0, 0.3, 0.6, 0.9)
DENSE = stack("relu").eval()


def of_dense(batch: Batch) -> Batch:
    """A batch with the classes that the dense model gives, so that it is always right."""
    with torch.no_grad():
        return replace(batch, labels=DENSE(**batch.kwargs).argmax(-1))


DATA = [of_dense(Batch.from_any(item)) for item in labelled_vectors(10)]


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    made: dict[str, Any] = {}
    for name, experts in (("coarse", 4), ("fine", 8)):
        passes = [Moeify(experts=experts, router="neurons", epochs=0)]
        made[name] = Pipeline(passes).run(DENSE, inputs=vectors(), data=labelled_vectors(3)).graph.eval()
    return made


def run(models: dict[str, Any], **options: Any) -> Comparison:
    return compare(models, DATA, **{"task": TASK, "dense": DENSE, "taus": TAUS, **options})


def test_the_numbers_are_those_of_sweeps(models: dict[str, Any]) -> None:
    found = run(models, keep=0.9)
    inputs = dict(DATA[0].kwargs)
    whole = measure(DENSE, (), inputs)[0].multiply_adds
    verdict = judge(DENSE, DATA, Criteria(TASK))
    assert (found.dense.quality, found.dense.multiply_adds) == (verdict.quality, whole)
    assert verdict.quality is not None
    assert found.wanted == pytest.approx(0.9 * verdict.quality.value)
    assert [(curve.surgery, curve.rule, curve.router) for curve in found.curves] == [
        ("coarse", "max", "own"), ("fine", "max", "own")
    ]  # fmt: skip
    for curve in found.curves:
        points = sweep(
            models[curve.surgery], DATA, TASK, TAUS, inputs=inputs, dense=DENSE, dense_scores=verdict.scores,
            dense_multiply_adds=whole,
        )  # fmt: skip
        assert list(curve.points) == points
        values = [point.quality.value for point in points]
        for kept, costs in ((curve.layers, [p.layers for p in points]), (curve.whole, [p.relative for p in points])):
            by_hand = kept_at(costs, values, found.wanted, higher_is_better=True)  # type: ignore[arg-type]
            assert (kept is None) == (by_hand is None)
            if kept is not None and by_hand is not None:
                assert (kept.share, kept.at_most) == (by_hand.share, by_hand.at_most)
                assert kept.low is not None
                assert kept.low <= kept.share
    assert not found.stopped


def test_surgeries_differ_from_the_first(models: dict[str, Any]) -> None:
    first, second = run(models, keep=0.93).curves
    assert (first.cost_difference, first.quality_difference) == (None, None)
    assert first.whole is not None
    assert second.whole is not None
    difference, better = second.cost_difference, second.quality_difference
    assert difference is not None
    assert difference.value == pytest.approx(second.whole.share - first.whole.share)
    assert (second.whole.at_most, difference.bound) == (True, "at most")
    # By hand: the line of the second surgery at the cost of the first.
    costs = [point.relative for point in second.points]
    index = next(i for i, cost in enumerate(costs) if cost is not None and cost <= first.whole.share)
    (x0, y0), (x1, y1) = (
        (p.relative or 0.0, p.quality.value) for p in (second.points[index], second.points[index - 1])
    )
    there = y0 + (y1 - y0) * (first.whole.share - x0) / (x1 - x0)
    assert better is not None
    assert better.value == pytest.approx(there - 0.93)


def test_a_surgery_does_not_differ_from_itself(models: dict[str, Any]) -> None:
    """What is hard for both cancels, whatever samples are drawn."""
    twice = {"one": models["coarse"], "two": models["coarse"]}
    first, second = compare(twice, DATA, TASK, dense=DENSE, taus=TAUS, keep=0.97).curves
    assert first.whole is not None
    assert first.whole.low is not None
    assert first.whole.low < first.whole.share
    difference, better = second.cost_difference, second.quality_difference
    assert difference is not None
    assert (difference.value, difference.low, difference.high) == (0.0, 0.0, 0.0)
    assert better is not None
    assert better.value == 0.0
    both = compare(twice, DATA, TASK, dense=DENSE, taus=TAUS, keep=0.5).curves
    assert [curve.whole is not None and curve.whole.at_most for curve in both] == [True, True]
    assert both[1].cost_difference is None


def test_a_loss_may_be_larger_by_the_share() -> None:
    torch.manual_seed(0)
    dense = Wrapped(Plain(WIDTH, 4 * WIDTH, act=F.relu)).eval()
    x = torch.randn(6, 4, 5, WIDTH)
    data = [Batch((one,), {}, dense(one).argmax(-1)) for one in x]
    graph = Pipeline([Moeify(experts=8, router="neurons", epochs=0)]).run(dense, inputs=x[0], data=data).graph
    found = compare({"one": graph}, data, "masked-lm", dense=dense, taus=TAUS, keep=0.95)
    quality = found.dense.quality
    assert quality is not None
    assert (quality.name, quality.higher_is_better) == ("loss per token", False)
    assert found.wanted == pytest.approx(quality.value / 0.95)
    whole = found.curves[0].whole
    points = found.curves[0].points
    worse = [point.quality.value > found.wanted for point in points]
    assert worse == sorted(worse) != [worse[0]] * len(worse)  # some settings keep it, and the cheapest do not
    cheapest = worse.index(True)
    assert whole is not None
    assert points[cheapest].relative < whole.share < points[cheapest - 1].relative  # type: ignore[operator]


def test_without_labels_agreement_is_kept(models: dict[str, Any]) -> None:
    bare = [replace(batch, labels=None) for batch in DATA]
    found = compare({"fine": models["fine"]}, bare, None, dense=DENSE, taus=TAUS, keep=0.95)
    assert (found.task, found.dense.quality, found.wanted) == (None, None, 0.95)
    (curve,) = found.curves
    assert curve.points[0].quality.name == "top-1 agreement"
    assert curve.whole is not None
    with pytest.raises(UsageError, match="Give the dense model"):
        compare({"fine": models["fine"]}, bare, None)


def test_recorded_scores_stand_for_the_dense_model(models: dict[str, Any]) -> None:
    verdict = judge(DENSE, DATA, Criteria(TASK))
    whole = measure(DENSE, (), DATA[0].kwargs)[0].multiply_adds
    known = run(models, dense=None, dense_scores=verdict.scores, dense_multiply_adds=whole)
    assert [curve.whole for curve in known.curves] == [curve.whole for curve in run(models).curves]
    unknown = run(models, dense=None, dense_scores=verdict.scores)
    assert [curve.whole for curve in unknown.curves] == [None, None]
    assert [curve.layers for curve in unknown.curves] == [curve.layers for curve in known.curves]
    other = judge(DENSE, DATA[:2], Criteria(TASK)).scores
    with pytest.raises(UsageError, match="of other samples"):
        run(models, dense=None, dense_scores=other)


def test_settings_are_given_back_and_stored_ones_measured(models: dict[str, Any]) -> None:
    graph = fork(models["fine"])
    own_parameters(graph)
    first, second = get_tau(graph)
    set_tau(graph, {first: 0.7, second: 0.1})
    set_rule(graph, "top_k", first)
    before = get_tau(graph), get_rule(graph)
    found = compare(
        {"plain": models["coarse"], "mixed": graph}, DATA, TASK, dense=DENSE, taus=TAUS, stored=["mixed"],
        oracle=True, timed=True,
    )  # fmt: skip
    assert (get_tau(graph), get_rule(graph)) == before
    assert list(found.stored) == ["mixed"]
    assert found.stored["mixed"].tau is None
    assert [(curve.surgery, curve.rule, curve.router) for curve in found.curves] == [
        ("plain", "max", "own"), ("plain", "max", "oracle"), ("mixed", "top_k max", "own"),
        ("mixed", "top_k max", "oracle"),
    ]  # fmt: skip
    for curve in found.curves:
        assert all((point.milliseconds is not None) == (curve.router == "own") for point in curve.points)
    assert found.dense.milliseconds is not None


def test_settings_and_surgeries_take_turns(models: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[tuple[int, tuple[float, ...]]] = []

    def note(choices: Any, batch: Batch) -> list[float]:
        for model, choose in choices:
            choose()
            order.append((id(model), tuple(get_tau(model).values()) if isinstance(model, TracedGraph) else ()))
        return [float(number) for number, _ in enumerate(choices)]

    monkeypatch.setattr("surgeon.measure.compare.time_in_turns", note)
    found = run(models, timed=True, taus=(0.0, 0.5), keep=0.01)
    coarse, fine = id(models["coarse"]), id(models["fine"])
    every, half = (0.0, 0.0), (0.5, 0.5)
    assert order == [(coarse, every), (coarse, half), (fine, every), (fine, half), (id(DENSE), ())]
    assert [[point.milliseconds for point in curve.points] for curve in found.curves] == [[0.0, 1.0], [2.0, 3.0]]
    # A hundredth of the quality is kept by the cheapest setting, whose time is shown.
    assert [curve.milliseconds for curve in found.curves] == [1.0, 3.0]
    assert found.dense.milliseconds == 4.0


def test_what_was_measured_outlives_an_interruption(models: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def stop_at(what: str) -> Any:
        def progress(moment: Progress) -> None:
            if moment.what == what and moment.done == 3:
                raise KeyboardInterrupt

        return progress

    stopped = run(models, timed=True, progress=stop_at("sweep fine"))
    assert (stopped.stopped, stopped.unmeasured, stopped.untimed) == (True, ("fine",), True)
    assert [curve.whole for curve in stopped.curves] == [run(models).curves[0].whole]
    with pytest.raises(KeyboardInterrupt):
        run(models, progress=stop_at("sweep coarse"))

    def interrupt(*_: object) -> list[float]:
        raise KeyboardInterrupt

    monkeypatch.setattr("surgeon.measure.compare.time_in_turns", interrupt)
    late = run(models, timed=True)
    assert (late.stopped, late.unmeasured, late.untimed) == (True, (), True)


def test_a_comparison_as_json_values(models: dict[str, Any]) -> None:
    found = surgeon.compare({"fine": models["fine"]}, DATA, TASK, dense=DENSE, taus=(0.9,)).to_dict()
    assert json.loads(json.dumps(found)) == found
    (curve,) = found["curves"]
    assert "scores" not in curve["points"][0]
    assert curve["points"][0]["quality"]["name"] == "accuracy"


def test_what_cannot_be_compared_is_refused(models: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"must be above 0 and at most 1: 0\.99 stands for 99%"):
        run(models, keep=1.01)
    for surgeries, batches, words in (
        ({}, DATA, "There is no surgery to compare"),
        ({"net": DENSE}, DATA, "net has no layers that skip"),
        ({"fine": models["fine"]}, [], "There are no batches"),
    ):
        with pytest.raises((UsageError, DataError), match=words):
            compare(surgeries, batches, TASK, dense=DENSE)
    with pytest.raises(UsageError, match="quality on this data is not known"):
        compare({"fine": models["fine"]}, DATA, TASK)

"""Tuning: within the budget, never worse than one tau for all, and refused where no tau is cheap enough."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from surgeon.data.batch import Batch
from surgeon.dynamic.knobs import get_rule, get_tau, set_rule, set_tau
from surgeon.errors import DataError, UsageError
from surgeon.graph.ownership import own_parameters
from surgeon.graph.traced import TracedGraph, fork
from surgeon.measure.meter import ExpertMeter, measure
from surgeon.measure.sweep import time_settings
from surgeon.measure.tuning import Tuned, Tuner, tune
from surgeon.passes import Densify, Lower, Moeify, Sparsify
from surgeon.progress import Progress
from surgeon.surgery.pipeline import Pipeline
from tests.small_models import CLASSES, labelled_vectors, stack, vectors
from tests.worked_time import DENSE, milliseconds, replace_clock

DATA = labelled_vectors(4)
BATCHES = [Batch.from_any(item) for item in DATA]
INPUTS = vectors()


@pytest.fixture(scope="module")
def base() -> tuple[TracedGraph, int]:
    """A trained model with experts, some of its layers much sparser than others, and what the dense one costs."""
    passes = [
        Sparsify(steps=250, lr=3e-3, target={"*.0.*": 0.3, "*.1.*": 0.08, "*": 0.15}),
        Moeify(experts=16, router="neurons", router_width=8, epochs=0), Lower(),
    ]  # fmt: skip
    surgery = Pipeline(passes).run(stack("relu", layers=3), inputs=INPUTS, data=DATA)
    before = surgery.reports[0].before
    assert before is not None
    return surgery.graph.eval(), before.multiply_adds


@pytest.fixture
def graph(base: tuple[TracedGraph, int]) -> TracedGraph:
    copied = fork(base[0])
    own_parameters(copied)
    return copied


@pytest.fixture
def dense(base: tuple[TracedGraph, int]) -> int:
    return base[1]


def check(graph: TracedGraph, found: Tuned, dense: float) -> None:
    """What tuning says of its result is what measuring the result gives."""
    set_tau(graph, 0.0)
    with torch.no_grad():
        expected = torch.cat([graph(*batch.args, **batch.kwargs) for batch in BATCHES]).log_softmax(-1)
    for taus, cost, damage in (
        (found.taus, found.cost, found.damage),
        (dict.fromkeys(found.taus, found.uniform), found.uniform_cost, found.uniform_damage),
    ):
        set_tau(graph, taus)
        meter = ExpertMeter(graph)
        with torch.no_grad():
            outputs = torch.cat([meter.call(batch.args, batch.kwargs) for batch in BATCHES]).log_softmax(-1)
        divergence = float(F.kl_div(outputs, expected, log_target=True, reduction="batchmean"))
        assert damage == pytest.approx(divergence, rel=1e-3, abs=1e-7)
        everything, layers = measure(graph, (), INPUTS)
        skipped = sum(layers[path].multiply_adds * (1 - layer.share) for path, layer in meter.layers.items())
        assert cost == pytest.approx((everything.multiply_adds - skipped) / dense, rel=1e-6)
    set_tau(graph, found.taus)


@pytest.mark.parametrize("budget", [0.5, 0.65, 0.8])
@pytest.mark.parametrize("rule", ["max", "energy"])
def test_tuned_is_within_the_budget_and_no_worse_than_one_tau(
    graph: TracedGraph, dense: int, budget: float, rule: str
) -> None:
    set_rule(graph, rule)
    found = tune(graph, BATCHES, budget, inputs=INPUTS, dense=dense)
    assert found.cost <= budget
    assert found.uniform_cost <= budget
    assert found.damage <= found.uniform_damage
    assert get_tau(graph) == pytest.approx(found.taus)
    assert set(get_rule(graph).values()) == {rule}
    check(graph, found, dense)


def test_moving_cost_between_layers_helps(graph: TracedGraph, dense: int) -> None:
    """With one tau, top_k gives layers that need very different shares the same."""
    set_rule(graph, "top_k")
    found = tune(graph, BATCHES, 0.6, inputs=INPUTS, dense=dense)
    assert found.rounds >= 1
    assert found.damage < 0.5 * found.uniform_damage
    assert set(found.shares) == set(found.taus) == {f"blocks.{layer}.ffn.moe" for layer in range(3)}
    # The first layer was trained to have the most active neurons.
    assert found.shares["blocks.0.ffn.moe"] > 1.5 * max(found.shares[f"blocks.{layer}.ffn.moe"] for layer in (1, 2))


def test_a_smaller_budget_costs_more_quality(graph: TracedGraph, dense: int) -> None:
    damages = [tune(graph, BATCHES, budget, inputs=INPUTS, dense=dense).damage for budget in (0.5, 0.7, 0.95)]
    assert damages == sorted(damages, reverse=True)
    assert damages[0] > 2 * damages[2]


def test_a_budget_that_all_experts_meet_keeps_them_all(graph: TracedGraph, dense: int) -> None:
    found = tune(graph, DATA, 2.0, inputs=INPUTS, dense=dense)
    assert set(found.taus.values()) == {0.0}
    assert (found.damage, found.uniform_damage, found.rounds) == (0.0, 0.0, 0)


def test_without_the_dense_cost_the_graph_with_all_experts_is_the_yardstick(graph: TracedGraph, dense: int) -> None:
    found = tune(graph, BATCHES, 0.6, inputs=INPUTS)
    set_tau(graph, 0.0)
    full = measure(graph, (), INPUTS)[0].multiply_adds
    assert full > dense
    set_tau(graph, found.taus)
    check(graph, found, full)


def test_a_budget_that_cannot_be_met_is_refused_with_what_can(graph: TracedGraph, dense: int) -> None:
    set_tau(graph, 0.25)
    words = r"A budget of 5% cannot be met. With the least that can run .* still costs \d+\.\d% of the dense model"
    with pytest.raises(UsageError, match=words):
        tune(graph, BATCHES, 0.05, inputs=INPUTS, dense=dense)
    assert set(get_tau(graph).values()) == {0.25}
    assert not graph.training


def test_what_only_the_largest_tau_reaches_is_found(graph: TracedGraph, dense: int) -> None:
    """With a fixed number of experts, one of sixteen runs at tau = 1 and two at 0.9."""
    set_rule(graph, "top_k")
    set_tau(graph, 1.0)
    least = measure(graph, (), INPUTS)[0].executed_multiply_adds / dense
    found = tune(graph, BATCHES, least + 1e-6, inputs=INPUTS, dense=dense)
    assert found.cost == pytest.approx(least)
    assert set(found.shares.values()) == {1 / 16}


@pytest.mark.parametrize("budget", [0.7, 0.85, 1.0])
def test_layers_for_which_skipping_does_not_pay_are_counted_as_dense(
    graph: TracedGraph, dense: int, budget: float
) -> None:
    usual = fork(graph)
    own_parameters(usual)
    found = tune(graph, BATCHES, budget, inputs=INPUTS, dense=dense, densify=True)
    assert found.dense == tuple(path for path, tau in found.taus.items() if not tau)
    assert found.dense or budget < 0.85
    assert found.cost <= budget
    if budget == 1.0:
        assert found.cost == pytest.approx(1.0)
        assert found.damage == 0.0
    else:
        assert found.damage <= 1.05 * tune(usual, BATCHES, budget, inputs=INPUTS, dense=dense).damage
    made = Pipeline([Densify(only=found.dense)]).run(graph, inputs=INPUTS).graph.eval() if found.dense else graph
    assert {path for path in found.taus if path not in get_tau(made)} == set(found.dense)
    everything, layers = measure(made, (), INPUTS)
    meter = ExpertMeter(made)
    with torch.no_grad():
        for batch in BATCHES:
            meter.call(batch.args, batch.kwargs)
    skipped = sum(layers[path].multiply_adds * (1 - layer.share) for path, layer in meter.layers.items())
    assert found.cost == pytest.approx((everything.multiply_adds - skipped) / dense, rel=1e-6)


def test_time_of_dense_layers_is_not_known(graph: TracedGraph) -> None:
    with pytest.raises(UsageError, match="layers that are dense again is not known before"):
        Tuner(graph, BATCHES, inputs=INPUTS, metric="ms", densify=True)


@pytest.mark.parametrize("budget", [0.0, -1.0, float("nan")])
def test_budgets_are_positive(graph: TracedGraph, budget: float) -> None:
    with pytest.raises(UsageError, match=r"but must be a positive share of the dense model's cost"):
        tune(graph, BATCHES, budget, inputs=INPUTS)


def test_a_percentage_is_no_budget(graph: TracedGraph) -> None:
    for call in (tune, lambda *args, inputs: Tuner(graph, BATCHES, inputs=inputs).tune(40)):
        with pytest.raises(UsageError, match=r"The budget is 40, but must be a share .*: 0\.4 stands for 40%"):
            call(graph, BATCHES, 40, inputs=INPUTS)


def test_tuning_needs_experts() -> None:
    import surgeon

    with pytest.raises(UsageError, match="The model has no layers that skip"):
        tune(surgeon.trace(stack("relu"), INPUTS), BATCHES, 0.5, inputs=INPUTS)


@pytest.mark.parametrize(("dense", "budget"), [(None, 0.6), (DENSE, 0.7)])
def test_time_can_be_the_budget(
    graph: TracedGraph, monkeypatch: pytest.MonkeyPatch, dense: float | None, budget: float
) -> None:
    replace_clock(monkeypatch)
    set_tau(graph, 0.3)
    found = tune(graph, BATCHES, budget, inputs=INPUTS, dense=dense, metric="ms")
    whole = dense or milliseconds(dict.fromkeys(found.shares, 1.0))
    assert found.cost == pytest.approx(milliseconds(found.shares) / whole, rel=1e-6)
    for cost in (found.cost, found.uniform_cost):
        assert 0.9 * budget < cost <= budget
    assert found.damage <= found.uniform_damage
    assert get_tau(graph) == pytest.approx(found.taus)


def test_a_budget_in_time_that_cannot_be_met_is_refused(graph: TracedGraph, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_clock(monkeypatch)
    with pytest.raises(UsageError, match=r"A budget of 39% cannot be met. .* the model still costs 4\d\.\d% of"):
        tune(graph, BATCHES, 0.39, inputs=INPUTS, dense=DENSE, metric="ms")


class Elsewhere(Batch):
    """A batch on a device that is not the graph's."""

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Batch:
        assert torch.device(device or "meta").type == "cpu"
        return Batch((), INPUTS)


def test_batches_are_moved_to_the_graph(graph: TracedGraph) -> None:
    away = [Elsewhere((), {"x": INPUTS["x"].to("meta")})]
    want = tune(graph, [INPUTS], 0.7, inputs=INPUTS)
    assert tune(graph, away, 0.7, inputs=INPUTS) == want
    assert len(time_settings(graph, away[0], [lambda: None], 1)) == 1


def test_tuning_needs_data(graph: TracedGraph) -> None:
    with pytest.raises(DataError, match="There is no data to tune on: no batches were given"):
        tune(graph, [], 0.5, inputs=INPUTS)


def test_of_very_many_answers_a_part_is_kept(graph: TracedGraph, dense: int, monkeypatch: pytest.MonkeyPatch) -> None:
    every = 3
    numbers = sum(batch.size for batch in BATCHES) * CLASSES
    monkeypatch.setattr("surgeon.measure.tuning._KEPT", numbers // every)
    tuner = Tuner(graph, BATCHES, inputs=INPUTS, dense=dense)
    # Of the eight samples of each batch the first, the fourth and the seventh.
    assert [tuple(one.shape) for ((one, _),) in tuner._expected] == [(3, CLASSES)] * len(BATCHES)
    found = tuner.tune(0.7)
    with torch.no_grad():
        outputs = torch.cat([graph(**batch.kwargs)[::every] for batch in BATCHES]).log_softmax(-1)
        set_tau(graph, 0.0)
        expected = torch.cat([graph(**batch.kwargs)[::every] for batch in BATCHES]).log_softmax(-1)
    divergence = float(F.kl_div(outputs, expected, log_target=True, reduction="batchmean"))
    assert found.damage == pytest.approx(divergence, rel=1e-3, abs=1e-7)


def test_labels_are_not_needed_and_progress_ends(graph: TracedGraph, dense: int) -> None:
    moments: list[Progress] = []
    unlabelled = [Batch(batch.args, batch.kwargs) for batch in BATCHES[:2]]
    tune(graph, unlabelled, 0.7, inputs=INPUTS, dense=dense, progress=moments.append)
    assert {moment.what for moment in moments} == {"tuning"}
    first, *counted = moments
    assert (first.total, first.values) == (0, {})
    assert all(1 <= moment.done <= moment.total for moment in counted)
    assert all(set(moment.values) == {"damage"} for moment in counted)

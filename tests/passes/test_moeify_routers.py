"""moeify's routers: how they start, what they are asked, and what they learn."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from surgeon.data.batch import Batch
from surgeon.data.data import Data
from surgeon.dynamic.knobs import get_rule, set_rule, set_tau
from surgeon.graph.ownership import own_parameters
from surgeon.graph.traced import TracedGraph, fork
from surgeon.measure.meter import ExpertMeter, measure
from surgeon.moe.router import expert_norms, target
from surgeon.moe.site import find_moes
from surgeon.passes import Lower, Moeify
from surgeon.training.observe import collect
from tests.passes.experts import layer
from tests.small_models import WIDTH, vectors


@pytest.mark.parametrize(("experts", "hidden", "width"), [
    (48, 1536, 64),   # 2.5% of 384 · 1536 · 2 over 384 + 48, a multiple of 8
    (4, 32, 8),       # at least 8
    (64, 200_000, 128),  # at most 128
])  # fmt: skip
def test_width_of_a_router_follows_from_what_it_may_cost(experts: int, hidden: int, width: int) -> None:
    class Site:
        path, d_in, multiply_adds = "ffn", 384, 2 * 384 * hidden

    site: Any = Site()
    site.neurons = hidden
    assert Moeify(experts=experts)._width([site]) == width
    assert Moeify(experts=experts, router_width=5)._width([site]) == 5


def share_of_norms(graph: TracedGraph, data: list[Any], tau: float) -> float:
    """How much of the experts' output, by their norms, a fixed number of experts of highest score keep."""
    kept = total = 0.0
    set_rule(graph, "top_k")
    for site in find_moes(graph):
        moe = layer(graph, site.path)
        x = collect(graph, [site.nodes[0].args[0].name], Data.of(data), tokens=10**6)  # type: ignore[union-attr]
        (values,) = x.values()
        with torch.no_grad():
            norms = expert_norms(values, moe.weights, moe.activation)
            set_tau(graph, tau)
            scores, threshold = moe.route(values)
            kept += float((norms * (scores >= threshold.unsqueeze(-1))).sum())
            total += float(norms.sum())
    return kept / total


def converted(sharp: tuple[TracedGraph, list[Any]], **options: Any) -> TracedGraph:
    graph = fork(sharp[0])
    own_parameters(graph)
    usual = {"experts": 8, "split": "weights", "router": "trained", "router_width": 16, "epochs": 30, "lr": 1e-2}
    options = {**usual, **options}
    if options["epochs"] == 0:
        del options["lr"]
    if options["router"] in ("centres", "representatives") or options.get("router_depth") == 1:
        del options["router_width"]
    Moeify(**options).apply(graph, inputs=vectors(), data=sharp[1])
    return graph.eval()


@pytest.mark.parametrize("options", [
    {"objective": "norm"}, {"objective": "relative"}, {"objective": "log"}, {"objective": "activation"},
    {"objective": "norm", "underestimate": 4.0}, {"exposure": 0.3},
    {"objective": "norm", "router_output": "softplus"}, {"router_output": "relu"},
    {"router": "neurons", "epochs": 0}, {"router": "neurons", "epochs": 0, "objective": "relative"},
    {"router": "neurons", "epochs": 5},
    {"layer_by_layer": True}, {"layer_by_layer": True, "exposure": 0.3}, {"layer_by_layer": True, "router": "neurons"},
    {"router_depth": 1, "objective": "norm"}, {"router_depth": 1, "objective": "activation", "layer_by_layer": True},
    {"labels": "hidden"}, {"labels": "hidden", "router": "neurons", "epochs": 0},
    {"router": "centres", "objective": "activation", "epochs": 0},
    {"router": "centres", "objective": "activation", "epochs": 0, "router_depth": 1},
    {"router": "centres", "objective": "activation", "shared": 1},
    {"router": "representatives", "split": "markers", "epochs": 0, "marked": 8}, {"router": "representatives"},
    {"router": "representatives", "epochs": 0}, {"router": "representatives", "split": "activations", "epochs": 0},
], ids=str)  # fmt: skip
def test_routers_of_every_kind_find_the_experts_that_matter(sharp: Any, options: Any) -> None:
    graph = converted(sharp, **options)
    assert share_of_norms(graph, sharp[1], 0.75) > 0.55  # 2 of 8
    assert all(site.rule == "top_k" for site in find_moes(graph))
    lowered = fork(graph)
    set_tau(lowered, 0.5)
    want = lowered(**vectors())
    Lower().apply(lowered, inputs=vectors())
    assert torch.allclose(lowered(**vectors()), want, atol=1e-5)


def test_random_routers_do_not(sharp: Any) -> None:
    graph = converted(sharp, epochs=5.0, steps=1, lr=1e-9)
    assert share_of_norms(graph, sharp[1], 0.75) < 0.45


def test_kinds_of_router_are_what_they_are_called(sharp: Any) -> None:
    shapes = {
        "norm": ("relu", "abs", False), "relative": ("relu", "abs", False), "log": ("relu", "exp", False),
        "activation": ("tanh", "sigmoid", False),
    }  # fmt: skip
    for objective, (hidden, output, bias) in shapes.items():
        router = layer(converted(sharp, objective=objective, steps=1)).router
        assert (router.hidden, router.output, router.fc1.bias is not None) == (hidden, output, bias)
    router = layer(converted(sharp, router="neurons", epochs=0)).router
    assert (router.hidden, router.output, router.fc1.bias is not None) == ("relu", "softplus", True)
    for output in ("abs", "relu", "softplus"):
        assert layer(converted(sharp, router_output=output, steps=1)).router.output == output


def test_a_router_of_one_layer_is_counted_and_named(sharp: Any) -> None:
    graph = fork(sharp[0])
    report = Moeify(experts=8, router="trained", router_depth=1, steps=1).apply(graph, data=sharp[1])
    assert {site.after for site in report.sites} == {"8 experts × 4, router linear"}
    assert {site.router_parameters for site in find_moes(graph)} == {8 * WIDTH}
    Lower().apply(graph, inputs=vectors())
    assert {site.router_parameters for site in find_moes(graph)} == {8 * WIDTH}


def test_centres_need_no_data(sharp: Any) -> None:
    graph = fork(sharp[0])
    Moeify(experts=8, router="centres", objective="activation", split="weights").apply(graph, inputs=vectors())
    moe = layer(graph)
    assert moe.w1 is not None
    assert torch.allclose(moe.router.first.weight, F.normalize(moe.w1, dim=-1).mean(1), atol=1e-6)
    assert torch.equal(moe.router.fc2.weight, torch.eye(8))


def test_labels_are_those_asked_for(sharp: Any) -> None:
    assert first_loss(sharp, labels="hidden") != pytest.approx(first_loss(sharp), rel=0.01)


def test_closed_form_trains_nothing_and_says_so(sharp: Any) -> None:
    graph = fork(sharp[0])
    report = Moeify(experts=8, router="neurons", epochs=0).apply(graph, inputs=vectors(), data=sharp[1])
    assert report.fit is not None
    assert (report.fit.steps, report.fit.losses) == (0, ())
    assert not any("not trained" in note for note in report.notes)
    untrained = Moeify(experts=8, router="neurons", epochs=0).apply(fork(sharp[0]), inputs=vectors())
    assert any("not trained" in note for note in untrained.notes)


def test_steps_train_a_closed_form_further(sharp: Any) -> None:
    report = Moeify(experts=8, router="neurons", epochs=0, steps=3).apply(fork(sharp[0]), data=sharp[1])
    assert report.fit is not None
    assert report.fit.steps == 3
    assert Moeify(epochs=0, steps=3).plan().steps == 3


def first_loss(sharp: Any, **options: Any) -> float:
    graph = fork(sharp[0])
    trained = Moeify(experts=8, split="weights", steps=1, lr=1e-9, **options)
    report = trained.apply(graph, data=sharp[1][:1])
    assert report.fit is not None
    return report.fit.losses[0][1]["router loss"]


@pytest.mark.parametrize("objective", ["norm", "relative", "log", "activation"])
def test_the_loss_is_that_of_the_objective_on_what_is_routed(sharp: Any, objective: Any) -> None:
    graph = fork(sharp[0])
    options: Any = {
        "experts": 8,
        "split": "weights",
        "router": "trained",
        "objective": objective,
        "shared": 1,
        "steps": 1,
        "lr": 1e-9,
    }
    batch = Batch.from_any(sharp[1][0])
    report = Moeify(**options).apply(graph, data=[batch])
    assert report.fit is not None
    losses = []
    for site in find_moes(graph):
        moe = layer(graph, site.path)
        name = site.nodes[0].args[0].name  # type: ignore[union-attr]
        x = collect(graph, [name], Data.of([batch]), tokens=10**6)[name]
        with torch.no_grad():
            wanted, scores = target(objective, x, moe.routed, moe.activation), moe.router(x)
        assert wanted.shape[1] == 7
        if objective == "activation":
            losses.append(F.binary_cross_entropy(scores, wanted))
        else:
            losses.append(F.mse_loss(scores.log() if objective == "log" else scores, wanted))
    assert report.fit.losses[0][1]["router loss"] == pytest.approx(float(torch.stack(losses).mean()), rel=1e-3)


def test_exposed_routers_see_what_the_sparse_model_gives_them(sharp: Any) -> None:
    dense, exposed = first_loss(sharp), first_loss(sharp, exposure=1.0)
    assert first_loss(sharp, exposure=1e-9) == pytest.approx(dense, rel=1e-4)
    assert abs(exposed - dense) > 0.01 * dense


@pytest.mark.parametrize("tau", [0.0, 0.25])
def test_exposure_leaves_tau_as_asked(sharp: Any, tau: float) -> None:
    graph = converted(sharp, exposure=0.5, tau=tau, steps=2, epochs=1.0)
    assert {float(site.tau) for site in find_moes(graph)} == {tau}


def test_rule_is_set(sharp: Any) -> None:
    graph = converted(sharp, rule="energy", steps=1, epochs=1.0)
    assert set(get_rule(graph).values()) == {"energy"}
    meter = ExpertMeter(graph)
    meter.call((), vectors())
    assert {layer.share for layer in meter.layers.values()} == {1.0}


def test_cost_is_that_of_the_router_that_was_made(sharp: Any) -> None:
    graph = converted(sharp, steps=1, epochs=1.0)
    cost, _ = measure(graph, (), vectors())
    before, _ = measure(sharp[0], (), vectors())
    assert cost.multiply_adds - before.multiply_adds == 2 * 15 * 16 * (WIDTH + 8)

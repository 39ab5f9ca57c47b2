"""lower: the op takes the module's place, under the same names, and skips what the router says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import surgeon
from surgeon.dynamic.knobs import get_tau, set_tau
from surgeon.graph.traced import module_path
from surgeon.measure.meter import measure
from surgeon.moe.site import dynamic_k_ffn, find_moes
from surgeon.passes import Lower, Moeify
from tests.small_models import WIDTH, Function, vectors

NAMES = ["gelu", "relu", "gated", "fused", "biasless", "shared"]


def converted(traces: Any, name: str, tau: float = 0.0) -> Any:
    graph = traces(f"stack:{name}")
    Moeify(experts=4, router_width=8).apply(graph)
    set_tau(graph, tau)
    return graph


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tau", [0.0, 0.5, 0.9])
def test_same_output_at_every_tau(traces: Any, name: str, tau: float) -> None:
    graph, inputs = converted(traces, name, tau), vectors()
    want = graph(**inputs)
    report = Lower().apply(graph, inputs=inputs)
    assert torch.allclose(graph(**inputs), want, atol=1e-5)
    assert report.max_error is not None
    assert report.max_error < 1e-5
    assert report.preserved


def test_module_becomes_ops_under_the_same_names(traces: Any) -> None:
    graph = converted(traces, "gelu", 0.25)
    state = {name: value.clone() for name, value in graph.state_dict().items()}
    report = Lower().apply(graph, inputs=vectors())
    assert report.matched == ["blocks.0.ffn.moe", "blocks.1.ffn.moe"]
    assert not any(node.op == "call_module" for node in graph.graph.nodes)
    ops = [node for node in graph.graph.nodes if node.target is dynamic_k_ffn]
    assert [module_path(node) for node in ops] == report.matched
    routers = {module_path(node) for node in graph.graph.nodes if module_path(node).endswith(".router")}
    assert routers == {f"{path}.router" for path in report.matched}
    assert set(graph.state_dict()) == set(state)
    assert all(torch.equal(value, state[name]) for name, value in graph.state_dict().items())
    assert get_tau(graph) == dict.fromkeys(report.matched, 0.25)


def test_cost_and_share_are_those_of_the_module(traces: Any) -> None:
    graph = converted(traces, "relu", 0.9)
    before, _ = measure(graph, (), vectors())
    report = Lower().apply(graph, inputs=vectors())
    assert report.before == report.after == before
    assert before.executed is not None
    assert before.executed < 1
    assert {site.executed is not None and 0 < site.executed <= 1 for site in report.sites} == {True}


def test_gradients_are_those_of_the_module(traces: Any) -> None:
    graph = converted(traces, "gated", 0.5)
    graph(**vectors()).square().sum().backward()
    want = {name: p.grad.clone() for name, p in graph.named_parameters() if p.grad is not None}
    graph.zero_grad()
    Lower().apply(graph)
    graph(**vectors()).square().sum().backward()
    got = {name: p.grad for name, p in graph.named_parameters() if p.grad is not None}
    assert set(got) == set(want)
    assert any(".moe.gate" in name for name in got)
    assert not any(".router." in name for name in got)
    assert all(torch.allclose(gradient, want[name], atol=1e-5) for name, gradient in got.items())


def test_shared_experts_are_lowered_at_every_execution(traces: Any) -> None:
    graph = converted(traces, "shared")
    report = Lower().apply(graph, inputs=vectors())
    assert len(report.matched) == 1
    (site,) = find_moes(graph)
    assert len(site.nodes) == 2


def test_twice_is_refused_with_the_reason(traces: Any) -> None:
    graph = converted(traces, "gelu")
    Lower().apply(graph)
    code = graph.code
    report = Lower().apply(graph)
    assert not report.matched
    assert {rejection.reason for rejection in report.rejected} == {"it is already lowered"}
    assert graph.code == code


def test_chosen_layers_only(traces: Any) -> None:
    graph = converted(traces, "gelu")
    Lower(only=("blocks.1.*",)).apply(graph, inputs=vectors())
    assert [site.form for site in find_moes(graph)] == ["module", "dynamic"]
    set_tau(graph, 0.9)
    cost, layers = measure(graph, (), vectors())
    assert cost.executed is not None
    assert cost.executed == pytest.approx(sum(layer.share for layer in layers.values()) / 2)


def test_tau_outside_the_range_of_one_token(traces: Any) -> None:
    graph = converted(traces, "gelu", 1.0)
    Lower().apply(graph)
    _, layers = measure(graph, (), vectors(1, 1))
    assert all(layer.ran >= 1 for layer in layers.values())


@pytest.mark.parametrize("raw", [False, True])
def test_a_model_that_is_one_layer_is_lowered_in_a_run_of_its_own(raw: bool) -> None:
    """Between the two runs its graph has nothing but experts."""
    parts: Any = (
        {"w1": nn.Parameter(torch.randn(WIDTH, 32)), "w2": nn.Parameter(torch.randn(32, WIDTH))}
        if raw
        else {"up": (WIDTH, 32), "down": (32, WIDTH)}
    )
    model = Function(
        lambda m, x: F.relu(x @ m.w1) @ m.w2 if raw else m.down(F.relu(m.up(x))), **parts
    ).eval()  # fmt: skip
    x = torch.randn(5, WIDTH)
    first = surgeon.Pipeline([Moeify(experts=4)]).run(model, inputs=x)
    second = surgeon.Pipeline([Lower()]).run(first.graph, inputs=x)
    assert [site.form for site in find_moes(second.graph)] == ["dynamic"]
    assert second.reports[0].sites[0].executed == first.reports[0].sites[0].executed == 1.0
    assert torch.allclose(second.graph(x), model(x), atol=1e-4)

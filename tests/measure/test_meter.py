"""Costs: parameters once, multiply-adds as counted by hand, and the share of the experts that really ran."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import surgeon
from surgeon.dynamic.knobs import set_tau
from surgeon.errors import UsageError
from surgeon.kernels.dynamic_k import selected
from surgeon.measure.meter import clock, measure, parameter_count
from surgeon.moe.module import MoE
from surgeon.passes import Lower, Moeify
from tests.small_models import (
    CLASSES,
    HIDDEN,
    WIDTH,
    Function,
    Gated,
    Plain,
    Wrapped,
    hugging_face,
    stack,
    tokens,
    vectors,
)

X = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(0))
ROWS = 10


def test_parameters_count_tied_ones_once(traces: Any) -> None:
    model, _ = hugging_face("gpt2")
    assert parameter_count(traces("gpt2")) == sum(p.numel() for p in model.parameters())
    shared = stack("shared")
    assert parameter_count(traces("stack:shared")) == sum(p.numel() for p in shared.parameters())


@pytest.mark.parametrize("ffn", [Plain(), Gated(), Plain(d_out=4, bias=False)])
def test_multiply_adds_of_a_layer(ffn: nn.Module) -> None:
    graph = surgeon.trace(Wrapped(ffn).eval(), X)
    cost, layers = measure(graph, (X,), {})
    assert cost.multiply_adds == ROWS * sum(p.numel() for p in ffn.parameters() if p.dim() == 2)
    assert cost.executed_multiply_adds == cost.multiply_adds
    assert cost.executed is None
    assert layers == {}


def test_multiply_adds_of_a_model(traces: Any) -> None:
    inputs = tokens(padded=False)
    cost, _ = measure(traces("gelu"), (), inputs)
    batch, length = inputs["input_ids"].shape
    linears = batch * length * 2 * (4 * WIDTH * WIDTH + 2 * WIDTH * HIDDEN)
    attention = batch * 2 * 2 * length * length * WIDTH
    assert cost.multiply_adds == linears + attention + batch * WIDTH * CLASSES


def test_inputs_may_be_given_in_any_form(traces: Any) -> None:
    inputs = tokens()
    by_name, _ = measure(traces("gelu"), (), inputs)
    mixed, _ = measure(traces("gelu"), (inputs["input_ids"],), {"attention_mask": inputs["attention_mask"]})
    assert by_name == mixed


@pytest.mark.parametrize("gated", [False, True])
def test_share_of_the_dense_layer_is_the_papers_formula(gated: bool) -> None:
    """k/n + d_h (d_m + n) / (2 d_m d_ff), with 3 in place of 2 for a gated layer (D2DMoE, appendix on cost)."""
    n, k, d_h = 8, 3, 4
    graph = surgeon.trace(Wrapped(Gated() if gated else Plain()).eval(), X)
    dense, _ = measure(graph, (X,), {})
    Moeify(experts=n, router_width=d_h, rule="top_k").apply(graph)
    Lower().apply(graph)
    set_tau(graph, 1 - k / n)
    cost, _ = measure(graph, (X,), {})
    linears = 3 if gated else 2
    ratio = k / n + d_h * (WIDTH + n) / (linears * WIDTH * HIDDEN)
    assert cost.executed_multiply_adds / dense.multiply_adds == pytest.approx(ratio)


@pytest.mark.parametrize("lowered", [False, True])
@pytest.mark.parametrize("ffn", [Plain(act=F.relu), Gated()])
def test_executed_share_is_what_ran(ffn: nn.Module, lowered: bool) -> None:
    graph = surgeon.trace(Wrapped(ffn).eval(), X)
    dense, _ = measure(graph, (X,), {})
    Moeify(experts=4, router_width=8).apply(graph)
    moe = graph.get_submodule("ffn.moe")
    assert isinstance(moe, MoE)
    with torch.no_grad():
        x = F.layer_norm(X, (WIDTH,))
        scores = moe.router(x)
        ran = int(selected(scores, scores.amax(-1) * 0.9).sum())
    router = ROWS * sum(p.numel() for p in moe.router.parameters() if p.dim() == 2)
    if lowered:
        Lower().apply(graph)
    everything, layers = measure(graph, (X,), {})
    assert {path: layer.share for path, layer in layers.items()} == {"ffn.moe": 1.0}
    assert layers["ffn.moe"].multiply_adds == dense.multiply_adds
    assert everything.multiply_adds == everything.executed_multiply_adds == dense.multiply_adds + router
    assert everything.executed == 1.0

    set_tau(graph, 0.9)
    cost, layers = measure(graph, (X,), {})
    share = ran / (ROWS * 4)
    assert 0 < share < 1
    assert layers["ffn.moe"].share == pytest.approx(share)
    assert (layers["ffn.moe"].pairs, layers["ffn.moe"].ran) == (ROWS * 4, ran)
    assert cost.executed == pytest.approx(share)
    assert cost.multiply_adds == everything.multiply_adds
    assert cost.executed_multiply_adds == pytest.approx(router + share * dense.multiply_adds, abs=1)


def test_shared_experts_count_at_every_execution(traces: Any) -> None:
    graph = traces("stack:shared")
    dense, _ = measure(graph, (), vectors())
    Moeify(experts=4, router_width=8).apply(graph)
    cost, layers = measure(graph, (), vectors())
    assert len(layers) == 1
    router = graph.get_submodule(next(iter(layers)) + ".router")
    weights = sum(p.numel() for p in router.parameters() if p.dim() == 2)
    assert cost.multiply_adds == dense.multiply_adds + 2 * 15 * weights


@pytest.mark.parametrize("lowered", [False, True])
def test_the_load_of_a_token_is_the_share_of_its_experts(lowered: bool) -> None:
    graph = surgeon.trace(Wrapped(Plain(act=F.relu)).eval(), X)
    Moeify(experts=8, router_width=8).apply(graph)
    moe = graph.get_submodule("ffn.moe")
    assert isinstance(moe, MoE)
    with torch.no_grad():
        scores = moe.router(F.layer_norm(X, (WIDTH,)))
    if lowered:
        Lower().apply(graph)
    set_tau(graph, 0.6)
    load = surgeon.token_load(graph, X)
    assert torch.equal(load, (scores >= 0.6 * scores.amax(-1, keepdim=True)).float().mean(-1))
    assert load.unique().numel() > 1
    assert float(load.mean()) == pytest.approx(measure(graph, (X,), {})[0].executed)


def test_layers_weigh_by_their_cost_and_layers_of_other_tokens_are_left_out() -> None:
    """Two layers over tokens, one three times as wide, and one over the first token only."""
    model = Function(
        lambda m, x: m.last((x + m.wide(x + m.narrow(x)))[:, 0]),
        narrow=Plain(act=F.relu), wide=Plain(hidden=3 * HIDDEN, act=F.relu), last=Plain(act=F.relu),
    )  # fmt: skip
    graph = surgeon.trace(model.eval(), X)
    Moeify(experts=4, router_width=8, rule="top_k").apply(graph)
    set_tau(graph, {"narrow": 0.75, "wide": 0.0, "last": 0.75})
    load = surgeon.token_load(graph, {"x": X})
    assert load.shape == (2, 5)
    assert torch.allclose(load, torch.full_like(load, (0.25 + 3) / 4))


def test_a_load_needs_experts(traces: Any) -> None:
    with pytest.raises(UsageError, match="The model has no layers that skip, so no token has a load"):
        surgeon.token_load(traces("stack:gelu"), vectors())


def test_time_is_read_when_the_device_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[torch.device] = []
    monkeypatch.setattr("torch.accelerator.synchronize", waited.append)
    here, other = torch.device("cpu"), torch.device("meta")
    assert clock(here) <= clock(here)
    assert waited == []
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda: other)
    clock(here)
    clock(other)
    assert waited == [other]


def test_measuring_changes_nothing(traces: Any) -> None:
    graph = traces("stack:gelu")
    Moeify(experts=4).apply(graph)
    before = {name: value.clone() for name, value in graph.state_dict().items()}
    code = graph.code
    measure(graph, (), vectors())
    assert graph.code == code
    assert all(torch.equal(value, before[name]) for name, value in graph.state_dict().items())


def test_layers_without_weights_cost_nothing() -> None:
    graph = surgeon.trace(Function(lambda m, x: F.relu(x) + 1), X)
    cost, _ = measure(graph, (X,), {})
    assert (cost.parameters, cost.multiply_adds) == (0, 0)

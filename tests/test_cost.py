"""Costs: parameters once, multiply-adds as counted by hand, and the share of the experts that really ran."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import surgeon
from surgeon.cost import measure, parameter_count
from surgeon.kernels.dynamic_k import selected
from surgeon.moe import MoE, set_tau
from surgeon.passes import Lower, Moeify
from tests.models import CLASSES, HIDDEN, WIDTH, Function, Gated, Plain, Wrapped, hugging_face, stack, tokens, vectors

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

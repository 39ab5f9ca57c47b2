"""Loads over tokens: the counts of executed experts and of active neurons, as computed by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import surgeon
from surgeon.data.batch import Batch
from surgeon.errors import DataError, UsageError
from surgeon.measure.load import Spread, measure_load
from surgeon.moe.module import MoE
from surgeon.moe.site import find_moes
from surgeon.passes import Lower, Moeify, Quantize, SparsifyInputs
from surgeon.training.penalty import Sparsity
from tests.small_models import HIDDEN, WIDTH, Gated, Plain, Wrapped, classifier, tokens

X = torch.randn(3, 7, WIDTH, generator=torch.Generator().manual_seed(0))


def test_a_spread_is_that_of_the_numbers() -> None:
    values = [0, 2, 2, 3, 3, 3, 5, 9]
    found = Spread.of(torch.bincount(torch.tensor(values), minlength=12))
    assert found.mean == pytest.approx(sum(values) / 8)
    assert found.deviation == pytest.approx(float(torch.tensor(values).double().std(correction=0)))
    assert (found.smallest, found.quartiles, found.largest) == (0, (2, 3, 3), 9)
    assert Spread.of(torch.tensor([0, 0, 4])) == Spread(2.0, 0.0, 2, (2, 2, 2), 2)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("lowered", [False, True])
def test_counts_are_those_of_the_layer(gated: bool, lowered: bool) -> None:
    torch.manual_seed(0)
    ffn = Gated(act=F.silu) if gated else Plain(act=F.relu)
    model = Wrapped(ffn).eval()
    graph = surgeon.trace(model, X)
    (sparse,), _ = surgeon.find_ffns(graph)
    z = (ffn.gate if gated else ffn.fc1)(model.norm(X))  # type: ignore[operator, union-attr]
    active = Sparsity.of(sparse.activations(graph, z.flatten(0, 1))).active
    Moeify(experts=8, router_width=8).apply(graph)
    moe = graph.get_submodule("ffn.moe")
    assert isinstance(moe, MoE)
    with torch.no_grad():
        scores = moe.router(model.norm(X))
    if lowered:
        Lower().apply(graph)
    surgeon.set_tau(graph, 0.6)
    (layer,) = measure_load(graph, [X[:1], X[1:]])
    ran = (scores >= 0.6 * scores.amax(-1, keepdim=True)).sum(-1)
    assert layer.histogram == tuple(torch.bincount(ran.flatten(), minlength=9).tolist())
    assert layer.executed.mean == pytest.approx(float(ran.float().mean()))
    assert layer.executed.smallest < layer.executed.largest
    assert (layer.tokens, layer.experts, layer.neurons) == (21, 8, HIDDEN)
    assert layer.active.mean / HIDDEN == pytest.approx(active)
    assert 0 < active < 1


def test_filling_is_no_neuron_and_8_bits_are_counted() -> None:
    graph = surgeon.trace(Wrapped(Plain(act=F.relu)).eval(), X)
    Moeify(experts=7, router_width=8).apply(graph, inputs=X)
    (site,) = find_moes(graph)
    assert site.filling
    (whole,) = measure_load(graph, [X])
    assert (whole.neurons, whole.executed.mean) == (HIDDEN, 7.0)
    Lower().apply(graph, inputs=X)
    Quantize().apply(graph, inputs=X)
    (quantised,) = measure_load(graph, [X])
    assert quantised.neurons == HIDDEN
    assert quantised.active.mean == pytest.approx(whole.active.mean, rel=0.05)


def test_inputs_that_are_kept_are_counted() -> None:
    model = Wrapped(Plain(act=F.relu)).eval()
    graph = surgeon.trace(model, X)
    SparsifyInputs(only=("ffn.fc1",), centre=False, criterion="magnitude", tau=0.5).apply(graph, inputs=X, data=[X])
    (layer,) = measure_load(graph, [X[:1], X[1:]])
    x = model.norm(X).flatten(0, 1).abs()
    kept = (x > x.flatten().sort().values[round(0.5 * (x.numel() - 1))]).sum(-1)
    assert layer.histogram == tuple(torch.bincount(kept, minlength=WIDTH + 1).tolist())
    assert (layer.tokens, layer.experts, layer.neurons, layer.active) == (21, WIDTH, None, None)
    load = surgeon.token_load(graph, X)
    torch.testing.assert_close(load.flatten(), kept.float() / WIDTH)


def test_padding_does_not_count() -> None:
    graph = surgeon.trace(classifier("relu"), tokens()).eval()
    Moeify(experts=4, router_width=8).apply(graph)
    batch = Batch((), tokens(4, 6, seed=1))
    seen: list[int] = []
    layers = measure_load(graph, [batch, batch], progress=lambda moment: seen.append(moment.done))
    assert [layer.tokens for layer in layers] == [2 * int(batch.kwargs["attention_mask"].sum())] * 2
    assert seen == [1, 2]


def test_a_load_needs_experts_and_tokens(traces: Any) -> None:
    with pytest.raises(UsageError, match="The model has no layers that skip, so no token has a load"):
        measure_load(traces("stack:gelu"), [])
    graph = surgeon.trace(Wrapped(Plain(act=F.relu)).eval(), X)
    Moeify(experts=4, router_width=8).apply(graph)
    with pytest.raises(DataError, match="The data holds no tokens"):
        measure_load(graph, [])

"""Shared trunks: projections of one attention that read the same input, whatever they are called."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgeon
from surgeon.graph.traced import TracedGraph
from surgeon.moe.module import MoE
from surgeon.moe.site import find_moes
from surgeon.moe.trunks import trunk_groups
from surgeon.passes import Mlpify, Moeify
from surgeon.sites.search import find_ffns
from tests.passes.projections import Timm, attend
from tests.small_models import WIDTH, Attention, Function, Plain, vectors

X = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(0))


class Cross(nn.Module):
    """Decoder layers, each with attention to the same memory, in the order: attention, feed-forward."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(WIDTH, WIDTH) for name in "qkvo"}) for _ in range(layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        memory = torch.softmax(x, -1)
        y = x
        for layer in self.layers:
            q, k, v = layer["q"](y), layer["k"](memory), layer["v"](memory)
            y = y + layer["o"](torch.softmax(q @ k.transpose(1, 2), -1) @ v)
        return torch.softmax(y, -1)


def mlpified(model: nn.Module) -> TracedGraph:
    torch.manual_seed(0)
    graph = surgeon.trace(model.eval(), X)
    Mlpify().apply(graph, inputs=X)
    return graph


def groups(graph: TracedGraph) -> list[list[str]]:
    return [[site.path for site in group] for group in trunk_groups(graph, find_ffns(graph)[0])]


def test_projections_meet_at_the_first_layer_that_reads_them() -> None:
    def compute(m: Any, x: Tensor) -> Tensor:
        k = torch.softmax(m.k(x), -1)
        y = m.o(torch.softmax(x, -1) * k + m.v(x))
        return torch.softmax(m.extra(torch.sigmoid(k)) + y, -1)

    square = (WIDTH, WIDTH)
    graph = mlpified(Function(compute, k=square, v=square, o=square, extra=square))
    assert ["k.projection_mlp", "v.projection_mlp"] in groups(graph)


def test_keys_and_values_of_different_layers_are_apart() -> None:
    graph = mlpified(Cross())
    assert sorted(groups(graph)) == sorted(
        paths
        for layer in "01"
        for paths in (
            [f"layers.{layer}.k.projection_mlp", f"layers.{layer}.v.projection_mlp"],
            [f"layers.{layer}.q.projection_mlp"],
            [f"layers.{layer}.o.projection_mlp"],
        )
    )
    Moeify(experts=4).apply(graph, inputs=X)
    trunks = {site.path: id(module(graph, site.path).router.fc1.weight) for site in find_moes(graph)}
    by_name = {path.removeprefix("layers.").removesuffix(".projection_mlp.moe"): one for path, one in trunks.items()}
    assert by_name["0.k"] == by_name["0.v"] != by_name["1.k"] == by_name["1.v"]


def module(graph: TracedGraph, path: str) -> MoE:
    found = graph.get_submodule(path)
    assert isinstance(found, MoE)
    return found


@pytest.mark.parametrize("fused", [False, True])
def test_queries_keys_and_values_are_together(fused: bool) -> None:
    model: Any = Timm() if fused else Function(lambda m, x: m.a(x, None), a=Attention(0.0))
    parts = [f"qkv.projection_mlp_{part}" for part in "qkv"]
    if not fused:
        parts = [f"a.{part}.projection_mlp" for part in "qkv"]
    graph = mlpified(nn.Sequential(model, nn.Softmax(-1)))
    found = groups(graph)
    assert [f"0.{part}" for part in parts] in found
    assert len(found) == 2


def test_a_feed_forward_layer_that_feeds_projections_stands_alone() -> None:
    """Its output is what they read: it must not count as one of them."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ffn, self.q, self.k = Plain(), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            y = self.ffn(x)
            return attend(self.q(y), self.k(y), x)

    graph = mlpified(Model())
    assert sorted(groups(graph)) == [["ffn"], ["q.projection_mlp", "k.projection_mlp"]]
    alone = surgeon.graph.traced.fork(graph)
    Moeify(experts=4).apply(graph, inputs=X)
    Moeify(experts=4, skip=("ffn",)).apply(alone, inputs=X)
    widths = [module(one, "q.projection_mlp.moe").router.fc1.out_features for one in (graph, alone)]
    assert widths[0] == widths[1]


def test_replacements_of_a_stack_stand_alone(traces: Any) -> None:
    graph = traces("stack:relu")
    Mlpify().apply(graph, inputs=vectors())
    assert all(len(group) == 1 for group in groups(graph))

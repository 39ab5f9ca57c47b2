"""moeify on a layer that is executed several times: all its executions count, not only the first."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import surgeon
from surgeon.graph.traced import TracedGraph, fork
from surgeon.moe.module import MoE
from surgeon.passes import Moeify
from tests.small_models import WIDTH, Plain

X = torch.randn(16, 6, WIDTH, generator=torch.Generator().manual_seed(0))
SHIFT = torch.linspace(-4, 4, WIDTH)


class Twice(nn.Module):
    """The same layer on x and on other values, x first or last."""

    def __init__(self, *, first: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.ffn, self.first = Plain(act=F.relu, dropout=0.0), first

    def forward(self, x: Tensor) -> Tensor:
        other = torch.softmax(x, -1) * 10 + SHIFT
        inputs = (x, other) if self.first else (other, x)
        y, z = (self.ffn(one) for one in inputs)
        return torch.softmax(torch.cat([y, z], -1), -1)


@pytest.fixture(scope="module")
def graphs() -> list[TracedGraph]:
    """The same model with its executions in one order and in the other."""
    return [surgeon.trace(Twice(first=first).eval(), X) for first in (True, False)]


def converted(graph: TracedGraph, **options: Any) -> MoE:
    graph = fork(graph)
    Moeify(experts=8, router_width=8, epochs=0, **options).apply(graph, inputs=X, data=[X])
    found = graph.get_submodule("ffn.moe")
    assert isinstance(found, MoE)
    return found


def test_experts_are_those_of_all_executions(graphs: list[TracedGraph]) -> None:
    one, other = (converted(graph, split="activations") for graph in graphs)
    groups = [{frozenset(map(tuple, rows)) for rows in moe.weights.w1.tolist()} for moe in (one, other)]
    assert groups[0] == groups[1]


def test_routers_are_fitted_to_all_executions(graphs: list[TracedGraph]) -> None:
    one, other = (converted(graph, split="weights") for graph in graphs)
    values = torch.cat([X, torch.softmax(X, -1) * 10 + SHIFT])
    with torch.no_grad():
        assert torch.allclose(one.router(values), other.router(values), atol=1e-3)

"""Expert layers in a graph, looked at by tests of what makes them."""

from __future__ import annotations

from surgeon.graph.traced import TracedGraph
from surgeon.moe.module import MoE


def layer(graph: TracedGraph, path: str = "blocks.0.ffn.moe") -> MoE:
    module = graph.get_submodule(path)
    assert isinstance(module, MoE)
    return module

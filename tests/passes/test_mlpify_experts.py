"""mlpify: its replacements are feed-forward layers to the passes after it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgeon
from surgeon.graph.agreement import call_reproducibly, relative_error
from surgeon.graph.calls import as_args_kwargs
from surgeon.passes import Lower, Mlpify, Moeify, Sparsify
from surgeon.sites.search import find_ffns
from tests.small_models import CLASSES, WIDTH, Plain, labelled_vectors, vectors

from .projections import Timm


class VisionTransformer(nn.Module):
    """As in timm: [B, 3, 16, 16] → [B, 3]."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 8, 8)
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn, self.mlp = Timm(), Plain()
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = x + self.attn(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return self.head(x.mean(1))


def start_of_chain(name: str, traces: Any) -> tuple[surgeon.TracedGraph, Any, list[Any], list[str]]:
    """(graph, inputs, data, the layers that mlpify replaces in one block)."""
    if name == "timm":
        images = torch.randn(4, 3, 16, 16)
        parts = ["attn.qkv.projection_mlp_q", "attn.qkv.projection_mlp_k", "attn.qkv.projection_mlp_v"]
        graph = surgeon.trace(VisionTransformer().eval(), images)
        return graph, images, [(images, torch.arange(4) % CLASSES)], [*parts, "attn.proj.projection_mlp"]
    inputs = traces.inputs(name)
    if name == "gpt2":
        attention = "transformer.h.0.attn"
        parts = [f"{attention}.c_attn.projection_mlp_{part}" for part in "qkv"]
        return traces(name), inputs, [inputs | {"labels": inputs["input_ids"]}], [
            *parts, f"{attention}.c_proj.projection_mlp",
        ]  # fmt: skip
    attention = "bert.encoder.layer.0.attention"
    layers = [f"{attention}.self.{part}" for part in ("query", "key", "value")] + [f"{attention}.output.dense"]
    data = [(inputs, torch.arange(3) % CLASSES)]
    return traces(name), inputs, data, [f"{layer}.projection_mlp" for layer in layers]


@pytest.mark.parametrize("name", ["bert", "gpt2", "timm"])
def test_the_whole_way_to_lowered_experts(traces: Any, name: str) -> None:
    graph, inputs, data, projections = start_of_chain(name, traces)
    surgery = surgeon.Pipeline([
        Mlpify(steps=2, dropout=0.1), Sparsify(steps=2), Moeify(experts=4, router_width=8, steps=2),
    ]).run(graph, inputs=inputs, data=data)  # fmt: skip
    made, sparse, moe = surgery.reports
    assert set(projections) <= set(sparse.matched)
    assert set(projections) <= set(moe.matched)
    assert len(moe.matched) > len(sparse.matched) - len(projections)
    assert made.fit is not None
    taps = [node.target for node in surgery.graph.graph.nodes if node.op == "call_module"]
    assert {f"{path}.moe" for path in projections} <= set(taps)
    dense = call_reproducibly(surgery.graph.eval(), *as_args_kwargs(inputs))
    lowered = surgeon.graph.traced.fork(surgery.graph)
    low = Lower().apply(lowered, inputs=inputs)
    assert len(low.matched) == len(moe.matched)
    assert relative_error(call_reproducibly(lowered, *as_args_kwargs(inputs)), dense) < 1e-5


def test_replacements_become_experts(traces: Any) -> None:
    graph, inputs = traces("stack:relu"), vectors()
    Mlpify(steps=1).apply(graph, inputs=inputs, data=labelled_vectors(1))
    sites = {site.path for site in find_ffns(graph)[0]}
    assert len(sites) == 2 + 2
    moe = Moeify(experts=4).apply(graph, inputs=inputs)
    assert len(moe.matched) == 4
    low = Lower().apply(graph, inputs=inputs)
    assert len(low.matched) == 4

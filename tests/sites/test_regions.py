"""Layers in bodies of ops, such as autocast, are refused with the region as the reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import surgeon
from surgeon.passes import Moeify
from surgeon.sites.search import find_ffns, find_linear_sites
from tests.small_models import Function

D, H = 6, 8
X = torch.randn(2, 5, D, generator=torch.Generator().manual_seed(0))


def layer(m: Any, x: Tensor) -> Tensor:
    return m.down(F.relu(m.up(x)))


def whole(m: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return layer(m, x).float()


def half(m: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        h = F.relu(m.up(x)).float()
    return m.down(h)


def without_gradients(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        return layer(m, x * 2).float()


def one_in_another(m: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x = x + 1.0
        with torch.autocast("cpu", dtype=torch.float16):
            return layer(m, x).float()


def condition(m: Any, x: Tensor) -> Tensor:
    return torch.cond(x.sum() > 0, lambda x: layer(m, x), lambda x: x * 1.0, (x,))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("compute", "code", "reason"),
    [
        (whole, "under-autocast", "it is computed under torch.autocast('cpu', bfloat16)"),
        (half, "under-autocast", "it is computed under torch.autocast('cpu', bfloat16)"),
        (without_gradients, "under-autocast", "it is computed under torch.autocast('cpu', bfloat16)"),
        (condition, "in-subgraph", "it is computed in the body of an op of its own (cond)"),
    ],
)
def test_a_layer_in_a_region_is_refused(compute: Callable[..., Tensor], code: str, reason: str) -> None:
    graph = surgeon.trace(Function(compute, up=(D, H), down=(H, D)), X)
    code_before = graph.code
    sites, (refused,) = find_ffns(graph)
    assert not sites
    assert (refused.code, refused.reason) == (code, reason)
    assert refused.node in {node.name for node in graph.graph.nodes}
    assert graph.code == code_before


def test_what_stands_outside_the_region_is_found_and_what_does_not_fit_inside_says_why() -> None:
    def compute(m: Any, x: Tensor) -> Tensor:
        x = x + m.last(F.gelu(m.first(x)))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = x + layer(m, x)
            return torch.softmax(m.one(x), -1).float() + m.other(torch.cos(m.two(x))).float()

    model = Function(compute, first=(D, H), last=(H, D), up=(D, H), down=(H, D), one=(D, D), two=(D, H), other=(H, D))
    report = Moeify(experts=4).apply(graph := surgeon.trace(model, X), inputs=X)
    assert len(report.matched) == 1
    assert sorted(refused.code for refused in report.rejected) == ["under-autocast", "unknown-activation"]
    sites, rejections = find_linear_sites(graph)
    assert not sites
    assert {refused.path for refused in rejections if refused.code == "under-autocast"} >= {"one"}


def test_a_region_in_a_region_counts_as_the_outer_one() -> None:
    graph = torch.export.export(Function(one_in_another, up=(D, H), down=(H, D)), (X,)).module()
    assert isinstance(graph, torch.fx.GraphModule)
    sites, (refused,) = find_ffns(graph)
    assert not sites
    assert (refused.code, refused.path) == ("under-autocast", "up")
    assert "bfloat16" in refused.reason
    assert refused.node in {node.name for node in graph.graph.nodes}

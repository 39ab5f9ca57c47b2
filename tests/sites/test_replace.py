"""A module in place of a feed-forward layer: it reads what the layer read, and sizes are asked of what is left."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import surgeon
from surgeon.passes import Moeify
from surgeon.sites.search import find_ffns
from tests.small_models import Function, Many

X = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))


def x_changes_later(m: Any, x: Tensor) -> Tensor:
    h = x * 1.0
    y = m.b(F.relu(m.a(h)))
    h += 10.0
    return y + h


def test_layer_whose_input_changes_later_still_reads_it_before() -> None:
    graph = surgeon.trace(Function(x_changes_later, a=(6, 8), b=(8, 6)), X)
    want = graph(X)
    Moeify(experts=2).apply(graph, inputs=X)
    assert torch.allclose(graph(X), want, atol=1e-5)


def size_asked_inside(m: Any, x: Tensor) -> Tensor:
    h = F.relu(m.a(x))
    return m.b(h) / h.shape[1]


def test_sizes_asked_of_replaced_values_are_asked_of_the_input() -> None:
    graph = surgeon.trace(Function(size_asked_inside, a=(6, 8), b=(8, 6)), X)
    Moeify(experts=2).apply(graph, inputs=X)
    for length in (2, 9):
        x = torch.randn(2, length, 6)
        assert graph(x).shape == x.shape
    assert not find_ffns(graph)[0]


def flat(m: Any, x: Tensor) -> Tensor:
    rows = x.flatten(0, 1)
    return (F.relu(rows @ m.a) @ m.b).view(x.shape)


def flattens() -> Function:
    torch.manual_seed(0)
    return Function(flat, a=nn.Parameter(torch.randn(6, 8)), b=nn.Parameter(torch.randn(8, 6)))


@pytest.mark.parametrize("make", [lambda: Many(ffn=flattens()), flattens], ids=["in_a_module", "at_the_top"])
def test_layer_of_raw_parameters_that_flattens_its_tokens(make: Any) -> None:
    graph = surgeon.trace(make(), X)
    want = graph(X)
    report = Moeify(experts=2).apply(graph, inputs=X)
    assert len(report.matched) == 1
    got, expected = (next(iter(y.values())) if isinstance(y, dict) else y for y in (graph(X), want))
    assert torch.allclose(got, expected, atol=1e-5)
    graph(torch.randn(3, 4, 6))

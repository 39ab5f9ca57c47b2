"""Weights that passes cannot compute with: that site is refused with the reason, and the others are converted."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import surgeon
from surgeon.graph.traced import TracedGraph
from surgeon.passes import Mlpify, Moeify
from surgeon.sites.rejection import Rejection
from surgeon.sites.search import find_ffns, find_linear_sites
from tests.small_models import Function

D, H = 6, 8
X = torch.randn(2, 5, D, generator=torch.Generator().manual_seed(0))


def pair(hidden: int = H) -> nn.Module:
    return Function(lambda m, x: m.down(F.relu(m.up(x)).to(m.down.weight.dtype)), up=(D, hidden), down=(hidden, D))


class Two(nn.Module):
    """An odd feed-forward layer beside an ordinary one."""

    def __init__(self, odd: nn.Module) -> None:
        super().__init__()
        self.odd, self.plain, self.norm = odd, pair(), nn.LayerNorm(D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.odd(x.to(self.odd.up.weight.dtype)).float() + self.plain(self.norm(x))


def half(odd: Any) -> None:
    odd.up.half()


def with_nan(odd: Any) -> None:
    odd.up.weight.data[0, 0] = math.nan


def with_infinity(odd: Any) -> None:
    odd.down.bias.data[0] = math.inf


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        (half, "weights-differ", "dtypes: float16 ('odd.up.weight') and float32 ('odd.down.weight')"),
        (with_nan, "not-finite", "its weight 'odd.up.weight' contains NaN or infinity"),
        (with_infinity, "not-finite", "its weight 'odd.down.bias' contains NaN or infinity"),
    ],
)
def test_one_odd_layer_does_not_end_the_run(change: Callable[[Any], None], code: str, words: str) -> None:
    torch.manual_seed(0)
    model = Two(pair()).eval()
    if change is half:
        change(model.odd)
    graph = surgeon.trace(model, X)
    change(graph.get_submodule("odd"))
    want = graph(X)
    report = Moeify(experts=4).apply(graph, inputs=X)
    assert report.matched == ["plain"]
    (refused,) = report.rejected
    assert (refused.path, refused.code) == ("odd", code)
    assert words in refused.reason
    assert torch.allclose(graph(X), want, atol=1e-3, equal_nan=True)


def empty(graph: TracedGraph) -> None:
    module = graph.get_submodule("0")
    module.weight, module.bias = nn.Parameter(torch.empty(0, D)), nn.Parameter(torch.empty(0))  # type: ignore[assignment]


def elsewhere(graph: TracedGraph) -> None:
    graph.get_submodule("2").to("meta")


def whole(graph: TracedGraph) -> None:
    graph.get_submodule("0").weight = nn.Parameter(torch.ones(H, D).int(), requires_grad=False)  # type: ignore[assignment]


def sparse(graph: TracedGraph) -> None:
    graph.get_submodule("0").weight = nn.Parameter(torch.ones(H, D).to_sparse())  # type: ignore[assignment]


class Special(torch.Tensor):
    pass


def special(graph: TracedGraph) -> None:
    module = graph.get_submodule("2")
    weight = module.weight.detach().as_subclass(Special)  # type: ignore[operator, union-attr]
    del module.weight
    module.register_buffer("weight", weight)


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        (empty, "unusable-weights", "is empty: (0, 6)"),
        (elsewhere, "weights-differ", "its weights have several devices: cpu ('0.weight') and meta ('2.weight')"),
        (whole, "unusable-weights", "its weight '0.weight' holds int32 numbers"),
        (sparse, "unusable-weights", "its weight '0.weight' is stored in the layout sparse_coo"),
        (special, "unusable-weights", "its weight '2.weight' is a Special, no plain tensor"),
    ],
)
def test_what_no_pass_can_compute_with_is_refused(change: Callable[[TracedGraph], None], code: str, words: str) -> None:
    graph = surgeon.trace(nn.Sequential(nn.Linear(D, H), nn.ReLU(), nn.Linear(H, D)), X)
    change(graph)
    sites, (refused,) = find_ffns(graph)
    assert not sites
    assert refused.code == code
    assert words in refused.reason


def test_a_standalone_linear_with_nan_is_refused() -> None:
    model = Function(lambda m, x: torch.softmax(m.a(x), -1), a=(D, D))
    graph = surgeon.trace(model, X)
    assert len(Mlpify().explain(graph)[0]) == 1
    with torch.no_grad():
        graph.get_parameter("a.bias")[0] = math.nan
    matched, (refused,) = Mlpify().explain(graph)
    assert not matched
    assert isinstance(refused, Rejection)
    assert (refused.path, refused.code) == ("a", "not-finite")
    graph.get_submodule("a").bias = nn.Parameter(torch.zeros(D, dtype=torch.float64))  # type: ignore[assignment]
    sites, (refused,) = find_linear_sites(graph)
    assert (sites, refused.code, refused.path) == ([], "weights-differ", "a")


def test_a_layer_whose_values_overflow_on_the_data_is_refused() -> None:
    torch.manual_seed(0)
    model = Two(pair()).eval()
    model.odd.up.weight.data.mul_(1e38)
    model.odd.down.weight.data.zero_()
    report = Moeify(experts=4, epochs=0).apply(surgeon.trace(model, X), data=[{"x": X * 100}])
    assert report.matched == ["plain"]
    assert [(refused.path, refused.code) for refused in report.rejected] == [("odd", "not-finite")]
    assert [change.path for change in report.sites] == ["plain"]

"""Inner values are what they were at their moment, whatever the graph does to them later."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import surgeon
from surgeon.graph.capture import Capture
from surgeon.graph.traced import aten
from surgeon.sites.linear import find_linears
from tests.small_models import Function

X = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))


def small() -> Any:
    torch.manual_seed(0)
    return surgeon.trace(Function(lambda m, x: m.b(F.relu(m.a(x))), a=(6, 8), b=(8, 6)), X)


def test_capture_gives_inner_values_and_the_output() -> None:
    graph = small()
    output, values = Capture(graph, ["linear", "relu"], keep_output=True)(X)
    z = F.linear(X, graph.get_parameter("a.weight"), graph.get_parameter("a.bias"))
    assert torch.allclose(values["linear"], z, atol=1e-6)
    assert torch.equal(values["relu"], F.relu(values["linear"]))
    assert torch.equal(output, graph(X))


def test_capture_without_output_computes_no_more_than_needed() -> None:
    capture = Capture(small(), ["linear"])
    output, values = capture(X)
    assert output is None
    assert set(values) == {"linear"}
    assert not any(n.target is aten.relu.default for n in capture.graph.graph.nodes)


def test_capture_leaves_the_graph_and_shares_its_parameters() -> None:
    graph = small()
    code = graph.code
    capture = Capture(graph, ["relu"], keep_output=True)
    assert graph.code == code
    assert {id(p) for p in capture.parameters()} == {id(p) for p in graph.parameters()}


def test_capture_keeps_output_classes(traces: Any) -> None:
    graph = traces("bert")
    output, values = Capture(graph, ["linear"], keep_output=True)(**traces.inputs("bert"))
    assert type(output).__name__ == "SequenceClassifierOutput"
    assert values["linear"].shape == (3, 7, 16)


def changed_later(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    z = y * 1.0
    z += 1.0
    y += z
    return y


def changed_through_a_view(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    y[..., :2].zero_()
    return y * 2


def changed_through_a_module(m: Any, x: Tensor) -> Tensor:
    return m.same(m.a(x)).add_(1.0)


@pytest.mark.parametrize(
    "compute", [changed_later, changed_through_a_view, changed_through_a_module, lambda m, x: F.relu_(m.a(x))]
)
def test_captured_values_are_those_of_their_moment(compute: Any) -> None:
    graph = surgeon.trace(Function(compute, a=(6, 6), same=nn.Identity()), X)
    want = F.linear(X, graph.get_parameter("a.weight"), graph.get_parameter("a.bias"))
    output, values = Capture(graph, ["linear"], keep_output=True)(X)
    assert torch.allclose(values["linear"], want, atol=1e-6)
    assert torch.equal(output, graph(X))


def base_changes_later(m: Any, x: Tensor) -> Tensor:
    base = x * 1.0
    rows = base.flatten(0, 1)
    y = m.a(rows)
    base += 10.0
    return y


def test_captured_view_of_what_changes_later() -> None:
    graph = surgeon.trace(Function(base_changes_later, a=(6, 6)), X)
    (linear,) = find_linears(graph)[0]
    _, values = Capture(graph, [linear.input.name])(X)
    assert torch.equal(values[linear.input.name], X.flatten(0, 1))

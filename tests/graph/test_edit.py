"""Tools for rewriting: new nodes have shapes and paths, and what is read is not erased."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import surgeon
from surgeon.graph.edit import emit, erase_unread, get_attr, set_path
from surgeon.graph.traced import aten, module_path, shape_of
from tests.small_models import Function

from .small import X, node, small


def test_emitted_node_has_shape_and_path() -> None:
    graph = small()
    relu = node(graph, "relu")
    with graph.graph.inserting_after(relu):
        new = emit(graph, aten.slice.Tensor, relu, -1, 0, 3, 1, path="somewhere.else")
    assert shape_of(new)[-1] == 3  # type: ignore[index]
    assert [str(size) for size in shape_of(new)[:2]] == [str(size) for size in shape_of(relu)[:2]]  # type: ignore[index]
    assert module_path(new) == "somewhere.else"


def test_emitting_what_does_not_fit_fails() -> None:
    graph = small()
    with graph.graph.inserting_after(node(graph, "relu")), pytest.raises(RuntimeError):
        emit(graph, aten.linear.default, node(graph, "relu"), node(graph, "a_weight"), path="")


def test_emitting_over_a_parameter_that_has_no_recorded_shape() -> None:
    graph = small()
    graph.register_parameter("scale", nn.Parameter(torch.ones(8)))
    relu = node(graph, "relu")
    with graph.graph.inserting_after(relu):
        scale = get_attr(graph, "scale")
    scale.meta.clear()
    with graph.graph.inserting_after(scale):
        new = emit(graph, aten.mul.Tensor, relu, scale, path="a")
    assert shape_of(new)[-1] == 8  # type: ignore[index]


def test_path_of_a_node_can_be_set() -> None:
    graph = small()
    set_path(node(graph, "relu"), "x.y")
    assert module_path(node(graph, "relu")) == "x.y"


def test_erasing_takes_in_place_nodes_and_keeps_what_is_read() -> None:
    graph = surgeon.trace(Function(lambda m, x: m.b(m.a(x).relu_()), a=(6, 8), b=(8, 6)), X)
    inplace = node(graph, "relu_")
    down = node(graph, "linear_1")
    down.replace_input_with(inplace, node(graph, "linear"))
    erase_unread(graph, [inplace, node(graph, "linear")])
    names = {n.name for n in graph.graph.nodes}
    assert "relu_" not in names
    assert "linear" in names

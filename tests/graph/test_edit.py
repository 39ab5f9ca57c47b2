"""Tools for rewriting: new nodes have shapes and paths, inner values are what they were, copies share nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import surgeon
from surgeon.graph.capture import Capture
from surgeon.graph.edit import emit, erase_unread, get_attr, set_path
from surgeon.graph.ownership import adopt_changes, own_parameters, replace_attribute
from surgeon.graph.traced import aten, fork, module_path, shape_of, tidy
from surgeon.moe.module import MoE
from surgeon.passes import Moeify
from surgeon.sites.linear import find_linears
from surgeon.sites.search import find_ffns
from tests.small_models import Function, Many, stack, vectors

X = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))


def small() -> Any:
    torch.manual_seed(0)
    return surgeon.trace(Function(lambda m, x: m.b(F.relu(m.a(x))), a=(6, 8), b=(8, 6)), X)


def node(graph: Any, name: str) -> Any:
    return next(n for n in graph.graph.nodes if n.name == name)


# --- new nodes --------------------------------------------------------------------------------------------------------


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


# --- capturing --------------------------------------------------------------------------------------------------------


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


# --- parameters -------------------------------------------------------------------------------------------------------


def test_own_parameters_shares_nothing_and_keeps_ties_and_names() -> None:
    model = stack()
    model.blocks[1].mix.weight = model.blocks[0].mix.weight
    model.head.bias.requires_grad_(False)
    graph = surgeon.trace(model, vectors())
    names, want = set(graph.state_dict()), graph(**vectors())
    own_parameters(graph)
    assert set(graph.state_dict()) == names
    theirs = {p.data_ptr() for p in [*model.parameters(), *model.buffers()]}
    assert not any(p.data_ptr() in theirs for p in [*graph.parameters(), *graph.buffers()])
    assert len(list(graph.parameters())) == len(list(model.parameters()))
    assert not graph.get_parameter("head.bias").requires_grad
    assert graph.get_parameter("head.weight").requires_grad
    assert torch.equal(graph(**vectors()), want)


def test_own_parameters_copies_modules_too(traces: Any) -> None:
    graph = traces("stack:shared")
    Moeify(experts=4).apply(graph)
    copied = fork(graph)
    own_parameters(copied)
    theirs = {p.data_ptr() for p in [*graph.parameters(), *graph.buffers()]}
    assert not any(p.data_ptr() in theirs for p in [*copied.parameters(), *copied.buffers()])
    assert sum(isinstance(m, MoE) for m in copied.modules()) == 1
    assert torch.equal(copied(**vectors()), graph(**vectors()))


def test_replace_attribute() -> None:
    graph = small()
    value = nn.Parameter(torch.zeros(8))
    replace_attribute(graph, "a.bias", value)
    assert graph.get_parameter("a.bias") is value
    replace_attribute(graph, "a.bias", None)
    assert "a.bias" not in graph.state_dict()


def test_adopted_changes_make_one_graph_the_other() -> None:
    graph = small()
    work = fork(graph)
    node(work, "relu").target = aten.tanh.default
    tidy(work)
    want = work(X)
    adopt_changes(graph, work)
    assert torch.equal(graph(X), want)
    assert set(graph.state_dict()) == set(work.state_dict())


# --- a whole layer ----------------------------------------------------------------------------------------------------


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

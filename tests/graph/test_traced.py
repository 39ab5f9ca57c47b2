"""The graph and its vocabulary: forks share and do not interfere, tidying drops what is unused, paths, ties."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import networkx as nx
import pytest
import torch
from torch import Tensor, nn

import surgeon
from surgeon.graph.traced import (
    aten,
    attribute,
    common_path,
    fork,
    free_target,
    is_call,
    module_path,
    move,
    nested_graphs,
    retie,
    shape_of,
    tensor_key,
    tensor_of,
    tidy,
    to_networkx,
)
from surgeon.tracing.quiet import quiet
from tests.small_models import Function, Wrapped, classifier, hugging_face, tokens

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))


def test_fork_shares_parameters_and_keeps_names_and_metadata() -> None:
    graph = surgeon.trace(small(), X)
    copied = fork(graph)
    assert {n: id(p) for n, p in copied.named_parameters()} == {n: id(p) for n, p in graph.named_parameters()}
    assert [node.name for node in copied.graph.nodes] == [node.name for node in graph.graph.nodes]
    assert [module_path(a) for a in copied.graph.nodes] == [module_path(b) for b in graph.graph.nodes]
    assert copied.meta["trace"] == graph.meta["trace"]
    assert torch.equal(copied(X), graph(X))


def test_rewriting_a_fork_leaves_the_original() -> None:
    graph = surgeon.trace(small(), X)
    want, code = graph(X), graph.code
    copied = fork(graph)
    relu = next(node for node in copied.graph.nodes if node.target is aten.relu.default)
    relu.target = aten.tanh.default
    copied.recompile()
    copied.meta["note"] = 1
    assert not torch.equal(copied(X), want)
    assert torch.equal(graph(X), want)
    assert graph.code == code
    assert "note" not in graph.meta


def test_fork_keeps_the_mode_and_the_way_of_calling(traces: Any) -> None:
    graph = traces("bert").train()
    copied = fork(graph)
    assert copied.training
    output = copied.eval()(**traces.inputs("bert"))
    assert type(output).__name__ == "SequenceClassifierOutput"
    assert graph.training


def test_deepcopy_and_state_dict_work_as_for_any_module(traces: Any) -> None:
    graph = traces("gelu")
    with quiet():  # torch.fx warns of itself
        copied = copy.deepcopy(graph)
    assert torch.equal(copied(**tokens()), graph(**tokens()))
    assert set(graph.state_dict()) == set(classifier("gelu").state_dict())
    with torch.no_grad():
        copied.get_parameter("head.weight").zero_()
    assert not torch.equal(copied(**tokens()), graph(**tokens()))


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_a_moved_graph_makes_every_tensor_there(name: str) -> None:
    """On the meta device an operation with a tensor that stayed behind raises."""
    model, inputs = hugging_face(name)
    graph = surgeon.trace(model, inputs)
    expected = graph(**inputs)
    assert any("cpu" in str(node.kwargs.get("device", "")) for node in graph.graph.nodes)
    move(graph, torch.device("meta"))
    found = graph(**{key: value.to("meta") for key, value in inputs.items()})
    for mine, theirs in zip(found.values(), expected.values(), strict=True):
        assert (mine.device.type, mine.shape) == ("meta", theirs.shape)


def test_what_is_no_buffer_moves_too() -> None:
    graph = surgeon.trace(small(), X)
    graph.constant = torch.ones(4)
    output = next(node for node in graph.graph.nodes if node.op == "output")
    result = output.all_input_nodes[0]
    with graph.graph.inserting_before(output):
        constant = graph.graph.create_node("get_attr", "constant")
        output.replace_input_with(result, graph.graph.call_function(aten.add.Tensor, (result, constant)))
    graph.recompile()
    move(graph, torch.device("meta"))
    assert graph.constant.device.type == "meta"
    assert graph(X.to("meta")).device.type == "meta"


def test_tidy_drops_dead_nodes_and_what_only_they_used() -> None:
    graph = surgeon.trace(small(), X)
    first = next(node for node in graph.graph.nodes if node.target is aten.linear.default)
    last = next(node for node in reversed(graph.graph.nodes) if node.target is aten.linear.default)
    last.replace_all_uses_with(first)
    tidy(graph)
    assert set(graph.state_dict()) == {"0.weight", "0.bias"}
    assert not any(node.target is aten.relu.default for node in graph.graph.nodes)
    assert torch.equal(
        graph(X), torch.nn.functional.linear(X, graph.get_parameter("0.weight"), graph.get_parameter("0.bias"))
    )


def test_tidy_keeps_what_is_used() -> None:
    graph = surgeon.trace(small(), X)
    before = {name: id(p) for name, p in graph.named_parameters()}
    tidy(graph)
    assert {name: id(p) for name, p in graph.named_parameters()} == before


@pytest.mark.parametrize(
    ("paths", "common"),
    [
        (["a.b.fc1", "a.b.fc2"], "a.b"),
        (["a.b", "a.b"], "a.b"),
        (["a.b", "a.bc"], "a"),
        (["a", "b"], ""),
        (["a.b", "a"], "a"),
        (["", "a"], ""),
        ([], ""),
    ],
)
def test_common_path(paths: list[str], common: str) -> None:
    assert common_path(paths) == common


def test_module_path_of_called_twice_and_of_the_model_itself() -> None:
    model = Function(lambda m, x: m.inner(m.inner(x)) + 1, inner=Wrapped(nn.Linear(4, 4), 4))
    graph = surgeon.trace(model, X)
    linears = [node for node in graph.graph.nodes if node.target is aten.linear.default]
    assert [module_path(node) for node in linears] == ["inner.ffn", "inner.ffn"]
    assert module_path(next(node for node in graph.graph.nodes if node.target is aten.add.Tensor)) == ""


def test_reading_nodes() -> None:
    graph = surgeon.trace(small(), X)
    weight = next(node for node in graph.graph.nodes if node.op == "get_attr" and node.target == "0.weight")
    linear = next(node for node in graph.graph.nodes if is_call(node, aten.linear.default))
    assert tensor_of(graph, weight) is graph.get_parameter("0.weight")
    assert tensor_of(graph, linear) is None
    assert attribute(graph, "0.bias") is graph.get_parameter("0.bias")
    assert shape_of(linear)[1] == 8  # type: ignore[index]
    assert shape_of(next(iter(reversed(graph.graph.nodes)))) is None
    assert not is_call(weight, aten.linear.default)
    assert not is_call(None, aten.linear.default)


def test_tensor_key_is_the_memory() -> None:
    tensor = torch.zeros(4, 4)
    assert tensor_key(tensor) == tensor_key(tensor.view(4, 4)) == tensor_key(nn.Parameter(tensor))
    assert tensor_key(tensor) != tensor_key(tensor.t())
    assert tensor_key(tensor) != tensor_key(tensor[1:])
    assert tensor_key(torch.empty(0)) != tensor_key(torch.empty(0, 1))
    meta = torch.zeros(2, device="meta"), torch.zeros(2, device="meta")
    assert tensor_key(meta[0]) != tensor_key(meta[1])


def test_retie_makes_one_object_of_one_memory() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 4, bias=False))
    graph = surgeon.trace(model, X)
    setattr(graph.get_submodule("2"), "weight", nn.Parameter(graph.get_parameter("0.weight").detach()))  # noqa: B010
    assert len(list(graph.parameters())) == 2
    retie(graph)
    assert len(list(graph.parameters())) == 1
    graph(X).sum().backward()
    before = graph.get_parameter("0.weight").detach().clone()
    torch.optim.SGD(graph.parameters(), lr=0.1).step()
    gradient = graph.get_parameter("2.weight").grad
    assert gradient is not None
    assert torch.allclose(graph.get_parameter("2.weight"), before - 0.1 * gradient)


def test_place_for_a_new_module() -> None:
    graph = surgeon.trace(small(), X)
    assert free_target(graph, "", "moe") == "moe"
    assert free_target(graph, "2", "moe") == "2.moe"
    assert free_target(graph, "new.path", "moe") == "new.path.moe"
    assert free_target(graph, "", "0") == "0_1"
    assert free_target(graph, "0", "weight") == "0.weight_1"
    graph.add_submodule("0_1", nn.Identity())
    assert free_target(graph, "", "0") == "0_2"
    assert free_target(graph, "0.weight", "moe") == "0.moe"  # a parameter holds no module


def test_networkx_view() -> None:
    graph = surgeon.trace(small(), X)
    view = to_networkx(graph)
    assert set(view) == {node.name for node in graph.graph.nodes}
    assert view.nodes["relu"]["path"] == "1"
    assert view.nodes["relu"]["op"] == "call_function"
    assert view.has_edge("linear", "relu")
    assert view.has_edge("relu", "linear_1")
    assert not view.has_edge("relu", "linear")
    assert view.nodes["relu"]["shape"].endswith("×8")
    assert view.nodes["relu"]["dtype"] == "float32"


def test_networkx_writes_every_format(traces: Any, tmp_path: Path) -> None:
    """The model has sizes that are symbols, and nodes that are no tensors."""
    view = to_networkx(traces("gelu"))
    nx.write_graphml(view, tmp_path / "graph.graphml")
    nx.write_gexf(view, tmp_path / "graph.gexf")
    (tmp_path / "graph.json").write_text(json.dumps(nx.node_link_data(view, edges="edges")))
    there = {
        "graphml": nx.read_graphml(tmp_path / "graph.graphml"),
        "gexf": nx.read_gexf(tmp_path / "graph.gexf"),
        "json": nx.node_link_graph(json.loads((tmp_path / "graph.json").read_text()), edges="edges"),
    }
    for kind, read in there.items():
        assert set(read.edges) == set(view.edges), kind
        for name in view:
            assert {key: read.nodes[name].get(key, "") for key in view.nodes[name]} == view.nodes[name], (kind, name)


def test_dropout_inside_nested_graphs_is_switched_too() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.drop = nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", enabled=False):
                return self.fc(self.drop(x))

    graph = surgeon.trace(Nested(), X)
    assert any(True for _ in nested_graphs(graph))
    big = torch.ones(64, 4)
    assert not torch.equal(graph.train()(big), graph.train()(big))
    assert torch.equal(graph.eval()(big), graph.eval()(big))

"""What changed between graphs, as data: complete, by module path, and through JSON and back."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from typing import Any

from pydantic import TypeAdapter

from surgeon.dynamic.knobs import set_tau
from surgeon.graph.snapshot import GraphDiff, compare, compare_unrelated, snapshot
from surgeon.graph.traced import aten, fork, module_path
from surgeon.passes import Lower, Moeify, SwapActivation
from surgeon.passes.report import PassDiff
from surgeon.surgery.pipeline import Pipeline
from surgeon.tracing.trace import trace
from tests.small_models import classifier, tokens


def lines(diff: GraphDiff, sign: str) -> list[str]:
    return [node.text for node in (diff.removed if sign == "-" else diff.added)]


def test_same_graph_has_no_difference(traces: Any) -> None:
    graph = traces("gelu")
    diff = compare(snapshot(graph), snapshot(fork(graph)))
    assert not diff
    assert diff == GraphDiff()


def test_values_of_weights_and_modes_are_no_difference(traces: Any) -> None:
    graph = traces("gelu")
    Moeify(experts=4).apply(graph)
    before = snapshot(graph)
    set_tau(graph, 0.5)
    assert not compare(before, snapshot(graph))


def test_snapshot_holds_every_computing_node_and_parameter(traces: Any) -> None:
    graph = traces("gelu")
    taken = snapshot(graph)
    computing = {
        node.name: module_path(node)
        for node in graph.graph.nodes
        if node.op == "call_function" and node.target is not aten.sym_size.int and "val" in node.meta
    }
    assert set(taken.nodes) <= set(computing) | {node.name for node in graph.graph.nodes}
    assert {name: node.path for name, node in taken.nodes.items() if name in computing} == {
        name: path for name, path in computing.items() if name in taken.nodes
    }
    assert not any("sym_size" in name for name in taken.nodes)
    assert {name: tuple(p.shape) for name, p in graph.named_parameters()} == taken.parameters
    text = next(node.text for name, node in taken.nodes.items() if "gelu" in name)
    assert text.startswith("gelu = gelu(linear_4)")
    assert text.endswith("×32")


def test_swapped_activation_is_one_node_for_another(traces: Any) -> None:
    graph = traces("gelu")
    before = snapshot(graph)
    SwapActivation(only=("blocks.0.*",)).apply(graph)
    diff = compare(before, snapshot(graph))
    assert all(path.startswith("blocks.0.ffn") for path in diff.by_path())
    assert any("= gelu(" in line for line in lines(diff, "-"))
    assert any("= relu(" in line for line in lines(diff, "+"))
    assert diff.removed_parameters == diff.added_parameters == ()


def test_experts_replace_a_layer_and_nothing_else_changes(traces: Any) -> None:
    graph = traces("gelu")
    before = snapshot(graph)
    Moeify(experts=4, router_width=8, only=("blocks.1.*",)).apply(graph)
    diff = compare(before, snapshot(graph))
    assert any("= blocks.1.ffn.moe(layer_norm_3)" in line for line in lines(diff, "+"))
    assert not any("linear" in line and "ffn" in line for line in lines(diff, "+"))
    gone = {name for name, _ in diff.removed_parameters}
    assert gone == {f"blocks.1.ffn.{fc}.{kind}" for fc in ("fc1", "fc2") for kind in ("weight", "bias")}
    assert ("blocks.1.ffn.moe.w1", (4, 8, 16)) in diff.added_parameters
    # Besides the layer only the node that reads its output changes.
    assert len([path for path in diff.by_path() if not path.startswith("blocks.1.ffn")]) <= 1


def test_a_changed_shape_under_the_same_name_is_a_difference(traces: Any) -> None:
    before = snapshot(traces("gelu"))
    after = snapshot(traces("gelu"))
    after.parameters["head.weight"] = (4, 16)
    diff = compare(before, after)
    assert diff.removed_parameters == (("head.weight", (3, 16)),)
    assert diff.added_parameters == (("head.weight", (4, 16)),)


def test_back_and_forth_is_the_mirror_image(traces: Any) -> None:
    graph = traces("gelu")
    before = snapshot(graph)
    Moeify(experts=4).apply(graph)
    Lower().apply(graph)
    after = snapshot(graph)
    there, back = compare(before, after), compare(after, before)
    assert sorted(lines(there, "+")) == sorted(lines(back, "-"))
    assert sorted(lines(there, "-")) == sorted(lines(back, "+"))


def test_through_json(traces: Any) -> None:
    graph = traces("gelu")
    before = snapshot(graph)
    SwapActivation().apply(graph)
    diff = compare(before, snapshot(graph))
    assert TypeAdapter(GraphDiff).validate_python(json.loads(json.dumps(asdict(diff)))) == diff


def test_graphs_traced_apart_are_compared_by_place() -> None:
    one, other = (trace(classifier("gelu", layers=1), tokens()) for _ in range(2))
    assert not compare_unrelated(snapshot(one), snapshot(other))
    SwapActivation().apply(other)
    diff = compare_unrelated(snapshot(one), snapshot(other))
    assert any("gelu" in line for line in lines(diff, "-"))
    assert any("relu" in line for line in lines(diff, "+"))
    assert all(path.startswith("blocks.0.ffn") for path in diff.by_path())


def test_one_difference_per_pass(traces: Any) -> None:
    surgery = Pipeline([SwapActivation(), Moeify(experts=4), Lower()]).run(traces("gelu"), inputs=tokens())
    diff = surgery.diff()
    assert all(isinstance(one, PassDiff) for one in diff.passes)
    assert [one.report.name for one in diff.passes] == ["swap-activation", "moeify", "lower"]
    assert all(one.graph for one in diff.passes)
    text = str(diff)
    for word in ("swap-activation", "moeify", "lower", "gelu", "dynamic_k_ffn"):
        assert word in text
    assert diff.text("stat") != diff.text("full") != text
    assert "= relu(" in diff.text("full")


def test_shapes_have_the_names_of_sizes() -> None:
    graph = trace(classifier(), tokens())
    shapes = {node.shape for node in snapshot(graph).nodes.values()}
    assert any(shape.startswith("batch×tokens×") for shape in shapes), shapes
    assert not any(re.search(r"\bs\d", shape) for shape in shapes)

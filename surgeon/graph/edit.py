"""Rewrite a graph: add nodes with shapes and module paths, replace values, and erase or merge nodes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.utils._pytree import tree_map_only

from surgeon.graph.traced import TRAIN_VALUE, TracedGraph, aten, is_call, shape_of, tensor_key, tensor_of


def emit(
    graph: GraphModule,
    target: Any,
    *args: Any,
    path: str,
    name: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Node:
    """Add a `call_function` node at the graph's insertion point, and record its output shape and module path.

    Args:
        target: an op, such as `torch.ops.aten.relu.default`. args: its positional arguments: nodes, numbers, lists.
        path: the module path that the node belongs to, which reports and pictures show.
        name: the node's name, by default made from the op's.
        options: keyword arguments of the op, no nodes.

    Returns:
        The node. Its `meta["val"]` is a tensor without storage that has shape and dtype.

    Raises:
        RuntimeError: the op does not accept the shapes of its arguments.
    """
    node = graph.graph.create_node("call_function", target, args, dict(options or {}), name=name)
    mode = detect_fake_mode([source.meta.get("val") for source in node.all_input_nodes])
    assert mode is not None, "a traced graph records fake values"

    def value(source: Node) -> Any:
        if "val" not in source.meta:
            tensor = tensor_of(graph, source)
            assert tensor is not None
            source.meta["val"] = mode.from_tensor(tensor, static_shapes=True)
        return source.meta["val"]

    with mode, torch.no_grad():
        made = target(*map_arg(node.args, value), **node.kwargs)
    # A view would hold what it is a view of.
    node.meta["val"] = tree_map_only(Tensor, Tensor.detach, made)
    set_path(node, path)
    return node


def get_attr(graph: GraphModule, target: str) -> Node:
    """Add a node that reads a parameter or buffer."""
    node = graph.graph.get_attr(target)
    mode = detect_fake_mode([other.meta.get("val") for other in graph.graph.nodes])
    tensor = tensor_of(graph, node)
    if mode is not None and tensor is not None:
        node.meta["val"] = mode.from_tensor(tensor, static_shapes=True)
    return node


def set_path(node: Node, path: str) -> None:
    """Record the module path that a node belongs to, in the same place as `torch.export` does."""
    node.meta["nn_module_stack"] = {path: (path, "torch.nn.Module")}


def emit_dropout(graph: TracedGraph, value: Node, probability: float, *, path: str) -> Node:
    """Add a dropout that follows the graph's training mode, and return its node.

    Returns `value` itself if the probability is 0, or if the graph is in evaluation form and has no training mode.
    """
    if probability == 0.0 or graph.meta["trace"].form == "eval":
        return value
    node = emit(graph, aten.dropout.default, value, probability, graph.training, path=path)
    node.meta[TRAIN_VALUE] = True
    return node


def replace_value(old: Node, new: Node, x: Node, inside: Iterable[Node]) -> None:
    """Let all users of `old` read `new` instead.

    Other nodes may still read the size of a value inside the replaced part, but never its content. These size nodes
    read the part's input `x` instead, where it has the same size.
    """
    old.replace_all_uses_with(new)
    for node in inside:
        for user in list(node.users):
            if is_call(user, aten.sym_size.int):
                dim = user.args[1]
                assert isinstance(dim, int)
                value, other = shape_of(node), shape_of(x)
                if value and other and len(value) == len(other) and str(value[dim]) == str(other[dim]):
                    user.update_arg(0, x)


def output_leaves(graph: GraphModule) -> list[Any]:
    """Return what the graph's output node holds: nodes and constants, in the order of the flat output."""
    (value,) = graph.graph.output_node().args
    return list(value) if isinstance(value, list | tuple) else [value]


def replace_outputs(graph: GraphModule, values: Mapping[int, Any]) -> None:
    """Let the graph return other constants in some places of its flat output."""
    leaves = output_leaves(graph)
    for index, value in values.items():
        leaves[index] = value
    graph.graph.output_node().args = (tuple(leaves),)
    graph.recompile()


def erase_unread(graph: GraphModule, nodes: Iterable[Node]) -> None:
    """Erase the given nodes that have no users, including in-place ops, which dead-code elimination keeps."""
    doomed = set(nodes)
    for node in reversed(list(graph.graph.nodes)):
        if node in doomed and not node.users:
            graph.graph.erase_node(node)


def merge_duplicates(graph: GraphModule, nodes: Iterable[Node]) -> None:
    """Merge nodes that apply the same op to the same values, and nodes that read the same tied parameter."""
    candidates = set(nodes)
    first: dict[Any, Node] = {}
    for node in list(graph.graph.nodes):
        if node not in candidates:
            continue
        tensor = tensor_of(graph, node)
        key = tensor_key(tensor) if tensor is not None else (node.target, repr(node.args), repr(node.kwargs))
        kept = first.setdefault(key, node)
        if kept is not node:
            node.replace_all_uses_with(kept)
            graph.graph.erase_node(node)

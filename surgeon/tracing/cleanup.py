"""Clean up an exported graph: first names of tensors, copies of inputs that are written, no guards and dead nodes."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from surgeon.graph.ops import VIEWS
from surgeon.graph.traced import (
    TracedGraph,
    aten,
    attribute,
    delete_unused_submodules,
    is_call,
    nested_graphs,
    tensor_of,
)
from surgeon.tracing.embeddings import dense_gradients

# Views for some inputs and copies for others, which their schemas do not say.
_MAYBE_VIEWS = VIEWS | {
    *(aten.contiguous.default, aten.expand_as.default, aten.view_as.default, aten.ravel.default, aten.chunk.default),
    *(aten.tensor_split.sections, aten.swapaxes.default, aten.moveaxis.int, aten.movedim.int, aten.numpy_T.default),
    aten.narrow.default,
}


def use_first_names(graph: TracedGraph, model: nn.Module) -> None:
    """Read a tensor that has several names in the model by the first of them, as `named_parameters` does."""
    names = {id(t): name for name, t in reversed([*model.named_parameters(), *model.named_buffers()])}
    for node in graph.graph.nodes:
        tensor = tensor_of(graph, node)
        name = names.get(id(tensor)) if tensor is not None else None
        if name is None or name == node.target:
            continue
        owner: nn.Module = graph
        *parents, field = name.split(".")
        for parent in parents:
            if not hasattr(owner, parent):
                owner.add_module(parent, nn.Module())
            owner = getattr(owner, parent)
        if isinstance(tensor, nn.Parameter):
            owner.register_parameter(field, tensor)
        elif tensor is not None:
            owner.register_buffer(field, tensor)
        node.target = name
    used = {str(node.target) for node in graph.graph.nodes if node.op == "get_attr"}
    for name, tensor in list(graph.named_parameters(remove_duplicate=False)):
        if name not in used and id(tensor) in names:
            holder, _, field = name.rpartition(".")
            delattr(graph.get_submodule(holder), field)


def _inline_no_autocast(graph: TracedGraph) -> None:
    """Inline the body of each region that switches autocast off, because the graph runs without autocast."""
    for node in list(graph.graph.nodes):
        if not is_call(node, torch.ops.higher_order.wrap_with_autocast) or node.args[2] is not False:
            continue
        body = attribute(graph, str(node.args[4].target))
        placeholders = [inner for inner in body.graph.nodes if inner.op == "placeholder"]
        mapping: dict[Node, Any] = dict(zip(placeholders, node.args[5:], strict=True))
        with graph.graph.inserting_before(node):
            for inner in body.graph.nodes:
                if inner.op in ("call_function", "get_attr"):
                    mapping[inner] = graph.graph.node_copy(inner, mapping.__getitem__)
        results: Any = torch.fx.node.map_arg(body.graph.output_node().args[0], mapping.__getitem__)
        for user in list(node.users):
            if is_call(user, operator.getitem):
                user.replace_all_uses_with(results[user.args[1]])
                graph.graph.erase_node(user)
        if not node.users:
            graph.graph.erase_node(node)


def clean(graph: TracedGraph) -> None:
    """Remove nodes that compute nothing: assertions on metadata, guards and dead nodes."""
    _inline_no_autocast(graph)
    dense_gradients(graph)
    for part in nested_graphs(graph):
        for node in list(part.graph.nodes):
            guard = node.op == "call_module" and str(node.target).endswith("_guards_fn")
            if guard or is_call(node, aten._assert_tensor_metadata.default) or _counts_batches(node):
                part.graph.erase_node(node)
        part.graph.eliminate_dead_code()
        part.recompile()
    delete_unused_submodules(graph)


def _counts_batches(node: Node) -> bool:
    """Whether the node counts the batches of a batch normalisation. It would count in evaluation too, to no use."""
    if not is_call(node, aten.add_.Tensor) or node.users:
        return False
    source = node.args[0]
    return isinstance(source, Node) and str(source.target).endswith("num_batches_tracked")


def changed_buffers(graph: GraphModule) -> list[str]:
    """Return the parameters and buffers that the graph changes in place when it runs, except batch statistics."""
    return [
        str(node.target)
        for part in nested_graphs(graph)
        for node in _written(part)
        if tensor_of(part, node) is not None
    ]


def copy_written_inputs(graph: TracedGraph) -> list[str]:
    """Let the graph work on copies of the inputs that it changes in place, so that a caller's tensors stay as they are.

    Returns:
        The names of these inputs.
    """
    written = [node for node in dict.fromkeys(_written(graph)) if node.op == "placeholder"]
    last = [node for node in graph.graph.nodes if node.op == "placeholder"][-1:]
    for node in written:
        with graph.graph.inserting_after(last[0]):
            copy = graph.graph.call_function(aten.clone.default, (node,))
        copy.meta = {key: value for key, value in node.meta.items() if key == "val"}
        for user in [user for user in node.users if user is not copy]:
            user.replace_input_with(node, copy)
    if written:
        graph.recompile()
    return [node.name for node in written]


def _written(part: GraphModule) -> Iterator[Node]:
    """Yield the nodes whose value is changed in place, also through views of it, except batch statistics."""
    for node in part.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if schema is None or not schema.is_mutable or node.target is aten.batch_norm.default:
            continue
        for argument, value in _arguments(schema, node):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for one in value if isinstance(value, list | tuple) else (value,):
                    if isinstance(one, Node):
                        yield from _memory_of(part, one)


def _memory_of(part: GraphModule, node: Node) -> Iterator[Node]:
    """Yield the node and those whose memory its value may lie in."""
    while True:
        yield node
        source: Any = None
        schema = getattr(node.target, "_schema", None)
        if is_call(node, operator.getitem) or (node.op == "call_function" and node.target in _MAYBE_VIEWS):
            source = node.args[0]
        elif schema is not None and any(result.alias_info is not None for result in schema.returns):
            found = (value for argument, value in _arguments(schema, node) if argument.alias_info is not None)
            source = next(found, None)
        if not isinstance(source, Node) or _dtype(part, source) != _dtype(part, node):  # a conversion is a copy
            return
        node = source


def _dtype(part: GraphModule, node: Node) -> torch.dtype | None:
    """The data type of a node's tensor, or of the first of several."""
    value = tensor_of(part, node)
    value = node.meta.get("val") if value is None else value
    if isinstance(value, list | tuple):
        value = value[0] if value else None
    return value.dtype if isinstance(value, torch.Tensor) else None


def _arguments(schema: Any, node: Node) -> Iterator[tuple[Any, Any]]:
    for index, argument in enumerate(schema.arguments):
        yield argument, node.args[index] if index < len(node.args) else node.kwargs.get(argument.name)

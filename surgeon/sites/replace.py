"""Replace an execution of a feed-forward layer by one node, such as a call of a module."""

from __future__ import annotations

from collections.abc import Callable

from torch.fx import GraphModule, Node

from surgeon.graph.edit import emit, erase_unread, replace_value, set_path
from surgeon.graph.traced import aten, shape_of
from surgeon.sites.ffn import LayerCall


def replace_call(graph: GraphModule, call: LayerCall, target: str) -> str:
    """Replace one execution of a feed-forward layer by the module at `target`; returns the new node's name."""

    def module() -> Node:
        node = graph.graph.call_module(target, (call.x,))
        set_path(node, target)
        old, x_shape = call.output.meta["val"], shape_of(call.x)
        assert x_shape is not None
        node.meta["val"] = call.x.meta["val"].new_empty((*x_shape[:-1], old.shape[-1]), dtype=old.dtype)
        return node

    return replace_by(graph, call, module, path=target.rpartition(".")[0])


def replace_by(graph: GraphModule, call: LayerCall, make: Callable[[], Node], *, path: str) -> str:
    """Replace one execution of a feed-forward layer by a node of the same rows; returns the new node's name.

    make: adds the node at the graph's insertion point. path: the module path of the layer.
    """
    old = call.output
    # Insert the node where the layer first read its input, in case the input is changed in place later.
    first_read = min(call.first, key=lambda linear: list(graph.graph.nodes).index(linear.core)).core
    with graph.graph.inserting_before(first_read):
        shape, x_shape = shape_of(old), shape_of(call.x)
        assert shape is not None
        assert x_shape is not None
        new = node = make()
        if len(shape) != len(x_shape):
            # The layer flattened its tokens.
            new = emit(graph, aten.reshape.default, node, [-1, shape[-1]], path=path)
    inside = {n for linear in (*call.first, call.down) for n in linear.nodes} | set(call.cone)
    replace_value(old, new, call.x, inside)
    erase_unread(graph, inside)
    return new.name

"""Give embeddings that were made with `sparse=True` dense gradients.

A penalty, a gradient norm and most optimizers cannot take sparse gradients, and passes train the whole graph. The
values are the same; only memory is saved by sparse ones.
"""

from __future__ import annotations

from torch.fx import GraphModule, Node

from surgeon.graph.traced import nested_graphs

_WAS_SPARSE = "surgeon_was_sparse"


def dense_gradients(graph: GraphModule) -> None:
    """Switch sparse gradients off in every op of the graph that has them."""
    for part in nested_graphs(graph):
        for node in part.graph.nodes:
            place = _sparse_argument(node)
            if place is None:
                continue
            if len(node.args) > place and node.args[place]:
                node.update_arg(place, False)
                node.meta[_WAS_SPARSE] = True
            elif node.kwargs.get("sparse"):
                node.update_kwarg("sparse", False)
                node.meta[_WAS_SPARSE] = True


def sparse_notes(graph: GraphModule) -> list[str]:
    """Note the embeddings whose gradients are dense in the graph, unlike in the model."""
    names = [
        str(getattr(node.args[0], "target", node.args[0]))
        for part in nested_graphs(graph)
        for node in part.graph.nodes
        if node.meta.get(_WAS_SPARSE) and node.args
    ]
    tables = ", ".join(dict.fromkeys(names))
    return [f"Embeddings with sparse=True get dense gradients in the graph: {tables}."] if tables else []


def _sparse_argument(node: Node) -> int | None:
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None:
        return None
    return next((place for place, argument in enumerate(schema.arguments) if argument.name == "sparse"), None)

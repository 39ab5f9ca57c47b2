"""Read intermediate values of a graph."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule, Node

from surgeon.graph.calls import return_as_is, unflatten_output
from surgeon.graph.ops import carries_values
from surgeon.graph.traced import aten, fork
from surgeon.graph.walk import walk_users


class Capture(nn.Module):
    """A graph that also returns intermediate values: a call gives (output, {node name: value}).

    It shares the parameters of the original graph. Without `keep_output` the output is None, and nodes that the values
    do not need are removed.
    """

    def __init__(self, graph: GraphModule, names: Iterable[str], *, keep_output: bool = False) -> None:
        super().__init__()
        self.graph = fork(graph)
        nodes = {node.name: node for node in self.graph.graph.nodes}
        output = self.graph.graph.output_node()
        self._arranged = functools.partial(unflatten_output, graph)
        return_as_is(self.graph)
        values = {name: _before_changes(self.graph, nodes[name]) for name in names}
        output.args = ((output.args[0] if keep_output else None, values),)
        self.graph.graph.eliminate_dead_code()
        self.graph.recompile()

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Tensor]]:
        """Run the graph with its own arguments."""
        output, values = self.graph(*args, **kwargs)
        return None if output is None else self._arranged(output), values


def _before_changes(graph: GraphModule, node: Node) -> Node:
    """Return the node, or a copy of its value if the graph later changes it in place (`x += y`, an in-place ReLU)."""
    base = node
    while carries_values(base):
        source = base.args[0]
        assert isinstance(source, Node)
        base = source
    schemas = (getattr(user.target, "_schema", None) for user in walk_users(base, carries_values))
    if not any(schema is not None and schema.is_mutable for schema in schemas):
        return node
    with graph.graph.inserting_after(node):
        return graph.graph.call_function(aten.clone.default, (node,))

"""Layers in regions: parts of a graph that an op runs as a graph of their own, such as the body of `torch.autocast`.

Passes do not rewrite such bodies. To say so for every layer in them, a copy of the graph is searched in which all
bodies stand in place of their ops. The copy is never run: it would compute without autocast, and both sides of a
condition.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from surgeon.graph.traced import attribute, is_call
from surgeon.sites.ffn import FFN
from surgeon.sites.linear import Linear
from surgeon.sites.linear_site import LinearSite
from surgeon.sites.rejection import Rejection

Site = TypeVar("Site", FFN, LinearSite)
_AUTOCAST = torch.ops.higher_order.wrap_with_autocast


def refused_in_regions(
    graph: GraphModule, search: Callable[[GraphModule], tuple[Sequence[Site], Sequence[Rejection]]]
) -> list[Rejection]:
    """Refuse the layers that `search` finds in the bodies of ops, and return what it refuses there."""
    if not any(_bodies(graph, node) for node in graph.graph.nodes):
        return []
    flat = _Flattened(graph)
    sites, rejections = search(flat.copy)
    found = []
    for site in sites:
        region = flat.region_of(part.core for part in _linears(site))
        if region is not None:
            found.append(_refuse(site.path, region))
    for rejection in rejections:
        region = flat.region_of(node for node in flat.copy.graph.nodes if node.name == rejection.node)
        if region is not None:
            found.append(replace(rejection, node=region.name))
    return found


def _refuse(path: str, region: Node) -> Rejection:
    if is_call(region, _AUTOCAST):
        device, dtype = region.args[:2]
        what = f"it is computed under torch.autocast('{device}', {str(dtype).removeprefix('torch.')})"
        return Rejection("under-autocast", what, path, region.name)
    name = getattr(region.target, "__name__", str(region.target))
    return Rejection("in-subgraph", f"it is computed in the body of an op of its own ({name})", path, region.name)


def _linears(site: FFN | LinearSite) -> Iterable[Linear]:
    if isinstance(site, LinearSite):
        return site.calls
    return [part for call in site.calls for part in (*call.first, call.down)]


def _bodies(owner: GraphModule, node: Node) -> list[tuple[str, GraphModule]]:
    """The graphs that an op runs, with their paths."""
    if not isinstance(node.target, torch._ops.HigherOrderOperator):
        return []
    read = [source for source in node.all_input_nodes if source.op == "get_attr"]
    found = [(str(source.target), attribute(owner, str(source.target))) for source in read]
    return [(path, body) for path, body in found if isinstance(body, GraphModule)]


class _Flattened:
    """A copy of a graph with the bodies of its ops in place of the ops."""

    def __init__(self, graph: GraphModule) -> None:
        self._nodes, self._regions = Graph(), dict[Node, Node]()
        self._nodes.output(self._copy(graph, "", {}, None))
        self.copy = GraphModule(graph, self._nodes)

    def region_of(self, nodes: Iterable[Node]) -> Node | None:
        """The op of the original graph whose body holds one of the copied nodes, or None."""
        return next((self._regions[node] for node in nodes if node in self._regions), None)

    def _copy(self, owner: GraphModule, prefix: str, values: dict[Node, Any], region: Node | None) -> Any:
        """Copy the nodes of a graph at path `prefix`. `values`: of its inputs in a body. Returns its output's value."""
        for node in owner.graph.nodes:
            if node in values:
                continue
            if node.op == "output":
                return map_arg(node.args[0], values.__getitem__)
            bodies = _bodies(owner, node)
            if bodies:
                operands: list[Any] = [
                    value for value in pytree.arg_tree_leaves(*node.args) if isinstance(value, Node | int | float)
                ]
                for path, body in bodies:
                    inputs = [inner for inner in body.graph.nodes if inner.op == "placeholder"]
                    # The operands come last, after what configures the op.
                    given = [values.get(value, value) for value in operands[len(operands) - len(inputs) :]]
                    of_body = dict(zip(inputs, given, strict=True))
                    values[node] = self._copy(body, f"{prefix}{path}.", of_body, region or node)
            elif is_call(node, operator.getitem) and isinstance(values[node.args[0]], tuple | list):
                values[node] = values[node.args[0]][node.args[1]]
            else:
                copied = values[node] = self._nodes.node_copy(node, values.__getitem__)
                if node.op == "get_attr":
                    copied.target = prefix + str(node.target)
                if region is not None:
                    self._regions[copied] = region
        raise AssertionError("a graph ends with its output")

"""Find what changed between two graphs: nodes by name, grouped by module path. `render` prints the result."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import GraphModule, Node

from surgeon.graph.sizes import Sizes
from surgeon.graph.traced import module_path, shape_of, shape_text
from surgeon.json_values import Plain


@dataclass(frozen=True)
class NodeRecord:
    """A computing node of a graph.

    path: of the module that it belongs to. op: what it runs. call: `linear(add_7, fc.weight)`.
    inputs: the names of the nodes and model inputs that it reads, without sizes and parameters.
    shape: of its value, `2×tokens×128`; empty for other values than tensors.
    """

    name: str
    path: str
    op: str
    call: str
    inputs: tuple[str, ...]
    shape: str

    @property
    def text(self) -> str:
        """`linear_4 = linear(add_7, fc.weight, fc.bias) : 2×s1×128`."""
        return f"{self.name} = {self.call}" + (f" : {self.shape}" if self.shape else "")


@dataclass(frozen=True)
class Snapshot:
    """A graph at one moment: its computing nodes by name in graph order, and each parameter's shape by name."""

    nodes: dict[str, NodeRecord]
    parameters: dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class GraphDiff(Plain):
    """What was removed and added: nodes in graph order, and parameters as (name, shape)."""

    removed: tuple[NodeRecord, ...] = ()
    added: tuple[NodeRecord, ...] = ()
    removed_parameters: tuple[tuple[str, tuple[int, ...]], ...] = ()
    added_parameters: tuple[tuple[str, tuple[int, ...]], ...] = ()

    def __bool__(self) -> bool:
        return bool(self.removed or self.added or self.removed_parameters or self.added_parameters)

    def by_path(self) -> dict[str, list[tuple[str, NodeRecord]]]:
        """Return the nodes of each module path with "-" or "+", the removed ones first."""
        found: dict[str, list[tuple[str, NodeRecord]]] = defaultdict(list)
        for sign, nodes in (("-", self.removed), ("+", self.added)):
            for node in nodes:
                found[node.path].append((sign, node))
        return dict(found)


def snapshot(graph: GraphModule) -> Snapshot:
    """Record a graph. Sizes, parameter reads and the output are left out, because they change with every neighbour."""
    names = _names_of_sizes(graph)
    nodes = {node.name: _record(node, names) for node in graph.graph.nodes if _computes(node)}
    parameters = {name: tuple(p.shape) for name, p in graph.named_parameters(remove_duplicate=False)}
    return Snapshot(nodes, parameters)


def compare(before: Snapshot, after: Snapshot) -> GraphDiff:
    """Return the differences. A node that kept its name but changed its op or inputs counts as removed and added."""
    return GraphDiff(
        _missing(before.nodes, after.nodes),
        _missing(after.nodes, before.nodes),
        tuple(item for item in before.parameters.items() if after.parameters.get(item[0]) != item[1]),
        tuple(item for item in after.parameters.items() if before.parameters.get(item[0]) != item[1]),
    )


def undone(nodes: Iterable[NodeRecord], diff: GraphDiff) -> list[NodeRecord]:
    """Return the nodes that a graph had before a difference, from those after it: in any order."""
    added = {node.name for node in diff.added}
    return [*(node for node in nodes if node.name not in added), *diff.removed]


def compare_unrelated(before: Snapshot, after: Snapshot) -> GraphDiff:
    """Compare graphs of separate traces. Module path, op and order identify a node here, not its name."""

    def renamed(taken: Snapshot) -> Snapshot:
        count: dict[tuple[str, str, str], int] = defaultdict(int)
        nodes = {}
        for node in taken.nodes.values():
            place = (node.path, node.op, node.shape)
            count[place] += 1
            name = f"{node.op}_{count[place]}"
            nodes[f"{node.path}/{name}/{node.shape}"] = replace(node, name=name, call=node.op, inputs=())
        return Snapshot(nodes, taken.parameters)

    return compare(renamed(before), renamed(after))


def _missing(nodes: dict[str, NodeRecord], there: dict[str, NodeRecord]) -> tuple[NodeRecord, ...]:
    return tuple(node for name, node in nodes.items() if there.get(name) != node)


def _computes(node: Node) -> bool:
    """Whether a node computes something other than a size."""
    return node.op in ("call_function", "call_module") and not isinstance(node.meta.get("val"), torch.SymInt)


def _names_of_sizes(graph: GraphModule) -> dict[str, str]:
    """The names of sizes that may change, such as "tokens", by export's, such as "s53"."""
    info = graph.meta.get("trace")
    if info is None:
        return {}
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    sizes = Sizes.parse(info.sizes)
    return {
        str(size): str(name)
        for node, given in zip(placeholders, sizes.inputs, strict=False)
        for size, name in zip(shape_of(node) or (), given.shape or (), strict=False)
        if isinstance(size, torch.SymInt) and name in sizes.axes
    }


def _record(node: Node, names: Mapping[str, str]) -> NodeRecord:
    packet = getattr(node.target, "overloadpacket", node.target)
    op = str(node.target) if node.op == "call_module" else getattr(packet, "__name__", str(packet))

    def show(value: Any) -> str:
        if isinstance(value, Node):
            return str(value.target) if value.op == "get_attr" else value.name
        if isinstance(value, list | tuple):
            return f"[{', '.join(map(show, value))}]"
        return str(value)

    arguments = [*map(show, node.args), *(f"{name}={show(value)}" for name, value in node.kwargs.items())]
    read = [one.name for one in node.all_input_nodes if one.op == "placeholder" or _computes(one)]
    call = f"{op}({', '.join(arguments)})"
    shape = re.sub(r"\b[su]\d+\b", lambda size: names.get(size[0], size[0]), shape_text(node))
    return NodeRecord(node.name, module_path(node), op, call, tuple(read), shape)

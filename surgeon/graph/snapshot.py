"""Find what changed between two graphs: nodes by name, grouped by module path. `render` prints the result."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from surgeon.graph.traced import module_path, shape_of


@dataclass(frozen=True)
class Snapshot:
    """A graph at one moment: each computing node by name as (module path, text), and each parameter's shape by name."""

    nodes: dict[str, tuple[str, str]]
    parameters: dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class GraphDiff:
    """Removed and added lines by module path, in graph order: `[("-", "relu = relu(linear)"), ("+", ...)]`."""

    changes: dict[str, list[tuple[str, str]]]
    parameters: list[tuple[str, str]]

    def __bool__(self) -> bool:
        return bool(self.changes or self.parameters)


def snapshot(graph: GraphModule) -> Snapshot:
    """Record a graph. Sizes, parameter reads and the output are left out, because they change with every neighbour."""
    nodes = {
        node.name: (module_path(node), _text(node))
        for node in graph.graph.nodes
        if node.op in ("call_function", "call_module") and not isinstance(node.meta.get("val"), torch.SymInt)
    }
    parameters = {name: tuple(p.shape) for name, p in graph.named_parameters(remove_duplicate=False)}
    return Snapshot(nodes, parameters)


def compare(before: Snapshot, after: Snapshot) -> GraphDiff:
    """Return the differences. A node that kept its name but changed its op or inputs counts as removed and added."""
    changes: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for name, (path, text) in before.nodes.items():
        if after.nodes.get(name, ("", ""))[1] != text:
            changes[path].append(("-", text))
    for name, (path, text) in after.nodes.items():
        if before.nodes.get(name, ("", ""))[1] != text:
            changes[path].append(("+", text))
    parameters = [
        *(
            ("-", _parameter(name, shape))
            for name, shape in before.parameters.items()
            if after.parameters.get(name) != shape
        ),
        *(
            ("+", _parameter(name, shape))
            for name, shape in after.parameters.items()
            if before.parameters.get(name) != shape
        ),
    ]
    return GraphDiff(dict(changes), parameters)


def compare_unrelated(before: Snapshot, after: Snapshot) -> GraphDiff:
    """Compare graphs of separate traces. Module path, op and order identify a node here, not its name."""

    def renamed(taken: Snapshot) -> Snapshot:
        count: dict[tuple[str, str], int] = defaultdict(int)
        nodes = {}
        for path, text in taken.nodes.values():
            line = f"{text.partition(' = ')[2].partition('(')[0]}{text[text.rfind(' : ') :] if ' : ' in text else ''}"
            count[path, line] += 1
            nodes[f"{path}/{line}/{count[path, line]}"] = (path, line)
        return Snapshot(nodes, taken.parameters)

    return compare(renamed(before), renamed(after))


def _parameter(name: str, shape: tuple[int, ...]) -> str:
    return f"{name} [{', '.join(map(str, shape))}]"


def _text(node: Node) -> str:
    """`linear_4 = linear(add_7, fc.weight, fc.bias) : 2×s1×128`."""
    packet = getattr(node.target, "overloadpacket", node.target)
    op = str(node.target) if node.op == "call_module" else getattr(packet, "__name__", str(packet))

    def show(value: Any) -> str:
        if isinstance(value, Node):
            return str(value.target) if value.op == "get_attr" else value.name
        if isinstance(value, list | tuple):
            return f"[{', '.join(map(show, value))}]"
        return str(value)

    arguments = [*map(show, node.args), *(f"{name}={show(value)}" for name, value in node.kwargs.items())]
    shape = shape_of(node)
    return f"{node.name} = {op}({', '.join(arguments)})" + (f" : {'×'.join(map(str, shape))}" if shape else "")

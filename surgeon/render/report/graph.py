"""The data of a drawing: every node of every stage of a graph, once."""

from __future__ import annotations

from typing import Any

from surgeon.graph.snapshot import NodeRecord
from surgeon.surgery.diff import Diff


def drawing(diff: Diff) -> dict[str, Any]:
    """Return the stages, and the nodes with the stages they are in, as `drawing.js` reads them."""
    stages = diff.graphs()
    added = [set(), *(set(pass_.graph.added) for pass_ in diff.passes)]
    removed = [*(set(pass_.graph.removed) for pass_ in diff.passes), set()]
    spans: dict[NodeRecord, list[list[int]]] = {}
    for number, nodes in enumerate(stages):
        for node in nodes:
            there = spans.setdefault(node, [])
            if there and there[-1][1] == number - 1:
                there[-1][1] = number
            else:
                there.append([number, number])
    return {
        "stages": ["before", *(pass_.report.name for pass_ in diff.passes)],
        "nodes": [
            [
                node.name, node.path, node.op, node.call, node.shape, node.inputs, first, last,
                int(node in added[first]), int(node in removed[last]),
            ]
            for node, there in spans.items()
            for first, last in there
        ],
    }  # fmt: skip

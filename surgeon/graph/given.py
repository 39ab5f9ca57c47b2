"""What users hand to functions: graphs, models and paths. Other things are refused in words."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from surgeon.errors import UsageError
from surgeon.graph.traced import TracedGraph


def check_model(model: Any) -> None:
    """Refuse what is neither a graph nor a model.

    Raises:
        UsageError: it is something else, such as the surgery that a graph belongs to.
    """
    if not isinstance(model, nn.Module):
        raise UsageError(f"This takes a graph or a model, but got {_kind(model)}.{_hint(model)}")


def check_graph(graph: Any, what: str = "This") -> None:
    """Refuse what is no graph of ATen ops.

    what: takes a graph, for the message.

    Raises:
        UsageError: it is something else, such as a model that was not traced.
    """
    if isinstance(graph, TracedGraph):
        return
    if not isinstance(graph, nn.Module):
        raise UsageError(f"{what} takes a graph, but got {_kind(graph)}.{_hint(graph)}")
    if not isinstance(graph, GraphModule) or not is_aten_graph(graph):
        got = "a graph of other ops" if isinstance(graph, GraphModule) else f"the model {type(graph).__name__}"
        hint = "Trace it first: surgeon.trace(model, inputs)"
        raise UsageError(f"{what} takes a graph of ATen ops, but got {got}. {hint}.")


def is_aten_graph(graph: GraphModule) -> bool:
    """Whether the graph consists of ATen ops with recorded shapes, as `torch.export` makes them.

    Passes of other libraries add nodes without shapes, as those do that quantise: such a graph is traced like a model.
    """
    if isinstance(graph, TracedGraph):  # it may have nothing but experts
        return True
    calls = [node for node in graph.graph.nodes if node.op == "call_function"]
    ops = [node for node in calls if isinstance(node.target, torch._ops.OpOverload)]
    regions = [node for node in calls if isinstance(node.target, torch._ops.HigherOrderOperator)]
    return (
        bool(ops or regions)
        and all(node.op != "call_method" for node in graph.graph.nodes)
        and all("val" in node.meta for node in ops if node.users)
    )


def path_of(directory: Any) -> Path:
    """Return the path of a directory.

    Raises:
        UsageError: it is no path.
    """
    if not isinstance(directory, str | os.PathLike):
        raise UsageError(f"A directory is named by its path, but got {_kind(directory)}.")
    return Path(directory)


def _kind(value: Any) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else f"an object of type {type(value).__name__}"


def _hint(value: Any) -> str:
    if isinstance(getattr(value, "graph", None), nn.Module):
        return " Give its graph: surgery.graph."
    return " surgeon.load reads a saved surgery." if isinstance(value, str) else ""

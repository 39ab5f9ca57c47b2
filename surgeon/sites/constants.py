"""Values between two linear layers that depend on parameters and buffers only: masks, learned scales, slopes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from surgeon.graph.traced import shape_of, tensor_of
from surgeon.graph.walk import walk_sources


def is_constant(graph: GraphModule, node: Node) -> bool:
    """Whether the value depends on parameters and buffers, and not only on buffers of a single number."""
    sources = list(walk_sources(node))
    if any(source.op not in ("get_attr", "call_function") for source in sources):
        return False
    tensors = [tensor for source in sources if (tensor := tensor_of(graph, source)) is not None]
    return any(isinstance(tensor, torch.nn.Parameter) or tensor.numel() != 1 for tensor in tensors)


def evaluate(graph: GraphModule, node: Node) -> Tensor:
    """Compute the value of a constant, detached."""

    def value(source: Node) -> Any:
        tensor = tensor_of(graph, source)
        if tensor is not None:
            return tensor.detach()
        assert callable(source.target)
        return source.target(*map_arg(source.args, value), **map_arg(source.kwargs, value))

    with torch.no_grad():
        return value(node)  # type: ignore[no-any-return]


def name_of(graph: GraphModule, node: Node) -> str:
    """Return the name of the parameter or buffer that a constant is computed from; of several, the first."""
    return next(str(source.target) for source in walk_sources(node) if tensor_of(graph, source) is not None)


def formula(node: Node) -> str:
    """Write how a constant is computed, the same for two nodes that compute the same."""
    if node.op == "get_attr":
        return str(node.target)
    return f"{node.target}({map_arg(node.args, formula)}, {map_arg(node.kwargs, formula)})"


def width_of(graph: GraphModule, node: Node) -> int | None:
    """Return how many numbers a constant has along the last dimension; None if it varies along another one."""
    tensor = tensor_of(graph, node)
    shape = shape_of(node) if tensor is None else tuple(tensor.shape)
    if shape is None or any(not isinstance(size, int) or size != 1 for size in shape[:-1]):
        return None
    return int(shape[-1]) if shape else 1

"""Sizes that may change from call to call: which an export leaves free, which its graph has, and larger batches."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from surgeon.graph.agreement import call_reproducibly, without_none


def dynamic_shapes(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the `dynamic_shapes` of an export: batch and sequence dimensions are free, all others fixed.

    The first dimension of every tensor is free. The second is free for integer and boolean tensors (token ids, masks)
    and for three-dimensional float tensors (embeddings). Export fixes the dimensions that the model needs fixed.
    """

    def free(value: object) -> dict[int, Any] | None:
        if not isinstance(value, Tensor):
            return None
        sequence = value.dim() >= 2 and (not value.is_floating_point() or value.dim() == 3)
        return {dim: Dim.AUTO for dim in range(min(value.dim(), 2 if sequence else 1)) if value.shape[dim] > 1}

    bound = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    return {name: pytree.tree_map(free, value) for name, value in bound.items()}


def dynamic_dims(graph: GraphModule) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Return (name, free dimensions) for each input tensor of a graph, in the order of the inputs."""
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    return tuple(
        (node.name, tuple(dim for dim, size in enumerate(value.shape) if not _is_fixed(size)))
        for node in placeholders
        if isinstance(value := node.meta.get("val"), Tensor)
    )


def tile_single_batch(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any], bool]:
    """Double inputs with a batch size of 1, because export treats a dimension of size 1 as fixed.

    Returns:
        The positional inputs, the keyword inputs, and whether they were doubled. The inputs are unchanged if the model
        does not accept the larger batch.
    """
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.dim() > 0]
    if not tensors or any(tensor.shape[0] != 1 for tensor in tensors):
        return args, kwargs, False
    tiled_args, tiled_kwargs = pytree.tree_map_only(
        Tensor, lambda tensor: torch.cat([tensor, tensor]) if tensor.dim() else tensor, (args, kwargs)
    )
    try:
        plain, tiled = call_reproducibly(model, args, kwargs), call_reproducibly(model, tiled_args, tiled_kwargs)
    except Exception:
        return args, kwargs, False
    grew = any(
        isinstance(a, Tensor) and isinstance(b, Tensor) and a.dim() > 0 and a.shape[0] * 2 == b.shape[0]
        for a, b in zip(pytree.tree_leaves(without_none(plain)), pytree.tree_leaves(without_none(tiled)), strict=False)
    )
    return (tiled_args, tiled_kwargs, True) if grew else (args, kwargs, False)


def grow_batch(
    graph: GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Return the inputs with one more row in every tensor whose first dimension is dynamic; None if there is none."""
    shapes = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
    leaves = pytree.tree_leaves((args, kwargs))
    if len(shapes) != len(leaves):
        return None
    grows = [isinstance(shape, Tensor) and shape.dim() > 0 and not _is_fixed(shape.shape[0]) for shape in shapes]
    rows = {leaf.shape[0] for leaf, grow in zip(leaves, grows, strict=True) if grow}
    if len(rows) != 1:
        return None
    it = iter(grows)
    more = pytree.tree_map(lambda leaf: torch.cat([leaf, leaf[:1]]) if next(it) else leaf, (args, kwargs))
    return more[0], more[1]


def _is_fixed(size: int | torch.SymInt) -> bool:
    return isinstance(size, int) or not size.node.expr.free_symbols

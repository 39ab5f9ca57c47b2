"""Which sizes an export leaves free, and larger batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ShapesCollection
from torch.utils import _pytree as pytree

from surgeon.graph.agreement import without_none
from surgeon.graph.sizes import Sizes
from surgeon.tracing.setup import run_alone


def dynamic_shapes(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the `dynamic_shapes` of an export: batch and sequence dimensions are free, all others fixed.

    The first dimension of every tensor is free. The second is free for integer and boolean tensors (token ids, masks)
    and for three-dimensional float tensors (embeddings). Export fixes the dimensions that the model needs fixed.
    """
    shapes = ShapesCollection()
    for leaf in pytree.tree_leaves((args, kwargs)):
        if isinstance(leaf, Tensor) and (dims := _free_dims(leaf)):
            shapes[leaf] = dict.fromkeys(dims, Dim.AUTO)
    return shapes.dynamic_shapes(model, args, kwargs)


def fixed_dims(sizes: Sizes, leaves: Sequence[Any]) -> list[str]:
    """Return the batch and sequence dimensions that are fixed after all, such as "x[1] = 8".

    sizes: of the graph. leaves: the flat inputs of the example.
    """
    return [
        f"{given.name}[{dim}] = {given.shape[dim]}"
        for given, leaf in zip(sizes.inputs, leaves, strict=True)
        if isinstance(leaf, Tensor) and given.shape is not None
        for dim in _free_dims(leaf)
        if isinstance(given.shape[dim], int)
    ]


def _free_dims(value: Tensor) -> list[int]:
    sequence = value.dim() >= 2 and (not value.is_floating_point() or value.dim() == 3)
    return [dim for dim in range(min(value.dim(), 2 if sequence else 1)) if value.shape[dim] > 1]


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
        plain, tiled = run_alone(model, args, kwargs), run_alone(model, tiled_args, tiled_kwargs)
    except Exception:
        return args, kwargs, False
    grew = any(
        isinstance(a, Tensor) and isinstance(b, Tensor) and a.dim() > 0 and a.shape[0] * 2 == b.shape[0]
        for a, b in zip(pytree.tree_leaves(without_none(plain)), pytree.tree_leaves(without_none(tiled)), strict=False)
    )
    return (tiled_args, tiled_kwargs, True) if grew else (args, kwargs, False)

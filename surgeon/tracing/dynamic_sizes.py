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

    The first dimension of every tensor is free. The second is free for integer and boolean tensors (token ids, masks),
    for three-dimensional float tensors (embeddings), and for a float matrix as long as one of these (a mask). Export
    fixes the dimensions that the model needs fixed.
    """
    return free_shapes(model, args, kwargs, _free_dims(pytree.tree_leaves((args, kwargs))))


def free_shapes(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dims: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """Return the `dynamic_shapes` of an export in which some dimensions are free.

    dims: for every leaf of the inputs. The tensors among these must be different objects.
    """
    shapes: Any = ShapesCollection()  # type: ignore[no-untyped-call]
    for leaf, free in zip(pytree.tree_leaves((args, kwargs)), dims, strict=True):
        if free:
            shapes[leaf] = dict.fromkeys(free, Dim.AUTO)
    found: dict[str, Any] = shapes.dynamic_shapes(model, args, kwargs)
    return found


def fixed_dims(sizes: Sizes, leaves: Sequence[Any]) -> list[str]:
    """Return the batch and sequence dimensions that are fixed after all, such as "x[1] = 8".

    sizes: of the graph. leaves: the flat inputs of the example.
    """
    return [
        f"{given.name}[{dim}] = {given.shape[dim]}"
        for given, free in zip(sizes.inputs, _free_dims(leaves), strict=True)
        for dim in free
        if given.shape is not None and isinstance(given.shape[dim], int)
    ]


def _free_dims(leaves: Sequence[Any]) -> list[list[int]]:
    """The dimensions of every flat input that an export leaves free."""
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim() >= 2]
    lengths = {leaf.shape[1] for leaf in tensors if not leaf.is_floating_point() or leaf.dim() == 3}

    def free(leaf: Any) -> list[int]:
        if not isinstance(leaf, Tensor):
            return []
        sequence = leaf.dim() >= 2 and (not leaf.is_floating_point() or leaf.dim() == 3)
        sequence |= leaf.dim() == 2 and leaf.shape[1] in lengths
        return [dim for dim in range(min(leaf.dim(), 2 if sequence else 1)) if leaf.shape[dim] > 1]

    return [free(leaf) for leaf in leaves]


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

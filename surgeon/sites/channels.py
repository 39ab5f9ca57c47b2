"""Follow the channels of a value through the ops that move it: along which dimension they lie, before and after."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from surgeon.graph.ops import SAME_VALUE
from surgeon.graph.traced import aten, is_call, shape_of
from surgeon.sites.qkv import MOVES, plain_size

# Ops that move, copy or leave out values of one tensor, or take means of them, and so keep channels apart.
CARRIERS = MOVES | SAME_VALUE | {
    aten.expand.default, aten.repeat.default, aten.repeat_interleave.self_int, aten.index_select.default,
    aten.index.Tensor, aten.roll.default, aten.flip.default, aten.mean.dim,
}  # fmt: skip

# Ops that read the shape of a value, or its type, and no more; and those of which that holds for the second argument.
_SHAPE_ALONE = {
    aten.sym_size.int, aten.zeros_like.default, aten.ones_like.default, aten.full_like.default, aten.empty_like.default,
    aten.new_zeros.default, aten.new_ones.default, aten.new_full.default, aten.new_empty.default,
}  # fmt: skip
_SECOND_ALONE = {aten.type_as.default, aten.expand_as.default, aten.view_as.default}


def reads_values(user: Node, source: Node) -> bool:
    """Whether a node reads more of another one than its shape and its type."""
    if is_call(user, *_SECOND_ALONE):
        return user.args[0] is source
    return not is_call(user, *_SHAPE_ALONE)


def axis_after(node: Node, source: Node, axis: int) -> int | None:
    """The dimension of the channels in what an op makes of a value.

    Args:
        node: an op of `CARRIERS` that reads `source`. axis: the dimension of the channels there. A value may be a list
            of tensors, which have their channels along the same dimension.

    Returns:
        None if the op mixes, cuts or doubles channels, or cannot be followed.
    """
    if is_call(node, operator.getitem):
        return axis
    shape = shape_of(source)
    if shape is None or not isinstance(shape[axis], int):
        return None
    width = int(shape[axis])
    sizes = [plain_size(size) for size in shape]
    numbers = torch.arange(width, dtype=torch.float64).reshape([-1] + [1] * (len(sizes) - axis - 1)).expand(sizes)
    try:
        made = run_moved(node, {source: numbers.contiguous()})
    except Exception:  # ops raise exceptions of many types
        return None
    found = {_axis_of(part, width) for part in (made if isinstance(made, list | tuple) else [made])}
    return found.pop() if len(found) == 1 else None


def axis_before(node: Node, axis: int) -> int | None:
    """The dimension of the channels in the first argument of an op, from that in what it makes; None as before."""
    source = node.args[0]
    assert isinstance(source, Node)
    if is_call(node, operator.getitem):
        return axis
    shape, made = shape_of(source), width_at(node, axis)
    for place, size in enumerate(shape or ()):
        if isinstance(size, int) and size == made and axis_after(node, source, place) == axis:
            return place
    return None


def width_at(node: Node, axis: int) -> int | torch.SymInt | None:
    """The size of a value along a dimension; of a list of tensors, that of the first."""
    value = node.meta.get("val")
    if isinstance(value, list | tuple) and value:
        value = value[0]
    return value.shape[axis] if isinstance(value, Tensor) and axis < value.dim() else None


def run_moved(node: Node, known: dict[Node, Any]) -> Any:
    """Run an op of `CARRIERS` on known values. Zeros stand for indices, and True for masks."""
    if node.target in SAME_VALUE:
        return known[node.args[0]].contiguous()  # type: ignore[index]

    def resolve(source: Node) -> Any:
        if source in known:
            return known[source]
        value = source.meta.get("val")
        if isinstance(value, Tensor):  # True of a mask, 0 of an index
            made = torch.zeros([plain_size(size) for size in value.shape], dtype=value.dtype)
            return made == 0 if value.dtype is torch.bool else made
        return plain_size(value)

    args: Any = map_arg(node.args, resolve)
    kwargs: Any = map_arg({key: value for key, value in node.kwargs.items() if key != "dtype"}, resolve)
    assert callable(node.target)
    return node.target(*args, **kwargs)


def _axis_of(made: Any, width: int) -> int | None:
    """Along which dimension a tensor counts from 0 to the width, and is constant along all others."""
    if not isinstance(made, Tensor) or made.numel() == 0:
        return None
    for axis, size in enumerate(made.shape):
        counted = torch.arange(width, dtype=torch.float64).reshape([-1] + [1] * (made.dim() - axis - 1))
        if size == width and torch.equal(made.double(), counted.expand_as(made)):
            return axis
    return None

"""Which parts the outputs of a fused projection are cut into: queries, keys and values computed by one linear layer.

The layer's outputs are numbered and sent through the nodes that read them (chunk, split, slices, view and unbind), and
what arrives says which outputs belong together, however the cut is spelled.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from surgeon.errors import first_line
from surgeon.graph.ops import SAME_VALUE, SHAPE_OPS
from surgeon.graph.traced import aten, is_call, shape_of

# Stands for every dynamic size; divisible by what sizes are usually divided by.
_SIZE = 4
_CUTS = SHAPE_OPS - {aten.glu.default}  # it computes


def fused_parts(output: Node) -> list[range] | str | None:
    """The ranges of the last dimension that a linear layer's output [..., d_out] is cut into, two or more, in order.

    A fused layer stores its parts one after the other, [q; k; v], or interleaved, [q₁; k₁; v₁; q₂; ...] head by head.
    Only the former can be told apart as ranges. For the others the result is a reason in words; None if something reads
    the output as a whole.
    """
    try:
        pieces = _pieces(output)
    except Exception as error:  # the ops' own refusals are of many types
        return f"how the outputs are used could not be followed ({first_line(error)})"
    if not pieces:
        return None
    if any(piece[-1] - piece[0] + 1 != len(piece) for piece in pieces):
        return "the outputs are interleaved, not stored one part after the other"
    ranges = [range(piece[0], piece[-1] + 1) for piece in sorted(pieces)]
    ends = [0, *(part.stop for part in ranges)]
    if [part.start for part in ranges] != ends[:-1] or ends[-1] != _width(output):
        return "the parts that the outputs are cut into overlap or leave some out"
    return ranges


def _pieces(output: Node) -> set[tuple[int, ...]]:
    """The columns in each value that holds some of them but not all; empty if all of them are used at once."""
    shape, width = shape_of(output), _width(output)
    assert shape is not None
    numbered = torch.arange(width).expand([_number(size) for size in shape]).contiguous()
    pieces: set[tuple[int, ...]] = set()
    stack: list[tuple[Node, Any]] = [(output, numbered)]
    while stack:
        node, value = stack.pop()
        for user in node.users:
            if is_call(user, aten.sym_size.int):
                continue
            if user.op != "call_function" or user.target not in _CUTS | SAME_VALUE:
                return set()
            result = _run(user, node, value)
            columns = result.flatten().bincount().nonzero().flatten().tolist() if isinstance(result, Tensor) else []
            if columns and len(columns) < width:
                pieces.add(tuple(columns))
            else:
                stack.append((user, result))
    return pieces


def _run(user: Node, node: Node, value: Any) -> Any:
    if user.target in SAME_VALUE:
        return value.contiguous()

    def resolve(source: Node) -> Any:
        return value if source is node else _number(source.meta.get("val"))

    args: Any = map_arg(user.args, resolve)
    kwargs: Any = map_arg(user.kwargs, resolve)
    assert callable(user.target)
    return user.target(*args, **kwargs)


def _number(size: Any) -> int:
    if isinstance(size, torch.SymInt):
        expression = size.node.expr
        return int(expression.xreplace(dict.fromkeys(expression.free_symbols, _SIZE)))
    return int(size)


def _width(output: Node) -> int:
    shape = shape_of(output)
    assert shape is not None
    return int(shape[-1])

"""Find the parts of a fused projection, where one linear layer computes queries, keys and values.

The layer's output columns are numbered, and the numbers are sent through the nodes that read them (chunk, split,
slices, view and unbind). The numbers in each result show which columns belong together, however the split is written.
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

# Stands for every dynamic size. It is divisible by 2 and 4, because models divide sizes by these.
_SIZE = 4
MOVES = SHAPE_OPS - {aten.glu.default}  # glu changes values
"""Ops that only cut and move values."""


def fused_parts(output: Node) -> list[range] | str | None:
    """Find the ranges of the last dimension that a linear layer's output [..., d_out] is split into.

    A fused layer stores its parts one after the other, [q; k; v], or interleaved by head, [q₁; k₁; v₁; q₂; ...].

    Returns:
        Two or more ranges in order, if the parts lie one after the other. A reason in words, if they do not or cannot
        be followed. None if a node reads the output as a whole.
    """
    try:
        pieces = _pieces(output)
    except Exception as error:  # ops raise exceptions of many types
        return f"the ops that split the outputs cannot be followed ({first_line(error)})"
    if not pieces:
        return None
    if any(piece[-1] - piece[0] + 1 != len(piece) for piece in pieces):
        return "the parts of the output are interleaved instead of one after the other"
    ranges = [range(piece[0], piece[-1] + 1) for piece in sorted(pieces)]
    ends = [0, *(part.stop for part in ranges)]
    if [part.start for part in ranges] != ends[:-1] or ends[-1] != _width(output):
        return "the parts of the output overlap or do not cover all of it"
    return ranges


def _pieces(output: Node) -> set[tuple[int, ...]]:
    """Return the columns in each value that holds only some of them; empty if a node uses all of them at once."""
    shape, width = shape_of(output), _width(output)
    assert shape is not None
    numbered = torch.arange(width).expand([plain_size(size) for size in shape]).contiguous()
    pieces: set[tuple[int, ...]] = set()
    stack: list[tuple[Node, Any]] = [(output, numbered)]
    while stack:
        node, value = stack.pop()
        for user in node.users:
            if is_call(user, aten.sym_size.int):
                continue
            if user.op != "call_function" or user.target not in MOVES | SAME_VALUE:
                return set()
            result = run_numbered(user, node, value)
            columns = result.flatten().bincount().nonzero().flatten().tolist() if isinstance(result, Tensor) else []
            if columns and len(columns) < width:
                pieces.add(tuple(columns))
            else:
                stack.append((user, result))
    return pieces


def run_numbered(user: Node, node: Node, value: Any) -> Any:
    """Run an op that moves values on numbers in place of what it reads from `node`, with small sizes where open."""
    if user.target in SAME_VALUE:
        return value.contiguous()

    def resolve(source: Node) -> Any:
        return value if source is node else plain_size(source.meta.get("val"))

    args: Any = map_arg(user.args, resolve)
    kwargs: Any = map_arg(user.kwargs, resolve)
    assert callable(user.target)
    return user.target(*args, **kwargs)


def plain_size(size: Any) -> int:
    """A size as a number: a small one where it is open."""
    if isinstance(size, torch.SymInt):
        expression = size.node.expr
        return int(expression.xreplace(dict.fromkeys(expression.free_symbols, _SIZE)))
    return int(size)


def _width(output: Node) -> int:
    shape = shape_of(output)
    assert shape is not None
    return int(shape[-1])

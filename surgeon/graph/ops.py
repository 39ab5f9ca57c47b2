"""Classify the ops of a graph: pointwise, matrix product, or an op that mixes neurons or tokens."""

from __future__ import annotations

import operator

import torch
from torch import Tensor
from torch.fx import Node

from surgeon.graph.traced import aten, shape_of

# Ops that give the same values another shape.
VIEWS = {
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.default,
}
# Ops that return their input, copied or converted.
SAME_VALUE = {
    aten.contiguous.default,
    aten.clone.default,
    aten.alias.default,
    aten.detach.default,
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
    aten._to_copy.default,
    aten.type_as.default,
    aten.lift_fresh_copy.default,
}
# Matrix products that may compute a linear layer.
MATMULS = {
    aten.linear.default,
    aten.addmm.default,
    aten.mm.default,
    aten.matmul.default,
    aten.einsum.default,
    aten.bmm.default,
    aten.baddbmm.default,
}
# Ops that do nothing in evaluation.
DROPOUTS = {
    aten.dropout.default,
    aten.dropout_.default,
    aten.feature_dropout.default,
    aten.feature_dropout_.default,
    aten.alpha_dropout.default,
}
# Ops that move values without changing them.
SHAPE_OPS = VIEWS | {
    aten.chunk.default,
    aten.split.Tensor,
    aten.split.sizes,
    aten.split_with_sizes.default,
    aten.tensor_split.sections,
    aten.unsafe_chunk.default,
    aten.unsafe_split.Tensor,
    aten.slice.Tensor,
    aten.narrow.default,
    aten.select.int,
    aten.unbind.int,
    aten.glu.default,
    aten.permute.default,
    aten.transpose.int,
    aten.swapaxes.default,
    aten.movedim.int,
    aten.mT.default,
    operator.getitem,
}
# Pointwise ops that keep a linear map linear. Any other one counts as an activation.
LINEAR_OPS = {"add", "sub", "rsub", "mul", "div", "neg", "positive"}
CREATION_OPS = {"zeros_like", "ones_like", "full_like", "full", "zeros", "ones", "scalar_tensor"}
# Ops that rule out a feed-forward layer when they stand between two linears, and how messages name them.
_BARRIERS = {
    "norm": "a normalisation", "conv": "a convolution", "softmax": "a softmax", "mean": "a mean", "var": "a variance",
    "std": "a standard deviation", "amax": "a maximum", "argmax": "a maximum", "max": "a maximum", "min": "a minimum",
    "sum": "a sum", "cumsum": "a cumulative sum", "logsumexp": "a sum", "logcumsumexp": "a cumulative sum",
    "prod": "a product", "cumprod": "a cumulative product", "median": "a median", "topk": "a top-k selection",
    "sort": "a sort", "pool": "a pooling", "cat": "a concatenation", "stack": "a concatenation", "rand": "noise",
    "bernoulli": "noise", "normal": "noise", "uniform": "noise", "gather": "a gather", "scatter": "a scatter",
    "index": "an index", "nonzero": "a data-dependent shape", "masked_select": "a data-dependent shape",
    "expand": "an expansion", "repeat": "a repetition", "roll": "a shift", "flip": "a reversal", "pad": "padding",
    "lstm": "a recurrent layer", "gru": "a recurrent layer", "fft": "a Fourier transform", "upsample": "a resizing",
    "unfold": "an unfolding", "layer_norm": "a normalisation",
}  # fmt: skip
# A walk back from a linear layer ends at these ops: no other linear layer stands before them.
_SOURCES = {"embedding", "embedding_bag", "arange", "eye", "tril", "triu"}
# Products of two computed values.
PRODUCTS = MATMULS | {aten.scaled_dot_product_attention.default}


def op_name(node: Node) -> str:
    """Return the short name of a node's op: `add` for `aten.add.Tensor`."""
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target.overloadpacket.__name__)
    return str(getattr(node.target, "__name__", node.target))


def is_pointwise(node: Node) -> bool:
    """Whether each element of the result depends only on the elements at the same position, or on no input."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded in target.tags:
        return False
    name = op_name(node).rstrip("_")
    if name in CREATION_OPS:
        return True
    if "prelu" in name:  # running it tells whether its slopes are those of neurons
        return True
    if target in SAME_VALUE:
        source = node.args[0]
        before = source.meta.get("val") if isinstance(source, Node) else None
        return isinstance(before, Tensor) and before.dtype is torch.bool  # a comparison that becomes a factor
    if torch.Tag.pointwise in target.tags:
        return True
    # Torch does not tag every pointwise op. An op that keeps its input's shape may be pointwise: running it tells.
    keeps_shape = any(_same_shape(source, node) for source in node.all_input_nodes)
    return keeps_shape and target not in PRODUCTS and name not in _SOURCES and not _words(name)


def barrier(node: Node) -> str | None:
    """Name an op that mixes neurons or tokens and so cannot stand inside a feed-forward layer; None for others."""
    if node.op != "call_function" or node.target in SHAPE_OPS or node.target in DROPOUTS:
        return None
    if not isinstance(node.target, torch._ops.OpOverload) or is_copy(node) or is_pointwise(node):
        return None
    name = op_name(node)
    if name in _SOURCES:
        return None
    if node.target in SAME_VALUE:
        return "a conversion to another number type"
    return _words(name) or "an op that is not pointwise"


def activates(node: Node) -> bool:
    """Whether a node that is a barrier is an activation all the same, which mixes neurons."""
    return _kind(op_name(node)) == "softmax"


def _words(name: str) -> str | None:
    kind = _kind(name)
    return None if kind is None else _BARRIERS[kind]


def _kind(name: str) -> str | None:
    """The longest key of `_BARRIERS` in the name of an op, of several the last."""
    return max((key for key in reversed(_BARRIERS) if key in name), key=len, default=None)


def _same_shape(a: Node, b: Node) -> bool:
    left, right = shape_of(a), shape_of(b)
    return left is not None and right is not None and len(left) == len(right) and all(map(equal_size, left, right))


def is_copy(node: Node) -> bool:
    """Whether the node returns its input's values: a copy, or a conversion between floating-point types."""
    if node.op != "call_function" or node.target not in SAME_VALUE:
        return False
    value, source = node.meta.get("val"), node.args[0]
    before = source.meta.get("val") if isinstance(source, Node) else None
    return not isinstance(value, Tensor) or not isinstance(before, Tensor) or (
        value.is_floating_point() == before.is_floating_point()
    )  # fmt: skip


def carries_values(node: Node) -> bool:
    """Whether the output is the first input in another shape, a part of it, a copy of it or a cast of it."""
    return node.op == "call_function" and (node.target in SHAPE_OPS or node.target in SAME_VALUE)


def equal_size(a: int | torch.SymInt, b: int | torch.SymInt) -> bool:
    """Whether two sizes are the same number or the same expression, without adding a guard."""
    left = a.node.expr if isinstance(a, torch.SymInt) else a
    right = b.node.expr if isinstance(b, torch.SymInt) else b
    return bool(left == right)

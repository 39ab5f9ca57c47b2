"""The heads of early exits: what each of them computes, in a graph and in training.

The tokens of a sample are pooled as the model itself pools them, and normalised. A head reads that and, in a cascade,
what the head before it answered. An ensemble is the weighted geometric mean of what all heads so far answered ("Zero
Time Waste", arXiv 2106.05409, sections 3.1 and 3.2).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.fx import GraphModule, Node

from surgeon.exits.blocks import BlockEnd
from surgeon.exits.site import find_exits
from surgeon.graph.edit import emit
from surgeon.graph.holder import parameters_only
from surgeon.graph.ops import equal_size
from surgeon.graph.traced import TracedGraph, aten, is_call, module_path, shape_of
from surgeon.graph.walk import walk_users

Pooling = Literal["auto", "first", "mean"]
Step = Callable[..., Any]
# Module paths of a head's nodes: what it reads, and what it answers by itself.
FEATURES, LOGITS = "features", "logits"
_EPSILON = 1e-5


@dataclass(frozen=True)
class HeadPlan:
    """How heads are built. width: of a hidden layer, None for none."""

    cascade: bool
    ensemble: bool
    width: int | None


def make_head(block: BlockEnd, plan: HeadPlan, earlier: int, device: torch.device) -> nn.Module:
    """Return the parameters of a head, with random weights, in the dtype of what it reads.

    earlier: the number of heads before it.

    Parameters, with d features, C classes and k heads up to this one: `out` and, with a width, `hidden` (linear
    layers); in an ensemble `mix` [k], logarithms of the weights of the heads, and `mix_bias` [C]. Buffer: tau.
    """
    head = nn.Module()
    d_in = block.width + (block.classes if plan.cascade and earlier else 0)
    if plan.width is not None:
        head.hidden = nn.Linear(d_in, plan.width)
    head.out = nn.Linear(d_in if plan.width is None else plan.width, block.classes)
    if plan.ensemble and earlier:
        head.mix = nn.Parameter(torch.full((earlier + 1,), -math.log(earlier + 1)))
        head.mix_bias = nn.Parameter(torch.zeros(block.classes))
    head.to(device=device, dtype=block.output.meta["val"].dtype)
    head.register_buffer("tau", torch.tensor(0.0, device=device))
    return parameters_only(head)


def multiply_adds(head: nn.Module) -> int:
    """Return the multiply-adds of a head for one sample."""
    return sum(parameter.numel() for parameter in head.parameters() if parameter.dim() == 2)


def answer(
    step: Step, get: Step, features: Any, earlier: Sequence[Any], plan: HeadPlan, cut: Step = lambda logits: logits
) -> tuple[Any, Any]:
    """Compute a head: return its own logits, and what the exit answers, both [B, C].

    Args:
        step: called with an op and its arguments; it runs the op or adds it to a graph.
        get: called with the name of a parameter. features: [B, d]. earlier: the logits of the heads before, [B, C].
        cut: called with logits that another head or the ensemble reads. In training it cuts the gradient.
    """
    before = [cut(logits) for logits in earlier]
    x = step(aten.cat.default, [features, before[-1]], 1) if plan.cascade and before else features
    if plan.width is not None:
        x = step(aten.relu.default, step(aten.linear.default, x, get("hidden.weight"), get("hidden.bias")))
    logits = step(aten.linear.default, x, get("out.weight"), get("out.bias"))
    if not (plan.ensemble and before):
        return logits, logits
    stacked = step(aten.stack.default, [*before, cut(logits)])
    weights = step(aten.exp.default, get("mix"))
    weighted = step(
        aten.mul.Tensor, step(aten.log_softmax.int, stacked, -1), step(aten.reshape.default, weights, [-1, 1, 1])
    )
    return logits, step(aten.add.Tensor, step(aten.sum.dim_IntList, weighted, [0]), get("mix_bias"))


def emit_features(graph: TracedGraph, block: BlockEnd, pooling: Pooling, path: str) -> Node:
    """Add the pooled and normalised tokens of a block's output at the insertion point, [B, d]."""
    path = f"{path}.{FEATURES}"
    tokens = block.output

    def step(target: Any, *args: Any) -> Node:
        return emit(graph, target, *args, path=path)

    token = _token(block) if pooling == "auto" else 0 if pooling == "first" else None
    mask = _mask(graph, tokens)
    if token is not None:
        pooled = step(aten.select.int, tokens, 1, token)
    elif mask is None:
        pooled = step(aten.mean.dim, tokens, [1])
    else:
        if str(mask.target).endswith("key_padding_mask"):
            mask = step(aten.eq.Scalar, mask, 0)
        real = step(aten.unsqueeze.default, step(aten.to.dtype, mask, tokens.meta["val"].dtype), -1)
        total = step(aten.sum.dim_IntList, step(aten.mul.Tensor, tokens, real), [1])
        count = step(aten.clamp_min.default, step(aten.sum.dim_IntList, real, [1]), 1.0)
        pooled = step(aten.div.Tensor, total, count)
    return step(aten.layer_norm.default, pooled, [block.width], None, None, _EPSILON)


def pooling_words(block: BlockEnd, pooling: Pooling) -> str:
    """`token 0` or `mean`."""
    token = _token(block) if pooling == "auto" else 0 if pooling == "first" else None
    return "mean" if token is None else f"token {token}"


def nodes_at(graph: GraphModule, part: str) -> list[Node]:
    """Return a node of each exit, in order: its `FEATURES` or its `LOGITS`."""
    last = {module_path(node): node for node in graph.graph.nodes}
    return [last[f"{site.path}.{part}"] for site in find_exits(graph)]


def _token(block: BlockEnd) -> int | None:
    """The token that the model itself reads its answer from, None if it reads all or an unknown one."""
    last = block.output
    found = [
        node.args[2]
        for node in walk_users(last, lambda _: True)
        if is_call(node, aten.select.int) and node.args[1] == 1 and _like_tokens(node.args[0], last)
    ]
    tokens = {token for token in found if isinstance(token, int)}
    return tokens.pop() if len(tokens) == 1 else None


def _like_tokens(node: object, tokens: Node) -> bool:
    """Whether the value is [B, T, ...] with the batch and the length of the tokens."""
    shape, wanted = (shape_of(node) if isinstance(node, Node) else None), shape_of(tokens)
    if shape is None or wanted is None or len(shape) != 3:
        return False
    return equal_size(shape[0], wanted[0]) and equal_size(shape[1], wanted[1])


def _mask(graph: GraphModule, tokens: Node) -> Node | None:
    """The model's input that tells which tokens are real, [B, T]."""
    wanted = shape_of(tokens)
    assert wanted is not None
    for node in graph.graph.find_nodes(op="placeholder"):
        shape = shape_of(node)
        if shape is None or len(shape) != 2 or not str(node.target).endswith(("attention_mask", "key_padding_mask")):
            continue
        if equal_size(shape[0], wanted[0]) and equal_size(shape[1], wanted[1]):
            found: Node = node
            return found
    return None

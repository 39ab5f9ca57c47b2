"""Token halting in a graph: its places, and what a block computes for the tokens that have not halted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

import surgeon.kernels.token_halting  # noqa: F401  (it registers the ops)
from surgeon.described import Facts
from surgeon.exits.blocks import is_layer
from surgeon.exits.site import Leaving
from surgeon.graph.traced import aten, is_call, tensor_of
from surgeon.graph.walk import walk_sources, walk_users

halting_total = torch.ops.surgeon.halting_total.default
keep_halted = torch.ops.surgeon.keep_halted.default
live_keys = torch.ops.surgeon.live_keys.default
mask_keys = torch.ops.surgeon.mask_keys.default
mean_field = torch.ops.surgeon.mean_field.default
tokens_that_stay = torch.ops.surgeon.tokens_that_stay.default
take_tokens = torch.ops.surgeon.take_tokens.default
put_tokens = torch.ops.surgeon.put_tokens.default


@dataclass(frozen=True, eq=False, repr=False)
class HaltSite(Leaving):
    """A place behind a block where tokens halt, with what is computed up to the next one or the end of the last block.

    path: the module path of its tau, `blocks.halting.0`. nodes: the node that puts tokens that have halted back.
    form: "masked" (the block runs for all tokens) or "dynamic" (for those that have not halted).
    total: the node with the sum of the scores, [B, T]. rows: in the dynamic form, the node with the tokens to compute.
    tokens: what is behind the block before, [B, T, d]. end: what the block behind the place computes. block: the nodes
    in between, in order.
    multiply_adds: of the block's linear layers, for one token.
    """

    path: str
    form: Literal["masked", "dynamic"]
    nodes: tuple[Node, ...]
    total: Node
    rows: Node | None
    tokens: Node
    end: Node
    block: tuple[Node, ...]
    multiply_adds: int
    tau: Tensor

    # A block is one expert, without a router.
    unit = "blocks"
    leaving = "tokens halt"

    @property
    def expert_multiply_adds(self) -> int:
        """Those of the block's linear layers, for one token."""
        return self.multiply_adds

    @property
    def costs(self) -> list[int]:
        """The cost of the block for one token."""
        return [self.multiply_adds]

    @property
    def width(self) -> int:
        """d."""
        return int(self.end.meta["val"].shape[2])

    @property
    def describe(self) -> str:
        """`token halting, width 64`."""
        return f"token halting, width {self.width}"

    @property
    def facts(self) -> Facts:
        """What is there, for programs."""
        return {"kind": "token-halting", "width": self.width}


def find_halts(model: nn.Module) -> list[HaltSite]:
    """Return every place of a graph where tokens halt, in order. Other models have none."""
    if not isinstance(model, GraphModule):
        return []
    return [_site(model, node) for node in model.graph.find_nodes(op="call_function", target=halting_total)]


def between(graph: GraphModule, start: Node, end: Node) -> tuple[Node, ...]:
    """Return the nodes through which the value of `end` depends on that of `start`, in order, with `end`."""
    after = set(walk_users(start, lambda _: True))
    inside = {node for node in walk_sources(end, lambda node: node in after) if node in after}
    return tuple(node for node in graph.graph.nodes if node in inside)


def stands_for(end: Node) -> Node:
    """Return what follows reads of a block's output: with halted tokens put back, if there are any."""
    return next((user for user in end.users if is_call(user, keep_halted) and user.args[0] is end), end)


def _site(graph: GraphModule, total: Node) -> HaltSite:
    rows = next((user for user in total.users if is_call(user, tokens_that_stay)), None)
    sums = total if rows is None else next(user for user in total.users if is_call(user, take_tokens))
    kept = next(user for user in sums.users if is_call(user, keep_halted))
    output = kept if rows is None else next(user for user in kept.users if is_call(user, put_tokens))
    end, tokens, tau = kept.args[0], total.args[0], total.args[3]
    assert isinstance(end, Node)
    assert isinstance(tokens, Node)
    assert isinstance(tau, Node)
    block = tuple(node for node in between(graph, tokens, end) if node is not total)
    value = tensor_of(graph, tau)
    assert value is not None
    cost = sum(_weights(graph, block))
    path, form = str(tau.target).rpartition(".")[0], "masked" if rows is None else "dynamic"
    return HaltSite(path, form, (output,), total, rows, tokens, end, block, cost, value)  # type: ignore[arg-type]


def _weights(graph: GraphModule, block: tuple[Node, ...]) -> Iterator[int]:
    """The sizes of the matrices that a block multiplies a token with."""
    for node in block:
        if node.op == "call_module":
            yield from (one.numel() for one in graph.get_submodule(str(node.target)).parameters() if one.dim() > 1)
        elif is_layer(graph, node):
            for source in node.all_input_nodes:
                tensors = (tensor_of(graph, one) for one in walk_sources(source, lambda n: is_call(n, aten.t.default)))
                yield from (one.numel() for one in tensors if one is not None and one.dim() > 1)

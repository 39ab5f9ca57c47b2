"""Let the block behind a place where tokens halt run for the tokens that have not, and for no others.

The tokens of a sample that have not halted are taken in front, as many as the sample with most of them has. Each value
from outside that the block reads is reduced to these tokens, if it has the number of tokens in one of its dimensions.
Where a shape names that number, it names the new one. What the block computes is put back in the tokens' places.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from surgeon.exits.attention import Probe, alike
from surgeon.exits.halting import HaltSite, between, find_halts, put_tokens, take_tokens, tokens_that_stay
from surgeon.exits.lowering import infer_sizes
from surgeon.graph.edit import emit
from surgeon.graph.ops import equal_size
from surgeon.graph.traced import TracedGraph, aten, is_call, shape_of
from surgeon.graph.walk import walk_sources
from surgeon.sites.rejection import Rejection

_SHAPED = (aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.expand.default)
Size = int | torch.SymInt


@dataclass(frozen=True)
class BlockPlan:
    """What has to change in a block. values: what it reads from outside, with the dimensions that are the tokens.

    sizes: sizes from outside that are the number of tokens or are computed from it, with all in between, in order.
    shapes: nodes whose shape names that number, and the places.
    """

    values: dict[Node, list[int]]
    sizes: list[Node]
    shapes: dict[Node, list[int]]


def plan_block(site: HaltSite) -> BlockPlan | Rejection:
    """Say what has to change in the block behind a place where tokens halt, or why nothing can."""
    batch, length, _ = site.tokens.meta["val"].shape
    inside = set(site.block)
    plan, read = BlockPlan({}, [], {}), set[Node]()
    for source in dict.fromkeys(source for node in site.block for source in node.all_input_nodes):
        value = source.meta.get("val")
        if source in inside or source in (site.tokens, site.total):
            continue
        if isinstance(value, torch.SymInt):
            read.update(node for node in walk_sources(source, _is_size) if _depends(node, length))
        elif isinstance(value, Tensor):
            dims = [place for place, size in enumerate(value.shape) if place and equal_size(size, length)]
            if not dims or (source.op == "get_attr" and value.dim() < 3):
                continue
            if not (equal_size(value.shape[0], batch) or equal_size(value.shape[0], 1)):
                reason = f"the block reads {source.name}, which has tokens but no batch in its first dimension"
                return Rejection("batch-not-first", reason, site.path, source.name)
            plan.values[source] = dims
    plan.sizes.extend(node for node in site.total.graph.nodes if node in read)
    for node in site.block:
        if is_call(node, *_SHAPED) and (places := _names_length(node, length)):
            plan.shapes[node] = places
    return plan


def lower_block(graph: TracedGraph, site: HaltSite, plan: BlockPlan) -> Node:
    """Rewrite the graph so, and return the node with all tokens behind the block.

    Raises:
        Exception: an op of the block cannot do with a number of tokens that depends on the data.
    """
    inside = {*site.block, site.output}
    with graph.graph.inserting_before(site.total.next):
        rows = emit(graph, tokens_that_stay, site.total, path=site.path)
        size = emit(graph, aten.sym_size.int, rows, 1, path=site.path)
        moved = {one: emit(graph, take_tokens, one, rows, [1], path=site.path) for one in (site.total, site.tokens)}
    place, length = size, site.tokens.meta["val"].shape[1]
    for one in plan.sizes:
        if equal_size(one.meta["val"], length):
            moved[one] = size
            continue
        with graph.graph.inserting_after(place):
            place = moved[one] = graph.graph.node_copy(one, lambda source: moved.get(source, source))
    order = {node: place for place, node in enumerate(graph.graph.nodes)}
    for value, dims in plan.values.items():
        with graph.graph.inserting_before(max(place, value, key=order.__getitem__).next):
            moved[value] = emit(graph, take_tokens, value, rows, dims, path=site.path)
    for old, new in moved.items():
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user in inside)
    for node, places in plan.shapes.items():
        shape = list(node.args[1])  # type: ignore[arg-type]
        for position in places:
            shape[position] = size
        node.update_arg(1, shape)
    infer_sizes(graph, (*(moved[one] for one in plan.sizes if moved[one] is not size), *site.block, site.output))
    with graph.graph.inserting_before(site.output.next):
        tokens = emit(graph, put_tokens, site.tokens, rows, site.output, path=site.path)
    site.output.replace_all_uses_with(tokens, delete_user_cb=lambda user: user is not tokens)
    return tokens


def same_block(before: TracedGraph, after: TracedGraph, path: str) -> bool:
    """Whether a lowered block computes what it did, on random numbers with some of the tokens halted.

    after: a copy of `before` with the block of the place at `path` lowered.
    """
    masked, lowered = (next(one for one in find_halts(graph) if one.path == path) for graph in (before, after))
    inside = {masked.tokens, masked.total, *masked.block, masked.output}
    outside = [source for node in (*masked.block, masked.output) for source in node.all_input_nodes]
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        probe = Probe(before, masked.tokens, [source for source in outside if source not in inside])
        one, two = (
            probe.run(
                graph,
                between(graph, site.tokens, site.output),
                {site.tokens: probe.x, site.total: probe.gone.float()},
                {},
            )
            for graph, site in ((before, masked), (after, lowered))
        )
        return alike(one.float(), two.float())


def _is_size(node: Node) -> bool:
    return isinstance(node.meta.get("val"), torch.SymInt)


def _depends(node: Node, length: Size) -> bool:
    """Whether a size is the number of tokens or is computed from it."""
    if not _is_size(node) or not isinstance(length, torch.SymInt):
        return False
    return bool(node.meta["val"].node.expr.free_symbols & length.node.expr.free_symbols)


def _names_length(node: Node, length: Size) -> list[int]:
    """The places of a shape at which a number stands for the tokens: as much lies before them as in the input."""
    shape, made, source = node.args[1], shape_of(node), node.args[0]
    assert isinstance(shape, list | tuple)
    given = shape_of(source) if isinstance(source, Node) else None
    if isinstance(length, torch.SymInt) or made is None or given is None:
        return []
    before = [math.prod(given[:place]) for place, size in enumerate(given) if equal_size(size, length)]
    return [
        place
        for place, size in enumerate(shape)
        if size == length and any(equal_size(math.prod(made[:place]), one) for one in before)
    ]

"""Where the tokens of a block meet: its attention, whose keys can be masked, and a test that they meet nowhere else."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from surgeon.exits.halting import between, live_keys, mask_keys
from surgeon.graph.edit import emit
from surgeon.graph.ops import equal_size
from surgeon.graph.traced import TracedGraph, aten, attribute, is_call, shape_of
from surgeon.sites.rejection import Rejection

_ATTENTION = aten.scaled_dot_product_attention.default
_SOFTMAX = (aten.softmax.int, aten._softmax.default, aten._safe_softmax.default)
# Numbers of samples and tokens of the test, where the graph leaves them open.
_SAMPLES, _TOKENS = 2, 5
_CLOSE = 1e-5


def find_attention(graph: GraphModule, start: Node, end: Node) -> list[Node] | Rejection:
    """Return the nodes at which keys can be masked between two places of a graph, or why halted tokens would matter.

    Whether tokens meet elsewhere is seen by running the nodes in between on random numbers: with the keys of some
    tokens masked, the others must not depend on them.

    Args:
        start, end: values [B, T, d], the second computed from the first.
    """
    block = between(graph, start, end)
    found = [node for node in block if _is_attention(node, start)]
    try:
        apart = _stay_apart(graph, start, block, found)
    except Exception as error:
        return Rejection("cannot-run", f"the block fails on test values: {type(error).__name__}: {error}")
    if apart:
        return found
    reason = "its tokens meet elsewhere than in an attention of all tokens to all, so that one cannot be left out"
    return Rejection("tokens-meet", reason)


def mask_attention(graph: TracedGraph, nodes: Sequence[Node], total: Node, path: str) -> None:
    """Let no token attend to those that have halted. total: the node with the sum of the scores, before the nodes."""
    with graph.graph.inserting_after(total):
        keys: Node = emit(graph, live_keys, total, path=path)
    for node in nodes:
        with graph.graph.inserting_before(node):

            def change(mask: Node | None) -> Node:
                return keys if mask is None else emit(graph, mask_keys, mask, keys, path=path)

            node.args, node.kwargs = _with_mask(node, node.args, node.kwargs, change)


def _is_attention(node: Node, tokens: Node) -> bool:
    """Whether every token of a sample attends to all of them there, or to those that a mask allows."""
    batch, length, _ = shape_of(tokens) or (0, 0, 0)
    if is_call(node, _ATTENTION):
        if _argument(node, 5, "is_causal", False):
            return False
        shapes = [shape_of(source) for source in node.args[:2] if isinstance(source, Node)]
        return len(shapes) == 2 and all(
            shape is not None and len(shape) == 4 and equal_size(shape[0], batch) and equal_size(shape[2], length)
            for shape in shapes
        )
    shape = shape_of(node)
    if not is_call(node, *_SOFTMAX) or shape is None or len(shape) != 4 or node.args[1] not in (-1, 3):
        return False
    return equal_size(shape[0], batch) and equal_size(shape[2], length) and equal_size(shape[3], length)


def _argument(node: Node, place: int, name: str, default: Any) -> Any:
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)


def _with_mask(
    node: Node, args: Sequence[Any], kwargs: Mapping[str, Any], change: Callable[[Any], Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Change the mask among the arguments of an attention, which may be None, or the scores that enter a softmax."""
    place = 3 if is_call(node, _ATTENTION) else 0
    if len(args) > place:
        return (*args[:place], change(args[place]), *args[place + 1 :]), dict(kwargs)
    return tuple(args), {**kwargs, "attn_mask": change(kwargs.get("attn_mask"))}


def _stay_apart(graph: GraphModule, start: Node, block: Sequence[Node], attention: Sequence[Node]) -> bool:
    """Whether tokens that have not halted do not depend on those that have, on random numbers."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        probe = Probe(
            graph, start, [source for node in block for source in node.all_input_nodes if source not in block]
        )
        keys = live_keys(probe.gone.float())

        def mask_of(mask: Tensor | None) -> Any:
            return keys if mask is None else mask_keys(mask, keys)

        def run(x: Tensor) -> Tensor:
            return probe.run(graph, block, {start: x}, dict.fromkeys(attention, mask_of))[~probe.gone].float()

        other = torch.where(probe.gone.unsqueeze(-1), torch.randn_like(probe.x), probe.x)
        return alike(run(probe.x), run(other))


def alike(one: Tensor, two: Tensor) -> bool:
    """Whether two results are the same up to rounding, and finite."""
    return bool(torch.isfinite(one).all()) and bool((one - two).abs().amax() <= _CLOSE * one.abs().amax())


class Probe:
    """Random numbers to run a part of a graph on.

    x: [B, T, d], with small sizes where the graph leaves them open. gone: bool [B, T], about half of the tokens, never
    the first one of a sample and always the last.
    """

    def __init__(self, graph: GraphModule, start: Node, outside: Sequence[Node]) -> None:
        """Draw x for the value of `start`, and values for all that is read from outside."""
        sizes = _Sizes(start)
        device = next((one.device for one in graph.parameters()), torch.device("cpu"))
        shape = [sizes.of(size) for size in shape_of(start) or ()]
        self.x = torch.randn(shape, device=device).to(start.meta["val"].dtype)
        self.gone = torch.rand(shape[:2], device=device) < 0.5
        self.gone[:, 0], self.gone[:, -1] = False, True
        self._outside = {node.name: sizes.value(graph, node) for node in dict.fromkeys(outside) if node is not start}

    def run(
        self,
        graph: GraphModule,
        nodes: Sequence[Node],
        given: Mapping[Node, Tensor],
        masks: Mapping[Node, Callable[[Any], Any]],
    ) -> Tensor:
        """Run nodes of the graph, or of a copy of it, and return the value of the last one.

        given: values of some nodes. masks: what is to be done to the masks of attentions.
        """
        values: dict[Node, Any] = dict(given)
        torch.manual_seed(1)  # of dropout
        for node in nodes:
            if node in values:
                continue
            for source in node.all_input_nodes:
                if source not in values:
                    values[source] = self._outside[source.name]
            args, kwargs = map_arg(node.args, values.__getitem__), map_arg(node.kwargs, values.__getitem__)
            if node in masks:
                args, kwargs = _with_mask(node, args, kwargs, masks[node])
            if node.op == "call_module":
                values[node] = graph.get_submodule(str(node.target))(*args, **kwargs)
            else:
                assert callable(node.target)
                values[node] = node.target(*args, **kwargs)
        result = values[nodes[-1]]
        assert isinstance(result, Tensor)
        return result


class _Sizes:
    """Small sizes for those that a graph leaves open, and values of these sizes."""

    def __init__(self, tokens: Node) -> None:
        self._open: dict[Any, int] = {}
        for size, wanted in zip(shape_of(tokens) or (), (_SAMPLES, _TOKENS), strict=False):
            if isinstance(size, torch.SymInt):
                self._open |= dict.fromkeys(size.node.expr.free_symbols, wanted)

    def of(self, size: int | torch.SymInt) -> int:
        """The number for a size."""
        if not isinstance(size, torch.SymInt):
            return operator.index(size)
        known: Mapping[Any, int] = {one: self._open.get(one, _SAMPLES) for one in size.node.expr.free_symbols}
        return int(size.node.expr.subs(known))

    def value(self, graph: GraphModule, node: Node) -> Any:
        """A value for a node that is not run: masks that allow everything, and random numbers."""
        if node.op == "get_attr":
            return attribute(graph, str(node.target))
        given = node.meta.get("val")
        if isinstance(given, torch.SymInt | int):
            return self.of(given)
        if not isinstance(given, Tensor):
            return given
        shape = [self.of(size) for size in given.shape]
        if given.is_floating_point():
            return torch.randn(shape, device=given.device).to(given.dtype)
        return torch.ones(shape, dtype=given.dtype, device=given.device)

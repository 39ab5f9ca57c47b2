"""Find the places of a classifier where samples can leave: behind its blocks, where one value carries all.

A block ends at the first value behind its feed-forward layer from which all that follows is computed: the sum of the
residual connection. What else follows may read, such as masks, positions and sizes, must not come from a linear layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor, nn
from torch.fx import GraphModule, Node

from surgeon.described import Described, Facts
from surgeon.graph.edit import output_leaves
from surgeon.graph.ops import MATMULS, carries_values, equal_size
from surgeon.graph.traced import aten, attribute, is_call, module_path, nested_graphs, shape_of
from surgeon.graph.walk import walk_sources, walk_users
from surgeon.sites.rejection import Rejection


@dataclass(frozen=True)
class Layer:
    """A feed-forward layer, in whatever form: its value in one of its executions, and its size."""

    path: str
    output: Node
    parameters: int
    multiply_adds: int


@dataclass(frozen=True, eq=False, repr=False)
class BlockEnd(Described):
    """A place behind a block of a classifier.

    path: where it is in the model. output: what the block computes, [B, T, d]. answer: the model's classes, [B, C].
    layer: the block's feed-forward layer.
    """

    path: str
    output: Node
    answer: Node
    layer: Layer

    @property
    def width(self) -> int:
        """d."""
        return int(self.output.meta["val"].shape[2])

    @property
    def classes(self) -> int:
        """C."""
        return int(self.answer.meta["val"].shape[1])

    @property
    def describe(self) -> str:
        """`block of width 384`."""
        return f"block of width {self.width}"

    @property
    def facts(self) -> Facts:
        """What is there, for programs."""
        return {"kind": "block", "width": self.width}


def find_block_ends(
    graph: GraphModule, layers: Sequence[Layer], *, last: bool = False
) -> tuple[list[BlockEnd], list[Rejection]]:
    """Return the places where samples can leave, in order, and what was refused.

    Args:
        layers: every execution of the feed-forward layers, in topological order.
        last: whether to return the end of the last block too, behind which the model itself answers.
    """
    answer = _answer(graph)
    if isinstance(answer, Rejection):
        return [], [answer]
    needed = set(walk_sources(answer))
    layers = [layer for layer in layers if layer.output in needed]
    # A classifier's head may look like a feed-forward layer, but no tokens are left behind it.
    while layers and not any(_is_tokens(node, answer) for node in _behind(layers[-1], needed)):
        layers.pop()
    if len(layers) < 2:
        what = "there is one" if layers else "there is none"
        return [], [
            Rejection("no-blocks", f"samples leave between blocks with feed-forward layers, and {what}", "model")
        ]
    if sum(1 for _ in nested_graphs(graph)) > 1:
        return [], [Rejection("in-subgraph", "a part of the model runs in a graph of its own", "model")]
    order = {node: place for place, node in enumerate(graph.graph.nodes)}
    learned = _learned(graph)
    found: list[BlockEnd] = []
    refused: list[Rejection] = []
    for layer, following in pairwise([*layers, None] if last else layers):
        assert layer is not None
        after = _behind(layer, needed)
        until = order[answer if following is None else following.output]
        candidates = sorted((node for node in after if order[node] < until and _is_tokens(node, answer)), key=order.get)  # type: ignore[arg-type]
        end = next((node for node in candidates if _carries_all(node, needed, learned)), None)
        if end is None:
            reason = "what follows is computed from several values, not from the output of this block alone"
            refused.append(Rejection("no-single-value", reason, layer.path, layer.output.name))
            continue
        path = module_path(end) or layer.path
        if any(other.path == path for other in found):
            path = f"{path}@{1 + sum(other.path.partition('@')[0] == path for other in found)}"
        found.append(BlockEnd(path, end, answer, layer))
    return found, refused


def _behind(layer: Layer, needed: set[Node]) -> list[Node]:
    """What is computed from a layer's output, as far as the answer needs it."""
    return [node for node in walk_users(layer.output, lambda _: True) if node in needed]


def _answer(graph: GraphModule) -> Node | Rejection:
    """The classes that the model returns, or why it is no classifier."""
    leaves = [leaf for leaf in output_leaves(graph) if isinstance(leaf, Node) and shape_of(leaf) is not None]
    if len(leaves) != 1:
        return Rejection("no-classes", f"the model returns {len(leaves)} tensors, not the classes alone", "model")
    shape = shape_of(leaves[0])
    assert shape is not None
    if len(shape) == 3:
        reason = (
            "the model answers for every token. A token that leaves has no keys and values in later layers, which the "
            "tokens after it need"
        )
        return Rejection("answers-tokens", reason, "model", leaves[0].name)
    if (
        len(shape) != 2
        or not isinstance(shape[1], int)
        or shape[1] < 2
        or not leaves[0].meta["val"].is_floating_point()
    ):
        return Rejection(
            "no-classes", "the model returns no scores of classes, [batch, classes]", "model", leaves[0].name
        )
    return leaves[0]


def _is_tokens(node: Node, answer: Node) -> bool:
    """Whether the value is [B, T, d] with the batch of the answer."""
    shape, batch = shape_of(node), shape_of(answer)
    if shape is None or batch is None or len(shape) != 3 or not isinstance(shape[2], int):
        return False
    return equal_size(shape[0], batch[0]) and bool(node.meta["val"].is_floating_point())


def _learned(graph: GraphModule) -> set[Node]:
    """Everything that is computed from a linear layer."""
    found: set[Node] = set()
    for node in graph.graph.nodes:
        if node in found or node.op == "get_attr" or not is_layer(graph, node):
            continue
        found.add(node)
        found.update(walk_users(node, lambda _: True))
    return found


def is_layer(graph: GraphModule, node: Node) -> bool:
    """Whether the node applies a linear layer, or something of this package that holds some."""
    if node.op == "call_module" or str(node.target).startswith("surgeon."):
        return True
    if not is_call(node, *MATMULS):
        return False
    sources = (
        source
        for one in node.all_input_nodes
        for source in walk_sources(one, lambda n: carries_values(n) or is_call(n, aten.t.default))
    )
    return any(
        isinstance(attribute(graph, str(source.target)), nn.Parameter) for source in sources if source.op == "get_attr"
    )


def _carries_all(node: Node, needed: set[Node], learned: set[Node]) -> bool:
    """Whether what follows reads nothing that was learned but this value."""
    after = {user for user in walk_users(node, lambda _: True) if user in needed}
    outside = {source for user in after for source in user.all_input_nodes} - after - {node}
    return all(source not in learned or not isinstance(source.meta.get("val"), Tensor) for source in outside)

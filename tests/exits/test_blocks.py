"""Where samples can leave a model, and where not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgeon
from surgeon.exits.blocks import BlockEnd, find_block_ends
from surgeon.exits.heads import pooling_words
from surgeon.graph.traced import module_path
from surgeon.passes import EarlyExit, Moeify
from surgeon.passes.blocks import block_layers
from surgeon.sites.rejection import Rejection
from surgeon.testing.models import StackLayer, feed_forward
from tests.small_models import WIDTH, Function, stack, vectors


def found(model: nn.Module, inputs: Any, **options: Any) -> tuple[list[BlockEnd], list[Rejection]]:
    return EarlyExit(**options).explain(surgeon.trace(model, inputs))


@pytest.mark.parametrize("kind", ["gelu", "gated", "fused"])
def test_a_block_ends_at_its_residual_sum(kind: str) -> None:
    ends, refused = found(stack(kind, 4), vectors())
    assert [end.path for end in ends] == ["blocks.0", "blocks.1", "blocks.2"]
    assert not refused
    for end in ends:
        assert end.output.target is torch.ops.aten.add.Tensor
        assert len(end.output.users) == 2  # what follows, and the next residual sum
        assert pooling_words(end, "auto") == "mean"


def test_every_so_many_blocks_and_chosen_ones() -> None:
    model = stack("gelu", 5)
    assert [end.path for end in found(model, vectors(), every=2)[0]] == ["blocks.1", "blocks.3"]
    assert [end.path for end in found(model, vectors(), only=("*.2",))[0]] == ["blocks.2"]


def test_layers_with_experts_are_in_blocks_too() -> None:
    graph = surgeon.trace(stack("gelu", 3), vectors())
    Moeify(experts=4).apply(graph)
    assert [end.path for end in EarlyExit().explain(graph)[0]] == ["blocks.0", "blocks.1"]


@pytest.mark.parametrize(("family", "pooled"), [("bert", "token 0"), ("vit", "token 0"), ("albert", "token 0")])
def test_models_of_hugging_face(traces: Any, family: str, pooled: str) -> None:
    ends, _ = EarlyExit().explain(traces(family))
    assert len(ends) == 1
    assert pooling_words(ends[0], "auto") == pooled
    assert pooling_words(ends[0], "mean") == "mean"
    # The first of the two blocks, although albert's share their weights.
    after = [
        node
        for node in ends[0].output.graph.nodes
        if node.target is torch.ops.aten.scaled_dot_product_attention.default
    ]
    nodes = list(ends[0].output.graph.nodes)
    assert [nodes.index(node) < nodes.index(ends[0].output) for node in after] == [True, False]
    assert module_path(ends[0].output)


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
def test_language_models_are_refused_for_their_missing_keys(traces: Any, family: str) -> None:
    ends, refused = EarlyExit().explain(traces(family))
    assert not ends
    assert [rejection.code for rejection in refused] in (["answers-tokens"], ["no-classes"])
    if family != "t5":  # which also returns what its encoder computes
        assert "keys and values" in refused[0].reason


class WithHead(nn.Module):
    """Three blocks, and a head of two linear layers that reads the first token, as DistilBERT and ELECTRA have it."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = stack("gelu", 3).blocks
        self.head = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x[:, 0])


@pytest.mark.parametrize("last", [False, True])
def test_a_head_like_a_feed_forward_layer_is_no_block(last: bool) -> None:
    graph = surgeon.trace(WithHead().eval(), vectors())
    ends, refused = find_block_ends(graph, block_layers(graph), last=last)
    assert [end.path for end in ends] == ["blocks.0", "blocks.1", "blocks.2"][: 3 if last else 2]
    assert not refused


class Skipping(nn.Module):
    """Three blocks, and the classes are read from the first and the last of them."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(StackLayer(feed_forward("gelu")) for _ in range(3))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        first = self.blocks[0](x)
        return self.head((first + self.blocks[2](self.blocks[1](first))).mean(1))


def test_what_is_read_past_a_block_rules_it_out() -> None:
    ends, refused = found(Skipping().eval(), vectors())
    assert [end.path for end in ends] == ["blocks.0"]
    assert [(one.code, one.path) for one in refused] == [("no-single-value", "blocks.1.ffn")]


@pytest.mark.parametrize(
    ("model", "code"),
    [
        (lambda: stack("gelu", 1), "no-blocks"),
        (lambda: Function(lambda m, x: m.a(x).mean(1), a=(WIDTH, 3)), "no-blocks"),
        (lambda: Function(lambda m, x: (m.a(x).mean(1), x), a=(WIDTH, 3)), "no-classes"),
        (lambda: Function(lambda m, x: m.a(x).mean(1), a=(WIDTH, 1)), "no-classes"),
        (lambda: Function(lambda m, x: m.a(x), a=(WIDTH, 3)), "answers-tokens"),
    ],
)
def test_models_without_places_are_refused(model: Any, code: str) -> None:
    x = vectors()["x"]
    made = model().eval()
    ends, refused = found(made, {"x": x})
    assert not ends
    assert [rejection.code for rejection in refused] == [code]

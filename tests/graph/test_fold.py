"""Matrices are folded into parameters where the given nodes read them, and nowhere else."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.fx import Node

import surgeon
from surgeon.graph.fold import Fold, fold
from surgeon.graph.traced import TracedGraph, tidy

D = 6


class Tied(nn.Module):
    """An embedding whose weight two heads share."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.one, self.two = nn.Embedding(9, D), nn.Linear(D, 9, bias=False), nn.Linear(D, 9, bias=False)
        self.one.weight = self.two.weight = self.embed.weight

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embed(ids)
        return self.one(x), self.two(torch.tanh(x))


def setting() -> tuple[Tied, TracedGraph, Tensor, Tensor]:
    torch.manual_seed(0)
    model, ids = Tied().double().eval(), torch.arange(8).reshape(2, 4)
    return model, surgeon.trace(model, ids), ids, torch.randn(D, D, dtype=torch.float64)


def uses(graph: TracedGraph) -> dict[str, tuple[Node, Node]]:
    """The nodes that read the weight, by the module that they stand in: (reader, `get_attr` node)."""
    found = {}
    for node in graph.graph.nodes:
        for source in node.all_input_nodes:
            if source.op == "get_attr":
                found[node.name] = (node, source)
    return found


def test_one_reader_gets_its_own_and_the_others_keep_theirs() -> None:
    model, graph, ids, matrix = setting()
    user, node = uses(graph)["linear"]
    renamed = fold(graph, [Fold(user, node, 1, matrix=matrix)])
    tidy(graph)
    x = model.embed(ids)
    one, two = graph(ids)
    assert torch.allclose(one, x @ (model.one.weight @ matrix).T)
    assert torch.allclose(two, model(ids)[1])
    assert list(renamed) == [(user, node)]
    assert len(list(graph.parameters())) == 2


def test_all_readers_alike_keep_one_parameter_and_its_name() -> None:
    model, graph, ids, matrix = setting()
    before, names = model.embed.weight.clone(), set(dict(graph.named_parameters()))
    readers = uses(graph).values()
    assert fold(graph, [Fold(user, node, 1, matrix=matrix) for user, node in readers]) == {}
    tidy(graph)
    turned = before @ matrix
    assert torch.allclose(graph(ids)[0], turned[ids] @ turned.T)
    assert set(dict(graph.named_parameters())) == names
    assert torch.equal(model.embed.weight, before)


def test_gain_groups_and_what_is_added() -> None:
    _, graph, _, matrix = setting()
    user, node = uses(graph)["linear"]
    generator = torch.Generator().manual_seed(0)
    old = torch.randn(D, 4, generator=generator, dtype=torch.float64)
    gain, added = torch.rand(D, generator=generator, dtype=torch.float64), torch.ones(D, 4, dtype=torch.float64)
    made = Fold(user, node, 0, gain=gain, matrix=matrix, added=added).of(old)
    assert torch.allclose(made, matrix.T @ (gain[:, None] * old) + 1)
    groups = torch.tensor([[4, 1], [0, 5]])
    parts = torch.randn(2, 2, 2, generator=generator, dtype=torch.float64)
    made = Fold(user, node, 0, matrix=parts, groups=groups).of(old)
    whole = torch.eye(D, dtype=torch.float64)
    for group, part in zip(groups.tolist(), parts, strict=True):
        for i, row in enumerate(group):
            for j, column in enumerate(group):
                whole[row, column] = part[i, j]
    assert torch.allclose(made, whole.T @ old)
    assert made.is_contiguous()


def test_the_result_has_the_parameter_s_dtype_and_is_computed_in_float64() -> None:
    _, graph, _, matrix = setting()
    user, node = uses(graph)["linear"]
    old = torch.randn(3, D, generator=torch.Generator().manual_seed(0)).bfloat16()
    made = Fold(user, node, 1, matrix=matrix).of(old)
    assert made.dtype is torch.bfloat16
    assert torch.equal(made, (old.double() @ matrix).bfloat16())

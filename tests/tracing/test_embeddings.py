"""Embeddings with sparse gradients: in the graph they are dense, and have the same values."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import surgeon


class Tables(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Embedding(9, 4, sparse=True)
        self.bag = nn.EmbeddingBag(9, 4, sparse=True, mode="sum")
        self.dense = nn.Embedding(9, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.rows(ids).sum(1) * self.bag(ids) + self.dense(ids).sum(1)


def test_gradients_are_dense() -> None:
    model, ids = Tables(), torch.randint(0, 9, (3, 5))
    graph = surgeon.trace(model, ids)
    gradients = {}
    for name, module in (("model", model), ("graph", graph)):
        module.zero_grad()
        module(ids).square().sum().backward()
        gradients[name] = {weight: parameter.grad for weight, parameter in module.named_parameters()}
    assert gradients["model"]["rows.weight"].is_sparse
    for weight, gradient in gradients["graph"].items():
        assert gradient.layout is torch.strided
        torch.testing.assert_close(gradient, gradients["model"][weight].to_dense())
    (note,) = graph.meta["trace"].notes
    assert note == "Embeddings with sparse=True get dense gradients in the graph: rows.weight, bag.weight."

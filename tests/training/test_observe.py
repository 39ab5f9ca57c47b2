"""Values inside a graph on data: padding is left out where masks tell, and tokens are shared out among nodes."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

import surgeon
from surgeon.data.data import Data
from surgeon.errors import DataError
from surgeon.sites.search import find_ffns
from surgeon.training.observe import collect, collect_calls
from tests.small_models import WIDTH, Function

MASK = torch.tensor([[1, 1, 1], [1, 0, 0]])
X = torch.randn(16, 6, WIDTH, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("batch_first", [True, False])
def test_a_model_that_is_not_batch_first_is_warned_of_once(batch_first: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Its layers see [T, B, d], and no mask fits: every token counts."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=batch_first).eval()
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    inputs = {"src": x if batch_first else x.transpose(0, 1), "src_key_padding_mask": MASK == 0}
    graph = surgeon.trace(layer, inputs)
    (site,), _ = find_ffns(graph)
    name = site.calls[0].x.name
    with caplog.at_level(logging.WARNING, logger="surgeon"):
        values = collect(graph, [name], Data.of([inputs, inputs]), tokens=100)
    assert len(values[name]) == (8 if batch_first else 12)
    said = [message[:24] for name, _, message in caplog.record_tuples if name == "surgeon"]
    assert said == ([] if batch_first else ["Padding counts as tokens"])


def test_tokens_are_shared_out_among_nodes() -> None:
    graph = surgeon.trace(Function(lambda m, x: torch.relu(m.a(x)), a=(WIDTH, WIDTH)), X)
    x, other = (
        next(node.name for node in graph.graph.nodes if node.op == op) for op in ("placeholder", "call_function")
    )
    data = Data.of([X[:1], X[1:]])
    found = collect_calls(graph, {"both": [x, other, x], "one": [x]}, data, tokens=10)
    assert torch.equal(found["one"], X.flatten(0, 1)[:10])
    assert torch.equal(found["both"][:5], X.flatten(0, 1)[:5])
    assert found["both"].shape == (10, WIDTH)
    assert not torch.equal(found["both"][5:], X.flatten(0, 1)[5:10])


def test_data_without_tokens_is_refused() -> None:
    graph = surgeon.trace(Function(lambda m, x: torch.relu(m.a(x)), a=(WIDTH, WIDTH)), X)
    x = next(node.name for node in graph.graph.nodes if node.op == "placeholder")
    with pytest.raises(DataError, match="holds no tokens"):
        collect(graph, [x], Data.of([X[:0]]), tokens=10)

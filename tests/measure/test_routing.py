"""What routers miss: energies by hand, none with the oracle's scores, and counts of pairs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import surgeon
from surgeon.errors import DataError, UsageError
from surgeon.measure.routing import BINS, measure_routing
from surgeon.moe.module import MoE
from surgeon.moe.router import expert_norms
from surgeon.moe.site import find_moes
from surgeon.passes import Lower, Moeify
from tests.small_models import WIDTH, Plain, Wrapped

X = torch.randn(3, 7, WIDTH, generator=torch.Generator().manual_seed(0))


def layer(lowered: bool) -> tuple[surgeon.TracedGraph, Tensor, Tensor]:
    """A graph with one layer, the norms of its experts, and the scores of its router: [21, E]."""
    torch.manual_seed(0)
    model = Wrapped(Plain(act=F.relu)).eval()
    graph = surgeon.trace(model, X)
    Moeify(experts=8, router_width=8).apply(graph)
    moe = graph.get_submodule("ffn.moe")
    assert isinstance(moe, MoE)
    x = model.norm(X).reshape(-1, WIDTH)
    (site,) = find_moes(graph)
    with torch.no_grad():
        scores, norms = moe.router(x), expert_norms(x, site.routed, site.activation)
    if lowered:
        Lower().apply(graph)
    return graph, norms, scores


@pytest.mark.parametrize("lowered", [False, True])
def test_energies_are_those_of_the_layer(lowered: bool) -> None:
    graph, norms, scores = layer(lowered)
    surgeon.set_tau(graph, 0.6)
    (found,) = measure_routing(graph, [X[:1], X[1:]])
    ran = scores >= 0.6 * scores.amax(-1, keepdim=True)
    energy = norms.double().square()
    assert (found.path, found.tokens, found.experts) == ("ffn.moe", 21, 8)
    assert found.lost == pytest.approx(float((energy * ~ran).sum() / energy.sum()))
    least = [float(row.sort().values[: 8 - int(count)].sum()) for row, count in zip(energy, ran.sum(-1), strict=True)]
    assert found.oracle == pytest.approx(sum(least) / float(energy.sum()))
    assert 0.0 < found.oracle < found.lost < 1.0
    assert found.regret == pytest.approx(found.lost - found.oracle)


def test_every_pair_is_counted_where_it_belongs() -> None:
    graph, norms, scores = layer(False)
    (found,) = measure_routing(graph, [X])
    counts = torch.zeros(BINS, BINS, dtype=torch.int64)
    for norm, score in zip(norms, scores, strict=True):
        for true, given in zip(norm / norm.max(), score / score.max(), strict=True):
            counts[min(BINS - 1, int(true * BINS)), min(BINS - 1, int(given * BINS))] += 1
    assert torch.equal(torch.tensor(found.pairs), counts)
    assert sum(map(sum, found.pairs)) == 21 * 8


def test_nothing_is_lost_where_everything_runs() -> None:
    graph, _, _ = layer(False)
    (found,) = measure_routing(graph, [X])
    assert found.lost == found.oracle == found.regret == 0.0


def test_without_experts_or_tokens_it_is_refused() -> None:
    model = Wrapped(Plain(act=F.relu)).eval()
    with pytest.raises(UsageError, match="no routers"):
        measure_routing(surgeon.trace(model, X), [X])
    with pytest.raises(DataError, match="no tokens"):
        measure_routing(layer(False)[0], [])

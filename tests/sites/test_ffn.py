"""Feed-forward layers that stand in for linear ones: those that a pass put there, in any copy, and no others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from surgeon.graph.ownership import own_parameters
from surgeon.graph.traced import TracedGraph, fork
from surgeon.moe.trunks import trunk_groups
from surgeon.passes import Mlpify, Moeify, SwapActivation
from surgeon.sites.search import find_ffns
from surgeon.surgery.artifact import load
from surgeon.surgery.pipeline import Pipeline
from surgeon.surgery.surgery import Surgery
from tests.small_models import WIDTH, Function, Plain

X = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(0))
# What passes put in, and what a user called so.
MADE, OWN = {"a.projection_mlp", "b.projection_mlp"}, {"projection_mlp", "projection_mlp_q"}


def compute(m: Any, x: Tensor) -> Tensor:
    left, right = m.a(x) * torch.softmax(m.b(x), -1), m.projection_mlp(x) * torch.softmax(m.projection_mlp_q(x), -1)
    return m.head(torch.softmax(m.c(left + right), -1))


def found(graph: TracedGraph) -> dict[str, bool]:
    return {site.path: site.is_projection for site in find_ffns(graph)[0]}


def shared(graph: TracedGraph) -> list[set[str]]:
    """The paths of the layers that share a trunk with others."""
    groups = trunk_groups(graph, find_ffns(graph)[0])
    return [{site.path for site in group} for group in groups if len(group) > 1]


@pytest.fixture(scope="module")
def surgery() -> Surgery:
    torch.manual_seed(0)
    square = (WIDTH, WIDTH)
    model = Function(
        compute, a=square, b=square, c=square, head=square, projection_mlp=Plain(), projection_mlp_q=Plain()
    )
    return Pipeline([Mlpify(skip=("c",), steps=1)]).run(model.eval(), inputs=X, data=[X])


def test_a_name_makes_no_projection(surgery: Surgery) -> None:
    graph = surgery.graph
    assert found(graph) == dict.fromkeys(MADE, True) | dict.fromkeys(OWN, False)
    assert shared(graph) == [MADE]


def test_copies_know_it_and_the_original_learns_nothing_of_them(surgery: Surgery) -> None:
    copied = fork(surgery.graph)
    own_parameters(copied)
    SwapActivation(to="relu2").apply(copied)
    assert found(copied) == found(surgery.graph)
    Mlpify().apply(copied)
    assert {path for path, projection in found(copied).items() if projection} == MADE | {"c.projection_mlp"}
    assert {path for path, projection in found(surgery.graph).items() if projection} == MADE


def test_a_saved_surgery_knows_it_and_passes_go_on_from_there(surgery: Surgery, tmp_path: Path) -> None:
    loaded = load(surgery.save(tmp_path / "once"))
    again = load(Pipeline([SwapActivation(to="relu2")]).run(loaded, inputs=X).save(tmp_path / "twice"))
    for graph in (loaded, again):
        assert found(graph) == found(surgery.graph)
        assert shared(graph) == [MADE]
    report = Moeify(experts=2, router_width=4).apply(again, inputs=X)
    trunks = {change.path: change.after.partition("router ")[2] for change in report.sites}
    assert sorted(trunks[path] for path in MADE) == ["4", "shared"]
    assert {trunks[path] for path in OWN} == {"4"}

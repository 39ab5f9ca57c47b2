"""moeify with layer_by_layer: every layer's routers are fitted by themselves, and end as good as all at once."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import surgeon
from surgeon.graph.traced import TracedGraph, fork
from surgeon.passes import Mlpify, Moeify
from surgeon.passes.base import REWRITING
from surgeon.progress import Progress
from surgeon.training.loop import FitReport, RunSettings
from tests.small_models import WIDTH, Plain, Wrapped, classifier, labelled, labelled_vectors, stack, tokens, vectors

X = torch.randn(4, 6, WIDTH, generator=torch.Generator().manual_seed(0))
DATA = labelled_vectors(4)


@pytest.fixture(scope="module")
def traced() -> TracedGraph:
    return surgeon.trace(stack("relu"), vectors())


def routers(graph: TracedGraph) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in graph.state_dict().items() if ".router." in name}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    assert one.keys() == other.keys() != set()
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("options", [{}, {"epochs": 0}, {"router": "trained"}, {"exposure": 0.5}], ids=str)
def test_one_layer_by_itself_is_all_layers_at_once(options: Any) -> None:
    found, reports = [], []
    for layer_by_layer in (False, True):
        torch.manual_seed(0)
        graph = surgeon.trace(Wrapped(Plain(act=F.relu)).eval(), X)
        one = Moeify(experts=4, layer_by_layer=layer_by_layer, **{"epochs": 3, **options})
        report = one.apply(graph, data=[X, X + 1])
        assert report.fit is not None
        found.append(routers(graph))
        reports.append(dataclasses.replace(report.fit, seconds=0.0))
    assert same(*found)
    assert reports[0] == reports[1]


@pytest.mark.parametrize("exposure", [0.0, 0.3])
def test_every_layers_loss_goes_down_by_itself(traced: TracedGraph, exposure: float) -> None:
    losses: dict[str, list[float]] = defaultdict(list)

    def progress(moment: Progress) -> None:
        if "router loss" in moment.values:
            losses[moment.what].append(moment.values["router loss"])

    one = Moeify(
        experts=8, split="weights", router="trained", lr=1e-2, steps=60, layer_by_layer=True, exposure=exposure
    )
    report = one.apply(fork(traced), data=DATA, settings=RunSettings(progress=progress)).fit
    assert list(losses) == ["moeify routers 1 of 2, blocks.0.ffn", "moeify routers 2 of 2, blocks.1.ffn"]
    for values in losses.values():
        assert len(values) == 60
        assert sum(values[-4:]) < 0.7 * sum(values[:4])
    assert report is not None
    assert (report.steps, report.epochs, report.resumed_at) == (120, 30.0, 0)
    assert [step for step, _ in report.losses[:2]] == [2, 6]
    for position in (0, -1):
        mean = sum(values[position] for values in losses.values()) / 2
        assert report.losses[position][1] == {"router loss": pytest.approx(mean)}


def test_layers_that_share_a_trunk_are_fitted_together() -> None:
    graph = surgeon.trace(classifier("relu", layers=1, dropout=0.0), tokens())
    Mlpify(steps=1).apply(graph, inputs=tokens(), data=labelled(1))
    seen: dict[str, None] = {}

    def progress(moment: Progress) -> None:
        if moment.total and moment.what != REWRITING:
            seen.setdefault(moment.what)

    one = Moeify(experts=4, router_width=8, steps=1, split="weights", layer_by_layer=True)
    one.apply(graph, data=labelled(1), settings=RunSettings(progress=progress))
    assert list(seen) == [
        "calibration",
        "moeify routers 1 of 3, blocks.0.attention.q.projection_mlp and 2 more",
        "moeify routers 2 of 3, blocks.0.attention.o.projection_mlp",
        "moeify routers 3 of 3, blocks.0.ffn",
    ]


@pytest.mark.parametrize(("number", "step"), [(1, 5), (2, 1), (2, 6)])
@pytest.mark.parametrize("exposure", [0.0, 0.3])
def test_an_interrupted_layer_is_gone_on_with(
    traced: TracedGraph, tmp_path: Path, number: int, step: int, exposure: float
) -> None:
    def apply(**settings: Any) -> tuple[dict[str, Tensor], FitReport]:
        graph = fork(traced)
        one = Moeify(experts=8, split="weights", steps=6, lr=1e-2, layer_by_layer=True, exposure=exposure)
        report = one.apply(graph, data=DATA, settings=RunSettings(**settings)).fit
        assert report is not None
        return routers(graph), report

    def interrupt(moment: Progress) -> None:
        if moment.what.startswith(f"moeify routers {number} of 2") and moment.done == step:
            raise KeyboardInterrupt

    want, whole = apply()
    with pytest.raises(KeyboardInterrupt):
        apply(workdir=tmp_path, progress=interrupt)
    assert sum(1 for _ in tmp_path.rglob("fit.json")) == number
    got, report = apply(workdir=tmp_path, resume=True)
    assert same(got, want)
    assert (report.steps, report.resumed_at) == (12, 6 * (number - 1) + step)
    assert report.losses == whole.losses

"""Options of the training loop, through the passes that train: mixed precision, accumulation, warm-up."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

import surgeon
from surgeon.data.data import Data
from surgeon.graph.ownership import own_parameters
from surgeon.graph.traced import TracedGraph, fork
from surgeon.passes import Mlpify, Moeify, Recover, Sparsify, SwapActivation
from surgeon.passes.trained import TrainedPass
from surgeon.training.loop import FitReport, TrainingPlan
from tests.small_models import classifier, labelled, tokens

DATA = labelled(4)
PASSES = (
    Mlpify(steps=8, activation="gelu"), SwapActivation(steps=8, lr=1e-3), Sparsify(steps=8, lr=1e-3, target=0.3),
    Moeify(steps=8, experts=8, shared=1), Moeify(steps=8, experts=8, exposure=0.5, router="trained"),
    Recover(steps=8, lr=1e-3),
)  # fmt: skip


@pytest.fixture(scope="module")
def graphs() -> dict[bool, TracedGraph]:
    """A model with padding and dropout: as it is, and with experts."""
    dense = surgeon.trace(classifier("gelu", layers=2), tokens())
    split = fork(dense)
    Moeify(experts=8).apply(split)
    return {False: dense, True: split}


def fitted(graphs: dict[bool, TracedGraph], one: TrainedPass) -> tuple[TracedGraph, FitReport]:  # type: ignore[type-arg]
    graph = fork(graphs[isinstance(one, Recover)])
    own_parameters(graph)
    report = one.apply(graph, data=Data.of(DATA, task="classification"))
    assert report.fit is not None
    return graph, report.fit


@pytest.mark.parametrize("one", PASSES, ids=lambda one: f"{one.name} {one.options().get('router', '')}".strip())
def test_mixed_precision_learns_nearly_the_same(graphs: dict[bool, TracedGraph], one: TrainedPass) -> None:  # type: ignore[type-arg]
    _, want = fitted(graphs, one)
    half_graph, found = fitted(graphs, dataclasses.replace(one, precision="bfloat16"))
    assert found.losses != want.losses
    for (_, values), (_, expected) in zip(found.losses, want.losses, strict=True):
        assert values == pytest.approx(expected, rel=0.15)
    assert {parameter.dtype for parameter in half_graph.parameters()} == {torch.float32}
    moved = {name: value for name, value in half_graph.state_dict().items() if value.is_floating_point()}
    assert all(torch.isfinite(value).all() for value in moved.values())
    if isinstance(one, Moeify):  # the routers, not the experts, are what is trained
        start = fork(graphs[False])
        dataclasses.replace(one, steps=1, lr=1e-12).apply(start, data=DATA)
        changed = {name for name, value in start.state_dict().items() if not torch.equal(value, moved.get(name, value))}
        assert changed == {name for name in moved if ".router." in name}


def test_options_reach_the_plan() -> None:
    one = Sparsify(steps=7, lr=0.1, weight_decay=0.2, schedule="cosine", warmup=0.3, clip=None, accumulate=5,
                   precision="bfloat16", beta2=0.95)  # fmt: skip
    assert one.plan() == TrainingPlan(3.0, 7, 0.1, 0.2, "cosine", None, 0.3, 5, "bfloat16", 0.95)
    assert Sparsify().plan() == TrainingPlan(3.0, None, 2e-5)


def test_accumulating_takes_fewer_steps_through_the_same_data(graphs: dict[bool, TracedGraph]) -> None:
    _, fit = fitted(graphs, Sparsify(epochs=3, accumulate=4, warmup=0.5))
    assert (fit.steps, fit.epochs) == (3, 3.0)
    assert all(math.isfinite(value) for _, values in fit.losses for value in values.values())

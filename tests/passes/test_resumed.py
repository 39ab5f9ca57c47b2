"""Fits that were interrupted end, once they are resumed, where they would have ended."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import surgeon
from surgeon.dynamic.knobs import set_tau
from surgeon.graph.ownership import own_parameters
from surgeon.graph.traced import TracedGraph, fork
from surgeon.moe.site import find_moes
from surgeon.passes import Moeify, Recover
from surgeon.passes.report import PassReport
from surgeon.progress import Progress
from surgeon.training.loop import RunSettings
from tests.small_models import CLASSES, Inputs, labelled_vectors, stack, vectors


def interrupt(one: Moeify | Recover, graph: TracedGraph, data: object, workdir: Path, what: str, step: int) -> None:
    """Run a pass until its fit called `what` has done so many steps."""

    def progress(moment: Progress) -> None:
        if (moment.what, moment.done) == (what, step):
            raise KeyboardInterrupt

    settings = RunSettings(workdir=workdir, progress=progress)
    with pytest.raises(KeyboardInterrupt):
        one.apply(graph, data=data, settings=settings)


@pytest.fixture
def make() -> Callable[[], TracedGraph]:
    graph = surgeon.trace(stack("relu"), vectors())

    def copy() -> TracedGraph:
        copied = fork(graph)
        own_parameters(copied)
        return copied

    return copy


def experts(graph: TracedGraph) -> dict[str, Tensor]:
    """The weights of every layer's experts, which training the routers leaves as they are."""
    return {site.path: site.weights.w1.clone() for site in find_moes(graph)}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


# More tokens in each than neurons are compared on: which neurons become an expert follows from the first batch.
LARGE: list[tuple[Inputs, Tensor]] = [(vectors(900, seed=number), torch.arange(900) % CLASSES) for number in range(3)]
SPLIT = Moeify(experts=8, router_width=8, split="activations", steps=4)


@pytest.fixture
def interrupted(make: Callable[[], TracedGraph], tmp_path: Path) -> Path:
    """The work directory of a run that was interrupted while its routers were trained."""
    interrupt(SPLIT, make(), LARGE, tmp_path, "moeify routers", 2)
    return tmp_path


def split(graph: TracedGraph, data: object, workdir: Path | None = None, *, resume: bool = False) -> PassReport:
    return SPLIT.apply(graph, data=data, settings=RunSettings(workdir=workdir, resume=resume))


def test_the_routers_go_on_with_the_experts_they_were_trained_for(
    make: Callable[[], TracedGraph], interrupted: Path
) -> None:
    """Though the data come in another order, from which other experts would be made."""
    first, other, resumed = make(), make(), make()
    split(first, LARGE)
    split(other, LARGE[::-1])
    assert not same(experts(first), experts(other))
    report = split(resumed, LARGE[::-1], interrupted, resume=True)
    assert report.fit is not None
    assert report.fit.resumed_at == 2
    assert same(experts(resumed), experts(first))


def test_a_run_that_is_not_resumed_makes_its_own_experts(make: Callable[[], TracedGraph], interrupted: Path) -> None:
    other, again = make(), make()
    split(other, LARGE[::-1])
    report = split(again, LARGE[::-1], interrupted)
    assert report.fit is not None
    assert report.fit.resumed_at == 0
    assert same(experts(again), experts(other))


@pytest.fixture
def converted(make: Callable[[], TracedGraph]) -> TracedGraph:
    graph = make()
    Moeify(experts=8, router_width=8, split="weights").apply(graph)
    set_tau(graph, 0.25)
    return graph


@pytest.mark.parametrize("step", [1, 5])
def test_recover_goes_on_as_if_it_had_not_been_interrupted(converted: TracedGraph, tmp_path: Path, step: int) -> None:
    one, data = Recover(steps=8, tau=1.0, lr=1e-2), labelled_vectors(3)
    whole, resumed = fork(converted), fork(converted)
    want = one.apply(whole, data=data)
    interrupt(one, fork(converted), data, tmp_path, "recover", step)
    report = one.apply(resumed, data=data, settings=RunSettings(workdir=tmp_path, resume=True))
    assert want.fit is not None
    assert report.fit is not None
    assert report.fit.resumed_at == step
    assert report.fit.losses == want.fit.losses
    assert same(dict(resumed.state_dict()), dict(whole.state_dict()))


def test_a_resumed_recover_leaves_the_graph_it_came_from_alone(converted: TracedGraph, tmp_path: Path) -> None:
    one, data = Recover(steps=4, lr=1e-2), labelled_vectors(2)
    interrupt(one, fork(converted), data, tmp_path, "recover", 2)
    # What was kept beside the checkpoint is not what the graph holds by now.
    with torch.no_grad():
        for parameter in converted.parameters():
            parameter.add_(1.0)
    before = {name: tensor.clone() for name, tensor in converted.state_dict().items()}
    report = one.apply(fork(converted), data=data, settings=RunSettings(workdir=tmp_path, resume=True))
    assert report.fit is not None
    assert report.fit.resumed_at == 2
    assert same(dict(converted.state_dict()), before)

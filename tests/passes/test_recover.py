"""recover: trains the model as it will run, routers included, and leaves tau where it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import surgeon
from surgeon.dynamic.knobs import get_tau, set_tau
from surgeon.errors import PassError, UsageError
from surgeon.graph.ownership import own_parameters
from surgeon.graph.traced import TracedGraph, fork
from surgeon.moe.module import MoE
from surgeon.moe.site import find_moes
from surgeon.passes import Lower, Moeify, Recover
from surgeon.progress import Progress
from surgeon.surgery.pipeline import Pipeline
from surgeon.training.loop import RunSettings
from tests.small_models import labelled_vectors, stack, vectors

DATA = labelled_vectors(4)


@pytest.fixture(scope="module")
def converted() -> TracedGraph:
    """A stack that knows its task, in experts with trained routers."""
    from surgeon.passes import Sparsify

    passes = [
        Sparsify(steps=200, lr=3e-3, alpha=1e-3), Moeify(experts=8, router_width=8, split="weights", steps=100, lr=1e-2)
    ]  # fmt: skip
    graph = Pipeline(passes).run(stack("relu"), inputs=vectors(), data=DATA).graph
    set_tau(graph, {"blocks.0.ffn": 0.25, "blocks.1.ffn": 0.125})
    return graph


def own(graph: TracedGraph) -> TracedGraph:
    copied = fork(graph)
    own_parameters(copied)
    return copied


def task_loss(graph: TracedGraph, tau: float) -> float:
    set_tau(graph, tau)
    with torch.no_grad():
        losses = [F.cross_entropy(graph.eval()(**inputs), labels) for inputs, labels in DATA]
    return float(torch.stack(losses).mean())


def test_everything_is_trained_and_tau_stays(converted: TracedGraph) -> None:
    graph = own(converted)
    before = {name: value.clone() for name, value in graph.state_dict().items()}
    report = Recover(steps=5, lr=1e-3).apply(graph, inputs=vectors(), data=DATA)
    assert report.fit is not None
    assert set(report.fit.losses[0][1]) == {"task loss", "router loss"}
    for name, value in graph.state_dict().items():
        assert torch.equal(value, before[name]) == name.endswith(".tau"), name
    assert get_tau(graph) == {"blocks.0.ffn.moe": 0.25, "blocks.1.ffn.moe": 0.125}
    assert {site.form for site in find_moes(graph)} == {"module"}


def test_routers_have_a_rate_of_their_own(converted: TracedGraph) -> None:
    graph = own(converted)
    before = {name: value.clone() for name, value in graph.state_dict().items()}
    Recover(steps=5, lr=1e-9, router_lr=1e-2).apply(graph, data=DATA)
    moved = {name: float((value - before[name]).abs().max()) for name, value in graph.state_dict().items()}
    routers = {name for name in moved if ".router." in name}
    assert routers
    assert all((size > 1e-3) == (name in routers) for name, size in moved.items()), moved


def test_routers_learn_what_they_were_fitted_to(converted: TracedGraph) -> None:
    graph = own(converted)
    x = torch.randn(256, 16, generator=torch.Generator().manual_seed(0))
    moe = graph.get_submodule("blocks.0.ffn.moe")
    assert isinstance(moe, MoE)
    with torch.no_grad():
        for parameter in moe.router.fc2.parameters():
            parameter.mul_(3.0)  # what max selects stays the same
        before = float(moe.router.goal.loss(moe.router, x, moe.routed, moe.activation))
    Recover(steps=100, lr=1e-9, router_lr=1e-2).apply(graph, data=DATA)
    trained = graph.get_submodule("blocks.0.ffn.moe")
    assert isinstance(trained, MoE)
    with torch.no_grad():
        after = float(trained.router.goal.loss(trained.router, x, trained.routed, trained.activation))
    assert after < 0.2 * before


def test_the_graph_it_came_from_is_left_alone(converted: TracedGraph) -> None:
    before = {name: value.clone() for name, value in converted.state_dict().items()}
    Pipeline([Recover(steps=3, lr=1e-2)]).run(converted, inputs=vectors(), data=DATA)
    assert all(torch.equal(value, before[name]) for name, value in converted.state_dict().items())


def test_every_step_runs_at_another_tau(converted: TracedGraph, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []
    original = MoE.select

    def select(self: MoE, step: Any, scores: Any, tau: Any) -> Any:
        seen.append(float(tau))
        return original(self, step, scores, tau)

    monkeypatch.setattr(MoE, "select", select)
    Recover(steps=6, tau=0.5).apply(own(converted), data=DATA)
    assert len(set(seen)) == 6
    assert all(0 <= tau <= 0.5 for tau in seen)
    assert max(seen) > 0.25


def test_the_model_gets_better_at_running_few_experts(converted: TracedGraph) -> None:
    plain, fine_tuned, recovered = own(converted), own(converted), own(converted)
    Recover(steps=150, tau=0.0, lr=2e-3).apply(fine_tuned, data=DATA)
    Recover(steps=150, tau=1.0, lr=2e-3).apply(recovered, data=DATA)
    assert task_loss(plain, 0.8) > 1.2 * task_loss(plain, 0.0)  # there is something to recover
    assert task_loss(recovered, 0.8) < 0.8 * task_loss(plain, 0.8)
    # and it is not the training alone that does it
    assert task_loss(recovered, 0.8) < 0.5 * task_loss(fine_tuned, 0.8)


@pytest.mark.parametrize("error", [PassError("broken on purpose"), KeyboardInterrupt()])
def test_tau_is_put_back_after_an_error(
    converted: TracedGraph, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[TracedGraph] = []
    original = surgeon.passes.recover.finetune

    def finetune(graph: TracedGraph, *args: Any, **options: Any) -> Any:
        trained.append(graph)
        return original(graph, *args, **options)

    def fail(moment: Progress) -> None:
        if not moment.total:
            return
        assert set(get_tau(trained[0]).values()) != {0.25, 0.125}
        raise error

    monkeypatch.setattr("surgeon.passes.recover.finetune", finetune)
    graph = own(converted)
    with pytest.raises(type(error)):
        Recover(steps=3).apply(graph, data=DATA, settings=RunSettings(progress=fail))
    want = {"blocks.0.ffn.moe": 0.25, "blocks.1.ffn.moe": 0.125}
    assert get_tau(graph) == get_tau(trained[0]) == want


def test_a_teacher_takes_the_place_of_labels() -> None:
    data = [inputs for inputs, _ in DATA]
    passes = [Moeify(experts=8, router_width=8, steps=2), Recover(steps=2, distill=1.0)]
    surgery = Pipeline(passes).run(stack("relu"), inputs=vectors(), data=data)
    fit = surgery.reports[1].fit
    assert fit is not None
    assert set(fit.losses[0][1]) == {"divergence", "router loss"}


def test_lowered_experts_are_refused_with_the_reason(traces: Any) -> None:
    graph = traces("stack:relu")
    Moeify(experts=4).apply(graph)
    Lower(only=("blocks.1.*",)).apply(graph)
    matched, rejected = Recover().explain(graph)
    assert [site.path for site in matched] == ["blocks.0.ffn.moe"]
    assert [one.reason for one in rejected] == ["it is already in the graph as ops: run recover before lower"]


def test_it_needs_data_and_experts() -> None:
    with pytest.raises(UsageError, match=r"recover needs data: it is useless without training\. Give data="):
        Pipeline([Moeify(experts=4), Recover()]).run(stack("relu"), inputs=vectors())
    with pytest.raises(UsageError, match=r"recover works on layers that skip by tau, but there are none\. Put moeify"):
        Pipeline([Recover()]).run(stack("relu"), inputs=vectors(), data=DATA)
    with pytest.raises(UsageError, match="recover must run before lower"):
        surgeon.Pipeline([Moeify(experts=4), Lower(), Recover()]).run(stack("relu"), inputs=vectors(), data=DATA)


@pytest.mark.parametrize(("data", "dry_run", "after"), [
    (DATA, False, "fine-tuned"),
    (None, False, "unchanged: there is no data to train it on"),
    (DATA, True, "to be fine-tuned"),
    (None, True, "to be fine-tuned"),
])  # fmt: skip
def test_only_what_was_trained_is_reported_as_such(
    converted: TracedGraph, data: Any, dry_run: bool, after: str
) -> None:
    trained, settings = after == "fine-tuned", RunSettings(dry_run=dry_run)
    report = Recover(steps=1, lr=1e-3).apply(own(converted), inputs=vectors(), data=data, settings=settings)
    assert {site.after for site in report.sites} == {after}
    assert (report.fit is not None) == trained
    assert report.max_error is not None
    assert (report.max_error > 0) == trained
    assert report.preserved != trained


def test_a_dry_run_shows_that_nothing_was_trained(converted: TracedGraph) -> None:
    text = str(Pipeline([Recover()]).run(converted, inputs=vectors(), dry_run=True).diff())
    assert "recover  2 of 2 sites  same output  not trained" in text
    assert "to be fine-tuned" in text


@pytest.mark.parametrize(("options", "words"), [
    ({"tau": 1.5}, "tau is 1.5, but must be from 0 to 1"),
    ({"distill": -0.1}, "distill is -0.1, but must be from 0 to 1"),
    ({"router_weight": -1.0}, "router_weight is -1.0, but must be at least 0"),
    ({"router_lr": 0.0}, "router_lr is 0.0, but must be above 0"),
])  # fmt: skip
def test_wrong_options(options: Any, words: str) -> None:
    with pytest.raises(UsageError, match=f"recover: {words}"):
        Recover(**options)

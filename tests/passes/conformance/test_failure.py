"""Every pass that fails leaves the graph as it was and names the place."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

from surgeon.errors import PassError, SurgeonError, VerificationError
from surgeon.graph.agreement import call_reproducibly
from surgeon.graph.traced import TracedGraph
from surgeon.passes import Pass
from surgeon.passes.registry import all_passes
from surgeon.training.loop import RunSettings
from tests.small_models import labelled_vectors, vectors

from .subjects import SUBJECTS, assert_same_state, fits, names, node_texts, state_of


def fails_at_second(original: Any) -> Any:
    count = []

    def rewrite(self: Any, graph: TracedGraph, site: Any, seen: Any = None) -> Any:
        count.append(site.path)
        change = original(self, graph, site, seen)
        if len(count) == 2:
            raise RuntimeError("broken on purpose")
        return change

    return rewrite


def check_untouched(one: Pass[Any], graph: TracedGraph, expected: type[Exception], **settings: Any) -> str:
    before, texts, output = state_of(graph), node_texts(graph), call_reproducibly(graph, (), vectors())
    notes = dict(graph.meta)
    with pytest.raises(expected) as error:
        one.apply(graph, inputs=vectors(), **settings)
    assert_same_state(before, state_of(graph))
    assert node_texts(graph) == texts
    assert graph.meta == notes
    assert torch.equal(call_reproducibly(graph, (), vectors()), output)
    return str(error.value)


@names
@pytest.mark.parametrize("mode", [True, False])
def test_failing_rewrite_leaves_the_graph_and_names_the_site(
    subject: Any, name: str, mode: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, graph = subject(name)
    site = one.explain(graph)[0][1].path
    monkeypatch.setattr(type(one), "rewrite", fails_at_second(type(one).rewrite))
    graph.train(mode)
    message = check_untouched(one, graph, PassError)
    assert name in message
    assert site in message
    assert "broken on purpose" in message


@fits
@pytest.mark.parametrize(
    "error", [RuntimeError("broken on purpose"), PassError("broken on purpose"), KeyboardInterrupt()]
)
def test_failing_fit_leaves_the_graph(
    subject: Any, name: str, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, graph = subject(name)

    def progress(moment: Any) -> None:
        if name in moment.what:
            raise error

    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else SurgeonError
    message = check_untouched(one, graph, expected, data=labelled_vectors(2), settings=RunSettings(progress=progress))
    if isinstance(error, RuntimeError):
        assert name in message
        assert "broken on purpose" in message


@pytest.mark.parametrize("name", [name for name, cls in all_passes().items() if cls.preserves])
@pytest.mark.parametrize("mode", [True, False])
def test_failing_verification_leaves_the_graph_and_names_the_site(
    subject: Any, name: str, mode: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, graph = subject(name)
    graph.train(mode)
    site = one.explain(graph)[0][1].path
    original = type(one).rewrite

    def rewrite(self: Any, work: TracedGraph, place: Any, seen: Any = None) -> Any:
        change = original(self, work, place, seen)
        if place.path == site:
            node = next(node for node in work.graph.nodes if node.name == change.output[1])
            with work.graph.inserting_after(node):
                doubled = work.graph.call_function(torch.ops.aten.mul.Tensor, (node, 2.0))
            doubled.meta = dict(node.meta)
            node.replace_all_uses_with(doubled, delete_user_cb=lambda user: user is not doubled)
            change = dataclasses.replace(change, output=(change.output[0], doubled.name))
        return change

    monkeypatch.setattr(type(one), "rewrite", rewrite)
    message = check_untouched(one, graph, VerificationError)
    assert name in message
    assert f"the first site that differs is {site}, by 1.0e+00" in message


@pytest.mark.parametrize("name", ["swap-activation", "mlpify"])
def test_values_that_are_not_finite_fail_verification(subject: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    one, graph = subject(name)
    original = type(one).rewrite

    def rewrite(self: Any, work: TracedGraph, place: Any, seen: Any = None) -> Any:
        change = original(self, work, place, seen)
        node = next(node for node in work.graph.nodes if node.name == change.output[1])
        with work.graph.inserting_after(node):
            infinite = work.graph.call_function(torch.ops.aten.div.Tensor, (node, 0.0))
        infinite.meta = dict(node.meta)
        node.replace_all_uses_with(infinite, delete_user_cb=lambda user: user is not infinite)
        return change

    monkeypatch.setattr(type(one), "rewrite", rewrite)
    assert name in check_untouched(one, graph, VerificationError)


@names
def test_refuses_what_is_no_aten_graph(name: str) -> None:
    symbolic = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)))
    with pytest.raises(SurgeonError, match=f"{name} works on a graph of ATen ops.*surgeon.trace"):
        SUBJECTS[name].make().apply(symbolic)

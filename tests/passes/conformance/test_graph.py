"""What every pass does to the graph it is given, and does not do to anything else."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import surgeon
from surgeon.graph.agreement import call_reproducibly, relative_error, tolerance_for
from surgeon.surgery.pipeline import Pipeline
from surgeon.tracing.trace import quiet
from tests.small_models import labelled_vectors, stack, vectors

from .subjects import SUBJECTS, assert_same_state, names, node_texts, state_of


@names
def test_keeps_what_it_claims_to_keep(subject: Any, name: str) -> None:
    one, graph = subject(name)
    inputs = vectors()
    want = call_reproducibly(graph, (), inputs)
    report = one.apply(graph, inputs=inputs)
    assert report.matched
    got = call_reproducibly(graph, (), inputs)
    assert report.max_error == pytest.approx(relative_error(got, want), rel=1e-3, abs=1e-9)
    assert report.preserved == one.keeps_output(fitted=False)
    if report.preserved:
        assert report.max_error <= tolerance_for(want)
    else:
        assert report.max_error > tolerance_for(want)
    assert torch.isfinite(got).all()


@names
def test_accounts_for_every_parameter(subject: Any, name: str) -> None:
    one, graph = subject(name)
    before = dict(graph.state_dict())
    report = one.apply(graph, inputs=vectors())
    after = dict(graph.state_dict())
    made = tuple(f"{path}." for site in report.sites for path in site.made)
    for key in after.keys() - before.keys():
        assert key.startswith(made), key
    for key in before.keys() - after.keys():
        assert any(key.startswith(path + ".") for path in report.matched), key
    for key in before.keys() & after.keys():
        assert torch.equal(before[key], after[key]), key


@names
def test_second_application_matches_nothing(subject: Any, name: str) -> None:
    one, graph = subject(name)
    one.apply(graph)
    texts, keys = node_texts(graph), set(graph.state_dict())
    if name == "mlpify":  # its own linears are those of a feed-forward layer now
        again = one.apply(graph)
        assert not [path for path in again.matched if path.endswith((".fc1", ".fc2"))]
        return
    if name == "recover":  # it may go on
        return
    again = one.apply(graph)
    assert again.matched == []
    assert node_texts(graph) == texts
    assert set(graph.state_dict()) == keys


@names
def test_leaves_the_model_and_the_shared_graph_alone(subject: Any, name: str) -> None:
    model = stack(SUBJECTS[name].kind)
    model.train()
    model.blocks[0].eval()
    model.head.weight.requires_grad_(False)
    graph = surgeon.trace(model, vectors())
    for one in SUBJECTS[name].first:
        one.apply(graph)
    before, shared = state_of(model), state_of(graph)
    texts = node_texts(graph)
    one = SUBJECTS[name].make()
    surgery = Pipeline([one]).run(graph, inputs=vectors(), data=labelled_vectors(2))
    assert surgery.reports[0].matched
    assert_same_state(before, state_of(model))
    assert_same_state(shared, state_of(graph))
    assert node_texts(graph) == texts
    assert surgery.graph is not graph
    assert surgery.graph.training


@names
def test_modes_switch_and_gradients_flow(subject: Any, name: str) -> None:
    one, graph = subject(name)
    one.apply(graph, inputs=vectors())
    inputs = vectors()
    assert not graph.training
    assert torch.equal(graph(**inputs), graph(**inputs))
    graph.train()
    assert all(module.training for module in graph.modules())
    assert not torch.equal(graph(**inputs), graph(**inputs))
    graph.eval()(**inputs).square().sum().backward()
    silent = {key for key, p in graph.named_parameters() if p.requires_grad and p.grad is None}
    assert all(".router." in key for key in silent), silent
    assert any(p.grad is not None and p.grad.any() for p in graph.parameters())


@names
def test_other_sizes_run(subject: Any, name: str) -> None:
    one, graph = subject(name)
    one.apply(graph, inputs=vectors())
    for batch, length in ((1, 1), (1, 9), (6, 2)):
        assert graph(**vectors(batch, length)).shape == (batch, 3)


@names
def test_works_in_training_mode_too(subject: Any, name: str) -> None:
    one, graph = subject(name)
    graph.train()
    report = one.apply(graph, inputs=vectors())
    assert graph.training
    assert all(
        module.training
        for module in graph.modules()
        if isinstance(module, torch.nn.Dropout) or list(module.parameters(False))
    )
    if report.preserved:
        assert report.max_error is not None
        assert report.max_error < 1e-5


@names
def test_runs_on_a_bare_exported_graph(name: str) -> None:
    batch = torch.export.Dim("batch", min=2)
    inputs = vectors()
    model = stack(SUBJECTS[name].kind)
    with quiet():
        graph = torch.export.export(
            model, (), inputs, strict=False, dynamic_shapes={key: {0: batch} for key in inputs}
        ).module()
    assert isinstance(graph, torch.fx.GraphModule)
    want = model(**inputs)
    for one in SUBJECTS[name].first:
        one.apply(graph)
    one = SUBJECTS[name].make()
    report = one.apply(graph, inputs=inputs)
    assert report.matched
    got = graph(**inputs)
    if report.preserved:
        assert torch.allclose(got, want, atol=1e-5)
    assert graph(**vectors(5)).shape == (5, 3)

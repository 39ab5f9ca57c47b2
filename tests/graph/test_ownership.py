"""Who owns a graph's parameters: copies share nothing and keep ties, and changes are adopted in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import surgeon
from surgeon.graph.ownership import adopt_changes, own_parameters, replace_attribute
from surgeon.graph.traced import aten, fork, tidy
from surgeon.moe.module import MoE
from surgeon.passes import Moeify
from tests.small_models import stack, vectors

from .small import X, node, small


def test_own_parameters_shares_nothing_and_keeps_ties_and_names() -> None:
    model = stack()
    model.blocks[1].mix.weight = model.blocks[0].mix.weight
    model.head.bias.requires_grad_(False)
    graph = surgeon.trace(model, vectors())
    names, want = set(graph.state_dict()), graph(**vectors())
    own_parameters(graph)
    assert set(graph.state_dict()) == names
    theirs = {p.data_ptr() for p in [*model.parameters(), *model.buffers()]}
    assert not any(p.data_ptr() in theirs for p in [*graph.parameters(), *graph.buffers()])
    assert len(list(graph.parameters())) == len(list(model.parameters()))
    assert not graph.get_parameter("head.bias").requires_grad
    assert graph.get_parameter("head.weight").requires_grad
    assert torch.equal(graph(**vectors()), want)


def test_own_parameters_copies_modules_too(traces: Any) -> None:
    graph = traces("stack:shared")
    Moeify(experts=4).apply(graph)
    copied = fork(graph)
    own_parameters(copied)
    theirs = {p.data_ptr() for p in [*graph.parameters(), *graph.buffers()]}
    assert not any(p.data_ptr() in theirs for p in [*copied.parameters(), *copied.buffers()])
    assert sum(isinstance(m, MoE) for m in copied.modules()) == 1
    assert torch.equal(copied(**vectors()), graph(**vectors()))


def test_replace_attribute() -> None:
    graph = small()
    value = nn.Parameter(torch.zeros(8))
    replace_attribute(graph, "a.bias", value)
    assert graph.get_parameter("a.bias") is value
    replace_attribute(graph, "a.bias", None)
    assert "a.bias" not in graph.state_dict()


def test_adopted_changes_make_one_graph_the_other() -> None:
    graph = small()
    work = fork(graph)
    node(work, "relu").target = aten.tanh.default
    tidy(work)
    want = work(X)
    adopt_changes(graph, work)
    assert torch.equal(graph(X), want)
    assert set(graph.state_dict()) == set(work.state_dict())

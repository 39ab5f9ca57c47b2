"""mlpify: replacements cost what the layers did and learn to imitate them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import surgeon
from surgeon.cost import measure
from surgeon.errors import UsageError
from surgeon.fit import Settings
from surgeon.passes import Lower, Mlpify, Moeify
from surgeon.passes.mlpify import ReplacementMLP
from surgeon.search import find_ffns
from tests.models import Function, Many, labelled_vectors, tokens, vectors


@pytest.mark.parametrize(
    ("d_in", "d_out", "factor", "width"),
    [(768, 768, 1.0, 384), (768, 768, 0.5, 192), (16, 16, 1.0, 8), (768, 3072, 1.0, 615), (1, 1, 0.1, 0)],
)
def test_width_of_equal_cost(d_in: int, d_out: int, factor: float, width: int) -> None:
    assert Mlpify(cost_factor=factor).hidden_width(d_in, d_out) == width


@pytest.mark.parametrize("d", [64, 384, 768])
def test_equal_cost_is_equal(d: int) -> None:
    width = Mlpify().hidden_width(d, d)
    module = ReplacementMLP(d, width, d, "relu", torch.zeros(1), bias=True)
    assert sum(p.numel() for p in module.parameters()) == pytest.approx(d * d + d, rel=0.01)


def test_replaces_projections_and_nothing_else(traces: Any) -> None:
    graph = traces("gelu")
    before, _ = measure(graph, (), tokens())
    state = {name: value.clone() for name, value in graph.state_dict().items()}
    report = Mlpify().apply(graph, inputs=tokens())
    assert report.matched == [f"blocks.{b}.attention.{part}" for b in (0, 1) for part in "qkvo"]
    assert ("head", "it computes the model's output (a head)") in report.rejected
    assert {(site.before, site.after) for site in report.sites} == {("linear 16→16", "MLP 16→8→16 relu")}
    after, _ = measure(graph, (), tokens())
    assert after.multiply_adds == before.multiply_adds
    left = {name for name in state if ".attention." not in name}
    made = {
        f"{path}.projection_mlp.{fc}.{kind}"
        for path in report.matched
        for fc in ("fc1", "fc2")
        for kind in ("weight", "bias")
    }
    assert set(graph.state_dict()) == left | made
    assert all(torch.equal(graph.state_dict()[name], state[name]) for name in left)
    assert not report.preserved


@pytest.mark.parametrize("activation", ["relu", "relu2", "gelu", "silu"])
def test_replacement_in_the_graph_is_the_module(activation: str) -> None:
    x = torch.randn(2, 5, 6)
    graph = surgeon.trace(Function(lambda m, x: torch.softmax(m.a(x), -1), a=(6, 6)), x)
    Mlpify(activation=activation).apply(graph)
    torch.manual_seed(0)
    module = ReplacementMLP(6, 3, 6, activation, torch.zeros(1), bias=True)
    module.load_state_dict(
        {name.removeprefix("a.projection_mlp."): value for name, value in graph.state_dict().items()}
    )
    assert torch.allclose(graph(x), torch.softmax(module(x)[0], -1), atol=1e-6)


def test_bias_only_where_there_was_one() -> None:
    x = torch.randn(2, 5, 6)
    graph = surgeon.trace(Function(lambda m, x: torch.softmax(m.a(x), -1), a=(6, 6, False)), x)
    Mlpify().apply(graph)
    assert set(graph.state_dict()) == {
        "a.projection_mlp.fc1.weight",
        "a.projection_mlp.fc1.bias",
        "a.projection_mlp.fc2.weight",
    }


@pytest.mark.parametrize("name", ["gpt2", "stack:shared"])
def test_spellings_and_shared_layers(traces: Any, name: str) -> None:
    graph, inputs = traces(name), traces.inputs(name)
    report = Mlpify().apply(graph, inputs=inputs)
    assert report.matched
    graph(**inputs)
    assert {site.path.rpartition(".")[0] for site in find_ffns(graph)[0]} >= {path for path in report.matched}  # noqa: C416


def test_dropout_is_switched() -> None:
    x = torch.randn(2, 5, 6)
    graph = surgeon.trace(Function(lambda m, x: torch.softmax(m.a(x), -1), a=(6, 6)), x)
    Mlpify(dropout=0.5).apply(graph)
    assert torch.equal(graph.eval()(x), graph(x))
    assert not torch.equal(graph.train()(x), graph(x))


@pytest.mark.parametrize(("option", "words"), [
    ({"activation": "tanh"}, "activation is 'tanh', but must be one of"),
    ({"cost_factor": 0.0}, "cost_factor is 0.0, but must be positive"),
])  # fmt: skip
def test_wrong_options(option: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Mlpify(**option)


def test_too_small_a_layer_is_refused() -> None:
    graph = surgeon.trace(Function(lambda m, x: torch.softmax(m.a(x), -1), a=(6, 6)), torch.randn(2, 5, 6))
    report = Mlpify(cost_factor=0.01).apply(graph)
    assert report.rejected == [("a", "a replacement of equal cost for 6→6 has no neuron")]


def test_the_pipeline_refuses_it_without_data(traces: Any) -> None:
    with pytest.raises(UsageError, match="mlpify needs data"):
        surgeon.Pipeline([Mlpify()]).run(traces("stack:gelu"), inputs=vectors())
    dry = surgeon.Pipeline([Mlpify()]).run(traces("stack:gelu"), inputs=vectors(), dry_run=True)
    assert dry.reports[0].matched
    assert dry.reports[0].fit is None


def test_imitation_learns(traces: Any) -> None:
    graph = traces("stack:gelu")
    state = {name: value.clone() for name, value in graph.state_dict().items()}
    want = graph(**vectors())
    untrained = surgeon.graph.fork(graph)
    rough = Mlpify().apply(untrained, inputs=vectors())
    report = Mlpify(epochs=40, lr=1e-2).apply(graph, inputs=vectors(), data=labelled_vectors(4))
    assert report.fit is not None
    first, last = report.fit.losses[0][1], report.fit.losses[-1][1]
    assert last["imitation loss"] < 0.5 * first["imitation loss"]
    assert last["unexplained variance"] < 1.0 < first["unexplained variance"]
    assert report.max_error is not None
    assert rough.max_error is not None
    assert report.max_error < rough.max_error
    assert not torch.equal(graph(**vectors()), want)
    assert all(torch.equal(graph.state_dict()[name], state[name]) for name in state if ".mix." not in name)


def test_penalty_makes_the_replacements_sparse(traces: Any) -> None:
    shares = []
    for alpha in (0.0, 1.0):
        report = Mlpify(epochs=20, lr=1e-2, alpha=alpha).apply(traces("stack:gelu"), data=labelled_vectors(4))
        assert report.fit is not None
        shares.append(report.fit.losses[-1][1]["square Hoyer"])
    assert shares[1] < 0.7 * shares[0]


def test_imitates_what_the_layer_gave_and_not_what_became_of_it() -> None:
    """The layer's output is changed in place afterwards."""

    def compute(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        y += 100.0
        return torch.softmax(y * m.scale.weight.sum(), -1)

    x = torch.randn(4, 5, 6)
    graph = surgeon.trace(Function(compute, a=(6, 6), scale=nn.Linear(1, 1)), x)
    report = Mlpify(steps=1, lr=1e-9).apply(graph, data=[x], settings=Settings(seed=0))
    assert report.fit is not None
    assert report.fit.losses[0][1]["imitation loss"] < 10.0


def test_raw_parameters_at_the_top_and_below() -> None:
    x = torch.randn(2, 5, 6)

    def raw() -> Function:
        return Function(lambda m, x: torch.softmax(F.linear(x, m.w), -1), w=nn.Parameter(torch.randn(6, 6)))

    for model in (Many(inner=raw()), raw()):
        report = Mlpify().apply(surgeon.trace(model, x), inputs=x)
        assert len(report.matched) == 1


def test_replacements_become_experts(traces: Any) -> None:
    graph, inputs = traces("stack:relu"), vectors()
    Mlpify(steps=1).apply(graph, inputs=inputs, data=labelled_vectors(1))
    sites = {site.path for site in find_ffns(graph)[0]}
    assert len(sites) == 2 + 2
    moe = Moeify(experts=4).apply(graph, inputs=inputs)
    assert len(moe.matched) == 4
    low = Lower().apply(graph, inputs=inputs)
    assert len(low.matched) == 4

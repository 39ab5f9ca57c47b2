"""mlpify: which layers are replaced, and by what: MLPs that cost what the layers did."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import surgeon
from surgeon.errors import UsageError
from surgeon.graph.traced import aten
from surgeon.measure.meter import measure
from surgeon.passes import Lower, Mlpify, Moeify
from surgeon.passes.mlpify import Kind, ReplacementMLP
from surgeon.sites.search import find_ffns
from tests.passes.reports import reasons
from tests.small_models import Function, Many, tokens, vectors

from .projections import one_layer


@pytest.mark.parametrize(
    ("d_in", "d_out", "factor", "width"),
    [
        (768, 768, 1.0, 384), (768, 768, 0.5, 192), (16, 16, 1.0, 8), (768, 3072, 1.0, 616), (64, 64, 4.0, 128),
        (1, 1, 0.1, 0),
    ],
)  # fmt: skip
def test_width_of_equal_cost(d_in: int, d_out: int, factor: float, width: int) -> None:
    assert Mlpify(cost_factor=factor).hidden_width(d_in, d_out) == width


@pytest.mark.parametrize("d", [64, 384, 768])
def test_equal_cost_is_equal(d: int) -> None:
    width = Mlpify().hidden_width(d, d)
    module = ReplacementMLP("w", range(d), d, width, "relu", torch.zeros(1), bias=True)
    assert sum(p.numel() for p in module.parameters()) == pytest.approx(d * d + d, rel=0.01)


def test_replaces_projections_and_nothing_else(traces: Any) -> None:
    graph = traces("gelu")
    before, _ = measure(graph, (), tokens())
    state = {name: value.clone() for name, value in graph.state_dict().items()}
    report = Mlpify().apply(graph, inputs=tokens())
    assert report.matched == [f"blocks.{b}.attention.{part}" for b in (0, 1) for part in "qkvo"]
    assert ("head", "it computes the model's output (a head)") in reasons(report)
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


@pytest.mark.parametrize("kind", ["plain", "residual"])
@pytest.mark.parametrize("activation", ["relu", "relu2", "gelu", "silu"])
def test_replacement_in_the_graph_is_the_module(activation: str, kind: Kind) -> None:
    graph, x = one_layer()
    Mlpify(activation=activation, kind=kind).apply(graph)
    like = torch.zeros(1)
    module = ReplacementMLP("w", range(6), 6, 3, activation, like, bias=True, residual=kind == "residual")
    module.load_state_dict(
        {name.removeprefix("a.projection_mlp."): value for name, value in graph.state_dict().items()}
    )
    assert torch.allclose(graph(x), torch.softmax(module(x)[0], -1), atol=1e-6)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("d_in", "d_out", "width"), [(6, 15, 5), (15, 6, 4)])
def test_outputs_of_another_width(d_in: int, d_out: int, width: int, bias: bool) -> None:
    graph, x = one_layer(d_in, d_out, bias)
    want = graph(x)
    report = Mlpify(steps=1).apply(graph, inputs=x, data=[x])
    assert graph(x).shape == want.shape
    (site,) = report.sites
    assert site.after == f"MLP {d_in}→{width}→{d_out} relu"
    assert site.parameters == (d_in * d_out + bias * d_out, width * (d_in + 1 + d_out) + bias * d_out)
    assert site.multiply_adds == (d_in * d_out, width * (d_in + d_out))
    assert [(ffn.d_in, ffn.hidden, ffn.d_out) for ffn in find_ffns(graph)[0]] == [(d_in, width, d_out)]


def test_bias_only_where_there_was_one() -> None:
    graph, _ = one_layer(bias=False)
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
    graph, x = one_layer()
    Mlpify(dropout=0.5).apply(graph)
    assert torch.equal(graph.eval()(x), graph(x))
    assert not torch.equal(graph.train()(x), graph(x))


@pytest.mark.parametrize("mode", [True, False])
def test_dropout_stands_after_the_activation_and_after_the_mlp(mode: bool) -> None:
    graph, x = one_layer()
    Mlpify(dropout=0.25, kind="residual").apply(graph.train(mode))
    dropouts = [node for node in graph.graph.nodes if node.target is aten.dropout.default]
    assert [node.args[0].target for node in dropouts] == [aten.relu.default, aten.linear.default]
    assert all(node.args[1:] == (0.25, mode) for node in dropouts)
    (added,) = dropouts[1].users
    assert (added.target, added.args[0].op, added.args[1]) == (aten.add.Tensor, "placeholder", dropouts[1])
    (ffn,) = find_ffns(graph)[0]
    assert ffn.dropout == 0.25
    assert ffn.calls[0].output is dropouts[1].args[0]
    moe = Moeify(experts=3).apply(graph.eval(), inputs=x)
    low = Lower().apply(graph, inputs=x)
    assert len(moe.matched) == len(low.matched) == 1
    assert not torch.equal(graph.train()(x), graph(x))


def test_a_graph_without_a_training_mode_gets_no_dropout() -> None:
    graph, _ = one_layer()
    graph.meta["trace"] = dataclasses.replace(graph.meta["trace"], form="eval")
    report = Mlpify(dropout=0.5).apply(graph)
    assert any(note.startswith("No dropout was added") for note in report.notes)
    assert not [node for node in graph.graph.nodes if node.target is aten.dropout.default]


@pytest.mark.parametrize(("option", "words"), [
    ({"activation": "tanh"}, "activation is 'tanh', but must be one of"),
    ({"cost_factor": 0.0}, "cost_factor is 0.0, but must be above 0"),
    ({"dropout": 1.0}, "dropout is 1.0, but must be at least 0 and below 1"),
    ({"dropout": -0.1}, "dropout is -0.1, but must be"),
    ({"alpha": -1.0}, "alpha is -1.0, but must be at least 0"),
    ({"kind": "other"}, "kind is 'other', but must be one of plain, residual"),
    ({"init": "zeros"}, "init is 'zeros', but must be one of svd, random"),
    ({"error": "mae"}, "error is 'mae', but must be one of relative, mse"),
    ({"penalty": "l2"}, "penalty is 'l2', but must be one of hoyer, l1"),
    ({"alpha_schedule": "steep"}, "alpha_schedule is 'steep', but must be one of constant, linear, linear_warmup"),
    ({"steps": 0}, "steps is 0, but must be at least 1"),
])  # fmt: skip
def test_wrong_options(option: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Mlpify(**option)


def test_too_small_a_layer_is_refused() -> None:
    graph, _ = one_layer()
    report = Mlpify(cost_factor=0.01).apply(graph)
    assert reasons(report) == [("a", "a replacement of equal cost for 6→6 would have no neurons")]


@pytest.mark.parametrize("init", ["svd", "random"])
def test_a_layer_with_one_output_is_refused_and_those_beside_it_are_not(init: Any) -> None:
    """A single neuron costs as much as 64→1 does, and passes on nothing of one sign."""
    torch.manual_seed(0)
    model = Function(lambda m, x: m.score(m.mix(x)).tanh() + x, mix=(64, 64), score=(64, 1)).eval()
    x = torch.randn(2, 5, 64)
    graph = surgeon.trace(model, x)
    report = Mlpify(init=init, steps=1).apply(graph, inputs=x, data=[x])
    assert report.matched == ["mix"]
    assert reasons(report) == [("score", "a replacement of equal cost for 64→1 would have only one neuron")]
    again = Mlpify(init=init, steps=1, cost_factor=2.0, only=("score",)).apply(graph, inputs=x, data=[x])
    assert [site.after for site in again.sites] == ["MLP 64→2→1 relu"]


def test_a_residual_needs_equal_widths() -> None:
    graph, _ = one_layer(6, 8)
    report = Mlpify(kind="residual").apply(graph)
    assert reasons(report) == [("a", "a residual needs an output as wide as the input, but this is 6→8")]
    graph, x = one_layer()
    report = Mlpify(kind="residual", steps=1).apply(graph, inputs=x, data=[x])
    assert report.sites[0].after == "MLP 6→3→6 relu + input"


def test_the_pipeline_refuses_it_without_data(traces: Any) -> None:
    with pytest.raises(UsageError, match="mlpify needs data"):
        surgeon.Pipeline([Mlpify()]).run(traces("stack:gelu"), inputs=vectors())
    dry = surgeon.Pipeline([Mlpify()]).run(traces("stack:gelu"), inputs=vectors(), dry_run=True)
    assert dry.reports[0].matched
    assert dry.reports[0].fit is None


def test_raw_parameters_at_the_top_and_below() -> None:
    x = torch.randn(2, 5, 6)

    def raw() -> Function:
        return Function(lambda m, x: torch.softmax(F.linear(x, m.w), -1), w=nn.Parameter(torch.randn(6, 6)))

    for model in (Many(inner=raw()), raw()):
        report = Mlpify().apply(surgeon.trace(model, x), inputs=x)
        assert len(report.matched) == 1

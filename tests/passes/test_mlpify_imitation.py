"""mlpify: what replacements start from, and that they learn to imitate the layers."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import surgeon
from surgeon.passes import Mlpify, Sparsify
from surgeon.passes.mlpify import Error, Kind, Start
from surgeon.training.loop import RunSettings
from surgeon.training.penalty import AlphaSchedule, Penalty
from tests.small_models import Function, labelled_vectors, vectors

from .projections import one_layer


@pytest.mark.parametrize("init", ["svd", "random"])
def test_imitation_learns(traces: Any, init: Start) -> None:
    graph = traces("stack:gelu")
    state = {name: value.clone() for name, value in graph.state_dict().items()}
    want = graph(**vectors())
    untrained = surgeon.graph.traced.fork(graph)
    rough = Mlpify().apply(untrained, inputs=vectors())
    report = Mlpify(epochs=40, lr=1e-2, init=init).apply(graph, inputs=vectors(), data=labelled_vectors(4))
    assert report.fit is not None
    first, last = report.fit.losses[0][1], report.fit.losses[-1][1]
    assert last["unexplained variance"] < 0.9 * first["unexplained variance"]
    assert last["unexplained variance"] < 0.5
    assert 0 < last["active"] <= 1
    assert report.max_error is not None
    assert rough.max_error is not None
    assert report.max_error < rough.max_error
    assert not torch.equal(graph(**vectors()), want)
    assert all(torch.equal(graph.state_dict()[name], state[name]) for name in state if ".mix." not in name)


def first_error(graph: surgeon.TracedGraph, x: Any, **options: Any) -> float:
    """The unexplained variance that the replacements start with."""
    report = Mlpify(steps=1, alpha=0.0, **options).apply(graph, data=[x])
    assert report.fit is not None
    return report.fit.losses[0][1]["unexplained variance"]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["plain", "residual"])
@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
def test_svd_start_is_exact_where_the_width_suffices(activation: str, kind: Kind, bias: bool) -> None:
    x = 3.0 + torch.randn(20, 5, 6)
    graph, _ = one_layer(bias=bias)
    want = graph(x)
    report = Mlpify(
        steps=1, lr=1e-9, alpha=0.0, activation=activation, kind=kind, cost_factor=4.0
    ).apply(graph, data=[x])  # fmt: skip
    assert report.fit is not None
    assert report.fit.losses[0][1]["unexplained variance"] < 1e-8
    assert torch.allclose(graph(x), want, atol=1e-5)


@pytest.mark.parametrize("activation", ["relu", "relu2", "gelu", "silu"])
def test_svd_start_is_nearer_than_a_random_one(activation: str) -> None:
    x = torch.randn(20, 5, 6)
    svd, random = (first_error(one_layer()[0], x, activation=activation, init=init) for init in ("svd", "random"))
    assert svd < 0.7 < 0.9 < random


def test_svd_start_follows_the_data() -> None:
    """The inputs vary in one direction only, which one pair of neurons is enough for."""
    x = 2.0 + torch.randn(50, 5, 1) * torch.randn(6)
    assert first_error(one_layer()[0], x) < 1e-4 < first_error(one_layer()[0], torch.randn(50, 5, 6))


@pytest.mark.parametrize("x", [torch.ones(1, 1, 6), torch.zeros(2, 5, 6)], ids=["one token", "nothing but zeros"])
def test_data_that_does_not_vary(x: Tensor) -> None:
    graph, _ = one_layer()
    want = graph(x)
    Mlpify(steps=1, lr=1e-9).apply(graph, data=[x])
    assert torch.allclose(graph(x), want, atol=1e-4)


def test_a_layer_that_gives_nothing_is_imitated() -> None:
    graph, x = one_layer()
    for parameter in graph.parameters():
        parameter.data.zero_()
    assert first_error(graph, x) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("init", ["svd", "random"])
def test_the_error_is_relative_to_what_the_layer_gives(init: Start) -> None:
    """Otherwise layers with small outputs would not be learned beside others."""
    graph, x = one_layer()
    small, _ = one_layer()
    for parameter in small.parameters():
        parameter.data.mul_(1e-3)
    large, little = (first_error(one, x, init=init) for one in (graph, small))
    if init == "svd":
        assert little == pytest.approx(large, rel=1e-3)
    else:
        assert little > 1e4 * large  # the same random values beside targets a thousandth as large


def test_penalty_makes_the_replacements_sparse(traces: Any) -> None:
    shares = []
    for alpha in (0.0, 1.0):
        report = Mlpify(epochs=20, lr=1e-2, alpha=alpha).apply(traces("stack:gelu"), data=labelled_vectors(4))
        assert report.fit is not None
        shares.append(report.fit.losses[-1][1]["square Hoyer"])
    assert shares[1] < 0.7 * shares[0]


@pytest.mark.parametrize(("penalty", "shown"), [("hoyer", "square Hoyer"), ("l1", "L1")])
@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
def test_what_is_penalised_is_what_sparsify_would_penalise(activation: str, penalty: Penalty, shown: str) -> None:
    graph, x = one_layer()
    report = Mlpify(steps=1, lr=1e-9, activation=activation, penalty=penalty, displacement=-2.0).apply(graph, data=[x])
    assert report.fit is not None
    tapped = Sparsify(steps=1, lr=1e-9, penalty=penalty, displacement=-2.0, distill=1.0)
    surgery = surgeon.Pipeline([tapped]).run(graph, inputs=x, data=[x])
    fit = surgery.reports[0].fit
    assert fit is not None
    assert report.fit.losses[0][1][shown] == pytest.approx(fit.losses[0][1][shown], rel=1e-5)
    with torch.no_grad():
        z = F.linear(x, *(graph.get_parameter(f"a.projection_mlp.fc1.{name}") for name in ("weight", "bias")))
    a = z.relu() if activation == "relu" else z.clamp_min(-2.0) + 2.0
    sizes = a.sum(-1) if penalty == "l1" else a.sum(-1).square() / a.square().sum(-1).clamp_min(1e-15)
    assert report.fit.losses[0][1][shown] == pytest.approx(float(sizes.mean()), rel=1e-5)


@pytest.mark.parametrize(("schedule", "penalised"), [("constant", True), ("linear", False), ("linear_warmup", False)])
def test_the_penalty_starts_where_its_schedule_says(schedule: AlphaSchedule, penalised: bool) -> None:
    found = []
    for alpha in (0.0, 1.0):
        graph, x = one_layer()
        Mlpify(steps=1, lr=1e-2, alpha=alpha, alpha_schedule=schedule).apply(graph, data=[x])
        found.append(graph.get_parameter("a.projection_mlp.fc1.weight"))
    assert torch.equal(*found) != penalised


def test_the_published_error_is_not_relative() -> None:
    graph, x = one_layer()
    with torch.no_grad():
        variance = float(F.linear(x, graph.get_parameter("a.weight"), graph.get_parameter("a.bias")).var(correction=0))
    found = {}
    for error in get_args(Error):
        report = Mlpify(steps=1, init="random", error=error).apply(surgeon.graph.traced.fork(graph), data=[x])
        assert report.fit is not None
        found[error] = report.fit.losses[0][1]
    assert "unexplained variance" not in found["mse"]
    want = found["relative"]["unexplained variance"] * variance
    assert found["mse"]["mean squared error"] == pytest.approx(want, rel=1e-5)


def test_imitates_what_the_layer_gave_and_not_what_became_of_it() -> None:
    """The layer's output is changed in place afterwards."""

    def compute(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        y += 100.0
        return torch.softmax(y * m.scale.weight.sum(), -1)

    x = torch.randn(4, 5, 6)
    graph = surgeon.trace(Function(compute, a=(6, 6), scale=nn.Linear(1, 1)), x)
    report = Mlpify(steps=1, lr=1e-9, init="random").apply(graph, data=[x], settings=RunSettings(seed=0))
    assert report.fit is not None
    assert report.fit.losses[0][1]["unexplained variance"] < 10.0

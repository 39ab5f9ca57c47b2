"""Sweeps: cost as the published formula gives it, oracle selection as done by hand, and every setting in its place."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import surgeon
from surgeon.data.batch import Batch
from surgeon.data.losses import evaluate
from surgeon.dynamic.knobs import get_rule, get_tau, set_rule, set_tau
from surgeon.errors import UsageError
from surgeon.graph.ownership import own_parameters
from surgeon.graph.traced import TracedGraph, fork
from surgeon.kernels.selection import RULES
from surgeon.measure.meter import ExpertMeter, measure
from surgeon.measure.sweep import executed_share, layers_share, sweep
from surgeon.moe.module import MoE
from surgeon.moe.site import find_moes
from surgeon.passes import Lower, Mlpify, Moeify, Sparsify
from surgeon.passes.report import PassReport, dense_layers
from surgeon.progress import Progress
from surgeon.surgery.pipeline import Pipeline
from tests.small_models import (
    WIDTH,
    Function,
    Plain,
    Wrapped,
    classifier,
    labelled,
    labelled_vectors,
    stack,
    tokens,
    vectors,
)

TASK = "classification"
DATA = [Batch.from_any(item) for item in labelled_vectors(3)]
X = torch.randn(3, 7, WIDTH, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def base() -> TracedGraph:
    graph = Pipeline([Moeify(experts=8, router_width=8, steps=30, lr=1e-2)]).run(
        stack("relu"), inputs=vectors(), data=labelled_vectors(3)
    ).graph  # fmt: skip
    return graph.eval()


@pytest.fixture
def graph(base: TracedGraph) -> TracedGraph:
    copied = fork(base)
    own_parameters(copied)
    return copied


# --- cost -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("e", "n", "d_h"), [(4, 8, 8), (4, 32, 16), (2, 4, 12)])
@pytest.mark.parametrize("lowered", [False, True])
def test_cost_of_a_layer_is_that_of_the_published_formula(e: int, n: int, d_h: int, lowered: bool) -> None:
    """D2DMoE, appendix B: k/n + d_h / (2 e d_m) + n d_h / (2 e d_m²)."""
    torch.manual_seed(0)
    dense = surgeon.trace(Wrapped(Plain(WIDTH, e * WIDTH, act=F.relu, bias=False)).eval(), X)
    before, _ = measure(dense, (X,), {})
    Moeify(experts=n, router_width=d_h, rule="top_k").apply(dense, inputs=X)
    if lowered:
        Lower().apply(dense, inputs=X)
    for k in sorted({1, n // 2, n}):
        set_tau(dense, (n - k) / n)
        cost, layers = measure(dense, (X,), {})
        ratio = k / n + d_h / (2 * e * WIDTH) + n * d_h / (2 * e * WIDTH**2)
        assert cost.executed_multiply_adds / before.multiply_adds == pytest.approx(ratio, abs=1e-12)
        assert layers_share(layers) == pytest.approx(ratio, abs=1e-12)
        assert executed_share(layers) == pytest.approx(k / n)


@pytest.mark.parametrize("factor", [1.0, 4.0])
def test_converted_layers_count_against_what_they_replaced(factor: float, tmp_path: Path) -> None:
    """Projections, fused ones too, become MLPs of another cost before they are split: the dense layers are theirs."""
    torch.manual_seed(0)

    def compute(m: Any, x: Tensor) -> Any:
        q, k, v = m.qkv(x).chunk(3, -1)
        return m.ffn(m.out(q.tanh() * k + v))

    model = Function(compute, qkv=(16, 48), out=(16, 16), ffn=Plain())
    dense = surgeon.trace(model.eval(), X)
    whole, _ = measure(dense, (X,), {})
    graph, reports = fork(dense), []
    passes = [
        Mlpify(cost_factor=factor), Sparsify(), Moeify(experts=2, router_width=4, rule="top_k", share_trunk=False),
        Lower(),
    ]  # fmt: skip
    for one in passes:
        reports.append(PassReport.from_dict(json.loads(json.dumps(one.apply(graph, inputs=X).to_dict()))))
    set_tau(graph, 0.5)
    cost, layers = measure(graph, (X,), {})
    costs = dense_layers(reports)
    assert len(layers) == 5
    assert sum(costs[path] for path in layers) * 3 * 7 == pytest.approx(whole.multiply_adds)
    # Everything in the model is converted, so that the layers' share is the model's.
    assert layers_share(layers, costs) == pytest.approx(cost.executed_multiply_adds / whole.multiply_adds)
    if factor != 1.0:
        assert layers_share(layers, costs) > 1.5 * layers_share(layers)


# --- oracle -----------------------------------------------------------------------------------------------------------


def by_true_norms(moe: MoE, x: Tensor, tau: float) -> tuple[Tensor, float]:
    """Output and executed share of an expert layer that runs what is above tau times the largest true norm."""
    assert moe.w1 is not None
    assert moe.w2 is not None
    assert moe.b1 is not None
    with torch.no_grad():
        each = [F.relu(F.linear(x, w1, b1)) @ w2 for w1, b1, w2 in zip(moe.w1, moe.b1, moe.w2, strict=True)]
        norms = torch.stack([out.norm(dim=-1) for out in each], -1)
        routed = norms[..., moe.shared :]
        ran = norms >= tau * routed.amax(-1, keepdim=True)
        ran[..., : moe.shared] = True
        y = sum(out * one.unsqueeze(-1) for out, one in zip(each, ran.unbind(-1), strict=True))
        return y + moe.b2, float(ran.float().mean())  # type: ignore[operator]


@pytest.mark.parametrize("lowered", [False, True])
@pytest.mark.parametrize("shared", [0, 2])
def test_the_oracle_selects_by_the_true_norms(lowered: bool, shared: int) -> None:
    torch.manual_seed(0)
    model = Wrapped(Plain(act=F.relu)).eval()
    graph = surgeon.trace(model, X)
    Moeify(experts=8, shared=shared, steps=1).apply(graph, inputs=X, data=[X])
    moe = graph.get_submodule("ffn.moe")
    assert isinstance(moe, MoE)
    want, share = by_true_norms(moe, F.layer_norm(X, (WIDTH,)), 0.6)
    if lowered:
        Lower().apply(graph, inputs=X)
    set_tau(graph, 0.6)
    meter = ExpertMeter(graph, oracle=True)
    with torch.no_grad():
        got = meter.call((X,), {})
        own = ExpertMeter(graph).call((X,), {})
    assert torch.allclose(got, want, atol=1e-5)
    assert not torch.allclose(own, want, atol=1e-3)
    assert meter.layers["ffn.moe"].share == pytest.approx(share)
    assert 0.2 < share < 0.9


def test_the_oracle_uses_the_rule_that_is_set(graph: TracedGraph) -> None:
    set_rule(graph, "top_k")
    set_tau(graph, 0.75)
    meter = ExpertMeter(graph, oracle=True)
    meter.call((), vectors())
    assert {layer.share for layer in meter.layers.values()} == {0.25}


# --- settings ---------------------------------------------------------------------------------------------------------


def test_every_setting_is_measured(graph: TracedGraph) -> None:
    moments: list[Progress] = []
    points = sweep(
        graph, DATA, TASK, [0.0, 0.5], inputs=vectors(), rules=["max", "top_k"], routers=("own", "oracle"),
        progress=moments.append, dense_multiply_adds=10**6,
    )  # fmt: skip
    assert [(point.router, point.rule, point.tau) for point in points] == [
        (router, rule, tau) for router in ("own", "oracle") for rule in ("max", "top_k") for tau in (0.0, 0.5)
    ]
    assert [point.executed for point in points if point.tau == 0.0] == [1.0] * 4
    assert [point.executed for point in points if point.rule == "top_k" and point.tau] == [0.5] * 2
    assert len({point.executed for point in points if point.rule == "max" and point.tau}) == 2
    for point in points:
        assert point.relative == point.multiply_adds / 10**6
        assert point.layers == pytest.approx(point.executed + 8 * (WIDTH + 8) / (2 * WIDTH * 32))
        assert point.milliseconds is None
    assert (moments[-1].done, moments[-1].total) == (8 * 3, 8 * 3)


TOP_K = [0.0, 0.25, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95]
OTHERS = [0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5]


@pytest.mark.parametrize(("own", "rules", "want"), [
    ("max", None, {"max": OTHERS}), ("top_k", None, {"top_k": TOP_K}),
    ({"blocks.0.*": "top_k"}, None, {"top_k max": OTHERS}),
    ("max", ["top_k", "energy"], {"top_k": TOP_K, "energy": OTHERS}), ("top_k", ["max"], {"max": OTHERS}),
])  # fmt: skip
def test_what_is_swept_by_default_suits_the_rule(graph: TracedGraph, own: Any, rules: Any, want: Any) -> None:
    set_rule(graph, own)
    points = sweep(graph, DATA[:1], TASK, inputs=vectors(), rules=rules)
    assert [(point.rule, point.tau) for point in points] == [(rule, tau) for rule, taus in want.items() for tau in taus]
    (*others, last) = sweep(graph, DATA[:1], TASK, inputs=vectors(), rules=rules and rules[:1], stored=True)
    assert len(others) == 8
    assert last.tau is None


def test_what_is_stored_is_measured_once_and_as_it_is(graph: TracedGraph) -> None:
    set_rule(graph, {"blocks.0.*": "energy"})
    set_tau(graph, {"blocks.0.*": 0.25, "blocks.1.*": 0.5})
    points = sweep(graph, DATA, TASK, [0.5, None], inputs=vectors(), rules=["max", "top_k"])
    assert [(point.rule, point.tau) for point in points] == [("max", 0.5), ("energy max", None), ("top_k", 0.5)]
    (alone,) = sweep(graph, DATA, TASK, [None], inputs=vectors())
    assert points[1] == alone
    assert alone.shares == {path: share for path, share in alone.shares.items() if 0 < share < 1}
    assert list(alone.shares) == list(get_tau(graph))


def test_each_layer_skips_alone(graph: TracedGraph) -> None:
    set_tau(graph, 0.3)
    paths = list(get_tau(graph))
    points = sweep(graph, DATA, TASK, (0.0, 0.5, 0.9), inputs=vectors(), each_layer=True)
    assert [(point.layer, point.tau) for point in points] == [
        (None, 0.0), *((path, tau) for path in paths for tau in (0.5, 0.9)),
    ]  # fmt: skip
    for point in points[1:]:
        assert point.shares[str(point.layer)] < 1.0
        assert all(share == 1.0 for path, share in point.shares.items() if path != point.layer)
    set_tau(graph, {paths[0]: 0.9, "*": 0.0})
    (want,) = sweep(graph, DATA, TASK, (None,), inputs=vectors())
    assert points[2].quality == want.quality
    assert points[2].multiply_adds == want.multiply_adds


def test_points_are_what_measuring_at_that_setting_gives(graph: TracedGraph) -> None:
    (point,) = sweep(graph, DATA, TASK, [0.4], inputs=vectors(), rules=["energy"])
    set_rule(graph, "energy")
    set_tau(graph, 0.4)
    assert point.quality == evaluate(graph, DATA, TASK)
    meter = ExpertMeter(graph)
    for batch in DATA:
        meter.call(batch.args, batch.kwargs)
    ran, pairs = (sum(getattr(layer, name) for layer in meter.layers.values()) for name in ("ran", "pairs"))
    assert point.executed == pytest.approx(ran / pairs)


def test_padding_is_not_counted() -> None:
    graph = surgeon.trace(classifier("relu", layers=1, dropout=0.0), tokens())
    Moeify(experts=8, rule="top_k").apply(graph, inputs=tokens())
    padded, short = tokens(2, 9), tokens(2, 9)
    padded["attention_mask"][:, 4:] = 0
    short = {name: value[:, :4] for name, value in padded.items()}
    labels = torch.tensor([0, 1])
    points = [
        sweep(graph, [Batch((), inputs, labels)], TASK, [0.5], inputs=tokens(), rules=["max"])[0]
        for inputs in (padded, short)
    ]
    assert points[0].executed == pytest.approx(points[1].executed)
    assert points[0].multiply_adds == points[1].multiply_adds


@pytest.mark.parametrize("broken", [False, True])
def test_knobs_and_mode_are_as_before(graph: TracedGraph, broken: bool) -> None:
    set_rule(graph, {"blocks.0.*": "energy", "blocks.1.*": "cumulative"})
    set_tau(graph, {"blocks.0.*": 0.25, "blocks.1.*": 0.5})
    graph.train()
    if broken:
        with pytest.raises(UsageError, match="No selection rule 'best'"):
            sweep(graph, DATA, TASK, [0.3], inputs=vectors(), rules=["max", "best"])
    else:
        sweep(graph, DATA, TASK, [0.3], inputs=vectors(), rules=list(RULES), routers=("own", "oracle"), timed=True)
    assert list(get_rule(graph).values()) == ["energy", "cumulative"]
    assert list(get_tau(graph).values()) == [0.25, 0.5]
    assert graph.training


def test_values_of_its_own_are_measured_as_they_are(graph: TracedGraph) -> None:
    set_rule(graph, {"blocks.0.*": "top_k"})
    set_tau(graph, {"blocks.0.*": 0.5, "blocks.1.*": 0.0})
    stored, none = sweep(graph, DATA, TASK, [None, 0.0], inputs=vectors())
    assert stored.tau is None
    assert stored.rule == "top_k max"
    assert (stored.executed, none.executed) == (0.75, 1.0)


def test_calls_are_timed_but_not_the_oracle(graph: TracedGraph) -> None:
    points = sweep(graph, DATA, TASK, [0.0, 0.5], inputs=vectors(), routers=("own", "oracle"), timed=True)
    own = [point.milliseconds for point in points if point.router == "own"]
    assert all(ms is not None and ms > 0 and math.isfinite(ms) for ms in own)
    assert [point.milliseconds for point in points if point.router == "oracle"] == [None, None]


def test_true_norms_are_better_than_bad_routers() -> None:
    """On a trained model the oracle keeps the output nearer at the same number of experts."""
    data: Any = labelled(4)
    random = Moeify(experts=16, router="trained", steps=1, lr=1e-9, rule="top_k")
    passes = [Sparsify(alpha=0.01, epochs=30, lr=5e-3), random]
    graph = Pipeline(passes).run(classifier("relu", layers=1, dropout=0.0), inputs=tokens(), data=data).graph.eval()
    moved = {}
    with torch.no_grad():
        want = graph(**data[0][0])
        set_tau(graph, 0.75)
        for oracle in (False, True):
            meter = ExpertMeter(graph, oracle=oracle)
            moved[oracle] = float((meter.call((), data[0][0]) - want).norm())
            assert 0.25 <= meter.layers["blocks.0.ffn.moe"].share < 0.3  # ties run
    assert moved[True] < 0.3 * moved[False]


def test_sweeps_need_experts_and_shares(traces: Any, graph: TracedGraph) -> None:
    with pytest.raises(UsageError, match="The model has no layers that skip, so tau changes nothing"):
        sweep(traces("stack:relu"), DATA, TASK, inputs=vectors())
    with pytest.raises(UsageError, match=r"tau is 1\.5"):
        sweep(graph, DATA, TASK, [1.5], inputs=vectors())


def test_sites_stay_where_they_are(graph: TracedGraph) -> None:
    before = {name: value.clone() for name, value in graph.state_dict().items()}
    code = graph.code
    sweep(graph, DATA, TASK, [0.3], inputs=vectors(), routers=("own", "oracle"))
    assert graph.code == code
    assert {site.form for site in find_moes(graph)} == {"module"}
    assert all(torch.equal(value, before[name]) for name, value in graph.state_dict().items())

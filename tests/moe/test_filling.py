"""Experts of any width: filling neurons change no output, get no gradient, and count nowhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import surgeon
from surgeon.dynamic.knobs import set_rule, set_tau
from surgeon.measure.meter import measure
from surgeon.moe.filling import neurons_of_experts
from surgeon.moe.module import MoE
from surgeon.moe.site import find_moes
from surgeon.passes import Lower, Moeify
from surgeon.sites.search import find_ffns
from tests.small_models import WIDTH, Function, Gated, Plain, Wrapped

X = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(0))
ROWS = 10


@pytest.mark.parametrize(
    ("shape", "neurons"),
    [
        ((3, 4, 0), [4, 4, 4]),
        ((3, 4, 3), [4, 4, 1]),
        ((5, 2, 3), [2, 2, 1, 1, 1]),
        ((5, 2, 2), [2, 2, 2, 1, 1]),
        ((1, 4, 1), [3]),
    ],
)
def test_neurons_of_experts(shape: tuple[int, int, int], neurons: list[int]) -> None:
    assert neurons_of_experts(*shape) == neurons


@pytest.mark.parametrize(
    "options", [{"expert_size": 8}, {"experts": 5}, {"experts": 24}, {"experts": 4, "shared": 1}, {}]
)
@pytest.mark.parametrize("make", [Plain, Gated])
def test_any_width_is_exact_and_only_real_neurons_cost(make: Any, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = Wrapped(make(hidden=37)).eval()
    graph = surgeon.trace(model, X)
    dense, _ = measure(graph, (X,), {})
    data = [{"x": X}] if "shared" in options else None
    Moeify(**options, epochs=0).apply(graph, inputs=X, data=data)
    (site,) = find_moes(graph)
    assert site.filling == site.experts * site.size - 37
    routers = ROWS * site.router_parameters
    for _ in range(2):
        cost, layers = measure(graph, (X,), {})
        assert cost.multiply_adds == cost.executed_multiply_adds == dense.multiply_adds + routers
        assert layers[site.path].multiply_adds == dense.multiply_adds
        assert torch.allclose(graph(X), model(X), atol=1e-5)
        Lower().apply(graph)
    assert site.multiply_adds == sum(site.costs) + site.router_parameters


def test_what_ran_counts_real_neurons_only() -> None:
    """Four experts of three neurons for ten: the fourth, which has one, is the only one that runs."""
    graph = surgeon.trace(Wrapped(Plain(hidden=10, act=F.relu)).eval(), X)
    Moeify(experts=4, router="trained", epochs=1, router_depth=1, objective="norm").apply(graph)
    moe = graph.get_submodule("ffn.moe")
    assert isinstance(moe, MoE)
    with torch.no_grad():
        moe.router.fc2.weight.zero_()
        moe.router.fc2.weight[3, 0] = 1.0
    set_rule(graph, "top_k")
    set_tau(graph, 0.75)
    load = surgeon.token_load(graph, X)
    for _ in range(2):
        cost, layers = measure(graph, (X,), {})
        assert layers["ffn.moe"].ran == ROWS
        assert layers["ffn.moe"].share == cost.executed == 0.1
        assert cost.executed_multiply_adds == ROWS * (2 * WIDTH + 4 * WIDTH)
        assert torch.allclose(load, torch.full_like(load, 0.1))
        Lower().apply(graph)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("act", ["relu", "gelu", "sigmoid", "softplus", "gated"])
def test_filling_never_fires_and_gets_no_gradient(act: str, bias: bool) -> None:
    torch.manual_seed(0)
    make = Gated(hidden=18, bias=bias) if act == "gated" else Plain(hidden=18, act=getattr(F, act), bias=bias)
    graph = surgeon.trace(Wrapped(make).eval(), X)
    (ffn,), _ = find_ffns(graph)
    weights, labels = ffn.weights(graph), torch.arange(18) // 8
    moe = MoE(weights, labels, 3, ffn.activation, nn.Module())  # type: ignore[arg-type]
    moe.route = lambda x: (x.new_zeros(*x.shape[:-1], 3), x.new_zeros(x.shape[:-1]))  # type: ignore[method-assign]
    moe(X).square().sum().backward()
    for value in moe.weights:
        if value is not None:
            assert value.grad is not None
            assert not value.grad[2, 2:].any()
            assert value.grad[2, :2].any()


def test_a_layer_says_how_many_neurons_are_filling_also_after_loading(tmp_path: Path) -> None:
    model = Function(lambda m, x: x + m.down(F.relu(m.up(x))), up=(WIDTH, 37), down=(37, WIDTH)).eval()
    surgery = surgeon.Pipeline([Moeify(expert_size=8), Lower()]).run(model, inputs=X)
    assert "5 experts × 8, 3 neurons fill up the last one" in str(surgery.diff())
    surgery.save(tmp_path / "saved")
    loaded = surgeon.load(tmp_path / "saved")
    (site,) = find_moes(loaded)
    assert (site.filling, site.describe) == (3, "5 experts × 8, 3 neurons fill up the last one")
    assert measure(loaded, (X,), {})[0] == measure(surgery.graph, (X,), {})[0]
    assert torch.equal(loaded(X), surgery.graph(X))


def test_a_centre_is_the_mean_of_real_rows() -> None:
    graph = surgeon.trace(Wrapped(Plain(hidden=10, act=F.relu)).eval(), X)
    Moeify(expert_size=8, router="centres", objective="activation", epochs=0, router_depth=1).apply(graph)
    moe = graph.get_submodule("ffn.moe")
    assert isinstance(moe, MoE)
    rows = F.normalize(moe.weights.w1.detach(), dim=-1)
    assert torch.allclose(moe.router.fc2.weight[1], rows[1, :2].mean(0), atol=1e-6)
    assert torch.allclose(moe.router.fc2.weight[0], rows[0].mean(0), atol=1e-6)


class Pruned(nn.Module):
    """An encoder as structured pruning leaves it: every layer with its own number of heads and neurons."""

    def __init__(self, *layers: tuple[int, int]) -> None:
        super().__init__()
        self.qkv = nn.ModuleList(nn.Linear(WIDTH, 3 * 4 * heads) for heads, _ in layers)
        self.o = nn.ModuleList(nn.Linear(4 * heads, WIDTH) for heads, _ in layers)
        self.up = nn.ModuleList(nn.Linear(WIDTH, hidden) for _, hidden in layers)
        self.down = nn.ModuleList(nn.Linear(hidden, WIDTH) for _, hidden in layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for qkv, o, up, down in zip(self.qkv, self.o, self.up, self.down, strict=True):
            q, k, v = (part.unflatten(-1, (-1, 4)).transpose(1, 2) for part in qkv(x).chunk(3, -1))
            x = x + o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))
            x = x + down(F.gelu(up(x)))
        return x


def test_a_pruned_model_converts_as_it_is() -> None:
    model = Pruned((3, 29), (1, 53), (2, 7)).eval()
    surgery = surgeon.Pipeline([Moeify(experts={"*.0": 4, "*": 7}), Lower()]).run(model, inputs=X)
    assert [(site.experts, site.size, site.filling) for site in find_moes(surgery.graph)] == [
        (4, 8, 3), (7, 8, 3), (7, 1, 0),
    ]  # fmt: skip
    assert torch.allclose(surgery.graph(X), model(X), atol=1e-5)

"""Layers whose experts have 8-bit weights: what they compute, and that they behave like other layers."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgeon.errors import UsageError
from surgeon.kernels import cpu
from surgeon.kernels.backends import say_once
from surgeon.kernels.dynamic_k import masked_ffn
from surgeon.kernels.experts import Experts, selected
from surgeon.kernels.int8 import routed_ffn_int8
from surgeon.kernels.int8_arguments import Int8Call
from surgeon.moe.int8 import TENSORS, Int8MoE
from surgeon.moe.module import MoE
from surgeon.moe.router import Router
from surgeon.sites.ffn import FFNWeights

D_IN, HIDDEN, D_OUT, EXPERTS = 20, 48, 24, 8


def layer(activation: str = "relu", *, gated: bool = False, width: int | None = 12, **options: Any) -> MoE:
    """A layer with random weights and a tau of 0.4."""
    torch.manual_seed(1)

    def weight(*shape: int) -> Tensor:
        return torch.randn(shape) / shape[-1] ** 0.5

    weights = FFNWeights(
        weight(HIDDEN, D_IN), weight(HIDDEN), weight(HIDDEN, D_IN) if gated else None, None,
        weight(HIDDEN, D_OUT), weight(D_OUT),
    )  # fmt: skip
    router = Router(D_IN, width, EXPERTS - options.get("shared", 0), bias=True)
    made = MoE(weights, torch.arange(HIDDEN) % EXPERTS, EXPERTS, activation, router, **options)
    made.tau.fill_(0.4)
    return made


X = torch.randn(4, 9, D_IN, generator=torch.Generator().manual_seed(3))


def error(got: Tensor, want: Tensor) -> float:
    return float(((got.float() - want).norm() / want.norm()).detach())


@pytest.mark.parametrize(("weights", "accepted"), [({}, 0.02), ({"group": 8}, 0.15), ({"float8": True}, 0.08)], ids=str)
@pytest.mark.parametrize("options", [
    {}, {"gated": True, "activation": "silu"}, {"width": None}, {"shared": 2}, {"activation": "gelu"},
])  # fmt: skip
def test_computes_nearly_what_the_layer_computes(
    options: dict[str, Any], weights: dict[str, Any], accepted: float
) -> None:
    moe = layer(**options)
    made = Int8MoE.of(moe, torch.rand(D_IN) + 0.5, **weights)
    assert torch.equal(selected(*made.route(X)), selected(*moe.route(X)))  # no score is near its threshold
    assert 1e-4 < error(made(X), moe(X)) < accepted
    assert made.shape == dataclasses.replace(moe.shape, form="int8", **weights)
    assert ("int4 in groups of 8" if "group" in weights else "fp8" if weights else "int8") in repr(made)


def test_is_as_exact_as_its_numbers() -> None:
    """With the stored weights in float32, only the roundings of inputs and hidden values are left."""
    moe = layer()
    made = Int8MoE.of(moe)
    scores, threshold = made.route(X)
    want = masked_ffn(X, scores, threshold, *made.weights, made.b2, "relu")
    assert error(made(X), want) < error(moe(X), want) < 0.02


@pytest.mark.parametrize(("weights", "accepted"), [({}, 0.03), ({"group": 8}, 0.2), ({"float8": True}, 0.08)], ids=str)
def test_the_gradient_of_the_input_is_that_of_the_experts(weights: dict[str, Any], accepted: float) -> None:
    moe = layer("silu", gated=True)
    made = Int8MoE.of(moe, None, **weights)
    x = X.clone().requires_grad_()
    (got,) = torch.autograd.grad(made(x).square().sum(), x)
    (want,) = torch.autograd.grad(moe(x).square().sum(), x)
    assert error(got, want) < accepted


@pytest.mark.parametrize("weights", [{}, {"group": 16}, {"float8": True}], ids=str)
def test_keeps_its_dtypes_and_runs_in_others(weights: dict[str, Any]) -> None:
    made = Int8MoE.of(layer(), None, **weights)
    before = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    want = made(X)
    made.to(torch.bfloat16).to(torch.float64)
    for name, tensor in made.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)
    for dtype, most in ((torch.bfloat16, 0.02), (torch.float16, 0.01), (torch.float64, 1e-3)):
        got = made(X.to(dtype))
        assert got.dtype == dtype
        assert error(got, want) < most
    assert made.to("meta").w1.dtype == before["w1"].dtype


@pytest.mark.parametrize(
    ("weights", "accepted"),
    [({}, 0.02), ({"group": 8}, 0.15), ({"group": 16}, 0.15), ({"group": 64}, 0.2), ({"float8": True}, 0.08)],
    ids=str,
)
def test_an_empty_layer_takes_its_weights(weights: dict[str, Any], accepted: float) -> None:
    moe = layer("silu", gated=True)
    moe.register_buffer("skipped_mean", torch.randn(D_OUT))
    made = Int8MoE.of(moe, None, **weights)
    empty = Int8MoE.empty(made.shape, device=None)
    empty.load_state_dict(made.state_dict())
    assert empty.shape == made.shape
    assert torch.equal(empty(X), made(X))
    assert error(empty(X), moe(X)) < accepted


def test_tau_and_rule_count_at_the_next_call() -> None:
    made = Int8MoE.of(layer())
    outputs = []
    for rule, tau in (("max", 0.0), ("max", 0.9), ("top_k", 0.5)):
        made.rule = rule
        made.tau.fill_(tau)
        outputs.append(made(X))
        mask = selected(*made.route(X))
        assert bool(mask.all()) == (tau == 0)
        if rule == "top_k":
            assert bool((mask.sum(-1) == EXPERTS // 2).all())
    assert len({float(output.sum()) for output in outputs}) == 3


@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_any_number_of_tokens(tokens: int) -> None:
    made, x = Int8MoE.of(layer()), X.reshape(-1, D_IN)[:tokens]
    assert made(x).shape == (tokens, D_OUT)
    assert torch.allclose(made(x), made(X).reshape(-1, D_OUT)[:tokens], atol=1e-6)


def test_a_token_that_is_not_finite_gives_nan() -> None:
    made, x = Int8MoE.of(layer()), X.clone()
    x[0, 0, 0], x[1, 1, 1] = float("nan"), float("inf")
    got = made(x)
    assert bool(got[0, 0].isnan().all())
    assert bool(got[1, 1].isnan().all())
    assert int(got.isnan().any(-1).sum()) == 2


def test_compiles_as_one_op() -> None:
    made = Int8MoE.of(layer())
    compiled = torch.compile(made, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(X), made(X))
    program = torch.export.export(made, (X,))
    called = [node for node in program.graph.nodes if node.target is torch.ops.surgeon.routed_ffn_int8.default]
    assert len(called) == 1
    assert torch.equal(program.module()(X), made(X))


@pytest.mark.parametrize(("name", "value", "words"), [
    ("w1", torch.zeros(2, 3, dtype=torch.int8), "w1 has shape"),
    ("w1", torch.zeros(8, 1, 5, 16, 4), "w1 is torch.float32, expected torch.int8"),
    ("w1", torch.zeros(8, 1, 5, 16, 4).to(torch.float8_e4m3fn), "w2 is torch.int8, expected torch.float8_e4m3fn"),
    ("rule", "best", "No selection rule"),
    ("shared", 3, "the router scores 8 experts and 3 are shared"),
    ("fc1_scale", None, "fc1 and fc1_scale belong together"),
    ("b_gate", torch.zeros(8, 6), "gate and gate_scale belong together"),
    ("x_scale", torch.ones(3), "x_scale has shape"),
    ("y_scale", torch.ones(24, dtype=torch.int32), "y_scale is torch.int32, expected a floating dtype"),
    ("activation", "best", "unknown activation"),
    ("output", "best", "no router with"),
])  # fmt: skip
def test_wrong_arguments_are_refused(name: str, value: Any, words: str) -> None:
    call = Int8Call(X, *Int8MoE.of(layer()).call)._replace(**{name: value})
    with pytest.raises(UsageError, match=words):
        routed_ffn_int8(*call)


def test_float8_has_no_native_kernels_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    if not cpu.ready():
        pytest.skip("the native kernels do not run here")
    say_once.cache_clear()
    made = Int8MoE.of(layer(), float8=True)
    for _ in range(2):
        made(X)
    assert [record.message for record in caplog.records] == [
        "The torch backend runs instead of the native kernels: they take weights in int8 and int4, not in float8, so "
        "every expert is computed."
    ]


def test_cannot_be_trained_by_mistake() -> None:
    made = Int8MoE.of(layer())
    assert not any(parameter.requires_grad for parameter in made.parameters())
    assert {name for name, _ in made.named_parameters()} <= set(TENSORS)
    model = nn.Sequential(nn.Linear(D_IN, D_IN), made)
    model(X).sum().backward()
    assert model[0].weight.grad is not None


def test_the_numbers_of_its_weights_are_near() -> None:
    moe = layer("silu", gated=True)
    made = Int8MoE.of(moe, torch.rand(D_IN) + 0.5)
    for name, got, want in zip(Experts._fields, made.weights, moe.weights, strict=True):
        assert (got is None) == (want is None), name
        if got is not None and want is not None:
            assert error(got, want.detach()) < 0.01, name

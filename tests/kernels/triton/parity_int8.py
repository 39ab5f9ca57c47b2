"""The kernels for weights of 8 and 4 bits against their plain twin: `test_interpreted` runs this file as `parity`.

By hand: TRITON_INTERPRET=1 pytest tests/kernels/triton/parity_int8.py
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from surgeon.kernels.int8 import routed_ffn_int8, router_scores_int8
from surgeon.kernels.panels import Int8Experts, pack
from surgeon.kernels.selection import RULES
from tests.kernels.int8_calls import HIDDEN, OUTPUT, int8_call

from .checks import module
from .int8_checks import Sizes, among_garbage, check_definition, check_int8, check_trunk, on_kernels, ops

WEIGHTS: tuple[dict[str, Any], ...] = ({}, {"group": 16}, {"float8": True})
ACTIVATED = ("relu", "gelu", "gelu_tanh", "quick_gelu", "silu", "relu2", "identity")
SHAPES = {
    "experts": st.integers(2, 4),
    "neurons": st.sampled_from([1, 4, 16, 17, 33]),
    "d_in": st.sampled_from([1, 3, 16, 33, 40]),
    "d_out": st.sampled_from([1, 5, 16, 33]),
    "width": st.sampled_from([None, 1, 8, 33]),
    "rule": st.sampled_from(RULES),
    "tau": st.sampled_from([0.0, 0.3, 0.8]),
    "gated": st.booleans(),
    "bias": st.booleans(),
    "scaled": st.booleans(),
    "activation": st.sampled_from(ACTIVATED),
    "hidden": st.sampled_from(sorted(HIDDEN)),
    "output": st.sampled_from(sorted(OUTPUT)),
    "weights": st.sampled_from([{}, {"float8": True}, {"group": 8}, {"group": 16}, {"group": 40}]),
    "shared": st.integers(0, 1),
    "seed": st.integers(0, 99),
}


def shapes(**other: st.SearchStrategy[object]) -> st.SearchStrategy[dict[str, object]]:
    """Arguments of `int8_call`, some of them drawn otherwise."""
    return st.fixed_dictionaries(SHAPES | other).map(lambda drawn: drawn | drawn.pop("weights"))


def few(examples: int) -> settings:
    return settings(max_examples=examples, deadline=None)


@few(8)
@given(
    shapes=shapes(),
    tokens=st.integers(17, 25),
    rows=st.sampled_from([16, 32]),
    programs=st.integers(1, 5),
    ordered=st.booleans(),
)
def test_prefill(shapes: dict[str, object], tokens: int, rows: int, programs: int, ordered: bool) -> None:
    check_int8(int8_call((tokens,), **shapes), Sizes(rows=rows, programs=programs, ordered=ordered))  # type: ignore[arg-type]


@few(8)
@given(shapes=shapes(), lead=st.sampled_from([(), (1,), (2, 3), (16,)]))
def test_decode(shapes: dict[str, object], lead: tuple[int, ...]) -> None:
    check_int8(int8_call(lead, **shapes))  # type: ignore[arg-type]


@few(4)
@given(
    shapes=shapes(experts=st.just(3), d_out=st.sampled_from([1, 9, 17])),
    tokens=st.sampled_from([3, 18]),
)
def test_they_compute_the_definition(shapes: dict[str, object], tokens: int) -> None:
    check_definition(int8_call((tokens,), **shapes))  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [3, 20])
def test_half_types(tokens: int, dtype: torch.dtype) -> None:
    for ordered, float8 in itertools.product((False, True), repeat=2):
        call = int8_call(
            (tokens,), 4, 20, 40, 33, gated=True, scaled=True, activation="silu", dtype=dtype, float8=float8
        )
        check_int8(call, Sizes(ordered=ordered))


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("activation", ACTIVATED)
def test_every_activation(activation: str, gated: bool) -> None:
    check_int8(int8_call((5,), 3, 20, 33, 20, tau=0.0, activation=activation, gated=gated))


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("tokens", [3, 20])
def test_with_the_sizes_of_the_table(tokens: int, gated: bool) -> None:
    for weights in ({"group": 32 if gated else None}, {"float8": True}):
        check_int8(
            int8_call((tokens,), 2, 70, 150, 90, gated=gated, activation="silu" if gated else "relu", **weights), None
        )


@pytest.mark.parametrize("tokens", [2, 17])
def test_sums_of_the_largest_numbers_are_exact(tokens: int) -> None:
    """Weights of the least and the most times inputs of the most, and hidden values of 255."""
    for sign in (1, -1):
        call = int8_call((tokens,), 1, 16, 128, 16, width=None, tau=0.0, bias=False, activation="relu")
        call = call._replace(
            x=torch.ones(tokens, 128) * sign,
            w1=torch.full_like(call.w1, 127 * sign),
            w2=torch.full_like(call.w2, -127),
            w1_scale=torch.ones(1, 16),
            w2_scale=torch.ones(1, 16),
            y_scale=torch.ones(16),
        )
        with on_kernels(Sizes()):
            found = routed_ffn_int8(*call)
        torch.testing.assert_close(found, torch.full((tokens, 16), -128.0 * 127 * 16 * 127), rtol=1e-6, atol=0)


@pytest.mark.parametrize("tokens", [3, 20])
def test_products_of_trunks_are_exact(tokens: int) -> None:
    call = int8_call((tokens,), d_in=100, width=20)
    check_trunk(call)
    assert call.fc1 is not None
    weights = torch.tensor([2047, -2047, 64, 63, -64, -65], dtype=torch.int16)
    check_trunk(
        call._replace(x=call.x.sign(), fc1=weights.repeat(call.fc1.numel())[: call.fc1.numel()].view_as(call.fc1))
    )


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("value", [float("nan"), -float("inf")])
@pytest.mark.parametrize("tokens", [5, 18])
def test_a_token_that_is_not_finite_gives_nan_and_leaves_the_others_alone(
    tokens: int, value: float, ordered: bool
) -> None:
    for activation, weights in (("relu", {}), ("silu", {"group": 16}), ("relu", {"float8": True})):
        call = int8_call((tokens,), 2, 16, 32, 20, scaled=True, activation=activation, **weights)
        call.x[tokens // 2, 7] = value
        check_int8(call, Sizes(ordered=ordered))


@pytest.mark.parametrize("tokens", [4, 17])
def test_tokens_and_hidden_values_that_are_zero(tokens: int) -> None:
    for weights in WEIGHTS:
        call = int8_call((tokens,), 2, 16, 32, 20, tau=0.0, **weights)
        call.x[2] = 0
        check_int8(call)
        with on_kernels(Sizes()):
            dead = routed_ffn_int8(*call._replace(b1=torch.full_like(call.w1_scale, -1e6)))
        assert torch.equal(dead, call.b2.expand(tokens, 20))  # type: ignore[union-attr]


@pytest.mark.parametrize("tokens", [3, 20])
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_hidden_values_that_overflow_give_nan(tokens: int) -> None:
    for float8 in (False, True):
        call = int8_call((tokens,), 2, 16, 32, 20, tau=0.0, activation="relu2", bias=False, float8=float8)
        check_int8(call._replace(w1_scale=call.w1_scale * 1e25))


@pytest.mark.parametrize("tokens", [1, 20])
def test_every_number_in_float8_is_read(tokens: int) -> None:
    """Products with ones, which have one term each: what is stored comes out, up to the rounding of hidden values."""
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    numbers = numbers[~numbers.isnan()].repeat(2)[:256].view(1, 16, 16)
    call = int8_call((tokens,), 1, 16, 16, 16, width=None, tau=0.0, bias=False, activation="identity", float8=True)
    call = call._replace(w1_scale=torch.ones(1, 16), w2_scale=torch.ones(1, 16), y_scale=torch.ones(16))
    ones = pack(torch.eye(16).view(1, 16, 16).to(torch.float8_e4m3fn))
    # Each token picks one column; a single token takes them in turn.
    picks = torch.eye(16) if tokens == 1 else torch.eye(16).repeat(2, 1)[:tokens]
    for first, second in ((numbers, None), (None, numbers)):
        w1, w2 = (ones if matrix is None else pack(matrix) for matrix in (first, second))
        for x in picks.split(tokens):
            with on_kernels(Sizes()):
                found = routed_ffn_int8(*call._replace(x=x, w1=w1, w2=w2))
            torch.testing.assert_close(found, x @ numbers[0].float().t(), rtol=5e-4, atol=0)


@pytest.mark.parametrize("tokens", [3, 20])
def test_inputs_and_hidden_values_in_float16_keep_small_ones_beside_a_large_one(tokens: int) -> None:
    """With weights in float8; in 8 bits a value below 1/254 of the largest would be lost."""
    call = int8_call((tokens,), 2, 16, 32, 20, tau=0.0, bias=False, activation="identity", float8=True)
    weights = call.experts.floats(None, 32)
    call.x[:, 3] = 1e4
    weights.w1[..., 3] = 0
    call = call._replace(**Int8Experts.of(weights, float8=True)._asdict())
    stored = call.experts.floats(None, 32)
    wanted = torch.einsum("nd,esd,eso->no", call.x, stored.w1, stored.w2)
    with on_kernels(Sizes()):
        found = routed_ffn_int8(*call)
    assert float((found - wanted).norm() / wanted.norm()) < 1e-3


@pytest.mark.parametrize("lead", [(0,), (2, 0)])
def test_no_tokens(lead: tuple[int, ...]) -> None:
    call = int8_call(lead)
    with on_kernels(None):
        assert routed_ffn_int8(*call).shape == (*lead, 7)
        assert router_scores_int8(*call.router).shape == (*lead, 6)


def test_ordered_sums_have_the_same_bits_however_the_work_is_shared_out() -> None:
    call = int8_call((20,), 2, 20, 33, 40, gated=True, activation="silu", tau=0.2)
    found = []
    for programs in (1, 3):
        with on_kernels(Sizes(programs=programs, ordered=True)):
            found.append(routed_ffn_int8(*call))
    assert torch.equal(*found)


def test_deterministic_algorithms_are_ordered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for a few tokens, which are decoded otherwise."""
    host, asked = module("int8_host"), []
    monkeypatch.setattr(host, "_ordered_sum", lambda *given, inner=host._ordered_sum: asked.append(inner(*given)))
    call = int8_call((3,), 3, 16, 16, 16)
    check_int8(call)
    assert not asked
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    check_int8(call)
    assert len(asked) == 1


@pytest.mark.parametrize("ordered", [False, True])
def test_tokens_and_columns_go_in_ranges(ordered: bool) -> None:
    """There is room for the hidden values of 18 tokens, and for 32 columns of their pairs."""
    call = int8_call((40,), 2, 32, 20, 40, gated=True, activation="silu", tau=0.0)
    check_int8(call, Sizes(ordered=ordered, room=18 * 2 * 32 * 4))


def test_scales_of_other_dtypes_and_operands_that_are_not_contiguous() -> None:
    for tokens in (4, 20):
        call = int8_call((tokens,), 2, 20, 20, 33, gated=True, scaled=True, width=20)
        kept = {name: value for name, value in call._asdict().items() if isinstance(value, Tensor)}
        halves = {name: t.bfloat16().float() for name, t in kept.items() if t.is_floating_point() and name != "x"}
        rounded = call._replace(**halves)
        twisted = rounded._replace(
            **{name: t.bfloat16() for name, t in halves.items()},
            x=call.x.t().contiguous().t(),
            w1=call.w1.transpose(0, 1).contiguous().transpose(0, 1),
        )
        with on_kernels(Sizes(ordered=True)):
            assert torch.equal(routed_ffn_int8(*twisted), routed_ffn_int8(*rounded))


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_gradients_pass(weights: dict[str, Any]) -> None:
    for tokens in (3, 18):
        call = among_garbage(int8_call((tokens,), 2, 16, 32, 24, activation="gelu", **weights))
        x = call.x.clone().requires_grad_()
        with on_kernels(Sizes()):
            found = routed_ffn_int8(*call._replace(x=x))
            (gradient,) = torch.autograd.grad(found.sum(), [x])
        (wanted,) = torch.autograd.grad(routed_ffn_int8(*call._replace(x=x)).sum(), [x])
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-4)


def test_what_they_do_not_take_goes_to_the_plain_twin() -> None:
    call, backend = int8_call((3,)), module("backend")
    for wrong, why in (
        (call._replace(activation="mish"), "not mish"),
        (call._replace(x=call.x.double()), "float64"),
    ):
        assert why in backend.supports_int8(wrong)
        with on_kernels(None):
            assert torch.equal(routed_ffn_int8(*wrong), ops.routed_ffn_int8_torch(*wrong))

"""The kernels against float64, in Triton's interpreter: `test_interpreted` runs this file in a process of its own.

By hand: TRITON_INTERPRET=1 pytest tests/kernels/triton/parity.py
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from surgeon.kernels.experts import Experts

from .checks import (
    Case,
    assert_close,
    check_activation,
    check_backward,
    check_forward,
    check_nan,
    check_plan,
    check_thresholds,
    forced,
    module,
    reference,
)

# Triton's interpreter calculates with NumPy, which warns where hardware gives infinity.
pytestmark = [
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
    # Nothing times infinity is NaN in the kernel and in its twin.
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]

ACTIVATED = ("relu", "gelu", "gelu_tanh", "quick_gelu", "silu", "relu2", "identity")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@st.composite
def cases(draw: st.DrawFn, tokens: st.SearchStrategy[int], ways: tuple[str, ...]) -> Case:
    return Case(
        tokens=draw(tokens),
        experts=draw(st.integers(1, 6)),
        neurons=draw(st.sampled_from([1, 4, 6, 16, 17, 33])),
        d_in=draw(st.integers(1, 33)),
        d_out=draw(st.integers(1, 33)),
        gated=draw(st.booleans()),
        bias=draw(st.tuples(st.booleans(), st.booleans(), st.booleans())),
        activation=draw(st.sampled_from(ACTIVATED)),
        dtype=draw(st.sampled_from(DTYPES)),
        score_dtype=draw(st.sampled_from([*DTYPES, torch.float64])),
        levels=draw(st.sampled_from([None, 2, 3])),
        share=draw(st.sampled_from([0.1, 0.4, 1.0])),
        way=draw(st.sampled_from(ways)),
        rows=draw(st.sampled_from([16, 32])),
        programs=draw(st.integers(1, 5)),
        seed=draw(st.integers(0, 99)),
    )


def few(examples: int) -> settings:
    return settings(max_examples=examples, deadline=None)


@few(10)
@given(case=cases(st.integers(17, 50), ("fused", "split", "ordered", "spread", "masked")))
def test_prefill(case: Case) -> None:
    check_forward(case)


@few(10)
@given(case=cases(st.sampled_from([1, 1, 2, 5, 16]), ("fused", "fused", "ordered", "spread", "masked")))
def test_decode(case: Case) -> None:
    check_forward(case)


@few(8)
@given(case=cases(st.integers(1, 35), ("split", "split", "ordered", "masked", "masked")))
def test_backward(case: Case) -> None:
    check_backward(case)


@few(6)
@given(case=cases(st.integers(1, 120), ("fused",)), experts=st.integers(1, 90))
def test_plan(case: Case, experts: int) -> None:
    check_plan(replace(case, experts=experts, neurons=1, d_in=1, d_out=1))


RULES = ("cumulative", "energy", "top_k")
# Sums and squares of these are exact; rows with infinity or NaN among them.
SCORES = st.integers(0, 60).map(lambda n: n / 16)
ODD_SCORES = st.one_of(SCORES, st.sampled_from([0.0, -0.0, float("inf"), float("nan"), 1e-42, 3e38]))


@st.composite
def scores(draw: st.DrawFn) -> torch.Tensor:
    experts, values = draw(st.integers(1, 40)), draw(st.sampled_from([SCORES, ODD_SCORES]))
    return torch.tensor(draw(st.lists(st.lists(values, min_size=experts, max_size=experts), min_size=1, max_size=3)))


@few(25)
@given(scores=scores(), tau=st.integers(0, 16).map(lambda n: n / 16), rule=st.sampled_from(RULES))
@example(scores=torch.tensor([[0.0, float("inf")]]), tau=0.0, rule="cumulative")
def test_thresholds(scores: torch.Tensor, tau: float, rule: str) -> None:
    check_thresholds(scores, tau, rule)


def test_thresholds_of_any_number_of_dimensions() -> None:
    """And of scores that are not contiguous."""
    rows = torch.rand(3, 4, 50, generator=torch.Generator().manual_seed(0))[..., :33]
    rows[1, 2, 7] = float("nan")
    for rule in RULES:
        found = module("host").sorted_threshold(rows, torch.tensor(0.5), rule)
        assert found.shape == (3, 4)
        each = [module("host").sorted_threshold(row, torch.tensor(0.5), rule) for row in rows.reshape(-1, 33)]
        assert torch.equal(found.flatten(), torch.stack(each))


def test_a_share_a_little_less_than_what_it_stands_for() -> None:
    """13/22 of 22 is 12.999… in floating point."""
    check_thresholds(torch.arange(22.0)[None], 13 / 22, "top_k")


@pytest.mark.parametrize("activation", ACTIVATED)
def test_activations_and_their_gradients(activation: str) -> None:
    check_activation(activation)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_with_the_sizes_of_the_table(gated: bool) -> None:
    x, scores, threshold, experts, b2 = Case(d_in=70, d_out=130, gated=gated).arguments()
    activation = "silu"
    found = module("host").forward(x, scores, threshold, experts, b2, activation)
    assert_close(found, reference(x, scores, threshold, experts, b2, activation), x.dtype, "output")


WAYS = [(1, "fused"), (9, "fused"), (20, "fused"), (20, "split"), (20, "ordered"), (20, "spread"), (20, "masked")]


@pytest.mark.parametrize(("tokens", "way"), WAYS)
def test_no_expert_gives_the_bias(tokens: int, way: str) -> None:
    case = Case(tokens=tokens, share=0, way=way)
    *arguments, b2 = case.arguments()
    with forced(case):
        found = module("host").forward(*arguments, b2, "relu", **case.how)
        zeros = module("host").forward(*arguments, None, "relu", **case.how)
    assert torch.equal(found, b2.expand(tokens, -1))
    assert not zeros.any()
    b2.add_(1)
    assert not torch.equal(found, b2.expand(tokens, -1))


@pytest.mark.parametrize("where", ["x", "scores", "threshold"])
@pytest.mark.parametrize(("tokens", "way"), WAYS)
def test_a_nan_stays_in_its_row(where: str, tokens: int, way: str) -> None:
    check_nan(Case(tokens=tokens, way=way, experts=3, neurons=5, activation="relu"), where)


@pytest.mark.parametrize(("tokens", "way"), [(1, "fused"), (7, "fused"), (20, "fused"), (20, "split")])
def test_experts_nobody_selects_are_not_read(tokens: int, way: str) -> None:
    case = Case(tokens=tokens, way=way, neurons=5, gated=True)
    x, scores, threshold, experts, b2 = case.arguments()
    scores[:, [1, 4]] = -1.0
    expected = reference(x, scores, threshold, experts, b2, "silu")
    for weight in experts:
        assert weight is not None
        weight[[1, 4]] = float("nan")
    with forced(case):
        assert_close(module("host").forward(x, scores, threshold, experts, b2, "silu"), expected, case.dtype, "output")
        if way == "split":
            gradients = module("host").backward(
                torch.ones_like(expected).float(), x, scores, threshold, experts, "silu"
            )
            assert gradients.x.isfinite().all()
            assert not any(gradient[[1, 4]].any() for gradient in gradients[1:])


@pytest.mark.parametrize("way", ["experts", "masked"])
def test_only_the_gradients_asked_for(way: str) -> None:
    case = Case(tokens=3, experts=2, neurons=3, gated=True)
    x, scores, threshold, experts, _ = case.arguments()
    grad = torch.ones(3, case.d_out)
    with forced(case):
        both = module("host").backward(grad, x, scores, threshold, experts, "silu", way=way)
        only_x = module("host").backward(grad, x, scores, threshold, experts, "silu", True, False, way=way)
        only_weights = module("host").backward(grad, x, scores, threshold, experts, "silu", False, True, way=way)
    assert torch.equal(only_x.x, both.x)
    assert only_x[1:] == (None,) * 5
    assert only_weights.x is None
    assert all(torch.equal(one, other) for one, other in zip(only_weights[1:], both[1:], strict=True))


def test_ordered_sums_have_the_same_bits_however_the_work_is_shared_out() -> None:
    case = Case(tokens=20, neurons=6, way="ordered", share=0.8)
    found = []
    for programs in (1, 3):
        with forced(replace(case, programs=programs)):
            found.append(module("host").forward(*case.arguments(), "gelu", ordered=True))
    assert torch.equal(*found)


@pytest.mark.parametrize("tokens", [10, 25])
def test_ordered_sums_go_through_columns_and_tokens_in_ranges(tokens: int) -> None:
    """There is room for 16 columns of 18 tokens."""
    case = Case(tokens=tokens, experts=2, neurons=3, d_in=37, d_out=37, way="ordered", share=0.8, room=18 * 2 * 16 * 4)
    check_forward(case)
    check_backward(case)


def test_no_tokens() -> None:
    x, scores, threshold, experts, b2 = Case(tokens=0, gated=True).arguments()
    for way in ("experts", "spread", "masked"):
        assert module("host").forward(x, scores, threshold, experts, b2, "silu", way=way).shape == (0, 37)
    for how in ({"ordered": False}, {"ordered": True}, {"way": "masked"}):
        assert module("host").forward(x, scores, threshold, experts, b2, "silu", **how).shape == (0, 37)
        gradients = module("host").backward(torch.empty(0, 37), x, scores, threshold, experts, "silu", **how)
        assert gradients.x.shape == x.shape
        assert not any(gradient.any() for gradient in gradients[1:])


def test_inputs_need_not_be_contiguous() -> None:
    case = Case(tokens=5, experts=3, neurons=4)
    x, scores, threshold, experts, b2 = case.arguments()
    twisted = Experts(*(t if t is None else torch.stack([t, t + 9], -1)[..., 0] for t in experts))
    for way in ("experts", "spread", "masked"):
        with forced(case):
            found = module("host").forward(
                x.t().contiguous().t(),
                scores.t().contiguous().t(),
                threshold[:1].expand(5),
                twisted,
                b2,
                "gelu",
                way=way,
            )
        assert_close(found, reference(x, scores, threshold, experts, b2, "gelu"), case.dtype, "output")


@pytest.mark.slow
def test_more_elements_than_32_bits_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that is never written takes no room: only the last expert's weights are there."""
    experts, neurons, width = 2**11 + 1, 16, 2**16
    weights = [torch.empty(experts, neurons, width, dtype=torch.float16) for _ in range(2)]
    assert weights[0].numel() > 2**31
    generator = torch.Generator().manual_seed(0)
    last = [torch.randn(neurons, width, generator=generator).half() / 256 for _ in weights]
    for weight, values in zip(weights, last, strict=True):
        weight[-1] = values
    x = torch.randn(17, width, generator=generator).half()
    scores = torch.zeros(17, experts)
    scores[:, -1] = 1
    with forced(Case(experts=experts, neurons=neurons, way="split")):
        tiles = module("tiles")
        for name in ("hidden", "combine"):
            monkeypatch.setattr(tiles, name, lambda *_, **__: tiles.Tiles(16, 16, 4096, 4096, 4, 2))
        found = module("host").forward(
            x, scores, torch.full((17,), 0.5), Experts(weights[0], None, None, None, weights[1]), None, "relu"
        )
    h = (x.double() @ last[0].double().t()).relu()
    assert_close(found, h @ last[1].double(), torch.float16, "output")

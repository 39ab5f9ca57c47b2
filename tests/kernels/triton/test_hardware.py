"""The kernels on a GPU, against float64 there: skipped where there is none.

What the interpreter cannot show: arithmetic of the hardware (bf16, TF32, exp and erf), programs that run at the same
time, and that nothing waits for the host.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")
if not torch.cuda.is_available():
    pytest.skip("there is no GPU", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1: kernels would be interpreted", allow_module_level=True)

from surgeon.kernels.dynamic_k import dynamic_k_ffn, masked_ffn
from surgeon.kernels.experts import Experts
from surgeon.kernels.gpu_model.cost import Way
from tests.kernels.int8_calls import int8_call

from . import checks
from .checks import (
    Case,
    assert_close,
    check_activation,
    check_backward,
    check_forward,
    check_nan,
    check_plan,
    check_thresholds,
    module,
)
from .int8_checks import Sizes, check_int8
from .parity import ACTIVATED, DTYPES, RULES, WAYS, cases, scores
from .parity_int8 import shapes as int8_shapes

pytestmark = [
    # Of torch's own threads and compiler, here and there.
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS, but there was no current CUDA context:UserWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
]

GPU = "cuda"
LARGE = Case(tokens=700, d_in=768, d_out=768, share=0.2, device=GPU)
# The sums are as long as those of real layers, and hidden values are rounded between the two products.
LARGE_TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


def drawn(examples: int) -> settings:
    """Every example compiles kernels anew."""
    return settings(max_examples=examples, deadline=None, database=None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", ["fused", "split", "ordered", "spread", "masked"])
@drawn(6)
@given(case=cases(st.integers(17, 200), ("fused",)))
def test_prefill(case: Case, dtype: torch.dtype, way: str) -> None:
    check_forward(replace(case, dtype=dtype, way=way, device=GPU))


@pytest.mark.parametrize("dtype", DTYPES)
@drawn(8)
@given(case=cases(st.sampled_from([1, 1, 2, 5, 16]), ("fused", "fused", "ordered")))
def test_decode(case: Case, dtype: torch.dtype) -> None:
    check_forward(replace(case, dtype=dtype, device=GPU))


@pytest.mark.parametrize("dtype", DTYPES)
@drawn(6)
@given(case=cases(st.integers(1, 90), ("split", "split", "ordered", "masked")))
def test_backward(case: Case, dtype: torch.dtype) -> None:
    check_backward(replace(case, dtype=dtype, device=GPU))


@drawn(10)
@given(case=cases(st.integers(1, 3000), ("fused",)), experts=st.integers(1, 400))
def test_plan(case: Case, experts: int) -> None:
    check_plan(replace(case, experts=experts, neurons=1, d_in=1, d_out=1, device=GPU))


@pytest.mark.parametrize("rule", RULES)
@drawn(40)
@given(scores=scores(), tau=st.integers(0, 16).map(lambda n: n / 16))
def test_thresholds(scores: Tensor, tau: float, rule: str) -> None:
    check_thresholds(scores.to(GPU), tau, rule)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("experts", [24, 128, 1000, 8192])
def test_thresholds_of_many_tokens_and_experts(experts: int, rule: str) -> None:
    """By the operator. Of sums in float64, rounded: as torch's, but where one more or less makes no difference."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(3000, experts, generator=generator).to(GPU)
    tau = torch.tensor(0.8, device=GPU)
    found = torch.ops.surgeon.sorted_threshold(scores, tau, rule)
    assert torch.equal(found, module("host").sorted_threshold(scores, tau, rule))
    expected = torch.ops.surgeon.sorted_threshold_torch(scores.double(), tau.double(), rule).float()
    apart = ((scores < found[:, None]).sum(1) - (scores < expected[:, None]).sum(1)).abs()
    assert apart.max() <= (0 if rule == "top_k" else 1)


@pytest.mark.parametrize("activation", ACTIVATED)
def test_activations_and_their_gradients(activation: str) -> None:
    check_activation(activation, GPU)


@pytest.mark.parametrize("where", ["x", "scores", "threshold"])
@pytest.mark.parametrize(("tokens", "way"), WAYS)
def test_a_nan_stays_in_its_row(where: str, tokens: int, way: str) -> None:
    check_nan(Case(tokens=tokens, way=way, experts=3, neurons=5, activation="relu", device=GPU), where)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ordered", [False, True])
@drawn(10)
@given(shapes=int8_shapes(), tokens=st.sampled_from([1, 3, 16, 17, 200]))
def test_weights_of_8_and_4_bits(shapes: dict[str, Any], tokens: int, ordered: bool, dtype: torch.dtype) -> None:
    check_int8(int8_call((tokens,), dtype=dtype, **shapes), Sizes(ordered=ordered), GPU)


@pytest.mark.parametrize("weights", [{}, {"group": 32}, {"float8": True}], ids=str)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("neurons", [24, 128])
def test_layers_of_a_real_size_with_weights_of_8_and_4_bits(neurons: int, gated: bool, weights: dict[str, Any]) -> None:
    activation = "silu" if gated else "relu"
    for tokens in (1, 16, 700):
        call = int8_call(
            (tokens,), 3072 // neurons, neurons, 768, 768, gated=gated, activation=activation, tau=0.8, width=96,
            scaled=True, **weights,
        )  # fmt: skip
        check_int8(call, None, GPU)


def errors(case: Case) -> None:
    """With the sizes of the table, forward and backward; several times, since programs race each other."""
    x, scores, threshold, experts, b2 = case.arguments()
    tolerance = LARGE_TOLERANCE[case.dtype]
    expected = checks.reference(x, scores, threshold, experts, b2, case.activation)
    scale = expected.abs().max()
    for _ in range(3):
        found = module("host").forward(x, scores, threshold, experts, b2, case.activation, **case.how)
        assert (found - expected).abs().max() <= tolerance * scale
    grad = torch.randn(expected.shape, device=GPU).to(case.dtype)
    gradients = checks.reference_gradients(grad, x, scores, threshold, experts, b2, case.activation)
    for _ in range(2):
        mine = module("host").backward(grad, x, scores, threshold, experts, case.activation, **case.how)._asdict()
        for name, theirs in gradients.items():
            assert (mine[name] - theirs).abs().max() <= tolerance * theirs.abs().max(), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("neurons", [4, 24, 64, 128, 256])
def test_layers_of_a_real_size(neurons: int, gated: bool, dtype: torch.dtype) -> None:
    activation = "silu" if gated else "gelu"
    case = replace(LARGE, neurons=neurons, experts=3072 // neurons, gated=gated, activation=activation, dtype=dtype)
    for way in ("fused", "spread", "masked"):
        errors(replace(case, way=way))
    errors(replace(case, tokens=300, experts=300 // neurons + 1, way="ordered"))
    for tokens in (1, 8, 16):
        errors(replace(case, tokens=tokens))


@pytest.mark.parametrize("tokens", [1, 8, 300])
def test_thousands_of_experts(tokens: int) -> None:
    errors(replace(LARGE, tokens=tokens, neurons=4, experts=4096, share=0.05, dtype=torch.bfloat16))


@pytest.mark.parametrize("share", [0.0, 1.0])
@pytest.mark.parametrize("tokens", [1, 8, 300])
def test_none_and_all(tokens: int, share: float) -> None:
    case = replace(LARGE, tokens=tokens, neurons=24, experts=40, share=share)
    x, scores, threshold, experts, b2 = case.arguments()
    assert_close(
        module("host").forward(x, scores, threshold, experts, b2, "gelu"),
        checks.reference(x, scores, threshold, experts, b2, "gelu"),
        torch.float32,
        "output",
    )


def test_tf32_where_torch_may_use_it() -> None:
    case = replace(LARGE, neurons=64, experts=20)
    arguments = case.arguments()
    expected = checks.reference(*arguments, "relu")
    before = torch.backends.cuda.matmul.fp32_precision
    found = {}
    try:
        for precision in ("ieee", "tf32"):
            torch.backends.cuda.matmul.fp32_precision = precision
            y = module("host").forward(*arguments, "relu")
            found[precision] = float((y - expected).abs().max() / expected.abs().max())
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert found["ieee"] < 3e-6
    assert 1e-5 < found["tf32"] < 2e-3


def test_what_is_reproducible_is() -> None:
    case = replace(LARGE, neurons=24, experts=60, dtype=torch.bfloat16)
    x, scores, threshold, experts, b2 = case.arguments()
    grad = torch.randn_like(x)
    run = partial(module("host").forward, x, scores, threshold, experts, b2, "gelu", ordered=True)
    back = partial(module("host").backward, grad, x, scores, threshold, experts, "gelu", ordered=True)
    first, gradients = run(), back()
    for _ in range(5):
        assert torch.equal(run(), first)
        assert all(t is None or torch.equal(t, old) for t, old in zip(back(), gradients, strict=True))


@pytest.mark.parametrize(("tokens", "way"), [(1, "experts"), (8, "experts"), *((300, way) for way in get_args(Way))])
def test_nothing_waits_for_the_host(tokens: int, way: Way) -> None:
    """What waits cannot be captured; and what was captured follows what is in the tensors when it is replayed."""
    x, scores, threshold, experts, b2 = replace(LARGE, tokens=tokens, neurons=24, experts=40).arguments()
    call = partial(module("host").forward, x, scores, threshold, experts, b2, "gelu", way=way)
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call()
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        scores.copy_(torch.rand(scores.shape, generator=generator))
        x.copy_(torch.randn(x.shape, generator=generator))
        graph.replay()
        assert_close(found, checks.reference(x, scores, threshold, experts, b2, "gelu"), torch.float32, "output")


def test_more_elements_than_32_bits_count() -> None:
    experts, neurons, width = 2**12 + 1, 32, 2**14
    weights = [torch.randn(experts, neurons, width, dtype=torch.bfloat16, device=GPU) / 128 for _ in range(2)]
    assert weights[0].numel() > 2**31
    for tokens in (1, 9, 40):
        x = torch.randn(tokens, width, dtype=torch.bfloat16, device=GPU)
        scores = torch.zeros(tokens, experts, device=GPU)
        scores[:, -1] = 1
        threshold = torch.full((tokens,), 0.5, device=GPU)
        found = module("host").forward(
            x, scores, threshold, Experts(weights[0], None, None, None, weights[1]), None, "relu"
        )
        h = (x.double() @ weights[0][-1].double().t()).relu()
        expected = h @ weights[1][-1].double()
        assert (found - expected).abs().max() <= LARGE_TOLERANCE[torch.bfloat16] * expected.abs().max()


@pytest.mark.parametrize("way", ["spread", "masked"])
def test_more_hidden_values_than_32_bits_count(way: Way) -> None:
    case = Case(tokens=2**15 + 9, experts=2**9, neurons=2**7, d_in=16, d_out=16, dtype=torch.bfloat16, device=GPU)
    assert case.tokens * case.experts * case.neurons > 2**31
    x, scores, threshold, experts, b2 = case.arguments()
    found = module("host").forward(x, scores, threshold, experts, b2, "relu", way=way)
    last = slice(-20, None)
    expected = checks.reference(x[last], scores[last], threshold[last], experts, b2, "relu")
    assert (found[last] - expected).abs().max() <= LARGE_TOLERANCE[torch.bfloat16] * expected.abs().max()


@pytest.fixture
def by_the_operator(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("SURGEON_GPU", "triton")
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("by_the_operator")
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("tokens", [(1, 4), (2, 150)])
def test_the_operator_trains(tokens: tuple[int, int], compiled: bool) -> None:
    count = tokens[0] * tokens[1]
    x, scores, threshold, experts, b2 = replace(LARGE, tokens=count, neurons=24, experts=40).arguments()
    weights = [t for t in (x, *experts, b2) if t is not None]

    def train(op: object, dtype: torch.dtype) -> tuple[Tensor, ...]:
        x_, w1, b1, w2, b2_ = (t.to(dtype).requires_grad_() for t in weights)

        def call(x: Tensor, *rest: Tensor) -> Tensor:
            w1, b1, w2, b2 = rest
            return op(  # type: ignore[operator,no-any-return]
                x, scores.view(*tokens, -1), threshold.view(tokens), w1, b1, None, None, w2, b2, "gelu"
            )

        run = torch.compile(call, fullgraph=True) if compiled and op is dynamic_k_ffn else call
        y = run(x_.view(*tokens, -1), w1, b1, w2, b2_)
        return (y, *torch.autograd.grad(y.square().sum(), (x_, w1, b1, w2, b2_)))

    for mine, theirs in zip(train(dynamic_k_ffn, torch.float32), train(masked_ffn, torch.float64), strict=True):
        assert_close(mine, theirs, torch.float32, "output or gradient")

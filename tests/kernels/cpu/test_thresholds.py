"""The native kernels' thresholds, found without sorting: in every instruction set what torch finds by sorting."""

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from surgeon.kernels import cpu
from surgeon.kernels.selection import RULES, selection_threshold

ops = torch.ops.surgeon
SORTED = [rule for rule in RULES if rule != "max"]
every_rule = pytest.mark.parametrize("rule", SORTED)
INF, NAN = float("inf"), float("nan")
# Their sums and squares are exact in float32, so that the order of summing does not matter.
exact_scores = st.integers(0, 100).map(lambda n: n / 16)
odd_scores = st.sampled_from([0.0, -0.0, 1.0, 2.5, -1.0, INF, -INF, NAN, 1e-42, 3e38])


@pytest.fixture(scope="module", params=["portable", "avx2", "avx512", "avx512_bf16", "amx_bf16"], autouse=True)
def _instruction_set(request: Any) -> Iterator[None]:
    if not cpu.ready():
        pytest.skip(f"the native kernels do not run here: {cpu.load().why}")
    if request.param not in ops.cpu_instruction_sets():
        pytest.skip(f"this processor has no {request.param}")
    ops.cpu_use_instruction_set(request.param)
    yield
    ops.cpu_use_instruction_set(cpu.load().instruction_set)


def same(scores: torch.Tensor, tau: float, rule: str) -> None:
    share = torch.tensor(tau)
    found, wanted = ops.sorted_threshold(scores, share, rule), ops.sorted_threshold_torch(scores, share, rule)
    assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


def test_they_are_the_native_ones() -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key("surgeon::sorted_threshold", "CPU")


@every_rule
@given(
    rows=st.integers(1, 60).flatmap(lambda n: st.lists(st.lists(exact_scores, min_size=n, max_size=n), min_size=1)),
    tau=st.integers(0, 32).map(lambda n: n / 32),
)
@example(rows=[[0.0] * 9], tau=1.0)
@example(rows=[[3.0]], tau=0.5)
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_ties_zeros_and_both_ends_of_tau(rule: str, rows: list[list[float]], tau: float) -> None:
    same(torch.tensor(rows), tau, rule)


@every_rule
@given(row=st.lists(odd_scores, min_size=1, max_size=20), tau=st.sampled_from([0.0, 0.25, 0.5, 1.0]))
@example(row=[NAN] * 3, tau=0.5)
@example(row=[-0.0, 0.0], tau=0.0)
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_nan_infinity_and_negative_scores(rule: str, row: list[float], tau: float) -> None:
    same(torch.tensor([row, [0.5] * len(row)]), tau, rule)


@every_rule
@pytest.mark.parametrize("experts", [1, 7, 8, 24, 129, 768, 4097])
@pytest.mark.parametrize("power", [1, 12])
def test_random_scores(rule: str, experts: int, power: int) -> None:
    scores = torch.rand(50, experts, generator=torch.Generator().manual_seed(experts)) ** power
    for tau in (0.0, 0.013, 0.1, 0.29, 0.5, 0.77, 0.999, 1.0):
        same(scores, tau, rule)


@every_rule
def test_shapes_strides_and_several_threads(rule: str) -> None:
    scores = torch.rand(40, 3, 700, generator=torch.Generator().manual_seed(0))
    for given_scores in (scores, scores[0, 0], scores[:0], scores.transpose(0, 2), scores[..., ::7]):
        same(given_scores, 0.5, rule)
    wanted, found = ops.sorted_threshold_torch(scores, torch.tensor(0.3), rule), {}

    def call(number: int) -> None:
        found[number] = ops.sorted_threshold(scores, torch.tensor(0.3), rule)

    threads = [threading.Thread(target=call, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[number], wanted) for number in range(4))


@every_rule
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(rule: str, dtype: torch.dtype) -> None:
    scores = torch.rand(6, 30, generator=torch.Generator().manual_seed(0)).to(dtype)
    wide = scores if dtype == torch.float64 else scores.float()
    wanted = ops.sorted_threshold_torch(wide, torch.tensor(0.4), rule)
    assert torch.equal(selection_threshold(scores, torch.tensor(0.4), rule), wanted)


@every_rule
def test_it_is_a_sound_operator(rule: str) -> None:
    scores = torch.rand(5, 30, generator=torch.Generator().manual_seed(0), requires_grad=True)
    torch.library.opcheck(ops.sorted_threshold.default, (scores, torch.tensor(0.4), rule))
    threshold = selection_threshold(scores, torch.tensor(0.4), rule)
    assert not threshold.requires_grad
    batched = torch.vmap(lambda one: selection_threshold(one, torch.tensor(0.4), rule), in_dims=1)(scores.T)
    assert torch.equal(batched, threshold)

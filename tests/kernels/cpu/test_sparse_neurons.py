"""The native kernel of layers that skip neurons: what it computes, and that it reads nothing of what is skipped."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from surgeon.kernels import cpu
from surgeon.kernels.sparse_linear import kept
from surgeon.kernels.sparse_neurons import masked_neurons, selected_neurons, sparse_neurons
from tests.kernels.sparse_neurons import Neurons, neurons

ops = torch.ops.surgeon
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float64: 1e-14}


@pytest.fixture(autouse=True)
def _native() -> Iterator[None]:
    """Always the kernel, and not the dense product; what it chooses and the instruction set are put back."""
    if not cpu.ready():
        pytest.skip(f"the native kernels do not run here: {cpu.load().why}")
    ops.cpu_take_way("kernels")
    yield
    ops.cpu_take_way("")
    ops.cpu_use_instruction_set(cpu.load().instruction_set)


def arguments(args: Neurons, a: Tensor) -> tuple[Any, ...]:
    """Those of `selected_neurons` with the gates a."""
    return (args.x, a, args.w1, args.b1, args.w2, args.b2, *args[7:11], False)


def error(args: Neurons, a: Tensor) -> float:
    """The largest difference from float64 for the same gates, relative to the size of what is added up."""
    found = selected_neurons(*arguments(args, a))
    assert found.dtype == args.x.dtype
    wide = args.to(torch.float64)
    products = a.double() * F.linear(wide.x, wide.w1, wide.b1)
    products -= 0.0 if wide.centre is None else wide.centre.double()
    keep = kept(a, args.scale, None, args.levels, args.tau)
    exact = F.linear(torch.where(keep, products, 0.0), wide.w2.t(), wide.b2)
    up = wide.x.abs() @ wide.w1.abs().t() + (0.0 if wide.b1 is None else wide.b1.abs())
    hidden = a.double().abs() * up + (0.0 if wide.centre is None else wide.centre.double().abs())
    size = hidden @ wide.w2.abs() + (1e-6 if wide.b2 is None else wide.b2.abs())
    difference = (found.double() - exact).abs() / size
    return float(difference.max()) if difference.numel() else 0.0


@settings(max_examples=200, deadline=None)
@given(
    lead=st.sampled_from([(), (1,), (2,), (3,), (2, 2), (7,), (16,), (17,), (0, 3)]),
    d_in=st.sampled_from([1, 3, 8, 16, 31, 100, 411]),
    hidden=st.sampled_from([1, 2, 7, 16, 33, 200]),
    d_out=st.sampled_from([1, 5, 8, 24, 33, 97]),
    tau=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    biases=st.tuples(*[st.booleans()] * 3),
    optional=st.tuples(*[st.booleans()] * 2),
    dtype=st.sampled_from(list(ROUNDING)),
    way=st.sampled_from(["kernels", "kernels", "dense", ""]),
    threads=st.sampled_from([1, 2]),
    place=st.integers(0, 6),
    seed=st.integers(0, 9),
)
def test_every_instruction_set_computes_the_definition(
    lead: tuple[int, ...],
    d_in: int,
    hidden: int,
    d_out: int,
    tau: float,
    biases: tuple[bool, bool, bool],
    optional: tuple[bool, bool],
    dtype: torch.dtype,
    way: str,
    threads: int,
    place: int,
    seed: int,
) -> None:
    known = ops.cpu_instruction_sets()
    ops.cpu_use_instruction_set(known[place % len(known)])
    ops.cpu_take_way(way)
    scale, centre = optional
    args = neurons(
        lead, d_in, hidden, d_out, tau=tau, biases=biases, scale=scale, centre=centre, dtype=dtype, seed=seed
    )
    # Gates that are exactly zero are among them, as a ReLU leaves them.
    a = torch.randn(*lead, hidden, generator=torch.Generator().manual_seed(seed)).to(dtype).relu()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert error(args, a) < ROUNDING[dtype]
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", list(ROUNDING)[:3], ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 16])
def test_several_threads_compute_the_same(tokens: int, dtype: torch.dtype) -> None:
    args = neurons((tokens,), 300, 2003, 500, dtype=dtype)
    one = sparse_neurons(*args)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert torch.equal(sparse_neurons(*args), one)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("activation", ["silu", "relu", "relu_relu"])
def test_the_operator_agrees_with_its_twin(activation: str) -> None:
    args = neurons((5,), 40, 64, 20, activation=activation, dtype=torch.float32)
    torch.testing.assert_close(sparse_neurons(*args), masked_neurons(*args), rtol=1e-5, atol=1e-5)


def test_what_every_token_skips_is_not_read() -> None:
    """Infinite weights there do not matter, and those of a neuron that another token keeps stay with that token."""
    args = neurons((2,), 8, 6, 4, tau=0.5, scale=False, dtype=torch.float32)
    least = float(args.levels[16])
    a = torch.full((2, 6), least / 2)
    a[0, 1] = a[1, 2] = 2 * least + 1
    expected = selected_neurons(*arguments(args, a))
    args.w1[[0, 3, 4, 5]] = float("inf")
    args.w2[[0, 3, 4, 5]] = float("nan")
    assert torch.equal(selected_neurons(*arguments(args, a)), expected)
    args.w1[2] = float("inf")
    found = selected_neurons(*arguments(args, a))
    assert torch.equal(found[0], expected[0])
    assert not found[1].isfinite().all()

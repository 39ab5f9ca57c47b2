"""Linear layers that skip inputs, in Triton's interpreter: `test_linear` runs this file in a process of its own.

By hand: TRITON_INTERPRET=1 pytest tests/kernels/triton/parity_linear.py
"""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from surgeon.kernels.sparse_linear import kept, threshold
from tests.kernels.sparse_linear import Linear, linear, oracle

from .checks import TOLERANCE, _between_nan, module

# Triton's interpreter calculates with NumPy, which warns of NaN.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


def run(args: Linear) -> Tensor:
    """What the kernels give, with several tiles and NaN around every tensor."""
    given = Linear(*(t if t is None or t.dtype == torch.int8 else _between_nan(t) for t in args))
    with patch.multiple(module("linear_host"), _COLUMNS=16, _DEPTH=16):
        y: Tensor = module("linear_host").sparse_linear(*given)
    assert y.dtype == args.x.dtype
    return y


def check(args: Linear) -> None:
    found, expected = run(args).double(), oracle(args)
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= TOLERANCE[args.x.dtype] * max(1.0, float(expected.abs().max()))


@settings(max_examples=40, deadline=None, database=None)
@given(
    lead=st.sampled_from([(), (1,), (1, 1), (2,), (3, 2), (16,)]),
    sizes=st.tuples(st.sampled_from([1, 15, 16, 17, 70, 200]), st.sampled_from([1, 16, 33])),
    tau=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    optional=st.tuples(*[st.booleans()] * 4),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    seed=st.integers(0, 9),
)
def test_the_definition(
    lead: tuple[int, ...],
    sizes: tuple[int, int],
    tau: float,
    optional: tuple[bool, ...],
    dtype: torch.dtype,
    seed: int,
) -> None:
    bias, scale, centre, int8 = optional
    check(linear(lead, *sizes, tau=tau, bias=bias, scale=scale, centre=centre, int8=int8, dtype=dtype, seed=seed))


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("tau", [0.0, 0.25, 0.3, 0.77, 1.0])
def test_the_same_inputs_are_kept_as_in_torch(tau: float, tokens: int) -> None:
    """Also at the threshold: the layer is the identity, which shows them."""
    levels, share = torch.linspace(0, 1, 9) ** 2, torch.tensor(tau)
    near = torch.stack([threshold(levels, share), torch.tensor(0.5), torch.tensor(1.0)]).view(torch.int32)
    # A number more or less in the last place may be on the other side of a threshold that was rounded otherwise.
    x = torch.cat([(near + step).abs().view(torch.float32) * sign for sign in (1, -1) for step in (-2, 0, 2)])
    if tau not in (0.0, 0.25, 1.0):
        x = x[x.abs() != threshold(levels, share)]
    x = x.expand(tokens, -1).contiguous()
    found = run(Linear(x, torch.eye(x.shape[1]), None, None, None, levels, share))
    assert torch.equal(found, torch.where(kept(x, None, None, levels, share), x, 0.0))


@pytest.mark.parametrize("tokens", [1, 3])
def test_rows_that_no_token_keeps_are_not_read(tokens: int) -> None:
    args = linear((tokens,), 50, 40, dtype=torch.float32)
    skipped = ~kept(args.x, args.scale, args.centre, args.levels, args.tau).any(0)
    assert skipped.any()
    expected = run(args)
    args.weight[skipped] = float("nan")
    torch.testing.assert_close(run(args), expected)


def test_a_token_that_is_nan_stays_nan_and_alone() -> None:
    args = linear((3,), 50, 40, tau=1.0, dtype=torch.float32)
    args.x[1, 7] = float("nan")
    found = run(args)
    assert found[1].isnan().all()
    assert found[[0, 2]].isfinite().all()

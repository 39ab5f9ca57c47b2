"""Linear layers that skip inputs on a GPU, against float64 there: skipped where there is none."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
if not torch.cuda.is_available():
    pytest.skip("there is no GPU", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1: kernels would be interpreted", allow_module_level=True)

from surgeon.bench.timing import captured
from surgeon.kernels.sparse_linear import masked_linear, sparse_linear
from surgeon.kernels.triton import backend
from tests.kernels.sparse_linear import Linear, linear

GPU = "cuda"
TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


def on_gpu(args: Linear) -> Linear:
    return Linear(*(None if t is None else t.to(GPU) for t in args))


@pytest.mark.parametrize("int8", [False, True], ids=["float", "int8"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 16, 17])
@pytest.mark.parametrize(("d_in", "d_out"), [(768, 768), (100, 3001), (4096, 75)])
def test_float64(d_in: int, d_out: int, tokens: int, dtype: torch.dtype, int8: bool) -> None:
    args = on_gpu(linear((tokens,), d_in, d_out, dtype=dtype, int8=int8))
    assert backend.skips_inputs(args.x, args.weight) == (tokens <= 16)
    x, weight, bias, scale, centre, levels, tau, w_scale = args
    wide = weight.double() if w_scale is None else weight.double() * w_scale
    expected = masked_linear(x.double(), wide.t(), bias.double(), scale, centre, levels, tau)
    found = sparse_linear(*args)
    assert float((found.double() - expected).abs().max() / expected.abs().max()) < TOLERANCE[dtype]


@pytest.mark.parametrize("tokens", [1, 8])
def test_nothing_waits_for_the_host(tokens: int) -> None:
    args = on_gpu(linear((tokens,), 768, 768, dtype=torch.bfloat16))
    with torch.inference_mode():
        captured(lambda: sparse_linear(*args)).replay()
    torch.cuda.synchronize()


def test_rows_that_no_token_keeps_are_not_read() -> None:
    args = on_gpu(linear((1,), 768, 768, dtype=torch.float32, scale=False, centre=False))
    expected = sparse_linear(*args)
    args.weight[args.x[0].abs() <= args.levels[16]] = float("nan")
    torch.testing.assert_close(sparse_linear(*args), expected, rtol=1e-4, atol=1e-4)

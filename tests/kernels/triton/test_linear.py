"""Linear layers that skip inputs on GPUs: `parity_linear` in a process of its own, and what compilers make of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1: kernels would be interpreted, not compiled", allow_module_level=True)

import triton

from tests.kernels.sparse_linear import Linear

from .checks import module
from .compiling import CHIPS, Launch, build, products_in_32_bits, recorded
from .test_interpreted import HERE, run


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(tmp_path_factory.mktemp("triton"))
        yield


def test_parity() -> None:
    run("-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "parity_linear.py"), interpret=True)


OPERATOR = """
from unittest.mock import patch
import torch
from surgeon.kernels.sparse_linear import masked_linear, sparse_linear
from surgeon.kernels.triton import linear_host
from tests.kernels.sparse_linear import linear
for tokens in (1, 16, 17):
    args = linear((tokens,), 40, 20, dtype=torch.float32)
    with patch.object(linear_host, "sparse_linear", wraps=linear_host.sparse_linear) as taken:
        torch.testing.assert_close(sparse_linear(*args), masked_linear(*args.masked()), rtol=1e-4, atol=1e-4)
    print(taken.call_count)
torch.use_deterministic_algorithms(True)
with patch.object(linear_host, "sparse_linear") as taken:
    sparse_linear(*linear((1,), 40, 20, dtype=torch.float32))
print(taken.call_count)
"""


@pytest.mark.parametrize("chosen", [True, False])
def test_the_operator_takes_them_for_few_tokens(chosen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SURGEON_CPU", "torch")
    monkeypatch.setenv("SURGEON_GPU", "triton" if chosen else "")
    printed = run("-W", "ignore", "-c", OPERATOR, interpret=True).split()
    assert printed == (["1", "1", "0", "0"] if chosen else ["0"] * 4)


def launched(name: str, tokens: int, dtype: torch.dtype, *, int8: bool, width: int = 768) -> Launch:
    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    weight = empty(width, width, dtype=torch.int8 if int8 else dtype)
    given = empty(tokens, width, dtype=dtype), weight, empty(width, dtype=dtype), empty(width), empty(width)
    with recorded(CHIPS[name][0]) as launches:
        module("linear_host").sparse_linear(*Linear(*given, empty(33), empty(), empty(width) if int8 else None))
    (one,) = launches
    return one


def check_fits(name: str, tokens: int, dtype: torch.dtype, int8: bool, scratch: Path) -> None:
    chip, target = CHIPS[name]
    one = launched(name, tokens, dtype, int8=int8)
    built = build(one, target, scratch)
    assert one.name == ("linear_one" if tokens == 1 else "linear_tokens")
    assert 0 < built.registers <= (512 if chip.backend == "hip" else 255)
    assert not built.spilled
    assert built.shared <= chip.shared_memory
    assert built.atomics
    assert not any(atomic.startswith("atom") for atomic in built.atomics), "waits for the value that was there"
    # Without TF32, NVIDIA's tensor cores have no fp32 to multiply.
    assert bool(built.matrix) == (tokens > 1 and (dtype != torch.float32 or chip.backend == "hip"))


@pytest.mark.parametrize("tokens", [1, 16])
@pytest.mark.parametrize("int8", [False, True], ids=["float", "int8"])
def test_fits_the_chip(int8: bool, tokens: int, tmp_path: Path) -> None:
    check_fits("sm_90", tokens, torch.bfloat16, int8, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [1, 16])
@pytest.mark.parametrize("int8", [False, True], ids=["float", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CHIPS)
def test_fits_every_chip(name: str, dtype: torch.dtype, int8: bool, tokens: int, tmp_path: Path) -> None:
    check_fits(name, tokens, dtype, int8, tmp_path)


@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("width", [1, 75, 768])
def test_offsets_have_64_bits(width: int, tokens: int) -> None:
    one = launched("sm_90", tokens, torch.bfloat16, int8=True, width=width)
    assert products_in_32_bits(one, CHIPS["sm_90"][1]) == []


def test_programs_fill_the_chip() -> None:
    """Where there are few outputs, several programs share the inputs of each."""
    one = launched("sm_90", 1, torch.bfloat16, int8=False)
    assert one.programs == (6, 24)
    assert one.constants["STEPS"] == 1
    wide = launched("sm_80", 1, torch.bfloat16, int8=False, width=8192)
    assert wide.programs[0] * wide.programs[1] >= 432 / 2
    assert wide.constants["STEPS"] * wide.constants["DEPTH"] * wide.programs[1] == 8192

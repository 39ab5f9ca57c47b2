"""`parity`, `parity_int8` and `mutants` in other processes: what is interpreted is settled when triton is imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

HERE = Path(__file__).parent
ROOT = HERE.parents[2]


def run(*arguments: str, interpret: bool) -> str:
    """Run Python at the root of the repository and return what it printed; fail with that if it failed."""
    # Nothing of the pytest that runs this: neither its options nor that it may be one of several workers.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"TRITON_INTERPRET": "01"[interpret], "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment["SURGEON_CPU"] = "torch"  # the dispatcher sends what is on a processor to native kernels
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.fail(done.stdout + done.stderr, pytrace=False)
    return done.stdout


def parity(name: str, marked: str) -> None:
    run("-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", marked, str(HERE / f"{name}.py"), interpret=True)


@pytest.mark.parametrize("name", ["parity", "parity_int8"])
def test_parity(name: str) -> None:
    parity(name, "not slow")


@pytest.mark.slow
def test_parity_where_32_bits_overflow() -> None:
    parity("parity", "slow")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["interpreted", "interpreted_int8", "compiled"])
def test_broken_kernels_are_noticed(how: str) -> None:
    printed = run("-W", "ignore", "-m", "tests.kernels.triton.mutants", how, interpret=how != "compiled")
    results = json.loads(printed)
    assert results["original"] == "passes"
    del results["original"]
    unexpected = {name: result for name, result in results.items() if result not in ("noticed", "equivalent")}
    assert results
    assert not unexpected


OPERATOR = """
import sys
import torch
from surgeon.kernels.dynamic_k import dynamic_k_ffn, masked_ffn
from surgeon.kernels.int8 import routed_ffn_int8
from tests.kernels.ffn import arguments
from tests.kernels.int8_calls import int8_call
ours, reference = (arguments((3, 7), 4, 6, 8, 5, gated=True, dtype=torch.float32).require_grad() for _ in range(2))
found, expected = dynamic_k_ffn(*ours), masked_ffn(*reference)
torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
found.square().sum().backward()
expected.square().sum().backward()
call = int8_call((2, 10), gated=True, activation="silu")
torch.testing.assert_close(routed_ffn_int8(*call), torch.ops.surgeon.routed_ffn_int8_torch(*call))
for mine, theirs in zip(ours.leaves(), reference.leaves(), strict=True):
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-3)
print("surgeon.kernels.triton.host" in sys.modules, "surgeon.kernels.triton.int8_host" in sys.modules)
"""


@pytest.mark.parametrize("chosen", [True, False])
def test_the_operator_takes_them_where_they_are_chosen(chosen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SURGEON_GPU", "triton" if chosen else "")
    assert run("-W", "ignore", "-c", OPERATOR, interpret=True).split() == [str(chosen)] * 2

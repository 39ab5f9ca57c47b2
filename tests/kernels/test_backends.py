"""Which backend computes a call, how one is added, and what becomes of an activation that only torch's knows."""

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import surgeon.kernels.dynamic_k
from surgeon.kernels import cpu
from surgeon.kernels.activations import ACTIVATIONS, Activation
from surgeon.kernels.backends import Backend, Call, backends, say_once
from surgeon.kernels.cpu import backend as native_backend
from surgeon.kernels.dynamic_k import dynamic_k_ffn, masked_ffn
from surgeon.kernels.experts import Experts
from surgeon.kernels.torch import backend as torch_backend
from surgeon.kernels.triton import backend as triton_backend

from .ffn import Arguments, arguments


def call_of(args: Arguments) -> Call:
    return surgeon.kernels.dynamic_k._Arguments(*args).call


def test_the_backends_and_their_order() -> None:
    assert backends() == (native_backend.BACKEND, triton_backend.BACKEND, torch_backend.BACKEND)
    assert all(isinstance(backend, Backend) for backend in backends())


TOY = """
import torch
from surgeon.kernels.backends import Backend
from surgeon.kernels.experts import Gradients

def forward(call):
    return torch.full((len(call.x), call.experts.w2.shape[2]), 5.0, dtype=call.x.dtype)

def backward(call, grad, need_x, need_weights):
    return Gradients(torch.full_like(call.x, 7.0), *[None] * 5)

def sorted_threshold(scores, tau, rule):
    return scores.new_full(scores.shape[:-1], 9.0) if scores.dtype == torch.float64 else None

BACKEND = Backend(lambda call: call.x.dtype == torch.float64, forward, {backward}, sorted_threshold)
"""

CALLS = """
import sys
import surgeon.kernels
surgeon.kernels.__path__.append(sys.argv[1])
import torch
from surgeon.kernels.dynamic_k import dynamic_k_ffn, masked_ffn
assert "surgeon.kernels.zoo.backend" not in sys.modules  # the operators are registered without backends
w = torch.ones(2, 3, 4)
x, scores, least = torch.ones(2, 5, 4), torch.ones(2, 5, 2), torch.zeros(2, 5)
x.requires_grad_()
for dtype in (torch.float64, torch.float32):
    wide = [x.to(dtype), scores, least, w.to(dtype), None, None, None, w.to(dtype), None, "relu"]
    y = dynamic_k_ffn(*wide)
    (grad,) = torch.autograd.grad(y.sum(), x)
    (expected,) = torch.autograd.grad(masked_ffn(*wide).sum(), x)
    found = torch.ops.surgeon.selection_threshold(scores.to(dtype), torch.tensor(0.5, dtype=dtype), "energy")
    assert y.shape == (2, 5, 4) and found.shape == (2, 5)
    print(float(y.mean()), bool((grad == expected).all()), float(grad.mean()), float(found.mean()))
"""


@pytest.mark.parametrize("backward", ["backward", "None"])
def test_a_backend_is_a_folder(tmp_path: Path, backward: str) -> None:
    """It is asked before torch's whatever its name, and that one computes what it does not take or does not have."""
    for folder in ("zoo", "no_backend"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").touch()
    (tmp_path / "zoo" / "backend.py").write_text(TOY.replace("{backward}", backward))
    environment = os.environ | {"SURGEON_CPU": "torch", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", CALLS, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    toys, torchs = done.stdout.splitlines()
    assert toys == ("5.0 False 7.0 9.0" if backward == "backward" else "5.0 True 24.0 9.0")
    assert torchs == "24.0 True 24.0 1.0"


@pytest.mark.parametrize("way", ["experts", "spread", "masked"])
def test_on_a_gpu_the_way_is_taken_that_should_be_fastest(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call, asked = call_of(arguments((2, 9), gated=True)), []

    def forward(*given: object, **how: object) -> torch.Tensor:
        asked.append((given, how))
        return torch.full((18, 7), 5.0)

    def backward(*given: object, **how: object) -> None:
        asked.append((given, how))

    host = SimpleNamespace(forward=forward, backward=backward)
    monkeypatch.setattr("surgeon.kernels.triton.host", host, raising=False)
    monkeypatch.setattr(triton_backend, "fastest_way", lambda *_: way)
    assert torch.equal(triton_backend.BACKEND.forward(call), torch.full((18, 7), 5.0))
    grad = torch.ones(18, 7)
    triton_backend.BACKEND.backward(call, grad, True, False)
    how = {"way": way, "ordered": False}
    x, scores, threshold, experts, _, activation = call
    assert asked == [(call, how), ((grad, x, scores, threshold, experts, activation, True, False), how)]


def test_tokens_come_in_one_dimension() -> None:
    args = arguments((2, 9), gated=True)
    call = call_of(args)
    assert call.x.shape == (18, 5)
    assert call.scores.shape == (18, 6)
    assert call.threshold.shape == (18,)
    assert call.experts == Experts(*args[3:8])
    assert call[4:] == args[8:]


@pytest.fixture
def bump(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An activation that is in the table and nowhere else."""
    known = Activation(lambda z: z * torch.exp(-z * z), lambda g, z: g * (1 - 2 * z * z) * torch.exp(-z * z))
    monkeypatch.setitem(ACTIVATIONS, "bump", known)
    say_once.cache_clear()
    yield "bump"
    say_once.cache_clear()


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_an_activation_of_the_table_alone_runs_on_the_cpu_and_that_is_said_once(
    bump: str, gated: bool, caplog: pytest.LogCaptureFixture
) -> None:
    native = cpu.ready()
    ours, theirs = (
        arguments((30,), gated=gated, activation=bump, dtype=torch.float32).require_grad() for _ in range(2)
    )
    with caplog.at_level(logging.INFO, logger="surgeon"):
        found, expected = dynamic_k_ffn(*ours), masked_ffn(*theirs)
        found.square().sum().backward()
        expected.square().sum().backward()
        dynamic_k_ffn(*ours)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    for mine, wanted in zip(ours.leaves(), theirs.leaves(), strict=True):
        torch.testing.assert_close(mine.grad, wanted.grad, rtol=1e-4, atol=1e-4)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == native
    if native:
        assert said[0].startswith(
            "The torch backend runs instead of the native kernels: they know the activations relu,"
        )
        assert said[0].endswith("not bump.")


def test_nothing_is_said_of_what_the_native_kernels_know_or_of_another_dtype(
    bump: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="surgeon"):
        dynamic_k_ffn(*arguments((3,), activation="mish", dtype=torch.float32))
        dynamic_k_ffn(*arguments((3,), activation="mish", dtype=torch.float64))
    assert caplog.records == []


def test_triton_leaves_an_activation_of_the_table_alone_to_torch_and_says_so_once(
    bump: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    # Imported while nothing is interpreted, as for all other tests of this process: that is settled for good then.
    import_module("surgeon.kernels.triton.elementwise")
    monkeypatch.setenv("SURGEON_GPU", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(triton_backend, "_runs_nowhere", lambda _: None)  # as in the interpreter
    known, unknown = (call_of(arguments((3,), activation=name, dtype=torch.float32)) for name in ("silu", bump))
    with caplog.at_level(logging.INFO, logger="surgeon"):
        assert triton_backend.takes(known)
        assert caplog.records == []
        assert not any(triton_backend.takes(unknown) for _ in range(3))
    assert [record.getMessage() for record in caplog.records] == [
        "The torch backend runs instead of Triton's kernels: Triton's kernels know the activations relu, gelu, "
        "gelu_tanh, quick_gelu, silu, relu2, identity, not bump."
    ]


def test_fast_kernels_know_no_activation_that_the_table_has_not() -> None:
    """A name that is spelt otherwise there would never be met."""
    if cpu.ready():
        assert set(torch.ops.surgeon.cpu_activations()) <= set(ACTIVATIONS)
    if triton_backend.available():
        from surgeon.kernels.triton import elementwise

        assert set(elementwise.ACTIVATIONS) <= set(ACTIVATIONS)


def test_of_other_devices_triton_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """It is asked before a backend that is for them."""
    call = call_of(arguments((3,), dtype=torch.float32))
    elsewhere = call._replace(x=call.x.to("meta"))
    with caplog.at_level(logging.INFO, logger="surgeon"):
        assert not triton_backend.takes(elsewhere)
        assert not triton_backend.sorts(elsewhere.x, torch.tensor(0.5, device="meta"))
    assert caplog.records == []

"""The machine of a benchmark and its limits: the rate of matrix products and the memory bandwidth."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import version

import torch
from torch import Tensor

from surgeon.bench.layer import DTYPES
from surgeon.bench.timing import TimedCall, cache_size, clock_for, median_seconds
from surgeon.kernels import cpu
from surgeon.kernels.cpu.crossover import processor
from surgeon.kernels.cpu.crossover import threads as using_threads
from surgeon.kernels.dynamic_k import dynamic_k_ffn
from surgeon.kernels.triton import backend as triton

_SIDE = {"cpu": 1024, "cuda": 8192}  # rows and columns of the matrices multiplied
_BUFFER = {"cpu": 128 << 20, "cuda": 1 << 30}  # bytes read, at least
_PARTS = 5  # of the experts, of which one runs at a time
_REPEATS = 3


@dataclass(frozen=True)
class Machine:
    """The machine of a benchmark.

    instruction_set: used by torch. kernels: used by the operator. clock: "thread" or "wall". gemm: FLOP/s of a large
    matrix product by dtype, always with float32; empty if not measured. bandwidth: bytes per second read from memory;
    on a GPU bytes copied, with both directions counted; None if not measured.
    """

    device: str
    processor: str
    instruction_set: str
    threads: int
    torch: str
    kernels: str
    gpu: str | None
    clock: str
    gemm: dict[str, float]
    bandwidth: float | None


def examine(device: torch.device, threads: int, dtypes: Sequence[str] = (), seconds: float = 0.3) -> Machine:
    """Describe the machine, and measure its limits for some dtypes. seconds: spent on each limit."""
    on_cpu = device.type == "cpu"
    names = dict.fromkeys(("float32", *dtypes)) if dtypes else {}
    with using_threads(threads):
        gemm = {name: _gemm(device, name, threads, seconds) for name in names}
        bandwidth = _bandwidth(device, threads, seconds) if names else None
    return Machine(
        device=device.type,
        processor=processor(),
        instruction_set=torch.backends.cpu.get_cpu_capability(),
        threads=threads,
        torch=torch.__version__,
        kernels=_kernels() if on_cpu else _gpu_kernels(),
        gpu=None if on_cpu else torch.cuda.get_device_name(device),
        clock="thread" if on_cpu and threads == 1 else "wall",
        gemm=gemm,
        bandwidth=bandwidth,
    )


def _kernels() -> str:
    state = cpu.load()
    return f"native, {state.instruction_set}" if state.path is not None else f"torch backend ({state.why.rstrip('.')})"


def _gpu_kernels() -> str:
    if os.environ.get("SURGEON_GPU") == "torch":
        return "torch backend (SURGEON_GPU=torch)"
    return f"Triton {version('triton')}" if triton.available() else "torch backend (Triton is not installed)"


def _gemm(device: torch.device, dtype: str, threads: int, seconds: float) -> float:
    side = _SIDE[device.type]
    a, b = (torch.randn(side, side, device=device).to(DTYPES[dtype]) for _ in range(2))
    return float(2 * side**3 / _least(lambda: torch.mm(a, b), device, threads, seconds))


def _bandwidth(device: torch.device, threads: int, seconds: float) -> float:
    size = max(_BUFFER[device.type], 4 * cache_size() if device.type == "cpu" else 0)
    matrix = torch.ones(size // 4 // 4096, 4096, device=device)
    if device.type != "cpu":
        copy = torch.empty_like(matrix)
        return 2 * matrix.nbytes / _least(lambda: copy.copy_(matrix), device, threads, seconds)
    vector = torch.ones(4096)
    ways: list[tuple[Callable[[], object], float]] = [
        (lambda: matrix.sum(), 1.0),
        (lambda: torch.mv(matrix, vector), 1.0),
        (_reading_experts(matrix), 1 / _PARTS),
    ]
    # The best of them: none reads as fast as the machine can, and ours must not be compared with a limit that it beats.
    return max(share * matrix.nbytes / _least(way, device, threads, seconds / len(ways)) for way, share in ways)


def _reading_experts(weights: Tensor) -> Callable[[], object]:
    """The operator as it reads the weights of one token's experts, another part of them at every call."""
    w1, w2 = weights.view(2, -1, 32, 256)
    x, threshold = torch.ones(1, w1.shape[-1]), torch.full((1,), 0.5)
    experts = torch.arange(len(w1)).unsqueeze(0)
    scores = itertools.cycle([(experts % _PARTS == part).float() for part in range(_PARTS)])
    # An activation without zeros, which would let it leave out a part of w2.
    return lambda: dynamic_k_ffn(x, next(scores), threshold, w1, None, None, None, w2, None, "identity")


def _least(call: Callable[[], object], device: torch.device, threads: int, seconds: float) -> float:
    """Least seconds of a call, as the limit of the machine. On a GPU the median is taken, which differs little."""
    if device.type != "cpu":
        return median_seconds({"": TimedCall(call, nullcontext)}, device, seconds=seconds, threads=threads)[""]
    call()
    clock, end = clock_for(threads), time.monotonic() + 10 * seconds
    found: list[float] = []
    while len(found) < _REPEATS or (sum(found) < seconds and time.monotonic() < end):
        started = clock()
        call()
        found.append(clock() - started)
    return min(found)

"""From which share of the experts on the dense product is faster: measured on this machine, and kept.

For a grid of tokens and expert sizes a layer is run with every expert by both ways. The kernels' time grows with the
pairs of tokens and experts, the dense product's does not, so they cross at dense time / kernels' time.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

TOKENS, NEURONS = (1, 8, 64, 512), (4, 8, 16, 32, 64, 128)
_WIDTH, _HIDDEN = 512, 1024
_SECONDS = 0.03  # for one point and one way
# Shares at which everything, and nothing, is left to the dense product.
_NEVER_OURS, _ALWAYS_OURS = -1.0, 2.0
_FILE = "crossover.json"


def load(directory: Path) -> None:
    """Tell the kernels what was measured on this machine; measure it if it was not."""
    path, processor = directory / _FILE, _processor()
    try:
        known = json.loads(path.read_text())
        shares = known.get(processor)
    except (OSError, ValueError):
        known, shares = {}, None
    if shares is None:
        shares = list(measure())
        _write(path, json.dumps(known | {processor: shares}))
    for half, tokens, neurons, share in shares:
        torch.ops.surgeon.cpu_set_crossover(half, tokens, neurons, share)


def measure() -> Iterator[tuple[bool, int, int, float]]:
    """(bfloat16 or not, tokens, neurons of an expert, share of the experts from which on dense is faster)."""
    grid = [(half, tokens, neurons) for half in (False, True) for tokens in TOKENS for neurons in NEURONS]
    before = {point: torch.ops.surgeon.cpu_get_crossover(*point) for point in grid}
    dense: dict[tuple[bool, int], float] = {}  # does not depend on the experts
    try:
        for half, tokens, neurons in grid:
            call = _layer(torch.bfloat16 if half else torch.float32, tokens, neurons)
            if (half, tokens) not in dense:
                torch.ops.surgeon.cpu_set_crossover(half, tokens, neurons, _NEVER_OURS)
                dense[half, tokens] = _seconds(call)
            torch.ops.surgeon.cpu_set_crossover(half, tokens, neurons, _ALWAYS_OURS)
            yield half, tokens, neurons, min(1.0, dense[half, tokens] / _seconds(call))
    finally:
        for point, share in before.items():
            torch.ops.surgeon.cpu_set_crossover(*point, share)


def _layer(dtype: torch.dtype, tokens: int, neurons: int) -> Callable[[], object]:
    """A call of a layer whose experts are all selected."""
    experts = _HIDDEN // neurons
    # Not random: a program that calls this must find its random state as it left it.
    w1, w2 = (torch.full((experts, neurons, _WIDTH), 0.01, dtype=dtype) for _ in range(2))
    b1, b2 = torch.zeros(experts, neurons, dtype=dtype), torch.zeros(_WIDTH, dtype=dtype)
    x, scores, threshold = torch.ones(tokens, _WIDTH, dtype=dtype), torch.ones(tokens, experts), torch.zeros(tokens)
    return lambda: torch.ops.surgeon.dynamic_k_ffn(x, scores, threshold, w1, b1, None, None, w2, b2, "relu")


def _seconds(call: Callable[[], object]) -> float:
    """The least that a call takes on one thread, of the thread's own time, so that other work does not count."""
    least, spent = math.inf, 0.0
    with torch.inference_mode(), threads(1):
        call()
        while spent < _SECONDS:
            start = time.thread_time()
            call()
            took = time.thread_time() - start
            least, spent = min(least, took), spent + took
    return least


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch use so many threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _processor() -> str:
    """What the measurement holds for: this processor, with this instruction set and number of threads."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    except OSError:
        model = ""
    capability, chosen = torch.backends.cpu.get_cpu_capability(), os.environ.get("SURGEON_CPU", "")
    return f"{model or platform.processor()}, {capability}, {chosen}"


def _write(path: Path, text: str) -> None:
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write(text)
    Path(file.name).replace(path)

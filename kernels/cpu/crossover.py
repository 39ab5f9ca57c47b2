"""Measure from which share of the experts on the dense product is faster on this machine, and store the result.

For a grid of tokens and expert sizes, a layer is run both ways with a share of the experts. The kernels' time grows
with the number of (token, expert) pairs, but the dense product's does not. So both take equal time at about that share
times dense time / kernels' time. If the result is smaller than the share that was run, it is run as well, because some
of the kernels' time is spent on every expert, however few tokens select it.

With few tokens, reading the weights takes most of the time, which does not grow in this way. Then every expert is tried
too, and several layers run in turn, too many for the caches, as in a model.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger("surgeon")

TOKENS, NEURONS = (1, 8, 64, 512, 2048), (4, 8, 16, 32, 64, 128)
# As in models: the dense product of a smaller layer runs at another rate.
_WIDTH, _HIDDEN = 768, 2048
_LAYERS, _FEW_TOKENS = 8, 64
_ROUNDS, _CLEAR, _LONG = 5, 1.5, 0.5  # a round that takes this many seconds is enough
_SHARE = 0.5
_FILE = "crossover.json"
_DENSE_LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")  # torch's libraries read these


def load(directory: Path) -> None:
    """Give the kernels the results that were measured on this machine. Measure them first if necessary."""
    for half, tokens, neurons, share in measured_once(directory / _FILE, measure, _is_share):
        _give(half, tokens, neurons, share)


def measured_once(path: Path, measure: Callable[[], Iterator[Any]], is_row: Callable[[Any], bool]) -> list[Any]:
    """Return the rows that `measure` yields on this machine, from a file where they are stored.

    is_row: whether this is such a row.
    """
    key, known = _measured_on(), _stored(path)
    rows = known.get(key)
    if not isinstance(rows, list) or not rows or not all(map(is_row, rows)):  # a file may hold anything
        rows = known[key] = list(measure())
        try:
            _write(path, json.dumps(known))
        except OSError as error:
            log.warning("%s cannot be written, so every process measures again: %s", path, error)
    return rows


def _give(half: bool, tokens: int, neurons: int, share: float) -> None:
    torch.ops.surgeon.cpu_set_crossover(half, tokens, neurons, share)


def _stored(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _is_share(row: Any) -> bool:
    match row:
        case [bool(), int(tokens), int(neurons), int() | float() as share]:
            return tokens in TOKENS and neurons in NEURONS and 0.0 <= share <= 1.0
    return False


def measure() -> Iterator[tuple[bool, int, int, float]]:
    """Yield (bfloat16 or not, tokens, neurons of an expert, share of the experts from which on dense is faster)."""
    grid = [(half, tokens, neurons) for half in (False, True) for tokens in TOKENS for neurons in NEURONS]
    weights: dict[bool, Tensor] = {}
    for half, tokens, neurons in grid:
        if half not in weights:
            # Not random: a program that calls this must find its random state as it left it.
            weights = {half: torch.full((2 * _LAYERS, _HIDDEN, _WIDTH), 0.01, dtype=_dtype(half))}
        found = _measured(weights[half], tokens, neurons, _SHARE)
        if tokens > _FEW_TOKENS and found < _SHARE:
            experts = _HIDDEN // neurons
            found = _measured(weights[half], tokens, neurons, max(1, round(found * experts)) / experts)
        if tokens <= _FEW_TOKENS and found >= _SHARE:
            found = max(found, _measured(weights[half], tokens, neurons, 1.0))
        yield half, tokens, neurons, min(1.0, found)


def _measured_on() -> str:
    """What a measurement holds for: this processor, and the instructions that the kernels and the dense product use."""
    kernels = os.environ.get("SURGEON_CPU") or torch.ops.surgeon.cpu_instruction_sets()[0]
    limits = (f"{name}={os.environ[name]}" for name in _DENSE_LIMITS if name in os.environ)
    return ", ".join((processor(), kernels, torch.backends.cpu.get_cpu_capability(), *limits))


def _measured(weights: Tensor, tokens: int, neurons: int, share: float) -> float:
    """The share of the experts from which on dense is faster, from a run of `share`; above 1 if dense never is."""
    return share * dense_over_ours(_layers(weights, tokens, neurons, share), share)


def _dtype(half: bool) -> torch.dtype:
    return torch.bfloat16 if half else torch.float32


def _layers(weights: Tensor, tokens: int, neurons: int, share: float) -> Callable[[], None]:
    """A call of one layer, or of several for few tokens; every token selects a share of the experts."""
    experts, dtype = _HIDDEN // neurons, weights.dtype
    w1, w2 = weights.view(2, _LAYERS, experts, neurons, _WIDTH)
    b1, b2 = torch.zeros(experts, neurons, dtype=dtype), torch.zeros(_WIDTH, dtype=dtype)
    x = torch.ones(tokens, _WIDTH, dtype=dtype)
    scores = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(0))
    threshold = scores.topk(round(share * experts)).values[:, -1]
    pairs = list(zip(w1, w2, strict=True))[: _LAYERS if tokens <= _FEW_TOKENS else 1]

    def call() -> None:
        for up, down in pairs:
            torch.ops.surgeon.dynamic_k_ffn(x, scores, threshold, up, b1, None, None, down, b2, "relu")

    return call


def dense_over_ours(call: Callable[[], None], share: float) -> float:
    """How many times as long the dense product takes as the kernels, in CPU time of one thread.

    Both are called in turn and the median of their ratios is taken, so that other work disturbs the result little.
    """
    ratios = []
    with torch.inference_mode(), threads(1):
        for _ in range(_ROUNDS + 1):
            taken = []
            for way in ("dense", "kernels"):
                with taking(way):
                    start = time.thread_time()
                    call()
                    taken.append(time.thread_time() - start)
            ratios.append(taken[0] / taken[1])
            if share * ratios[-1] > _CLEAR or sum(taken) > _LONG:
                break
    return statistics.median(ratios[1:] or ratios)  # the first warms up


@contextlib.contextmanager
def taking(way: str) -> Iterator[None]:
    """Send all calls to the "kernels" or to the "dense" product within the context, whichever is faster."""
    torch.ops.surgeon.cpu_take_way(way)
    try:
        yield
    finally:
        torch.ops.surgeon.cpu_take_way("")


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch use `count` threads within the context."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def processor() -> str:
    """Return the name of the CPU model."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return model or platform.processor() or platform.machine()


def _write(path: Path, text: str) -> None:
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write(text)
    Path(file.name).replace(path)

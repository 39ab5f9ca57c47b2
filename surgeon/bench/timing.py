"""Time several calls: in turn on a CPU, in sequence with Triton's `do_bench` on a GPU."""

from __future__ import annotations

import importlib
import logging
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

log = logging.getLogger("surgeon")

_ROUNDS = 5  # at least
_WARMUP = 10  # milliseconds, on a GPU
_MOST_ROUNDS = 1000
_USUAL_CACHE = 32 << 20
_MOST_CACHE = 256 << 20


@dataclass(frozen=True)
class TimedCall:
    """A call to time. around: a context for each call, which is not timed.

    first: on a CPU, run before each call and after the caches were emptied, and not timed.
    waits: the host waits for the device during the call, so that a CUDA graph cannot capture it.
    """

    run: Callable[[], object]
    around: Callable[[], AbstractContextManager[None]] = nullcontext
    waits: bool = False
    first: Callable[[], object] | None = None


def median_seconds(
    calls: Mapping[str, TimedCall], device: torch.device, *, seconds: float, threads: int, early: bool = True
) -> dict[str, float]:
    """Median seconds of each call. Each call must have run once before.

    On a CPU the calls take turns, so that a slow moment of the machine affects all of them. Each runs at least five
    times, and for `seconds` on average. Before each call the caches are emptied, as the other layers of a model would
    do. With one thread, the CPU time of the thread is taken, so that other work on the machine does not count. Ctrl-C
    ends it early, once each has run, unless `early` is False.

    On a GPU `do_bench` times the calls in sequence, with the cache emptied. Calls that do not wait for the device are
    captured in a CUDA graph and replayed. Otherwise small calls would show how fast Python starts kernels.
    """
    if device.type != "cpu":
        return {name: _on_gpu(call, seconds) for name, call in calls.items()}
    clock = clock_for(threads)
    other = torch.ones(2 * cache_size() // 4)  # zeros may all be one page of memory
    found: dict[str, list[float]] = {name: [] for name in calls}
    end = time.monotonic() + 2.0 * seconds * len(calls)  # includes what is not timed
    spent, rounds = 0.0, 0
    try:
        while rounds < _ROUNDS or (rounds < _MOST_ROUNDS and spent < seconds * len(calls) and time.monotonic() < end):
            for name, call in calls.items():
                other.sum()
                with call.around():
                    if call.first is not None:
                        call.first()
                    started = clock()
                    call.run()
                    took = clock() - started
                found[name].append(took)
                spent += took
            rounds += 1
    except KeyboardInterrupt:
        if not early or not all(found.values()):
            raise
        log.warning("Stopped after %d rounds: these are the medians so far.", rounds)
    return {name: statistics.median(times) for name, times in found.items()}


def clock_for(threads: int) -> Callable[[], float]:
    """A clock in seconds: CPU time of this thread if `threads` is 1, else wall time."""
    return time.thread_time if threads == 1 else time.perf_counter


def cache_size() -> int:
    """Bytes of the largest cache of the CPU; a guess where the system does not tell."""
    sizes = [_USUAL_CACHE // 2]
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        if text[:-1].isdigit():
            sizes.append(int(text[:-1]) << {"K": 10, "M": 20}.get(text[-1], 0))
    return min(max(sizes), _MOST_CACHE)


def _on_gpu(call: TimedCall, seconds: float) -> float:
    testing = importlib.import_module("triton.testing")  # not installed with every torch
    with call.around():
        run = call.run if call.waits else captured(call.run).replay
        milliseconds = testing.do_bench(run, warmup=_WARMUP, rep=max(1, int(1000 * seconds)), return_mode="median")
        return float(milliseconds) / 1000


def captured(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """Capture a call in a CUDA graph. The graph owns what the call allocates, and each replay overwrites it.

    Raises:
        RuntimeError: the host waits for the device during the call.
    """
    run()  # compiles kernels, which is not possible during capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph

"""Time linear layers that read only the inputs that matter, on this machine."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

from surgeon.bench.linear import WEIGHTS, LinearCase, LinearCell, time_linear
from surgeon.bench.machine import Machine, examine
from surgeon.jobs.bench import device_of, names, numbers
from surgeon.jobs.options import LinearOptions, TimingOptions
from surgeon.kernels import cpu
from surgeon.progress import Stage, Tell, unshown


@dataclass(frozen=True)
class LinearBenchmark:
    """Times of linear layers with random weights on this machine."""

    machine: Machine
    cells: list[LinearCell]


def bench_linear(
    layers: LinearOptions,
    timing: TimingOptions,
    *,
    stage: Stage = unshown,
    progress: Tell | None = None,
) -> LinearBenchmark:
    """Time every layer that the options ask for. stage: called with the name of each step before the timing.

    Raises:
        UsageError: as `device_of`; a value is not a number or a name, or out of range.
    """
    widths = [numbers(name, typed, int, 1, None) for name, typed in (("d-in", layers.d_in), ("d-out", layers.d_out))]
    dtypes, tokens = names("dtype", layers.dtype, WEIGHTS), numbers("tokens", layers.tokens, int, 1, None)
    shares, device = numbers("share", layers.share, float, 1e-6, 1.0), device_of(timing)
    if device.type == "cpu" and not cpu.built():
        with stage("building the kernels"):
            cpu.load()
    cases = [
        LinearCase(d_in, d_out, dtype, count, share)
        for dtype, d_in, d_out, count, share in product(dtypes, *widths, tokens, shares)
    ]
    machine = examine(device, timing.threads)
    return LinearBenchmark(machine, time_linear(cases, machine, seconds=timing.seconds, progress=progress))

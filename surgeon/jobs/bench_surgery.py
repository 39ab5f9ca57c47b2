"""Time a saved surgery end to end, on this machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.utils import _pytree as pytree

from surgeon.bench.machine import Machine, examine
from surgeon.bench.whole import WholeTimes, repeated, time_whole
from surgeon.errors import UsageError
from surgeon.graph.traced import move
from surgeon.jobs.bench import device_of, numbers
from surgeon.jobs.open_model import Opened
from surgeon.jobs.options import TimingOptions
from surgeon.progress import Progress


@dataclass(frozen=True)
class SurgeryBenchmark:
    """Times of a saved surgery end to end, on this machine.

    batch: samples in a call. length: tokens in each sample; None for as many as the example inputs have.
    """

    model: str
    batch: int
    length: int | None
    machine: Machine
    times: WholeTimes
    notes: tuple[str, ...] = ()

    @property
    def called_with(self) -> str:
        """The size of a call in words."""
        tokens = "" if self.length is None else f", {self.length} token{'s' * (self.length != 1)} each"
        return f"{self.batch} sample{'s' * (self.batch != 1)}{tokens}"


def check_surgery(tau: str | None, timing: TimingOptions, *, batch: int, length: int | None) -> tuple[float, ...]:
    """Check the options before anything is loaded. Returns the values of tau to time besides the stored ones.

    Raises:
        UsageError: as `device_of`; a tau is outside [0, 1], or a batch or length is below 1.
    """
    if batch < 1 or (length is not None and length < 1):
        raise UsageError("--batch and --length must be at least 1.")
    device_of(timing)
    return () if tau is None else tuple(numbers("tau", tau, float, 0.0, 1.0))


def bench_surgery(
    opened: Opened,
    taus: Sequence[float],
    timing: TimingOptions,
    *,
    batch: int,
    length: int | None = None,
    dense: Opened | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> SurgeryBenchmark:
    """Time a saved surgery at the stored tau and at others. Its graph and the dense model move to the device.

    Args:
        batch: samples in a call. length: tokens in a sample, None for as many as the example inputs have.
        dense: the model before the surgery, to be timed as well.

    Raises:
        UsageError: as `device_of`; the model has no experts, or does not take so many samples or tokens.
    """
    device = device_of(timing)
    inputs = pytree.tree_map_only(torch.Tensor, lambda t: t.to(device), opened.inputs)
    args, kwargs = repeated(inputs, batch, length)
    if device.type != "cpu":
        for model in (opened, dense):
            if model is not None:
                move(model.graph, device)
    times = time_whole(
        opened.graph, args, kwargs, (None, *taus), dense=None if dense is None else dense.graph,
        seconds=timing.seconds, threads=timing.threads, progress=progress,
    )  # fmt: skip
    notes = []
    if dense is None:
        notes.append("The dense model was not timed. To compare with it, give it with --dense.")
    notes += [f"{what}: {why.rstrip('.')}." for what, why in times.why.items()]
    return SurgeryBenchmark(opened.spec, batch, length, examine(device, timing.threads), times, tuple(notes))

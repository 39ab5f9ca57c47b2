"""Time a saved surgery end to end, on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from surgeon.bench.against import Compared, check_engines, compare_engines
from surgeon.bench.machine import Machine, examine
from surgeon.bench.whole import WholeTimes, repeated, time_whole
from surgeon.data.batch import Batch
from surgeon.errors import UsageError
from surgeon.graph.calls import as_args_kwargs
from surgeon.graph.traced import move
from surgeon.jobs.bench import device_of, numbers
from surgeon.jobs.open_model import Opened
from surgeon.jobs.options import TimingOptions
from surgeon.progress import Tell

_CALIBRATION = 300  # samples


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
        return _called_with(self.batch, self.length)


@dataclass(frozen=True)
class EngineBenchmark:
    """Times of a saved surgery and of its dense model in several engines, on this machine, as `SurgeryBenchmark`.

    samples: on which ranges of inputs were measured where inputs are quantised. gain: of `found`.
    """

    model: str
    batch: int
    length: int | None
    machine: Machine
    samples: int
    found: Compared
    gain: float | None
    notes: tuple[str, ...] = ()

    @property
    def called_with(self) -> str:
        """The size of a call in words."""
        return _called_with(self.batch, self.length)


def _called_with(batch: int, length: int | None) -> str:
    tokens = "" if length is None else f", {length} token{'s' * (length != 1)} each"
    return f"{batch} sample{'s' * (batch != 1)}{tokens}"


def check_against(
    against: str, dense: str | None, tau: str | None, timing: TimingOptions, files: Sequence[Path]
) -> tuple[str, ...]:
    """Return the engines to compare with, checked before anything is loaded.

    Raises:
        UsageError: an engine does not exist or is not installed, or other options do not fit.
    """
    names = tuple(dict.fromkeys(name.strip() for name in against.split(",") if name.strip()))
    check_engines(names)
    if dense is None:
        raise UsageError("--against compares with the dense model. Give it with --dense.")
    if tau is not None:
        raise UsageError("--against times the surgery at its stored tau. Set it with surgeon set.")
    if device_of(timing).type != "cpu":
        raise UsageError("--against compares engines on the CPU. Give --device cpu.")
    if any(file.suffix != ".json" for file in files):
        raise UsageError("--against has no plot. Give a .json file with -o.")
    return names


def bench_engines(
    opened: Opened,
    dense: Opened,
    engines: Sequence[str],
    timing: TimingOptions,
    *,
    batch: int,
    length: int | None = None,
    progress: Tell | None = None,
) -> EngineBenchmark:
    """Time a saved surgery at its stored tau and the dense model in several engines.

    Ranges of inputs are measured on the data the surgery was opened with, or on its example inputs.

    Raises:
        UsageError: the models do not take so many samples or tokens, or an engine is not installed.
    """
    args, kwargs = repeated(opened.inputs, batch, length)
    rows, notes = _calibration(opened), tuple[str, ...]()
    if opened.data is None and "openvino" in engines:
        notes = ("Ranges of inputs were measured on the example inputs alone. Give texts or images with --data.",)
    found = compare_engines(
        opened.graph, dense.graph, args, kwargs, engines, rows,
        seconds=timing.seconds, threads=timing.threads, progress=progress,
    )  # fmt: skip
    machine = examine(device_of(timing), timing.threads)
    return EngineBenchmark(opened.spec, batch, length, machine, len(rows), found, found.gain, notes)


def _calibration(opened: Opened) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Samples of the training data, each as a call; the example inputs without data."""
    if opened.data is None:
        return [as_args_kwargs(opened.inputs)]
    rows: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    for item in opened.data.train:
        made = Batch.from_any(item)
        parts = [*made.args, *made.kwargs.values()]
        for at in range(min(len(part) for part in parts)):
            one = slice(at, at + 1)
            rows.append(
                (tuple(part[one] for part in made.args), {name: part[one] for name, part in made.kwargs.items()})
            )
        if len(rows) >= _CALIBRATION:
            break
    return rows[:_CALIBRATION]


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
    progress: Tell | None = None,
) -> SurgeryBenchmark:
    """Time a saved surgery at the stored tau and at others. Its graph and the dense model move to the device.

    Args:
        batch: samples in a call. length: tokens in a sample, None for as many as the example inputs have.
        dense: the model before the surgery, to be timed as well.

    Raises:
        UsageError: as `device_of`; the model has no layers that skip, or does not take so many samples or tokens.
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

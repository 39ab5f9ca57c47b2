"""Time layers with random weights by every method, on this machine."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import cast

from surgeon.bench.engines import ENGINES
from surgeon.bench.grid import Cell, time_grid
from surgeon.bench.layer import MASKS, Case, MaskKind
from surgeon.bench.machine import Machine, examine
from surgeon.bench.methods import METHODS
from surgeon.errors import UsageError
from surgeon.jobs.bench import device_of, grid_of, names
from surgeon.jobs.options import LayerOptions, TimingOptions
from surgeon.kernels import cpu
from surgeon.kernels.activations import activation as activation_of
from surgeon.progress import Stage, Tell, unshown
from surgeon.surgery.record import parse, read_json


@dataclass(frozen=True)
class LayerBenchmark:
    """Times of layers with random weights, computed by every method on this machine.

    untimed: the number of layers that are missing, because the run was stopped.
    """

    machine: Machine
    width: int
    hidden: int
    gated: bool
    activation: str
    cells: list[Cell]
    untimed: int = 0


def bench_layer(
    layers: LayerOptions,
    timing: TimingOptions,
    *,
    activation: str,
    mask: str,
    methods: str | None,
    against: str | None = None,
    earlier: LayerBenchmark | None = None,
    stage: Stage = unshown,
    progress: Tell | None = None,
) -> LayerBenchmark:
    """Time every method on every layer that the options ask for. Ctrl-C and SIGTERM end it with what is done by then.

    Args:
        activation: its name. mask: how experts are selected, as names separated by commas. methods: likewise; None for
            all of torch's and ours. against: other engines, likewise. earlier: a stopped run to go on with. stage:
            called with the name of each step before the timing.

    Raises:
        UsageError: as `grid_of` and `device_of`; an activation, a mask, a method or an engine does not exist, or is not
            installed; the earlier run had other options or another machine.
        KeyboardInterrupt: it was stopped before a layer was done.
    """
    cases, chosen, device = _cases(layers, activation, mask), _methods(methods, against), device_of(timing)
    if device.type == "cpu" and not cpu.built():
        with stage("building the kernels"):
            cpu.load()
    shape = cases[0].shape
    if earlier is not None:
        machine, done = earlier.machine, earlier.cells
        here = replace(examine(device, timing.threads), gemm=machine.gemm, bandwidth=machine.bandwidth)
        made = LayerBenchmark(here, shape.width, shape.hidden, shape.gated, activation, done, len(cases) - len(done))
        _check_same(earlier, made, cases, chosen)
    else:
        with stage("measuring the machine's limits"):
            dtypes = list(dict.fromkeys(case.dtype for case in cases))
            machine, done = examine(device, timing.threads, dtypes, timing.seconds), []
    with _stopped_by_sigterm():
        cells = [*done, *time_grid(cases[len(done) :], chosen, machine, seconds=timing.seconds, progress=progress)]
    untimed = len(cases) - len(cells)
    return LayerBenchmark(machine, shape.width, shape.hidden, shape.gated, activation, cells, untimed)


def read_stopped(files: Sequence[Path] | None) -> LayerBenchmark:
    """Read the numbers of a stopped run from the first `.json` file.

    Raises:
        UsageError: there is no such file, or its run was not stopped. LoadError: it is damaged.
    """
    file = next((file for file in files or () if file.suffix == ".json"), None)
    if file is None:
        raise UsageError(
            "--resume goes on from the numbers of a stopped run. Give the .json file that has them with -o."
        )
    if not file.is_file():
        raise UsageError(f"There is nothing to resume: no {file}. Run the command without --resume.")
    found = parse(LayerBenchmark, read_json(file), file)
    if not found.untimed:
        raise UsageError(f"There is nothing to resume: {file} is complete. Run the command without --resume.")
    return found


def _check_same(earlier: LayerBenchmark, now: LayerBenchmark, cases: Sequence[Case], methods: Sequence[str]) -> None:
    """Refuse to go on with a run that measured something else.

    Raises:
        UsageError: names the first difference.
    """

    def told(run: LayerBenchmark) -> dict[str, object]:
        return {**vars(run.machine), **vars(run), "machine": None, "cells": None}

    pairs = [(what, value, told(now)[what]) for what, value in told(earlier).items()]
    pairs += [
        ("layer", (cell.dtype, cell.tokens, cell.size, cell.mask, cell.share), _key(case))
        for cell, case in zip(earlier.cells, cases, strict=False)
    ]
    pairs += [("methods", tuple(cell.methods), tuple(methods)) for cell in earlier.cells[:1]]
    for what, before, after in pairs:
        if before != after:
            raise UsageError(
                f"The stopped run differs from this one. Its {what}: {before}; now: {after}. Give the same options on "
                "the same machine, or run the command without --resume."
            )


def _key(case: Case) -> tuple[str, int, int, str, float]:
    return case.dtype, case.tokens, case.shape.size, case.mask, case.share


@contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
    """Let SIGTERM, by which other programs end a process, stop the timing as Ctrl-C does."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _cases(layers: LayerOptions, activation: str, mask: str) -> list[Case]:
    """The layers to time. Those with the same dtype and number of tokens follow each other."""
    activation_of(activation)
    masks = cast("tuple[MaskKind, ...]", names("mask", mask, MASKS))
    grid = grid_of(layers)
    return [
        Case(shape, dtype, tokens, mask, share, activation)
        for dtype, tokens, shape, mask, share in product(grid.dtypes, grid.tokens, grid.shapes, masks, grid.shares)
    ]


def _methods(typed: str | None, against: str | None) -> tuple[str, ...]:
    """The methods to time, in the order of `METHODS`."""
    own = [name for name in METHODS if name not in ENGINES]
    # A hundred columns hold no more.
    usual = [name for name in own if name not in ("ours_int4", "ours_fp8") and (against or name != "ours_int8")]
    chosen = usual if typed is None else list(names("methods", typed.replace("-", "_"), own))
    engines = [] if against is None else list(names("against", against.replace("-", "_"), ENGINES))
    for name in engines:
        if missing := [package for package in ENGINES[name].packages if find_spec(package) is None]:
            raise UsageError(
                f"--against {name}: {', '.join(missing)} is not installed. Install it: "
                f"pip install {' '.join(ENGINES[name].packages)}."
            )
    return tuple(name for name in METHODS if name in chosen or name in engines)

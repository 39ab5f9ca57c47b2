"""Time layers with random weights by every method, on this machine."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import product
from typing import cast

from surgeon.bench.grid import Cell, time_grid
from surgeon.bench.layer import MASKS, Case, MaskKind
from surgeon.bench.machine import Machine, examine
from surgeon.bench.methods import METHODS
from surgeon.jobs.bench import device_of, grid_of, names
from surgeon.jobs.open_model import Stage
from surgeon.jobs.options import LayerOptions, TimingOptions
from surgeon.kernels import cpu
from surgeon.kernels.activations import activation as activation_of
from surgeon.progress import Progress


@dataclass(frozen=True)
class LayerBenchmark:
    """Times of layers with random weights, computed by every method on this machine."""

    machine: Machine
    width: int
    hidden: int
    gated: bool
    activation: str
    cells: list[Cell]


def bench_layer(
    layers: LayerOptions,
    timing: TimingOptions,
    *,
    activation: str,
    mask: str,
    methods: str | None,
    stage: Stage = nullcontext,
    progress: Callable[[Progress], None] | None = None,
) -> LayerBenchmark:
    """Time every method on every layer that the options ask for.

    Args:
        activation: its name. mask: how experts are selected, as names separated by commas. methods: likewise; None for
            all. stage: called with the name of each step before the timing.

    Raises:
        UsageError: as `grid_of` and `device_of`; an activation, a mask or a method does not exist.
    """
    cases, chosen, device = _cases(layers, activation, mask), _methods(methods), device_of(timing)
    if device.type == "cpu" and not cpu.built():
        with stage("building the kernels"):
            cpu.load()
    with stage("measuring the machine's limits"):
        dtypes = list(dict.fromkeys(case.dtype for case in cases))
        machine = examine(device, timing.threads, dtypes, timing.seconds)
    cells = time_grid(cases, chosen, machine, seconds=timing.seconds, progress=progress)
    shape = cases[0].shape
    return LayerBenchmark(machine, shape.width, shape.hidden, shape.gated, activation, cells)


def _cases(layers: LayerOptions, activation: str, mask: str) -> list[Case]:
    """The layers to time. Those with the same dtype and number of tokens follow each other."""
    activation_of(activation)
    masks = cast("tuple[MaskKind, ...]", names("mask", mask, MASKS))
    grid = grid_of(layers)
    return [
        Case(shape, dtype, tokens, mask, share, activation)
        for dtype, tokens, shape, mask, share in product(grid.dtypes, grid.tokens, grid.shapes, masks, grid.shares)
    ]


def _methods(typed: str | None) -> tuple[str, ...]:
    """The methods to time, in the order of `METHODS`."""
    if typed is None:
        return tuple(METHODS)
    chosen = names("methods", typed.replace("-", "_"), METHODS)
    return tuple(name for name in METHODS if name in chosen)

"""Time layers with random weights by every method, on this machine."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import product
from typing import cast

from surgeon.bench.engines import ENGINES
from surgeon.bench.grid import Cell, time_grid
from surgeon.bench.layer import MASKS, Case, MaskKind
from surgeon.bench.machine import Machine, examine
from surgeon.bench.methods import METHODS
from surgeon.errors import UsageError
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
    against: str | None = None,
    stage: Stage = nullcontext,
    progress: Callable[[Progress], None] | None = None,
) -> LayerBenchmark:
    """Time every method on every layer that the options ask for.

    Args:
        activation: its name. mask: how experts are selected, as names separated by commas. methods: likewise; None for
            all of torch's and ours. against: other engines, likewise. stage: called with the name of each step before
            the timing.

    Raises:
        UsageError: as `grid_of` and `device_of`; an activation, a mask, a method or an engine does not exist, or is not
            installed.
    """
    cases, chosen, device = _cases(layers, activation, mask), _methods(methods, against), device_of(timing)
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


def _methods(typed: str | None, against: str | None) -> tuple[str, ...]:
    """The methods to time, in the order of `METHODS`."""
    own = [name for name in METHODS if name not in ENGINES]
    # A hundred columns hold no more.
    usual = [name for name in own if name != "ours_int4" and (against or name != "ours_int8")]
    chosen = usual if typed is None else list(names("methods", typed.replace("-", "_"), own))
    engines = [] if against is None else list(names("against", against.replace("-", "_"), ENGINES))
    for name in engines:
        if missing := [package for package in ENGINES[name].packages if find_spec(package) is None]:
            raise UsageError(
                f"--against {name}: {', '.join(missing)} is not installed. Install it: "
                f"pip install {' '.join(ENGINES[name].packages)}."
            )
    return tuple(name for name in METHODS if name in chosen or name in engines)

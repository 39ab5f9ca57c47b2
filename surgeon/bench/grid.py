"""Go through a grid of layers: every method on each, its error, and how near ours comes to the machine's limit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

import torch

from surgeon.bench.layer import Case, Problem, make_problem
from surgeon.bench.machine import Machine
from surgeon.bench.methods import METHODS, Method, UnavailableError
from surgeon.bench.timing import TimedCall, median_seconds
from surgeon.errors import first_line
from surgeon.kernels.cpu.crossover import threads as using_threads
from surgeon.progress import Progress

_FEW_TOKENS = 16
_LAYERS = 8


@dataclass(frozen=True)
class Timing:
    """What one method took, in milliseconds, and its largest error, relative to the largest output, from float64.

    Both are None for a method that did not run; why: the reason.
    """

    milliseconds: float | None
    error: float | None
    why: str = ""


@dataclass(frozen=True)
class Cell:
    """One layer by every method.

    executed: share of the pairs that were really selected. gain: the faster of the dense layers, eager and compiled,
    over ours. kernel_gain: ours with every expert on over ours, at most `ceiling`, 1 / executed. limit: milliseconds
    that the machine needs at least, for the selected multiply-adds at its rate of matrix products or for reading the
    selected weights from memory, whatever takes longer: `limited_by`. of_limit: limit over ours; ours need not read
    what ReLU switched off. None where a method is missing.
    """

    dtype: str
    tokens: int
    size: int
    mask: str
    share: float
    executed: float
    methods: Mapping[str, Timing]
    gain: float | None
    kernel_gain: float | None
    ceiling: float
    limit: float
    limited_by: Literal["arithmetic", "memory"]
    of_limit: float | None


def time_grid(
    cases: Sequence[Case],
    methods: Sequence[str],
    machine: Machine,
    *,
    seconds: float,
    progress: Callable[[Progress], None] | None = None,
) -> list[Cell]:
    """Time every method on every case. seconds: for each method and case, on average."""
    device, cells, before = torch.device(machine.device), [], None
    with torch.inference_mode(), using_threads(machine.threads):
        for index, case in enumerate(cases):
            if before not in (None, (case.dtype, case.tokens)) and "compiled" in methods:
                # What was compiled for other sizes is not needed again, and would count towards torch's limit.
                torch.compiler.reset()
            before = case.dtype, case.tokens
            layers = [make_problem(case, device, seed) for seed in range(_layers(case, device))]
            cells.append(_cell(layers, methods, machine, seconds))
            if progress is not None:
                progress(Progress("bench", index + 1, len(cases), {"tokens": case.tokens, "share": case.share}))
    return cells


def _layers(case: Case, device: torch.device) -> int:
    """How many layers follow each other: on a processor the first is run before the clock starts.

    Right after the caches were emptied even the program would have to be loaded. In a model a layer comes after others,
    and only its weights are new. For few tokens one layer alone would take too little time to be measured.
    """
    if device.type != "cpu":
        return 1
    return 1 + (_LAYERS if case.tokens <= _FEW_TOKENS else 1)


def _cell(layers: Sequence[Problem], methods: Sequence[str], machine: Machine, seconds: float) -> Cell:
    """layers: the first is run before those that are timed, if there are others."""
    timings, calls = {}, {}
    for name in methods:
        timings[name], call = _first(layers, METHODS[name])
        if call is not None:
            calls[name] = call
    problem, layers = layers[0], layers[1:] or layers
    found = median_seconds(calls, problem.x.device, seconds=seconds, threads=machine.threads)
    for name, taken in found.items():
        timings[name] = Timing(1000 * taken / len(layers), timings[name].error)
    case = problem.case
    assert machine.bandwidth is not None
    # A half type can be converted where float32 is multiplied faster.
    rate = max(machine.gemm[case.dtype], machine.gemm["float32"])
    needed: dict[Literal["arithmetic", "memory"], float] = {
        "arithmetic": 2000 * problem.multiply_adds / rate,
        "memory": 1000 * fmean(layer.weight_bytes for layer in layers) / machine.bandwidth,
    }
    by = max(needed, key=lambda what: needed[what])
    ours = _milliseconds(timings, "ours")
    dense = min(
        (ms for name in ("dense", "compiled") if (ms := _milliseconds(timings, name)) is not None), default=None
    )
    return Cell(
        case.dtype, case.tokens, case.shape.size, case.mask, case.share, problem.executed, timings,
        gain=_ratio(dense, ours), kernel_gain=_ratio(_milliseconds(timings, "ours_dense"), ours),
        ceiling=1.0 / problem.executed, limit=needed[by], limited_by=by, of_limit=_ratio(needed[by], ours),
    )  # fmt: skip


def _first(layers: Sequence[Problem], method: Method) -> tuple[Timing, TimedCall | None]:
    """The error of a first call, which also warms up and compiles, and the call of the others; or why there is none."""
    problem = layers[0]
    try:
        calls = [method.prepare(layer) for layer in layers]
        with method.around(problem):
            result = calls[0]()
            for call in calls[1:]:
                call()
    except UnavailableError as error:
        return Timing(None, None, str(error)), None
    except Exception as error:  # compilers and torch's own checks raise many types
        return Timing(None, None, first_line(error)), None

    first, timed = (calls[0], calls[1:]) if len(calls) > 1 else (None, calls)

    def run() -> None:
        for call in timed:
            call()

    return Timing(None, problem.error(result, every=method.every)), TimedCall(
        run, lambda: method.around(problem), method.waits, first
    )


def _milliseconds(timings: Mapping[str, Timing], name: str) -> float | None:
    return timings[name].milliseconds if name in timings else None


def _ratio(first: float | None, second: float | None) -> float | None:
    return None if first is None or not second else first / second

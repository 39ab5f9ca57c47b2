"""Run every method on a grid of layers, with its error, and compare ours with the limit of the machine."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

import torch

from surgeon.bench.engines import ENGINES
from surgeon.bench.layer import Case, Problem, make_problem
from surgeon.bench.machine import Machine
from surgeon.bench.method import Method, UnavailableError
from surgeon.bench.methods import METHODS
from surgeon.bench.timing import TimedCall, median_seconds
from surgeon.display.choose import shows_progress
from surgeon.errors import first_line
from surgeon.kernels.cpu.crossover import threads as using_threads
from surgeon.progress import Progress, ShowProgress

_FEW_TOKENS = 16
_LAYERS = 8


@dataclass(frozen=True)
class Timing:
    """The time and error of one method.

    milliseconds, error: None for a method that did not run. error: largest difference from float64, relative to the
    largest output. why: the reason why a method did not run.
    """

    milliseconds: float | None
    error: float | None
    why: str = ""


@dataclass(frozen=True)
class Cell:
    """One layer, computed by every method.

    executed: share of the token-expert pairs that were selected. gain: the faster of the dense layers, eager and
    compiled, over ours. int8_gain: the fastest other engine over ours_int8. kernel_gain: ours with every expert on,
    over ours. ceiling: the largest possible kernel_gain, 1 / executed. limit: least milliseconds that the machine
    needs, either for the selected multiply-adds at its rate of matrix products, or for reading the selected weights
    from memory. What ReLU switched off is needed for neither. limited_by: which of the two takes longer. of_limit:
    limit over ours. Ratios are None where a method is missing.
    """

    dtype: str
    tokens: int
    size: int
    mask: str
    share: float
    executed: float
    methods: Mapping[str, Timing]
    gain: float | None
    int8_gain: float | None
    kernel_gain: float | None
    ceiling: float
    limit: float
    limited_by: Literal["arithmetic", "memory"]
    of_limit: float | None


@shows_progress
def time_grid(
    cases: Sequence[Case],
    methods: Sequence[str],
    machine: Machine,
    *,
    seconds: float,
    progress: ShowProgress = None,
) -> list[Cell]:
    """Time every method on every case. seconds: average time spent on each method and case.

    Ctrl-C ends it with the cells that are done, if there is one.
    """
    device, cells, before = torch.device(machine.device), [], None
    if callable(progress):
        progress(Progress("bench", 0, 0))
    with torch.inference_mode(), using_threads(machine.threads):
        for index, case in enumerate(cases):
            if before not in (None, (case.dtype, case.tokens)) and "compiled" in methods:
                # Code compiled for other sizes is not needed again, and would count towards torch's limit.
                torch.compiler.reset()
            before = case.dtype, case.tokens
            try:
                layers = [make_problem(case, device, seed) for seed in range(_layers(case, device))]
                cells.append(_cell(layers, methods, machine, seconds))
            except KeyboardInterrupt:
                if not cells:
                    raise
                break
            if callable(progress):
                progress(Progress("bench", index + 1, len(cases), {"tokens": case.tokens, "share": case.share}))
    return cells


def _layers(case: Case, device: torch.device) -> int:
    """The number of layers run in sequence. On a CPU the first one runs before the clock starts.

    Emptying the caches also removes the program from them. In a model a layer follows other layers, so that only its
    weights are not in a cache. For few tokens, the time of a single layer is too short to be measured.
    """
    if device.type != "cpu":
        return 1
    return 1 + (_LAYERS if case.tokens <= _FEW_TOKENS else 1)


def _cell(layers: Sequence[Problem], methods: Sequence[str], machine: Machine, seconds: float) -> Cell:
    """Time the methods on some layers. If there are several, the first one runs before those that are timed."""
    timings, calls = {}, {}
    for name in methods:
        timings[name], call = _first(layers, METHODS[name])
        if call is not None:
            calls[name] = call
    problem, layers = layers[0], layers[1:] or layers
    found = median_seconds(calls, problem.x.device, seconds=seconds, threads=machine.threads, early=False)
    for name, taken in found.items():
        timings[name] = Timing(1000 * taken / len(layers), timings[name].error)
    case = problem.case
    assert machine.bandwidth is not None
    # Where float32 is multiplied faster than a half type, values could be converted.
    rate = max(machine.gemm[case.dtype], machine.gemm["float32"])
    needed: dict[Literal["arithmetic", "memory"], float] = {
        "arithmetic": 2000 * problem.multiply_adds / rate,
        "memory": 1000 * fmean(layer.weight_bytes for layer in layers) / machine.bandwidth,
    }
    by = max(needed, key=lambda what: needed[what])
    ours = _milliseconds(timings, "ours")
    dense = _fastest(timings, ("dense", "compiled"))
    return Cell(
        case.dtype, case.tokens, case.shape.size, case.mask, case.share, problem.executed, timings,
        gain=_ratio(dense, ours), int8_gain=_ratio(_fastest(timings, ENGINES), _milliseconds(timings, "ours_int8")),
        kernel_gain=_ratio(_milliseconds(timings, "ours_dense"), ours),
        ceiling=1.0 / problem.executed, limit=needed[by], limited_by=by, of_limit=_ratio(needed[by], ours),
    )  # fmt: skip


def _first(layers: Sequence[Problem], method: Method) -> tuple[Timing, TimedCall | None]:
    """Run a method once, to compile it and to measure its error. Return these, and the call to time if it succeeded."""
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

    mask = None if method.mask is None else method.mask(problem)
    return Timing(None, problem.error(result, every=method.every, mask=mask)), TimedCall(
        run, lambda: method.around(problem), method.waits, first
    )


def _fastest(timings: Mapping[str, Timing], names: Iterable[str]) -> float | None:
    return min((ms for name in names if (ms := _milliseconds(timings, name)) is not None), default=None)


def _milliseconds(timings: Mapping[str, Timing], name: str) -> float | None:
    return timings[name].milliseconds if name in timings else None


def _ratio(first: float | None, second: float | None) -> float | None:
    return None if first is None or not second else first / second

"""Time a model with experts and the dense model in several engines, in turn, each as that engine runs it best.

Every engine gets both models in float32 and, where it can, with 8 bits around the experts. A call follows another of
the same model, so that the weights that fit into the caches are there.
"""

from __future__ import annotations

import importlib.metadata
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from surgeon.bench.timing import TimedCall, median_seconds
from surgeon.display.choose import shows_progress
from surgeon.engines import onnx, openvino, torchao
from surgeon.engines.installed import installed
from surgeon.engines.program import Program
from surgeon.errors import SurgeonError, UsageError, first_line
from surgeon.graph.traced import TracedGraph, fork
from surgeon.kernels.cpu.crossover import threads as using_threads
from surgeon.progress import Progress, ShowProgress

ENGINES = {
    "eager": (),
    "compile": (),
    "torchao": ("torchao",),
    "onnxruntime": ("onnxruntime", "onnx", "onnxscript"),
    "openvino": ("openvino", "nncf"),
}
"""The packages that each engine needs besides torch."""

BROKEN = 10.0
"""An error from the dense model, ‖difference‖ / ‖output‖, that neither rounding nor skipped experts make."""

Call = Callable[[], Any]


@dataclass(frozen=True)
class EngineTime:
    """One model in one engine.

    experts: the model with experts, else the dense model. numbers: how weights outside of experts are stored and, after
    a comma, what else differs from float32. milliseconds: the median of a call; None if it cannot be run, see `why`.
    error: ‖difference‖ / ‖output‖ from the dense model in float32, over all outputs.
    """

    engine: str
    experts: bool
    numbers: str
    milliseconds: float | None
    error: float | None
    why: str = ""


@dataclass(frozen=True)
class Compared:
    """All times. versions: of the engines. gain: the fastest dense time over the fastest with experts."""

    rows: list[EngineTime]
    versions: dict[str, str]

    @property
    def gain(self) -> float | None:
        """How many times as fast as the fastest dense engine the fastest one with experts is.

        What is off by more than `BROKEN` does not count: engines that compute something else without an error exist.
        """
        times = [
            [
                row.milliseconds
                for row in self.rows
                if row.experts == experts
                and row.milliseconds is not None
                and row.error is not None
                and row.error <= BROKEN
            ]
            for experts in (False, True)
        ]
        return min(times[0]) / min(times[1]) if all(times) else None


def check_engines(names: Sequence[str]) -> None:
    """Refuse engines that do not exist or are not installed.

    Raises:
        UsageError: says what to install.
    """
    for name in names:
        if name not in ENGINES:
            raise UsageError(f"No engine '{name}'. There are {', '.join(ENGINES)}.")
        for package in ENGINES[name]:
            installed(package)


@shows_progress
def compare_engines(
    graph: TracedGraph,
    dense: TracedGraph,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    engines: Sequence[str],
    calibration: Sequence[Any],
    *,
    seconds: float,
    threads: int,
    progress: ShowProgress = None,
) -> Compared:
    """Time one call of both models in every engine, on the CPU, in turn. All engines get the same number of threads.

    Args:
        graph: the model with experts, at the setting it has. dense: the model before the surgery.
        calibration: inputs as (args, kwargs), on which ranges of inputs are measured.
        seconds: average time spent on each call.

    Raises:
        UsageError: as `check_engines`.
    """
    check_engines(engines)
    graph, dense = fork(graph).eval(), fork(dense).eval()
    if callable(progress):
        progress(Progress("bench", 0, 0))
    with ExitStack() as stack, torch.no_grad(), using_threads(threads):
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        expected = pytree.tree_leaves(dense(*args, **kwargs))
        calls: dict[tuple[str, bool, str], Call] = {}
        why: dict[tuple[str, bool, str], str] = {}
        for done, engine in enumerate(engines):
            for experts, model in ((False, dense), (True, graph)):
                setting = _Setting(model, (args, dict(kwargs)), calibration, threads, scratch / f"{engine}{experts}")
                for numbers, make in _ENGINES[engine](setting):
                    key = (engine, experts, numbers)
                    try:
                        calls[key] = make()
                        calls[key]()
                    except SurgeonError as error:
                        calls.pop(key, None)
                        why[key] = str(error)
                    except Exception as error:  # engines raise many types
                        calls.pop(key, None)
                        why[key] = first_line(error)
            if callable(progress):
                progress(Progress("bench", done + 1, len(engines) + 1, {}))
        errors = {key: _error(call(), expected) for key, call in calls.items()}
        times = median_seconds(
            # The second of two calls: what a model finds in the caches is its own, as where it runs all the time.
            {str(place): TimedCall(call, first=call) for place, call in enumerate(calls.values())},
            torch.device("cpu"),
            seconds=seconds,
            threads=threads,
        )
    rows = [EngineTime(*key, 1000 * times[str(place)], errors[key]) for place, key in enumerate(calls)]
    rows += [EngineTime(*key, None, None, reason) for key, reason in why.items()]
    packages = ["torch", *dict.fromkeys(package for engine in engines for package in ENGINES[engine])]
    return Compared(rows, {package: importlib.metadata.version(package) for package in packages})


def _error(found: Any, expected: Sequence[Tensor]) -> float:
    """‖found - expected‖ / ‖expected‖ over all outputs that float."""
    leaves = list(found.values()) if isinstance(found, Mapping) else pytree.tree_leaves(found)
    pairs = [
        (torch.as_tensor(a).double(), b.double())
        for a, b in zip(leaves, expected, strict=True)
        if b.is_floating_point()
    ]
    off = sum(float((a - b).square().sum()) for a, b in pairs)
    size = sum(float(b.square().sum()) for _, b in pairs)
    return math.sqrt(off / max(size, 1e-24))


@dataclass(frozen=True)
class _Setting:
    """A model, its call, and what an engine may need to make it. scratch: the start of the names of files."""

    graph: TracedGraph
    call: tuple[tuple[Any, ...], dict[str, Any]]
    calibration: Sequence[Any]
    threads: int
    scratch: Path

    def program(self) -> Program:
        return Program(self.graph, self.call)


Ways = Iterator[tuple[str, Callable[[], Call]]]


def _bound(model: Callable[..., Any], call: tuple[tuple[Any, ...], dict[str, Any]]) -> Call:
    args, kwargs = call
    return lambda: model(*args, **kwargs)


def _eager(setting: _Setting) -> Ways:
    yield "float32", lambda: _bound(setting.graph, setting.call)


def _compiled(setting: _Setting) -> Ways:
    yield "float32", lambda: _bound(torch.compile(setting.graph, dynamic=False, fullgraph=True), setting.call)


def _torchao(setting: _Setting) -> Ways:
    """Linears with 8-bit weights and inputs, or weights alone, compiled."""
    for linears in torchao.LINEARS:

        def make(linears: str = linears) -> Call:
            graph = torchao.quantised(setting.graph, linears)
            return _bound(torch.compile(graph, dynamic=False, fullgraph=True), setting.call)

        yield linears, make


def _onnxruntime(setting: _Setting) -> Ways:
    """ONNX Runtime computes every expert, so that it is of interest for the dense model alone."""
    if openvino.has_int8_experts(setting.graph) or openvino.has_float_experts(setting.graph):
        return
    file = setting.scratch.with_suffix(".onnx")

    def session(file: Path) -> Call:
        inputs = setting.program().named(*setting.call)
        call: Call = onnx.Session(file, threads=setting.threads).bound(inputs)
        return call

    def plain() -> Call:
        onnx.save(setting.program(), file)
        return session(file)

    def dynamic() -> Call:
        to = file.with_suffix(".int8.onnx")
        onnx.quantise(file, to)
        return session(to)

    yield "float32", plain
    yield "int8", dynamic


def _openvino(setting: _Setting) -> Ways:
    """Linears in float32, in 8 bits with static ranges, and with 8-bit weights; the rest in float32."""
    kept: list[Any] = []

    def make(linears: str) -> Call:
        program = setting.program()
        if not kept:
            kept.append(openvino.convert(setting.graph, program))
        rows = [program.named(*call) for call in setting.calibration] if linears == "int8" else []
        model = openvino.quantised(kept[0].clone(), linears, rows)
        # At the sizes of the call: compiled code of torch is made for them too.
        inputs = program.named(*setting.call)
        model.reshape({name: list(value.shape) for name, value in inputs.items()})
        call: Call = openvino.Compiled(model, threads=setting.threads).bound(inputs)
        return call

    for linears in ("float", "int8", "int8-weights"):
        yield "float32" if linears == "float" else linears, lambda linears=linears: make(linears)  # type: ignore[misc]


_ENGINES: dict[str, Callable[[_Setting], Ways]] = {
    "eager": _eager,
    "compile": _compiled,
    "torchao": _torchao,
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
}

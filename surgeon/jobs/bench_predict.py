"""Benchmarks: a layer on this machine, a saved surgery on this machine, a layer on a GPU by the model of its cost."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields
from itertools import product
from typing import Any, Literal, cast

import torch
from torch.utils import _pytree as pytree

from surgeon.bench.grid import Cell, time_grid
from surgeon.bench.layer import DTYPES, MASKS, Case, MaskKind
from surgeon.bench.machine import Machine, examine
from surgeon.bench.methods import METHODS
from surgeon.bench.whole import WholeTimes, repeated, time_whole
from surgeon.errors import UsageError
from surgeon.graph.traced import move
from surgeon.jobs.open_model import Opened, Stage
from surgeon.jobs.options import BenchOptions
from surgeon.kernels import cpu
from surgeon.kernels.activations import activation
from surgeon.kernels.gpu_model.cost import (
    ASSUMPTIONS,
    Bound,
    LayerShape,
    Way,
    best_size,
    break_even,
    predict,
)
from surgeon.kernels.gpu_model.devices import Device, find_device, model_of
from surgeon.progress import Progress

Mode = Literal["layer", "surgery", "model"]
_SHAPE = {"tokens", "share", "size", "width", "hidden", "dtype", "gated"}
_RUN = {"threads", "device", "seconds"}
_TAKEN: dict[Mode, set[str]] = {
    "layer": _SHAPE | _RUN | {"activation", "mask", "methods"},
    "surgery": _RUN | {"batch", "length", "tau", "dense"},
    "model": _SHAPE,
}
_INSTEAD: dict[Mode, str] = {
    "layer": "is about a saved surgery: give its directory too",
    "surgery": "describes a layer with random weights: leave it out to time a saved surgery",
    "model": "is about running something, and --model runs nothing: leave it out",
}


@dataclass(frozen=True)
class LayerBenchmark:
    """Layers with random weights by every method, on this machine."""

    machine: Machine
    width: int
    hidden: int
    gated: bool
    activation: str
    cells: list[Cell]


@dataclass(frozen=True)
class SurgeryBenchmark:
    """A saved surgery end to end, on this machine, on a batch of so many samples.

    length: tokens in each, where it was asked for.
    """

    model: str
    batch: int
    length: int | None
    machine: Machine
    times: WholeTimes
    notes: tuple[str, ...] = ()

    @property
    def called_with(self) -> str:
        """What a call gets, in words."""
        tokens = "" if self.length is None else f", {self.length} token{'s' * (self.length != 1)} each"
        return f"{self.batch} sample{'s' * (self.batch != 1)}{tokens}"


@dataclass(frozen=True)
class Predicted:
    """What a device should take, milliseconds, what bounds each, the ratio dense / ours, and the way ours goes."""

    dtype: str
    tokens: int
    size: int
    share: float
    dense: float
    dense_bound: Bound
    ours: float
    ours_bound: Bound
    gain: float
    way: Way


@dataclass(frozen=True)
class Advice:
    """For some tokens: the size to take at each share, None where dense wins, and by size the share it wins from."""

    dtype: str
    tokens: int
    best: dict[float, int | None]
    break_even: dict[int, float]


@dataclass(frozen=True)
class ModelBenchmark:
    """What a device should take for a layer: a model, not a measurement."""

    device: Device
    width: int
    hidden: int
    gated: bool
    points: list[Predicted]
    advice: list[Advice]
    assumptions: tuple[str, ...] = ASSUMPTIONS


def check_mode(options: BenchOptions, mode: Mode) -> None:
    """Refuse options that mean nothing in a mode.

    Raises:
        UsageError: one was given that differs from its default.
    """
    for field in fields(options):
        if field.name not in _TAKEN[mode] and getattr(options, field.name) != field.default:
            raise UsageError(f"--{field.name} {_INSTEAD[mode]}.")


def cases_of(options: BenchOptions) -> list[Case]:
    """The layers that the options ask for, those of one dtype and number of tokens together.

    Raises:
        UsageError: not a number or a name, out of range, or a size that does not divide the hidden width.
    """
    activation(options.activation)
    masks = cast("tuple[MaskKind, ...]", _names("mask", options.mask, MASKS))
    return [
        Case(shape, dtype, tokens, mask, share, options.activation)
        for dtype, tokens, shape, mask, share in product(
            _names("dtype", options.dtype, DTYPES), _tokens(options), _shapes(options), masks, _shares(options)
        )
    ]


def methods_of(options: BenchOptions) -> tuple[str, ...]:
    """The methods that the options ask for.

    Raises:
        UsageError: there is no such method.
    """
    if options.methods is None:
        return tuple(METHODS)
    chosen = _names("methods", options.methods.replace("-", "_"), METHODS)
    return tuple(name for name in METHODS if name in chosen)


def device_of(options: BenchOptions) -> torch.device:
    """Where to run, after what could not work there was refused.

    Raises:
        UsageError: neither cpu nor cuda, or there is no GPU; fewer than one thread, no time.
    """
    wanted = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if wanted not in ("cpu", "cuda"):
        raise UsageError(f"--device {wanted}: give cpu or cuda.")
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch finds no GPU here. surgeon bench --model h100 predicts for one.")
    if options.threads < 1 or not options.seconds > 0:
        raise UsageError("--threads is at least 1, and --seconds above 0.")
    return torch.device(wanted)


def bench_layer(
    options: BenchOptions, *, stage: Stage = nullcontext, progress: Callable[[Progress], None] | None = None
) -> LayerBenchmark:
    """Time every method on every layer that the options ask for. stage: called with what is done before.

    Raises:
        UsageError: as `cases_of`, `methods_of` and `device_of`.
    """
    check_mode(options, "layer")
    cases, methods, device = cases_of(options), methods_of(options), device_of(options)
    if device.type == "cpu" and not cpu.built():
        with stage("building the kernels"):
            cpu.load()
    with stage("measuring the machine's limits"):
        dtypes = list(dict.fromkeys(case.dtype for case in cases))
        machine = examine(device, options.threads, dtypes, options.seconds)
    cells = time_grid(cases, methods, machine, seconds=options.seconds, progress=progress)
    shape = cases[0].shape
    return LayerBenchmark(machine, shape.width, shape.hidden, shape.gated, options.activation, cells)


def check_surgery(options: BenchOptions) -> tuple[float, ...]:
    """The values of tau to time beside the stored ones, after what could not work was refused.

    Raises:
        UsageError: as `device_of`; tau outside [0, 1], a batch or a length below 1.
    """
    check_mode(options, "surgery")
    if options.batch < 1 or (options.length is not None and options.length < 1):
        raise UsageError("--batch and --length are at least 1.")
    device_of(options)
    return () if options.tau is None else tuple(dict.fromkeys(_numbers("tau", options.tau, float, 0.0, 1.0)))


def bench_surgery(
    opened: Opened,
    options: BenchOptions,
    *,
    dense: Opened | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> SurgeryBenchmark:
    """Time a saved surgery at the stored tau and at those asked for; its graph and the dense one move to the device.

    Raises:
        UsageError: as `check_surgery`; the model has no experts, or does not take so many samples or tokens.
    """
    taus = check_surgery(options)
    device = device_of(options)
    inputs = pytree.tree_map_only(torch.Tensor, lambda t: t.to(device), opened.inputs)
    args, kwargs = repeated(inputs, options.batch, options.length)
    if device.type != "cpu":
        for one in (opened, dense):
            if one is not None:
                move(one.graph, device)
    times = time_whole(
        opened.graph, args, kwargs, (None, *taus), dense=None if dense is None else dense.graph,
        seconds=options.seconds, threads=options.threads, progress=progress,
    )  # fmt: skip
    notes = []
    if dense is None:
        notes.append("There is nothing to compare with: give the model before the surgery with --dense.")
    notes += [f"{what}: {why.rstrip('.')}." for what, why in times.why.items()]
    machine = examine(device, options.threads)
    return SurgeryBenchmark(opened.spec, options.batch, options.length, machine, times, tuple(notes))


def bench_model(name: str, options: BenchOptions) -> ModelBenchmark:
    """Predict what a device, or the GPU of this machine ("cuda"), takes for the layers that the options ask for.

    Raises:
        UsageError: there is no such device, or no model of it; as `cases_of`.
    """
    check_mode(options, "model")
    device = _this_gpu() if name == "cuda" else find_device(name)
    shapes, shares = _shapes(options), _shares(options)
    points, advice = [], []
    for dtype, tokens in product(_names("dtype", options.dtype, DTYPES), _tokens(options)):
        for shape, share in product(shapes, shares):
            found = predict(device, shape, tokens, share, dtype)
            points.append(
                Predicted(
                    dtype,
                    tokens,
                    shape.size,
                    share,
                    1000 * found.dense.seconds,
                    found.dense.bound,
                    1000 * found.ours.seconds,
                    found.ours.bound,
                    found.ratio,
                    found.way,
                )
            )
        first, sizes = shapes[0], [shape.size for shape in shapes]
        best = {
            share: best_size(
                device, first.width, first.hidden, tokens, share, dtype, sizes=sizes, gated=first.gated
            ).size
            for share in shares
        }
        advice.append(
            Advice(dtype, tokens, best, {shape.size: break_even(device, shape, tokens, dtype) for shape in shapes})
        )
    return ModelBenchmark(device, shapes[0].width, shapes[0].hidden, options.gated, points, advice)


def _this_gpu() -> Device:
    if not torch.cuda.is_available():
        raise UsageError("--model cuda: torch finds no GPU here. --model list has those that need not be here.")
    found = model_of()
    if found is None:
        raise UsageError(
            f"--model cuda: there is no model of {torch.cuda.get_device_name()}. --model list has those there are."
        )
    return found


def _shapes(options: BenchOptions) -> list[LayerShape]:
    hidden = 4 * options.width if options.hidden is None else options.hidden

    def shape(size: int) -> LayerShape:
        try:
            return LayerShape(options.width, hidden, size, options.gated)
        except UsageError as error:
            if min(options.width, hidden) < 1:
                raise
            from surgeon.moe.clustering import nearest_divisors  # takes a second to import

            nearest = ", ".join(map(str, nearest_divisors(hidden, size)))
            raise UsageError(f"{error} Give another --size. Nearest: {nearest}.") from error

    return [shape(size) for size in _numbers("size", options.size, int, 1, None)]


def _tokens(options: BenchOptions) -> Sequence[int]:
    return _numbers("tokens", options.tokens, int, 1, None)


def _shares(options: BenchOptions) -> Sequence[float]:
    return _numbers("share", options.share, float, 1e-6, 1.0)


def _numbers(option: str, text: str, kind: Any, least: float, most: float | None) -> list[Any]:
    try:
        found = [kind(part) for part in text.split(",") if part.strip()]
    except ValueError:
        found = []
    if not found or not all(least <= one and (most is None or one <= most) for one in found):
        what = "whole numbers from 1 on" if kind is int else "numbers from 0 to 1"
        what += ", above 0" if kind is float and least > 0 else ""
        raise UsageError(f"--{option} {text}: give {what}, separated by commas.")
    return list(dict.fromkeys(found))


def _names(option: str, text: str, known: Collection[str]) -> tuple[str, ...]:
    found = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    wrong = [name for name in found if name not in known]
    if wrong or not found:
        raise UsageError(f"--{option} {text}: there are {', '.join(known)}.")
    return found

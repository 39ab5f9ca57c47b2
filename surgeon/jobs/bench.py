"""Turn typed options into what the benchmarks take: layers, their sizes and data types, and the device."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch

from surgeon.bench.layer import DTYPES
from surgeon.errors import UsageError
from surgeon.jobs.options import LayerOptions, TimingOptions
from surgeon.kernels.gpu_model.cost import LayerShape


def device_of(options: TimingOptions) -> torch.device:
    """The device to run on.

    Raises:
        UsageError: the device is neither cpu nor cuda, or there is no GPU; threads are below 1, or seconds not above 0.
    """
    wanted = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if wanted not in ("cpu", "cuda"):
        raise UsageError(f"--device {wanted}: give cpu or cuda.")
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch finds no GPU. surgeon bench predict h100 predicts times without one.")
    if options.threads < 1 or not options.seconds > 0:
        raise UsageError("--threads must be at least 1, and --seconds above 0.")
    return torch.device(wanted)


@dataclass(frozen=True)
class LayerGrid:
    """The layers to run: every combination of shape, dtype, number of tokens and selected share."""

    shapes: list[LayerShape]
    dtypes: tuple[str, ...]
    tokens: list[int]
    shares: list[float]


def grid_of(options: LayerOptions) -> LayerGrid:
    """The layers that the options ask for.

    Raises:
        UsageError: a value is not a number or a name, or out of range, or a size does not divide the hidden width.
    """
    return LayerGrid(
        [_shape(options, size) for size in numbers("size", options.size, int, 1, None)],
        names("dtype", options.dtype, DTYPES),
        numbers("tokens", options.tokens, int, 1, None),
        numbers("share", options.share, float, 1e-6, 1.0),
    )


def _shape(options: LayerOptions, size: int) -> LayerShape:
    """The layer with experts of `size` neurons. If they do not divide it, the error names the nearest sizes that do."""
    hidden = 4 * options.width if options.hidden is None else options.hidden
    try:
        return LayerShape(options.width, hidden, size, options.gated)
    except UsageError as error:
        if min(options.width, hidden) < 1:
            raise
        from surgeon.moe.clustering import nearest_divisors  # takes a second to import

        nearest = ", ".join(map(str, nearest_divisors(hidden, size)))
        raise UsageError(f"{error} Give another --size. Nearest: {nearest}.") from error


def numbers(option: str, text: str, kind: Any, least: float, most: float | None) -> list[Any]:
    """The distinct numbers of a list separated by commas. kind: int or float; most: None for no limit.

    Raises:
        UsageError: there is no number, or one is not of this kind or out of range; the message names the option.
    """
    try:
        found = [kind(part) for part in text.split(",") if part.strip()]
    except ValueError:
        found = []
    if not found or not all(least <= value and (most is None or value <= most) for value in found):
        what = "whole numbers of at least 1" if kind is int else "numbers from 0 to 1"
        what = "numbers above 0 and up to 1" if kind is float and least > 0 else what
        raise UsageError(f"--{option} {text}: give {what}, separated by commas.")
    return list(dict.fromkeys(found))


def names(option: str, text: str, known: Collection[str]) -> tuple[str, ...]:
    """The distinct names of a list separated by commas.

    Raises:
        UsageError: there is no name, or one is not known; the message names the option.
    """
    found = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    wrong = [name for name in found if name not in known]
    if wrong or not found:
        raise UsageError(f"--{option} {text}: choose from {', '.join(known)}.")
    return found

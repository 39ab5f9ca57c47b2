"""From what was typed to what the benchmarks take: layers, their sizes and types, and the device."""

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
    """Where to run, after what could not work there was refused.

    Raises:
        UsageError: neither cpu nor cuda, or there is no GPU; fewer than one thread, no time.
    """
    wanted = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if wanted not in ("cpu", "cuda"):
        raise UsageError(f"--device {wanted}: give cpu or cuda.")
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch finds no GPU here. surgeon bench predict h100 predicts for one.")
    if options.threads < 1 or not options.seconds > 0:
        raise UsageError("--threads is at least 1, and --seconds above 0.")
    return torch.device(wanted)


@dataclass(frozen=True)
class LayerGrid:
    """Layers to go through: each of the shapes in each dtype, for each number of tokens and each selected share."""

    shapes: list[LayerShape]
    dtypes: tuple[str, ...]
    tokens: list[int]
    shares: list[float]


def grid_of(options: LayerOptions) -> LayerGrid:
    """The layers that the options ask for.

    Raises:
        UsageError: not a number or a name, out of range, or a size that does not divide the hidden width.
    """
    return LayerGrid(
        [_shape(options, size) for size in numbers("size", options.size, int, 1, None)],
        names("dtype", options.dtype, DTYPES),
        numbers("tokens", options.tokens, int, 1, None),
        numbers("share", options.share, float, 1e-6, 1.0),
    )


def _shape(options: LayerOptions, size: int) -> LayerShape:
    """The layer with experts of `size` neurons; where these do not divide it, the message names sizes that do."""
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
    """The numbers of a list separated by commas, each once. kind: int or float; most: None for no limit.

    Raises:
        UsageError: none, not of this kind, or out of range; the message names the option.
    """
    try:
        found = [kind(part) for part in text.split(",") if part.strip()]
    except ValueError:
        found = []
    if not found or not all(least <= one and (most is None or one <= most) for one in found):
        what = "whole numbers from 1 on" if kind is int else "numbers from 0 to 1"
        what += ", above 0" if kind is float and least > 0 else ""
        raise UsageError(f"--{option} {text}: give {what}, separated by commas.")
    return list(dict.fromkeys(found))


def names(option: str, text: str, known: Collection[str]) -> tuple[str, ...]:
    """The names of a list separated by commas, each once.

    Raises:
        UsageError: none, or one that is not known; the message names the option.
    """
    found = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    wrong = [name for name in found if name not in known]
    if wrong or not found:
        raise UsageError(f"--{option} {text}: there are {', '.join(known)}.")
    return found

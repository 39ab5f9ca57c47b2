"""Predict how long a GPU takes for a layer, with the cost model."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import torch

from surgeon.errors import UsageError
from surgeon.jobs.bench import LayerGrid, grid_of
from surgeon.jobs.options import LayerOptions
from surgeon.kernels.gpu_model.cost import ASSUMPTIONS, Bound, LayerShape, Way, best_size, break_even, predict
from surgeon.kernels.gpu_model.devices import Device, find_device, model_of


@dataclass(frozen=True)
class Predicted:
    """Predicted times of dense and ours.

    dense, ours: milliseconds. dense_bound, ours_bound: what limits them. gain: dense over ours. way: how ours is
    computed.
    """

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
    """Advice for one dtype and number of tokens.

    best: the fastest expert size by share, None where dense is faster. break_even: by size, the share above which dense
    is faster.
    """

    dtype: str
    tokens: int
    best: dict[float, int | None]
    break_even: dict[int, float]


@dataclass(frozen=True)
class LayerPrediction:
    """Predicted times of a layer on a device, from a model and not measured."""

    device: Device
    width: int
    hidden: int
    gated: bool
    points: list[Predicted]
    advice: list[Advice]
    assumptions: tuple[str, ...] = ASSUMPTIONS


def bench_predict(name: str, layers: LayerOptions) -> LayerPrediction:
    """Predict how long a device, or the GPU of this machine ("cuda"), takes for the layers that the options ask for.

    Raises:
        UsageError: the device does not exist or has no model; as `grid_of`.
    """
    device = _this_gpu() if name == "cuda" else find_device(name)
    grid = grid_of(layers)
    points, advice = [], []
    for dtype, tokens in product(grid.dtypes, grid.tokens):
        points += [_point(device, shape, tokens, share, dtype) for shape, share in product(grid.shapes, grid.shares)]
        advice.append(_advice(device, grid, tokens, dtype))
    shape = grid.shapes[0]
    return LayerPrediction(device, shape.width, shape.hidden, shape.gated, points, advice)


def _point(device: Device, shape: LayerShape, tokens: int, share: float, dtype: str) -> Predicted:
    found = predict(device, shape, tokens, share, dtype)
    dense, ours = found.dense, found.ours
    return Predicted(
        dtype, tokens, shape.size, share, 1000 * dense.seconds, dense.bound, 1000 * ours.seconds, ours.bound,
        found.ratio, found.way,
    )  # fmt: skip


def _advice(device: Device, grid: LayerGrid, tokens: int, dtype: str) -> Advice:
    """Choose among the expert sizes; the layers differ in nothing else."""
    shape, sizes = grid.shapes[0], [shape.size for shape in grid.shapes]
    best = {
        share: best_size(device, shape.width, shape.hidden, tokens, share, dtype, sizes=sizes, gated=shape.gated).size
        for share in grid.shares
    }
    return Advice(dtype, tokens, best, {shape.size: break_even(device, shape, tokens, dtype) for shape in grid.shapes})


def _this_gpu() -> Device:
    if not torch.cuda.is_available():
        raise UsageError("cuda: torch finds no GPU. Give another device; to see them, run surgeon bench predict list.")
    found = model_of()
    if found is None:
        raise UsageError(
            f"cuda: there is no model of {torch.cuda.get_device_name()}. Give another device; to see them, run surgeon "
            "bench predict list."
        )
    return found

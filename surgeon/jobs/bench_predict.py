"""Predict what a GPU takes for a layer, by the model of its cost."""

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
class LayerPrediction:
    """What a device should take for a layer: a model, not a measurement."""

    device: Device
    width: int
    hidden: int
    gated: bool
    points: list[Predicted]
    advice: list[Advice]
    assumptions: tuple[str, ...] = ASSUMPTIONS


def bench_predict(name: str, layers: LayerOptions) -> LayerPrediction:
    """Predict what a device, or the GPU of this machine ("cuda"), takes for the layers that the options ask for.

    Raises:
        UsageError: there is no such device, or no model of it; as `grid_of`.
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
    """Which of the sizes to take: they differ in nothing else."""
    shape, sizes = grid.shapes[0], [shape.size for shape in grid.shapes]
    best = {
        share: best_size(device, shape.width, shape.hidden, tokens, share, dtype, sizes=sizes, gated=shape.gated).size
        for share in grid.shares
    }
    return Advice(dtype, tokens, best, {one.size: break_even(device, one, tokens, dtype) for one in grid.shapes})


def _this_gpu() -> Device:
    if not torch.cuda.is_available():
        raise UsageError("cuda: torch finds no GPU here. surgeon bench predict list has those that need not be here.")
    found = model_of()
    if found is None:
        raise UsageError(
            f"cuda: there is no model of {torch.cuda.get_device_name()}. "
            "surgeon bench predict list has those there are."
        )
    return found

"""Neurons that never fire, which make all experts of a layer equally large.

All experts of a layer have one size. If the layer's width is not a multiple of it, filling neurons follow the real
ones of an expert. Their weights are zero, so they change no output. Their hidden value is zero, so they get no
gradient. They do not count as cost.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule

from surgeon.kernels.activations import ACTIVATIONS
from surgeon.sites.ffn import FFNWeights

# Key in a graph's metadata for the number of filling neurons, by the path of the experts.
_FILLING = "filling"
# The bias of a filling neuron whose activation is not zero at zero. A sigmoid and a softplus of it are exactly zero,
# and float16 holds it.
_SILENT = -1e4


def neurons_of_experts(experts: int, size: int, filling: int) -> list[int]:
    """Return the number of real neurons in each expert of `size` neurons, of which `filling` are not real.

    The last expert is filled up. If it cannot take all, which happens if the number of experts was given, each of the
    last `filling` experts takes one.
    """
    if filling < size:
        return [size] * (experts - 1) + [size - filling]
    return [size] * (experts - filling) + [size - 1] * filling


def unfilled(values: Tensor, filling: int) -> Tensor:
    """Return what belongs to the real neurons of experts, [E, s, ...] → [h, ...]."""
    counts = neurons_of_experts(len(values), values.shape[1], filling)
    return torch.cat([rows[:count] for rows, count in zip(values, counts, strict=True)])


def mark_filling(graph: GraphModule, path: str, filling: int) -> None:
    """Record how many neurons of the experts at `path` are filling, in this graph and its later forks."""
    # Make a new dict, because forks share the values of their metadata.
    graph.meta[_FILLING] = {**graph.meta.get(_FILLING, {}), path: filling}


def filling_of(graph: GraphModule, path: str) -> int:
    """Return how many neurons of the experts at `path` are filling."""
    return int(graph.meta.get(_FILLING, {}).get(path, 0))


def fill(rows: Tensor, places: Tensor, count: int, value: float = 0.0) -> Tensor:
    """Return [count, ...] with each of `rows` [h, ...] at its place in `places` [h], and `value` elsewhere."""
    filled = rows.new_full((count, *rows.shape[1:]), value)
    filled[places.to(rows.device)] = rows
    return filled


def silent_bias(weights: FFNWeights, activation: str) -> float:
    """Return the bias of a filling neuron, at which its hidden value is exactly zero."""
    fires = weights.gate is None and bool(ACTIVATIONS[activation].fn(torch.zeros(())))
    return _SILENT if fires else 0.0

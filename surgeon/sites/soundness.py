"""Check that passes can compute with the weights of a site. A site whose weights they cannot use is refused."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from surgeon.graph.traced import tensor_of
from surgeon.graph.weights import all_finite
from surgeon.sites.linear import Linear
from surgeon.sites.rejection import Rejection


def unsound(graph: GraphModule, linears: Iterable[Linear]) -> Rejection | None:
    """Refuse linear layers unless their weights are plain floating-point tensors of one dtype, on one device."""
    weights = _weights(graph, linears)
    for name, weight in weights.items():
        if type(weight) not in (Tensor, nn.Parameter):
            return Rejection("unusable-weights", f"its weight '{name}' is a {type(weight).__name__}, no plain tensor")
        if not weight.is_floating_point():
            return Rejection("unusable-weights", f"its weight '{name}' holds {_short(weight.dtype)} numbers")
        if weight.layout != torch.strided:
            return Rejection("unusable-weights", f"its weight '{name}' is stored in the layout {_short(weight.layout)}")
        if weight.numel() == 0:
            return Rejection("unusable-weights", f"its weight '{name}' is empty: {tuple(weight.shape)}")
    for what in ("dtype", "device"):
        first = {getattr(weight, what): name for name, weight in reversed(weights.items())}
        if len(first) > 1:
            named = " and ".join(f"{_short(value)} ('{name}')" for value, name in reversed(first.items()))
            return Rejection("weights-differ", f"its weights have several {what}s: {named}")
    return None


def not_finite(graph: GraphModule, linears: Iterable[Linear]) -> Rejection | None:
    """Refuse linear layers that have a weight with NaN or infinity. This reads all weights."""
    for name, weight in _weights(graph, linears).items():
        if not all_finite(weight):
            return Rejection("not-finite", f"its weight '{name}' contains NaN or infinity")
    return None


def _weights(graph: GraphModule, linears: Iterable[Linear]) -> dict[str, Tensor]:
    """The weights and biases by name."""
    nodes = [node for linear in linears for node in (linear.weight, linear.bias) if node is not None]
    found = {str(node.target): tensor_of(graph, node) for node in nodes}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def _short(value: object) -> str:
    return str(value).removeprefix("torch.")

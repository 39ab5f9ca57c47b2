"""Give a layer that stays dense the weights of what passes made of it: what they did, backwards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from surgeon.graph.traced import TracedGraph
from surgeon.inputs.neuron_site import find_sparse_neurons
from surgeon.inputs.rebuild import dense_weights
from surgeon.inputs.site import find_sparse_linears
from surgeon.moe.filling import unfilled
from surgeon.moe.int8 import Int8MoE
from surgeon.moe.module import MoE
from surgeon.moe.rebuild import moe_module
from surgeon.moe.site import find_moes
from surgeon.sites.ffn import FFN, FFNWeights
from surgeon.sites.linear import Linear, find_linears
from surgeon.sites.linear_site import LinearSite
from surgeon.sites.nonlinearity import Nonlinearity
from surgeon.sites.search import find_ffns


@torch.no_grad()
def unsplit(graph: TracedGraph, model: nn.Module, sites: Mapping[str, FFN | LinearSite]) -> dict[str, nn.Parameter]:
    """Return the weights of converted layers as those of the linear layers that they were made of, by name.

    The order of the neurons of experts may be another one, which changes no output. Left out are layers that passes
    changed in more than their weights, and those with experts whose linear layers are not `nn.Linear` modules.

    Args:
        model: the dense model. sites: its layers, by the path of their experts, or of what selects inputs, in `graph`.
    """
    moes = {site.path: site for site in find_moes(graph)}
    inputs = {site.path: site for site in find_sparse_linears(graph)}
    neurons = {site.path: site.layer for site in find_sparse_neurons(graph)}
    again = {site.path: site for site in find_ffns(graph)[0]}
    linears = find_linears(graph)[0] if any(isinstance(site, LinearSite) for site in sites.values()) else []
    own = dict(model.named_parameters(remove_duplicate=False))
    found: dict[str, nn.Parameter] = {}
    for path, site in sites.items():
        if path in inputs and isinstance(site, LinearSite):
            found |= _dense(site.calls[0], *dense_weights(graph, inputs[path]), graph, model)
            continue
        if not isinstance(site, FFN):
            found |= _again(path, site.calls[0], linears, graph, model)
            continue
        weights = None
        if path in moes:
            weights = _joined(site, moe_module(graph, moes[path]))
        elif path in neurons and _same(site, neurons[path].shape.activation, gated=True):
            weights = neurons[path].dense()
        elif path in again and again[path].nonlinearity == site.nonlinearity:
            weights = again[path].weights(graph)
        modules = dict(model.named_modules(remove_duplicate=False))
        *ups, down = [linear.path for linear in site.linears]
        if weights is None or any(type(modules.get(name)) is not nn.Linear for name in (*ups, down)):
            continue
        # The gate comes first among a gated layer's linear layers.
        rows = [(weights.w1, weights.b1)]
        if weights.gate is not None:
            rows.insert(0, (weights.gate, weights.b_gate))
        found[f"{down}.weight"] = nn.Parameter(weights.w2.detach().t().contiguous())
        if weights.b2 is not None and f"{down}.bias" in own:
            found[f"{down}.bias"] = nn.Parameter(weights.b2.detach())
        for name, (weight, bias) in zip(ups, rows, strict=True):
            found[f"{name}.weight"] = nn.Parameter(weight.detach())
            if bias is not None:
                found[f"{name}.bias"] = nn.Parameter(bias.detach())
    return found


def _dense(
    linear: Linear, weight: Tensor, bias: Tensor, graph: TracedGraph, model: nn.Module
) -> dict[str, nn.Parameter]:
    """Weight and bias by their names in the model, without those that the graph has under these names."""
    values = {str(linear.weight.target): weight.t() if linear.transposed else weight}
    if linear.bias is not None:
        values[str(linear.bias.target)] = bias
    known = dict(graph.named_parameters(remove_duplicate=False))
    return {
        name: nn.Parameter(value.reshape(model.get_parameter(name).shape).contiguous())
        for name, value in values.items()
        if name not in known
    }


def _again(
    path: str, site: Linear, linears: Sequence[Linear], graph: TracedGraph, model: nn.Module
) -> dict[str, nn.Parameter]:
    """The weights of a linear layer that is dense again, with what is new of it at `path`."""
    for linear in linears:
        names = [str(node.target) for node in (linear.weight, linear.bias) if node is not None]
        if any(name.startswith(f"{path}.") for name in names):
            weight, bias = linear.weight_rows(graph), linear.bias_vector(graph)
            return _dense(site, weight, weight.new_zeros(len(weight)) if bias is None else bias, graph, model)
    return {}


def _same(site: FFN, activation: str, *, gated: bool) -> bool:
    """Whether a converted layer is the dense layer but for its weights."""
    return site.nonlinearity == Nonlinearity(activation, gated, site.nonlinearity.gate_leaf)


def _joined(site: FFN, layer: MoE | Int8MoE) -> FFNWeights | None:
    """The weights of a layer's experts as those of one layer; None if it is not the dense layer but for its weights."""
    if not _same(site, layer.activation, gated=layer.gate is not None):
        return None
    parts: dict[str, Any] = {
        name: None if part is None else unfilled(part, layer.filling) for name, part in layer.weights._asdict().items()
    }
    return FFNWeights(**parts, b2=layer.b2)

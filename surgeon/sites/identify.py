"""Identify the activation between two linear layers by running it on numbers.

A GELU may be one op or eight, and a gate may be split off by `chunk`, by slices or by `view` and `unbind`. There is no
pattern for each spelling. Instead the nodes between the linears are run in float64 on a range of values, and the
results are compared with the known activation functions. Parameters in between are set to one first;
`surgeon.sites.factors` finds their places.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.fx import GraphModule

from surgeon.graph.traced import aten
from surgeon.kernels.activations import ACTIVATIONS
from surgeon.sites.cone import Cone, NotElementwise, close, full_shape, probe_shape, run_cone, spread
from surgeon.sites.factors import with_constants
from surgeon.sites.nonlinearity import HALVES, OTHER, Halves, Nonlinearity
from surgeon.sites.rejection import Rejection


def identify(graph: GraphModule, cone: Cone) -> Nonlinearity | Rejection:
    """Identify what the cone computes, or say why it cannot be part of a feed-forward layer."""
    widths = [leaf.out_features for leaf in cone.leaves]
    try:
        for kind, expected in ((_plain, [1]), (_fused, [2]), (_gated, [1, 1])):
            if widths == [count * cone.width for count in expected]:
                found = kind(graph, cone)
                if cone.constants and isinstance(found, Rejection):
                    # Masks may also say which neurons are left out.
                    cone = replace(cone, neutral=False)
                    found = kind(graph, cone)
                if cone.constants and isinstance(found, Nonlinearity):
                    found = with_constants(graph, cone, found)
                if isinstance(found, Nonlinearity) and found.activation == "identity" and not found.gated:
                    return Rejection("no-activation", "there is no activation between the two linears")
                return found
    except NotElementwise as problem:
        return problem.rejection
    what = f"{' and '.join(map(str, widths))} values leave the first linear but {cone.width} enter the second"
    return Rejection("widths-differ", what)


def _plain(graph: GraphModule, cone: Cone) -> Nonlinearity | Rejection:
    z = spread(probe_shape(cone, 0))
    y = run_cone(graph, cone, [z])
    named = _name(z, y, _scales(cone))
    if named is None:
        return _unknown(lambda value: run_cone(graph, cone, [torch.full_like(z, value)]))
    activation, input_scale, output_scale = named
    return Nonlinearity(activation, input_scale=input_scale, output_scale=output_scale)


def _fused(graph: GraphModule, cone: Cone) -> Nonlinearity | Rejection:
    shape = full_shape(cone, 0)
    z, up = (spread((*shape[:-1], cone.width), seed) for seed in (0, 1))

    def run(which: Halves, z: Tensor, up: Tensor) -> Tensor:
        both = torch.empty(shape, dtype=torch.float64)
        both[..., HALVES[which](cone.width)] = z
        both[..., HALVES[OTHER[which]](cone.width)] = up
        return run_cone(graph, cone, [both])

    found: Nonlinearity | Rejection = Rejection(
        "not-gated", "the two halves of the first linear do not combine as activation(gate) · up"
    )
    for which in HALVES:
        candidate = _gate(functools.partial(run, which), z, up, _scales(cone))
        if candidate is not None:
            activation, input_scale, output_scale = candidate
            found = Nonlinearity(activation, True, 0, which, input_scale, output_scale)
            if activation != "identity":
                return found
    return found


def _gated(graph: GraphModule, cone: Cone) -> Nonlinearity | Rejection:
    shape = probe_shape(cone, 0)
    z, up = spread(shape, 0), spread(shape, 1)
    found: Nonlinearity | Rejection = Rejection(
        "not-gated", "the two first linears do not combine as activation(gate) · up"
    )
    for gate_leaf in (0, 1):

        def run(a: Tensor, b: Tensor, gate_leaf: int = gate_leaf) -> Tensor:
            return run_cone(graph, cone, [a, b] if gate_leaf == 0 else [b, a])

        candidate = _gate(run, z, up, _scales(cone))
        if candidate is not None:
            activation, input_scale, output_scale = candidate
            found = Nonlinearity(activation, True, gate_leaf, None, input_scale, output_scale)
            if activation != "identity":
                return found
    return found


def _gate(
    run: Callable[[Tensor, Tensor], Tensor], z: Tensor, up: Tensor, scales: set[float]
) -> tuple[str, float, float] | None:
    """Return (activation, input scale, output scale) if run(z, up) == act(z) · up or act(z) · act(up), else None."""
    y = run(z, up)
    gate = run(z, torch.ones_like(up))
    if close(y, gate * up):
        return _name(z, gate, scales)
    for name, activation in ACTIVATIONS.items():
        if activation.up is not None:
            value = activation.fn(z) * activation.up.fn(up)
            scale = _ratio(y, value)
            if scale != 0.0 and close(y, scale * value):
                return name, 1.0, scale
    return None


def _name(z: Tensor, y: Tensor, scales: set[float]) -> tuple[str, float, float] | None:
    """Return (activation, input scale, output scale) with y == output scale · act(input scale · z), else None."""
    if not bool(torch.isfinite(y).all()):
        return None
    known = [(name, activation.fn) for name, activation in ACTIVATIONS.items() if activation.up is None]
    for name, function in known:
        if close(y, function(z)):
            return name, 1.0, 1.0
    for input_scale in sorted(scales | {1.0}, key=lambda scale: scale != 1.0):
        for name, function in known:
            value = function(input_scale * z)
            output_scale = _ratio(y, value)
            if output_scale != 0.0 and close(y, output_scale * value):
                return name, input_scale, output_scale
    return None


def _ratio(y: Tensor, value: Tensor) -> float:
    """Return the number that brings `value` nearest to y."""
    ratio = float((y * value).sum() / value.square().sum().clamp_min(1e-30))
    # Rounding errors of a scale that is not there would be folded into the weights.
    return 1.0 if abs(ratio - 1.0) < 1e-9 else ratio


def _unknown(run: Callable[[float], Tensor]) -> Rejection:
    values = ", ".join(f"f({value:g}) = {float(run(value).flatten()[0]):.4g}" for value in (-1.0, 0.0, 1.0))
    return Rejection("unknown-activation", f"the function between the linears is not a known activation: {values}")


def _scales(cone: Cone) -> set[float]:
    """Return the numbers that the cone multiplies or divides by: the candidates for a scale before the activation."""
    scales: set[float] = set()
    for node in cone.nodes:
        if node.target in (aten.mul.Tensor, aten.mul_.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar):
            numbers = [float(arg) for arg in node.args if isinstance(arg, int | float) and arg != 0]
            divides = node.target in (aten.div.Tensor, aten.div.Scalar)
            scales.update(1.0 / number if divides else number for number in numbers)
    return scales

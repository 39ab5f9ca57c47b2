"""Find the places of constants between two linear layers: parameters and buffers that only scale the neurons.

What the nodes compute when all constants are one is known. Then each constant is drawn at random, which shows whether
it does nothing but scale the neurons before or after the activation, or the negative values of a PReLU.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from surgeon.sites.cone import Cone, NotElementwise, close, full_shape, run_cone, spread
from surgeon.sites.constants import evaluate, formula, name_of, width_of
from surgeon.sites.nonlinearity import HALVES, OTHER, Factor, How, Nonlinearity, Place, Slopes, by


def with_constants(graph: GraphModule, cone: Cone, found: Nonlinearity) -> Nonlinearity:
    """Find the places of the constants, given what the cone computes when all of them are one."""
    real = {node: evaluate(graph, node) for node in cone.constants}
    drawn = {node: _draw(value, seed) for seed, (node, value) in enumerate(real.items())}
    values = [spread(full_shape(cone, leaf), leaf) for leaf in range(len(cone.leaves))]
    slopes = None
    if found.activation == "identity":
        # Without an activation, either side of a product may be the gate.
        sides = [found] if not found.gated else [replace(found, gate_leaf=1 - found.gate_leaf), found]
        if found.fused is not None:
            sides = [found, replace(found, fused=OTHER[found.fused])]
        for side, node in itertools.product(sides, cone.constants):
            if slopes is None and _is_slope(graph, cone, side, values, node, drawn):
                slopes, found = node, replace(side, activation="relu", slopes=Slopes(formula(node), node))
    fixed = {} if slopes is None else {slopes: drawn[slopes]}
    factors = tuple(_place(graph, cone, found, values, node, drawn, fixed) for node in real if node is not slopes)
    found = replace(found, factors=factors)
    # All constants together, with their real values.
    scaled = [value.clone() for value in values]
    for factor in factors:
        if factor.at != "after":
            _scale(scaled, cone, found, factor.at, factor.how, real[factor.node])
    expected = run_cone(graph, cone, scaled, {} if slopes is None else {slopes: real[slopes]})
    for factor in factors:
        if factor.at == "after":
            expected = factor.scale(expected, real[factor.node])
    if not close(run_cone(graph, cone, values, real), expected):
        raise _not_a_factor(graph, cone.constants[0])
    return found


def _place(
    graph: GraphModule,
    cone: Cone,
    found: Nonlinearity,
    values: list[Tensor],
    node: Node,
    drawn: Mapping[Node, Tensor],
    fixed: Mapping[Node, Tensor],
) -> Factor:
    """Find where a constant multiplies or divides, by a random value of it."""
    y, base = run_cone(graph, cone, values, {**fixed, node: drawn[node]}), run_cone(graph, cone, values, fixed)
    width, constant = width_of(graph, node), drawn[node]
    ways: tuple[How, ...] = ("times", "over")
    if constant.dtype == torch.bool:
        ways = ("times",) if cone.neutral else ("unless",)
    for how in ways:
        if width in (1, cone.width) and close(y, by(base, constant, how)):
            return Factor("after", how, formula(node), node)
        places: tuple[Place, ...] = ("z",) if found.fused is None else ("first", "z")
        for at in places:
            if width in (1, 2 * cone.width if at == "first" else cone.width):
                scaled = [value.clone() for value in values]
                _scale(scaled, cone, found, at, how, constant)
                if close(y, run_cone(graph, cone, scaled, fixed)):
                    return Factor(at, how, formula(node), node)
    raise _not_a_factor(graph, node)


def _is_slope(
    graph: GraphModule,
    cone: Cone,
    found: Nonlinearity,
    values: list[Tensor],
    node: Node,
    drawn: Mapping[Node, Tensor],
) -> bool:
    """Whether the constant is what negative values are multiplied by, and positive ones are not."""
    if width_of(graph, node) not in (1, cone.width):
        return False
    z = values[found.gate_leaf]
    if found.fused is not None:
        z = z[..., HALVES[found.fused](cone.width)]
    expected = run_cone(graph, cone, values, {}) * torch.where(z < 0, drawn[node].double().reshape(-1), 1.0)
    return close(run_cone(graph, cone, values, {node: drawn[node]}), expected)


def _scale(values: list[Tensor], cone: Cone, found: Nonlinearity, at: Place, how: How, constant: Tensor) -> None:
    """Apply a factor to z, or to all outputs of the first linear, in place."""
    part = slice(None) if at == "first" or found.fused is None else HALVES[found.fused](cone.width)
    values[found.gate_leaf][..., part] = by(values[found.gate_leaf][..., part], constant, how)


def _draw(like: Tensor, seed: int) -> Tensor:
    """Draw a constant: numbers of both signs and not near zero, or truth values."""
    generator = torch.Generator().manual_seed(100 + seed)
    values = torch.rand(like.shape, generator=generator, dtype=torch.float64) + 0.5
    signs = torch.rand(like.shape, generator=generator) < 0.5
    if like.dtype == torch.bool:
        return signs
    return torch.where(signs, -values, values) if like.is_floating_point() else signs.to(like.dtype) + 1


def _not_a_factor(graph: GraphModule, node: Node) -> NotElementwise:
    what = f"a parameter ('{name_of(graph, node)}') stands between the linears and does more than scale the neurons"
    return NotElementwise("parameter-between", what)

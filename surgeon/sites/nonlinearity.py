"""Identify the activation between two linear layers by running it on numbers.

A GELU may be one op or eight, and a gate may be split off by `chunk`, by slices or by `view` and `unbind`. There is no
pattern for each spelling. Instead the nodes between the linears are run in float64 on a range of values, and the
results are compared with the known activation functions. Parameters in between are set to one first. Then each is
drawn at random, which shows whether it does nothing but scale the neurons before or after the activation.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import sympy  # type: ignore[import-untyped]
import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from surgeon.graph.ops import DROPOUTS, SHAPE_OPS, is_copy
from surgeon.graph.traced import aten, shape_of, tensor_of
from surgeon.kernels.activations import ACTIVATIONS
from surgeon.sites.constants import evaluate, formula, name_of, width_of
from surgeon.sites.linear import Linear
from surgeon.sites.rejection import Rejection

Halves = Literal["first", "second", "even", "odd"]
Place = Literal["after", "z", "first"]
How = Literal["times", "over", "unless"]
# Where the gate can lie among the outputs of one linear that computes gate and up together.
HALVES: dict[Halves, Callable[[int], slice]] = {
    "first": lambda h: slice(0, h),
    "second": lambda h: slice(h, 2 * h),
    "even": lambda h: slice(0, 2 * h, 2),
    "odd": lambda h: slice(1, 2 * h, 2),
}
OTHER: dict[Halves, Halves] = {"first": "second", "second": "first", "even": "odd", "odd": "even"}
_ATOL, _RTOL = 1e-5, 1e-5


def half(rows: Tensor, which: Halves) -> Tensor:
    """Return the rows of one half of a fused linear layer, [2h, ...] → [h, ...]."""
    return rows[HALVES[which](rows.shape[0] // 2)]


def other_half(rows: Tensor, which: Halves) -> Tensor:
    """Return the rows of the other half, [2h, ...] → [h, ...]."""
    return half(rows, OTHER[which])


@dataclass(frozen=True)
class Cone:
    """The nodes between the linears of a candidate, in topological order.

    leaves: the linear layers it starts from. output: the value the second linear reads, [..., width].
    constants: the values it reads that depend on parameters and buffers only. neutral: the truth value of a mask that
    leaves all neurons as they are.
    """

    nodes: tuple[Node, ...]
    leaves: tuple[Linear, ...]
    output: Node
    width: int
    constants: tuple[Node, ...] = ()
    neutral: bool = True


@dataclass(frozen=True)
class Factor:
    """A constant that every neuron is multiplied by ("times"), divided by ("over"), or set to zero by ("unless").

    at: "after" the activation; before it, at "z"; or at all outputs of the "first" linear, if that is fused. formula:
    how the constant `node` is computed.
    """

    at: Place
    how: How
    formula: str
    node: Node = field(compare=False)

    def scale(self, values: Tensor, constant: Tensor) -> Tensor:
        """Apply it to values [..., n], given the value of the constant. The dtype stays."""
        return _by(values, constant, self.how)


@dataclass(frozen=True)
class Slopes:
    """The slopes of a PReLU for negative values: the constant `node`, computed by `formula`."""

    formula: str
    node: Node = field(compare=False)


@dataclass(frozen=True)
class Nonlinearity:
    """hidden = output_scale · act(input_scale · z), multiplied by `up` if gated, and by constants at their places.

    gate_leaf: the index of the leaf that holds z. fused: the half of that leaf that is z, if it holds both z and up.
    slopes: those of a PReLU, which is relu(z) - slope · relu(-z). Its activation is "relu".
    """

    activation: str
    gated: bool = False
    gate_leaf: int = 0
    fused: Halves | None = None
    input_scale: float = 1.0
    output_scale: float = 1.0
    factors: tuple[Factor, ...] = ()
    slopes: Slopes | None = None

    @property
    def constants(self) -> tuple[Node, ...]:
        """The constants that it is computed with."""
        slopes = () if self.slopes is None else (self.slopes.node,)
        return (*(factor.node for factor in self.factors), *slopes)


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
                    found = _with_constants(graph, cone, found)
                if isinstance(found, Nonlinearity) and found.activation == "identity" and not found.gated:
                    return Rejection("no-activation", "there is no activation between the two linears")
                return found
    except _NotElementwise as problem:
        return problem.rejection
    what = f"{' and '.join(map(str, widths))} values leave the first linear but {cone.width} enter the second"
    return Rejection("widths-differ", what)


class _NotElementwise(Exception):  # noqa: N818  (control flow inside this file, not an error a user sees)
    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.rejection = Rejection(code, reason)


def _plain(graph: GraphModule, cone: Cone) -> Nonlinearity | Rejection:
    z = _spread(_probe_shape(cone, 0))
    y = _run(graph, cone, [z])
    named = _name(z, y, _scales(cone))
    if named is None:
        return _unknown(lambda value: _run(graph, cone, [torch.full_like(z, value)]))
    activation, input_scale, output_scale = named
    return Nonlinearity(activation, input_scale=input_scale, output_scale=output_scale)


def _fused(graph: GraphModule, cone: Cone) -> Nonlinearity | Rejection:
    shape = _full_shape(cone, 0)
    z, up = (_spread((*shape[:-1], cone.width), seed) for seed in (0, 1))

    def run(which: Halves, z: Tensor, up: Tensor) -> Tensor:
        both = torch.empty(shape, dtype=torch.float64)
        both[..., HALVES[which](cone.width)] = z
        both[..., HALVES[OTHER[which]](cone.width)] = up
        return _run(graph, cone, [both])

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
    shape = _probe_shape(cone, 0)
    z, up = _spread(shape, 0), _spread(shape, 1)
    found: Nonlinearity | Rejection = Rejection(
        "not-gated", "the two first linears do not combine as activation(gate) · up"
    )
    for gate_leaf in (0, 1):

        def run(a: Tensor, b: Tensor, gate_leaf: int = gate_leaf) -> Tensor:
            return _run(graph, cone, [a, b] if gate_leaf == 0 else [b, a])

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
    if _close(y, gate * up):
        return _name(z, gate, scales)
    for name, activation in ACTIVATIONS.items():
        if activation.up is not None:
            value = activation.fn(z) * activation.up.fn(up)
            scale = _ratio(y, value)
            if scale != 0.0 and _close(y, scale * value):
                return name, 1.0, scale
    return None


def _name(z: Tensor, y: Tensor, scales: set[float]) -> tuple[str, float, float] | None:
    """Return (activation, input scale, output scale) with y == output scale · act(input scale · z), else None."""
    if not bool(torch.isfinite(y).all()):
        return None
    known = [(name, activation.fn) for name, activation in ACTIVATIONS.items() if activation.up is None]
    for name, function in known:
        if _close(y, function(z)):
            return name, 1.0, 1.0
    for input_scale in sorted(scales | {1.0}, key=lambda scale: scale != 1.0):
        for name, function in known:
            value = function(input_scale * z)
            output_scale = _ratio(y, value)
            if output_scale != 0.0 and _close(y, output_scale * value):
                return name, input_scale, output_scale
    return None


def _ratio(y: Tensor, value: Tensor) -> float:
    """Return the number that brings `value` nearest to y."""
    ratio = float((y * value).sum() / value.square().sum().clamp_min(1e-30))
    # Rounding errors of a scale that is not there would be folded into the weights.
    return 1.0 if abs(ratio - 1.0) < 1e-9 else ratio


def _close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, atol=_ATOL, rtol=_RTOL)


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


# ------------------------------------------------------------------------------------- constants in between


def _with_constants(graph: GraphModule, cone: Cone, found: Nonlinearity) -> Nonlinearity:
    """Find the places of the constants, given what the cone computes when all of them are one."""
    real = {node: evaluate(graph, node) for node in cone.constants}
    drawn = {node: _draw(value, seed) for seed, (node, value) in enumerate(real.items())}
    values = [_spread(_full_shape(cone, leaf), leaf) for leaf in range(len(cone.leaves))]
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
    expected = _run(graph, cone, scaled, {} if slopes is None else {slopes: real[slopes]})
    for factor in factors:
        if factor.at == "after":
            expected = factor.scale(expected, real[factor.node])
    if not _close(_run(graph, cone, values, real), expected):
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
    y, base = _run(graph, cone, values, {**fixed, node: drawn[node]}), _run(graph, cone, values, fixed)
    width, constant = width_of(graph, node), drawn[node]
    ways: tuple[How, ...] = ("times", "over")
    if constant.dtype == torch.bool:
        ways = ("times",) if cone.neutral else ("unless",)
    for how in ways:
        if width in (1, cone.width) and _close(y, _by(base, constant, how)):
            return Factor("after", how, formula(node), node)
        places: tuple[Place, ...] = ("z",) if found.fused is None else ("first", "z")
        for at in places:
            if width in (1, 2 * cone.width if at == "first" else cone.width):
                scaled = [value.clone() for value in values]
                _scale(scaled, cone, found, at, how, constant)
                if _close(y, _run(graph, cone, scaled, fixed)):
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
    expected = _run(graph, cone, values, {}) * torch.where(z < 0, drawn[node].double().reshape(-1), 1.0)
    return _close(_run(graph, cone, values, {node: drawn[node]}), expected)


def _scale(values: list[Tensor], cone: Cone, found: Nonlinearity, at: Place, how: How, constant: Tensor) -> None:
    """Apply a factor to z, or to all outputs of the first linear, in place."""
    part = slice(None) if at == "first" or found.fused is None else HALVES[found.fused](cone.width)
    values[found.gate_leaf][..., part] = _by(values[found.gate_leaf][..., part], constant, how)


def _draw(like: Tensor, seed: int) -> Tensor:
    """Draw a constant: numbers of both signs and not near zero, or truth values."""
    generator = torch.Generator().manual_seed(100 + seed)
    values = torch.rand(like.shape, generator=generator, dtype=torch.float64) + 0.5
    signs = torch.rand(like.shape, generator=generator) < 0.5
    if like.dtype == torch.bool:
        return signs
    return torch.where(signs, -values, values) if like.is_floating_point() else signs.to(like.dtype) + 1


def _by(values: Tensor, constant: Tensor, how: How) -> Tensor:
    """Multiply or divide values [..., n] by a constant, or set them to zero where it is true."""
    number = constant.reshape(-1).to(values)
    if how == "unless":
        return values * (1 - number)
    return values / number if how == "over" else values * number


def _not_a_factor(graph: GraphModule, node: Node) -> _NotElementwise:
    what = f"a parameter ('{name_of(graph, node)}') stands between the linears and does more than scale the neurons"
    return _NotElementwise("parameter-between", what)


# --------------------------------------------------------------------------------------------- running a cone


def _spread(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Draw values of both signs, dense around zero and beyond every kink of the known activations, some up to 10⁴.

    The large values distinguish a ReLU from a ReLU that is clamped at 7 or 100.
    """
    generator = torch.Generator().manual_seed(seed)
    values = (torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1).pow(3) * 8
    return torch.where(torch.rand(shape, generator=generator) < 0.2, values * 10 ** (values.abs() * 3 / 8), values)


def _probe_shape(cone: Cone, leaf: int) -> tuple[int, ...]:
    """Return the shape of a short vector if the cone is purely pointwise, else the leaf's real shape."""
    if cone.constants or any(node.target in SHAPE_OPS for node in cone.nodes):
        return _full_shape(cone, leaf)
    return (769,)


def _full_shape(cone: Cone, leaf: int) -> tuple[int, ...]:
    shape = shape_of(cone.leaves[leaf].output)
    assert shape is not None
    substitution = _substitution(cone)
    return tuple(_number(size, substitution) for size in shape)


def _substitution(cone: Cone) -> dict[sympy.Symbol, int]:
    """Choose small distinct numbers for the dynamic sizes."""
    symbols: set[sympy.Symbol] = set()
    for leaf in cone.leaves:
        for size in shape_of(leaf.output) or ():
            if isinstance(size, torch.SymInt):
                symbols |= size.node.expr.free_symbols
    ordered = sorted(symbols, key=str)
    return dict(zip(ordered, (2, 3, 5, 7, 11, 13), strict=False))


def _number(size: Any, substitution: Mapping[sympy.Symbol, int]) -> int:
    if isinstance(size, torch.SymInt):
        value = size.node.expr.xreplace(substitution) if hasattr(size.node.expr, "xreplace") else size.node.expr
        if getattr(value, "free_symbols", None):
            raise _NotElementwise("depends-on-data", "the shape between the linears depends on the data")
        return int(value)
    return int(size)


def _run(
    graph: GraphModule, cone: Cone, values: list[Tensor], constants: Mapping[Node, Tensor] | None = None
) -> Tensor:
    """Run the cone in float64, where dropout and dtype conversions do nothing. Constants that are not given are one.

    The result has the first value's leading dimensions and the cone's width.
    """
    environment: dict[Node, Any] = {leaf.output: value.clone() for leaf, value in zip(cone.leaves, values, strict=True)}
    for node in cone.constants:
        real = evaluate(graph, node)
        neutral = torch.full_like(real, cone.neutral if real.dtype == torch.bool else 1)
        value = neutral if constants is None else constants.get(node, neutral)
        environment[node] = value.double() if value.is_floating_point() else value
    substitution = _substitution(cone)

    def resolve(node: Node) -> Any:
        if node in environment:
            return environment[node]
        constant = tensor_of(graph, node)
        if constant is not None:
            return constant.detach().double() if constant.is_floating_point() else constant
        return _number(node.meta.get("val"), substitution)

    try:
        for node in cone.nodes:
            args: Any = map_arg(node.args, resolve)
            kwargs: Any = map_arg(node.kwargs, resolve)
            if node.op == "call_module" or node.target in DROPOUTS or is_copy(node):
                environment[node] = args[0]
            else:
                if "dtype" in kwargs and kwargs["dtype"] is not None and kwargs["dtype"].is_floating_point:
                    kwargs = {**kwargs, "dtype": torch.float64}
                assert callable(node.target)
                environment[node] = node.target(*args, **kwargs)
        result: Tensor = environment[cone.output]
    except _NotElementwise:
        raise
    except Exception as error:
        raise _NotElementwise(
            "cannot-run", f"the nodes between the linears cannot be run on their own ({error})"
        ) from error
    lead = values[0].shape[:-1] if values[0].dim() > 1 else values[0].shape
    wanted = (*lead, cone.width) if values[0].dim() > 1 else lead
    if result.numel() != int(torch.Size(wanted).numel()):
        raise _NotElementwise(
            "changes-shape", f"the values change shape between the linears: {list(wanted)} to {list(result.shape)}"
        )
    return result.reshape(wanted).double()

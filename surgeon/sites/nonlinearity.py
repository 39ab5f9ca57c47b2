"""Identify the activation between two linear layers by running it on numbers.

A GELU may be one op or eight, and a gate may be split off by `chunk`, by slices or by `view` and `unbind`. There is no
pattern for each spelling. Instead the nodes between the linears are run in float64 on a range of values, and the
results are compared with the known activation functions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import sympy  # type: ignore[import-untyped]
import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from surgeon.graph.ops import DROPOUTS, SHAPE_OPS, is_copy
from surgeon.graph.traced import aten, shape_of, tensor_of
from surgeon.kernels.activations import ACTIVATIONS
from surgeon.sites.linear import Linear
from surgeon.sites.rejection import Rejection

Halves = Literal["first", "second", "even", "odd"]
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
    """

    nodes: tuple[Node, ...]
    leaves: tuple[Linear, ...]
    output: Node
    width: int


@dataclass(frozen=True)
class Nonlinearity:
    """hidden = output_scale · act(input_scale · z), multiplied by `up` if gated.

    gate_leaf: the index of the leaf that holds z. fused: the half of that leaf that is z, if it holds both z and up.
    """

    activation: str
    gated: bool = False
    gate_leaf: int = 0
    fused: Halves | None = None
    input_scale: float = 1.0
    output_scale: float = 1.0


def identify(graph: GraphModule, cone: Cone) -> Nonlinearity | Rejection:
    """Identify what the cone computes, or say why it cannot be part of a feed-forward layer."""
    widths = [leaf.out_features for leaf in cone.leaves]
    try:
        if widths == [cone.width]:
            return _plain(graph, cone)
        if widths == [2 * cone.width]:
            return _fused(graph, cone)
        if widths == [cone.width, cone.width]:
            return _gated(graph, cone)
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
    if activation == "identity":
        return Rejection("no-activation", "there is no activation between the two linears")
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
    """Return (activation, input scale, output scale) if run(z, up) == act(z) · up, else None."""
    y = run(z, up)
    gate = run(z, torch.ones_like(up))
    if not _close(y, gate * up):
        return None
    return _name(z, gate, scales)


def _name(z: Tensor, y: Tensor, scales: set[float]) -> tuple[str, float, float] | None:
    """Return (activation, input scale, output scale) with y == output scale · act(input scale · z), else None."""
    if not bool(torch.isfinite(y).all()):
        return None
    known = [(name, activation.fn) for name, activation in ACTIVATIONS.items()]
    for name, function in known:
        if _close(y, function(z)):
            return name, 1.0, 1.0
    for input_scale in sorted(scales | {1.0}, key=lambda scale: scale != 1.0):
        for name, function in known:
            value = function(input_scale * z)
            output_scale = float((y * value).sum() / value.square().sum().clamp_min(1e-30))
            if output_scale != 0.0 and _close(y, output_scale * value):
                return name, input_scale, output_scale
    return None


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
    if any(node.target in SHAPE_OPS for node in cone.nodes):
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


def _run(graph: GraphModule, cone: Cone, values: list[Tensor]) -> Tensor:
    """Run the cone in float64, where dropout and dtype conversions do nothing.

    The result has the first value's leading dimensions and the cone's width.
    """
    environment: dict[Node, Any] = {leaf.output: value.clone() for leaf, value in zip(cone.leaves, values, strict=True)}
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

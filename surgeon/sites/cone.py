"""Run the nodes between two linear layers on numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from surgeon.graph.ops import DROPOUTS, SHAPE_OPS, is_copy
from surgeon.graph.traced import shape_of, tensor_of
from surgeon.sites.constants import evaluate
from surgeon.sites.linear import Linear
from surgeon.sites.rejection import Rejection

if TYPE_CHECKING:
    import sympy  # type: ignore[import-untyped]

_ATOL, _RTOL = 1e-5, 1e-5


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


class NotElementwise(Exception):  # noqa: N818  (control flow while a cone is identified, not an error a user sees)
    """Raised if the nodes are no function of the values of single neurons. `rejection` says why."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.rejection = Rejection(code, reason)


def close(a: Tensor, b: Tensor) -> bool:
    """Whether two results of a cone are the same, up to rounding."""
    return torch.allclose(a, b, atol=_ATOL, rtol=_RTOL)


def spread(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Draw values of both signs, dense around zero and beyond every kink of the known activations, some up to 10⁴.

    The large values distinguish a ReLU from a ReLU that is clamped at 7 or 100.
    """
    generator = torch.Generator().manual_seed(seed)
    values = (torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1).pow(3) * 8
    return torch.where(torch.rand(shape, generator=generator) < 0.2, values * 10 ** (values.abs() * 3 / 8), values)


def probe_shape(cone: Cone, leaf: int) -> tuple[int, ...]:
    """Return the shape of a short vector if the cone is purely pointwise, else the leaf's real shape."""
    if cone.constants or any(node.target in SHAPE_OPS for node in cone.nodes):
        return full_shape(cone, leaf)
    return (769,)


def full_shape(cone: Cone, leaf: int) -> tuple[int, ...]:
    """Return the shape of a leaf's output, with a small number in place of each dynamic size."""
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
            raise NotElementwise("depends-on-data", "the shape between the linears depends on the data")
        return int(value)
    return int(size)


def run_cone(
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
    except NotElementwise:
        raise
    except Exception as error:
        raise NotElementwise(
            "cannot-run", f"the nodes between the linears cannot be run on their own ({error})"
        ) from error
    lead = values[0].shape[:-1] if values[0].dim() > 1 else values[0].shape
    wanted = (*lead, cone.width) if values[0].dim() > 1 else lead
    if result.numel() != int(torch.Size(wanted).numel()):
        raise NotElementwise(
            "changes-shape", f"the values change shape between the linears: {list(wanted)} to {list(result.shape)}"
        )
    return result.reshape(wanted).double()

"""Find the normalisations of a graph, however they are written: LayerNorm and RMSNorm over the last dimension.

A norm may be one op or written out (x · rsqrt(mean(x²) + eps) · w). What is written out is run on numbers: it is a norm
if it computes what one computes, so that `(1 + w)`, casts and the order of its ops do not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from surgeon.graph.ops import SAME_VALUE, equal_size, op_name
from surgeon.graph.traced import aten, is_call, module_path, shape_of, tensor_of
from surgeon.graph.walk import walk_sources
from surgeon.sites.channels import reads_values
from surgeon.sites.constants import evaluate

# What a norm that is written out is made of, besides casts.
_ARITHMETIC = {
    *("add", "sub", "rsub", "mul", "div", "neg", "pow", "square", "sqrt", "rsqrt", "reciprocal"),
    *("mean", "var", "sum", "linalg_vector_norm", "norm", "clamp_min", "clamp"),
}
_EXPANSIONS = {aten.expand.default, aten.expand_as.default}
_REDUCTIONS = {"mean", "var", "sum", "linalg_vector_norm", "norm"}
# A small and a large root mean square of the numbers that a norm is run on. Its eps shows in the first alone.
_SMALL, _LARGE = 1e-3, 1e6
_CLOSE = 1e-8
_MOST = 40  # nodes of a norm


@dataclass(frozen=True, eq=False)
class Norm:
    """y = gain · n(x) + shift, with n(x) = x / sqrt(mean(x²) + eps). Of a LayerNorm (centred), x is less its mean.

    x, y: values [..., d]. gain, shift: float64 [d], None if there are none. nodes: those that compute y from x.
    """

    x: Node
    y: Node
    centred: bool
    gain: Tensor | None
    shift: Tensor | None
    eps: float
    nodes: frozenset[Node]

    @property
    def d_in(self) -> int:
        """d."""
        return int(self.x.meta["val"].shape[-1])

    @property
    def path(self) -> str:
        """The module path of the norm."""
        return module_path(self.y)

    @property
    def constants(self) -> set[Node]:
        """What it reads besides x: parameters, and what is computed from them."""
        return {source for node in self.nodes for source in node.all_input_nodes} - self.nodes - {self.x}

    def normalised(self, x: Tensor) -> Tensor:
        """n(x) of values [..., d], float64."""
        return _normalised(x.double(), centred=self.centred, eps=self.eps)


def find_norms(graph: GraphModule) -> list[Norm]:
    """Return the norms of the graph over the last dimension, in topological order."""
    found: list[Norm] = []
    inside: set[Node] = set()
    for node in graph.graph.nodes:
        if node in inside:
            continue
        norm = _op(graph, node) or _written_out(graph, node)
        if norm is not None:
            found.append(norm)
            inside |= norm.nodes
    return found


def _normalised(x: Tensor, *, centred: bool, eps: float) -> Tensor:
    if centred:
        x = x - x.mean(-1, keepdim=True)
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()


# --- one op -----------------------------------------------------------------------------------------------------------


def _op(graph: GraphModule, node: Node) -> Norm | None:
    if not is_call(node, aten.layer_norm.default, aten.rms_norm.default):
        return None
    centred = node.target is aten.layer_norm.default
    names = ("weight", "bias", "eps") if centred else ("weight", "eps")
    given = dict(zip(names, node.args[2:], strict=False)) | node.kwargs
    x, shape, eps = node.args[0], node.args[1], given.get("eps", 1e-5 if centred else None)
    assert isinstance(x, Node)
    assert isinstance(shape, list | tuple)
    if len(shape) != 1:
        return None
    if eps is None:
        eps = torch.finfo(x.meta["val"].dtype).eps
    factors = []
    for name in ("weight", "bias"):
        source = given.get(name)
        if source is not None and (not isinstance(source, Node) or not _is_constant(source)):
            return None
        factors.append(None if source is None else evaluate(graph, source).double())
    return Norm(x, node, centred, factors[0], factors[1], float(eps), frozenset({node}))  # type: ignore[arg-type]


def _is_constant(node: Node) -> bool:
    return all(source.op in ("get_attr", "call_function") for source in walk_sources(node)) and any(
        source.op == "get_attr" for source in walk_sources(node)
    )


# --- written out ------------------------------------------------------------------------------------------------------


def _written_out(graph: GraphModule, reduction: Node) -> Norm | None:
    """The norm whose first sum over the last dimension is this node."""
    if not _reduces_last(reduction):
        return None
    for x in _starts(reduction):
        nodes = _computed(x)
        for y in reversed(nodes):
            part = _needed(y, nodes)
            if _like(y, x) and reduction in part and not _escapes(part, y):
                norm = _identify(graph, x, y, part)
                if norm is not None:
                    return norm
    return None


def _reduces_last(node: Node) -> bool:
    if node.op != "call_function" or op_name(node) not in _REDUCTIONS or not isinstance(node.args[0], Node):
        return False
    shape, before = shape_of(node), shape_of(node.args[0])
    if not shape or not before or len(shape) != len(before) or shape[-1] != 1 or before[-1] == 1:
        return False
    return isinstance(before[-1], int) and all(map(equal_size, shape[:-1], before[:-1]))


def _starts(reduction: Node) -> Iterator[Node]:
    """The values of which this may be the sum of squares, or the mean: as they are, and before a cast."""
    node = reduction.args[0]
    while isinstance(node, Node) and op_name(node) in ("pow", "square", "mul") and len(node.all_input_nodes) == 1:
        node = node.args[0]
    while isinstance(node, Node):
        yield node
        if not is_call(node, *SAME_VALUE):
            return
        node = node.args[0]


def _computed(x: Node) -> list[Node]:
    """What is computed from x and constants by arithmetic alone, in order."""
    found: set[Node] = set()
    stack = [x]
    while stack and len(found) < _MOST:
        for user in stack.pop().users:
            if user in found or not _is_arithmetic(user):
                continue
            tensors = [source for source in user.all_input_nodes if isinstance(_value(source), Tensor)]
            sources = [source for source in tensors if reads_values(user, source)]
            if all(source is x or source in found or _is_constant(source) for source in sources):
                found.add(user)
                stack.append(user)
    return sorted(found)


def _is_arithmetic(node: Node) -> bool:
    return node.op == "call_function" and (
        op_name(node).rstrip("_") in _ARITHMETIC or node.target in SAME_VALUE | _EXPANSIONS
    )


def _value(node: Node) -> Any:
    """What a node gives; of a parameter nothing is recorded."""
    return node.meta.get("val", torch.empty(0) if node.op == "get_attr" else None)


def _needed(y: Node, nodes: Iterable[Node]) -> frozenset[Node]:
    known = set(nodes)
    return frozenset(node for node in walk_sources(y, known.__contains__) if node in known)


def _escapes(part: frozenset[Node], y: Node) -> bool:
    """Whether a value inside of the norm is read elsewhere."""
    return any(user not in part and reads_values(user, node) for node in part if node is not y for user in node.users)


def _like(y: Node, x: Node) -> bool:
    a, b = shape_of(y), shape_of(x)
    return a is not None and b is not None and len(a) == len(b) and all(map(equal_size, a, b))


def _identify(graph: GraphModule, x: Node, y: Node, part: frozenset[Node]) -> Norm | None:
    shape = shape_of(x)
    assert shape is not None
    order = [node for node in graph.graph.nodes if node in part]
    with torch.no_grad():
        try:
            return _of_function(lambda value: _run(graph, order, x, y, value), x, y, part)
        except (RuntimeError, TypeError, IndexError, AssertionError):  # of ops that are not those of a norm
            return None


def _of_function(compute: Callable[[Tensor], Tensor], x: Node, y: Node, part: frozenset[Node]) -> Norm | None:
    """Find gain, shift and eps of a function of [..., d] that may be a norm."""
    shape = shape_of(x)
    assert shape is not None
    size = [2] * (len(shape) - 2) + [8] * (len(shape) > 1) + [int(shape[-1])]
    drawn = torch.randn(size, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5
    shift = (compute(drawn) + compute(-drawn)) / 2
    shift = shift.flatten(0, -2)[0]
    for centred in (False, True):
        unit = _normalised(drawn, centred=centred, eps=0.0)
        large = compute(unit * _LARGE) - shift
        gain = ((large * unit).flatten(0, -2).sum(0)) / unit.square().flatten(0, -2).sum(0)
        small = compute(unit * _SMALL) - shift
        ratio = float((small * large).sum() / large.square().sum())
        eps = _SMALL**2 * (1 / ratio**2 - 1) if ratio > 0 else -1.0
        if not -1e-14 < eps < 1:
            continue
        eps = float(f"{max(eps, 0.0):.9g}") if eps > 1e-14 else 0.0
        if all(
            _close(compute(drawn * scale), gain * _normalised(drawn * scale, centred=centred, eps=eps) + shift)
            for scale in (1.0, 0.01)
        ):
            plain = bool((gain - 1).abs().max() < 1e-12)
            there = bool(shift.abs().max() > 1e-12)
            return Norm(x, y, centred, None if plain else gain, shift if there else None, eps, part)
    return None


def _close(a: Tensor, b: Tensor) -> bool:
    return bool(torch.isfinite(a).all()) and bool((a - b).abs().max() <= _CLOSE * b.abs().max())


def _run(graph: GraphModule, nodes: Iterable[Node], x: Node, y: Node, value: Tensor) -> Tensor:
    """Run nodes in float64, where casts do nothing."""
    known: dict[Node, Any] = {x: value}

    def resolve(node: Node) -> Any:
        if node in known:
            return known[node]
        tensor = tensor_of(graph, node)
        constant = (evaluate(graph, node) if tensor is None else tensor.detach()).cpu()
        return constant.double() if constant.is_floating_point() else constant

    for node in nodes:
        if node.target in SAME_VALUE:
            known[node] = resolve(node.args[0])  # type: ignore[arg-type]
            continue
        if node.target in _EXPANSIONS:
            known[node] = resolve(node.args[0]).expand_as(value)  # type: ignore[arg-type]
            continue
        args: Any = map_arg(node.args, resolve)
        kwargs: Any = map_arg(node.kwargs, resolve)
        kwargs = {key: torch.float64 if key == "dtype" and item is not None else item for key, item in kwargs.items()}
        assert callable(node.target)
        # Ops in place change what others read.
        known[node] = node.target(*(arg.clone() if isinstance(arg, Tensor) else arg for arg in args), **kwargs)
    result = known[y]
    assert isinstance(result, Tensor)
    return result

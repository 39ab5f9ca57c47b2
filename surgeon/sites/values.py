"""Find the heads of attention whose values can be turned: value projection → attention → output projection.

Attention adds up values, with the same numbers for all channels of a head. So a head's values may be in any basis, if
the output projection undoes it. The channels are numbered and sent through the ops that cut, move and repeat them,
which shows which rows of the value projection meet which columns of the output projection.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from surgeon.described import Described, Facts
from surgeon.graph.ops import op_name
from surgeon.graph.traced import aten, is_call, module_path, shape_of
from surgeon.sites.channels import CARRIERS, reads_values, run_moved
from surgeon.sites.linear import Linear, find_linears
from surgeon.sites.qkv import plain_size
from surgeon.sites.rejection import Rejection
from surgeon.sites.search import WeightUses
from surgeon.sites.soundness import unsound

_FUSED = aten.scaled_dot_product_attention.default
_SOFTMAX = {"softmax", "_softmax", "_safe_softmax"}
_MOVES = CARRIERS - {aten.mean.dim, aten.index.Tensor, aten.index_select.default}


@dataclass(frozen=True, eq=False, repr=False)
class ValueHeads(Described):
    """The values of an attention.

    value: the projection. out: the one that reads what the heads give. rows: int64 [G, h], the outputs of `value` that
    are the channels of each head of values. columns: int64 [G, R, h], the inputs of `out` that belong to them; R heads
    of queries share each head of values. output: a value that does not depend on the basis.
    """

    path: str
    value: Linear
    out: Linear
    rows: Tensor
    columns: Tensor
    output: Node

    @property
    def d_in(self) -> int:
        """Inputs of the output projection."""
        return self.out.in_features

    @property
    def linears(self) -> tuple[Linear, Linear]:
        """Both projections."""
        return self.value, self.out

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds of both projections for one token."""
        return sum(linear.in_features * linear.out_features for linear in self.linears)

    @property
    def describe(self) -> str:
        """`values of 6 heads of 64`."""
        return f"values of {len(self.rows)} head{'s' * (len(self.rows) > 1)} of {self.rows.shape[1]}"

    @property
    def facts(self) -> Facts:
        """What is there, for programs."""
        return {"kind": "values", "heads": len(self.rows), "width": self.rows.shape[1]}

    def moments(self, x: Tensor) -> Tensor:
        """Second moments of each head's values, float64 [G, h, h], from inputs of the output projection [N, d_in]."""
        parts = x.double()[:, self.columns.to(x.device)]  # [N, G, R, h]
        return torch.einsum("ngrh,ngrk->ghk", parts, parts).cpu() / len(x)


class _Unfit(Exception):  # noqa: N818  (control flow)
    """Raised if values cannot be turned; `rejection` says why."""

    def __init__(self, code: str, reason: str, node: Node) -> None:
        super().__init__(reason)
        self.rejection = Rejection(code, reason, node=node.name)


def find_value_heads(graph: GraphModule) -> tuple[list[ValueHeads], list[Rejection]]:
    """Return the attentions whose values can be turned, and those of which they cannot, with reasons."""
    linears, _ = find_linears(graph)
    by_output = {linear.output: linear for linear in linears}
    uses = WeightUses(graph)
    found: list[ValueHeads] = []
    refused: list[Rejection] = []
    for out in linears:
        chain = _chain(out.input)
        if chain is None:
            continue
        path = out.path
        try:
            site = _site(graph, path, out, chain, by_output)
            for linear in site.linears:
                _check(graph, linear, uses)
            found.append(site)
        except _Unfit as unfit:
            refused.append(Rejection(unfit.rejection.code, unfit.rejection.reason, path, unfit.rejection.node))
    return found, refused


def _check(graph: GraphModule, linear: Linear, uses: WeightUses) -> None:
    refused = unsound(graph, [linear])
    if refused is not None:
        raise _Unfit(refused.code, f"'{linear.path}': {refused.reason}", linear.output)
    for parameter in (linear.weight, linear.bias):
        outside = None if parameter is None else uses.outside(parameter, set(linear.nodes))
        if outside is not None:
            reason = f"a weight of '{linear.path}' is also read by '{module_path(outside) or outside.name}'"
            raise _Unfit("weight-is-shared", reason, outside)


def _chain(value: Node) -> list[Node] | None:
    """The ops from an attention to a value, the attention first; None if the value does not come from one."""
    chain: list[Node] = []
    node = value
    while node.op == "call_function":
        chain.append(node)
        if _values_of(node) is not None:
            return chain[::-1]
        if node.target not in _MOVES or not isinstance(node.args[0], Node):
            return None
        node = node.args[0]
    return None


def _values_of(node: Node) -> Node | None:
    """The values of an attention, None if the node is not one."""
    shape = shape_of(node)
    if shape is None or len(shape) != 4:
        return None
    if is_call(node, _FUSED):
        value = node.args[2] if len(node.args) > 2 else node.kwargs.get("value")
        return value if isinstance(value, Node) else None
    if is_call(node, aten.matmul.default) and isinstance(node.args[0], Node) and isinstance(node.args[1], Node):
        weights = node.args[0]
        while is_call(weights, *CARRIERS, aten.dropout.default) and isinstance(weights.args[0], Node):
            weights = weights.args[0]
        return node.args[1] if op_name(weights) in _SOFTMAX else None
    return None


def _site(
    graph: GraphModule, path: str, out: Linear, chain: Sequence[Node], by_output: Mapping[Node, Linear]
) -> ValueHeads:
    """Number the channels on both sides of an attention."""
    attention = chain[0]
    values = _values_of(attention)
    assert values is not None
    for node in chain:
        _only(node, chain, out)
    value, rows = _rows(values, by_output)
    heads, width = int(shape_of(attention)[1]), rows.shape[1]  # type: ignore[index]
    if heads % len(rows):
        raise _Unfit("values-are-mixed", "the heads of values do not divide those of queries", attention)
    columns = _columns(chain, out, heads, width)
    # Several heads may have the same values: repeated before the attention, or by it.
    rows = rows.repeat_interleave(heads // len(rows), 0)
    groups: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
    for row, column in zip(rows.tolist(), columns, strict=True):
        groups[tuple(row)].append(column)
    flat = [number for row in groups for number in row]
    if len(set(flat)) < len(flat) or len({len(group) for group in groups.values()}) > 1:
        raise _Unfit("values-are-mixed", "its heads share a part of their values", attention)
    _not_read_elsewhere(value, set(flat), values)
    columns = torch.stack([torch.stack(group) for group in groups.values()])
    return ValueHeads(path, value, out, torch.tensor(list(groups)), columns, out.output)


def _only(node: Node, chain: Sequence[Node], out: Linear) -> None:
    """Refuse an attention that is read by others too."""
    for user in node.users:
        if user not in chain and user not in out.nodes and reads_values(user, node):
            raise _Unfit("values-are-read", f"what its heads give is also read by '{_name(user)}'", user)


def _rows(values: Node, by_output: Mapping[Node, Linear]) -> tuple[Linear, Tensor]:
    """The value projection, and which of its outputs are the channels of each head, [heads, h]."""
    path: list[Node] = []
    node = values
    while node not in by_output:
        if node.op != "call_function" or node.target not in _MOVES or not isinstance(node.args[0], Node):
            reason = f"'{_name(node)}' ({op_name(node)}) stands between the value projection and the attention"
            raise _Unfit("values-are-mixed", reason, node)
        path.append(node)
        node = node.args[0]
    made = _sent(_numbered(node, (_last(node),)), node, path[::-1])
    if made.dim() != 4 or not torch.equal(made, made[:1, :, :1].expand_as(made)):
        raise _Unfit("values-are-mixed", "its values are not those of one head for each token", values)
    return by_output[node], made[0, :, 0].long()


def _columns(chain: Sequence[Node], out: Linear, heads: int, width: int) -> Tensor:
    """Which inputs of the output projection are the channels of each head, [heads, h]."""
    made = _sent(_numbered(chain[0], (1, 3)), chain[0], chain[1:])
    row = made.reshape(-1, made.shape[-1])
    if made.shape[-1] != heads * width or not torch.equal(row, row[:1].expand_as(row)):
        raise _Unfit("values-are-mixed", "the output projection does not read all heads of one token", out.output)
    if not torch.equal(row[0].sort().values, torch.arange(heads * width).double()):
        raise _Unfit("values-are-mixed", "the output projection does not read each channel once", out.output)
    return row[0].argsort().reshape(heads, width)


def _numbered(node: Node, axes: tuple[int, ...]) -> Tensor:
    """A tensor like a node's value, with numbers along some dimensions, the last of them fastest."""
    sizes = [plain_size(size) for size in shape_of(node) or ()]
    shape = [size if axis in axes else 1 for axis, size in enumerate(sizes)]
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float64).reshape(shape).expand(sizes).contiguous()


def _sent(numbers: Any, start: Node, path: Sequence[Node]) -> Tensor:
    """What ops make of numbers, one after the other."""
    node = start
    for following in path:
        try:
            numbers = run_moved(following, {node: numbers})
        except Exception as error:  # ops raise exceptions of many types
            reason = f"'{_name(following)}' cannot be followed ({error})"
            raise _Unfit("values-are-mixed", reason, following) from error
        node = following
    assert isinstance(numbers, Tensor)
    return numbers


def _not_read_elsewhere(value: Linear, channels: set[int], values: Node) -> None:
    """Refuse values that are also read by other ops than the attention, such as a cache that the model returns."""
    stack: list[tuple[Node, Any]] = [(value.output, _numbered(value.output, (_last(value.output),)))]
    while stack:
        node, numbers = stack.pop()
        for user in node.users:
            if not reads_values(user, node) or _reads_as_values(user, node, values):
                continue
            if user.op == "call_function" and user.target in _MOVES and user.args[0] is node:
                stack.append((user, run_moved(user, {node: numbers})))
            elif channels & set(numbers.flatten().long().tolist()):
                raise _Unfit("values-are-read", f"its values are also read by '{_name(user)}'", user)


def _reads_as_values(user: Node, node: Node, values: Node) -> bool:
    """Whether an attention reads a value as its values, and as nothing else."""
    return node is values and _values_of(user) is values and user.args.count(values) < 2


def _last(node: Node) -> int:
    return len(shape_of(node) or ()) - 1


def _name(node: Node) -> str:
    return "the model's output" if node.op == "output" else module_path(node) or node.name

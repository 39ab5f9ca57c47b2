"""Find residual streams.

From the value that a norm reads, the search goes back to all that is added to it and forward to all that reads it,
through ops that treat all channels alike. A stream can be turned into another basis if each of its writers ends in a
weight, and each of its readers is a norm over all channels that linear layers alone read.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from surgeon.graph.ops import DROPOUTS, SAME_VALUE, op_name
from surgeon.graph.traced import aten, common_path, is_call, module_path, shape_of, tensor_of
from surgeon.sites.channels import CARRIERS, axis_after, axis_before, reads_values, width_at
from surgeon.sites.constants import evaluate, is_constant
from surgeon.sites.linear import Linear, find_linears
from surgeon.sites.norms import Norm, find_norms
from surgeon.sites.rejection import Rejection
from surgeon.sites.soundness import unsound
from surgeon.sites.stream import Reader, Stream, Table, Writer

_SUMS = (aten.add.Tensor, aten.add_.Tensor, aten.sub.Tensor, aten.sub_.Tensor)
_PRODUCTS = (aten.mul.Tensor, aten.mul_.Tensor, aten.mul.Scalar)
_QUOTIENTS = (aten.div.Tensor, aten.div_.Tensor, aten.div.Scalar)
_JOINS = (aten.cat.default, aten.stack.default)
_CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.conv2d.padding)


def find_streams(graph: GraphModule) -> tuple[list[Stream], list[Rejection]]:
    """Return the residual streams that can be turned into another basis, and those that cannot, with reasons."""
    parts = _Parts.of(graph)
    seen: set[Norm] = set()
    found: list[Stream] = []
    refused: list[Rejection] = []
    paths: set[str] = set()
    for norm in parts.norms:
        if norm in seen:
            continue
        flow = _Flow(parts, norm)
        seen |= {norm, *flow.norms}
        if not flow.sums:
            continue  # a norm of something else, such as of queries
        path = common_path(sorted(one.path for one in flow.norms)) or "model"
        number = 1 + sum(other.partition("@")[0] == path for other in paths)
        path = path if number == 1 else f"{path}@{number}"
        paths.add(path)
        stream = flow.stream(path)
        if isinstance(stream, Stream):
            found.append(stream)
        else:
            refused.append(replace(stream, path=path))
    return found, refused


@dataclass(frozen=True)
class _Parts:
    """What a search looks up. read_by: the linear layers by the value that they read."""

    graph: GraphModule
    norms: list[Norm]
    norm_of: dict[Node, Norm]
    linear_of: dict[Node, Linear]
    opaque: dict[Node, str]
    norms_at: dict[Node, list[Norm]]
    read_by: dict[Node, list[Linear]]

    @classmethod
    def of(cls, graph: GraphModule) -> _Parts:
        linears, opaque = find_linears(graph)
        norms = find_norms(graph)
        norms_at, read_by = defaultdict[Node, list[Norm]](list), defaultdict[Node, list[Linear]](list)
        for norm in norms:
            norms_at[norm.x].append(norm)
        for linear in linears:
            for value in {linear.input, *linear.core.all_input_nodes} - {linear.weight, linear.bias}:
                read_by[value].append(linear)
        return cls(
            graph,
            norms,
            {norm.y: norm for norm in norms},
            {linear.output: linear for linear in linears},
            {one.output: one.why for one in opaque},
            norms_at,
            read_by,
        )

    def linear_reading(self, value: Node, user: Node) -> Linear | None:
        """The linear layer that reads a value by this node."""
        return next((linear for linear in self.read_by.get(value, ()) if user in linear.nodes), None)


class _Flow:
    """A stream while it is searched, from a norm that reads it. axis: of the channels in each of its values."""

    def __init__(self, parts: _Parts, start: Norm) -> None:
        self.parts, self.width = parts, start.d_in
        self.axis: dict[Node, int] = {}
        self.norms: dict[Norm, None] = {}
        self.readers: list[Reader] = []
        self.writers: dict[Node, Writer] = {}
        self.tables: dict[tuple[Node, Node, int], Table] = {}
        self.problems: list[tuple[Node, Rejection]] = []
        self.sums = 0
        self._stack: list[Node] = []
        self._join(start.x, _last(start.x))
        while self._stack:
            node = self._stack.pop()
            self._go_back(node, self.axis[node])
            self._go_on(node, self.axis[node])

    def stream(self, path: str) -> Stream | Rejection:
        """The stream, or the reason why it cannot be turned."""
        if self.problems:
            # What a post-norm writes is also read in ways that are only its consequences.
            post = [found for found in self.problems if found[1].code == "post-norm"]
            return min(post or self.problems, key=lambda found: found[0])[1]
        kinds = {norm.centred for norm in self.norms}
        if len(kinds) > 1:
            odd = next(norm for norm in self.norms if norm.centred)
            return Rejection("mixed-norms", "LayerNorms and RMSNorms read it", node=odd.y.name)
        bare = next((reader for reader in self.readers if reader.norm is None), None)
        if kinds == {True} and bare is not None:
            reason = f"'{bare.linear.path}' reads it without a LayerNorm, so that its mean is not free"
            return Rejection("stream-is-read", reason, node=bare.linear.output.name)
        if not self.readers:
            return Rejection("stream-is-read", "no linear layer reads it")
        found = Stream(
            path,
            self.width,
            kinds == {True},
            tuple(sorted(self.norms, key=lambda norm: norm.y)),
            tuple(sorted(self.readers, key=lambda reader: reader.linear.output)),
            tuple(sorted(self.writers.values(), key=lambda writer: writer.linear.output)),
            tuple(self.tables.values()),
        )
        for linear in found.linears:
            refused = unsound(self.parts.graph, [linear])
            if refused is not None:
                return replace(refused, reason=f"'{linear.path}': {refused.reason}", node=linear.output.name)
        return found

    # --- the values

    def _join(self, node: Node, axis: int | None) -> None:
        """Make a value one of the stream."""
        if node in self.axis:
            return
        if axis is None or width_at(node, axis) != self.width:
            reason = f"what '{_name(node)}' ({op_name(node)}) gives is a part of it, and has no number for each channel"
            self._refuse("stream-is-written", reason, node)
            return
        self.axis[node] = axis
        self._stack.append(node)

    def _refuse(self, code: str, reason: str, node: Node) -> None:
        self.problems.append((node, Rejection(code, reason, node=node.name)))

    # --- what writes

    def _go_back(self, node: Node, axis: int) -> None:
        """Join what a value of the stream is made from."""
        parts = self.parts
        if node in parts.linear_of and axis == _last(node):
            self.writers[node] = Writer(parts.linear_of[node])
        elif node in parts.norm_of:
            self._post_norm(parts.norm_of[node])
        elif is_call(node, aten.embedding.default) and axis == _last(node):
            self._from(node, node.args[0], 1)
        elif is_call(node, *_CONVOLUTIONS) and axis == 1 and _groups(node) == 1:
            self._from(node, node.args[1], 0)
            if len(node.args) > 2 and node.args[2] is not None:
                self._from(node, node.args[2], 0)
        elif is_call(node, *_SUMS) and not _added_number(node):
            operands = [one for one in node.args[:2] if isinstance(one, Node)]
            self.sums += len(operands) > 1
            for operand in operands:
                self._from(node, operand, self._aligned(node, operand, axis))
        elif is_call(node, *_PRODUCTS, *_QUOTIENTS):
            self._from_product(node, axis)
        elif is_call(node, *DROPOUTS) or _fills_zeros(node):
            self._from(node, node.args[0], axis)
        elif is_call(node, aten.where.self):
            for chosen in node.args[1:3]:
                self._from(node, chosen, self._aligned(node, chosen, axis))
        elif is_call(node, *_JOINS):
            for operand in _parts_of(node):
                self._from(node, operand, _axis_in(node, axis))
        elif is_call(node, *CARRIERS):
            self._from(node, node.args[0], axis_before(node, axis))
        else:
            self._not_a_weight(node)

    def _from(self, node: Node, source: Any, axis: int | None) -> None:
        """Join a value that another value of the stream is made from."""
        tensor = tensor_of(self.parts.graph, source) if isinstance(source, Node) else None
        if tensor is None and isinstance(source, Node):
            self._join(source, axis)
        elif tensor is None or axis is None or not 0 <= axis < tensor.dim() or tensor.shape[axis] != self.width:
            self._refuse("stream-is-written", f"{op_name(node)} writes what is no value for each channel", node)
        elif type(tensor) not in (Tensor, torch.nn.Parameter) or not tensor.is_floating_point():
            self._refuse("unusable-weights", f"'{source.target}' is no plain floating-point tensor", source)
        else:
            self.tables[node, source, axis] = Table(node, source, axis)

    def _from_product(self, node: Node, axis: int) -> None:
        """A product with numbers that are the same for all channels, or what a linear layer gives times a gain."""
        wide = [one for one in node.args[:2] if isinstance(one, Node) and self._is_wide(node, one, axis)]
        if len(wide) == 1 and (wide[0] is node.args[0] or not is_call(node, *_QUOTIENTS)):
            self._from(node, wide[0], self._aligned(node, wide[0], axis))
            return
        for value, gain in (wide, wide[::-1]) if len(wide) == 2 and is_call(node, *_PRODUCTS) else ():
            linear = self._alone(value)
            if linear is not None and is_constant(self.parts.graph, gain) and axis == _last(node):
                scale = evaluate(self.parts.graph, gain).double()
                if scale.numel() == self.width:
                    self.writers[linear.output] = Writer(linear, scale.reshape(-1), node)
                    return
        self._not_a_weight(node)

    def _is_wide(self, node: Node, operand: Node, axis: int) -> bool:
        """Whether an operand has a number for each channel."""
        place = self._aligned(node, operand, axis)
        return place >= 0 and self._shape(operand)[place] != 1

    def _aligned(self, node: Node, other: Any, axis: int) -> int:
        """The dimension of `other` that meets one of `node` in an op that broadcasts; negative if there is none."""
        return axis - (len(self._shape(node)) - len(self._shape(other))) if isinstance(other, Node) else -1

    def _shape(self, node: Node) -> tuple[int | torch.SymInt, ...]:
        """The shape of a value or a parameter, () of what is no tensor."""
        tensor = tensor_of(self.parts.graph, node)
        return (shape_of(node) or ()) if tensor is None else tuple(tensor.shape)

    def _alone(self, value: Node) -> Linear | None:
        """The linear layer that gives this value, if nothing else reads it; dropout may stand between."""
        while len(value.users) == 1:
            if value in self.parts.linear_of:
                return self.parts.linear_of[value]
            if not is_call(value, *DROPOUTS, *SAME_VALUE):
                return None
            value = value.args[0]  # type: ignore[assignment]
        return None

    def _not_a_weight(self, node: Node) -> None:
        if node in self.parts.opaque:
            self._refuse("unreadable-linear", f"'{module_path(node)}': {self.parts.opaque[node]}", node)
        elif node.op == "placeholder":
            self._refuse("stream-is-written", f"it starts at the model's input '{node.name}', not at a weight", node)
        elif not self._in_region(node):
            reason = f"'{_name(node)}' ({op_name(node)}) writes into it, which does not end in a weight"
            self._refuse("stream-is-written", reason, node)

    # --- what reads

    def _go_on(self, node: Node, axis: int) -> None:
        """Join what is made from a value of the stream, and note the norms and linear layers that read it."""
        for user in node.users:
            if user in self.axis or not reads_values(user, node):
                continue
            norm = next((one for one in self.parts.norms_at.get(node, ()) if user in one.nodes), None)
            linear = self.parts.linear_reading(node, user)
            if norm is not None and axis == _last(node):
                if norm not in self.norms:
                    self.norms[norm] = None
                    self._after_norm(norm)
            elif linear is not None and axis == _last(node):
                self.readers.append(Reader(None, linear))
            elif (made := self._carried(user, node, axis)) is not None:
                self._join(user, made)
            elif not self._in_region(user):
                self._refuse("stream-is-read", _read_by(user, "it"), user)

    def _carried(self, user: Node, node: Node, axis: int) -> int | None:
        """The dimension of the channels in what an op makes of a value, None if the op does not treat them alike."""
        if is_call(user, *_SUMS) and not _added_number(user):
            return self._aligned(node, user, axis)
        if is_call(user, *DROPOUTS) or _fills_zeros(user):
            return axis
        if is_call(user, *_PRODUCTS, *_QUOTIENTS):
            return self._scaled(user, node, axis)
        if is_call(user, aten.where.self) and node is not user.args[0]:
            return self._aligned(node, user, axis)
        if is_call(user, *_JOINS):
            made = axis + (user.target is aten.stack.default and _dim(user) <= axis)
            return made if _axis_in(user, made) == axis else None
        return axis_after(user, node, axis) if is_call(user, *CARRIERS) and user.args[0] is node else None

    def _scaled(self, user: Node, node: Node, axis: int) -> int | None:
        """The dimension of the channels where a value is multiplied by the same number for all of them."""
        made = self._aligned(node, user, axis)
        wide = [one for one in user.args[:2] if isinstance(one, Node) and self._is_wide(user, one, made)]
        first = user.args[0] is node or not is_call(user, *_QUOTIENTS)
        return made if wide == [node] and first and user.args.count(node) == 1 else None

    def _after_norm(self, norm: Norm) -> None:
        """Note the linear layers that read what a norm gives, and refuse the stream if anything else does."""
        stack: list[tuple[Node, int]] = [(norm.y, _last(norm.y))]
        while stack:
            value, axis = stack.pop()
            for user in value.users:
                if not reads_values(user, value):
                    continue
                linear, made = self.parts.linear_reading(value, user), None
                if linear is not None and axis == _last(value):
                    self.readers.append(Reader(norm, linear))
                    continue
                if is_call(user, *DROPOUTS):
                    made = axis
                elif is_call(user, *CARRIERS) and user.args[0] is value:
                    made = axis_after(user, value, axis)
                elif norm.shift is None and is_call(user, *_PRODUCTS, *_QUOTIENTS):
                    made = self._scaled(user, value, axis)
                if made is not None:
                    stack.append((user, made))
                elif is_call(user, *_SUMS):
                    self._post_norm(norm)
                    self._join(user, self._aligned(value, user, axis))
                elif user in self.parts.opaque:
                    self._not_a_weight(user)
                elif not self._in_region(user):
                    self._refuse("stream-is-read", _read_by(user, f"what '{_name(norm.y)}' gives"), user)

    def _post_norm(self, norm: Norm) -> None:
        reason = f"what the norm '{_name(norm.y)}' gives is added to it, and a norm's gain cannot be turned"
        self._refuse("post-norm", reason, norm.y)
        self._join(norm.x, _last(norm.x))

    def _in_region(self, node: Node) -> bool:
        """Refuse an op that runs a graph of its own."""
        if not isinstance(node.target, torch._ops.HigherOrderOperator):
            return False
        autocast = node.target is torch.ops.higher_order.wrap_with_autocast
        code, where = ("under-autocast", "under torch.autocast") if autocast else ("in-subgraph", "in an op of its own")
        self._refuse(code, f"a part of the model that reads or writes it is computed {where}", node)
        return True


def _last(node: Node) -> int:
    return len(shape_of(node) or ()) - 1


def _added_number(node: Node) -> bool:
    """Whether a sum adds a number other than zero to all channels."""
    return any(not isinstance(one, Node) and one != 0 for one in node.args[:2])


def _fills_zeros(node: Node) -> bool:
    """Whether masked values become zero, in all channels of a token."""
    if not is_call(node, aten.masked_fill.Scalar, aten.masked_fill_.Scalar) or node.args[2] != 0:
        return False
    mask = node.args[1]
    shape = shape_of(mask) if isinstance(mask, Node) else None
    return bool(shape) and shape[-1] == 1  # type: ignore[index]


def _groups(node: Node) -> object:
    return node.args[6] if len(node.args) > 6 else node.kwargs.get("groups", 1)


def _parts_of(node: Node) -> Sequence[Node]:
    given = node.args[0]
    assert isinstance(given, list | tuple)
    return [one for one in given if isinstance(one, Node)]


def _dim(node: Node) -> int:
    """The dimension along which values are put together."""
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    assert isinstance(dim, int)
    return dim % len(shape_of(node) or ())


def _axis_in(node: Node, axis: int) -> int | None:
    """The dimension of the channels in what is put together, from that in the result."""
    dim = _dim(node)
    if dim == axis:
        return None
    return axis - (node.target is aten.stack.default and dim < axis)


def _name(node: Node) -> str:
    return module_path(node) or node.name


def _read_by(user: Node, what: str) -> str:
    if user.op == "output":
        return f"the model returns {what}"
    return f"{what} is read by '{_name(user)}' ({op_name(user)}), which is no linear layer"

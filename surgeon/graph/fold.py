"""Fold matrices into the parameters of a graph, which get new values; the tensors that others hold stay as they are."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from surgeon.graph.edit import get_attr
from surgeon.graph.ownership import replace_attribute
from surgeon.graph.traced import free_target, module_path, tensor_key, tensor_of

# Numbers that are held in float64 at a time.
_HELD = 2**24


@dataclass(frozen=True, eq=False)
class Fold:
    """What becomes of a parameter where one node reads it: along `axis`, (old · gain) @ matrix + added.

    user: the node that reads it. node: its `get_attr` node. gain: float64 [d]. matrix: float64 [d, d], or [G, h, h] for
    groups of channels. groups: int64 [G, h], the channels of each; others stay as they are. added: float64, of the
    parameter's shape. None: nothing.
    """

    user: Node
    node: Node
    axis: int
    gain: Tensor | None = None
    matrix: Tensor | None = None
    groups: Tensor | None = None
    added: Tensor | None = None

    def of(self, old: Tensor) -> Tensor:
        """The new value, rounded to the dtype of the old one."""
        rows = old.movedim(self.axis, -1)
        made = torch.empty_like(rows, memory_format=torch.contiguous_format)
        width = rows.shape[-1]
        flat, out = rows.reshape(-1, width), made.view(-1, width)
        step = max(1, _HELD // width)
        for start in range(0, len(flat), step):
            part = flat[start : start + step].double()
            out[start : start + step] = self._turned(part if self.gain is None else part * self.gain)
        made = made.movedim(-1, self.axis)
        return (made if self.added is None else (made.double() + self.added).to(old.dtype)).contiguous()

    def _turned(self, rows: Tensor) -> Tensor:
        """Rows [n, d] times the matrix."""
        if self.matrix is None:
            return rows
        if self.groups is None:
            return rows @ self.matrix
        turned = rows.clone()
        turned[:, self.groups] = torch.einsum("ngh,ghk->ngk", rows[:, self.groups], self.matrix)
        return turned

    def same_as(self, other: Fold) -> bool:
        """Whether it does the same to a parameter."""
        pairs = (
            *((self.gain, other.gain), (self.matrix, other.matrix)),
            *((self.groups, other.groups), (self.added, other.added)),
        )
        return self.axis == other.axis and all(
            a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs
        )


@torch.no_grad()
def fold(graph: GraphModule, folds: Iterable[Fold]) -> dict[tuple[Node, Node], Node]:
    """Give parameters new values, where the given nodes read them.

    What is not named reads the old value. If a parameter would get several values, as a tied one may, each but one gets
    a name of its own, in the module that reads it.

    Returns:
        The `get_attr` nodes of those that got a name of their own, by reader and former node.
    """
    by_tensor: dict[tuple[object, ...], list[Fold]] = defaultdict(list)
    for one in folds:
        tensor = tensor_of(graph, one.node)
        assert tensor is not None
        by_tensor[tensor_key(tensor)].append(one)
    readers: dict[tuple[object, ...], list[tuple[Node, Node]]] = defaultdict(list)
    for node in graph.graph.nodes:
        tensor = tensor_of(graph, node)
        if tensor is not None and tensor_key(tensor) in by_tensor:
            readers[tensor_key(tensor)] += [(user, node) for user in node.users]
    renamed: dict[tuple[Node, Node], Node] = {}
    for key, several in by_tensor.items():
        renamed |= _fold_one(graph, several, readers[key])
    return renamed


def _fold_one(
    graph: GraphModule, folds: Sequence[Fold], readers: Sequence[tuple[Node, Node]]
) -> dict[tuple[Node, Node], Node]:
    """Fold into one parameter."""
    old = tensor_of(graph, folds[0].node)
    assert old is not None
    left = {(one.user, one.node) for one in folds}
    unfolded = {str(node.target) for user, node in readers if (user, node) not in left}
    renamed: dict[tuple[Node, Node], Node] = {}
    groups = _alike(folds)
    for place, group in enumerate(groups):
        new: Tensor = group[0].of(old.detach())
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, requires_grad=old.requires_grad)
        targets = {str(one.node.target) for one in group}
        later = {str(one.node.target) for other in groups[place + 1 :] for one in other}
        if targets & (unfolded | later):
            renamed |= _rename(graph, group, new)
            continue
        for target in targets:
            replace_attribute(graph, target, new)
    return renamed


def _rename(graph: GraphModule, group: Sequence[Fold], new: Tensor) -> dict[tuple[Node, Node], Node]:
    """Let the nodes read a new parameter, which stands in the module of the first of them."""
    first = group[0]
    field = str(first.node.target).rpartition(".")[2]
    target = add_parameter(graph, module_path(first.user), field, new)
    renamed = {}
    for one in group:
        with graph.graph.inserting_before(one.user):
            renamed[one.user, one.node] = get_attr(graph, target)
        one.user.replace_input_with(one.node, renamed[one.user, one.node])
    return renamed


def add_parameter(graph: GraphModule, path: str, field: str, value: Tensor) -> str:
    """Register a parameter or buffer in the module at `path`, made if need be; returns its target."""
    target = free_target(graph, path, field)
    owner, _, name = target.rpartition(".")
    module: nn.Module = graph
    for part in owner.split(".") if owner else ():
        if not hasattr(module, part):
            module.add_module(part, nn.Module())
        module = getattr(module, part)
    if isinstance(value, nn.Parameter):
        module.register_parameter(name, value)
    else:
        module.register_buffer(name, value)
    return target


def _alike(folds: Sequence[Fold]) -> list[list[Fold]]:
    """Put those that do the same together."""
    groups: list[list[Fold]] = []
    for one in folds:
        group = next((group for group in groups if group[0].same_as(one)), None)
        if group is None:
            groups.append([one])
        else:
            group.append(one)
    return groups

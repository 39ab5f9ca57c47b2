"""Small tools for rewriting a graph: add nodes with shapes and module paths, read inner values, own parameters."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch._guards import detect_fake_mode
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from surgeon.graph.traced import TRAIN_VALUE, TracedGraph, aten, fork, is_call, shape_of, tensor_key, tensor_of
from surgeon.sites.ffn import Call
from surgeon.sites.linear import SAME_VALUE
from surgeon.sites.nonlinearity import SHAPE_OPS


def emit(graph: GraphModule, target: Any, *args: Any, path: str, name: str | None = None) -> Node:
    """Add a `call_function` node at the graph's insertion point, with the shape its op gives and a module path.

    Raises:
        RuntimeError: the op refuses the shapes of its arguments.
    """
    node = graph.graph.create_node("call_function", target, args, name=name)
    mode = detect_fake_mode([source.meta.get("val") for source in node.all_input_nodes])
    assert mode is not None, "a traced graph records fake values"

    def value(source: Node) -> Any:
        if "val" not in source.meta:
            tensor = tensor_of(graph, source)
            assert tensor is not None
            source.meta["val"] = mode.from_tensor(tensor, static_shapes=True)
        return source.meta["val"]

    with mode:
        node.meta["val"] = target(*map_arg(node.args, value))
    set_path(node, path)
    return node


def get_attr(graph: GraphModule, target: str) -> Node:
    """Add a node that reads a parameter or buffer."""
    node = graph.graph.get_attr(target)
    mode = detect_fake_mode([other.meta.get("val") for other in graph.graph.nodes])
    tensor = tensor_of(graph, node)
    if mode is not None and tensor is not None:
        node.meta["val"] = mode.from_tensor(tensor, static_shapes=True)
    return node


def set_path(node: Node, path: str) -> None:
    """Record the module path a node belongs to, in the place where `torch.export` records it."""
    node.meta["nn_module_stack"] = {path: (path, "torch.nn.Module")}


def emit_dropout(graph: TracedGraph, value: Node, probability: float, *, path: str) -> Node:
    """Add a dropout that follows the graph's training mode; `value` itself where there is nothing to drop.

    A graph of evaluation form has no training mode, so it gets none.
    """
    if probability == 0.0 or graph.meta["trace"].form == "eval":
        return value
    node = emit(graph, aten.dropout.default, value, probability, graph.training, path=path)
    node.meta[TRAIN_VALUE] = True
    return node


def replace_value(old: Node, new: Node, x: Node, inside: Iterable[Node]) -> None:
    """Let everything read `new` instead of `old`.

    Values inside the replaced part may still be asked for their size (never for their content); those questions go to
    the part's input `x` where it has the same size.
    """
    old.replace_all_uses_with(new)
    for node in inside:
        for user in list(node.users):
            if is_call(user, aten.sym_size.int):
                dim = user.args[1]
                assert isinstance(dim, int)
                value, other = shape_of(node), shape_of(x)
                if value and other and len(value) == len(other) and str(value[dim]) == str(other[dim]):
                    user.update_arg(0, x)


class Capture(nn.Module):
    """A graph that also returns inner values, over the same parameters: calls give (output, {node name: value}).

    Without `keep_output` what the values do not need is cut off, and the output is None.
    """

    def __init__(self, graph: GraphModule, names: Iterable[str], *, keep_output: bool = False) -> None:
        super().__init__()
        self.graph = fork(graph)
        nodes = {node.name: node for node in self.graph.graph.nodes}
        output = self.graph.graph.output_node()
        codegen: Any = self.graph.graph._codegen
        self._out_spec = codegen.pytree_info.out_spec
        codegen.pytree_info = codegen.pytree_info._replace(out_spec=None)
        values = {name: _before_changes(self.graph, nodes[name]) for name in names}
        output.args = ((output.args[0] if keep_output else None, values),)
        self.graph.graph.eliminate_dead_code()
        self.graph.recompile()

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Tensor]]:
        """Call as the graph is called."""
        output, values = self.graph(*args, **kwargs)
        if output is not None and self._out_spec is not None:
            output = pytree.tree_unflatten(list(output), self._out_spec)
        return output, values


def _before_changes(graph: GraphModule, node: Node) -> Node:
    """The node, or a copy of its value if the graph later changes that in place (`x += y`, an in-place ReLU)."""
    base = node
    while base.op == "call_function" and (base.target in SHAPE_OPS or base.target in SAME_VALUE):
        source = base.args[0]
        assert isinstance(source, Node)
        base = source
    stack, seen = [base], {base}
    changed = False
    while stack:
        for user in stack.pop().users:
            schema = getattr(user.target, "_schema", None)
            changed = changed or (schema is not None and schema.is_mutable)
            if (
                user not in seen
                and user.op == "call_function"
                and (user.target in SHAPE_OPS or user.target in SAME_VALUE)
            ):
                seen.add(user)
                stack.append(user)
    if not changed:
        return node
    with graph.graph.inserting_after(node):
        return graph.graph.call_function(aten.clone.default, (node,))


def replace_attribute(graph: GraphModule, target: str, value: Tensor | nn.Module | None) -> None:
    """Set a parameter, buffer or submodule by its path."""
    owner, _, field = target.rpartition(".")
    setattr(graph.get_submodule(owner), field, value)


def own_parameters(graph: TracedGraph) -> None:
    """Give the graph copies of all its parameters, so that training it leaves the model it came from alone.

    Ties are kept: a parameter with two names stays one parameter.
    """
    copies: dict[int, Tensor] = {}
    replaced_modules: dict[int, nn.Module] = {}
    memo: dict[int, Any] = {}
    for node in graph.graph.nodes:
        if node.op == "call_module":
            module = graph.get_submodule(str(node.target))
            if id(module) not in replaced_modules:
                # One memo: what modules share (a router's trunk) stays shared.
                replaced_modules[id(module)] = copy.deepcopy(module, memo)
            replace_attribute(graph, str(node.target), replaced_modules[id(module)])
    for name, tensor in [
        *graph.named_parameters(remove_duplicate=False), *graph.named_buffers(remove_duplicate=False)
    ]:  # fmt: skip
        if any(name.startswith(f"{node.target}.") for node in graph.graph.nodes if node.op == "call_module"):
            continue
        if id(tensor) not in copies:
            clone = tensor.detach().clone()
            copies[id(tensor)] = (
                nn.Parameter(clone, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else clone
            )
        replace_attribute(graph, name, copies[id(tensor)])


def adopt_changes(target: GraphModule, source: TracedGraph) -> None:
    """Make `target` the rewritten `source`, in place: its graph, its parameters, its metadata."""
    target._parameters, target._buffers, target._modules = source._parameters, source._buffers, source._modules
    target.__dict__.update({name: value for name, value in source.__dict__.items() if name in ("training", "meta")})
    target.graph = source.graph
    target.recompile()


def replace_call(graph: GraphModule, call: Call, target: str) -> str:
    """Let the module at `target` compute one execution of a feed-forward layer; returns the new node's name."""
    old = call.output
    # Where the input was read first: if it is changed in place later, the module still sees it as the layer did.
    first_read = min(call.first, key=lambda linear: list(graph.graph.nodes).index(linear.core)).core
    with graph.graph.inserting_before(first_read):
        node = graph.graph.call_module(target, (call.x,))
        path = target.rpartition(".")[0]
        set_path(node, target)
        shape, x_shape = shape_of(old), shape_of(call.x)
        assert shape is not None
        assert x_shape is not None
        node.meta["val"] = call.x.meta["val"].new_empty((*x_shape[:-1], shape[-1]), dtype=old.meta["val"].dtype)
        new = node
        if len(shape) != len(x_shape):
            # The layer flattened its tokens on the way.
            new = emit(graph, aten.reshape.default, node, [-1, shape[-1]], path=path)
    inside = {n for linear in (*call.first, call.down) for n in linear.nodes} | set(call.cone)
    replace_value(old, new, call.x, inside)
    erase_unread(graph, inside)
    return new.name


def erase_unread(graph: GraphModule, nodes: Iterable[Node]) -> None:
    """Erase those of the nodes that nothing reads, in-place ops included (dead-code elimination keeps those)."""
    doomed = set(nodes)
    for node in reversed(list(graph.graph.nodes)):
        if node in doomed and not node.users:
            graph.graph.erase_node(node)


def merge_duplicates(graph: GraphModule, nodes: Iterable[Node]) -> None:
    """Compute once what several of the nodes compute: the same op on the same values, reads of tied parameters too."""
    candidates = set(nodes)
    first: dict[Any, Node] = {}
    for node in list(graph.graph.nodes):
        if node not in candidates:
            continue
        tensor = tensor_of(graph, node)
        key = tensor_key(tensor) if tensor is not None else (node.target, repr(node.args), repr(node.kwargs))
        kept = first.setdefault(key, node)
        if kept is not node:
            node.replace_all_uses_with(kept)
            graph.graph.erase_node(node)

"""Recognise linear layers in a graph, however they are written.

A linear layer may be `F.linear`, `addmm` or `mm` between views (GPT-2's Conv1D), or `matmul` or `einsum` with a raw
parameter. Its weight may be transposed and its bias added afterwards. Each becomes one `Linear` that names its input,
its output and its parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from surgeon.graph.ops import MATMULS, SAME_VALUE, VIEWS, equal_size
from surgeon.graph.traced import aten, is_call, module_path, shape_of, tensor_of
from surgeon.graph.walk import walk_sources
from surgeon.graph.weights import QUANTISED

_TRANSPOSES = {
    aten.t.default,
    aten.transpose.int,
    aten.permute.default,
    aten.numpy_T.default,
    aten.mT.default,
    aten.swapaxes.default,
}


@dataclass(frozen=True, eq=False)
class Linear:
    """An affine map of the last dimension: output [..., out_features] = input [..., in_features] · Wᵀ + bias.

    weight, bias: the `get_attr` nodes of the parameters. transposed: the stored weight is [in_features, out_features].
    unflattens: the input is flattened to a matrix for the multiplication, and the output gets the leading dimensions
    back. nodes: every node that belongs only to this layer, from the multiplication `core` to the output.
    """

    output: Node
    weight: Node
    bias: Node | None
    transposed: bool
    in_features: int
    out_features: int
    nodes: frozenset[Node]
    core: Node
    unflattens: bool

    @property
    def input(self) -> Node:
        """The input, read from the graph as it is now, because the node that computes it may have been replaced."""
        x = _first_operand(self.core)
        if not self.unflattens:
            return x
        source = x.args[0]
        assert isinstance(source, Node)
        return source

    @property
    def path(self) -> str:
        """Path of the module that holds the weight: `encoder.layer.0.output.dense`."""
        owner, _, field = str(self.weight.target).rpartition(".")
        return owner or field

    def weight_rows(self, graph: GraphModule) -> Tensor:
        """The weight as [out_features, in_features]: one row per output neuron (a view of the parameter)."""
        weight = tensor_of(graph, self.weight)
        assert weight is not None
        return weight.detach().t() if self.transposed else weight.detach()

    def bias_vector(self, graph: GraphModule) -> Tensor | None:
        """The bias as [out_features], or None."""
        if self.bias is None:
            return None
        bias = tensor_of(graph, self.bias)
        assert bias is not None
        return bias.detach().reshape(-1)


@dataclass(frozen=True, eq=False)
class OpaqueLinear:
    """A product that looks like a linear layer, but whose weight or bias is not a parameter. `why` gives the reason."""

    input: Node
    output: Node
    why: str
    nodes: frozenset[Node]

    @property
    def path(self) -> str:
        """Path of the module that computes it."""
        return module_path(self.output) or self.output.name


def find_linears(graph: GraphModule) -> tuple[list[Linear], list[OpaqueLinear]]:
    """Return every linear layer of the graph in topological order, and those whose weight or bias is computed."""
    linears: list[Linear] = []
    opaque: list[OpaqueLinear] = []
    expert_layers = tuple(f"{path}." for path in _expert_layers(graph))
    for node in graph.graph.nodes:
        match = _linear_at(graph, node)
        if isinstance(match, Linear):
            # The linears of a router are not layers of the model.
            if not str(match.weight.target).startswith(expert_layers):
                linears.append(match)
        elif match is not None:
            opaque.append(match)
    return linears, opaque


def _expert_layers(graph: GraphModule) -> list[str]:
    """Return the paths of the expert layers in op form: the paths of the modules that hold the ops' weights."""
    ops = [
        node
        for node in graph.graph.nodes
        if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "surgeon"
    ]
    weights = [source for node in ops for source in node.all_input_nodes if source.op == "get_attr"]
    return sorted({str(weight.target).rpartition(".")[0] for weight in weights})


def _linear_at(graph: GraphModule, core: Node) -> Linear | OpaqueLinear | None:
    if core.op != "call_function" or core.target not in MATMULS:
        return None
    operands = _operands(core)
    if operands is None:
        return None
    x, weight_node, bias, weight_is_in_out = operands
    stored = _parameter(graph, weight_node)
    if stored is None:
        weight_shape = shape_of(weight_node)
        computed = weight_shape is not None and len(weight_shape) == 2 and core.target is aten.linear.default
        if computed and _from_parameters_only(weight_node):
            return OpaqueLinear(x, core, _why_computed(graph, weight_node), frozenset({core}))
        return None
    weight, flipped, chain = stored
    tensor = tensor_of(graph, weight)
    assert tensor is not None
    if tensor.dim() != 2:
        return None
    transposed = weight_is_in_out != flipped
    in_features, out_features = tensor.shape if transposed else tensor.shape[::-1]
    if bias is not None:
        bias = _bias(graph, bias, out_features)
        if bias is None:
            why = "its bias is not a parameter with one number for each output"
            return OpaqueLinear(x, core, why, frozenset({core}))
    nodes = {core, *chain}
    flat, x = x, _before_flattening(core, x)
    if flat is not x and len(flat.users) == 1:
        nodes.add(flat)
    output = core
    while (follower := _only_user(output)) is not None:
        if follower.target in VIEWS and _restores(follower, x, output, out_features):
            pass
        elif bias is None and (added := _added_bias(graph, follower, output, out_features)) is not None:
            bias = added
        else:
            break
        nodes.add(follower)
        output = follower
    if not _same_leading(output, x):
        # The view after the multiplication does not undo the view before it: keep the flat form.
        x, output = _first_operand(core), core
        nodes = {core, *chain}
        if bias is not None and core.target not in (aten.linear.default, aten.addmm.default):
            bias = None
    return Linear(
        output,
        weight,
        bias,
        transposed,
        int(in_features),
        int(out_features),
        frozenset(nodes),
        core,
        unflattens=x is not _first_operand(core),
    )


def _operands(core: Node) -> tuple[Node, Node, Node | None, bool] | None:
    """Return (input, weight, bias, weight is [in, out]) of a multiplication, or None if it is not an affine map."""
    args: tuple[Any, ...] = core.args
    if core.target is aten.linear.default:
        bias = args[2] if len(args) > 2 else core.kwargs.get("bias")
        return args[0], args[1], bias, False  # type: ignore[return-value]
    if core.target is aten.addmm.default:
        if core.kwargs.get("beta", 1) != 1 or core.kwargs.get("alpha", 1) != 1:
            return None
        return args[1], args[2], args[0], True
    if core.target in (aten.mm.default, aten.matmul.default):
        return args[0], args[1], None, True
    if core.target is aten.einsum.default:
        return _einsum_operands(args)
    return None


def _einsum_operands(args: tuple[Any, ...]) -> tuple[Node, Node, Node | None, bool] | None:
    """Read `...d,df->...f` in any spelling: the input's last letter is summed, and the weight's other letter is new."""
    equation, operands = args[0], args[1]
    left, arrow, result = str(equation).replace(" ", "").replace("...", "@").partition("->")
    terms = left.split(",")
    if not arrow or len(terms) != 2 or len(operands) != 2:
        return None
    for (x_term, x), (w_term, weight) in (
        ((terms[0], operands[0]), (terms[1], operands[1])),
        ((terms[1], operands[1]), (terms[0], operands[0])),
    ):
        if len(w_term) != 2 or not x_term:
            continue
        summed = x_term[-1]
        if summed not in w_term or len(set(w_term)) != 2:
            continue
        new = w_term.replace(summed, "")
        if new not in x_term and result == x_term[:-1] + new and len(set(x_term)) == len(x_term):
            return x, weight, None, w_term == summed + new
    return None


def _parameter(graph: GraphModule, node: Node) -> tuple[Node, bool, list[Node]] | None:
    """Find the `get_attr` node behind transposes and copies: (node, odd number of transposes, nodes in between)."""
    flipped = False
    chain: list[Node] = []
    while node.op == "call_function":
        if node.target in _TRANSPOSES and _swaps_two(node):
            flipped = not flipped
        elif not _same_type(graph, node):
            return None
        if len(node.users) == 1:
            chain.append(node)
        source = node.args[0]
        assert isinstance(source, Node)
        node = source
    return (node, flipped, chain) if tensor_of(graph, node) is not None else None


def _same_type(graph: GraphModule, node: Node) -> bool:
    """Whether the node copies its input in the same dtype. A weight cast to another dtype counts as computed."""
    source = node.args[0]
    if node.target not in SAME_VALUE or not isinstance(source, Node):
        return False
    after, before = node.meta.get("val"), tensor_of(graph, source)
    before = source.meta.get("val") if before is None else before
    return isinstance(after, Tensor) and isinstance(before, Tensor) and after.dtype == before.dtype


def _swaps_two(node: Node) -> bool:
    shape = shape_of(node)
    if shape is None or len(shape) != 2:
        return False
    if node.target is aten.permute.default:
        order: Any = node.args[1]
        return [int(dim) % 2 for dim in order] == [1, 0]
    if node.target in (aten.transpose.int, aten.swapaxes.default):
        first, second = (int(dim) % 2 for dim in node.args[1:3])  # type: ignore[arg-type]
        return first != second
    return True


def _from_parameters_only(node: Node) -> bool:
    """Whether the value depends on no input of the graph."""
    return all(source.op != "placeholder" for source in walk_sources(node))


def _why_computed(graph: GraphModule, node: Node) -> str:
    """Say by what a weight is computed, and how to store it as a parameter."""
    sources = [source for source in walk_sources(node) if source.op == "get_attr"]
    parts = {str(source.target): tensor_of(graph, source) for source in sources}
    for name, part in parts.items():
        if part is not None and part.dim() == 2 and not part.is_floating_point() and part.dtype is not torch.bool:
            return f"its weight is stored in {str(part.dtype).removeprefix('torch.')} ('{name}'). {QUANTISED}"
        owner, _, field = name.rpartition(".")
        if field == "weight_mask":
            return f"its weight has a pruning mask. Make it permanent: torch.nn.utils.prune.remove({owner}, 'weight')"
        if ".parametrizations.weight." in f".{name}":
            owner = name.partition("parametrizations.")[0].rstrip(".")
            remove = f"torch.nn.utils.parametrize.remove_parametrizations({owner}, 'weight')"
            return f"its weight has a parametrization. Make it permanent: {remove}"
    return f"its weight is computed in the graph (by {node.name}) and is not a parameter"


def _bias(graph: GraphModule, node: object, out_features: int) -> Node | None:
    """Return the parameter that a bias is stored in, if it has one number for each output."""
    stored = _parameter(graph, node) if isinstance(node, Node) else None
    if stored is None:
        return None
    tensor = tensor_of(graph, stored[0])
    assert tensor is not None
    return stored[0] if tensor.dim() >= 1 and tensor.shape[-1] == tensor.numel() == out_features else None


def _first_operand(core: Node) -> Node:
    operands = _operands(core)
    assert operands is not None
    return operands[0]


def _only_user(node: Node) -> Node | None:
    users = [user for user in node.users if not is_call(user, aten.sym_size.int)]
    return users[0] if len(users) == 1 and users[0].op == "call_function" else None


def _before_flattening(core: Node, x: Node) -> Node:
    """Return the input before it was viewed as a matrix, for multiplications that only take matrices."""
    if core.target not in (aten.addmm.default, aten.mm.default) or x.target not in VIEWS:
        return x
    source = x.args[0]
    assert isinstance(source, Node)
    before, after = shape_of(source), shape_of(x)
    if before and after and len(after) == 2 and equal_size(before[-1], after[-1]):
        return source
    return x


def _restores(view: Node, x: Node, output: Node, out_features: int) -> bool:
    """Whether the view gives the product the leading dimensions of the input."""
    shape, x_shape = shape_of(view), shape_of(x)
    return (
        view.args[0] is output
        and shape is not None
        and x_shape is not None
        and len(shape) == len(x_shape)
        and equal_size(shape[-1], out_features)
        and all(equal_size(a, b) for a, b in zip(shape[:-1], x_shape[:-1], strict=True))
    )


def _same_leading(output: Node, x: Node) -> bool:
    a, b = shape_of(output), shape_of(x)
    return a is not None and b is not None and len(a) == len(b) and all(map(equal_size, a[:-1], b[:-1]))


def _added_bias(graph: GraphModule, node: Node, product: Node, out_features: int) -> Node | None:
    """Return the parameter that `node` adds to the product as a bias, or None if it is another addition."""
    if not is_call(node, aten.add.Tensor, aten.add_.Tensor) or node.kwargs.get("alpha", 1) != 1:
        return None
    others = [arg for arg in node.args if arg is not product]
    if len(others) != 1:
        return None
    return _bias(graph, others[0], out_features)

"""The intermediate representation, a `torch.fx` graph of ATen ops, and basic functions on it.

A `TracedGraph` is an ordinary `torch.fx.GraphModule`. It keeps the parameter names of its model, and its `train()` and
`eval()` work. The whole toolkit reads and rewrites this one form.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.graph import PythonCode

from surgeon.errors import UsageError
from surgeon.graph.calls import call_alike
from surgeon.graph.holder import mark_holders
from surgeon.graph.pickling import dumps, loads

if TYPE_CHECKING:
    import networkx as nx

aten = torch.ops.aten

# The argument of each op that differs between training and evaluation: (position, keyword, value in evaluation).
_MODE_ARGUMENT: dict[Any, tuple[int, str, bool | float]] = {
    aten.dropout.default: (2, "train", False),
    aten.dropout_.default: (2, "train", False),
    aten.feature_dropout.default: (2, "train", False),
    aten.feature_dropout_.default: (2, "train", False),
    aten.alpha_dropout.default: (2, "train", False),
    aten.feature_alpha_dropout.default: (2, "train", False),
    aten.rrelu.default: (3, "training", False),
    **dict.fromkeys((aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input), (6, "train", False)),
    aten.batch_norm.default: (5, "training", False),
    aten.scaled_dot_product_attention.default: (4, "dropout_p", 0.0),
}
TRAIN_VALUE = "surgeon_train_value"


class TracedGraph(GraphModule):
    """A model as a graph of ATen ops, called like the model itself.

    `meta["trace"]` holds the `TraceInfo` of `surgeon.trace`. A node is identified by its name. Passes keep the names of
    the nodes that they do not touch.
    """

    def __repr__(self) -> str:
        ops = sum(node.op in ("call_function", "call_module") for node in self.graph.nodes)
        parameters = sum(parameter.numel() for parameter in self.parameters())
        return f"<TracedGraph: {ops} ops, {parameters:,} parameters>"

    def train(self, mode: bool = True) -> TracedGraph:
        """Switch dropout, attention dropout and batch statistics, as `nn.Module.train` does for the model.

        A graph in evaluation form (see `TraceInfo.form`) has nothing to switch: it always computes as in `eval()`.
        """
        for module in self.modules():
            module.training = mode
        if "trace" in self.meta and self.meta["trace"].form == "eval":
            return self
        for graph_module in nested_graphs(self):
            changed = False
            for node in graph_module.graph.nodes:
                changed |= _switch(node, mode)
            if changed:
                graph_module.recompile()
        return self

    def eval(self) -> TracedGraph:
        """Switch to evaluation: `train(False)`."""
        return self.train(False)

    def recompile(self) -> PythonCode:
        """Write `forward` again after a change of the graph."""
        mark_holders(self)
        return super().recompile()

    def __copy__(self) -> TracedGraph:
        """A copy with a graph of its own that shares all tensors and modules."""
        copied = fork(self)
        for name in _HOOKS:
            setattr(copied, name, copy.copy(getattr(self, name)))
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> TracedGraph:
        """A copy that shares nothing."""
        copied = cast("TracedGraph", super().__deepcopy__(memo))
        copied.meta = copy.copy(self.meta)
        for name in _HOOKS:
            setattr(copied, name, copy.deepcopy(getattr(self, name), memo))
        return copied

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the graph with its nodes' metadata. `torch.save` does so too, and then `weights_only=False` reads it.

        A surgery is better saved by `Surgery.save`, whose files cannot run code.
        """
        return _unpickled, (dumps(self),)


# Of modules; torch.fx drops them when it copies a graph.
_HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks"),
    *("_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook"),
    *("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
)


def _unpickled(content: bytes) -> TracedGraph:
    read = loads(content)
    graph = TracedGraph(read, read.graph)
    graph.meta.update(read.meta)
    for name in ("training", *_HOOKS):
        setattr(graph, name, getattr(read, name))
    return graph


def _switch(node: Node, mode: bool) -> bool:
    """Set the mode of one node; True if the node changed."""
    if node.op != "call_function" or node.target not in _MODE_ARGUMENT:
        return False
    if node.target is aten.batch_norm.default and node.args[3] is None:
        return False  # without running statistics it normalises weights, which is the same in both modes
    position, keyword, eval_value = _MODE_ARGUMENT[node.target]
    positional = len(node.args) > position
    if not positional and keyword not in node.kwargs:
        return False  # left at its default, which is the evaluation value for every op of the table
    value = node.args[position] if positional else node.kwargs[keyword]
    wanted = node.meta.get(TRAIN_VALUE, value) if mode else eval_value
    if value == wanted:
        return False
    if not mode:
        node.meta[TRAIN_VALUE] = value
    if positional:
        node.update_arg(position, wanted)
    else:
        node.update_kwarg(keyword, wanted)
    return True


def is_switched_off(node: Node) -> bool:
    """Whether the node has a mode (dropout, attention with dropout) and is set to evaluation."""
    if node.target not in _MODE_ARGUMENT:
        return False
    position, keyword, eval_value = _MODE_ARGUMENT[node.target]
    value = node.args[position] if len(node.args) > position else node.kwargs.get(keyword, eval_value)
    return bool(value == eval_value)


def nested_graphs(graph: GraphModule) -> Iterator[GraphModule]:
    """Iterate over the graph itself and the graphs of its higher-order ops (bodies under `no_grad` or `autocast`)."""
    return (module for module in graph.modules() if isinstance(module, GraphModule))


def fork(graph: GraphModule) -> TracedGraph:
    """Copy the graph, but share every parameter, buffer and submodule with the original.

    The copy keeps node names and metadata. Rewriting it does not change the original and takes no memory for weights.
    """
    copied = Graph()
    output = copied.graph_copy(graph.graph, {}, return_output_node=True)
    if output is not None:
        value, old = cast("tuple[Any, Node]", output)
        copied.output(value).meta = copy.copy(old.meta)
    call_alike(copied, graph)
    result = TracedGraph(graph, copied)
    result.meta.update(graph.meta)
    # The constructor sets training mode. The flag is state of the module, not of the graph, so copy it.
    result.training = graph.training
    return result


def move(graph: GraphModule, device: torch.device) -> None:
    """Move a graph to a device in place: its tensors, and the device arguments of nodes that create tensors."""
    graph.to(device)
    for module in nested_graphs(graph):
        for node in module.graph.nodes:
            if node.op == "get_attr" and isinstance(value := attribute(module, str(node.target)), Tensor):
                if value.device != device:  # neither a parameter nor a buffer
                    owner, _, name = str(node.target).rpartition(".")
                    setattr(module.get_submodule(owner), name, value.to(device))
            elif isinstance(node.kwargs.get("device"), torch.device):
                node.update_kwarg("device", device)
            elif is_call(node, aten.to.device):
                node.update_arg(1, device)
        module.recompile()


def tidy(graph: GraphModule) -> None:
    """Remove dead nodes and the parameters and submodules that only they used. Then check and recompile the graph."""
    graph.graph.eliminate_dead_code()
    used = {node.target for node in graph.graph.nodes if node.op in ("get_attr", "call_module")}
    modules = {node.target for node in graph.graph.nodes if node.op == "call_module"} | {
        name for name, module in graph.named_modules() if isinstance(module, GraphModule) and name
    }
    for name, _ in [*graph.named_parameters(remove_duplicate=False), *graph.named_buffers(remove_duplicate=False)]:
        if name not in used and not any(name.startswith(f"{module}.") for module in modules):
            owner, _, attribute = name.rpartition(".")
            delattr(graph.get_submodule(owner), attribute)
    delete_unused_submodules(graph)
    graph.graph.lint()
    graph.recompile()


def delete_unused_submodules(graph: GraphModule) -> None:
    """Delete the submodules that no node uses, in the graph or in the body of a higher-order op.

    GraphModule's own method keeps a body, but deletes the bodies in it.
    """
    used: set[str] = set()

    def visit(prefix: str, part: GraphModule) -> None:
        for node in part.graph.nodes:
            if node.op not in ("call_module", "get_attr"):
                continue
            target = f"{prefix}{node.target}"
            parts = target.split(".")
            used.update(".".join(parts[:end]) for end in range(1, len(parts) + 1))
            value = attribute(part, str(node.target)) if _has(part, str(node.target)) else None
            if isinstance(value, GraphModule):
                visit(f"{target}.", value)
            elif isinstance(value, nn.Module):
                used.update(f"{target}.{name}" for name, _ in value.named_modules() if name)

    visit("", graph)
    for name, _ in list(graph.named_modules()):
        if name and name not in used and name.rpartition(".")[0] in {"", *used}:
            graph.delete_submodule(name)


def module_path(node: Node) -> str:
    """Return the path of the innermost module that this node came from, or "" for the model itself."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = next(reversed(stack.values()))[0]
    # A module called several times appears as `name@1`, `name@2`, ...
    return ".".join(part.partition("@")[0] for part in str(path).removeprefix("L['self'].").split("."))


def common_path(paths: Iterable[str]) -> str:
    """Return the longest dotted prefix that all paths share: `a.b.fc1`, `a.b.fc2` → `a.b`."""
    split = [path.split(".") if path else [] for path in paths]
    shared: list[str] = []
    for parts in zip(*split, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)


def is_call(node: object, *targets: Any) -> bool:
    """Whether `node` is a `call_function` node of one of the targets."""
    return isinstance(node, Node) and node.op == "call_function" and node.target in targets


def attribute(graph: GraphModule, target: str) -> Any:
    """Return what a `get_attr` node with this target reads."""
    value: Any = graph
    for part in target.split("."):
        value = getattr(value, part)
    return value


def tensor_of(graph: GraphModule, node: Node) -> Tensor | None:
    """Return the tensor that a `get_attr` node reads, or None for any other node."""
    if node.op != "get_attr":
        return None
    value = attribute(graph, str(node.target))
    return value if isinstance(value, Tensor) else None


def tensor_key(tensor: Tensor) -> tuple[object, ...]:
    """Identify a tensor's memory. Tied parameters loaded from a file are two objects over the same memory."""
    if tensor.device.type == "meta" or tensor.layout != torch.strided or tensor.numel() == 0:
        return (id(tensor),)
    return (tensor.data_ptr(), tuple(tensor.shape), tensor.stride())


def shape_of(node: Node) -> tuple[int | torch.SymInt, ...] | None:
    """Return the shape recorded at tracing, symbolic where dynamic, or None if the node holds no tensor."""
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else None


def shape_text(node: Node) -> str:
    """Return the shape as text, `2×s1×128`; empty for a scalar and for what is no tensor."""
    return "×".join(map(str, shape_of(node) or ()))


def retie(graph: GraphModule) -> None:
    """Make parameters that share memory one object again, so that an optimizer updates them once."""
    seen: dict[tuple[object, ...], nn.Parameter] = {}
    for name, parameter in list(graph.named_parameters(remove_duplicate=False)):
        kept = seen.setdefault(tensor_key(parameter), parameter)
        if kept is not parameter:
            owner, _, field = name.rpartition(".")
            setattr(graph.get_submodule(owner), field, kept)


def free_target(graph: GraphModule, path: str, name: str) -> str:
    """Return an unused path for a new submodule: `path.name`, or else `path.name_1`, `path.name_2`, ...

    If `path` is itself a parameter (a raw weight of the model), the path of the module that holds it is used.
    """
    while path and isinstance(attribute(graph, path) if _has(graph, path) else None, Tensor):
        path = path.rpartition(".")[0]
    wanted = f"{path}.{name}" if path else name
    taken = {name for name, _ in graph.named_modules()} | {
        name for name, _ in [*graph.named_parameters(remove_duplicate=False), *graph.named_buffers()]
    }
    candidate, number = wanted, 0
    while candidate in taken:
        number += 1
        candidate = f"{wanted}_{number}"
    return candidate


def _has(graph: GraphModule, target: str) -> bool:
    try:
        attribute(graph, target)
    except AttributeError:
        return False
    return True


def to_networkx(graph: GraphModule) -> nx.DiGraph:
    """Convert the graph to a networkx digraph: one vertex per node, one edge from each producer to each consumer.

    The node's name is the key of its vertex. Vertices carry texts, so that networkx writes every format (GraphML, GEXF,
    node-link JSON, DOT): `op` (that of
    the node, such as "call_function"), `target`, `path` (of its module), and `shape` ("2×s1×128") and `dtype`
    ("float32") of its value, which are empty if it is no tensor.

    Raises:
        UsageError: it is no graph.
    """
    if not isinstance(graph, GraphModule):
        raise UsageError(
            f"to_networkx takes a graph, but got an object of type {type(graph).__name__}. Give surgery.graph of a "
            "surgery, and surgeon.trace(model, inputs) of a model."
        )
    import networkx as nx

    result = nx.DiGraph()
    for node in graph.graph.nodes:
        value = node.meta.get("val")
        result.add_node(
            node.name,
            op=node.op,
            target=str(node.target),
            path=module_path(node),
            shape=shape_text(node),
            dtype=str(value.dtype).removeprefix("torch.") if isinstance(value, Tensor) else "",
        )
    result.add_edges_from((source.name, node.name) for node in graph.graph.nodes for source in node.all_input_nodes)
    return result

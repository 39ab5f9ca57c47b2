"""Find the modules of a model that compute a layer, and which of them a converted layer can take the place of.

A layer is found in the model's graph. Every node there knows the modules whose code it stands in. There are two ways
to put a converted layer into the model:

- A module computes the layer and nothing else but dropout of its output. It is replaced.
- The layer's linear layers and its activation are modules, in the code of a larger one. The first linear layer is
  replaced, and the others return their input. A gated layer's second linear layer returns 1.

What is found here is a proposal. `surgeon.grafting.graft` tries it out.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.fx import Node

from surgeon.graph.ops import DROPOUTS, SHAPE_OPS, is_copy, op_name
from surgeon.graph.traced import TracedGraph, aten, is_call
from surgeon.sites.ffn import FFN, LayerCall
from surgeon.sites.linear import Linear
from surgeon.sites.linear_site import LinearSite


@dataclass(frozen=True)
class Placement:
    """Where a converted layer goes: the path of the module that it replaces, and what else gives way.

    passed, ones, functions: as in `surgeon.grafting.parts.Plan`. dropout: of the output, which the module has too.
    """

    at: str
    passed: tuple[str, ...] = ()
    ones: tuple[str, ...] = ()
    functions: tuple[tuple[str, str], ...] = ()
    dropout: float = 0.0


@dataclass(frozen=True)
class Modules:
    """The modules of a model that the nodes of its graph stand in."""

    graph: TracedGraph
    model: nn.Module
    _stacks: dict[Node, list[tuple[str, str]]] = field(default_factory=dict, repr=False)

    def stack(self, node: Node) -> list[tuple[str, str]]:
        """The modules whose code a node stands in, outermost first: a key of its own for every call, and the path."""
        if node in self._stacks:
            return self._stacks[node]
        found: list[tuple[str, str]] = []
        for key, (recorded, _) in (node.meta.get("nn_module_stack") or {}).items():
            parts = str(recorded).removeprefix("L['self'].").split(".")
            path = ".".join(part.partition("@")[0] for part in parts)  # a repeated call may have a number after @
            if path and not _is_module(self.model, path):
                # The path of a module with several names starts at the module that holds it.
                inside = [f"{outer}.{path}" for _, outer in reversed(found) if outer]
                path = next((inner for inner in inside if _is_module(self.model, inner)), path)
            found.append((str(key), path))
        self._stacks[node] = found
        return found

    def keys(self, node: Node) -> list[str]:
        """The keys of its modules."""
        return [key for key, _ in self.stack(node)]

    def paths(self, node: Node) -> list[str]:
        """The paths of its modules."""
        return [path for _, path in self.stack(node)]

    def called(self, node: Node) -> str:
        """The path of the innermost module, "" for the model itself."""
        return next(reversed(self.paths(node)), "")


def placements(modules: Modules, site: FFN | LinearSite) -> list[Placement]:
    """Return the ways to put a layer into the model, the best first.

    Args:
        modules: of the model as it is. site: one of its layers.
    """
    if isinstance(site, LinearSite):
        if shared_weight(modules.model, site):
            return []
        places = {_linear_module(modules, call) for call in site.calls}
        place = places.pop()
        return [] if places or place is None else [Placement(place)]
    found: list[list[Placement]] = []
    between = {node for call in site.calls for node in call.cone}
    for call in site.calls:
        whole, spread = _whole(modules, call), _spread(modules, call, between)
        # A trace in evaluation form does not show where a module's dropout acts.
        doubtful = whole is not None and _has_dropout(modules.model.get_submodule(whole.at))
        doubtful = doubtful and modules.graph.meta["trace"].form == "eval"
        ways = [spread, whole] if doubtful or (whole is not None and whole.dropout) else [whole, spread]
        found.append([way for way in ways if way is not None])
    first, *others = found
    return [way for way in first if all(way in ways for ways in others)]


def shared_weight(model: nn.Module, site: LinearSite) -> list[str]:
    """Return the paths of several modules that hold the weight of a linear layer, such as a head and an embedding."""
    weight = dict(model.named_parameters(remove_duplicate=False)).get(str(site.calls[0].weight.target))
    holders = [
        path for path, module in model.named_modules() if any(own is weight for own in module._parameters.values())
    ]
    return holders if weight is not None and len(holders) > 1 else []


def _has_dropout(module: nn.Module) -> bool:
    return any(getattr(part, "p", 0) for part in module.modules() if isinstance(part, nn.modules.dropout._DropoutNd))


def _linear_module(modules: Modules, linear: Linear) -> str | None:
    """The path of the module that a linear layer is, None if other code uses its weight."""
    if not _is_module(modules.model, linear.path) or modules.called(linear.core) != linear.path:
        return None
    # A module with other weights, such as torch's attention, computes more.
    weights = len(list(modules.model.get_submodule(linear.path).parameters()))
    return linear.path if weights <= (1 if linear.bias is None else 2) else None


def _is_module(model: nn.Module, path: str) -> bool:
    try:
        model.get_submodule(path)
    except AttributeError:
        return False
    return bool(path)


def _whole(modules: Modules, call: LayerCall) -> Placement | None:
    """Find the innermost module that has the whole layer, and nothing else but dropout of its output."""
    inside = {node for linear in (*call.first, call.down) for node in linear.nodes} | set(call.cone)
    shared = _shared(modules.stack(node) for node in inside if node.op == "call_function" and modules.stack(node))
    if not shared or not _is_module(modules.model, shared[-1][1]):
        return None
    key, path = shared[-1]
    module = [node for node in modules.graph.graph.nodes if key in modules.keys(node)]
    after = [node for node in _dropouts_after(call.down.output) if node in module]
    inside |= set(after)
    held = set(module) | inside
    extra = [node for node in module if node not in inside and not _is_plumbing(node)]
    inputs = {source for node in held for source in node.all_input_nodes if source not in held and _is_value(source)}
    outputs = {node for node in held if _is_value(node) and any(user not in held for user in node.users)}
    if extra or not inputs <= {call.x, *_views_before(call.x)} or len(outputs) != 1:
        return None
    kept = 1.0
    for node in after:
        kept *= 1.0 - float(node.args[1])  # type: ignore[arg-type]
    return Placement(path, dropout=1.0 - kept)


def _dropouts_after(node: Node) -> Iterator[Node]:
    while len(node.users) == 1 and (user := next(iter(node.users))).target in DROPOUTS:
        node = user
        yield node


def _shared(stacks: Iterable[list[tuple[str, str]]]) -> list[tuple[str, str]]:
    first, *others = stacks
    return [module for module in first if all(module in stack for stack in others)]


def _views_before(node: Node) -> Iterator[Node]:
    while node.target in SHAPE_OPS and node.all_input_nodes:
        node = node.all_input_nodes[0]
        yield node


def _is_value(node: Node) -> bool:
    """Whether a node is a value of the model, and neither a weight nor a size."""
    return node.op in ("placeholder", "call_function") and not is_call(node, aten.sym_size.int) and _is_tensor(node)


def _is_tensor(node: Node) -> bool:
    return hasattr(node.meta.get("val"), "layout")


def _is_plumbing(node: Node) -> bool:
    """Whether a node computes nothing: a weight, a view, a copy, a size."""
    if node.op != "call_function":
        return node.op == "get_attr"
    return node.target in SHAPE_OPS or is_copy(node) or not _is_tensor(node)


def _spread(modules: Modules, call: LayerCall, between: set[Node]) -> Placement | None:
    """Find the modules of the layer's linear layers and of its activation.

    between: the nodes between the linear layers in all calls of the layer.
    """
    linears = [_linear_module(modules, linear) for linear in (*call.first, call.down)]
    if any(path is None for path in linears) or len(set(linears)) < len(linears):
        return None
    first, *others = [path for path in linears if path is not None]
    nodes = {node for linear in (*call.first, call.down) for node in linear.nodes}
    gives_way, own_code = _modules_of(modules, call.cone, nodes, between)
    functions: list[tuple[str, str]] = []
    for node in own_code:
        if _is_harmless(node, gated=len(call.first) == 2):
            continue
        owner = modules.called(node)
        names = [name for name, value in vars(modules.model.get_submodule(owner)).items() if _is_function(value)]
        if len(names) != 1:
            return None
        functions.append((owner, names[0]))
    return Placement(
        first,
        passed=(*dict.fromkeys(gives_way), others[-1]),
        ones=tuple(others[:-1]),
        functions=tuple(dict.fromkeys(functions)),
    )


def _modules_of(
    modules: Modules, cone: Iterable[Node], linears: set[Node], between: set[Node]
) -> tuple[list[str], list[Node]]:
    """Return the modules that compute nothing but nodes between the linear layers, and the nodes in no such module."""
    cone = [node for node in cone if node.op == "call_function"]
    others = [node for node in modules.graph.graph.nodes if node not in between and _is_value(node)]
    around = {path for node in linears for path in modules.paths(node)[:-1]}
    around |= {path for node in others for path in modules.paths(node)}
    found, own_code = [], []
    for node in cone:
        inner = next((path for path in modules.paths(node) if path not in around), None)
        if inner is None:
            own_code.append(node)
        else:
            found.append(inner)
    return found, own_code


def _is_harmless(node: Node, *, gated: bool) -> bool:
    """Whether a node in a larger module's code does no harm once it gets the layer's output in place of hidden values.

    A view or a copy does not, and a product with the 1 of a gated layer. Dropout then acts on the layer's output.
    """
    product = gated and op_name(node) in ("mul", "mul_")
    return product or node.target in DROPOUTS or _is_plumbing(node)


def _is_function(value: Any) -> bool:
    function: Callable[..., Any] = value
    return callable(function) and not isinstance(function, nn.Module | type)


def copy_of(model: nn.Module) -> nn.Module:
    """Copy the modules of a model, but share its tensors."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})

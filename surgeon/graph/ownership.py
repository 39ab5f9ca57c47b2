"""Who owns a graph's parameters and modules."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule

from surgeon.graph.traced import TracedGraph


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
                # All copies use one memo, so that what modules share (a router's trunk) stays shared.
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
    """Give `target` the graph, the parameters and the metadata of the rewritten `source`, in place."""
    target._parameters, target._buffers, target._modules = source._parameters, source._buffers, source._modules
    target.__dict__.update({name: value for name, value in source.__dict__.items() if name in ("training", "meta")})
    target.graph = source.graph
    target.recompile()

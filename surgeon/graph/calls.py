"""How a graph is called: arguments by position and keyword, its flat inputs, and the trees of inputs and outputs.

`torch.fx` keeps this in a private place, `Graph._codegen.pytree_info`, which no other file touches.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.fx import Graph, GraphModule
from torch.fx import _pytree as fx_pytree
from torch.utils import _pytree as pytree

from surgeon.errors import UsageError

Inputs = Tensor | tuple[Any, ...] | dict[str, Any]


def as_args_kwargs(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Split inputs into positional and keyword arguments of `forward`.

    A tensor is one positional argument; a tuple or list holds positional ones; a mapping (a `BatchEncoding` too) holds
    keyword ones; a pair of a tuple and a mapping is both, as it is.

    Raises:
        UsageError: for anything else.
    """
    match inputs:
        case Tensor():
            return (inputs,), {}
        case (tuple() as args, Mapping() as kwargs):
            return args, dict(kwargs)
        case tuple() | list():
            return tuple(inputs), {}
        case Mapping():
            return (), dict(inputs)
    raise UsageError(
        f"Example inputs are a {type(inputs).__name__}, not a tensor, a tuple of positional inputs or a dict of "
        "keyword inputs."
    )


def argument_names(graph: GraphModule) -> list[str]:
    """The names of the graph's arguments, in order."""
    return [name for name in _info(graph).orig_args if name != "self"]


def named_arguments(graph: GraphModule, args: Iterable[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, in the graph's order.

    Raises:
        TypeError: an argument is missing, unknown, or given twice.
    """
    names = argument_names(graph)
    given = inspect.Signature([inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in names]).bind(
        *args, **kwargs
    )
    return {name: given.arguments[name] for name in names}


def flat_inputs(graph: GraphModule, args: Iterable[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """The inputs of a call in the order of the graph's placeholders, whether given by position or by name.

    Raises:
        TypeError: as `named_arguments`.
    """
    in_spec = _info(graph).in_spec
    positional = in_spec.child(0).num_children
    given = list(named_arguments(graph, args, kwargs).items())
    return list(
        fx_pytree.tree_flatten_spec(
            (tuple(value for _, value in given[:positional]), dict(given[positional:])), in_spec
        )
    )


def unflatten_output(graph: GraphModule, flat: Iterable[Any]) -> Any:
    """What a call returns, of the values that the graph's output node holds."""
    out_spec = _info(graph).out_spec
    return flat if out_spec is None else pytree.tree_unflatten(list(flat), out_spec)


def return_as_is(graph: GraphModule) -> None:
    """Let calls of the graph return what its output node holds, not arranged as the model's output."""
    codegen: Any = graph.graph._codegen
    codegen.pytree_info = codegen.pytree_info._replace(out_spec=None)


def call_alike(graph: Graph, like: GraphModule) -> None:
    """Let a new graph be called as another is and return what that returns; either can be changed without the other."""
    graph.set_codegen(copy.copy(like.graph._codegen))


def foreign_modules(graph: GraphModule) -> list[str]:
    """The Python modules whose classes appear in the graph's inputs and outputs, in alphabetical order."""
    found: set[str] = set()
    stack = [_info(graph).in_spec, _info(graph).out_spec]
    while stack:
        spec = stack.pop()
        if spec is None:
            continue
        if isinstance(spec.type, type) and spec.type.__module__ not in ("builtins", "collections"):
            found.add(spec.type.__module__)
        stack.extend(spec.children())
    return sorted(found)


def _info(graph: GraphModule) -> Any:
    return graph.graph._codegen.pytree_info  # type: ignore[attr-defined]

"""How a graph is called: arguments by position and keyword, its flat inputs, and the trees of inputs and outputs.

`torch.fx` keeps this in the private attribute `Graph._codegen.pytree_info`. No other file touches it.
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

    A tensor is one positional argument. A tuple or list holds positional arguments. A mapping, such as a
    `BatchEncoding`, holds keyword arguments. A pair of a tuple and a mapping gives both.

    Raises:
        UsageError: the inputs are anything else.
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
        f"The example inputs are of type {type(inputs).__name__}. Give a tensor, a tuple of positional inputs or a "
        "dict of keyword inputs."
    )


def argument_names(graph: GraphModule) -> list[str]:
    """Return the names of the graph's arguments, in order."""
    return [name for name in _info(graph).orig_args if name != "self"]


def named_arguments(graph: GraphModule, args: Iterable[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call by name, in the graph's order.

    Raises:
        TypeError: an argument is missing, unknown, or given twice.
    """
    names = argument_names(graph)
    given = inspect.Signature([inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in names]).bind(
        *args, **kwargs
    )
    return {name: given.arguments[name] for name in names}


def flat_inputs(graph: GraphModule, args: Iterable[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """Return the inputs of a call in the order of the graph's placeholders.

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
    """Arrange the values that the graph's output node holds as a call returns them."""
    out_spec = _info(graph).out_spec
    return flat if out_spec is None else pytree.tree_unflatten(list(flat), out_spec)


def return_as_is(graph: GraphModule) -> None:
    """Let calls of the graph return the values of its output node, without arranging them as the model's output."""
    codegen: Any = graph.graph._codegen
    codegen.pytree_info = codegen.pytree_info._replace(out_spec=None)


def call_alike(graph: Graph, like: GraphModule) -> None:
    """Give a new graph the calling convention of `like`. Each graph can change its own later."""
    graph.set_codegen(copy.copy(like.graph._codegen))


def _info(graph: GraphModule) -> Any:
    return graph.graph._codegen.pytree_info  # type: ignore[attr-defined]

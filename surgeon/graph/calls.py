"""How a graph is called: arguments by position and keyword, flat inputs and their sizes, trees of inputs and outputs.

`torch.fx` keeps this in the private attribute `Graph._codegen`. No other file touches it.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.compiler import is_exporting
from torch.fx import Graph, GraphModule, Proxy
from torch.fx import _pytree as fx_pytree
from torch.fx.graph import _PyTreeCodeGen
from torch.utils import _pytree as pytree

from surgeon.errors import SizeError, UsageError
from surgeon.graph.missing import (
    changes_something,
    definition,
    fill_missing,
    parameters,
    prepare_filling,
    refuse_untraced,
)
from surgeon.graph.size_check import check_sizes, prepare_check
from surgeon.graph.sizes import Sizes, same_constant

_FRAMES = 8  # from the caller of torch.export's wrapper to the code generator, with room

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
    """Return the arguments of a call by name, in the graph's order: None for those that are left out.

    Raises:
        TypeError: an argument is missing, unknown, or given twice. UsageError: the graph has no input for one.
    """
    names, codegen = argument_names(graph), graph.graph._codegen
    if isinstance(codegen, _CheckedCodeGen):
        found = codegen.parameters
    else:
        found = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
    given = inspect.Signature(found).bind(*args, **kwargs)
    if isinstance(codegen, _CheckedCodeGen):
        refuse_untraced(codegen.sizes, **{name: given.arguments[name] for name in given.arguments if name not in names})
    given.apply_defaults()
    return {name: given.arguments[name] for name in names}


def flat_inputs(graph: GraphModule, args: Iterable[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """Return the inputs of a call in the order of the graph's placeholders, with what stands for those left out.

    Raises:
        TypeError, UsageError: as `named_arguments`.
        SizeError: the graph does not take these sizes.
    """
    in_spec = _info(graph).in_spec
    positional = in_spec.child(0).num_children
    given = list(named_arguments(graph, args, kwargs).items())
    arranged = (tuple(value for _, value in given[:positional]), dict(given[positional:]))
    check_tree(arranged, in_spec, argument_names(graph))
    flat = list(fx_pytree.tree_flatten_spec(arranged, in_spec))
    codegen = graph.graph._codegen
    return codegen.checked(flat) if isinstance(codegen, _CheckedCodeGen) else flat


def check_calls(graph: GraphModule, sizes: Sizes) -> None:
    """Let the graph compare the inputs of every call with `sizes`, also after it was copied, compiled or exported.

    Copies of the graph (`call_alike`) do the same.
    """
    graph.graph.set_codegen(_CheckedCodeGen(_info(graph), str(sizes)))
    graph.recompile()


class _CheckedCodeGen(_PyTreeCodeGen):
    """Writes the check of a call into `forward`, and makes it where the nodes of the graph are run one by one.

    parameters: of `forward`. What is optional in the model is optional there.
    """

    def __init__(self, info: Any, sizes: str) -> None:
        super().__init__(info)
        self.sizes = sizes
        prepare_check(sizes)
        prepare_filling(sizes)
        names = [name for name in info.orig_args if name != "self"]
        self.parameters = parameters(Sizes.parse(sizes), names, _places(info.in_spec, names))

    def checked(self, flat: list[Any]) -> list[Any]:
        """Return flat inputs with what stands for missing ones, after the check."""
        if flat:
            flat = list(fill_missing(self.sizes, *flat))
            check_sizes(self.sizes, *flat)
        return flat

    def additional_globals(self) -> list[tuple[str, Any]]:
        own = (check_sizes, check_tree, fill_missing, refuse_untraced)
        named = [(f"surgeon_{function.__name__}", function) for function in own]
        return [*super().additional_globals(), *named, ("surgeon_same", same_constant)]

    def gen_fn_def(self, free_vars: list[str], maybe_return_annotation: str, *, expanded_def: bool = False) -> str:
        names = [name.partition(":")[0].partition("#")[0].strip() for name in free_vars]
        written = super().gen_fn_def(free_vars, maybe_return_annotation, expanded_def=expanded_def)
        plain = ", ".join(["self", *(name for name in self.pytree_info.orig_args if name != "self")])
        written = written.replace(f"({plain})", f"(self, {definition(self.parameters)})", 1)
        start = written.index(":\n") + 1 if names else len(written)
        head, body = written[:start], written[start:]
        sizes = Sizes.parse(self.sizes)
        own = tuple(name for name in self.pytree_info.orig_args if name != "self")
        untraced = {name: accepted for name, accepted in sizes.untraced.items() if name not in own}
        if untraced:
            tests = " or ".join(changes_something(name, accepted) for name, accepted in untraced.items())
            given = ", ".join(f"{name}={name}" for name in untraced)
            head += f"\n    if {tests}:\n        surgeon_refuse_untraced({self.sizes!r}, {given})"
        if not names:
            return head
        if any(not leaf.is_leaf() for part in self.pytree_info.in_spec.children() for leaf in part.children()):
            # Flattening leaves out what a container has more than in the trace, so containers are compared before.
            given = body.partition("fx_pytree.tree_flatten_spec(")[2].removesuffix(", self._in_spec)")
            head += f"\n    surgeon_check_tree({given}, self._in_spec, {own!r})"
        every = ", ".join(names)
        optional = [name for name, given in zip(names, sizes.inputs, strict=False) if given.optional]
        if optional:
            missing = " or ".join(f"{name} is None" for name in optional)
            body += f"\n    if {missing}:\n        {every}, = surgeon_fill_missing({self.sizes!r}, {every})"
        return f"{head}{body}\n    surgeon_check_sizes({self.sizes!r}, {every})"

    def process_inputs(self, *inputs: Any) -> Any:
        """Called by `torch.export`, which runs the nodes of a graph and not its `forward`."""
        flat = self._flattened(inputs)
        _refuse_one_for_two(flat)
        return self.checked(flat)

    def _flattened(self, inputs: tuple[Any, ...]) -> list[Any]:
        """Return the inputs of an export, flat and in the order of the graph, None for those that are missing.

        Keyword inputs, and the entries of dicts, come in the caller's order (torch 2.13). The nodes of a graph take
        their inputs by place, so each is put where its name belongs.

        Raises:
            UsageError: the graph has no input for one. SizeError: a container has other entries than in the trace.
        """
        in_spec = self.pytree_info.in_spec
        parts = in_spec.children()
        if [in_spec.type, *(part.type for part in parts)] != [tuple, tuple, dict]:
            return list(super().process_inputs(*inputs))
        names = [parameter.name for parameter in self.parameters if parameter.kind is not parameter.KEYWORD_ONLY]
        given = _keywords_of_export(inputs)
        refuse_untraced(self.sizes, **{name: value for name, value in given.items() if name not in names})
        positional = inputs[: len(inputs) - len(given)]
        values = [*positional, *(given.get(name) for name in names[len(positional) :])]
        if len(values) > len(names):  # they are flat already
            return list(super().process_inputs(*values))
        first = parts[0].num_children
        arranged = (tuple(values[:first]), dict(zip(names[first:], values[first:], strict=True)))
        check_tree(arranged, in_spec, names)
        return list(fx_pytree.tree_flatten_spec(arranged, in_spec))


def _keywords_of_export(inputs: tuple[Any, ...]) -> dict[str, Any]:
    """Return the keyword inputs of the running torch.export, which hands their values on without the names.

    The names are still in the frame of a caller: a dict called `kwargs` that holds these very values.
    """
    frame = sys._getframe(1)
    for _ in range(_FRAMES):
        if frame is None:
            break
        given = frame.f_locals.get("kwargs")
        if isinstance(given, dict) and 0 < len(given) <= len(inputs):
            last = inputs[len(inputs) - len(given) :]
            if all(a is b for a, b in zip(given.values(), last, strict=True)):
                return given
        frame = frame.f_back  # type: ignore[assignment]
    return {}


def _refuse_one_for_two(flat: Sequence[Any]) -> None:
    """Refuse an export with one tensor for two inputs, of which torch.export makes one input in silence."""
    tensors = [id(leaf) for leaf in flat if isinstance(leaf, Tensor)]
    if is_exporting() and len(set(tensors)) < len(tensors):
        raise UsageError("torch.export makes one input of two that are the same tensor. Give each its own: x.clone().")


def check_tree(given: Any, spec: Any, names: Sequence[str]) -> None:
    """Refuse inputs in other containers than those of the trace: with more or fewer entries, or of another kind.

    Args:
        given: positional and keyword arguments. names: of all of them.

    Raises:
        SizeError: the message names the container.
    """
    values = [*given[0], *given[1].values()]
    specs = [child for part in spec.children() for child in part.children()]
    for name, value, child in zip(names, values, specs, strict=True):
        _check_container(value, child, name)


def _check_container(value: Any, spec: Any, place: str) -> None:
    if spec.is_leaf() or isinstance(value, Proxy):
        return
    if spec.type in (tuple, list):
        entries: Any = range(len(value)) if isinstance(value, tuple | list) else None
        wanted: Any = range(spec.num_children)
    elif spec.type in (dict, OrderedDict):
        entries = list(value) if isinstance(value, Mapping) else None
        wanted = list(spec.context)
    else:  # a class that is registered with pytree
        parts = pytree.SUPPORTED_NODES[spec.type].flatten_fn(value)[0] if isinstance(value, spec.type) else None
        entries, wanted, value = None if parts is None else range(len(parts)), range(spec.num_children), parts
    if entries is None or set(entries) != set(wanted):
        kind = "no such container" if entries is None else f"the entries {list(entries)}"
        raise SizeError(
            f"Wrong inputs: {place} has {kind}, but the graph was traced with {list(wanted)}. With other entries the "
            "model may compute something else than the graph. Trace the model with example inputs of this form."
        )
    for key, child in zip(wanted, spec.children(), strict=True):
        _check_container(value[key], child, f"{place}[{key!r}]")


def input_places(graph: GraphModule) -> dict[str, int]:
    """Return the place among the flat inputs of every argument that is one input, by its name."""
    return _places(_info(graph).in_spec, argument_names(graph))


def _places(in_spec: Any, names: Sequence[str]) -> dict[str, int]:
    found, place = {}, 0
    for name, child in zip(names, [child for part in in_spec.children() for child in part.children()], strict=True):
        if child.is_leaf():
            found[name] = place
        place += child.num_leaves
    return found


def input_paths(graph: GraphModule) -> list[tuple[Any, ...]]:
    """Return the path of every flat input in the named arguments, as keys of pytree: a name, then keys and indices."""
    in_spec = _info(graph).in_spec
    args, kwargs = unflatten_inputs(graph, range(in_spec.num_leaves))
    named = dict(zip(argument_names(graph), [*args, *kwargs.values()], strict=True))
    return [path for path, _ in pytree.tree_flatten_with_path(named)[0]]


def unflatten_inputs(graph: GraphModule, flat: Iterable[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arrange flat inputs as positional and keyword arguments of a call, as the graph was traced with them."""
    args, kwargs = pytree.tree_unflatten(list(flat), _info(graph).in_spec)
    return args, kwargs


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

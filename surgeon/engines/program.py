"""A graph as a program that takes tensors only, for other engines: its inputs, sizes and outputs, and what it gives."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from surgeon.errors import UsageError
from surgeon.graph.agreement import call_reproducibly
from surgeon.graph.calls import argument_names, as_args_kwargs, flat_inputs, input_places, unflatten_inputs
from surgeon.graph.sizes import Sizes
from surgeon.graph.traced import TracedGraph
from surgeon.kernels.sparse_linear import ordinary_ops
from surgeon.tracing.dynamic_sizes import free_shapes
from surgeon.tracing.narrowing import resized, sizes_of
from surgeon.tracing.quiet import quiet
from surgeon.tracing.setup import copied


class Program:
    """A graph that takes tensors only and returns plain containers of tensors.

    Attributes:
        sizes, leaves: of the inputs it takes, flat.
    """

    def __init__(self, graph: TracedGraph, inputs: Any, leave_out: Sequence[str] = ()) -> None:
        """Take a graph in evaluation mode, and example inputs.

        leave_out: optional inputs (see `surgeon.graph.missing`) that the program is to do without: it always takes all
            of its inputs.

        Raises:
            UsageError: an input cannot be left out.
        """
        sizes, places = Sizes.parse(graph.meta["trace"].sizes), input_places(graph)
        optional = [name for name, place in places.items() if sizes.inputs[place].optional]
        if wrong := [name for name in leave_out if name not in optional]:
            raise UsageError(
                f"{wrong[0]} cannot be left out. Optional inputs of this graph: {', '.join(optional) or 'none'}."
            )
        flat = flat_inputs(graph, *as_args_kwargs(inputs))
        self._graph, self._all_sizes = graph, sizes
        self._flat = resized(sizes, flat, {name: _free(sizes, name, n) for name, n in sizes_of(sizes, flat).items()})
        constants = {name: place for name, place in places.items() if sizes.inputs[place].shape is None}
        self._constants = {name: flat[place] for name, place in constants.items()}
        self._dropped = {*constants, *leave_out}
        gone = {places[name] for name in self._dropped}
        self._kept = [i for i, given in enumerate(sizes.inputs) if given.shape is not None and i not in gone]
        # None of them is optional: a program takes all of its inputs.
        taken = tuple(replace(sizes.inputs[place], fill="", dtype=None) for place in self._kept)
        self.sizes = replace(sizes, inputs=taken, untraced={})
        self.leaves = self.tensors(self._flat)

    def tensors(self, flat: Sequence[Any]) -> list[Tensor]:
        """The program's inputs among the graph's."""
        return [flat[place] for place in self._kept]

    def named(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
        """The program's inputs by name, of a call of the graph."""
        return self._by_name(flat_inputs(self._graph, args, kwargs))

    def _by_name(self, flat: Sequence[Any]) -> dict[str, Tensor]:
        return {given.name: leaf for given, leaf in zip(self.sizes.inputs, self.tensors(flat), strict=True)}

    def examples(self) -> Iterator[tuple[str, dict[str, Tensor], list[Tensor]]]:
        """At each of the sizes of `to_try`: these in words, the inputs by name, and what the graph gives."""
        for sizes, flat in self.to_try():
            words = ", ".join(f"{name} {size}" for name, size in sizes.items())
            yield words, self._by_name(flat), pytree.tree_leaves(self.expected(flat))

    def call(self, flat: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call of the program, copied, of flat inputs of the graph."""
        args, kwargs = copied(unflatten_inputs(self._graph, flat))
        names = argument_names(self._graph)
        given = dict(zip(names, args, strict=False))
        args = tuple(value for name, value in given.items() if name not in self._dropped)
        return args, {name: value for name, value in kwargs.items() if name not in self._dropped}

    def _module(self) -> nn.Module:
        graph, constants = self._graph, self._constants
        names = [name for name in argument_names(graph) if name not in self._dropped]
        signature = inspect.Signature([inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in names])

        def forward(*args: Any, **kwargs: Any) -> Any:
            return plain(graph(**signature.bind(*args, **kwargs).arguments, **constants))

        forward.__signature__ = signature  # type: ignore[attr-defined]
        module = nn.Module()
        # Under the graph's own names, by which tau can be set in the compiled model.
        module._parameters, module._buffers, module._modules = graph._parameters, graph._buffers, graph._modules
        module.forward = forward
        module.training = False
        return module

    def export(self, *, sparse_linears: bool = False) -> ExportedProgram:
        """Export the graph, with the sizes free that are free in it.

        Args:
            sparse_linears: keep the operator of linear layers that skip inputs. Without it, they become ordinary ops,
                which read all inputs and mask some.

        Raises:
            Exception: of many types, if torch cannot.
        """
        module = self._module()
        args, kwargs = self.call(self._flat)
        leaves = pytree.tree_leaves((args, kwargs))
        shapes = {
            id(leaf): [dim for dim, size in enumerate(given.shape or ()) if isinstance(size, str)]
            for given, leaf in zip(self.sizes.inputs, [x for x in leaves if isinstance(x, Tensor)], strict=True)
        }
        dims = free_shapes(module, args, kwargs, [shapes.get(id(leaf), []) for leaf in leaves])
        with quiet(), torch.no_grad(), nullcontext() if sparse_linears else ordinary_ops():
            return torch.export.export(module, args, kwargs, strict=False, dynamic_shapes=dims)

    def to_try(self) -> Iterator[tuple[dict[str, int], list[Any]]]:
        """Sizes, and flat inputs of the graph of them.

        They are the example's sizes, each at its least with the others a little larger, all at their
        least, and larger.
        """
        example = sizes_of(self._all_sizes, self._flat)
        axes = self._all_sizes.axes
        least = {name: max(axis.least, axis.multiple) for name, axis in axes.items()}
        more = {
            name: n if (n := example[name] + axis.multiple) in axis else example[name] for name, axis in axes.items()
        }
        for sizes in (example, more, *({**more, name: size} for name, size in least.items()), least):
            if self._all_sizes.allow(sizes):
                yield sizes, resized(self._all_sizes, self._flat, sizes)

    def expected(self, flat: Sequence[Any]) -> Any:
        """What the graph gives."""
        args, kwargs = self.call(flat)
        names = [name for name in argument_names(self._graph) if name not in self._dropped]
        named = {**dict(zip(names, args, strict=False)), **kwargs, **self._constants}
        return plain(call_reproducibly(self._graph, (), named))

    def example(self) -> tuple[list[Tensor], Any]:
        """The example inputs, and what the graph gives for them."""
        return self.leaves, self.expected(self._flat)

    def output_names(self) -> list[str]:
        """The places of the outputs, such as "logits" or "0"; "output" for a single tensor."""
        places = pytree.tree_flatten_with_path(self.expected(self._flat))[0]
        return [
            ".".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path) or "output"
            for path, _ in places
        ]


def _free(sizes: Sizes, name: str, size: int) -> int:
    """The size of an axis in the example: 2 at least, since export fixes sizes of 0 and 1."""
    axis = sizes.axes[name]
    if size >= 2 or axis.most == 1:
        return size
    return next(larger for larger in range(2, 2 + 2 * axis.multiple) if larger in axis)


def plain(output: Any) -> Any:
    """Return an output in containers that a process without other packages knows, without what is no tensor."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        return {str(key): plain(value) for key, value in output.items() if _holds_tensors(value)}
    if type(output) in pytree.SUPPORTED_NODES and not isinstance(output, tuple | list):
        output = pytree.tree_leaves(output)
    return tuple(plain(value) for value in output if _holds_tensors(value))


def _holds_tensors(value: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value))

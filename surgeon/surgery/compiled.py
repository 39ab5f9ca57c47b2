"""Compile a graph with AOTInductor, into a directory that runs in a process without this package.

model.pt2        the compiled model, which checks its inputs itself
surgeon_cpu.so   the library with surgeon's operators, if the graph has any; it is loaded first
example.pt       example inputs and what the model gives for them, as lists of tensors
compiled.json    the names of inputs and outputs, the sizes they may have, and tau by the name of its constant
"""

from __future__ import annotations

import inspect
import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from surgeon.directories import replaced, restore
from surgeon.errors import SaveError, UsageError, first_line
from surgeon.graph.agreement import call_reproducibly, relative_error, tolerance_for
from surgeon.graph.calls import argument_names, as_args_kwargs, flat_inputs, input_places, unflatten_inputs
from surgeon.graph.sizes import Sizes
from surgeon.graph.traced import TracedGraph
from surgeon.kernels import cpu
from surgeon.moe.knobs import get_tau
from surgeon.moe.site import find_moes
from surgeon.surgery.compiled_check import checked_code
from surgeon.tracing.dynamic_sizes import free_shapes
from surgeon.tracing.narrowing import resized, sizes_of
from surgeon.tracing.setup import copied
from surgeon.tracing.trace import quiet
from surgeon.version import __version__

MODEL, LIBRARY, EXAMPLE, ABOUT = "model.pt2", "surgeon_cpu.so", "example.pt", "compiled.json"


@dataclass(frozen=True)
class Compiled:
    """The content of `compiled.json`.

    inputs: dtype by name, in order. takes: the sizes, as `surgeon.graph.sizes.Sizes` writes them. outputs: names or
    numbers, in order. tau: by the name of the constant that holds it. max_error: the largest difference from the graph,
    relative to the largest output, at all sizes that were tried. seconds: that compiling took.
    """

    inputs: dict[str, str]
    takes: str
    outputs: list[str]
    tau: dict[str, float]
    max_error: float
    seconds: float
    versions: dict[str, str]


def compile_graph(
    graph: TracedGraph, inputs: Any, directory: Path, *, leave_out: Sequence[str] = (), overwrite: bool = False
) -> Compiled:
    """Compile a graph in evaluation mode for the CPU, and compare it with the graph before it is put in place.

    Args:
        inputs: example inputs. directory: must not exist or be empty, unless `overwrite` and it is a compiled model.
        leave_out: optional inputs (see `surgeon.graph.missing`) that the compiled model is to do without: it always
            takes all of its inputs.

    Raises:
        UsageError: an input cannot be left out. SaveError: the directory has other content or cannot be written, the
            model cannot be compiled, its operators have no library here, or it differs from the graph.
    """
    check_directory(directory, overwrite=overwrite)
    library = _library(graph)
    package = _Package(graph.eval(), inputs, leave_out)
    began = time.monotonic()
    try:
        with replaced(directory) as fresh:
            package.compile(fresh / MODEL)
            seconds = time.monotonic() - began
            max_error = package.compare(fresh / MODEL)
            if library is not None:
                shutil.copyfile(library, fresh / LIBRARY)
            torch.save(package.example(), fresh / EXAMPLE)
            made = Compiled(
                {given.name: str(leaf.dtype) for given, leaf in zip(package.sizes.inputs, package.leaves, strict=True)},
                str(package.sizes),
                package.output_names(),
                {f"{path}.tau": tau for path, tau in get_tau(graph).items()},
                max_error,
                seconds,
                {"surgeon": __version__, "torch": torch.__version__},
            )
            (fresh / ABOUT).write_text(json.dumps(asdict(made), indent=1), encoding="utf-8")
    except OSError as error:
        raise SaveError(f"Cannot write {directory}: {error.strerror or error}. Nothing was left behind.") from error
    return made


def check_directory(directory: Path, *, overwrite: bool) -> None:
    """Refuse a directory that has other content.

    Raises:
        SaveError: it has.
    """
    restore(directory)
    if directory.exists() and not directory.is_dir():
        raise SaveError(f"{directory} is a file. Give a directory for the result with -o.")
    if directory.is_dir() and any(directory.iterdir()):
        if not (directory / ABOUT).exists():
            raise SaveError(f"{directory} is not empty and not a compiled model. Give another directory with -o.")
        if not overwrite:
            raise SaveError(f"{directory} exists. Give another directory with -o, or replace it with --overwrite.")


def _library(graph: TracedGraph) -> Path | None:
    """The library with the operators that a graph runs; None if it runs none.

    Raises:
        SaveError: it cannot be built.
    """
    if not find_moes(graph):
        return None
    state = cpu.load()
    if state.path is None:
        raise SaveError(f"A compiled model needs the library of the native kernels, which do not run here: {state.why}")
    return state.path


class _Package:
    """A graph as a module that takes tensors only and returns plain containers of tensors.

    sizes, leaves: of the inputs it takes, flat.
    """

    def __init__(self, graph: TracedGraph, inputs: Any, leave_out: Sequence[str]) -> None:
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
        # None of them is optional: a package takes all of its inputs.
        taken = tuple(replace(sizes.inputs[place], fill="", dtype=None) for place in self._kept)
        self.sizes = replace(sizes, inputs=taken, untraced={})
        self.leaves = self._tensors(self._flat)

    def _tensors(self, flat: Sequence[Any]) -> list[Tensor]:
        return [flat[place] for place in self._kept]

    def _call(self, flat: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call of the compiled model."""
        args, kwargs = unflatten_inputs(self._graph, flat)
        names = argument_names(self._graph)
        given = dict(zip(names, args, strict=False))
        args = tuple(value for name, value in given.items() if name not in self._dropped)
        return args, {name: value for name, value in kwargs.items() if name not in self._dropped}

    def _module(self) -> nn.Module:
        graph, constants = self._graph, self._constants
        names = [name for name in argument_names(graph) if name not in self._dropped]
        signature = inspect.Signature([inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in names])

        def forward(*args: Any, **kwargs: Any) -> Any:
            return _plain(graph(**signature.bind(*args, **kwargs).arguments, **constants))

        forward.__signature__ = signature  # type: ignore[attr-defined]
        module = nn.Module()
        # Under the graph's own names, by which tau can be set in the compiled model.
        module._parameters, module._buffers, module._modules = graph._parameters, graph._buffers, graph._modules
        module.forward = forward
        module.training = False
        return module

    def compile(self, file: Path) -> None:
        """Export and compile into a file.

        Raises:
            SaveError: that fails.
        """
        module = self._module()
        args, kwargs = copied(self._call(self._flat))
        leaves = pytree.tree_leaves((args, kwargs))
        shapes = {
            id(leaf): [dim for dim, size in enumerate(given.shape or ()) if isinstance(size, str)]
            for given, leaf in zip(self.sizes.inputs, [x for x in leaves if isinstance(x, Tensor)], strict=True)
        }
        dims = free_shapes(module, args, kwargs, [shapes.get(id(leaf), []) for leaf in leaves])
        try:
            with quiet(), torch.no_grad(), checked_code(self.sizes) as checked:
                program = torch.export.export(module, args, kwargs, strict=False, dynamic_shapes=dims)
                # Weights are laid out for the processor, and what follows from them alone is computed now. tau, a
                # scalar, would be a number in the code, and could not be set.
                options = {"freezing": True, "always_keep_tensor_constants": True}
                torch._inductor.aoti_compile_and_package(program, package_path=str(file), inductor_configs=options)
        except Exception as error:
            raise SaveError(f"The model cannot be compiled: {first_line(error)}. Nothing was written.") from error
        if not checked:
            raise SaveError("This version of torch compiled the model without the check of its inputs.")

    def compare(self, file: Path) -> float:
        """Return the largest relative error of the compiled model, on the example inputs and at other sizes.

        Raises:
            SaveError: it is too large, or the compiled model fails or has no constant for a tau.
        """
        model = torch._inductor.aoti_load_package(str(file))
        for path in get_tau(self._graph):
            if f"{path}.tau" not in model.get_constant_fqns():
                raise SaveError(f"This version of torch compiled a model in which {path}.tau cannot be set.")
        errors = []
        for sizes in self._sizes_to_try():
            flat = resized(self._all_sizes, self._flat, sizes)
            args, kwargs = copied(self._call(flat))
            expected = self._expected(flat)
            try:
                error = relative_error(model(*args, **kwargs), expected)
            except Exception as failure:
                raise SaveError(f"The compiled model fails at {sizes}: {first_line(failure)}.") from failure
            if not error <= tolerance_for(expected, self._graph):
                raise SaveError(f"The compiled model differs from the graph by {error:.1e}, relative, at {sizes}.")
            errors.append(error)
        return max(errors)

    def _sizes_to_try(self) -> Iterator[dict[str, int]]:
        """The example's sizes, each at its least with the others a little larger, all at their least, and larger."""
        example = sizes_of(self._all_sizes, self._flat)
        axes = self._all_sizes.axes
        least = {name: max(axis.least, axis.multiple) for name, axis in axes.items()}
        more = {
            name: n if (n := example[name] + axis.multiple) in axis else example[name] for name, axis in axes.items()
        }
        for sizes in (example, more, *({**more, name: size} for name, size in least.items()), least):
            if self._all_sizes.allow(sizes):
                yield sizes

    def _expected(self, flat: Sequence[Any]) -> Any:
        args, kwargs = copied(self._call(flat))
        names = [name for name in argument_names(self._graph) if name not in self._dropped]
        named = {**dict(zip(names, args, strict=False)), **kwargs, **self._constants}
        return _plain(call_reproducibly(self._graph, (), named))

    def example(self) -> dict[str, list[Tensor]]:
        """Example inputs, and what the graph gives for them."""
        outputs = pytree.tree_leaves(self._expected(self._flat))
        return {"inputs": [leaf.clone() for leaf in self.leaves], "outputs": [leaf.clone() for leaf in outputs]}

    def output_names(self) -> list[str]:
        """The places of the outputs, such as "logits" or "0"."""
        places = pytree.tree_flatten_with_path(self._expected(self._flat))[0]
        return [".".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path) for path, _ in places]


def _free(sizes: Sizes, name: str, size: int) -> int:
    """The size of an axis in the example: 2 at least, since export fixes sizes of 0 and 1."""
    axis = sizes.axes[name]
    if size >= 2 or axis.most == 1:
        return size
    return next(larger for larger in range(2, 2 + 2 * axis.multiple) if larger in axis)


def _plain(output: Any) -> Any:
    """An output in containers that a process without other packages knows, without what is no tensor."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        return {str(key): _plain(value) for key, value in output.items() if _holds_tensors(value)}
    if type(output) in pytree.SUPPORTED_NODES and not isinstance(output, tuple | list):
        output = pytree.tree_leaves(output)
    return tuple(_plain(value) for value in output if _holds_tensors(value))


def _holds_tensors(value: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value))

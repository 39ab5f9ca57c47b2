"""Compile a graph with AOTInductor, into a directory that runs in a process without this package.

model.pt2        the compiled model, which checks its inputs itself
surgeon_cpu.so   the library with surgeon's operators, if the graph has any; it is loaded first
example.pt       example inputs and what the model gives for them, as lists of tensors
compiled.json    the names of inputs and outputs, the sizes they may have, and tau by the name of its constant
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from surgeon.directories import OVERWRITE, replaced, restore
from surgeon.dynamic.knobs import get_tau
from surgeon.engines.program import Program
from surgeon.errors import SaveError, first_line
from surgeon.graph.agreement import relative_error, tolerance_for
from surgeon.graph.traced import TracedGraph
from surgeon.inputs.skipping import find_skipping
from surgeon.kernels import cpu
from surgeon.moe.site import find_moes, refuse_float8
from surgeon.surgery.compiled_check import checked_code
from surgeon.tracing.quiet import quiet
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
        UsageError: an input cannot be left out, or experts are in float8. SaveError: the directory has other content
            or cannot be written, the model cannot be compiled, its operators have no library here, or it differs from
            the graph.
    """
    check_directory(directory, overwrite=overwrite)
    refuse_float8(graph, "A compiled model")
    library = _library(graph)
    program = Program(graph.eval(), inputs, leave_out)
    began = time.monotonic()
    try:
        with replaced(directory) as fresh:
            _compile(program, graph, fresh / MODEL)
            seconds = time.monotonic() - began
            max_error = _compare(program, graph, fresh / MODEL)
            if library is not None:
                shutil.copyfile(library, fresh / LIBRARY)
            torch.save(_example(program), fresh / EXAMPLE)
            made = Compiled(
                {given.name: str(leaf.dtype) for given, leaf in zip(program.sizes.inputs, program.leaves, strict=True)},
                str(program.sizes),
                program.output_names(),
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
        raise SaveError(f"{directory} is a file. Give a directory for the result.")
    if directory.is_dir() and any(directory.iterdir()):
        if not (directory / ABOUT).exists():
            raise SaveError(f"{directory} is not empty and not a compiled model. Give another directory.")
        if not overwrite:
            raise SaveError(f"{directory} exists.", **OVERWRITE)


def _library(graph: TracedGraph) -> Path | None:
    """The library with the operators that a graph runs; None if it runs none.

    Raises:
        SaveError: it cannot be built.
    """
    if not find_moes(graph) and not keeps_operator(graph):
        return None
    state = cpu.load()
    if state.path is None:
        raise SaveError(f"A compiled model needs the library of the native kernels, which do not run here: {state.why}")
    return state.path


def keeps_operator(graph: TracedGraph) -> bool:
    """Whether linear layers that skip inputs call the library's operator. Else they become ordinary ops."""
    sites = find_skipping(graph)
    native = cpu.load().path is not None and torch._C._dispatch_has_kernel_for_dispatch_key(
        "surgeon::sparse_linear", "CPU"
    )
    return native and bool(sites) and all(site.skips for site in sites)


def _compile(program: Program, graph: TracedGraph, file: Path) -> None:
    """Export and compile into a file.

    Raises:
        SaveError: that fails.
    """
    try:
        with quiet(), torch.no_grad(), checked_code(program.sizes) as checked:
            # Weights are laid out for the processor, and what follows from them alone is computed now. tau, a scalar,
            # would be a number in the code, and could not be set.
            # So would the threshold of linear layers that skip inputs by ordinary ops, which follows from tau alone.
            kept = keeps_operator(graph)
            folds = kept or not find_skipping(graph)
            options = {
                "freezing": folds, "joint_graph_constant_folding": folds, "always_keep_tensor_constants": True,
            }  # fmt: skip
            torch._inductor.aoti_compile_and_package(
                program.export(sparse_linears=kept), package_path=str(file), inductor_configs=options
            )
    except Exception as error:
        raise SaveError(f"The model cannot be compiled: {first_line(error)}. Nothing was written.") from error
    if not checked:
        raise SaveError("This version of torch compiled the model without the check of its inputs.")


def _compare(program: Program, graph: TracedGraph, file: Path) -> float:
    """Return the largest relative error of the compiled model, on the example inputs and at other sizes.

    Raises:
        SaveError: it is too large, or the compiled model fails or has no constant for a tau.
    """
    model = torch._inductor.aoti_load_package(str(file))
    for path in get_tau(graph):
        if f"{path}.tau" not in model.get_constant_fqns():
            raise SaveError(f"This version of torch compiled a model in which {path}.tau cannot be set.")
    errors = []
    for sizes, flat in program.to_try():
        args, kwargs = program.call(flat)
        expected = program.expected(flat)
        try:
            error = relative_error(model(*args, **kwargs), expected)
        except Exception as failure:
            raise SaveError(f"The compiled model fails at {sizes}: {first_line(failure)}.") from failure
        if not error <= tolerance_for(expected, graph):
            raise SaveError(f"The compiled model differs from the graph by {error:.1e}, relative, at {sizes}.")
        errors.append(error)
    return max(errors)


def _example(program: Program) -> dict[str, list[Tensor]]:
    inputs, outputs = program.example()
    return {"inputs": [t.clone() for t in inputs], "outputs": [t.clone() for t in pytree.tree_leaves(outputs)]}

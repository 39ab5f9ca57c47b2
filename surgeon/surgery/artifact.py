"""Save the result of a surgery to a directory, and load it again in any process.

    model.pt2      the graph, in training form
    surgery.json   what was done: recipe, versions, seed, hash of the input, report of every pass, expert layers
    diff.json      the nodes of the graph, and what every pass changed, node by node
    config.json, tokenizer files, ...   of a Hugging Face model

The directory appears whole or not at all.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import shutil
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule

import surgeon.kernels.dynamic_k  # noqa: F401  (registers the ops that the file holds)
from surgeon.directories import OVERWRITE, replaced, restore
from surgeon.errors import LoadError, PassError, SaveError
from surgeon.graph.agreement import call_reproducibly, relative_error, tolerance_for
from surgeon.graph.calls import as_args_kwargs, flat_inputs, unflatten_inputs
from surgeon.graph.edit import output_leaves, replace_outputs
from surgeon.graph.given import path_of
from surgeon.graph.sizes import Sizes
from surgeon.graph.traced import TracedGraph, fork
from surgeon.models.sentence_transformers import copy_sentence_files
from surgeon.models.user_function import import_modules
from surgeon.models.weight_files import read_program, sha256_of
from surgeon.moe.filling import mark_filling
from surgeon.processes import is_main, wait
from surgeon.sites.ffn import mark_projection
from surgeon.surgery.diff import Diff
from surgeon.surgery.origin import Origin
from surgeon.surgery.record import RECORD, Record, parse, read_json, read_record, write_record
from surgeon.tracing.dynamic_sizes import free_shapes
from surgeon.tracing.narrowing import free_dims, resized, sizes_of
from surgeon.tracing.quiet import quiet
from surgeon.tracing.setup import copied
from surgeon.tracing.trace import TraceInfo, from_program

log = logging.getLogger("surgeon")

MODEL, DIFF = "model.pt2", "diff.json"

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
"""Example inputs as positional and keyword arguments."""


def save(
    graph: TracedGraph,
    directory: str | Path,
    *,
    inputs: Any,
    record: Record,
    diff: Diff,
    origin: Origin,
    overwrite: bool = False,
) -> Path:
    """Write a graph and its record to `directory`, which must not exist or must be empty, unless `overwrite`.

    The saved program is compared with the graph on the example inputs before anything is put in place. Of several
    processes the main one writes, and the others wait for it.

    Args:
        inputs: example inputs. record: see `surgeon.surgery.record.make_record`. diff: what every pass changed.
        origin: its configuration and tokenizer are written beside the graph.

    Raises:
        SaveError: the directory has other content, there is no space or no permission, or the graph cannot be exported.
            Nothing half-written is left behind.
        PassError: there are no example inputs, which export needs. UsageError: `directory` is no path.
    """
    directory = path_of(directory)
    if not is_main():
        wait()
        return directory
    restore(directory)
    if inputs is None:
        raise PassError("A surgery is saved with its example inputs. Pass them to Pipeline.run as inputs=…")
    if directory.exists() and not directory.is_dir():
        raise SaveError(f"{directory} is a file. Give a directory for the result.")
    if directory.is_dir() and any(directory.iterdir()):
        if not overwrite:
            raise SaveError(f"{directory} exists and is not empty.", **OVERWRITE)
        if not (directory / RECORD).exists():
            raise SaveError(f"{directory} is not empty and not a saved surgery. Give another directory.")
    # torch.export writes texts in the output, but cannot read them again.
    texts = {index: leaf for index, leaf in enumerate(output_leaves(graph)) if isinstance(leaf, str)}
    if texts:
        graph = fork(graph)
        replace_outputs(graph, dict.fromkeys(texts))
    program = _export(graph, *as_args_kwargs(inputs))
    _forget_tracing(program)
    with written_whole(directory) as fresh:
        _check_space(graph, fresh)
        torch.export.save(program, fresh / MODEL)
        if origin.config is not None and hasattr(origin.config, "save_pretrained"):
            for part in (origin.config, origin.generation, origin.tokenizer, origin.processor):
                if part is not None:
                    part.save_pretrained(fresh)
        if origin.path is not None:
            copy_sentence_files(Path(origin.path), fresh)
        (fresh / DIFF).write_text(json.dumps(diff.to_dict()), encoding="utf-8")
        write_record(replace(record, output_texts=tuple(texts.items()), model_sha256=sha256_of([fresh / MODEL])), fresh)
    wait()
    return directory


def load(directory: str | Path, *, trust_modules: Sequence[str] = ()) -> TracedGraph:
    """Load a saved graph, in evaluation mode. `graph.meta["surgery"]` holds the record of what was done.

    Nothing in the directory can run code, and no module that it names is imported.

    Args:
        trust_modules: Python modules to import first. The model may use output classes and operators that they define.

    Raises:
        LoadError: the directory is not a saved surgery, a file is damaged or holds what `torch.export.save` does not
            write, or another version of surgeon wrote it; the model uses a class or an operator that is not registered;
            a trusted module cannot be imported.
        UsageError: `directory` is no path.
    """
    return load_with_inputs(directory, trust_modules=trust_modules)[0]


def load_with_inputs(directory: str | Path, *, trust_modules: Sequence[str] = ()) -> tuple[TracedGraph, Inputs]:
    """Load a saved graph as `load`, and its example inputs.

    Raises:
        LoadError: as `load`.
    """
    directory = path_of(directory)
    record = read_record(directory)
    model = directory / MODEL
    if not model.exists():
        raise LoadError(f"{directory} has no {MODEL}, so the saved surgery is incomplete. Save it again.")
    import_modules(trust_modules)
    graph, inputs = _read_graph(model, record)
    _check_trace(graph, record, directory)
    if record.output_texts:
        replace_outputs(graph, dict(record.output_texts))
    graph.meta["surgery"] = record
    for path in record.projections:
        mark_projection(graph, path)
    for layer in record.experts:
        mark_filling(graph, layer.path, layer.filling)
    try:
        graph.meta["earlier_passes"] = load_diff(directory).as_earlier()
    except LoadError as error:
        # The model is intact; only the record of what was done to it is not.
        log.warning("%s Results that start from this surgery will not include its diff.", error)
    return graph, inputs


def _read_graph(model: Path, record: Record) -> tuple[TracedGraph, Inputs]:
    """Read the graph and its example inputs, and hash the file meanwhile on another core.

    Raises:
        LoadError: as `load`. That the file is damaged comes before what else is wrong with it.
    """
    with ThreadPoolExecutor(1) as pool:
        digest = pool.submit(sha256_of, [model])
        try:
            with quiet():
                program = read_program(model, checksums=False)
                graph = from_program(program, record.trace)
            if program.example_inputs is None:
                raise LoadError(f"{model} has no example inputs. Save the surgery again.")
            args, kwargs = program.example_inputs
            return graph, (tuple(args), dict(kwargs))
        finally:
            if digest.result() != record.model_sha256:
                raise LoadError(
                    f"{model} is damaged or was changed: its hash differs from the one in {RECORD}. Save it again."
                )


def _check_trace(graph: TracedGraph, record: Record, directory: Path) -> None:
    """Check that the record speaks of the graph's own inputs and outputs.

    Raises:
        LoadError: it does not.
    """
    values = [(node.name, node.meta.get("val")) for node in graph.graph.find_nodes(op="placeholder")]
    shapes = [(name, value.dim() if isinstance(value, torch.Tensor) else None) for name, value in values]
    sizes = Sizes.parse(record.trace.sizes)
    given = [(given.name, None if given.shape is None else len(given.shape)) for given in sizes.inputs]
    if given != shapes or tuple(free_dims(sizes)) != record.trace.dynamic:
        raise LoadError(f"{directory / RECORD} is damaged: trace.sizes are not those of the inputs of {MODEL}.")
    constants = dict(enumerate(output_leaves(graph)))
    if any(constants.get(index, "") is not None for index, _ in record.output_texts):
        raise LoadError(f"{directory / RECORD} is damaged: output_texts are not constants of {MODEL}.")


def load_diff(directory: str | Path) -> Diff:
    """The pass-by-pass difference of a saved surgery.

    Raises:
        LoadError: as `load`.
    """
    path = Path(directory) / DIFF
    reports = read_record(Path(directory)).passes
    found = parse(Diff, read_json(path), path)
    if tuple(one.report for one in found.passes) != reports:
        raise LoadError(f"{path} is damaged: its passes are not those of {RECORD}.")
    return found


def _export(graph: TracedGraph, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.export.ExportedProgram:
    args, kwargs, shapes = _for_export(graph, args, kwargs)
    training = graph.training
    info: TraceInfo = graph.meta["trace"]
    graph.train()
    try:
        with quiet(), torch.no_grad():
            program = torch.export.export(graph, args, kwargs, strict=False, dynamic_shapes=shapes)
            exported = from_program(program, info)
    except Exception as error:
        raise SaveError(f"The graph cannot be exported: {error}") from error
    finally:
        graph.train(training)
    try:
        graph.eval()
        expected, actual = call_reproducibly(graph, args, kwargs), call_reproducibly(exported, args, kwargs)
    finally:
        graph.train(training)
    error_size = relative_error(actual, expected)
    if not error_size <= tolerance_for(expected, graph):
        raise SaveError(f"The exported graph differs from the graph by {error_size:.1e}, relative. Nothing was saved.")
    return program


def _for_export(
    graph: TracedGraph, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """The inputs of a call in the graph's order, each a tensor of its own, and which of their sizes stay free.

    Sizes of 1 that may change are made larger, since export fixes them.
    """
    sizes = Sizes.parse(graph.meta["trace"].sizes)
    flat = flat_inputs(graph, args, kwargs)
    wanted = {
        name: next(larger for larger in range(2, 2 + 2 * axis.multiple) if larger in axis) if size < 2 else size
        for name, size in sizes_of(sizes, flat).items()
        if (axis := sizes.axes[name]).most != 1
    }
    args, kwargs = copied(unflatten_inputs(graph, resized(sizes, flat, wanted)))
    dims = [[dim for dim, size in enumerate(given.shape or ()) if isinstance(size, str)] for given in sizes.inputs]
    return args, kwargs, free_shapes(graph, args, kwargs, dims)


def _forget_tracing(program: torch.export.ExportedProgram) -> None:
    """Drop what torch notes about where a graph was traced: paths of source files, and addresses of graphs in memory.

    No reader of a saved surgery needs it, and without it two runs with the same seed write the same bytes.
    """
    for module in program.graph_module.modules():
        if isinstance(module, GraphModule):
            for node in module.graph.nodes:
                for key in ("stack_trace", "from_node", "torch_fn", "source_fn_stack"):
                    node.meta.pop(key, None)
                if stack := node.meta.get("nn_module_stack"):  # its keys may be addresses
                    node.meta["nn_module_stack"] = {path: (path, kind) for path, kind in stack.values()}


def _check_space(graph: GraphModule, where: Path) -> None:
    tensors = {id(t): t for t in [*graph.parameters(), *graph.buffers()]}.values()
    needed = int(1.05 * sum(t.numel() * t.element_size() for t in tensors)) + (1 << 20)
    free = shutil.disk_usage(where).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"{needed / 1e6:.0f} MB needed, {free / 1e6:.0f} MB free")


@contextlib.contextmanager
def written_whole(directory: Path) -> Iterator[Path]:
    """A new directory that replaces the target when everything is written, and is removed otherwise."""
    try:
        with replaced(directory) as fresh, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield fresh
    except OSError as error:
        raise SaveError(f"Cannot write {directory}: {error.strerror or error}. Nothing was left behind.") from error
    except RuntimeError as error:
        # torch's own file writer reports a full disk in this way.
        raise SaveError(f"Cannot write {directory}: {error}. Nothing was left behind.") from error

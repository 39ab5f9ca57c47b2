"""Save the result of a surgery to a directory, and load it again in any process.

    model.pt2      the graph, in training form
    surgery.json   what was done: recipe, versions, seed, hash of the input, report of every pass, expert layers
    diff.json      what every pass changed in the graph, node by node
    config.json, tokenizer files, ...   of a Hugging Face model

The directory appears whole or not at all.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import json
import logging
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch.export import Dim
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

import surgeon.kernels.dynamic_k  # noqa: F401  (registers the ops that the file holds)
from surgeon.errors import LoadError, PassError, SaveError
from surgeon.graph.agreement import call_reproducibly, relative_error, tolerance_for
from surgeon.graph.calls import as_args_kwargs, named_arguments
from surgeon.graph.snapshot import GraphDiff
from surgeon.graph.traced import TracedGraph
from surgeon.models.weight_files import read_program, sha256_of
from surgeon.moe.filling import mark_filling
from surgeon.passes.report import PassDiff
from surgeon.sites.ffn import mark_projection
from surgeon.surgery.diff import Diff
from surgeon.surgery.origin import Origin
from surgeon.surgery.record import RECORD, Record, parse, read_record, write_record
from surgeon.tracing.trace import TraceInfo, from_program, quiet

log = logging.getLogger("surgeon")

MODEL, DIFF = "model.pt2", "diff.json"


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

    The saved program is compared with the graph on the example inputs before anything is put in place.

    Args:
        inputs: example inputs. record: see `surgeon.surgery.record.make_record`. diff: what every pass changed.
        origin: its configuration and tokenizer are written beside the graph.

    Raises:
        SaveError: the directory has other content, there is no space or no permission, or the graph cannot be exported.
            Nothing half-written is left behind.
        PassError: there are no example inputs, which export needs.
    """
    directory = Path(directory)
    if inputs is None:
        raise PassError("A surgery is saved with its example inputs. Pass them to Pipeline.run as inputs=…")
    if directory.exists() and not directory.is_dir():
        raise SaveError(f"{directory} is a file. Give a directory for the result.")
    if directory.is_dir() and any(directory.iterdir()):
        if not overwrite:
            raise SaveError(f"{directory} exists and is not empty. Give another directory, or overwrite=True.")
        if not (directory / RECORD).exists():
            raise SaveError(f"{directory} is not empty and not a saved surgery. Give another directory.")
    program = _export(graph, *as_args_kwargs(inputs))
    with _written_whole(directory) as fresh:
        _check_space(graph, fresh)
        torch.export.save(program, fresh / MODEL)
        if origin.config is not None and hasattr(origin.config, "save_pretrained"):
            for part in (origin.config, origin.tokenizer, origin.processor):
                if part is not None:
                    part.save_pretrained(fresh)
        diffs = [asdict(pass_.graph) for pass_ in diff.passes]
        (fresh / DIFF).write_text(json.dumps(diffs), encoding="utf-8")
        write_record(replace(record, model_sha256=sha256_of([fresh / MODEL])), fresh)
    return directory


def load(directory: str | Path) -> TracedGraph:
    """Load a saved graph, in evaluation mode. `graph.meta["surgery"]` holds the record of what was done.

    Raises:
        LoadError: the directory is not a saved surgery, a file is damaged, or another version of surgeon wrote it.
    """
    directory = Path(directory)
    record = read_record(directory)
    model = directory / MODEL
    if not model.exists():
        raise LoadError(f"{directory} has no {MODEL}, so the saved surgery is incomplete. Save it again.")
    if sha256_of([model]) != record.model_sha256:
        raise LoadError(f"{model} is damaged or was changed: its hash differs from the one in {RECORD}. Save it again.")
    for name in record.output_modules:
        # Output classes register themselves when imported. Only transformers' own are ever imported by name.
        if name.startswith("transformers."):
            importlib.import_module(name)
    with quiet():
        graph = from_program(read_program(model), record.trace)
    graph.meta["surgery"] = record
    for path in record.projections:
        mark_projection(graph, path)
    for layer in record.experts:
        mark_filling(graph, layer.path, layer.filling)
    try:
        graph.meta["earlier_passes"] = load_diff(directory).passes
    except LoadError as error:
        # The model is intact; only the record of what was done to it is not.
        log.warning("%s Results that start from this surgery will not include its diff.", error)
    return graph


def load_inputs(directory: str | Path) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The example inputs of a saved surgery, as positional and keyword arguments.

    Raises:
        LoadError: as `load`, or the file has no example inputs.
    """
    read_record(Path(directory))
    program = read_program(Path(directory) / MODEL)
    if program.example_inputs is None:
        raise LoadError(f"{Path(directory) / MODEL} has no example inputs. Save the surgery again.")
    args, kwargs = program.example_inputs
    return tuple(args), dict(kwargs)


def load_diff(directory: str | Path) -> Diff:
    """The pass-by-pass difference of a saved surgery.

    Raises:
        LoadError: as `load`.
    """
    path = Path(directory) / DIFF
    reports = read_record(Path(directory)).passes
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise LoadError(f"{path} is damaged: {error}.") from error
    graphs = parse(list[GraphDiff], content, path)
    if len(graphs) != len(reports):
        raise LoadError(f"{path} is damaged: it has {len(graphs)} passes and {RECORD} has {len(reports)}.")
    return Diff(tuple(map(PassDiff, reports, graphs)))


def _export(graph: TracedGraph, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.export.ExportedProgram:
    args, kwargs = _at_least_two(graph, args, kwargs)
    training = graph.training
    info: TraceInfo = graph.meta["trace"]
    graph.train()
    try:
        with quiet(), torch.no_grad():
            program = torch.export.export(
                graph, args, kwargs, strict=False, dynamic_shapes=_dynamic_shapes(graph, args, kwargs, info)
            )
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


def _at_least_two(
    graph: TracedGraph, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The inputs with a batch of 1 doubled where the batch is dynamic, since export fixes dimensions of size 1."""
    info: TraceInfo = graph.meta["trace"]
    flat = iter(info.dynamic)

    def grow(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        _, dims = next(flat)
        return torch.cat([leaf, leaf]) if 0 in dims and leaf.shape[0] == 1 else leaf

    grown = {name: pytree.tree_map(grow, value) for name, value in named_arguments(graph, args, kwargs).items()}
    values = list(grown.items())
    return tuple(value for _, value in values[: len(args)]), dict(values[len(args) :])


def _dynamic_shapes(graph: TracedGraph, args: tuple[Any, ...], kwargs: dict[str, Any], info: TraceInfo) -> Any:
    """The dynamic dimensions of the trace, in the structure of the graph's arguments."""
    dynamic = iter(info.dynamic)

    def free(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return None
        _, dims = next(dynamic)
        return dict.fromkeys(dims, Dim.AUTO)

    return {name: pytree.tree_map(free, value) for name, value in named_arguments(graph, args, kwargs).items()}


def _check_space(graph: GraphModule, where: Path) -> None:
    tensors = {id(t): t for t in [*graph.parameters(), *graph.buffers()]}.values()
    needed = int(1.05 * sum(t.numel() * t.element_size() for t in tensors)) + (1 << 20)
    free = shutil.disk_usage(where).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"{needed / 1e6:.0f} MB needed, {free / 1e6:.0f} MB free")


@contextlib.contextmanager
def _written_whole(directory: Path) -> Iterator[Path]:
    """A new directory that replaces the target when everything is written, and is removed otherwise."""
    fresh: Path | None = None
    if directory.is_symlink():
        directory = directory.resolve()
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
        fresh.chmod(0o755)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield fresh
        old = fresh.with_name(f"{fresh.name}.old")
        if directory.exists():
            directory.rename(old)
        try:
            fresh.rename(directory)
        except OSError:
            if old.exists():
                old.rename(directory)
            raise
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise SaveError(f"Cannot write {directory}: {error.strerror or error}. Nothing was left behind.") from error
    except RuntimeError as error:
        # torch's own file writer reports a full disk in this way.
        raise SaveError(f"Cannot write {directory}: {error}. Nothing was left behind.") from error
    finally:
        if fresh is not None:
            shutil.rmtree(fresh, ignore_errors=True)

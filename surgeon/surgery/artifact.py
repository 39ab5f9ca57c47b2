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
import platform
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.export import Dim
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

import surgeon.kernels.dynamic_k  # noqa: F401  (registers the ops that the file holds)
from surgeon.errors import LoadError, SaveError
from surgeon.graph.agreement import relative_error, run, tolerance_for
from surgeon.graph.snapshot import GraphDiff, PassDiff
from surgeon.graph.traced import TracedGraph
from surgeon.models.weight_files import read_program, sha256_of
from surgeon.moe.module import compensated, find_moes, get_rule, get_tau
from surgeon.passes.report import PassReport
from surgeon.surgery.pipeline import Diff, Surgery, inputs_of
from surgeon.tracing.trace import TraceInfo, from_program, quiet

log = logging.getLogger("surgeon")

SCHEMA = 1
MODEL, RECORD, DIFF = "model.pt2", "surgery.json", "diff.json"


def save(surgery: Surgery, directory: str | Path, *, overwrite: bool = False) -> Path:
    """Write a surgery to `directory`, which must not exist or be empty unless `overwrite`.

    The saved program is compared with the graph on the example inputs before anything is put in place.

    Raises:
        SaveError: the directory has other content, there is no space or no permission, or the graph cannot be exported.
            Nothing half-written is left.
        PassError: the surgery has no example inputs, which export needs.
    """
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise SaveError(f"{directory} is a file. Give a directory for the result.")
    if directory.is_dir() and any(directory.iterdir()):
        if not overwrite:
            raise SaveError(f"{directory} exists and is not empty. Give another directory, or say to overwrite it.")
        if not (directory / RECORD).exists():
            raise SaveError(f"{directory} holds something else than a saved surgery, and is not overwritten.")
    program = _export(surgery)
    with _written_whole(directory) as fresh:
        _check_space(surgery.graph, fresh)
        torch.export.save(program, fresh / MODEL)
        if surgery.origin.config is not None and hasattr(surgery.origin.config, "save_pretrained"):
            for part in (surgery.origin.config, surgery.origin.tokenizer, surgery.origin.processor):
                if part is not None:
                    part.save_pretrained(fresh)
        diffs = [one.graph.to_json() for one in surgery.diff().passes]
        (fresh / DIFF).write_text(json.dumps(diffs), encoding="utf-8")
        (fresh / RECORD).write_text(json.dumps(_record(surgery, fresh / MODEL), indent=1), encoding="utf-8")
    return directory


def load(directory: str | Path) -> TracedGraph:
    """Load a saved graph, in evaluation mode. `graph.meta["surgery"]` holds the record of what was done.

    Raises:
        LoadError: no saved surgery, a damaged or truncated file, or one of a newer version.
    """
    directory = Path(directory)
    record = read_record(directory)
    model = directory / MODEL
    if not model.exists():
        raise LoadError(f"{directory} has no {MODEL}: the saved surgery is incomplete.")
    if sha256_of([model]) != record["model_sha256"]:
        raise LoadError(f"{model} is damaged or was changed: its hash is not the one that {RECORD} has. Save it again.")
    for name in record["output_modules"]:
        # Output classes register themselves when imported. Only transformers' own are ever imported by name.
        if name.startswith("transformers."):
            importlib.import_module(name)
    info = _trace_info(record, directory / RECORD)
    with quiet():
        graph = from_program(read_program(model), info)
    graph.meta["surgery"] = record
    try:
        graph.meta["earlier_passes"] = load_diff(directory).passes
    except LoadError as error:
        # The model is whole; only the record of what was done to it is not.
        log.warning("%s It is not carried on into surgeries that go on from here.", error)
    return graph


def _trace_info(record: dict[str, Any], path: Path) -> TraceInfo:
    try:
        trace = record["trace"]
        dynamic = tuple((name, tuple(dims)) for name, dims in trace["dynamic"])
        return TraceInfo(trace["form"], dynamic, tuple(trace["notes"]), trace["max_error"], trace["task"])
    except (KeyError, TypeError, ValueError) as error:
        raise LoadError(f"{path} is damaged: its record of the trace is incomplete ({error}).") from error


def load_inputs(directory: str | Path) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The example inputs of a saved surgery, as positional and keyword arguments.

    Raises:
        LoadError: as `load`; the file holds none.
    """
    read_record(Path(directory))
    program = read_program(Path(directory) / MODEL)
    if program.example_inputs is None:
        raise LoadError(f"{Path(directory) / MODEL} holds no example inputs. Save it again.")
    args, kwargs = program.example_inputs
    return tuple(args), dict(kwargs)


def load_diff(directory: str | Path) -> Diff:
    """The pass-by-pass difference of a saved surgery.

    Raises:
        LoadError: as `load`.
    """
    directory = Path(directory)
    record = read_record(directory)
    try:
        diffs = json.loads((directory / DIFF).read_text(encoding="utf-8"))
        return Diff(
            tuple(
                PassDiff(PassReport.from_json(report), GraphDiff.from_json(diff))
                for report, diff in zip(record["passes"], diffs, strict=True)
            )
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LoadError(f"{directory / DIFF} or {RECORD} is damaged: {error}") from error


def read_record(directory: Path) -> dict[str, Any]:
    """The content of `surgery.json`.

    Raises:
        LoadError: it is missing, not JSON, or of another schema.
    """
    path = directory / RECORD
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        schema = record["schema"]
    except FileNotFoundError:
        raise LoadError(f"{directory} is no saved surgery: it has no {RECORD}.") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LoadError(f"{path} is damaged: {error}") from error
    if schema != SCHEMA:
        raise LoadError(
            f"{path} has schema {schema}, this version reads schema {SCHEMA}. Use the version that wrote it."
        )
    missing = [key for key in ("model_sha256", "passes", "trace", "output_modules") if key not in record]
    if missing:
        raise LoadError(f"{path} is damaged: it has no {', '.join(missing)}.")
    return dict(record)


def _export(surgery: Surgery) -> torch.export.ExportedProgram:
    graph = surgery.graph
    args, kwargs = _at_least_two(graph, *inputs_of(surgery))
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
        expected, actual = run(graph, args, kwargs), run(exported, args, kwargs)
    finally:
        graph.train(training)
    error_size = relative_error(actual, expected)
    if not error_size <= tolerance_for(expected, graph):
        raise SaveError(f"The exported graph differs from the graph by {error_size:.1e} relative; nothing was saved.")
    return program


def _at_least_two(
    graph: TracedGraph, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The inputs with a batch of 1 doubled where batch is dynamic: export fixes a dimension of size 1."""
    info: TraceInfo = graph.meta["trace"]
    flat = iter(info.dynamic)

    def grow(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        _, dims = next(flat)
        return torch.cat([leaf, leaf]) if 0 in dims and leaf.shape[0] == 1 else leaf

    names = [name for name in graph.graph._codegen.pytree_info.orig_args if name != "self"]  # type: ignore[attr-defined]
    bound = {**dict(zip(names, args, strict=False)), **kwargs}
    grown = {name: pytree.tree_map(grow, bound[name]) for name in names}
    return tuple(grown[name] for name in names[: len(args)]), {name: grown[name] for name in names[len(args) :]}


def _dynamic_shapes(graph: TracedGraph, args: tuple[Any, ...], kwargs: dict[str, Any], info: TraceInfo) -> Any:
    """The dynamic dimensions of the trace, in the structure of a call of the graph."""
    dynamic = iter(info.dynamic)
    names = graph.graph._codegen.pytree_info.orig_args  # type: ignore[attr-defined]
    names = [name for name in names if name != "self"]
    bound = {**dict(zip(names, args, strict=False)), **kwargs}

    def free(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return None
        _, dims = next(dynamic)
        return dict.fromkeys(dims, Dim.AUTO)

    return {name: pytree.tree_map(free, bound[name]) for name in names}


def _record(surgery: Surgery, model: Path) -> dict[str, Any]:
    origin, info = surgery.origin, surgery.graph.meta["trace"]
    reports = [one.report for one in surgery.diff().passes]
    first = surgery.graph.meta.get("surgery")
    given = {"path": origin.path, "kind": origin.kind, "sha256": origin.sha256}
    graph = surgery.graph
    knobs = {"tau": get_tau(graph), "rule": get_rule(graph), "compensated": compensated(graph)}
    return {
        "schema": SCHEMA,
        "versions": {
            "surgeon": version("surgeon"),
            "torch": torch.__version__,
            "transformers": version("transformers"),
            "python": platform.python_version(),
        },
        # Of a surgery that goes on from a saved one: what that one started from.
        "input": given if first is None else first["input"],
        "recipe": {
            "passes": [{"name": report.name, "options": dict(report.options)} for report in reports],
            "seed": surgery.seed,
            "data": surgery.data,
            # Of a surgery that goes on from a saved one without data: of what that one was made with.
            "fingerprint": surgery.fingerprint or (None if first is None else first["recipe"].get("fingerprint")),
        },
        "trace": {
            "form": info.form,
            "dynamic": info.dynamic,
            "notes": info.notes,
            "max_error": info.max_error,
            "task": info.task,
        },
        "passes": [report.to_json() for report in reports],
        "experts": [
            {"path": site.path, "experts": site.experts, "form": site.form, "expert_shape": list(site.w1.shape[1:])}
            for site in find_moes(surgery.graph)
        ],
        **knobs,
        "quality": _quality(surgery, first, knobs),
        "output_modules": _output_modules(surgery.graph),
        "model_sha256": sha256_of([model]),
    }


def _quality(surgery: Surgery, first: dict[str, Any] | None, knobs: dict[str, Any]) -> dict[str, Any] | None:
    """Quality before and after; of a surgery that goes on from another one, before that one if the data is the same.

    Where it was not measured anew, "after" is None once the knobs have other values than it was measured at.
    """
    earlier = None if first is None else first.get("quality")
    if surgery.quality is None:
        same = first is None or all(first.get(name, []) == value for name, value in knobs.items())
        return earlier if earlier is None or same else {**earlier, "after": None}
    before, after, data = surgery.quality
    found = {"before": asdict(before), "after": asdict(after), "data": data}
    if earlier is not None and earlier["data"] == data:
        found["before"] = earlier["before"]
    return found


def _output_modules(graph: GraphModule) -> list[str]:
    """Modules whose classes appear in the graph's inputs and outputs and must be imported before loading."""
    info = graph.graph._codegen.pytree_info  # type: ignore[attr-defined]
    found: set[str] = set()
    stack = [info.in_spec, info.out_spec]
    while stack:
        spec = stack.pop()
        if spec is None:
            continue
        if isinstance(spec.type, type) and spec.type.__module__ not in ("builtins", "collections"):
            found.add(spec.type.__module__)
        stack.extend(spec.children())
    return sorted(found)


def _check_space(graph: GraphModule, where: Path) -> None:
    tensors = {id(t): t for t in [*graph.parameters(), *graph.buffers()]}.values()
    needed = int(1.05 * sum(t.numel() * t.element_size() for t in tensors)) + (1 << 20)
    free = shutil.disk_usage(where).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"{needed / 1e6:.0f} MB needed, {free / 1e6:.0f} MB free")


@contextlib.contextmanager
def _written_whole(directory: Path) -> Iterator[Path]:
    """A new directory beside the target that takes its place when everything is written, and vanishes otherwise."""
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
        # torch's own file writer reports a full disk so.
        raise SaveError(f"Cannot write {directory}: {error}. Nothing was left behind.") from error
    finally:
        if fresh is not None:
            shutil.rmtree(fresh, ignore_errors=True)

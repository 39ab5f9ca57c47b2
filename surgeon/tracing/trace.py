"""Trace a model into a `TracedGraph`, and check that the graph computes what the model computes.

The model is traced in training form where possible. Only that form contains dropout, and `graph.train()` can switch it
on for fine-tuning. Some models cannot be traced in training form, or stay random in evaluation (random depth, noise).
They are traced in evaluation form, and the graph's `TraceInfo.notes` says so.
"""

from __future__ import annotations

import contextlib
import io
import keyword
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from surgeon.errors import TraceError
from surgeon.graph.calls import as_args_kwargs
from surgeon.graph.traced import TracedGraph, fork, retie
from surgeon.models.tasks import task_of
from surgeon.tracing.check import brief, disagreement, is_random, run_reference
from surgeon.tracing.cleanup import changed_buffers, clean, use_first_names
from surgeon.tracing.dynamic_sizes import dynamic_dims, dynamic_shapes, tile_single_batch
from surgeon.tracing.setup import keep_modes, plain_signature, without_caches

log = logging.getLogger("surgeon")

Form = Literal["train", "eval"]


@dataclass(frozen=True)
class TraceInfo:
    """How a graph was traced.

    form: "train" if dropout can be switched on, "eval" if the graph only computes evaluation.
    dynamic: (name, dimensions that may change from call to call) of each input tensor, in the order of the inputs.
    notes: what the user should know, such as a dimension that is fixed, in full sentences.
    max_error: the largest difference from the model on the example inputs, relative to its largest output. None if the
        graph was not made from a model.
    task: the model's task, one of `surgeon.models.tasks.TASKS`, or None if its class does not tell.
    """

    form: Form
    dynamic: tuple[tuple[str, tuple[int, ...]], ...] = ()
    notes: tuple[str, ...] = ()
    max_error: float | None = None
    task: str | None = None


def trace(model: nn.Module, inputs: Any) -> TracedGraph:
    """Trace `model` into a graph of ATen ops that shares the model's parameters.

    Args:
        model: any module that `torch.export` can trace. It is not changed, and its training mode is restored.
        inputs: example inputs: a tensor, a tuple of positional inputs, or a dict of keyword inputs. Batch and sequence
            dimensions become dynamic. All others keep the example's size.

    Returns:
        The graph. It is called as the model is called in the example, and is in the model's training mode.

    Raises:
        TraceError: the model cannot be traced, or no trace agrees with it. The message says what was tried.
    """
    args, kwargs = as_args_kwargs(inputs)
    if isinstance(model, GraphModule) and is_aten_graph(model):
        return adopt(model)
    _refuse_keywords(model)
    model_training = model.training
    asks_for_cache = bool(kwargs.get("use_cache"))
    if asks_for_cache:
        kwargs = {**kwargs, "use_cache": False}
    with quiet(), without_caches(model), keep_modes(model):
        model.eval()
        args, kwargs, tiled = tile_single_batch(model, args, kwargs)
        reference = run_reference(model, args, kwargs)
        failures: list[_Failure] = []
        for form, front_end in _attempts(model):
            try:
                graph = _export(model, args, kwargs, form, front_end)
            except Exception as error:
                failures.append(_Failure(form, front_end.__name__.strip("_"), brief(error)))
                log.debug("trace attempt failed", exc_info=True)
                continue
            problem, error_size = disagreement(graph, reference, model, args, kwargs)
            if problem is None:
                notes = _notes(graph, form, failures, tiled)
                if asks_for_cache:
                    notes = (*notes, "use_cache=True was ignored, because a graph keeps no key-value cache.")
                graph.meta["trace"] = TraceInfo(form, dynamic_dims(graph), notes, error_size, task_of(model))
                graph.train(model_training)
                return graph
            failures.append(_Failure(form, front_end.__name__.strip("_"), problem))
    raise TraceError(
        f"{type(model).__name__} cannot be traced into a graph with the same outputs. Attempts:\n"
        + "\n".join(f"  - {failure}" for failure in _distinct(failures))
        + "\nTry other example inputs, or trace a smaller part of the model."
    )


def _refuse_keywords(model: nn.Module) -> None:
    """Refuse names that are Python keywords: torch.fx writes a graph as Python code, where `self.w.in` is invalid."""
    names = [name for name, _ in [*model.named_parameters(), *model.named_buffers()]]
    for name in names:
        word = next((part for part in name.split(".") if keyword.iskeyword(part)), None)
        if word is not None:
            raise TraceError(
                f"The name '{name}' contains the Python keyword '{word}', which torch.fx does not allow. Rename the "
                "parameter or buffer."
            )


@dataclass(frozen=True)
class _Failure:
    """A failed attempt to trace: the form, the front end and the reason."""

    form: Form
    front_end: str
    reason: str


def _distinct(failures: list[_Failure]) -> list[str]:
    """List every reason once, after the attempts that failed for it."""
    attempts: dict[str, list[str]] = {}
    for failure in failures:
        attempts.setdefault(failure.reason, []).append(f"{failure.form} form, {failure.front_end}")
    return [f"{' and '.join(made)}: {reason}" for reason, made in attempts.items()]


def adopt(graph: GraphModule) -> TracedGraph:
    """Make a `TracedGraph` from a graph module of ATen ops (from `torch.export`). The two share their parameters."""
    if isinstance(graph, TracedGraph):
        return fork(graph)
    traced = fork(graph)
    clean(traced)
    if "trace" not in traced.meta:
        traced.meta["trace"] = TraceInfo(_form_of(traced), dynamic_dims(traced))
    return traced


def from_program(program: ExportedProgram, info: TraceInfo | None = None) -> TracedGraph:
    """Return the graph of an exported program, in evaluation mode. Tied parameters are one object again.

    info: how the program was traced, if that is known. Otherwise the form is derived from the graph.
    """
    graph = program.module(check_guards=False)
    assert isinstance(graph, GraphModule)
    retie(graph)
    if info is not None:
        graph.meta["trace"] = info
    traced = adopt(graph)
    return traced.eval()


def is_aten_graph(graph: GraphModule) -> bool:
    """Whether the graph consists of ATen ops with recorded shapes, as `torch.export` makes them."""
    if isinstance(graph, TracedGraph):  # it may have nothing but experts
        return True
    calls = [node for node in graph.graph.nodes if node.op == "call_function"]
    return (
        bool(calls)
        and all(node.op != "call_method" for node in graph.graph.nodes)
        and any(isinstance(node.target, torch._ops.OpOverload) and "val" in node.meta for node in calls)
    )


# --- exporting --------------------------------------------------------------------------------------------------------


FrontEnd = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], ExportedProgram]


def _dynamic(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ExportedProgram:
    with plain_signature(model, args, kwargs):
        shapes = dynamic_shapes(model, args, kwargs)
        return torch.export.export(model, args, kwargs, strict=False, dynamic_shapes=shapes)


def _static(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ExportedProgram:
    return torch.export.export(model, args, kwargs, strict=False)


def _transformers(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ExportedProgram:
    from transformers import exporters

    exporter: Any = exporters.DynamoExporter()  # type: ignore[attr-defined, no-untyped-call]
    exported = exporter.export(model, dict(kwargs), exporters.DynamoConfig(dynamic=True))  # type: ignore[attr-defined]
    program = getattr(exported, "program", exported)
    assert isinstance(program, ExportedProgram)
    return program


def _attempts(model: nn.Module) -> Iterator[tuple[Form, FrontEnd]]:
    """Yield the ways to trace a model, the best first."""
    yield "train", _dynamic
    yield "eval", _dynamic
    if any(base.__name__ == "PreTrainedModel" for base in type(model).__mro__):
        yield "eval", _transformers
    yield "train", _static
    yield "eval", _static


def _export(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], form: Form, front_end: FrontEnd
) -> TracedGraph:
    model.train(form == "train")
    # A failed export leaves attributes on its input tensors that make the next export fail, so give it copies.
    args, kwargs = pytree.tree_map_only(Tensor, torch.clone, (args, kwargs))
    try:
        # With gradients off, the model's own no_grad regions (rotary embeddings) do not become separate graphs.
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            exported = front_end(model, args, kwargs).module(check_guards=False)
    finally:
        model.eval()
    assert isinstance(exported, GraphModule)
    graph = fork(exported)
    use_first_names(graph, model)
    clean(graph)
    graph.meta["trace"] = TraceInfo(form)
    if form == "train" and (changed := changed_buffers(graph)):
        raise TraceError(f"the model changes its own state when it runs ({changed[0]})")
    if form == "train" and (random := [node for node in graph.eval().graph.nodes if is_random(node)]):
        raise TraceError(f"the model stays random in evaluation ({random[0].target})")
    return graph.train(form == "train")


def _form_of(graph: GraphModule) -> Form:
    """Return the form of a graph: training form if any node is set to its training value."""
    before = TracedGraph.eval(fork(graph))
    changed = any(
        a.args != b.args and a.op == "call_function" and b.meta.keys() - a.meta.keys()
        for a, b in zip(graph.graph.nodes, before.graph.nodes, strict=True)
    )
    return "train" if changed else "eval"


def _notes(graph: TracedGraph, form: Form, failures: list[_Failure], tiled: bool) -> tuple[str, ...]:
    notes = []
    if form == "eval":
        why = next((failure.reason for failure in failures if failure.form == "train"), "")
        notes.append(
            "The graph is in evaluation form, so dropout and other random training behaviour stay off in fine-tuning. "
            f"The model cannot be traced in training form ({why})."
        )
    fixed = [name for name, dims in dynamic_dims(graph) if 0 not in dims]
    if fixed:
        notes.append(f"Batch size is fixed at the example's size for: {', '.join(fixed)}.")
    if tiled:
        notes.append("The example batch of 1 was doubled, because a dimension of size 1 would be traced as fixed.")
    return tuple(notes)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the warnings of an export out of the user's terminal. The notes and errors report what matters."""
    loggers = [
        logging.getLogger(name)
        for name in ("torch.export", "torch._export", "torch.fx", "torch._dynamo", "transformers.exporters")
    ]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        # Export prints the partial graph to stderr when a model branches on its data.
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)

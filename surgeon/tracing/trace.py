"""Trace a model into a `TracedGraph`, and check that the graph computes what the model computes.

The model is traced in training form where possible. Only that form contains dropout, and `graph.train()` can switch it
on for fine-tuning. Some models cannot be traced in training form, or stay random in evaluation (random depth, noise).
They are traced in evaluation form, and the graph's `TraceInfo.notes` says so.
"""

from __future__ import annotations

import keyword
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from surgeon.display.choose import shows_progress
from surgeon.errors import TraceError
from surgeon.graph.calls import as_args_kwargs, check_calls, flat_inputs
from surgeon.graph.given import is_aten_graph
from surgeon.graph.sizes import Sizes
from surgeon.graph.traced import TracedGraph, fork, retie
from surgeon.models.hugging_face import is_pretrained
from surgeon.models.readiness import check_ready
from surgeon.models.tasks import task_of
from surgeon.progress import ShowProgress
from surgeon.tracing.check import brief, disagreement, is_random, narrow_sizes, run_reference
from surgeon.tracing.cleanup import changed_buffers, clean, copy_written_inputs, use_first_names
from surgeon.tracing.declared import declared_sizes
from surgeon.tracing.dynamic_sizes import dynamic_shapes, fixed_dims, tile_single_batch
from surgeon.tracing.embeddings import sparse_notes
from surgeon.tracing.narrowing import free_dims
from surgeon.tracing.optional import with_optional_inputs
from surgeon.tracing.quiet import quiet
from surgeon.tracing.setup import copied, plain_forward, unchanged, without_caches
from surgeon.tracing.telling import Steps

log = logging.getLogger("surgeon")

Form = Literal["train", "eval"]


@dataclass(frozen=True)
class TraceInfo:
    """How a graph was traced.

    form: "train" if dropout can be switched on, "eval" if the graph only computes evaluation.
    dynamic: (name, dimensions that may change from call to call) of each input tensor, in the order of the inputs.
    sizes: the sizes the graph holds for, as `surgeon.graph.sizes.Sizes` writes them. Calls with others are refused.
    notes: what the user should know, such as a dimension that is fixed, in full sentences.
    max_error: the largest difference from the model on the example inputs, relative to its largest output. None if the
        graph was not made from a model.
    task: the model's task, one of `surgeon.models.tasks.TASKS`, or None if its class does not tell.
    """

    form: Form
    dynamic: tuple[tuple[str, tuple[int, ...]], ...] = ()
    sizes: str = ""
    notes: tuple[str, ...] = ()
    max_error: float | None = None
    task: str | None = None


@shows_progress
def trace(model: nn.Module, inputs: Any, *, progress: ShowProgress = None) -> TracedGraph:
    """Trace `model` into a graph of ATen ops that shares the model's parameters.

    Args:
        model: any module that `torch.export` can trace. It is not changed, and its training mode is restored.
        inputs: example inputs: a tensor, a tuple of positional inputs, or a dict of keyword inputs. Batch and sequence
            dimensions become dynamic. All others keep the example's size.
        progress: True shows it, a function is called with each `Progress`.

    Returns:
        The graph. It is called as the model is called in the example, and is in the model's training mode.

    Raises:
        TraceError: the model cannot be traced, or no trace agrees with it. The message says what was tried.
    """
    args, kwargs = as_args_kwargs(inputs)
    if isinstance(model, GraphModule) and is_aten_graph(model):
        return adopt(model)
    if isinstance(model, GraphModule) and "eval" in vars(model):
        # torch.export lets its modules refuse to change their mode.
        model = GraphModule(model, model.graph)
    check_ready(model)
    _refuse_keywords(model)
    if (odd := next((leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Enum)), None)) is not None:
        raise TraceError(
            f"The example inputs hold {odd}. A graph freezes such a value, and later calls could not be compared with "
            "it. Give the model a number or a text, or fix the value in a module around it."
        )
    model_training = model.training
    asks_for_cache = bool(kwargs.get("use_cache"))
    if asks_for_cache:
        kwargs = {**kwargs, "use_cache": False}
    steps = Steps(type(model).__name__, progress)
    attempts: list[_Attempt] = []
    failures: list[_Failure] = []
    with quiet(), unchanged(model), without_caches(model):
        steps.exporting()
        model.eval()
        args, kwargs, tiled = tile_single_batch(model, args, kwargs)
        reference, written = run_reference(model, args, kwargs)
        for form, front_end in _attempts(model):
            if attempts and front_end is _static:
                break
            made = _attempt(model, args, kwargs, reference, form, front_end, steps)
            if isinstance(made, _Failure):
                failures.append(made)
                continue
            attempts.append(made)
            if not made.faults:
                break
        if attempts:
            best = max(attempts, key=lambda attempt: len(attempt.sizes.axes))  # the first with the most free sizes
            sizes, needed = with_optional_inputs(best.graph, best.sizes, model, best.leaves, reference, steps)
            steps.end()
    if not attempts:
        raise TraceError(
            f"{type(model).__name__} cannot be traced into a graph with the same outputs. Attempts:\n"
            + "\n".join(f"  - {failure}" for failure in _distinct(failures))
            + "\nTry other example inputs, or trace a smaller part of the model."
        )
    graph, notes = best.graph, [*_notes(model, best, failures, tiled), *needed]
    if written:
        notes.append(
            f"The model writes into its inputs ({', '.join(written)}). The graph leaves the caller's inputs as they "
            "are, and returns what the model returns."
        )
    if asks_for_cache:
        notes.append("use_cache=True was ignored, because a graph keeps no key-value cache.")
        sizes = sizes.without_check("use_cache")
    graph.meta["trace"] = TraceInfo(
        best.form, tuple(free_dims(sizes)), str(sizes), tuple(notes), best.error, task_of(model)
    )
    check_calls(graph, sizes)
    graph.train(model_training)
    return graph


def sketch(model: nn.Module, inputs: Any) -> TracedGraph:
    """Trace `model` without any comparison, to look for its layers. The graph is not to be run.

    Raises:
        TraceError: the model cannot be traced.
    """
    args, kwargs = as_args_kwargs(inputs)
    check_ready(model)
    _refuse_keywords(model)
    failures: list[_Failure] = []
    with quiet(), unchanged(model), without_caches(model):
        args, kwargs, _ = tile_single_batch(model.eval(), args, kwargs)
        for form, front_end in _attempts(model):
            try:
                with unchanged(model):
                    return _export(model, args, kwargs, form, front_end)
            except Exception as error:
                failures.append(_Failure(form, front_end.__name__.strip("_"), brief(error)))
    raise TraceError(
        f"{type(model).__name__} cannot be traced. Attempts:\n"
        + "\n".join(f"  - {failure}" for failure in _distinct(failures))
    )


@dataclass(frozen=True)
class _Attempt:
    """A graph that agrees with the model on the example inputs, and the sizes at which it does.

    error: on the example inputs. faults: at other sizes, in sentences. leaves: the flat example inputs.
    """

    graph: TracedGraph
    form: Form
    error: float
    sizes: Sizes
    faults: list[str]
    leaves: list[Any]


def _attempt(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    reference: Any,
    form: Form,
    front_end: FrontEnd,
    steps: Steps,
) -> _Attempt | _Failure:
    name = front_end.__name__.strip("_")
    steps.exporting()
    try:
        with unchanged(model):
            graph = _export(model, args, kwargs, form, front_end)
    except Exception as error:
        log.debug("trace attempt failed", exc_info=True)
        return _Failure(form, name, brief(error))
    problem, error_size = disagreement(graph, reference, model, args, kwargs)
    if problem is not None:
        return _Failure(form, name, problem)
    sizes, faults = narrow_sizes(graph, model, args, kwargs, steps)
    return _Attempt(graph, form, error_size, sizes, faults, flat_inputs(graph, args, kwargs))


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


def adopt(graph: GraphModule, guards: Sequence[str] = ()) -> TracedGraph:
    """Make a `TracedGraph` from a graph module of ATen ops (from `torch.export`). The two share their parameters.

    guards: of the program that the graph comes from, see `declared_sizes`.
    """
    if isinstance(graph, TracedGraph):
        return fork(graph)
    traced = fork(graph)
    clean(traced)
    copy_written_inputs(traced)
    if "trace" not in traced.meta:
        sizes = declared_sizes(traced, guards)
        traced.meta["trace"] = TraceInfo(_form_of(traced), tuple(free_dims(sizes)), str(sizes))
    check_calls(traced, Sizes.parse(traced.meta["trace"].sizes))
    return traced


def from_program(program: ExportedProgram, info: TraceInfo | None = None) -> TracedGraph:
    """Return the graph of an exported program, in evaluation mode. Tied parameters are one object again.

    info: how the program was traced, if that is known. Otherwise the form is derived from the graph.

    Raises:
        ValueError: `info` has sizes that cannot be read or are not those of this program.
    """
    graph = program.module(check_guards=False)
    assert isinstance(graph, GraphModule)
    retie(graph)
    if info is not None:
        graph.meta["trace"] = info
    return adopt(graph, program._guards_code).eval()


def class_task(model: nn.Module) -> str | None:
    """Return the task of a model's class, or of the class that a graph was traced from; None if it does not tell."""
    info: Any = model.meta.get("trace") if isinstance(model, GraphModule) else None
    if isinstance(info, TraceInfo):
        return info.task
    return None if isinstance(model, GraphModule) else task_of(model)


# --- exporting --------------------------------------------------------------------------------------------------------


FrontEnd = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], ExportedProgram]


def _dynamic(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ExportedProgram:
    with plain_forward(model, args, kwargs):
        shapes = dynamic_shapes(model, args, kwargs)
        return torch.export.export(model, args, kwargs, strict=False, dynamic_shapes=shapes)


def _static(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ExportedProgram:
    with plain_forward(model, args, kwargs):
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
    if is_pretrained(model):
        yield "eval", _transformers
    yield "train", _static
    yield "eval", _static


def _export(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], form: Form, front_end: FrontEnd
) -> TracedGraph:
    model.train(form == "train")
    # A failed export leaves attributes on its input tensors that make the next export fail, so give it copies.
    args, kwargs = copied((args, kwargs))
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
    copy_written_inputs(graph)
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


def _notes(model: nn.Module, made: _Attempt, failures: list[_Failure], tiled: bool) -> Iterator[str]:
    if made.form == "eval":
        why = next((failure.reason for failure in failures if failure.form == "train"), "")
        yield (
            "The graph is in evaluation form, so dropout and other random training behaviour stay off in fine-tuning. "
            f"The model cannot be traced in training form ({why})."
        )
    dims = dict(free_dims(made.sizes))
    if fixed := [name for name, free in dims.items() if 0 not in free]:
        yield f"Batch size is fixed at the example's size for: {', '.join(fixed)}."
    if fixed := [place for place in fixed_dims(made.sizes, made.leaves) if "[0]" not in place]:
        yield f"The graph takes inputs of the example's length only: {', '.join(fixed)}."
    if loose := [given.name for given in made.sizes.inputs if given.shape is None and not given.checked]:
        yield f"The values of {', '.join(loose)} are frozen in the graph, and not checked: they are of other classes."
    yield from made.faults
    if tiled:
        yield "The example batch of 1 was doubled, because a dimension of size 1 would be traced as fixed."
    # A mask, or ids that a mask can be made from. Without one nothing is padded.
    masked = any(isinstance(leaf, Tensor) and not leaf.is_floating_point() for leaf in made.leaves)
    if masked and any(isinstance(module, nn.TransformerEncoder) for module in model.modules()):
        yield (
            "nn.TransformerEncoder sets padded positions to zero when it runs without gradients. The graph computes "
            "what it computes with gradients, so padded positions differ."
        )
    if getattr(model, "peft_config", None):
        yield (
            "The model has PEFT adapters, which stay as they are. Layers that have one are no feed-forward layers. To "
            "convert these too, merge the adapters first: model.merge_and_unload()."
        )
    yield from sparse_notes(made.graph)

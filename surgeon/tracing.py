"""Trace a model into a `TracedGraph`, and prove that the graph computes what the model computes.

The graph is taken in training form where possible: only that form records dropout, and `graph.train()` can then switch
it on for fine-tuning. A model whose training form cannot be traced, or does not turn back into its evaluation form
(random depth, noise), is traced in evaluation form instead, and the graph's `TraceInfo.notes` says so.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import keyword
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from surgeon.agreement import relative_error, run, tolerance_for, without_none
from surgeon.errors import TraceError
from surgeon.export_cleanup import changed_buffers, clean, use_first_names
from surgeon.graph import TracedGraph, fork, is_switched_off, retie
from surgeon.inputs import as_args_kwargs
from surgeon.losses import task_of

log = logging.getLogger("surgeon")

Form = Literal["train", "eval"]


@dataclass(frozen=True)
class TraceInfo:
    """How a graph was traced.

    form: "train" if dropout can be switched on, "eval" if the graph only knows evaluation.
    dynamic: for each input tensor, by its place in the inputs, the dimensions that may change from call to call.
    notes: what the user should know (a form or a dimension that could not be kept), one sentence each.
    max_error: largest difference from the model on the example inputs, relative to its largest output; None if the
        graph was not made from a model.
    task: what the model was made for, one of `surgeon.losses.TASKS`; None if its class does not tell.
    """

    form: Form
    dynamic: tuple[tuple[str, tuple[int, ...]], ...] = ()
    notes: tuple[str, ...] = ()
    max_error: float | None = None
    task: str | None = None


def trace(model: nn.Module, inputs: Any) -> TracedGraph:
    """Trace `model` into a graph of ATen ops that shares the model's parameters.

    Args:
        model: any module that `torch.export` can trace. It is left as it was, training mode included.
        inputs: example inputs: a tensor, a tuple of positional inputs, or a dict of keyword inputs. Batch and sequence
            dimensions become dynamic, all others keep the example's size.

    Returns:
        The graph, called as the model is called in the example, in the model's own training mode.

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
    with quiet(), _without_caches(model), _keep_modes(model):
        model.eval()
        args, kwargs, tiled = _tile_single_batch(model, args, kwargs)
        reference = _run_reference(model, args, kwargs)
        failures: list[str] = []
        for form, front_end in _attempts(model):
            try:
                graph = _export(model, args, kwargs, form, front_end)
            except Exception as error:
                failures.append(f"{form} form, {front_end.__name__.strip('_')}: {_first_line(error)}")
                log.debug("trace attempt failed", exc_info=True)
                continue
            problem, error_size = _disagreement(graph, reference, model, args, kwargs)
            if problem is None:
                notes = _notes(graph, form, failures, tiled)
                if asks_for_cache:
                    notes = (*notes, "use_cache was taken for False: a graph keeps no key-value cache.")
                graph.meta["trace"] = TraceInfo(form, _dynamic_dims(graph), notes, error_size, task_of(model))
                graph.train(model_training)
                return graph
            failures.append(f"{form} form, {front_end.__name__.strip('_')}: {problem}")
    raise TraceError(
        f"{type(model).__name__} cannot be traced into a graph that computes what it computes. Tried:\n"
        + "\n".join(f"  - {failure}" for failure in _distinct(failures))
        + "\nOther example inputs, or a smaller part of the model, may trace."
    )


def _refuse_keywords(model: nn.Module) -> None:
    """torch.fx writes a graph as Python, which cannot say `self.w.in`."""
    names = [name for name, _ in [*model.named_parameters(), *model.named_buffers()]]
    for name in names:
        word = next((part for part in name.split(".") if keyword.iskeyword(part)), None)
        if word is not None:
            raise TraceError(f"'{name}': torch.fx cannot write a name that holds Python's keyword '{word}'. Rename it.")


def _distinct(failures: list[str]) -> list[str]:
    """Every reason once, behind all the attempts that met it."""
    attempts: dict[str, list[str]] = {}
    for failure in failures:
        attempt, _, reason = failure.partition(": ")
        attempts.setdefault(reason, []).append(attempt)
    return [f"{' and '.join(made)}: {reason}" for reason, made in attempts.items()]


def adopt(graph: GraphModule) -> TracedGraph:
    """A `TracedGraph` of a graph module that holds ATen ops already (from `torch.export`), sharing its parameters."""
    if isinstance(graph, TracedGraph):
        return fork(graph)
    traced = fork(graph)
    clean(traced)
    if "trace" not in traced.meta:
        traced.meta["trace"] = TraceInfo(_form_of(traced), _dynamic_dims(traced))
    return traced


def from_program(program: ExportedProgram, info: TraceInfo | None = None) -> TracedGraph:
    """The graph of an exported program, in evaluation mode. Tied parameters are one object again.

    info: how it was traced, if that is known; otherwise its form is read off the graph.
    """
    graph = program.module(check_guards=False)
    assert isinstance(graph, GraphModule)
    retie(graph)
    if info is not None:
        graph.meta["trace"] = info
    traced = adopt(graph)
    return traced.eval()


def is_aten_graph(graph: GraphModule) -> bool:
    """Whether the graph holds ATen ops with recorded shapes, as `torch.export` makes them."""
    calls = [node for node in graph.graph.nodes if node.op == "call_function"]
    return (
        bool(calls)
        and all(node.op != "call_method" for node in graph.graph.nodes)
        and any(isinstance(node.target, torch._ops.OpOverload) and "val" in node.meta for node in calls)
    )


# --------------------------------------------------------------------------------------------- exporting


FrontEnd = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], ExportedProgram]


def _dynamic(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ExportedProgram:
    with _plain_signature(model, args, kwargs):
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
    """Ways to trace, best first."""
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
    # A failed export leaves marks on the very tensors it was given, which make the next one fail.
    args, kwargs = _map_tensors(torch.clone, args, kwargs)
    try:
        # Without gradients a model's own no_grad regions (rotary embeddings) stay part of the one graph.
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
        raise TraceError(f"it changes its own state when it runs ({changed[0]})")
    if form == "train" and (random := [node for node in graph.eval().graph.nodes if _is_random(node)]):
        raise TraceError(f"it stays random in evaluation ({random[0].target})")
    return graph.train(form == "train")


def dynamic_shapes(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The `dynamic_shapes` of an export: batch and sequence dimensions are free, all others fixed.

    The first dimension of every tensor is free; so is the second of token ids, masks and other integer or boolean
    tensors, and of three-dimensional float tensors (embeddings). Export fixes those that the model needs fixed.
    """

    def free(value: object) -> dict[int, Any] | None:
        if not isinstance(value, Tensor):
            return None
        sequence = value.dim() >= 2 and (not value.is_floating_point() or value.dim() == 3)
        return {dim: Dim.AUTO for dim in range(min(value.dim(), 2 if sequence else 1)) if value.shape[dim] > 1}

    bound = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    return {name: pytree.tree_map(free, value) for name, value in bound.items()}


def _form_of(graph: GraphModule) -> Form:
    """Training form if any node is set to what only training does."""
    before = TracedGraph.eval(fork(graph))
    changed = any(
        a.args != b.args and a.op == "call_function" and b.meta.keys() - a.meta.keys()
        for a, b in zip(graph.graph.nodes, before.graph.nodes, strict=True)
    )
    return "train" if changed else "eval"


# --------------------------------------------------------------------------------------------- agreement


def _run_reference(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    try:
        return run(model, args, kwargs)
    except Exception as error:
        raise TraceError(
            f"{type(model).__name__} fails on the example inputs, before any tracing: {_first_line(error)}"
        ) from error


def _disagreement(
    graph: TracedGraph, reference: Any, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[str | None, float]:
    """Why the graph is not the model (None if it is), and the error on the example inputs."""
    graph.eval()
    try:
        error = relative_error(run(graph, args, kwargs), reference)
    except Exception as failure:
        return f"the graph fails where the model runs: {_first_line(failure)}", float("inf")
    tolerance = tolerance_for(reference, model)
    if not error <= tolerance:
        random = sorted({str(node.target) for node in graph.graph.nodes if _is_random(node)})
        hint = f" (random ops: {', '.join(random)})" if random else ""
        return f"the graph's output differs from the model's by {error:.1e} relative{hint}", error
    grown = _grow_batch(graph, args, kwargs)
    if grown is None:
        return None, error
    try:
        expected = run(model, *grown)
    except Exception:
        return None, error  # the model itself does not take another batch size
    try:
        other = relative_error(run(graph, *grown), expected)
    except Exception as failure:
        return f"the graph fails at another batch size: {_first_line(failure)}", error
    if not other <= tolerance:
        return f"the graph's output differs from the model's by {other:.1e} relative at another batch size", error
    return None, error


def _is_random(node: Node) -> bool:
    """Whether the node draws random numbers as it stands, which a dropout that is switched off does not."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded not in target.tags:
        return False
    return not is_switched_off(node)


def _tile_single_batch(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any], bool]:
    """Inputs of batch 1, doubled: export treats a dimension of size 1 as fixed. Unchanged if the model refuses."""
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.dim() > 0]
    if not tensors or any(tensor.shape[0] != 1 for tensor in tensors):
        return args, kwargs, False
    tiled_args, tiled_kwargs = _map_tensors(lambda tensor: torch.cat([tensor, tensor]), args, kwargs)
    try:
        one, two = run(model, args, kwargs), run(model, tiled_args, tiled_kwargs)
    except Exception:
        return args, kwargs, False
    grew = any(
        isinstance(a, Tensor) and isinstance(b, Tensor) and a.dim() > 0 and a.shape[0] * 2 == b.shape[0]
        for a, b in zip(pytree.tree_leaves(without_none(one)), pytree.tree_leaves(without_none(two)), strict=False)
    )
    return (tiled_args, tiled_kwargs, True) if grew else (args, kwargs, False)


def _grow_batch(
    graph: TracedGraph, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The inputs with one more row in every tensor whose first dimension is dynamic; None if none is."""
    shapes = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
    leaves = pytree.tree_leaves((args, kwargs))
    if len(shapes) != len(leaves):
        return None
    grows = [isinstance(shape, Tensor) and shape.dim() > 0 and not _is_fixed(shape.shape[0]) for shape in shapes]
    rows = {leaf.shape[0] for leaf, grow in zip(leaves, grows, strict=True) if grow}
    if len(rows) != 1:
        return None
    it = iter(grows)
    return _map_leaves(lambda leaf: torch.cat([leaf, leaf[:1]]) if next(it) else leaf, args, kwargs)


def _map_tensors(
    change: Callable[[Tensor], Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return _map_leaves(lambda leaf: change(leaf) if isinstance(leaf, Tensor) and leaf.dim() > 0 else leaf, args, kwargs)


def _map_leaves(
    change: Callable[[Any], Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    changed = pytree.tree_map(change, (args, kwargs))
    return changed[0], changed[1]


def _is_fixed(size: int | torch.SymInt) -> bool:
    return isinstance(size, int) or not size.node.expr.free_symbols


def _dynamic_dims(graph: GraphModule) -> tuple[tuple[str, tuple[int, ...]], ...]:
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    return tuple(
        (node.name, tuple(dim for dim, size in enumerate(value.shape) if not _is_fixed(size)))
        for node in placeholders
        if isinstance(value := node.meta.get("val"), Tensor)
    )


def _notes(graph: TracedGraph, form: Form, failures: list[str], tiled: bool) -> tuple[str, ...]:
    notes = []
    if form == "eval":
        why = next((failure for failure in failures if failure.startswith("train")), "")
        notes.append(
            "Traced in evaluation form: dropout and other training-time randomness are off during fine-tuning. "
            f"The training form was refused ({why.partition(': ')[2]})."
        )
    fixed = [name for name, dims in _dynamic_dims(graph) if 0 not in dims]
    if fixed:
        notes.append(f"Batch size is fixed at the example's for: {', '.join(fixed)}.")
    if tiled:
        notes.append("The example batch of 1 was doubled for tracing, since a dimension of 1 would be fixed.")
    return tuple(notes)


# --------------------------------------------------------------------------------------------- surroundings


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep export's own warnings out of the user's terminal; what matters of them is in the notes and errors."""
    loggers = [
        logging.getLogger(name)
        for name in ("torch.export", "torch._export", "torch.fx", "torch._dynamo", "transformers.exporters")
    ]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        # Export prints the graph it got so far when a model branches on its data.
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def _plain_signature(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
    """Let `forward` name every input it is given: export cannot say which dimensions of a `**kwargs` are dynamic."""
    signature = inspect.signature(model.forward)
    bound = signature.bind(*args, **kwargs).arguments
    kinds = {signature.parameters[name].kind for name in bound}
    if not kinds & {inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL}:
        yield
        return
    original, own = model.forward, "forward" in vars(model)
    names = [name for name in bound if signature.parameters[name].kind is not inspect.Parameter.VAR_POSITIONAL]
    names = [*names, *(f"input_{index}" for index in range(len(args)))][: len(args)]
    parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in (*names, *kwargs)]

    def forward(*given: Any, **named: Any) -> Any:
        return original(*given, **named)

    forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    model.forward = forward
    try:
        yield
    finally:
        if own:
            model.forward = original
        else:
            del model.forward


@contextlib.contextmanager
def _keep_modes(model: nn.Module) -> Iterator[None]:
    """Restore every module's own training flag: a user may have frozen some of them."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def _without_caches(model: nn.Module) -> Iterator[None]:
    """Switch key-value caches off in every config of the model; encoder-decoders hold several."""
    found: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    configs = {id(config): config for config in found if hasattr(config, "use_cache")}
    saved = [(config, config.use_cache) for config in configs.values()]
    for config, _ in saved:
        config.use_cache = False
    try:
        yield
    finally:
        for config, value in saved:
            config.use_cache = value


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:200]}" if text else type(error).__name__

"""Trace a model into a `TracedGraph`, and prove that the graph computes what the model computes.

The graph is taken in training form where possible: only that form records dropout, and `graph.train()` can then switch
it on for fine-tuning. A model whose training form cannot be traced, or does not turn back into its evaluation form
(random depth, noise), is traced in evaluation form instead, and the graph's `TraceInfo.notes` says so.
"""

from __future__ import annotations

import contextlib
import inspect
import keyword
import logging
import operator
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from surgeon.errors import TraceError
from surgeon.graph import TracedGraph, aten, attribute, fork, is_call, nested_graphs, retie, tensor_of
from surgeon.inputs import as_args_kwargs
from surgeon.linear import VIEWS
from surgeon.losses import task_of

log = logging.getLogger("surgeon")

# Largest accepted difference between graph and model, relative to the model's largest output.
TOLERANCE: dict[torch.dtype, float] = {
    torch.float64: 1e-8,
    torch.float32: 1e-4,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}
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
                graph.meta["trace"] = TraceInfo(form, _dynamic_dims(graph), notes, error_size, task_of(model))
                graph.train(model_training)
                return graph
            failures.append(f"{form} form, {front_end.__name__.strip('_')}: {problem}")
    raise TraceError(
        f"{type(model).__name__} cannot be traced into a graph that computes what it computes. Tried:\n"
        + "\n".join(f"  - {failure}" for failure in failures)
        + "\nOther example inputs, or a smaller part of the model, may trace."
    )


def _refuse_keywords(model: nn.Module) -> None:
    """torch.fx writes a graph as Python, which cannot say `self.w.in`."""
    names = [name for name, _ in [*model.named_parameters(), *model.named_buffers()]]
    for name in names:
        word = next((part for part in name.split(".") if keyword.iskeyword(part)), None)
        if word is not None:
            raise TraceError(f"'{name}': torch.fx cannot write a name that holds Python's keyword '{word}'. Rename it.")


def adopt(graph: GraphModule) -> TracedGraph:
    """A `TracedGraph` of a graph module that holds ATen ops already (from `torch.export`), sharing its parameters."""
    if isinstance(graph, TracedGraph):
        return fork(graph)
    traced = fork(graph)
    _clean(traced)
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
    return torch.export.export(model, args, kwargs, strict=False, dynamic_shapes=dynamic_shapes(model, args, kwargs))


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
    _use_first_names(graph, model)
    _clean(graph)
    graph.meta["trace"] = TraceInfo(form)
    if form == "train" and (changed := _changed_buffers(graph)):
        raise TraceError(f"it changes its own state when it runs ({changed[0]})")
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


def _use_first_names(graph: TracedGraph, model: nn.Module) -> None:
    """Read a tensor that the model holds under several names by the first of them, as `named_parameters` does."""
    names = {id(t): name for name, t in reversed([*model.named_parameters(), *model.named_buffers()])}
    for node in graph.graph.nodes:
        tensor = tensor_of(graph, node)
        name = names.get(id(tensor)) if tensor is not None else None
        if name is None or name == node.target:
            continue
        owner: nn.Module = graph
        *parents, field = name.split(".")
        for parent in parents:
            if not hasattr(owner, parent):
                owner.add_module(parent, nn.Module())
            owner = getattr(owner, parent)
        if isinstance(tensor, nn.Parameter):
            owner.register_parameter(field, tensor)
        elif tensor is not None:
            owner.register_buffer(field, tensor)
        node.target = name
    used = {str(node.target) for node in graph.graph.nodes if node.op == "get_attr"}
    for name, tensor in list(graph.named_parameters(remove_duplicate=False)):
        if name not in used and id(tensor) in names:
            holder, _, field = name.rpartition(".")
            delattr(graph.get_submodule(holder), field)


def _inline_no_autocast(graph: TracedGraph) -> None:
    """Put the body of a region that switches autocast off into the graph: there is no autocast to switch off."""
    for node in list(graph.graph.nodes):
        if not is_call(node, torch.ops.higher_order.wrap_with_autocast) or node.args[2] is not False:
            continue
        body = attribute(graph, str(node.args[4].target))
        placeholders = [inner for inner in body.graph.nodes if inner.op == "placeholder"]
        mapping: dict[Node, Any] = dict(zip(placeholders, node.args[5:], strict=True))
        with graph.graph.inserting_before(node):
            for inner in body.graph.nodes:
                if inner.op in ("call_function", "get_attr"):
                    mapping[inner] = graph.graph.node_copy(inner, mapping.__getitem__)
        results: Any = torch.fx.node.map_arg(body.graph.output_node().args[0], mapping.__getitem__)
        for user in list(node.users):
            if is_call(user, operator.getitem):
                user.replace_all_uses_with(results[user.args[1]])
                graph.graph.erase_node(user)
        if not node.users:
            graph.graph.erase_node(node)


def _clean(graph: TracedGraph) -> None:
    """Remove what is not computation: assertions on metadata, guards, dead nodes."""
    _inline_no_autocast(graph)
    for part in nested_graphs(graph):
        for node in list(part.graph.nodes):
            guard = node.op == "call_module" and str(node.target).endswith("_guards_fn")
            if guard or is_call(node, aten._assert_tensor_metadata.default) or _counts_batches(node):
                part.graph.erase_node(node)
        part.graph.eliminate_dead_code()
        part.recompile()
    graph.delete_all_unused_submodules()


def _counts_batches(node: Node) -> bool:
    """Batch normalisation counting its batches: it would go on in evaluation, and nothing reads the count."""
    if not is_call(node, aten.add_.Tensor) or node.users:
        return False
    source = node.args[0]
    return isinstance(source, Node) and str(source.target).endswith("num_batches_tracked")


def _changed_buffers(graph: GraphModule) -> list[str]:
    """Parameters and buffers that the graph changes in place when it runs (batch statistics aside)."""
    changed = []
    for part in nested_graphs(graph):
        for node in part.graph.nodes:
            schema = getattr(node.target, "_schema", None)
            if schema is None or not schema.is_mutable or node.target is aten.batch_norm.default:
                continue
            for argument, value in zip(schema.arguments, node.args, strict=False):
                while isinstance(value, Node) and value.op == "call_function" and value.target in VIEWS:
                    value = value.args[0]
                written = argument.alias_info is not None and argument.alias_info.is_write
                if written and isinstance(value, Node) and tensor_of(part, value) is not None:
                    changed.append(str(value.target))
    return changed


def _form_of(graph: GraphModule) -> Form:
    """Training form if any node is set to what only training does."""
    before = TracedGraph.eval(fork(graph))
    changed = any(
        a.args != b.args and a.op == "call_function" and b.meta.keys() - a.meta.keys()
        for a, b in zip(graph.graph.nodes, before.graph.nodes, strict=True)
    )
    return "train" if changed else "eval"


# --------------------------------------------------------------------------------------------- agreement


def run(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Call without gradients and with a fixed random state, so that two runs of a noisy model agree."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    # The fused encoder layer zeroes padded positions, which no other form of the same model does.
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return model(*args, **kwargs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


def relative_error(actual: Any, expected: Any) -> float:
    """Largest difference between two outputs of the same structure, relative to the largest expected value.

    Every floating-point tensor counts by itself and the worst one is returned; values of other types must be equal.
    Infinite if structure, shape, or the places of NaN and infinity differ.
    """
    left, right = pytree.tree_leaves(_plain(actual)), pytree.tree_leaves(_plain(expected))
    if len(left) != len(right):
        return float("inf")
    return max((_leaf_error(a, b) for a, b in zip(left, right, strict=True)), default=0.0)


def tolerance_for(outputs: Any, model: nn.Module | None = None) -> float:
    """The accepted relative error for these outputs (of this model): the coarsest dtype among them decides."""
    dtypes = {leaf.dtype for leaf in pytree.tree_leaves(_plain(outputs)) if isinstance(leaf, Tensor)}
    if model is not None:
        dtypes |= {parameter.dtype for parameter in model.parameters()}
    return max((TOLERANCE[dtype] for dtype in dtypes if dtype in TOLERANCE), default=TOLERANCE[torch.float32])


def _plain(outputs: Any) -> Any:
    """Model output classes as plain dicts: an export drops fields that are None."""
    if isinstance(outputs, Mapping):
        return {key: value for key, value in outputs.items() if value is not None}
    return outputs


def _leaf_error(actual: object, expected: object) -> float:
    if not isinstance(actual, Tensor) or not isinstance(expected, Tensor):
        return 0.0 if actual is expected or bool(actual == expected) else float("inf")
    if actual.shape != expected.shape:
        return float("inf")
    if not expected.is_floating_point():
        return 0.0 if torch.equal(actual, expected) else float("inf")
    a, b = actual.detach().double(), expected.detach().double()
    finite = torch.isfinite(b)
    if not torch.equal(torch.nan_to_num(a, 1.5, 2.5, -2.5)[~finite], torch.nan_to_num(b, 1.5, 2.5, -2.5)[~finite]):
        return float("inf")
    a, b = a[finite], b[finite]
    if b.numel() == 0:
        return 0.0
    if not bool(torch.isfinite(a).all()):
        return float("inf")
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-12))


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
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in target.tags


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
        for a, b in zip(pytree.tree_leaves(_plain(one)), pytree.tree_leaves(_plain(two)), strict=False)
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
    loggers = [logging.getLogger(name) for name in ("torch.export", "torch._export", "torch.fx", "torch._dynamo")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


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

"""Let what follows an early exit run for the samples that stay, and for no others.

What follows is everything that the answer needs and the exit itself does not. Each value that it reads from before is
reduced to the rows of the samples that stay, if its first dimension is the batch. Numbers of rows, made of nothing but
sizes, are counted anew: they point into values that were reduced.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.utils._pytree import tree_map_only

from surgeon.exits.site import ExitSite, rows_that_stay
from surgeon.graph.edit import emit, get_attr
from surgeon.graph.ops import equal_size
from surgeon.graph.sizes import Sizes
from surgeon.graph.traced import TracedGraph, aten, is_call, shape_of, tensor_of
from surgeon.graph.walk import walk_sources, walk_users
from surgeon.sites.rejection import Rejection

_RESHAPES = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)


@dataclass(frozen=True)
class Plan:
    """What has to change. region: the nodes that will run for fewer samples, in order.

    values, sizes: what they read from before that has the batch in its first dimension, or is its size.
    numbers: what they read from before that is made of sizes alone, with everything in between, in order.
    reshapes: nodes of the region whose shape has a -1 that an empty batch leaves open, with its place and what it is:
        a number, or the dimension of the input.
    """

    region: tuple[Node, ...]
    values: tuple[Node, ...]
    sizes: tuple[Node, ...]
    numbers: tuple[Node, ...]
    reshapes: tuple[tuple[Node, int, int | tuple[Node, int]], ...]


def plan_skipping(graph: GraphModule, site: ExitSite) -> Plan | Rejection:
    """Say what has to change at an exit, or why nothing can."""
    batch = site.logits.meta["val"].shape[0]
    if not isinstance(batch, torch.SymInt):
        reason = f"the graph takes batches of {batch} samples only. Trace the model with a batch that may change"
        return Rejection("fixed-batch", reason, site.path, site.logits.name)
    batches = _batches(graph, batch)
    before = set(walk_sources(site.logits))
    after = {node for node in walk_sources(site.rest) if node not in before and node.op.startswith("call")}
    wanted: dict[Node, None] = {}
    for node in graph.graph.nodes:
        # The sizes of what was there before are known, and what they are read from is not needed.
        is_size = isinstance(node.meta.get("val"), torch.SymInt)
        if node in after and not (is_size and not any(one in wanted for one in node.all_input_nodes)):
            wanted[node] = None
    region = tuple(wanted)
    counted = _made_of_sizes(graph)
    pointing = {user for node in counted if _has(node.meta["val"], batches) for user in walk_users(node, _is_whole)}
    values, sizes, numbers = [], [], []
    for source in dict.fromkeys(source for node in region for source in node.all_input_nodes):
        if source in wanted or source.op == "get_attr" or not _has(source.meta.get("val"), batches):
            continue
        value = source.meta["val"]
        if isinstance(value, torch.SymInt) and _is_one(value, batches):
            sizes.append(source)
        elif source in counted and _sizes_are(counted, source, batches):
            numbers.append(source)
        elif source in pointing and _is_whole(source):
            reason = f"later layers read {source.name}, which holds numbers of samples"
            return Rejection("batch-not-first", reason, site.path, source.name)
        elif isinstance(value, Tensor) and _is_one(value.shape[0], batches) and not _has(value.shape[1:], batches):
            values.append(source)
        else:
            reason = f"later layers read {source.name}, whose first dimension alone is not the batch"
            return Rejection("batch-not-first", reason, site.path, source.name)
    reshapes = [found for node in region if is_call(node, *_RESHAPES) and (found := _open(node, batches)) is not None]
    unclear = next((node for node, _, known in reshapes if known is None), None)
    if unclear is not None:
        reason = f"the shape of {unclear.name} is not clear if all samples have left"
        return Rejection("unclear-shape", reason, site.path, unclear.name)
    chain = {part for node in numbers for part in walk_sources(node) if part in counted}
    anew = tuple(node for node in graph.graph.nodes if node in chain and _has(node.meta["val"], batches))
    return Plan(region, tuple(values), tuple(sizes), anew, tuple(reshapes))  # type: ignore[arg-type]


def skip_rest(graph: TracedGraph, site: ExitSite, plan: Plan) -> Node:
    """Rewrite the graph so, and return the node with the answers of all samples."""
    inside = set(plan.region)
    with graph.graph.inserting_after(site.logits):
        tau = get_attr(graph, f"{site.path}.tau")
    with graph.graph.inserting_after(tau):
        rows = emit(graph, rows_that_stay, site.logits, tau, path=site.path)
    place = rows
    moved = {}
    for value in plan.values:
        with graph.graph.inserting_after(place):
            place = moved[value] = emit(graph, aten.index_select.default, value, 0, rows, path=site.path)
    if plan.sizes or plan.numbers:
        with graph.graph.inserting_after(place):
            place = size = emit(graph, aten.sym_size.int, rows, 0, path=site.path)
        moved |= dict.fromkeys(plan.sizes, size)
        batches = _batches(graph, site.logits.meta["val"].shape[0])
        for node in plan.numbers:
            with graph.graph.inserting_after(place):
                place = moved[node] = graph.graph.node_copy(
                    node, lambda one: size if _is_one(one.meta.get("val"), batches) else moved.get(one, one)
                )
    for old, new in moved.items():
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user in inside)
    # Some of what follows may have been computed before, because it does not depend on the samples' values.
    order = {node: number for number, node in enumerate(graph.graph.nodes)}
    for node in [node for node in plan.region if order[node] < order[place]]:
        place.append(node)
        place = node
    for node, dimension, known in plan.reshapes:
        shape = list(node.args[1])  # type: ignore[arg-type]
        if isinstance(known, tuple):
            with graph.graph.inserting_before(node):
                shape[dimension] = emit(graph, aten.sym_size.int, node.args[0], known[1], path=site.path)
        else:
            shape[dimension] = known
        node.update_arg(1, shape)
    infer_sizes(graph, (*(moved[node] for node in plan.numbers), *plan.region))
    with graph.graph.inserting_before(site.output):
        logits = site.logits
        if logits.meta["val"].dtype != site.rest.meta["val"].dtype:
            logits = emit(graph, aten.to.dtype, logits, site.rest.meta["val"].dtype, path=site.path)
        merged = emit(graph, aten.index_copy.default, logits, 0, rows, site.rest, path=site.path)
    site.output.replace_all_uses_with(merged)
    graph.graph.erase_node(site.output)
    return merged


def _made_of_sizes(graph: GraphModule) -> set[Node]:
    """The tensors that are made of sizes and constants alone, such as `arange(batch)`."""
    found: set[Node] = set()
    for node in graph.graph.nodes:
        if node.op != "call_function" or not isinstance(node.meta.get("val"), Tensor):
            continue
        if all(isinstance(one.meta.get("val"), torch.SymInt) or one in found for one in node.all_input_nodes):
            found.add(node)
    return found


def _batches(graph: GraphModule, batch: torch.SymInt) -> list[torch.SymInt]:
    """The size of the batch under all of its names: not every op tells that its inputs have the same one."""
    info = graph.meta.get("trace")
    if info is None:
        return [batch]
    given = zip(graph.graph.find_nodes(op="placeholder"), Sizes.parse(info.sizes).inputs, strict=True)
    firsts = [(node.meta["val"].shape[0], one.shape[0]) for node, one in given if one.shape]
    names = {name for size, name in firsts if isinstance(name, str) and equal_size(size, batch)}
    return [batch, *(size for size, name in firsts if name in names and isinstance(size, torch.SymInt))]


def _is_one(value: Any, batches: Sequence[torch.SymInt]) -> bool:
    """Whether a size is that of the batch."""
    return isinstance(value, torch.SymInt) and any(equal_size(value, batch) for batch in batches)


def _sizes_are(counted: set[Node], node: Node, batches: Sequence[torch.SymInt]) -> bool:
    """Whether the sizes that it is made of are the batch itself, or have nothing to do with it."""
    parts = (part for part in walk_sources(node, lambda one: one in counted) if part not in counted)
    return all(_is_one(part.meta["val"], batches) or not _has(part.meta["val"], batches) for part in parts)


def _is_whole(node: Node) -> bool:
    """Whether the value is a tensor of whole numbers, which may point at samples."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.dtype is torch.bool:
        return False
    return not value.is_floating_point() and not value.is_complex()


def _has(value: Any, batches: Sequence[torch.SymInt]) -> bool:
    """Whether a size or a shape depends on the size of the batch."""
    if isinstance(value, Tensor):
        value = value.shape
    sizes = value if isinstance(value, list | tuple) else [value]
    symbols = {symbol for batch in batches for symbol in batch.node.expr.free_symbols}
    return any(
        bool(size.node.expr.free_symbols & symbols)
        if isinstance(size, torch.SymInt)
        else isinstance(size, Tensor | list | tuple) and _has(size, batches)
        for size in sizes
    )


def _open(node: Node, batches: Sequence[torch.SymInt]) -> tuple[Node, int, int | tuple[Node, int] | None] | None:
    """The -1 in a shape that also names the batch, and what it stands for; None if there is none."""
    shape, made, source = node.args[1], shape_of(node), node.args[0]
    if not isinstance(shape, list | tuple) or made is None or -1 not in shape:
        return None
    if not any(_has(size.meta.get("val"), batches) for size in shape if isinstance(size, Node)):
        return None
    dimension = shape.index(-1)
    wanted = made[dimension]
    if isinstance(wanted, int):
        return node, dimension, wanted
    assert isinstance(source, Node)
    known = next((place for place, size in enumerate(shape_of(source) or ()) if equal_size(size, wanted)), None)
    return node, dimension, None if known is None else (source, known)


def infer_sizes(graph: TracedGraph, nodes: tuple[Node, ...]) -> None:
    """Record the shapes of nodes anew, and of those that read them."""
    mode = detect_fake_mode([node.meta.get("val") for node in graph.graph.nodes])
    assert mode is not None, "a traced graph records fake values"
    changed = set(nodes)

    def value(source: Node) -> Any:
        if "val" not in source.meta:
            tensor = tensor_of(graph, source)
            assert tensor is not None
            source.meta["val"] = mode.from_tensor(tensor, static_shapes=True)
        return source.meta["val"]

    for node in graph.graph.nodes:
        if node not in changed:
            continue
        args, kwargs = map_arg(node.args, value), map_arg(node.kwargs, value)
        with mode, torch.no_grad():
            if node.op == "call_module":
                module = graph.get_submodule(str(node.target))
                state: dict[str, Tensor] = {
                    name: mode.from_tensor(tensor, static_shapes=True)
                    for name, tensor in [*module.named_parameters(), *module.named_buffers()]
                }
                made = torch.func.functional_call(module, state, args, kwargs)
            else:
                made = node.target(*args, **kwargs)
        node.meta["val"] = tree_map_only(Tensor, Tensor.detach, made)

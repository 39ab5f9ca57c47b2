"""Check that a traced graph computes what its model computes, on the example inputs and at other sizes."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.utils import _pytree as pytree

from surgeon.errors import TraceError
from surgeon.graph.agreement import call_reproducibly, relative_error, tolerance_for
from surgeon.graph.calls import flat_inputs, unflatten_inputs
from surgeon.graph.sizes import Sizes
from surgeon.graph.traced import TracedGraph, is_switched_off
from surgeon.tracing.declared import declared_sizes
from surgeon.tracing.narrowing import Outcome, narrowed
from surgeon.tracing.setup import copied, run_alone, unchanged
from surgeon.tracing.telling import Steps


def run_reference(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, list[str]]:
    """Return the model's output on the example inputs, and the places in these that it writes to.

    Raises:
        TraceError: the model fails on the example inputs, or remembers its first call in a second one.
    """
    given = copied((args, kwargs))
    before = _places(model, args, kwargs)
    try:
        with unchanged(model):
            output = call_reproducibly(model, *given)
            again = call_reproducibly(model, *copied((args, kwargs)))
    except Exception as error:
        raise TraceError(
            f"{type(model).__name__} fails on the example inputs, before any tracing: {brief(error)}"
        ) from error
    if not relative_error(again, output) <= tolerance_for(output, model) or _remembers(model, args, kwargs):
        raise TraceError(
            f"{type(model).__name__} cannot be traced: it changes its own state, so that a second call computes "
            "something else than the first. A graph would repeat the first call."
        )
    after = _places(model, *given)
    changed = [place for place in after if place not in before or not _same(after[place], before[place])]
    return output, [*changed, *(place for place in before if place not in after)]


def _remembers(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the model computes something else after it has seen other inputs: the example's rows in reverse."""

    def changed(leaf: Tensor) -> Tensor:
        leaf = leaf.flip(0) if leaf.dim() else leaf
        return leaf * 0.75 if leaf.is_floating_point() else leaf

    other = pytree.tree_map_only(Tensor, changed, (args, kwargs))
    try:
        with unchanged(model):
            call_reproducibly(model, *copied((args, kwargs)))
            after = call_reproducibly(model, *copied(other))
        alone = run_alone(model, *other)
    except Exception:
        return False  # the model does not take these inputs
    return not relative_error(after, alone) <= tolerance_for(alone, model)


def _places(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The leaves of inputs by their places, such as "batch['x']"."""
    named = dict(inspect.signature(model.forward).bind(*args, **kwargs).arguments)
    leaves = pytree.tree_flatten_with_path(named)[0]
    return {pytree.keystr(path).replace("']", "", 1).removeprefix("['"): leaf for path, leaf in leaves}


def _same(a: object, b: object) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and bool(torch.equal(a, b) or (a.isnan() & b.isnan() | (a == b)).all())
    return type(a) is type(b)


def disagreement(
    graph: TracedGraph, reference: Any, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[str | None, float]:
    """Return why the graph differs from the model (None if it agrees), and the relative error on the example inputs."""
    graph.eval()
    args, kwargs = copied((args, kwargs))
    try:
        error = relative_error(call_reproducibly(graph, args, kwargs), reference)
    except Exception as failure:
        return f"the graph fails on inputs that the model accepts: {brief(failure)}", float("inf")
    if not error <= tolerance_for(reference, model):
        random = sorted({str(node.target) for node in graph.graph.nodes if is_random(node)})
        hint = f" (random ops: {', '.join(random)})" if random else ""
        return f"the graph's output differs from the model's by a relative error of {error:.1e}{hint}", error
    return None, error


def narrow_sizes(
    graph: TracedGraph, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], steps: Steps
) -> tuple[Sizes, list[str]]:
    """Return the sizes at which the graph computes what the model computes, and the faults it has at others.

    steps: told of every comparison. See `surgeon.tracing.narrowing.narrowed`.
    """
    graph.eval()

    def run(leaves: Sequence[Any]) -> Outcome:
        steps.step()
        given = unflatten_inputs(graph, leaves)
        try:
            expected = run_alone(model, *given)
        except Exception:
            return Outcome(False)
        try:
            error = relative_error(call_reproducibly(graph, *copied(given)), expected)
        except Exception as failure:
            return Outcome(False, f"the graph fails, and the model does not ({brief(failure)})")
        if not error <= tolerance_for(expected, model):
            return Outcome(False, f"the graph differs from the model by a relative error of {error:.1e}")
        return Outcome(True)

    sizes = declared_sizes(graph)
    steps.comparing(sizes)
    return narrowed(sizes, flat_inputs(graph, args, kwargs), run)


def is_random(node: Node) -> bool:
    """Whether the node draws random numbers in its present mode. A dropout that is switched off does not."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded not in target.tags:
        return False
    return not is_switched_off(node)


def brief(error: BaseException) -> str:
    """Return an error in one line: its class and the start of its message."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:200]}" if text else type(error).__name__

"""Check that a traced graph computes what its model computes, on the example inputs and at another batch size."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.fx import Node

from surgeon.errors import TraceError
from surgeon.graph.agreement import call_reproducibly, relative_error, tolerance_for
from surgeon.graph.traced import TracedGraph, is_switched_off
from surgeon.tracing.dynamic_sizes import grow_batch


def run_reference(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the model's output on the example inputs.

    Raises:
        TraceError: the model fails on the example inputs.
    """
    try:
        return call_reproducibly(model, args, kwargs)
    except Exception as error:
        raise TraceError(
            f"{type(model).__name__} fails on the example inputs, before any tracing: {brief(error)}"
        ) from error


def disagreement(
    graph: TracedGraph, reference: Any, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[str | None, float]:
    """Return why the graph differs from the model (None if it agrees), and the relative error on the example inputs."""
    graph.eval()
    try:
        error = relative_error(call_reproducibly(graph, args, kwargs), reference)
    except Exception as failure:
        return f"the graph fails on inputs that the model accepts: {brief(failure)}", float("inf")
    tolerance = tolerance_for(reference, model)
    if not error <= tolerance:
        random = sorted({str(node.target) for node in graph.graph.nodes if is_random(node)})
        hint = f" (random ops: {', '.join(random)})" if random else ""
        return f"the graph's output differs from the model's by a relative error of {error:.1e}{hint}", error
    grown = grow_batch(graph, args, kwargs)
    if grown is None:
        return None, error
    try:
        expected = call_reproducibly(model, *grown)
    except Exception:
        return None, error  # the model itself does not take another batch size
    try:
        other = relative_error(call_reproducibly(graph, *grown), expected)
    except Exception as failure:
        return f"the graph fails at another batch size: {brief(failure)}", error
    if not other <= tolerance:
        return (
            f"at another batch size the graph's output differs from the model's by a relative error of {other:.1e}",
            error,
        )
    return None, error


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

"""Check whether a pass kept its promise: measure the costs before and after it, and compare the outputs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch.utils import _pytree as pytree

from surgeon.dynamic.knobs import nothing_skipped
from surgeon.dynamic.site import DynamicSite
from surgeon.errors import VerificationError
from surgeon.exits.blocks import BlockEnd
from surgeon.graph.agreement import call_reproducibly, relative_error, tolerance_for
from surgeon.graph.calls import as_args_kwargs
from surgeon.graph.capture import Capture
from surgeon.graph.traced import TracedGraph
from surgeon.inputs.skipping import find_skipping
from surgeon.measure.cost import Cost, LayerRun
from surgeon.measure.meter import measure
from surgeon.passes.report import SiteChange
from surgeon.sites.ffn import FFN
from surgeon.sites.linear_site import LinearSite
from surgeon.sites.stream import Stream
from surgeon.sites.values import ValueHeads
from surgeon.training.loop import RunSettings

_TRIALS = 3  # other inputs, with verify="full"
Call: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]
"""The arguments of a call, positional and by name."""


@dataclass(frozen=True)
class Verified:
    """What was measured on a graph before and after a pass.

    before, after: costs of a call on the example inputs. max_error: the largest difference of the outputs, relative to
    the largest; None if it was not measured. layers: what ran in every expert layer, by the path of its experts.
    """

    before: Cost | None
    after: Cost | None
    max_error: float | None
    layers: Mapping[str, LayerRun]

    def share(self, change: SiteChange) -> float | None:
        """Return the share of the experts that ran at a site."""
        paths = {change.path, *change.made}
        found = (layer for moe, layer in self.layers.items() if paths & {moe, moe.rpartition(".")[0]})
        return next((layer.share for layer in found), None)


@dataclass(frozen=True)
class Expected:
    """What a graph gives before a pass.

    graph: the graph. cost: of a call on the example inputs. calls: the inputs to compare on, each as (args, kwargs),
    with the output for them. tolerance: the largest relative difference to accept.
    all_read: the outputs with nothing skipped by layers that skip inputs or neurons; None if there are none.
    layers: the values of the sites on the example inputs, by node name; None if the graph can still be asked for them.
    """

    graph: TracedGraph
    cost: Cost
    inputs: Call
    calls: tuple[tuple[Call, Any], ...]
    all_read: tuple[Any, ...] | None
    tolerance: float
    layers: Mapping[str, torch.Tensor] | None


def expect(
    graph: TracedGraph,
    sites: Sequence[FFN | LinearSite | DynamicSite | BlockEnd | Stream | ValueHeads],
    inputs: Any,
    settings: RunSettings,
) -> Expected | None:
    """Measure and run a graph before a pass rewrites its sites. None without example inputs."""
    if inputs is None:
        return None
    example: Call = as_args_kwargs(inputs)
    calls = [] if settings.verify == "off" else [example]
    if settings.verify == "full":
        calls += [_other_inputs(*example, trial) for trial in range(_TRIALS)]
    layers = None
    with _evaluating(graph):
        cost, _ = measure(graph, *example)
        outputs = [call_reproducibly(graph, *call) for call in calls]
        with nothing_skipped(graph):
            skips = bool(find_skipping(graph))
            all_read = tuple(call_reproducibly(graph, *call) for call in calls) if skips else None
            if settings.consume and calls:
                layers = _values(graph, [site.output.name for site in sites], example)
    tolerance = _tolerance(outputs[0], graph) if outputs else 0.0
    return Expected(graph, cost, example, tuple(zip(calls, outputs, strict=True)), all_read, tolerance, layers)


def _tolerance(output: Any, graph: TracedGraph) -> float:
    """The accepted error. A float64 model that computes a part in float32, such as its norms, is as exact as that."""
    values = [node.meta.get("val") for node in graph.graph.nodes if node.op == "call_function"]
    parts = [value for value in values if isinstance(value, torch.Tensor) and value.dtype is torch.float32]
    return max(tolerance_for(output, graph), tolerance_for(parts) if parts else 0.0)


def verify(
    name: str, expected: Expected | None, graph: TracedGraph, changes: Sequence[SiteChange], *, preserved: bool
) -> Verified:
    """Measure a rewritten graph on the example inputs, and compare its outputs with those before the pass.

    Args:
        name: of the pass. preserved: whether it promises the same output.

    Raises:
        VerificationError: the output differs although it should not, or has values that are not finite.
    """
    if expected is None:
        return Verified(None, None, None, {})
    errors = []
    with _evaluating(graph):
        cost, layers = measure(graph, *expected.inputs)
    compared = list(expected.calls)
    everything = preserved and expected.all_read is not None
    if everything:
        # What rounding moves across a threshold says nothing of the pass.
        compared = [(call, before) for (call, _), before in zip(compared, expected.all_read or (), strict=True)]
    with _evaluating(graph), nothing_skipped(graph) if everything else contextlib.nullcontext():
        for call, before in compared:
            after = call_reproducibly(graph, *call)
            errors.append(relative_error(after, before))
            if preserved and not errors[-1] <= expected.tolerance:
                where = _first_difference(expected, graph, changes, call)
                raise VerificationError(
                    f"{name} must not change the output, but the relative difference is {errors[-1]:.1e} "
                    f"(tolerance: {expected.tolerance:.0e}){where}. The graph is as it was before {name}."
                )
            if not preserved and not _as_finite(after, before):
                raise VerificationError(
                    f"{name} makes outputs that are not finite. The graph is as it was before {name}."
                )
    return Verified(expected.cost, cost, max(errors, default=None), layers)


def _as_finite(after: Any, before: Any) -> bool:
    """Whether every tensor of an output is finite that was finite before."""
    return all(
        bool(torch.isfinite(leaf).all())
        for leaf, old in zip(pytree.tree_leaves(after), pytree.tree_leaves(before), strict=True)
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() and bool(torch.isfinite(old).all())
    )


def _first_difference(expected: Expected, graph: TracedGraph, changes: Sequence[SiteChange], call: Call) -> str:
    """Name the first changed site whose own output differs."""
    old = expected.layers
    if old is None:
        with _evaluating(expected.graph), nothing_skipped(expected.graph):
            old = _values(expected.graph, [change.output[0] for change in changes], call)
    elif call is not expected.inputs:
        return ""
    with nothing_skipped(graph):
        new = _values(graph, [change.output[1] for change in changes], call)
    for change in changes:
        error = relative_error(new[change.output[1]], old[change.output[0]])
        if not error <= expected.tolerance:
            return f"; the first site that differs is {change.path}, by {error:.1e}"
    return ""


def _values(graph: TracedGraph, names: Sequence[str], call: Call) -> Mapping[str, torch.Tensor]:
    found: Mapping[str, torch.Tensor] = call_reproducibly(Capture(graph, dict.fromkeys(names)), *call)[1]
    return found


@contextlib.contextmanager
def _evaluating(graph: TracedGraph) -> Iterator[None]:
    """Switch to evaluation inside the block.

    The graph shares modules with that of whoever called: their modes are put back whatever happens.
    """
    training = graph.training
    try:
        graph.eval()
        yield
    finally:
        graph.train(training)


def _other_inputs(args: tuple[Any, ...], kwargs: dict[str, Any], trial: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The example inputs with their rows in another order; floating-point values also get noise."""
    generator = torch.Generator().manual_seed(trial)

    def change(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or leaf.dim() == 0:
            return leaf
        rolled = leaf.roll(trial + 1, 0)
        if leaf.is_floating_point():
            noise = torch.randn(leaf.shape, generator=generator).to(leaf)
            return rolled + noise * leaf.std(correction=0)
        return rolled

    changed = pytree.tree_map(change, (args, kwargs))
    return changed[0], changed[1]

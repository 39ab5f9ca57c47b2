"""Check whether a pass kept its promise: measure the costs before and after it, and compare the outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from surgeon.errors import VerificationError
from surgeon.graph.agreement import call_reproducibly, relative_error, tolerance_for
from surgeon.graph.calls import as_args_kwargs
from surgeon.graph.capture import Capture
from surgeon.graph.traced import TracedGraph
from surgeon.measure.meter import Cost, LayerRun, measure
from surgeon.passes.report import SiteChange
from surgeon.training.loop import RunSettings

_TRIALS = 3  # other inputs, with verify="full"


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


def verify(
    name: str,
    before: TracedGraph,
    after: TracedGraph,
    changes: Sequence[SiteChange],
    inputs: Any,
    *,
    preserved: bool,
    settings: RunSettings,
) -> Verified:
    """Measure both graphs on the example inputs and compare their outputs.

    Args:
        name: of the pass. preserved: whether it promises the same output.

    Raises:
        VerificationError: the output differs although it should not, or has values that are not finite.
    """
    if inputs is None:
        return Verified(None, None, None, {})
    args, kwargs = as_args_kwargs(inputs)
    training = after.training
    error = None
    # The two share modules with the graph of whoever called: their modes are put back whatever happens.
    try:
        before.eval()
        after.eval()
        cost_before, _ = measure(before, args, kwargs)
        cost_after, layers = measure(after, args, kwargs)
        if settings.verify != "off":
            calls = [(args, kwargs)]
            if settings.verify == "full":
                calls += [_other_inputs(args, kwargs, trial) for trial in range(_TRIALS)]
            error = max(_compare(name, before, after, changes, *call, preserved) for call in calls)
    finally:
        before.train(training)
        after.train(training)
    return Verified(cost_before, cost_after, error, layers)


def _compare(
    name: str,
    before: TracedGraph,
    after: TracedGraph,
    changes: Sequence[SiteChange],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    preserved: bool,
) -> float:
    expected = call_reproducibly(before, args, kwargs)
    actual = call_reproducibly(after, args, kwargs)
    error = relative_error(actual, expected)
    tolerance = tolerance_for(expected, before)
    if preserved and not error <= tolerance:
        where = _first_difference(before, after, changes, args, kwargs, tolerance)
        raise VerificationError(
            f"{name} must not change the output, but the relative difference is {error:.1e} "
            f"(tolerance: {tolerance:.0e}){where}. The graph is as it was before {name}."
        )
    if not preserved and not all(
        bool(torch.isfinite(leaf).all())
        for leaf, old in zip(pytree.tree_leaves(actual), pytree.tree_leaves(expected), strict=True)
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() and bool(torch.isfinite(old).all())
    ):
        raise VerificationError(f"{name} makes outputs that are not finite. The graph is as it was before {name}.")
    return error


def _first_difference(
    before: TracedGraph,
    after: TracedGraph,
    changes: Sequence[SiteChange],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    tolerance: float,
) -> str:
    """Name the first changed site whose own output differs."""
    _, old = call_reproducibly(Capture(before, [change.output[0] for change in changes]), args, kwargs)
    _, new = call_reproducibly(Capture(after, [change.output[1] for change in changes]), args, kwargs)
    for change in changes:
        error = relative_error(new[change.output[1]], old[change.output[0]])
        if not error <= tolerance:
            return f"; the first site that differs is {change.path}, by {error:.1e}"
    return ""


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

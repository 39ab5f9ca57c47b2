"""Whether a pass kept what it promised: costs on both sides and the difference between the outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from surgeon.graph.agreement import call_reproducibly, relative_error
from surgeon.graph.capture import Capture
from surgeon.graph.traced import TracedGraph
from surgeon.passes.report import SiteChange


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
    """The example inputs with rows in another order and, where they are real numbers, other values."""
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

"""Whether passes can run in an order, which is known before any model is."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

from surgeon.passes.base import Pass
from surgeon.passes.contract import SiteKind


def misplaced(passes: Sequence[type[Pass[Any]]], there: Collection[SiteKind]) -> Iterator[tuple[int, str]]:
    """Yield the position of every pass that cannot run where it stands, and what to do.

    there: the kinds of sites that passes make which the model has already.
    """
    made = set(there)
    for position, pass_ in enumerate(passes):
        early = next((other.name for other in passes[:position] if other.name in pass_.must_precede), None)
        if early is not None:
            yield position, f"{pass_.name} must run before {early}. Swap the two passes."
        elif pass_.works_on == "moe" and "moe" not in made:
            yield position, f"{pass_.name} works on experts, but there are none. Put moeify before it."
        elif pass_.works_on == "dynamic" and not made & {"moe", "dynamic"}:
            yield (
                position,
                f"{pass_.name} works on layers that skip by tau, but there are none. Put moeify, early-exit or "
                "sparsify-inputs before it.",
            )
        if pass_.makes is not None:
            made.add(pass_.makes)

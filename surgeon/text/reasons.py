"""Why sites were refused, like reasons counted."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

# What differs between two refusals for the same reason: names of nodes and modules.
_PARTICULARS = re.compile(r"'[^']*'|\(\w*_\w*\)|\(\w+\d\)")


@dataclass(frozen=True)
class Reason:
    """A reason for refusing sites: how often, in the words of the first, and the first's path."""

    text: str
    count: int
    first: str


def count_reasons(rejected: Iterable[tuple[str, str]]) -> list[Reason]:
    """The reasons of (path, reason) pairs, the most common first; names inside a reason do not make it another one."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for path, reason in rejected:
        groups.setdefault(_PARTICULARS.sub("", reason), []).append((path, reason))
    ordered = sorted(groups.values(), key=len, reverse=True)
    return [Reason(same[0][1], len(same), same[0][0]) for same in ordered]

"""Why sites were refused, like reasons counted."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from surgeon.sites.rejection import Rejection

# What differs between two refusals for the same reason: names of nodes and modules.
_PARTICULARS = re.compile(r"'[^']*'|\(\w*_\w*\)|\(\w+\d\)")


@dataclass(frozen=True)
class Reason:
    """A reason for refusing sites: how often, in the words of the first, and the first's path."""

    text: str
    count: int
    first: str


def count_reasons(rejected: Iterable[Rejection]) -> list[Reason]:
    """The reasons, the most common first; names of nodes and modules do not make a reason another one."""
    groups: dict[tuple[str, str], list[Rejection]] = {}
    for rejection in rejected:
        groups.setdefault((rejection.code, _PARTICULARS.sub("", rejection.reason)), []).append(rejection)
    ordered = sorted(groups.values(), key=len, reverse=True)
    return [Reason(same[0].reason, len(same), same[0].path) for same in ordered]

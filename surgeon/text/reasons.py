"""Count the reasons why sites were refused."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from surgeon.sites.rejection import Rejection

# Names of nodes and modules, which differ between refusals for the same reason.
_PARTICULARS = re.compile(r"'[^']*'|\(\w*_\w*\)|\(\w+\d\)")


@dataclass(frozen=True)
class Reason:
    """A reason for refusing sites.

    text, code: of the first refusal. count: number of refusals. first: path of the first refusal.
    """

    text: str
    code: str
    count: int
    first: str


def count_reasons(rejected: Iterable[Rejection]) -> list[Reason]:
    """The reasons, the most common first. Reasons that differ only in names of nodes and modules count as the same."""
    groups: dict[tuple[str, str], list[Rejection]] = {}
    for rejection in rejected:
        groups.setdefault((rejection.code, _PARTICULARS.sub("", rejection.reason)), []).append(rejection)
    ordered = sorted(groups.values(), key=len, reverse=True)
    return [Reason(same[0].reason, same[0].code, len(same), same[0].path) for same in ordered]

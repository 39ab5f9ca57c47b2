"""Shorten what is shown: join the sites of repeated layers, and round numbers and times."""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from surgeon.passes.report import SiteChange

_UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_LAST_NUMBER = re.compile(r"^(?P<head>(?:.*\.)?)(?P<number>\d+)(?P<tail>(?:\.\D[^.]*)*)$")


@dataclass(frozen=True)
class SiteGroup:
    """Sites of repeated layers that were changed in the same way. label: `encoder.layer.0…5`."""

    label: str
    change: SiteChange
    count: int


def join_like(items: Iterable[tuple[str, Hashable]]) -> list[tuple[str, int, int]]:
    """Join (path, look) pairs with the same look and with paths that differ only in their last number.

    Returns:
        For each group its label, its size, and the index of its first member. Groups are in order of appearance.
    """
    groups: dict[Hashable, list[tuple[int, str]]] = {}
    for place, (path, look) in enumerate(items):
        found = _LAST_NUMBER.match(path)
        where = (found["head"], found["tail"]) if found else path
        groups.setdefault((where, look), []).append((place, path))
    return [(join_paths([path for _, path in same]), len(same), same[0][0]) for same in groups.values()]


def join_sites(sites: Sequence[SiteChange]) -> list[SiteGroup]:
    """Join the sites of repeated layers whose changes look the same."""

    def look(site: SiteChange) -> Hashable:
        return site.before, site.after, site.parameters, site.multiply_adds, percent(site.executed)

    joined = join_like((site.path, look(site)) for site in sites)
    return [SiteGroup(label, sites[first], count) for label, count, first in joined]


def join_paths(paths: Sequence[str]) -> str:
    """`["layer.0.mlp", "layer.1.mlp", "layer.3.mlp"]` → `layer.0…1,3.mlp`; the paths differ in their last number."""
    found = _LAST_NUMBER.match(paths[0])
    if found is None or len(paths) == 1:
        return paths[0]
    numbers = sorted({int(match["number"]) for path in paths if (match := _LAST_NUMBER.match(path))})
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    text = ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}…{run[-1]}" for run in runs)
    return f"{found['head']}{text}{found['tail']}"


def number(value: float) -> str:
    """A number with three digits and a unit: 1180000 → `1.18 M`. Whole numbers below 1000 stay as they are."""
    for size, unit in _UNITS:
        if abs(value) >= 0.9995 * size:
            return f"{_three_digits(value / size)} {unit}"
    return f"{value:.0f}" if float(value).is_integer() else _three_digits(value)


def percent(share: float | None) -> str:
    """0.423 → `42%`, 0.0123 → `1.2%`, None → ``."""
    if share is None:
        return ""
    value = 100.0 * share
    return f"{value:.1f}%" if 0 < abs(value) < 9.95 else f"{value:.0f}%"


def change(before: float, after: float) -> str:
    """`1.18 M → 1.24 M`, or one number if nothing changed."""
    return number(before) if before == after else f"{number(before)} → {number(after)}"


def growth(before: float, after: float) -> str:
    """Relative change with its sign, such as `+4.7%`; empty if there is none to speak of."""
    if not before:
        return ""
    share = after / before - 1.0
    shown = percent(abs(share))
    return "" if shown in ("0%", "0.0%") else f"{'+' if share > 0 else '-'}{shown}"


def natural(path: str) -> list[tuple[int, int, str]]:
    """Sort key that puts `layer.2` before `layer.10`."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in path.split(".")]


def _three_digits(value: float) -> str:
    digits = 2 - math.floor(math.log10(abs(value)) + 1e-3)
    return f"{value:.{max(0, digits)}f}"

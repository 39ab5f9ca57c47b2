"""What passes would change in a model, and why not the rest."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from surgeon.errors import UsageError
from surgeon.graph.patterns import matches
from surgeon.jobs.inspect import LOOKS_FOR
from surgeon.jobs.open_model import Opened
from surgeon.moe.site import find_moes
from surgeon.passes import Pass
from surgeon.sites.rejection import Rejection
from surgeon.surgery.pipeline import Pipeline
from surgeon.tracing.trace import adopt
from surgeon.training.loop import RunSettings


@dataclass(frozen=True)
class Explanation:
    """One pass: (path, description) of the sites it would change, and the other candidates."""

    name: str
    looks_for: str
    matched: list[tuple[str, str]]
    rejected: list[Rejection]


def explain(opened: Opened, passes: Sequence[Pass[Any]], at: str | None = None) -> list[Explanation]:
    """For every pass, what it would do with each candidate in the graph that the passes before it would leave.

    Args:
        at: only candidates of this path, or under it, patterns with * allowed.

    Raises:
        UsageError: passes in an order that cannot work; no candidate has this path.
    """
    Pipeline(passes).check(has_moes=bool(find_moes(opened.graph)), has_data=True)
    graph, found = adopt(opened.graph), []
    for one in passes:
        matched, rejected = one.explain(graph)
        found.append(
            Explanation(
                one.name,
                LOOKS_FOR[one.works_on],
                [(site.path, site.describe) for site in matched],
                rejected,
            )
        )
        if matched and one is not passes[-1]:
            graph = adopt(graph)
            one.run(graph, inputs=None, data=None, settings=RunSettings(verify="off", dry_run=True))
    if at is None:
        return found
    paths = [path for one in found for path in (*dict(one.matched), *(rejection.path for rejection in one.rejected))]
    chosen = {path for path in paths if path.startswith(f"{at}.") or matches([at], path)}
    if not chosen:
        near = difflib.get_close_matches(at, paths, n=3, cutoff=0.3)
        hint = f" Nearest candidates: {', '.join(dict.fromkeys(near))}." if near else ""
        raise UsageError(f"No candidate at '{at}': nothing there looks like a {found[0].looks_for}.{hint}")
    return [
        Explanation(
            one.name,
            one.looks_for,
            [(path, what) for path, what in one.matched if path in chosen],
            [rejection for rejection in one.rejected if rejection.path in chosen],
        )
        for one in found
    ]

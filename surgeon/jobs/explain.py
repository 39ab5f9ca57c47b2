"""Find what passes would change in a model, and why they leave the rest."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from surgeon.described import Facts
from surgeon.errors import UsageError
from surgeon.graph.patterns import matches
from surgeon.jobs.inspect import LOOKS_FOR
from surgeon.jobs.open_model import Opened
from surgeon.passes import Pass
from surgeon.sites.rejection import Rejection
from surgeon.surgery.pipeline import Pipeline, kinds_of
from surgeon.tracing.trace import adopt
from surgeon.training.loop import RunSettings


@dataclass(frozen=True)
class Match:
    """A site that a pass would change. what: in words. facts: see `surgeon.described.Described.facts`."""

    path: str
    what: str
    facts: Facts


@dataclass(frozen=True)
class Explanation:
    """What one pass would do.

    matched: the sites that it would change. rejected: the other candidates.
    """

    name: str
    looks_for: str
    matched: list[Match]
    rejected: list[Rejection]


def explain(opened: Opened, passes: Sequence[Pass[Any]], at: str | None = None) -> list[Explanation]:
    """Find what each pass would do with each candidate, in the graph as the passes before it would leave it.

    Args:
        at: keep only candidates at this path or under it; patterns with * are allowed.

    Raises:
        UsageError: the order of the passes cannot work, or no candidate has this path.
    """
    Pipeline(passes).check(there=kinds_of(opened.graph), has_data=True)
    graph, found = adopt(opened.graph), []
    for pass_ in passes:
        matched, rejected = pass_.explain(graph)
        found.append(
            Explanation(
                pass_.name,
                LOOKS_FOR[pass_.works_on],
                [Match(site.path, site.describe, site.facts) for site in matched],
                rejected,
            )
        )
        if matched and pass_ is not passes[-1]:
            graph = adopt(graph)
            pass_.run(graph, inputs=None, data=None, settings=RunSettings(verify="off", dry_run=True))
    if at is None:
        return found
    paths = [match.path for part in found for match in part.matched]
    paths += [rejection.path for part in found for rejection in part.rejected]
    chosen = {path for path in paths if path.startswith(f"{at}.") or matches([at], path)}
    if not chosen:
        near = difflib.get_close_matches(at, paths, n=3, cutoff=0.3)
        hint = f" Nearest candidates: {', '.join(dict.fromkeys(near))}." if near else ""
        raise UsageError(f"No candidate at '{at}': nothing there looks like a {found[0].looks_for}.{hint}")
    return [
        Explanation(
            part.name,
            part.looks_for,
            [match for match in part.matched if match.path in chosen],
            [rejection for rejection in part.rejected if rejection.path in chosen],
        )
        for part in found
    ]

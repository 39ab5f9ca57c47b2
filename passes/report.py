"""What a pass did, as data: for the diff, for the saved artifact, and for programs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import TypeAdapter

from surgeon.graph.snapshot import GraphDiff
from surgeon.graph.traced import TracedGraph
from surgeon.measure.meter import Cost
from surgeon.sites.ffn import FFN
from surgeon.sites.rejection import Rejection
from surgeon.training.loop import FitReport


@dataclass(frozen=True)
class SiteChange:
    """One rewritten site.

    parameters, multiply_adds: (before, after), the multiply-adds for one token and every expert running.
    executed: share of the site's expert multiply-adds that ran on the example inputs, None without experts.
    made: paths of the modules that the pass put in.
    output: names of the node that gave the site's output before and of the one that gives it after.
    """

    path: str
    before: str
    after: str
    parameters: tuple[int, int]
    multiply_adds: tuple[int, int]
    output: tuple[str, str]
    made: tuple[str, ...] = ()
    executed: float | None = None

    @classmethod
    def same_cost(cls, graph: TracedGraph, site: FFN, after: str, *, made: tuple[str, ...] = ()) -> SiteChange:
        """The change of a feed-forward layer that keeps its weights and the node that gives its output.

        after: what it is now, in words.
        """
        count, cost, output = site.parameters(graph), site.multiply_adds, site.calls[-1].output.name
        return cls(site.path, site.describe, after, (count, count), (cost, cost), (output, output), made)


@dataclass(frozen=True)
class PassReport:
    """What one pass did.

    matched: paths of the rewritten sites. rejected: the candidates left as they were.
    max_error: largest difference of the graph's outputs across the pass, relative to the largest output; None if it
    was not measured. preserved: whether the pass claims that nothing changes (then max_error is within tolerance).
    notes: what the user should know, one sentence each. fit: None if nothing was trained.
    """

    name: str
    options: Mapping[str, Any]
    matched: list[str]
    rejected: tuple[Rejection, ...]
    sites: tuple[SiteChange, ...] = ()
    seconds: float = 0.0
    before: Cost | None = None
    after: Cost | None = None
    max_error: float | None = None
    preserved: bool = True
    notes: tuple[str, ...] = ()
    fit: FitReport | None = None

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> PassReport:
        """The report that `to_json` wrote."""
        return TypeAdapter(cls).validate_python(values)


def dense_layers(reports: Iterable[PassReport]) -> dict[str, float]:
    """What every layer with experts replaced: multiply-adds for one token before all passes, by the experts' path.

    Where a layer was replaced by one of another cost before it was split, the first one counts; the parts of a fused
    layer have shares of it in proportion to what replaced them.

    Args:
        reports: of all passes, in order.
    """
    found: dict[str, float] = {}
    # Of what a pass made: the multiply-adds before all passes, over its own.
    ratios: dict[str, float] = {}
    for change in (site for report in reports for site in report.sites):
        before, after = change.multiply_adds
        dense = before * ratios.get(change.path, 1.0)
        for path in change.made:
            if path not in found:  # lower puts experts where they were
                found[path] = dense
                ratios[path] = dense / after if after else 1.0
    return found


@dataclass(frozen=True)
class PassDiff:
    """One pass: its report, and what it changed in the graph."""

    report: PassReport
    graph: GraphDiff

"""Record what a pass did, for the diff, for the saved artifact, and for programs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import TypeAdapter

from surgeon.described import Fact, Facts, was_and_is
from surgeon.graph.snapshot import GraphDiff, NodeRecord
from surgeon.graph.traced import TracedGraph
from surgeon.json_values import Plain
from surgeon.measure.cost import Cost
from surgeon.sites.ffn import FFN
from surgeon.sites.rejection import Rejection
from surgeon.training.loop import FitReport


@dataclass(frozen=True)
class SiteChange(Plain):
    """One rewritten site.

    before, after: what it was and is, in words.
    facts: the same for programs, each as (before, after): the kind from "ffn" to "experts", d_in from 384 to 384,
    hidden from 1536 to None, experts from None to 48. Sites of a kind have the same facts in all passes, and a pass may
    add others.
    parameters, multiply_adds: (before, after), the multiply-adds for one token if every expert runs.
    executed: share of the site's expert multiply-adds that ran on the example inputs, None without experts.
    made: paths of the modules that the pass put in.
    output: names of the nodes that compute the site's output before and after.
    """

    path: str
    before: str
    after: str
    parameters: tuple[int, int]
    multiply_adds: tuple[int, int]
    output: tuple[str, str]
    made: tuple[str, ...] = ()
    executed: float | None = None
    facts: Mapping[str, tuple[Fact, Fact]] = field(default_factory=dict, hash=False)

    @classmethod
    def same_cost(
        cls, graph: TracedGraph, site: FFN, after: str, *, made: tuple[str, ...] = (), added: Facts | None = None
    ) -> SiteChange:
        """Describe the change of a feed-forward layer that keeps its weights and its output node.

        after: what the layer is now, in words. added: facts about it that are new.
        """
        count, cost, output = site.parameters(graph), site.multiply_adds, site.calls[-1].output.name
        facts = was_and_is(site.facts, {**site.facts, **(added or {})})
        return cls(site.path, site.describe, after, (count, count), (cost, cost), (output, output), made, facts=facts)


@dataclass(frozen=True, repr=False)
class PassReport(Plain):
    """What one pass did.

    matched: paths of the rewritten sites. rejected: the candidates that were left unchanged.
    max_error: largest difference of the graph's outputs across the pass, relative to the largest output; None if it
    was not measured. preserved: whether the pass promises the same output (then max_error is within tolerance).
    notes: what the user should know. fit: None if nothing was trained. source: where a pass that has no entry point was
    imported from, as `module:Class`; "" for others.
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
    source: str = ""

    def __repr__(self) -> str:
        total = len(self.matched) + len(self.rejected)
        return f"<PassReport {self.name}: {len(self.matched)} of {total} sites>"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PassReport:
        """Read the report that `to_dict` gave."""
        return TypeAdapter(cls).validate_python(values)


def dense_layers(reports: Iterable[PassReport]) -> dict[str, float]:
    """Return what every expert layer cost before all passes, as multiply-adds for one token, by the experts' path.

    If a layer was replaced by one of another cost before it was split, the original one counts. The parts of a fused
    layer share its cost in proportion to the costs of their replacements.

    Args:
        reports: of all passes, in order.
    """
    reports = list(reports)
    # What lets samples leave and tokens halt replaces nothing.
    leaving = ("early-exit", "halt-tokens")
    added = {path for report in reports if report.name in leaving for site in report.sites for path in site.made}
    found: dict[str, float] = {}
    # For each module that a pass made: the multiply-adds before all passes, divided by its own.
    ratios: dict[str, float] = {}
    for change in (site for report in reports for site in report.sites):
        before, after = change.multiply_adds
        dense = before * ratios.get(change.path, 1.0)
        for path in change.made:
            if path not in found and path not in added:  # lower puts experts where they were
                found[path] = dense
                ratios[path] = dense / after if after else 1.0
    return found


@dataclass(frozen=True)
class PassDiff(Plain):
    """The report of one pass, and what the pass changed in the graph.

    after: the nodes after the pass, if the graph was then saved and loaded, which gives nodes other names; else None.
    """

    report: PassReport
    graph: GraphDiff
    after: tuple[NodeRecord, ...] | None = field(default=None, repr=False)

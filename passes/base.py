"""Run a pass: explain, match, rewrite, fit, verify and report. A pass that fails changes nothing."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule

from surgeon.data.data import Data
from surgeon.errors import PassError, SurgeonError, UsageError
from surgeon.graph.given import check_graph
from surgeon.graph.ownership import adopt_changes
from surgeon.graph.patterns import matches
from surgeon.graph.traced import TracedGraph, tidy
from surgeon.graph.weights import free_unused
from surgeon.passes.contract import AnySite, Contract, FitContext, Seen, Site, SiteRefused
from surgeon.passes.options import check_patterns
from surgeon.passes.report import PassReport, SiteChange
from surgeon.passes.verification import expect, verify
from surgeon.progress import Progress
from surgeon.sites.rejection import Rejection
from surgeon.tracing.trace import adopt
from surgeon.training.loop import FitReport, RunSettings, start_alike

REWRITING = "rewriting layers"
"""The name of the progress of a pass that takes long before it trains, if it does."""
_LONG = 1.0  # seconds


@dataclass(frozen=True, kw_only=True)
class Pass(Contract[Site, Seen]):
    """A pass that can be run. `surgeon.passes.contract.Contract` describes what its author writes."""

    def explain(self, graph: GraphModule) -> tuple[list[Site], list[Rejection]]:
        """Find the sites that this pass would change. Reject the other candidates with the first condition that failed.

        Raises:
            UsageError: a pattern of `only` or `skip` matches no candidate, or it is no graph of ATen ops.
        """
        check_graph(graph, self.name)
        sites, rejected = self.find(graph)
        paths = _paths(sites, rejected)
        for name in ("only", "skip") if paths else ():
            check_patterns(f"{self.name}.{name}", getattr(self, name), paths)
        matched = []
        for site in sites:
            if not self._chosen(site.path):
                continue
            rejection = self.match(graph, site)
            if rejection is None:
                matched.append(site)
            else:
                rejected.append(dataclasses.replace(rejection, path=site.path))
        return matched, [rejection for rejection in rejected if self._chosen(rejection.path)]

    def apply(
        self, graph: GraphModule, *, inputs: Any = None, data: Any = None, settings: RunSettings | None = None
    ) -> PassReport:
        """Run this pass on a graph of ATen ops, in place. If anything fails, the graph stays as it was.

        Args:
            graph: from `surgeon.trace` or `torch.export`. Its parameters may be shared with a model: they are never
                changed, because training works on copies.
            inputs: example inputs for verification. Without them nothing is measured, and the report says so.
            data: training data of any kind that `Data.of` takes.

        Raises:
            PassError, VerificationError: the message names pass, site and difference.
            UsageError: an option does not fit the graph, or it is no graph of ATen ops.
        """
        check_graph(graph, self.name)
        work = adopt(graph)
        report = self.run(
            work, inputs=inputs, data=None if data is None else Data.of(data), settings=settings or RunSettings()
        )
        adopt_changes(graph, work)
        return report

    def run(self, graph: TracedGraph, *, inputs: Any, data: Data | None, settings: RunSettings) -> PassReport:
        """Run on a graph that may be left half-changed if something fails; the pipeline gives a copy."""
        started = time.monotonic()
        tell = settings.progress or _untold
        tell(Progress("finding layers", 0, 0))
        before = adopt(graph)
        matched, rejected = self.explain(graph)
        self._check_options(matched, rejected)
        expected = expect(before, matched, inputs, settings)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            changes, refused = self._rewrite_all(graph, matched, None if settings.dry_run else data, settings)
            matched = [site for site in matched if site.path not in refused]
            rejected.extend(refused.values())
            fitted = None
            if matched and data is not None and self.will_fit and not settings.dry_run:
                fitted = self._fit(graph, before, matched, changes, data, settings)
        tell(Progress("verifying", 0, 0))
        preserved = self.keeps_output(fitted is not None)
        found = verify(self.name, expected, graph, changes, preserved=preserved)
        notes = list(self.finish(graph, matched, changes, fitted))
        if inputs is None:
            notes.append("Not verified and not measured: no example inputs were given.")
        elif settings.verify == "off":
            notes.append("Not verified: verification was switched off.")
        spared = settings.dry_run and data is not None  # there is nothing to advise: a run with this data trains
        if matched and fitted is None and not spared and self.untrained and (self.will_fit or not self.preserves):
            notes.append(self.untrained)
        return PassReport(
            name=self.name,
            options=self.options(),
            matched=[site.path for site in matched],
            rejected=tuple(rejected),
            sites=tuple(dataclasses.replace(change, executed=found.share(change)) for change in changes),
            seconds=round(time.monotonic() - started, 3),
            before=found.before,
            after=found.after,
            max_error=found.max_error,
            preserved=preserved,
            notes=tuple(notes),
            fit=fitted,
        )

    def options(self) -> dict[str, Any]:
        """The options as plain values, without those that have their default."""
        return {
            field.name: list(value) if isinstance(value, tuple) else value
            for field in dataclasses.fields(self)
            if (value := getattr(self, field.name)) != field.default
        }

    def _check_options(self, matched: Sequence[Site], rejected: Sequence[Rejection]) -> None:
        """Refuse options that fit no site, before anything is changed."""
        if not matched:
            misfit = next((rejection for rejection in rejected if rejection.code in self.wrong_options), None)
            if misfit is not None:
                raise UsageError(f"{misfit.path}: {misfit.reason}")
            return
        for field in dataclasses.fields(self):
            if isinstance(value := getattr(self, field.name), dict):
                check_patterns(f"{self.name}.{field.name}", value, _paths(matched, rejected))

    def _rewrite_all(
        self, graph: TracedGraph, sites: Sequence[Site], data: Data | None, settings: RunSettings
    ) -> tuple[list[SiteChange], dict[str, Rejection]]:
        """Rewrite the sites. Return the changes, and the refusals by path of sites that turned out to be unsuitable."""
        seen = self.observe(graph, sites, data, settings)
        changes, refused = [], {}
        held = list(graph.parameters()) if settings.consume else []
        tell, started = settings.progress or _untold, time.monotonic()
        tell(Progress(REWRITING, 0, 0))
        for number, site in enumerate(sites):
            if time.monotonic() - started > _LONG:
                tell(Progress(REWRITING, number, len(sites)))
            try:
                # A pass whose `Seen` is not None has observed every site.
                changes.append(self.rewrite(graph, site, seen.get(site.path)))  # type: ignore[arg-type]
            except SiteRefused as unsuitable:
                refused[site.path] = dataclasses.replace(unsuitable.rejection, path=site.path)
            except Exception as error:
                raise PassError(f"{self.name} failed at {site.path}: {_words(error)}") from error
            if settings.consume:
                held = free_unused(graph, held)
        if time.monotonic() - started > _LONG:
            tell(Progress(REWRITING, len(sites), len(sites)))
        tidy(graph)
        return changes, refused

    def _fit(
        self,
        graph: TracedGraph,
        before: TracedGraph,
        matched: Sequence[Site],
        changes: Sequence[SiteChange],
        data: Data,
        settings: RunSettings,
    ) -> FitReport | None:
        paths = {site.path for site in matched}
        # The same sites as nodes of the graph before the pass.
        sites = [site for site in self.find(before)[0] if site.path in paths]
        start_alike(graph, [path for change in changes for path in change.made], settings)
        try:
            return self.fit(FitContext(graph, before, tuple(zip(sites, changes, strict=True)), data, settings))
        except SurgeonError:
            raise
        except Exception as error:
            raise PassError(f"{self.name} failed during training: {_words(error)}") from error

    def _chosen(self, path: str) -> bool:
        return (not self.only or matches(self.only, path)) and not matches(self.skip, path)


def _untold(_: Progress) -> None:
    """Tell no one."""


def _paths(sites: Iterable[AnySite], rejected: Iterable[Rejection]) -> list[str]:
    """The paths of all candidates, each once."""
    return list(dict.fromkeys([*(site.path for site in sites), *(rejection.path for rejection in rejected)]))


def _words(error: Exception) -> str:
    return str(error) if isinstance(error, SurgeonError) else f"{type(error).__name__}: {error}"

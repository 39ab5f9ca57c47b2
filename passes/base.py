"""What every pass has in common: find sites, match, rewrite, fit, verify, report. A failing pass changes nothing."""

from __future__ import annotations

import dataclasses
import fnmatch
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Literal, TypeVar

import torch
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from surgeon.data.data import Data
from surgeon.errors import PassError, SurgeonError, UsageError, VerificationError
from surgeon.graph.agreement import call_reproducibly, relative_error, tolerance_for
from surgeon.graph.calls import as_args_kwargs
from surgeon.graph.ownership import adopt_changes
from surgeon.graph.traced import TracedGraph, tidy
from surgeon.measure.meter import Cost, LayerRun, measure
from surgeon.moe.site import MoESite
from surgeon.passes.options import option
from surgeon.passes.report import PassReport, SiteChange
from surgeon.passes.verification import _first_difference, _other_inputs
from surgeon.sites.ffn import FFN
from surgeon.sites.linear_site import LinearSite
from surgeon.sites.rejection import Rejection
from surgeon.tracing.trace import adopt, is_aten_graph
from surgeon.training.loop import FitReport, RunSettings, start_alike

Site = TypeVar("Site", FFN, LinearSite, MoESite)
SiteKind = Literal["ffn", "linear", "moe"]


@dataclass(frozen=True)
class FitContext(Generic[Site]):
    """What a pass trains with, once it has rewritten its sites.

    graph: the rewritten graph. before: the graph as it was before the pass. changes: every rewritten site, as it is in
    `before`, with what was made of it. data: to train on.
    """

    graph: TracedGraph
    before: TracedGraph
    changes: Sequence[tuple[Site, SiteChange]]
    data: Data
    settings: RunSettings


@dataclass(frozen=True, kw_only=True)
class Pass(ABC, Generic[Site]):
    """One rewriting of a graph. Its fields are its options.

    A subclass says what it works on and what it promises:
        name: as on the command line.
        works_on: the kind of site; "moe" can only exist after a pass that `makes` it.
        makes: the kind of site it leaves behind, if another than it took.
        must_precede: passes that cannot run before this one, by name.
        preserves: whether the graph computes the same before and after, up to rounding.
        needs_data: whether it is useless without data; trains: whether it fits something when it has data.
    """

    name: ClassVar[str]
    works_on: ClassVar[SiteKind]
    makes: ClassVar[SiteKind | None] = None
    must_precede: ClassVar[frozenset[str]] = frozenset()
    preserves: ClassVar[bool] = True
    needs_data: ClassVar[bool] = False
    trains: ClassVar[bool] = False
    untrained: ClassVar[str] = ""

    only: tuple[str, ...] = option((), "Paths of the sites to change, patterns with * allowed. All by default.")
    skip: tuple[str, ...] = option((), "Paths of the sites to leave as they are, patterns with * allowed.")

    @abstractmethod
    def find(self, graph: GraphModule) -> tuple[Sequence[Site], list[Rejection]]:
        """All candidates, and what was refused already while looking for them."""

    @abstractmethod
    def match(self, graph: GraphModule, site: Site) -> str | None:
        """Why this site cannot be changed, in words for the user; None if it can."""

    def observe(
        self, graph: TracedGraph, sites: Sequence[Site], data: Data | None, settings: RunSettings
    ) -> Mapping[str, Any]:
        """What rewriting needs to know beyond each site itself, by path: of the other sites, or of the data.

        Raises:
            UsageError: the options need data, and there is none.
        """
        return {}

    @abstractmethod
    def rewrite(self, graph: TracedGraph, site: Site, seen: Any = None) -> SiteChange:
        """Change one site in place, given what `observe` said of it."""

    def fit(self, context: FitContext[Site]) -> FitReport | None:
        """Train what the rewritten graph needs, in place; None if there is nothing to train."""
        return None

    def finish(
        self, graph: TracedGraph, sites: Sequence[Site], changes: Sequence[SiteChange], fit: FitReport | None
    ) -> tuple[str, ...]:
        """Last touches after verification, given what `fit` reported if it ran; returns notes for the user."""
        return ()

    @property
    def why_data(self) -> str:
        """Why this run cannot do without data to fit on, "" if it can."""
        return "without training it is of no use" if self.needs_data else ""

    @property
    def will_fit(self) -> bool:
        """Whether this run would fit something if it had data."""
        return self.trains

    def keeps_output(self, fitted: bool) -> bool:
        """Whether this run promises the same output as before."""
        return self.preserves

    def check(self, matched: Sequence[Site], rejected: Sequence[Rejection]) -> None:
        """Refuse the run as a whole, before anything is changed, if an option fits no site.

        Raises:
            UsageError: with the values that would fit.
        """

    def explain(self, graph: GraphModule) -> tuple[list[Site], list[Rejection]]:
        """The sites this pass would change, and every other candidate with the first condition that failed.

        Raises:
            UsageError: `only` or `skip` names no candidate at all.
        """
        sites, rejected = self.find(graph)
        paths = _paths(sites, rejected)
        for name in ("only", "skip") if paths else ():
            self._check_patterns(name, getattr(self, name), paths)
        matched = []
        for site in sites:
            if not self._chosen(site.path):
                continue
            reason = self.match(graph, site)
            if reason is None:
                matched.append(site)
            else:
                rejected.append(Rejection(site.path, reason))
        return matched, [rejection for rejection in rejected if self._chosen(rejection.path)]

    def apply(
        self, graph: GraphModule, *, inputs: Any = None, data: Any = None, settings: RunSettings | None = None
    ) -> PassReport:
        """Run this pass on a graph of ATen ops, in place; if anything fails the graph stays as it was.

        Args:
            graph: from `surgeon.trace` or `torch.export`. Its parameters may be shared with a model: they are never
                changed, training works on copies.
            inputs: example inputs for verification; without them nothing is measured and the report says so.
            data: what to train on, anything `Data.of` takes.

        Raises:
            PassError, VerificationError: the message names pass, site and difference.
            UsageError: an option does not fit the graph.
        """
        if not is_aten_graph(graph):
            raise UsageError(f"{self.name} works on a graph of ATen ops: pass the model through surgeon.trace first.")
        work = adopt(graph)
        report = self.run(
            work, inputs=inputs, data=None if data is None else Data.of(data), settings=settings or RunSettings()
        )
        adopt_changes(graph, work)
        return report

    def run(self, graph: TracedGraph, *, inputs: Any, data: Data | None, settings: RunSettings) -> PassReport:
        """The body of `apply` on a graph that may be left half-changed on failure (the pipeline gives a copy)."""
        started = time.monotonic()
        before = adopt(graph)
        matched, rejected = self.explain(graph)
        self.check(matched, rejected)
        if matched:
            for field in dataclasses.fields(self):
                if isinstance(value := getattr(self, field.name), dict):
                    self._check_patterns(field.name, value, _paths(matched, rejected))
        changes: list[SiteChange] = []
        fit_report = None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            seen = self.observe(graph, matched, None if settings.dry_run else data, settings)
            for site in matched:
                try:
                    changes.append(self.rewrite(graph, site, seen.get(site.path)))
                except Exception as error:
                    raise PassError(f"{self.name} failed at {site.path}: {_words(error)}") from error
            tidy(graph)
            if matched and data is not None and self.will_fit and not settings.dry_run:
                sites = self._sites_in(before, matched)
                start_alike(graph, [path for change in changes for path in change.made], settings)
                try:
                    pairs = tuple(zip(sites, changes, strict=True))
                    fit_report = self.fit(FitContext(graph, before, pairs, data, settings))
                except SurgeonError:
                    raise
                except Exception as error:
                    raise PassError(f"{self.name} failed while it was fitted: {_words(error)}") from error
        preserved = self.keeps_output(fit_report is not None)
        cost, max_error, layers = self._verify(before, graph, changes, inputs, preserved, settings)
        notes = list(self.finish(graph, matched, changes, fit_report))
        if inputs is None:
            notes.append("Not verified and not measured: no example inputs were given.")
        elif settings.verify == "off":
            notes.append("Not verified: verification was switched off.")
        if matched and fit_report is None and self.untrained and (self.will_fit or not self.preserves):
            notes.append(self.untrained)
        return PassReport(
            name=self.name,
            options=self.options(),
            matched=[site.path for site in matched],
            rejected=[(rejection.path, rejection.reason) for rejection in rejected],
            sites=tuple(dataclasses.replace(c, executed=self._share(graph, c.path, layers)) for c in changes),
            seconds=round(time.monotonic() - started, 3),
            before=cost[0],
            after=cost[1],
            max_error=max_error,
            preserved=preserved,
            notes=tuple(notes),
            fit=fit_report,
        )

    def options(self) -> dict[str, Any]:
        """The options as plain values, those at their default left out."""
        return {
            field.name: list(value) if isinstance(value, tuple) else value
            for field in dataclasses.fields(self)
            if (value := getattr(self, field.name)) != field.default
        }

    def _check_patterns(self, name: str, patterns: Iterable[str], paths: Sequence[str]) -> None:
        """Refuse an option with a pattern that is none of the paths.

        Raises:
            UsageError: with the pattern and the paths there are.
        """
        for pattern in patterns:
            if not any(fnmatch.fnmatchcase(path, pattern) for path in paths):
                there = ", ".join(filter(None, paths))
                raise UsageError(f"{self.name}.{name}: no site is called '{pattern}'. There are: {there}.")

    def _chosen(self, path: str) -> bool:
        def matches(patterns: tuple[str, ...]) -> bool:
            return any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)

        return (not self.only or matches(self.only)) and not matches(self.skip)

    def _sites_in(self, graph: TracedGraph, sites: Sequence[Site]) -> list[Site]:
        """The same sites as nodes of another copy of the graph."""
        paths = {site.path for site in sites}
        return [site for site in self.find(graph)[0] if site.path in paths]

    def _share(self, graph: TracedGraph, path: str, layers: dict[str, LayerRun]) -> float | None:
        return next(
            (layer.share for moe, layer in layers.items() if moe == path or moe.rpartition(".")[0] == path), None
        )

    def _verify(
        self,
        before: TracedGraph,
        after: TracedGraph,
        changes: Sequence[SiteChange],
        inputs: Any,
        preserved: bool,
        settings: RunSettings,
    ) -> tuple[tuple[Cost | None, Cost | None], float | None, dict[str, LayerRun]]:
        """Costs on both sides, the difference between the outputs, and the executed share of every expert layer."""
        if inputs is None:
            return (None, None), None, {}
        args, kwargs = as_args_kwargs(inputs)
        training = after.training
        error = None
        # The two share modules with the graph of whoever called: their modes are put back whatever happens.
        try:
            before.eval()
            after.eval()
            cost_before, _ = measure(before, args, kwargs)
            cost_after, layers = measure(after, args, kwargs)
            if settings.verify != "off":
                error = self._compare(before, after, changes, args, kwargs, preserved)
                if settings.verify == "full":
                    for trial in range(3):
                        noisy = _other_inputs(args, kwargs, trial)
                        error = max(error, self._compare(before, after, changes, *noisy, preserved))
        finally:
            before.train(training)
            after.train(training)
        return (cost_before, cost_after), error, layers

    def _compare(
        self,
        before: TracedGraph,
        after: TracedGraph,
        changes: Sequence[SiteChange],
        args: Any,
        kwargs: Any,
        preserved: bool,
    ) -> float:
        expected = call_reproducibly(before, args, kwargs)
        actual = call_reproducibly(after, args, kwargs)
        error = relative_error(actual, expected)
        tolerance = tolerance_for(expected, before)
        if preserved and not error <= tolerance:
            where = _first_difference(before, after, changes, args, kwargs, tolerance)
            raise VerificationError(
                f"{self.name} must not change what the graph computes, but the output differs by {error:.1e} relative "
                f"(accepted: {tolerance:.0e}){where}. The graph is as it was before {self.name}."
            )
        if not preserved and not all(
            bool(torch.isfinite(leaf).all())
            for leaf, old in zip(pytree.tree_leaves(actual), pytree.tree_leaves(expected), strict=True)
            if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() and bool(torch.isfinite(old).all())
        ):
            raise VerificationError(f"{self.name} leaves values that are not finite. The graph is as it was before.")
        return error


def _paths(sites: Iterable[FFN | LinearSite | MoESite], rejected: Iterable[Rejection]) -> list[str]:
    """The paths of all candidates, each once."""
    return list(dict.fromkeys([*(site.path for site in sites), *(rejection.path for rejection in rejected)]))


def _words(error: Exception) -> str:
    return str(error) if isinstance(error, SurgeonError) else f"{type(error).__name__}: {error}"

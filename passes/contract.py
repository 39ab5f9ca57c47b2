"""The contract of a pass. Its author says what it works on and what it promises, and how it rewrites a site.

`surgeon.passes.base.Pass` adds what the pipeline does with a pass. `docs/passes.md` shows a complete one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Literal, TypeAlias, cast

from torch.fx import GraphModule
from typing_extensions import TypeVar

from surgeon.data.data import Data
from surgeon.dynamic.site import find_dynamic
from surgeon.exits.blocks import BlockEnd
from surgeon.exits.halting import HaltSite
from surgeon.exits.site import ExitSite
from surgeon.graph.traced import TracedGraph
from surgeon.inputs.skipping import SkippingSite
from surgeon.moe.site import MoESite, find_moes
from surgeon.passes.options import check_values, option
from surgeon.passes.report import SiteChange
from surgeon.sites.ffn import FFN
from surgeon.sites.linear_site import LinearSite
from surgeon.sites.rejection import Rejection
from surgeon.sites.search import find_all_linears, find_ffns, find_linear_sites
from surgeon.sites.stream import Stream
from surgeon.sites.values import ValueHeads
from surgeon.training.loop import FitReport, RunSettings

AnySite: TypeAlias = FFN | LinearSite | MoESite | SkippingSite | ExitSite | HaltSite | BlockEnd | Stream | ValueHeads
Site = TypeVar("Site", bound=AnySite)
Seen = TypeVar("Seen", default=Any)
"""What a pass has to know about a site beyond the site itself. Most passes need nothing more and get None."""
SiteKind = Literal["ffn", "linear", "any-linear", "moe", "dynamic", "block", "stream"]
"""What a pass works on. "linear": linear layers outside feed-forward layers and heads. "any-linear": all of them.
"dynamic": what skips work by tau: experts, layers that skip inputs or neurons, early exits, and token halting.
"block": places behind the blocks of a classifier, and "stream": residual streams and values of attention. A pass finds
these itself."""


class SiteRefused(Exception):  # noqa: N818  (not an error: the run goes on without the site)
    """Raised by `rewrite`, before it changes anything, if a site turns out to be unsuitable. The site is refused."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.rejection = Rejection(code, reason)


@dataclass(frozen=True)
class FitContext(Generic[Site]):
    """What a pass trains with after it has rewritten its sites.

    graph: the rewritten graph. before: the graph before the pass. changes: every rewritten site, as it is in `before`,
    with its change. data: the training data.
    """

    graph: TracedGraph
    before: TracedGraph
    changes: Sequence[tuple[Site, SiteChange]]
    data: Data
    settings: RunSettings


@dataclass(frozen=True, kw_only=True)
class Contract(ABC, Generic[Site, Seen]):
    """A way to rewrite a graph. The fields of a subclass are its options, and its docstring is its help.

    A subclass says what it works on and what it promises:
        name: its name on the command line.
        works_on: the kind of site. "moe" and "dynamic" sites exist only after a pass that `makes` them.
        makes: the kind of site that it leaves behind, if that is not the kind that it works on.
        must_precede: names of passes that cannot run before this one.
        preserves: whether the output stays the same, up to rounding. This is checked.
        needs_data: whether it is useless without data. trains: whether it fits something when it has data.
        calibrates: whether it looks at values of the model on the data, if there is data, without training.
        untrained: a note for the user if nothing was fitted.
        wrong_options: codes of rejections which mean that an option fits no site. If no site matches, the first
            rejection with such a code is raised as an error in the options.

    A subclass has to define `rewrite`. It may also choose among sites (`match`), look at the data first (`observe`),
    train (`fit`), and return notes at the end (`finish`).
    """

    name: ClassVar[str]
    works_on: ClassVar[SiteKind]
    makes: ClassVar[SiteKind | None] = None
    must_precede: ClassVar[frozenset[str]] = frozenset()
    preserves: ClassVar[bool] = True
    needs_data: ClassVar[bool] = False
    trains: ClassVar[bool] = False
    calibrates: ClassVar[bool] = False
    untrained: ClassVar[str] = ""
    wrong_options: ClassVar[frozenset[str]] = frozenset()

    only: tuple[str, ...] = option(
        (), "Paths of the sites to change. Patterns with * are allowed. By default all sites."
    )
    skip: tuple[str, ...] = option((), "Paths of the sites to leave unchanged. Patterns with * are allowed.")

    def __post_init__(self) -> None:
        check_values(self)

    def find(self, graph: GraphModule) -> tuple[Sequence[Site], list[Rejection]]:
        """Find all candidates of the kind that the pass works on, and what the search itself rejected.

        Returns:
            The candidates in topological order, and the rejections, with paths.
        """
        if self.works_on == "ffn":
            sites, rejected = find_ffns(graph)
            return cast("list[Site]", sites), [*self._split_already(graph), *rejected]
        if self.works_on == "linear":
            return cast("tuple[list[Site], list[Rejection]]", find_linear_sites(graph))
        if self.works_on == "any-linear":
            return cast("tuple[list[Site], list[Rejection]]", find_all_linears(graph))
        if self.works_on == "moe":
            return cast("list[Site]", find_moes(graph)), []
        if self.works_on == "dynamic":
            return cast("list[Site]", find_dynamic(graph)), []
        raise NotImplementedError(f"{self.name} works on {self.works_on}, so it has to define find")

    def _split_already(self, graph: GraphModule) -> list[Rejection]:
        """Refuse the feed-forward layers that are experts by now: no search finds what they were."""
        code, reason = "has-experts", f"it has experts: run {self.name} before the pass that makes them"
        if self.makes == "moe":
            code, reason = "already-done", "it already has experts"
        return [
            Rejection(code, reason, site.path.rpartition(".")[0], site.nodes[0].name if site.nodes else "")
            for site in find_moes(graph)
        ]

    def match(self, graph: GraphModule, site: Site) -> Rejection | None:
        """Say why this site cannot be changed, or return None if it can.

        Args:
            graph: the graph as it is, not to be changed. site: one that `find` returned.
        """
        return None

    def observe(
        self, graph: TracedGraph, sites: Sequence[Site], data: Data | None, settings: RunSettings
    ) -> Mapping[str, Seen]:
        """Collect, by path, what rewriting a site needs to know about the other sites or about the data.

        Args:
            graph: the graph as it is, not to be changed. sites: those that match.
            data: None if there is none. settings: seed, progress and the like.

        Raises:
            UsageError: the options need data, but there is none.
        """
        return {}

    @abstractmethod
    def rewrite(self, graph: TracedGraph, site: Site, seen: Seen) -> SiteChange:
        """Rewrite one site in place.

        Args:
            graph: a copy that the pass may change. Sites are rewritten one after the other.
            seen: what `observe` returned for the site, None if nothing.

        Returns:
            What the site was and is, in words and numbers.

        Raises:
            SiteRefused: only the data or the weights show that the site cannot be rewritten. Nothing was changed.
        """

    def fit(self, context: FitContext[Site]) -> FitReport | None:
        """Train the rewritten graph in place. Return None if there is nothing to train.

        Raises:
            PassError: the training failed, for example since the loss is not finite.
        """
        return None

    def finish(
        self, graph: TracedGraph, sites: Sequence[Site], changes: Sequence[SiteChange], fit: FitReport | None
    ) -> tuple[str, ...]:
        """Make last changes after verification and return notes for the user. `fit`: what `fit` returned, if it ran."""
        return ()

    @property
    def why_data(self) -> str:
        """Why this run needs data to fit on; "" if it does not."""
        return "it is useless without training" if self.needs_data else ""

    @property
    def will_fit(self) -> bool:
        """Whether this run would fit something if it had data."""
        return self.trains

    def keeps_output(self, fitted: bool) -> bool:
        """Whether this run promises the same output as before. `fitted`: whether something was trained."""
        return self.preserves

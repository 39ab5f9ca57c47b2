"""What the author of a pass writes: what it works on, what it promises, and how one site is rewritten.

`surgeon.passes.base.Pass` adds what the pipeline does with it. `docs/passes.md` shows a whole pass.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Literal, cast

from torch.fx import GraphModule
from typing_extensions import TypeVar

from surgeon.data.data import Data
from surgeon.graph.traced import TracedGraph
from surgeon.moe.site import MoESite, find_moes
from surgeon.passes.options import check_values, option
from surgeon.passes.report import SiteChange
from surgeon.sites.ffn import FFN
from surgeon.sites.linear_site import LinearSite
from surgeon.sites.rejection import Rejection
from surgeon.sites.search import find_ffns, find_linear_sites
from surgeon.training.loop import FitReport, RunSettings

Site = TypeVar("Site", bound=FFN | LinearSite | MoESite)
Seen = TypeVar("Seen", default=Any)
"""What a pass has to know of a site beyond the site itself; most need nothing and are given None."""
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
class Contract(ABC, Generic[Site, Seen]):
    """One rewriting of a graph. Its fields are its options, its docstring is its help.

    A subclass says what it works on and what it promises:
        name: as on the command line.
        works_on: the kind of site; "moe" can only exist after a pass that `makes` it.
        makes: the kind of site it leaves behind, if another than it took.
        must_precede: passes that cannot run before this one, by name.
        preserves: whether the graph computes the same before and after, up to rounding. It is checked.
        needs_data: whether it is useless without data. trains: whether it fits something when it has data.
        untrained: a note for the user where nothing was fitted.
        wrong_options: codes of rejections that mean an option fits no site: if nothing matches, the first of them is
            an error in the options.

    It has to define `rewrite`. The rest is for passes that choose among sites (`match`), look at the data first
    (`observe`), train (`fit`) or have something to say at the end (`finish`).
    """

    name: ClassVar[str]
    works_on: ClassVar[SiteKind]
    makes: ClassVar[SiteKind | None] = None
    must_precede: ClassVar[frozenset[str]] = frozenset()
    preserves: ClassVar[bool] = True
    needs_data: ClassVar[bool] = False
    trains: ClassVar[bool] = False
    untrained: ClassVar[str] = ""
    wrong_options: ClassVar[frozenset[str]] = frozenset()

    only: tuple[str, ...] = option((), "Paths of the sites to change, patterns with * allowed. All by default.")
    skip: tuple[str, ...] = option((), "Paths of the sites to leave as they are, patterns with * allowed.")

    def __post_init__(self) -> None:
        check_values(self)

    def find(self, graph: GraphModule) -> tuple[Sequence[Site], list[Rejection]]:
        """All candidates of the kind that it works on, and what was refused already while looking for them."""
        if self.works_on == "ffn":
            return cast("tuple[list[Site], list[Rejection]]", find_ffns(graph))
        if self.works_on == "linear":
            return cast("tuple[list[Site], list[Rejection]]", find_linear_sites(graph))
        return cast("list[Site]", find_moes(graph)), []

    def match(self, graph: GraphModule, site: Site) -> Rejection | None:
        """Why this site cannot be changed; None if it can."""
        return None

    def observe(
        self, graph: TracedGraph, sites: Sequence[Site], data: Data | None, settings: RunSettings
    ) -> Mapping[str, Seen]:
        """What rewriting needs to know beyond each site itself, by path: of the other sites, or of the data.

        Raises:
            UsageError: the options need data, and there is none.
        """
        return {}

    @abstractmethod
    def rewrite(self, graph: TracedGraph, site: Site, seen: Seen) -> SiteChange:
        """Change one site in place, given what `observe` said of it (None where it said nothing)."""

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
        """Whether this run promises the same output as before; fitted: whether something was trained."""
        return self.preserves

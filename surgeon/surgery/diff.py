"""What a pipeline changed, pass by pass."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from surgeon.graph.snapshot import NodeRecord, undone
from surgeon.json_values import Plain
from surgeon.passes.report import PassDiff
from surgeon.text.diff import Detail, diff_text


@dataclass(frozen=True, repr=False)
class Diff(Plain):
    """What each pass changed between a model and its rewritten graph. `str()` gives it as plain text.

    `to_dict` gives what `diff.json` in a saved surgery holds, and what `surgeon diff --output json` prints.

    nodes: of the rewritten graph, in graph order.
    """

    passes: tuple[PassDiff, ...]
    nodes: tuple[NodeRecord, ...] = field(default=(), repr=False)

    def __repr__(self) -> str:
        return f"<Diff of {len(self.passes)} passes: {', '.join(pass_.report.name for pass_ in self.passes)}>"

    @classmethod
    def joined(cls, earlier: Sequence[PassDiff], new: Sequence[PassDiff], nodes: Iterable[NodeRecord]) -> Diff:
        """Return the diff of passes that ran before a graph was loaded (`earlier_passes`), and of those after it."""
        if new or not earlier or (kept := earlier[-1].after) is None:
            return cls((*earlier, *new), tuple(nodes))
        return cls((*earlier[:-1], replace(earlier[-1], after=None)), kept)

    def as_earlier(self) -> tuple[PassDiff, ...]:
        """Return the passes as those of a graph that was saved and loaded behind them."""
        return (*self.passes[:-1], *(replace(last, after=self.nodes) for last in self.passes[-1:]))

    def graphs(self) -> list[list[NodeRecord]]:
        """Return the nodes before the first and after every pass. Only the last ones are in graph order."""
        found = [list(self.nodes)]
        for pass_ in reversed(self.passes):
            if pass_.after is not None:
                found[-1] = list(pass_.after)
            found.append(undone(found[-1], pass_.graph))
        return found[::-1]

    def text(self, detail: Detail = "sites") -> str:
        """The diff as plain text: a line per site ("sites"), only the totals ("stat"), or every node ("full")."""
        return diff_text(self.passes, detail)

    def __str__(self) -> str:
        return self.text()

"""The result of a pipeline."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgeon.graph.snapshot import Snapshot, compare
from surgeon.graph.traced import TracedGraph
from surgeon.moe.knobs import set_tau
from surgeon.passes.report import PassDiff, PassReport
from surgeon.surgery.artifact import save
from surgeon.surgery.diff import Diff
from surgeon.surgery.origin import Origin
from surgeon.surgery.record import MeasuredQuality, make_record


@dataclass
class Surgery:
    """The result of a pipeline.

    graph: the rewritten graph, called with the model's own arguments. reports: one per pass, in order.
    inputs: the example inputs it was verified with. snapshots: the graph before the first and after every pass.
    earlier: the passes that had been run before, if the graph came from a saved surgery. quality: of the model before
    and after; None if it was not measured. data, fingerprint: the training data, in words and as a hash.
    """

    graph: TracedGraph
    reports: list[PassReport]
    inputs: Any
    snapshots: list[Snapshot]
    seed: int = 0
    data: str | None = None
    origin: Origin = field(default_factory=Origin)
    earlier: tuple[PassDiff, ...] = ()
    quality: MeasuredQuality | None = None
    fingerprint: str | None = None

    def diff(self) -> Diff:
        """What each pass changed, including the passes of an earlier surgery. `print` shows it."""
        new = (
            PassDiff(report, compare(before, after))
            for report, before, after in zip(self.reports, self.snapshots, self.snapshots[1:], strict=False)
        )
        return Diff((*self.earlier, *new))

    def set_tau(self, tau: float | dict[str, float], path: str | None = None) -> Surgery:
        """Set tau in the graph (see `surgeon.set_tau`)."""
        set_tau(self.graph, tau, path)
        return self

    def save(self, directory: str | Path, *, overwrite: bool = False) -> Path:
        """Write the graph and the record of the surgery to a directory (see `surgeon.surgery.artifact.save`)."""
        diff = self.diff()
        record = make_record(
            self.graph,
            [pass_.report for pass_ in diff.passes],
            origin=self.origin,
            seed=self.seed,
            data=self.data,
            fingerprint=self.fingerprint,
            quality=self.quality,
        )
        return save(
            self.graph,
            directory,
            inputs=self.inputs,
            record=record,
            diff=diff,
            origin=self.origin,
            overwrite=overwrite,
        )

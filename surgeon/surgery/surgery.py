"""The result of a pipeline."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from surgeon.dynamic.knobs import set_tau
from surgeon.graph.snapshot import Snapshot, compare
from surgeon.graph.traced import TracedGraph
from surgeon.passes.report import PassDiff, PassReport
from surgeon.surgery.artifact import save
from surgeon.surgery.diff import Diff
from surgeon.surgery.export import export
from surgeon.surgery.origin import Origin
from surgeon.surgery.recipe import InputFile, Recipe
from surgeon.surgery.record import MeasuredQuality, Record, make_record, repeatable
from surgeon.surgery.trials import Search


@dataclass(repr=False)
class Surgery:
    """The result of a pipeline.

    graph: the rewritten graph, called with the model's own arguments. reports: one per pass, in order.
    inputs: the example inputs it was verified with. snapshots: the graph before the first and after every pass.
    earlier: the passes that had been run before, if the graph came from a saved surgery. quality: of the model before
    and after; None if it was not measured. data, fingerprint: the training data, in words and as a hash.
    search: for the settings of the passes, if there was one. teacher: the other model that passes learned from, if any.
    model: a weak reference to the model that was given, which holds none of its memory; None if a graph was given.
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
    search: Search | None = None
    teacher: InputFile | None = None
    model: weakref.ref[nn.Module] | None = field(default=None, repr=False)

    def __repr__(self) -> str:
        passes = ", ".join(report.name for report in (*(one.report for one in self.earlier), *self.reports))
        return f"<Surgery: {passes or 'no passes'}; {self.graph!r}>"

    def diff(self) -> Diff:
        """What each pass changed, including the passes of an earlier surgery. `print` shows it."""
        new = [
            PassDiff(report, compare(before, after))
            for report, before, after in zip(self.reports, self.snapshots, self.snapshots[1:], strict=False)
        ]
        return Diff.joined(self.earlier, new, self.snapshots[-1].nodes.values())

    def set_tau(self, tau: float | dict[str, float], path: str | None = None) -> Surgery:
        """Set tau in the graph, as `surgeon.set_tau` does, and return the surgery.

        Raises:
            UsageError: as `surgeon.set_tau`.
        """
        set_tau(self.graph, tau, path)
        return self

    def save_pretrained(
        self,
        directory: str | Path,
        *,
        model: nn.Module | None = None,
        overwrite: bool = False,
        max_shard_size: str = "5GB",
    ) -> nn.Module:
        """Write the converted model as a directory of transformers, which `from_pretrained` reads and the hub takes.

        >>> surgery.save_pretrained("bert-experts")  # doctest: +SKIP
        >>> AutoModelForSequenceClassification.from_pretrained("bert-experts")  # doctest: +SKIP

        Args:
            directory: where to. It appears whole or not at all.
            model: the model that the surgery was made from. By default it is the one that was given to the pipeline, as
                long as it is in memory, else the one in the directory that it was read from.
            overwrite: replace an export that is there.
            max_shard_size: the size of the largest weight file, such as "500MB".

        Returns:
            The model that was written. It shares the graph's tensors; `surgeon.graft` makes one with its own.

        Raises:
            UsageError: the model is not one of transformers, its config describes another one, or no layer can be put
                back into it.
            SaveError: the directory has other content, or cannot be written.
            TraceError: the model cannot be traced.
            VerificationError: the model would not compute what the graph computes.
        """
        if model is None and self.model is not None:
            model = self.model()
        reports = [pass_.report for pass_ in self.diff().passes]
        return export(
            model, self.graph, reports, self.inputs, directory,
            record=self._record(), origin=self.origin, overwrite=overwrite, max_shard_size=max_shard_size, share=True,
        )  # fmt: skip

    def save(self, directory: str | Path, *, overwrite: bool = False) -> Path:
        """Write the graph and the record of the surgery to a directory, which `surgeon.load` reads in any process.

        What is written is compared with the graph on the example inputs before anything is put in place. Of several
        processes the main one writes, and the others wait for it.

        Args:
            directory: where to. It appears whole or not at all.
            overwrite: replace a saved surgery that is there.

        Returns:
            The directory.

        Raises:
            SaveError: the directory has other content, there is no space or no permission, or the graph cannot be
                exported.
            PassError: there are no example inputs.
        """
        return save(
            self.graph,
            directory,
            inputs=self.inputs,
            record=self._record(),
            diff=self.diff(),
            origin=self.origin,
            overwrite=overwrite,
        )

    @property
    def recipe(self) -> Recipe:
        """How to repeat this surgery. `Recipe.save` writes it to a YAML file."""
        return repeatable(self._record())

    def _record(self) -> Record:
        return make_record(
            self.graph,
            [pass_.report for pass_ in self.diff().passes],
            origin=self.origin,
            seed=self.seed,
            data=self.data,
            fingerprint=self.fingerprint,
            quality=self.quality,
            search=self.search,
            teacher=self.teacher,
        )

"""Run passes one after the other over a model: check their order, trace, apply, verify, take snapshots."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import nn
from torch.fx import GraphModule

from surgeon.data.batch import Data
from surgeon.data.losses import Quality
from surgeon.errors import PassError, UsageError
from surgeon.graph.snapshot import PassDiff, Snapshot, compare, snapshot
from surgeon.graph.traced import TracedGraph, fork
from surgeon.models.example_inputs import as_args_kwargs, example_inputs
from surgeon.models.source import check_finite
from surgeon.moe.module import find_moes, set_tau
from surgeon.passes import Pass
from surgeon.passes.report import PassReport, Progress
from surgeon.tracing.trace import adopt, is_aten_graph, trace
from surgeon.training.loop import Settings


@dataclass(frozen=True)
class Origin:
    """Where a model came from, for the record and for the files that are saved beside it.

    path, kind, sha256: of the input file or directory; None for a model made in Python. notes: what loading it showed.
    """

    path: str | None = None
    kind: str = "module"
    sha256: str | None = None
    config: Any = None
    tokenizer: Any = None
    processor: Any = None
    notes: tuple[str, ...] = ()


@dataclass
class Surgery:
    """The result of a pipeline.

    graph: the rewritten graph, called with the model's own arguments. reports: one per pass, in order.
    inputs: the example inputs it was verified with. snapshots: the graph before the first and after every pass.
    earlier: the passes that had been run before, if the graph came from a saved surgery. quality: of the model before
    and after, and the fingerprint of the data it was measured on; None if it was not. fingerprint: of `data`.
    """

    graph: TracedGraph
    reports: list[PassReport]
    inputs: Any
    snapshots: list[Snapshot]
    seed: int = 0
    data: str | None = None
    origin: Origin = field(default_factory=Origin)
    earlier: tuple[PassDiff, ...] = ()
    quality: tuple[Quality, Quality, str] | None = None
    fingerprint: str | None = None

    def diff(self) -> Diff:
        """What each pass changed, those of an earlier surgery included; printable."""
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
        from surgeon.surgery.artifact import save

        return save(self, directory, overwrite=overwrite)


@dataclass(frozen=True)
class Diff:
    """The pass-by-pass difference between a model and its rewritten graph. `str()` gives it as plain text."""

    passes: tuple[PassDiff, ...]

    def text(self, detail: Literal["sites", "stat", "full"] = "sites") -> str:
        """As plain text: a line per site, only the totals, or every node."""
        from surgeon.render.screen import diff_text

        return diff_text(self, detail)

    def __str__(self) -> str:
        return self.text()


class Pipeline:
    """Passes to run in order over a model or a graph.

    >>> surgery = Pipeline([Moeify(experts=4), Lower()]).run(model, inputs=inputs)  # doctest: +SKIP
    """

    def __init__(self, passes: Sequence[Pass[Any]]) -> None:
        self.passes = list(passes)

    def run(
        self,
        model: nn.Module,
        *,
        inputs: Any = None,
        data: Any = None,
        seed: int = 0,
        verify: Literal["off", "fast", "full"] = "fast",
        progress: Callable[[Progress], None] | None = None,
        on_pass: Callable[[PassDiff], None] | None = None,
        workdir: Path | None = None,
        resume: bool = False,
        dry_run: bool = False,
        origin: Origin | None = None,
    ) -> Surgery:
        """Rewrite `model` (or a graph of ATen ops), which is itself left as it was.

        Args:
            inputs: example inputs; found by themselves for Hugging Face models.
            data: what to train on (see `surgeon.data.files.Data.of`); without it nothing is trained and the reports say so.
            seed: of every random choice.
            verify: compare outputs across every pass on the example inputs ("fast"), also on others ("full"), or not.
            progress, on_pass: called during long work and after every pass.
            workdir, resume: where training keeps checkpoints, and whether to continue from them.
            dry_run: rewrite without training.

        Raises:
            UsageError: passes in an order that cannot work, a pass that needs data, options that fit no site.
            LoadError: the model has weights that are not finite.
            TraceError: the model cannot be traced faithfully.
            PassError, VerificationError: a pass failed; the message names it, and no later pass ran.
        """
        given = None if data is None else Data.of(data)
        has_moes = isinstance(model, GraphModule) and is_aten_graph(model) and bool(find_moes(model))
        self.check(has_moes=has_moes, has_data=given is not None or dry_run)
        if isinstance(model, GraphModule) and is_aten_graph(model):
            graph = adopt(model)
        else:
            if inputs is None:
                inputs = example_inputs(model, config=getattr(model, "config", None))
            check_finite(model)
            graph = trace(model, inputs)
        if origin is None:
            origin = Origin(config=getattr(model, "config", None))
        surgery = Surgery(graph, [], inputs, [snapshot(graph)], seed, given.description if given else None, origin)
        surgery.fingerprint = given.fingerprint if given else None
        surgery.earlier = graph.meta.get("earlier_passes", ())
        original = fork(graph).eval()
        for number, one in enumerate(self.passes):
            work = adopt(surgery.graph)
            place = None if workdir is None else workdir / f"{number:02d}-{one.name}"
            step = Settings(seed, verify, progress, place, resume, dry_run, original)
            report = one.run(work, inputs=inputs, data=given, settings=step)
            surgery.graph = work
            surgery.reports.append(report)
            surgery.snapshots.append(snapshot(work))
            if on_pass is not None:
                on_pass(surgery.diff().passes[-1])
        return surgery

    def check(self, *, has_moes: bool, has_data: bool) -> None:
        """Check order and requirements, before anything runs.

        Raises:
            UsageError: what is wrong and how to order the passes.
        """
        if not self.passes:
            raise UsageError("No passes to run. `surgeon passes` lists them.")
        made = {"moe"} if has_moes else set()
        for position, one in enumerate(self.passes):
            early = next((p.name for p in self.passes[:position] if p.name in one.must_precede), None)
            if early is not None:
                raise UsageError(f"{one.name} must run before {early}, which goes on from what it makes: swap them.")
            if one.works_on == "moe" and "moe" not in made:
                raise UsageError(f"{one.name} works on experts, and there are none: put moeify before it.")
            if one.why_data and not has_data:
                raise UsageError(
                    f"{one.name} needs data: {one.why_data}. Give --data, or --dry-run to see what would change."
                )
            if one.makes is not None:
                made.add(one.makes)


def inputs_of(surgery: Surgery) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The example inputs as positional and keyword arguments.

    Raises:
        PassError: there are none.
    """
    if surgery.inputs is None:
        raise PassError("This needs example inputs: pass them to Pipeline.run as inputs=…")
    return as_args_kwargs(surgery.inputs)

"""What `surgeon apply` did, for programs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from surgeon.data.quality import Quality
from surgeon.jobs.apply import Applied
from surgeon.jobs.open_model import Opened
from surgeon.measure.cost import Cost
from surgeon.passes.report import PassReport
from surgeon.surgery.trials import Search


@dataclass(frozen=True)
class BeforeAfter:
    """A quality before and after the passes."""

    before: Quality
    after: Quality


@dataclass(frozen=True)
class ApplyAnswer:
    """What `surgeon apply` did, for programs.

    directory: of the result; None for a dry run. before, after: cost on the example inputs. next: a command to go on
    with. report: the file of the report, if one was asked for.
    """

    model: str
    directory: Path | None
    dry_run: bool
    search: Search | None
    passes: tuple[PassReport, ...]
    before: Cost
    after: Cost
    quality: BeforeAfter | None
    agreement: tuple[Quality, ...]
    notes: tuple[str, ...]
    next: str
    seconds: float
    report: Path | None


def answer_of(applied: Applied, opened: Opened, report: Path | None) -> ApplyAnswer:
    """The result for programs. report: the file that the report was written to."""
    return ApplyAnswer(
        opened.spec,
        applied.directory,
        applied.directory is None,
        applied.surgery.search,
        tuple(applied.surgery.reports),
        applied.before,
        applied.after,
        None if applied.quality is None else BeforeAfter(*applied.quality),
        applied.agreement,
        (*opened.notes, *applied.notes),
        applied.next[0],
        round(applied.seconds, 3),
        report,
    )

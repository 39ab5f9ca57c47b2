"""Judge a model: by its task where there are labels, and by its agreement with the dense model, on the same samples."""

from __future__ import annotations

from collections.abc import Iterable, Sized
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import nn

from surgeon.data.batch import Batch
from surgeon.data.imitation import AgreementMeter
from surgeon.data.losses import QualityMeter, device_of, evaluating
from surgeon.data.quality import Quality, Scores
from surgeon.display.choose import shows_progress
from surgeon.progress import Progress, ShowProgress


@dataclass(frozen=True)
class Criteria:
    """What a model is judged by.

    task: its quality is measured on labels; None if there are none.
    blank: for the task "ctc", the class that stands for no character.
    outputs: the task that the model was made for, which tells what its outputs are: logits, hidden states, embeddings.
    """

    task: str | None
    blank: int = 0
    outputs: str | None = None


@dataclass(frozen=True)
class Verdict:
    """How a model does.

    quality: of the task, compared with the dense model if its scores are known; None without labels. scores: of the
    samples. agreement: with the dense model: top-1 and KL divergence of logits, the cosine of other outputs.
    agreed: the scores of the first agreement.
    """

    quality: Quality | None
    agreement: tuple[Quality, ...] = ()
    scores: Scores | None = None
    agreed: Scores | None = None

    @property
    def first(self) -> Quality:
        """The quality of the task, else the first agreement."""
        return self.agreement[0] if self.quality is None else self.quality

    @property
    def first_scores(self) -> Scores | None:
        """The scores of `first`."""
        return self.agreed if self.quality is None else self.scores


class Judge:
    """Adds up what a model is judged by, batch by batch."""

    def __init__(self, criteria: Criteria) -> None:
        """Raises UsageError if there is no such task."""
        self._own = None if criteria.task is None else QualityMeter(criteria.task, blank=criteria.blank)
        self._agreement = AgreementMeter(criteria.outputs)

    def add(self, outputs: Any, batch: Batch, expected: Any = None) -> None:
        """Count one batch. expected: the dense model's outputs; None leaves agreement out.

        Raises:
            DataError: the labels are missing or do not match the logits.
        """
        if self._own is not None:
            self._own.add(outputs, batch)
        if expected is not None:
            self._agreement.add(expected, outputs, batch)

    def verdict(self, dense: Scores | None = None) -> Verdict:
        """Return how the model does. dense: the dense model's scores on the same samples, to compare with.

        Raises:
            DataError: no labelled item was added.
        """
        agreed = self._agreement.scores()
        agreement, first = tuple(scores.quality() for scores in agreed), agreed[0] if agreed else None
        if self._own is None:
            return Verdict(None, agreement, agreed=first)
        scores = self._own.scores()
        return Verdict(scores.quality(dense), agreement, scores, first)


@shows_progress
def judge(
    model: nn.Module,
    batches: Iterable[Batch],
    criteria: Criteria,
    *,
    dense: nn.Module | None = None,
    scores: Scores | None = None,
    progress: ShowProgress = None,
) -> Verdict:
    """Judge a model on held-out batches, in evaluation mode and without gradients. All modes are restored.

    The criteria say which task's quality counts, and what the outputs are. Batches are moved to the model's device.

    Args:
        dense: to measure agreement with. scores: the dense model's, to compare with.
        progress: True shows it, a function is called with each `Progress`.

    Raises:
        DataError: labels are missing or do not match the model's logits, or there are no batches.
        UsageError: there is no such task, or the outputs are not what it needs.
    """
    counted = Judge(criteria)
    with ExitStack() as modes:
        for module in (model, *(() if dense is None else (dense,))):
            modes.enter_context(evaluating(module))
        total = len(batches) if isinstance(batches, Sized) else 0
        for number, item in enumerate(batches, 1):
            batch = item.to(device_of(model))
            expected = None if dense is None else dense(*batch.args, **batch.kwargs)
            counted.add(model(*batch.args, **batch.kwargs), batch, expected)
            if callable(progress):
                progress(Progress("quality", number, total))
    return counted.verdict(scores)

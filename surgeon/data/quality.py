"""Quality with what it is worth: the number of samples, a 95% interval, and the difference from the dense model.

A quality is a ratio of sums over samples, such as the loss of all tokens over their number. Samples are independent,
the tokens of one sample are not. The interval is that of a ratio of means over samples (linearised, Student's t).
Differences from the dense model are taken on the same samples, so that what is hard for both cancels.

Shares of samples, such as accuracy, are treated better where few samples differ: Wilson's interval, and for differences
that of Agresti and Min (2005), which adds half a sample to each of the four cells.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from surgeon.json_values import Plain

TELLING = 300
"""The fewest samples on which a difference is called better or worse."""

_Z = 1.959964  # of 95%


@dataclass(frozen=True)
class Change:
    """The difference of a quality from the dense model's on the same samples, with its 95% interval."""

    value: float
    low: float
    high: float
    samples: int

    @property
    def telling(self) -> bool:
        """Whether the difference is more than chance: enough samples, and an interval without zero."""
        return self.samples >= TELLING and (self.low > 0.0 or self.high < 0.0)


@dataclass(frozen=True)
class Quality(Plain):
    """How well a model does on some data.

    name: "accuracy", "exact match", "top-1 agreement", "cosine" (all at most 1), "loss per token", "KL divergence"
        (nats) or "squared error" (relative).
    value: the mean over `items`, which are samples or tokens as `unit` says. NaN logits count as a wrong class, and
        they make a loss NaN.
    samples: the number of independent samples. low, high: the 95% interval of the value; None for a single sample.
    change: the difference from the dense model on the same samples; None if that is not known.
    """

    name: str
    value: float
    higher_is_better: bool
    items: int
    unit: str
    samples: int
    low: float | None
    high: float | None
    change: Change | None = None

    def __str__(self) -> str:
        return f"{self.name} {self.value:.4g}"


@dataclass(frozen=True)
class Kind:
    """What is measured. share: whether each item is right or wrong, 1 or 0. unit: what the items are."""

    name: str
    higher_is_better: bool = True
    unit: str = "samples"
    share: bool = False


@dataclass(frozen=True, eq=False)
class Scores:
    """What a model has on each sample: float64 [N] totals, and [N] of what they are divided by."""

    kind: Kind
    totals: Tensor
    items: Tensor

    @classmethod
    def joined(cls, kind: Kind, parts: Sequence[tuple[Tensor, Tensor]]) -> Scores:
        """Join the (totals, items) of batches. Samples without items are left out."""
        totals, items = (torch.cat([part[side].double().cpu() for part in parts]) for side in (0, 1))
        kept = items > 0
        return cls(kind, totals[kept], items[kept])

    def quality(self, dense: Scores | None = None) -> Quality:
        """Return the quality, compared with the dense model's if its scores on the same samples are given."""
        value, count = float(self.totals.sum() / self.items.sum()), len(self.items)
        low, high = self._interval(value)
        found = Quality(
            self.kind.name, value, self.kind.higher_is_better, round(float(self.items.sum())), self.kind.unit, count,
            low, high,
        )  # fmt: skip
        return found if dense is None else replace(found, change=self._change(dense))

    def _interval(self, value: float) -> tuple[float, float] | tuple[None, None]:
        count = len(self.items)
        if self._single or (self.kind.share and value in (0.0, 1.0)):  # samples that are all alike have no spread
            from scipy.stats import binomtest

            found = binomtest(round(value * count), count).proportion_ci(method="wilson")
            return float(found.low), float(found.high)
        if count < 2:
            return None, None
        half = _half(self.totals - value * self.items, float(self.items.sum()))
        if self.kind.share:  # the normal distribution does not know of the bounds
            return max(0.0, value - half), min(1.0, value + half)
        return value - half, value + half

    def _change(self, dense: Scores) -> Change | None:
        """Compare on the same samples; None if the scores are of others, or of one."""
        count = len(self.items)
        if dense.kind != self.kind or not torch.equal(dense.items, self.items) or count < 2:
            return None
        difference = self.totals - dense.totals
        whole = float(self.items.sum())
        value = float(difference.sum()) / whole
        if self._single:
            better, worse = int((difference > 0).sum()), int((difference < 0).sum())
            middle, changed = (better - worse) / (count + 2), better + worse + 1
            half = _Z * math.sqrt(changed - (better - worse) ** 2 / (count + 2)) / (count + 2)
            return Change(value, middle - half, middle + half, count)
        half = _half(difference - value * self.items, whole)
        return Change(value, value - half, value + half, count)

    @property
    def _single(self) -> bool:
        """Whether each sample is one item, right or wrong."""
        return self.kind.share and bool(((self.items == 1) & ((self.totals == 0) | (self.totals == 1))).all())

    def packed(self) -> str:
        """Return the numbers as text, for a record."""
        pairs = torch.stack([self.totals, self.items], 1).float().contiguous()
        return base64.b64encode(pairs.numpy().astype("<f4").tobytes()).decode()

    @classmethod
    def unpacked(cls, text: str, kind: Kind) -> Scores:
        """Read what `packed` wrote.

        Raises:
            ValueError: the text is damaged.
        """
        content = bytearray(base64.b64decode(text, validate=True))
        if not content or len(content) % 8:
            raise ValueError("the scores are incomplete")
        pairs = torch.frombuffer(content, dtype=torch.float32).double().reshape(-1, 2)
        return cls(kind, pairs[:, 0], pairs[:, 1])


def _half(residuals: Tensor, whole: float) -> float:
    """Half the 95% interval of a ratio of sums, from the residuals of its samples."""
    from scipy.stats import t

    count = len(residuals)
    spread = float(residuals.square().sum()) * count / (count - 1)
    return float(t.ppf(0.975, count - 1)) * math.sqrt(spread) / whole if math.isfinite(spread) else math.nan

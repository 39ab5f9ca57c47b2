"""Read off what it costs to keep a quality, on a curve of quality against cost.

Between two settings the curve is a straight line. The cost that keeps a quality is the lowest at which the curve
reaches it, on the line from the next cheaper setting. The interval of a cost is a bootstrap over samples: every round
draws as many samples as there are, with replacement, and reads off again. All curves and the dense model are drawn the
same samples, so what is hard for all of them cancels. The costs of the settings themselves are not drawn again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from surgeon.data.quality import Scores

ROUNDS = 1000
_AT_ONCE = 4_000_000  # numbers of samples drawn
_INTERVAL = (0.025, 0.975)

Numbers = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


@dataclass(frozen=True)
class Kept:
    """What it costs to keep a quality, as a share of the dense model's cost.

    at_most: the cheapest setting that was measured keeps it. low, high: the 95% interval; None for a bound that cannot
    be told, because too few rounds of the bootstrap keep the quality at any cost, or because there was none.
    """

    share: float
    at_most: bool = False
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Difference:
    """A difference of two costs on the same samples, with its 95% interval as in `Kept`.

    bound: "at least" or "at most" if one of the costs is only known to be at most its value.
    """

    value: float
    low: float | None = None
    high: float | None = None
    bound: Literal["at least", "at most"] | None = None


def kept_at(costs: Sequence[float], values: Sequence[float], wanted: float, *, higher_is_better: bool) -> Kept | None:
    """Return the lowest cost at which a curve reaches a quality; None if it never does.

    Args:
        costs, values: of the settings, in any order. wanted: the quality. higher_is_better: of the quality.
    """
    sign = 1.0 if higher_is_better else -1.0
    order = sorted(range(len(costs)), key=lambda index: (costs[index], sign * values[index]))
    ordered = np.array([[sign * values[index] for index in order]])
    (found,) = _lowest(np.array([costs[index] for index in order]), ordered, np.array([sign * wanted]))
    if not np.isfinite(found):
        return None
    return Kept(float(found), at_most=bool(ordered[0, 0] >= sign * wanted))


def _lowest(costs: Numbers, values: Numbers, wanted: Numbers) -> Numbers:
    """The cost at which each row of values first reaches its wanted value, higher is better; infinity if never.

    costs: [P] in ascending order. values: [R, P]. wanted: [R].
    """
    reached = values >= wanted[:, None]
    first = reached.argmax(1)
    rows = np.arange(len(values))
    at, before = values[rows, first], values[rows, np.maximum(first - 1, 0)]
    with np.errstate(invalid="ignore", divide="ignore"):
        part = (wanted - before) / (at - before)
    # A value that is not a number, or the first setting, gives no line to go along.
    part = np.where((first == 0) | ~np.isfinite(part), 1.0, part)
    lower = costs[np.maximum(first - 1, 0)]
    return np.where(reached.any(1), lower + (costs[first] - lower) * part, np.inf)


def place(costs: Sequence[float], cost: float) -> tuple[int, int, float] | None:
    """Return where a cost lies on a curve: two settings, and the weight of the second; None if all are costlier.

    A cost above the costliest setting is that setting's: nobody has to spend more.
    """
    order = sorted(range(len(costs)), key=lambda index: costs[index])
    after = next((number for number, index in enumerate(order) if costs[index] >= cost), None)
    if after is None:
        return order[-1], order[-1], 0.0
    if costs[order[after]] == cost:
        return order[after], order[after], 0.0
    if after == 0:
        return None
    lower, upper = order[after - 1], order[after]
    return lower, upper, (cost - costs[lower]) / (costs[upper] - costs[lower])


def scores_at(costs: Sequence[float], scores: Sequence[Scores], cost: float) -> Scores | None:
    """Return the scores on the line between two settings; None if the cost is below all."""
    found = place(costs, cost)
    if found is None:
        return None
    lower, upper, weight = found
    one, other = scores[lower], scores[upper]
    return one if weight == 0.0 else Scores(one.kind, torch.lerp(one.totals, other.totals, weight), one.items)


class Resampled:
    """Costs of the curves on samples that are drawn again, the same in every round for all of them."""

    def __init__(self, dense: Scores, keep: float, scores: Sequence[Scores], *, rounds: int = ROUNDS) -> None:
        """Draw the samples.

        Args:
            dense: the scores of the dense model. keep: the factor on its quality that gives the quality to keep.
            scores: of all settings of all curves, on the same samples.
        """
        self._sign = 1.0 if dense.kind.higher_is_better else -1.0
        totals = torch.stack([dense.items, dense.totals, *(one.totals for one in scores)], 1).numpy()
        sums = _drawn_sums(totals, rounds)
        qualities = self._sign * sums[:, 1:] / sums[:, :1]
        self._wanted, self._values = keep * qualities[:, 0], qualities[:, 1:]

    def costs(self, numbers: Sequence[int], costs: Sequence[float]) -> Numbers:
        """Return the cost of each round, [R]; infinity where the quality is not reached.

        Args:
            numbers: of the settings of one curve, as they stand in `scores`. costs: theirs.
        """
        order = np.lexsort((self._values.mean(0)[list(numbers)], costs))
        return _lowest(np.array(costs)[order], self._values[:, np.array(numbers)[order]], self._wanted)


def _drawn_sums(totals: Numbers, rounds: int) -> Numbers:
    """Sums of [N, K] over samples that are drawn with replacement, [rounds, K]."""
    draw, count = np.random.default_rng(0), len(totals)
    found = []
    for start in range(0, rounds, step := max(1, _AT_ONCE // count)):
        size = min(step, rounds - start)
        found.append(draw.multinomial(count, np.full(count, 1.0 / count), size) @ totals)
    return np.concatenate(found)


def interval(values: Numbers) -> tuple[float | None, float | None]:
    """Return the 95% interval of a bootstrap. A bound that is not finite is None.

    values: [R]. What is not a number counts as unknown, which makes the interval wider.
    """
    low, high = (
        float(np.quantile(np.where(np.isnan(values), unknown, values), share, method="inverted_cdf"))
        for unknown, share in zip((-math.inf, math.inf), _INTERVAL, strict=True)
    )
    return (low if math.isfinite(low) else None), (high if math.isfinite(high) else None)

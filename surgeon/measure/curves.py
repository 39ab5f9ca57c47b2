"""Curves of quality against cost: what a quality costs on each, and how they differ on the same samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from surgeon.data.quality import Change, Scores
from surgeon.json_values import Plain
from surgeon.measure.read_off import Difference, Kept, Numbers, Resampled, interval, kept_at, place, scores_at
from surgeon.measure.sweep import Point, RouterChoice


@dataclass(frozen=True)
class Curve(Plain):
    """Quality against cost of one surgery, with one selection rule and one router.

    points: one for each tau, the same for all layers.
    layers, whole: what keeps the wanted quality costs, for the converted layers and for the whole model, as a share of
        the dense model's; None if no setting keeps it, or the dense model's cost is unknown.
    milliseconds: of a call at the cost `whole`, on the line between two settings; None if nothing was timed.
    cost_difference: `whole` minus that of the first curve. quality_difference: the quality at the first curve's `whole`
        minus that curve's there. Both are on the same samples, and None for the first curve and where there is no cost.
        The first is also None where both costs are only known to be at most something.
    """

    surgery: str
    rule: str
    router: RouterChoice
    points: tuple[Point, ...]
    layers: Kept | None = None
    whole: Kept | None = None
    milliseconds: float | None = None
    cost_difference: Difference | None = None
    quality_difference: Change | None = None


@dataclass(frozen=True)
class _Costs:
    """Costs of a curve's settings, and what it costs to keep the quality: measured, and in every round, [R]."""

    costs: Sequence[float]
    kept: Kept
    rounds: Numbers | None


def curves_of(found: Mapping[str, Sequence[Point]]) -> list[Curve]:
    """Sort the points of every surgery by rule and router. Stored settings are on no curve."""
    groups: dict[tuple[str, str, RouterChoice], list[Point]] = {}
    for name, points in found.items():
        for point in points:
            if point.tau is not None:
                groups.setdefault((name, point.rule, point.router), []).append(point)
    return [Curve(*key, tuple(points)) for key, points in groups.items()]


def read_off(curves: Sequence[Curve], dense: Scores, factor: float) -> list[Curve]:
    """Add to each curve what keeps a quality costs, and how it differs from the first one.

    Args:
        curves: their points have scores, all on the samples of `dense`.
        dense: the scores of the dense model. factor: the quality to keep is this factor times the dense model's.
    """
    scores = [[point.scores for point in curve.points if point.scores is not None] for curve in curves]
    drawn = Resampled(dense, factor, [one for own in scores for one in own]) if len(dense.items) > 1 else None
    wanted, start = factor * dense.quality().value, 0
    made: list[Curve] = []
    first: _Costs | None = None
    for curve, own in zip(curves, scores, strict=True):
        numbers = range(start, start + len(own))
        start += len(own)
        layers = _costs(curve, [point.layers for point in curve.points], wanted, drawn, numbers)
        whole = _costs(curve, [point.relative for point in curve.points], wanted, drawn, numbers)
        read = replace(
            curve,
            layers=None if layers is None else layers.kept,
            whole=None if whole is None else whole.kept,
            milliseconds=None if whole is None else _milliseconds(curve, whole),
        )
        if not made:
            first = whole
        elif first is not None:
            read = replace(
                read,
                cost_difference=None if whole is None else _difference(whole, first),
                quality_difference=_quality_difference(curve, own, curves[0], scores[0], first),
            )
        made.append(read)
    return made


def _costs(
    curve: Curve, costs: Sequence[float | None], wanted: float, drawn: Resampled | None, numbers: Sequence[int]
) -> _Costs | None:
    known = [cost for cost in costs if cost is not None]
    if len(known) < len(costs):
        return None
    qualities = [point.quality for point in curve.points]
    higher = qualities[0].higher_is_better
    kept = kept_at(known, [quality.value for quality in qualities], wanted, higher_is_better=higher)
    if kept is None or drawn is None:
        return None if kept is None else _Costs(known, kept, None)
    rounds = drawn.costs(numbers, known)
    low, high = interval(rounds)
    return _Costs(known, replace(kept, low=low, high=high), rounds)


def _milliseconds(curve: Curve, whole: _Costs) -> float | None:
    times = [point.milliseconds for point in curve.points]
    found = place(whole.costs, whole.kept.share)
    if found is None:
        return None
    lower, upper, weight = found
    one, other = times[lower], times[upper]
    return None if one is None or other is None else one + weight * (other - one)


def _difference(whole: _Costs, first: _Costs) -> Difference | None:
    if whole.kept.at_most and first.kept.at_most:
        return None
    found = Difference(
        whole.kept.share - first.kept.share,
        bound="at most" if whole.kept.at_most else "at least" if first.kept.at_most else None,
    )
    if whole.rounds is None or first.rounds is None:
        return found
    with np.errstate(invalid="ignore"):  # where neither keeps the quality, the difference is unknown
        low, high = interval(whole.rounds - first.rounds)
    return replace(found, low=low, high=high)


def _quality_difference(
    curve: Curve, own: Sequence[Scores], first: Curve, first_own: Sequence[Scores], costs: _Costs
) -> Change | None:
    """The quality of a curve at the first curve's cost, minus that of the first."""
    relative = [point.relative for point in curve.points if point.relative is not None]
    there = scores_at(relative, own, costs.kept.share) if len(relative) == len(own) else None
    of_first = scores_at(costs.costs, first_own, costs.kept.share)
    return None if there is None or of_first is None else there.quality(of_first).change

"""Intervals cover what they should, differences are paired, and few samples tell nothing."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from surgeon.data.quality import TELLING, Change, Kind, Scores

SHARE = Kind("accuracy", share=True)
LOSS = Kind("loss per token", higher_is_better=False, unit="tokens")


def scores(kind: Kind, totals: Tensor, items: Tensor | None = None) -> Scores:
    return Scores.joined(kind, [(totals, torch.ones_like(totals) if items is None else items)])


def test_a_quality_is_a_ratio_of_sums_with_its_numbers() -> None:
    found = scores(LOSS, torch.tensor([2.0, 6.0, 0.0]), torch.tensor([1, 3, 0])).quality()
    assert (found.value, found.items, found.samples, found.unit) == (2.0, 4, 2, "tokens")
    assert (found.low, found.high) == (2.0, 2.0)  # both samples have the same mean
    alone = scores(LOSS, torch.tensor([2.0])).quality()
    assert (alone.low, alone.high, alone.change) == (None, None, None)


def test_the_interval_of_a_mean_is_students() -> None:
    values = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    found = scores(LOSS, values).quality()
    half = 2.776445 * float(values.std()) / math.sqrt(5)
    assert found.low == pytest.approx(3 - half, rel=1e-5)
    assert found.high == pytest.approx(3 + half, rel=1e-5)


@pytest.mark.parametrize(("right", "low", "high"), [(10, 0.722, 1.0), (0, 0.0, 0.278), (5, 0.237, 0.763)])
def test_the_interval_of_a_share_is_wilsons(right: int, low: float, high: float) -> None:
    found = scores(SHARE, (torch.arange(10) < right).double()).quality()
    assert (found.low, found.high) == (pytest.approx(low, abs=1e-3), pytest.approx(high, abs=1e-3))


def test_shares_of_tokens_that_are_all_alike_have_an_interval_too() -> None:
    found = scores(Kind("accuracy", unit="tokens", share=True), torch.full((6,), 4.0), torch.full((6,), 4.0)).quality()
    assert found.value == found.high == 1.0
    assert found.low is not None
    assert found.low < 0.7


def test_differences_are_paired() -> None:
    """What is hard for both models cancels: the interval is much smaller than that of either loss."""
    generator = torch.Generator().manual_seed(0)
    items = torch.randint(1, 30, (400,), generator=generator)
    dense = items * (2 + torch.randn(400, generator=generator))
    found = scores(LOSS, dense + 0.1 * items, items).quality(scores(LOSS, dense, items))
    assert found.change is not None
    assert found.change.value == pytest.approx(0.1, rel=1e-5)
    assert found.change.high - found.change.low < 1e-3
    assert found.low is not None
    assert found.high is not None
    assert found.high - found.low > 0.1
    assert found.change.telling


@pytest.mark.parametrize("size", [40, 400])
def test_intervals_of_differences_cover_the_truth(size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    covered, rounds = 0, 400
    for _ in range(rounds):
        items = torch.randint(1, 30, (size,), generator=generator).double()
        dense = items * (2 + torch.randn(size, generator=generator).double())
        moved = dense + items * (0.1 + 0.3 * torch.randn(size, generator=generator).double())
        change = scores(LOSS, moved, items).quality(scores(LOSS, dense, items)).change
        assert change is not None
        covered += change.low < 0.1 < change.high
    assert 0.92 < covered / rounds < 0.98


@pytest.mark.parametrize("rate", [0.002, 0.01, 0.04])
def test_equal_models_are_seldom_called_different(rate: float) -> None:
    """Also where only a handful of samples differ, which a plain normal interval gets wrong."""
    generator = torch.Generator().manual_seed(0)
    told, rounds = 0, 1000
    for _ in range(rounds):
        draw = torch.rand(TELLING, generator=generator)
        dense, other = (draw >= rate).double(), ((draw < rate) | (draw >= 2 * rate)).double()
        change = scores(SHARE, other).quality(scores(SHARE, dense)).change
        assert change is not None
        told += change.telling
    assert told / rounds < 0.065


def test_a_few_hundred_samples_are_needed_to_tell() -> None:
    assert Change(-0.1, -0.15, -0.05, TELLING).telling
    assert Change(0.1, 0.05, 0.15, TELLING).telling
    assert not Change(-0.1, -0.15, -0.05, TELLING - 1).telling
    assert not Change(-0.1, -0.25, 0.05, 10_000).telling
    assert not Change(0.0, 0.0, 0.0, 10_000).telling


def test_other_samples_are_not_compared() -> None:
    some = scores(LOSS, torch.tensor([1.0, 2.0]), torch.tensor([1, 2]))
    for other in (
        scores(LOSS, torch.tensor([1.0, 2.0]), torch.tensor([2, 1])),
        scores(LOSS, torch.tensor([1.0, 2.0, 3.0])),
        scores(SHARE, torch.tensor([1.0, 2.0]), torch.tensor([1, 2])),
    ):
        assert some.quality(other).change is None


def test_nan_stays_nan() -> None:
    found = scores(LOSS, torch.tensor([1.0, math.nan])).quality(scores(LOSS, torch.tensor([1.0, 2.0])))
    assert math.isnan(found.value)
    assert found.change is not None
    assert math.isnan(found.change.low)
    assert not found.change.telling


def test_scores_are_kept_as_text() -> None:
    first = scores(LOSS, torch.tensor([1.5, 2.25]), torch.tensor([3, 4]))
    again = Scores.unpacked(first.packed(), LOSS)
    assert torch.equal(again.totals, first.totals)
    assert torch.equal(again.items, first.items)
    for damaged in ("", "???", first.packed()[:-4]):
        with pytest.raises(ValueError, match=r"incomplete|base64|padding"):
            Scores.unpacked(damaged, LOSS)


def test_an_interval_of_a_share_ends_at_its_bounds() -> None:
    items = torch.full((5,), 16.0)
    found = scores(Kind("accuracy", unit="tokens", share=True), torch.tensor([16.0, 16, 16, 16, 13]), items).quality()
    assert found.low is not None
    assert 0.8 < found.low < found.value
    assert found.high == 1.0
    few = scores(Kind("accuracy", unit="tokens", share=True), torch.tensor([0.0, 0, 0, 0, 3]), items).quality()
    assert few.low == 0.0

"""What a quality costs, read off on a curve: as by hand, and its interval as a bootstrap written out gives it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from surgeon.data.quality import Kind, Scores
from surgeon.measure.read_off import Resampled, interval, kept_at, place, scores_at

ACCURACY = Kind("accuracy", share=True)
LOSS = Kind("loss per token", higher_is_better=False, unit="tokens")


def kept(points: Sequence[tuple[float, float]], wanted: float, higher: bool) -> Any:
    costs, values = zip(*points, strict=True)
    found = kept_at(costs, values, wanted, higher_is_better=higher)
    return None if found is None else (pytest.approx(found.share), found.at_most)


def test_the_cost_lies_on_the_line_from_the_next_cheaper_setting() -> None:
    accuracies = ((0.5, 0.8), (0.1, 0.6), (0.2, 0.5), (1.0, 0.9))
    assert kept(accuracies, 0.7, True) == (0.4, False)  # from the point at 0.2, not from the better one at 0.1
    assert kept(accuracies, 0.6, True) == (0.1, True)
    assert kept(accuracies, 0.95, True) is None
    losses = ((0.1, 6.0), (0.3, 5.0))
    assert kept(losses, 5.5, False) == (0.2, False)
    assert kept(losses, 6.5, False) == (0.1, True)
    assert kept(losses, 4.9, False) is None


def test_a_loss_that_is_no_number_keeps_nothing_and_bends_no_line() -> None:
    assert kept(((0.1, math.nan), (0.3, 5.0)), 5.5, False) == (0.3, False)
    assert kept(((0.1, math.nan),), 5.5, False) is None


def test_a_cost_lies_between_two_settings() -> None:
    costs = [0.5, 0.1, 0.9]
    assert place(costs, 0.1) == (1, 1, 0.0)
    assert place(costs, 0.3) == (1, 0, pytest.approx(0.5))
    assert place(costs, 1.5) == (2, 2, 0.0)  # nobody has to spend more
    assert place(costs, 0.05) is None


def scores(kind: Kind, totals: Sequence[float], items: Sequence[float] | None = None) -> Scores:
    return Scores(kind, torch.tensor(totals).double(), torch.tensor(items or [1.0] * len(totals)).double())


def test_scores_between_two_settings_are_theirs_in_part() -> None:
    own = [scores(ACCURACY, [1, 1, 0]), scores(ACCURACY, [0, 1, 0])]
    assert scores_at([0.8, 0.4], own, 0.5).totals.tolist() == pytest.approx([0.25, 1.0, 0.0])  # type: ignore[union-attr]
    assert scores_at([0.8, 0.4], own, 0.4) is own[1]
    assert scores_at([0.8, 0.4], own, 0.3) is None


@pytest.mark.parametrize("kind", [ACCURACY, LOSS])
def test_every_round_reads_off_on_its_own_samples(kind: Kind) -> None:
    generator = torch.Generator().manual_seed(0)
    count, factor = 40, 0.95 if kind.higher_is_better else 1 / 0.95
    items = torch.ones(count) if kind.share else torch.randint(3, 9, (count,), generator=generator)
    base = torch.rand(count, generator=generator)
    totals = [
        (base + 0.3 * torch.rand(count, generator=generator) > limit).double() if kind.share
        else items * (2.0 + base + limit * torch.rand(count, generator=generator))
        for limit in (0.3, 0.2, 0.35, 0.7)
    ]  # fmt: skip
    dense, *own = (Scores(kind, one.double(), items.double()) for one in totals)
    costs = [1.0, 0.5, 0.2]
    found = Resampled(dense, factor, [own[0], *own], rounds=50).costs([1, 2, 3], costs)
    draw = np.random.default_rng(0)
    for cost in found:
        drawn = torch.from_numpy(draw.multinomial(count, [1 / count] * count))
        values = [float((drawn * one.totals).sum() / (drawn * one.items).sum()) for one in (dense, *own)]
        by_hand = kept_at(costs, values[1:], factor * values[0], higher_is_better=kind.higher_is_better)
        assert cost == pytest.approx(math.inf if by_hand is None else by_hand.share)
    assert len(set(found.tolist())) > 10


def test_many_samples_are_drawn_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    dense, own = scores(ACCURACY, [1, 1, 1, 0] * 10), scores(ACCURACY, [1, 1, 0, 0] * 10)
    whole = Resampled(dense, 0.9, [own, dense], rounds=30).costs([0, 1], [0.1, 0.9])
    monkeypatch.setattr("surgeon.measure.read_off._AT_ONCE", 300)
    assert Resampled(dense, 0.9, [own, dense], rounds=30).costs([0, 1], [0.1, 0.9]).tolist() == whole.tolist()


def test_an_interval_ends_where_it_is_not_known() -> None:
    values = np.arange(1000.0)
    assert interval(values) == (24.0, 974.0)
    values[950:] = math.inf
    assert interval(values) == (24.0, None)
    assert interval(np.full(10, math.inf)) == (None, None)
    values[:50] = math.nan  # infinity minus infinity: both ends
    assert interval(values) == (None, None)


def test_the_interval_holds_the_true_cost_as_often_as_it_says() -> None:
    """Models that are right on samples easier than a limit, with some luck: what one finds hard, the others do too."""
    draw = torch.Generator().manual_seed(0)
    costs, shares, dense, count = [0.2, 0.4, 0.6, 1.0], [0.85, 0.885, 0.9, 0.91], 0.905, 360
    true = kept_at(costs, shares, 0.99 * dense, higher_is_better=True)
    assert true is not None

    def right(share: float, hard: torch.Tensor) -> Scores:
        z = 0.7**0.5 * hard + 0.3**0.5 * torch.randn(count, generator=draw)
        limit = 2.0**0.5 * torch.erfinv(torch.tensor(2 * share - 1))
        return Scores(ACCURACY, (z < limit).double(), torch.ones(count).double())

    held, runs = 0, 120
    for _ in range(runs):
        hard = torch.randn(count, generator=draw)
        own = [right(share, hard) for share in shares]
        low, high = interval(Resampled(right(dense, hard), 0.99, own, rounds=200).costs([0, 1, 2, 3], costs))
        held += (low is None or low <= true.share) and (high is None or true.share <= high)
    assert 0.88 <= held / runs <= 1.0

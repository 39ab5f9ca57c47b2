"""The losses of token halting against their definition."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from surgeon.data.batch import Batch
from surgeon.training.halting import HaltingLoss

GATE, HALF = torch.tensor([1.0, 0.0]), torch.tensor(0.5)
LAST = torch.zeros(1, 3, 4)  # every score behind the last block is 1/2


def totals() -> list[Tensor]:
    """Of three tokens with three blocks: one that halts at once, one behind the second, one that runs all."""
    return [torch.tensor([[1.0, 0.5, 0.2]]), torch.tensor([[1.0, 1.25, 0.3]])]


def loss(ponder: float, prior: float, depth: float | None = None) -> HaltingLoss:
    return HaltingLoss(GATE, [1, 2], 3, ponder, prior, depth)


def gaussian(centre: float) -> Tensor:
    density = torch.tensor([math.exp(-((block - centre) ** 2) / 2) for block in (1, 2, 3)])
    return density / density.sum()


def test_blocks_and_what_is_left_are_pondered() -> None:
    value, shown = loss(0.1, 0.0)(Batch(()), totals(), LAST, HALF)
    assert shown["blocks"] == pytest.approx((1 + 2 + 3) / 3)
    assert float(value) == pytest.approx(0.1 * ((1 + 2 + 3) + (1.0 + 0.5 + 0.7)) / 3)


def test_scores_are_compared_with_a_gaussian() -> None:
    # Behind the blocks: 1 + 0.5 + 0.2, 0.75 + 0.1, and 0.5 of the one token that is left.
    found = torch.tensor([1.7, 0.85, 0.5]) / 3.05
    for depth, centre in ((None, 2.0), (1.0, 1.0)):
        want = gaussian(centre)
        value, shown = loss(0.0, 2.0, depth)(Batch(()), totals(), LAST, HALF)
        assert float(value) == pytest.approx(2.0 * float((want * (want / found).log()).sum()), rel=1e-5)
        assert 2.0 * shown["divergence from the prior"] == pytest.approx(float(value))


def test_padding_does_not_count() -> None:
    batch = Batch((), {"attention_mask": torch.tensor([[1, 0, 1]])})
    value, shown = loss(0.1, 0.0)(batch, totals(), LAST, HALF)
    assert shown["blocks"] == pytest.approx((1 + 3) / 2)
    assert float(value) == pytest.approx(0.1 * ((1 + 3) + (1.0 + 0.7)) / 2)


def test_places_behind_some_blocks_stand_for_all_that_follow() -> None:
    _, shown = HaltingLoss(GATE, [2], 5, 0.1, 0.0, None)(Batch(()), totals()[1:], LAST, HALF)
    assert shown["blocks"] == pytest.approx((2 + 2 + 5) / 3)


def test_larger_scores_leave_less_and_can_be_learned_from_both_losses() -> None:
    for settings in ((1.0, 0.0), (0.0, 1.0)):
        given = [total.clone().requires_grad_() for total in totals()]
        value, _ = loss(*settings)(Batch(()), given, LAST, HALF)
        value.backward()
        first, second = (total.grad for total in given)
        assert first is not None
        assert second is not None
        if settings[0]:  # the last sum before a token halts
            assert torch.allclose(first, torch.tensor([[0.0, -1 / 3, 0.0]]))
            assert torch.allclose(second, torch.tensor([[0.0, 0.0, -1 / 3]]))
        else:
            assert bool((first != 0).all())


def test_no_score_at_all_is_finite() -> None:
    nothing = [torch.zeros(1, 3, requires_grad=True) for _ in range(2)]
    value, _ = loss(1.0, 1.0)(Batch(()), nothing, LAST - 1e4, HALF)
    assert bool(torch.isfinite(value))

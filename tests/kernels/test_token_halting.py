"""The operators of token halting against their definition."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from surgeon.errors import UsageError
from surgeon.kernels.token_halting import (
    halted,
    halting_total,
    keep_halted,
    live_keys,
    mask_keys,
    mean_field,
    put_tokens,
    take_tokens,
    tokens_that_stay,
)

GATE, HALF = torch.tensor([5.0, -1.0]), torch.tensor(0.5)


def some(blocks: int = 4, length: int = 6) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, length, 8, generator=generator) for _ in range(blocks)]


def totals(tokens: list[Tensor], tau: Tensor = HALF) -> list[Tensor]:
    found: list[Tensor] = []
    for behind in tokens:
        found.append(halting_total(behind, found[-1] if found else None, GATE, tau))
    return found


def published(tokens: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The mean field and the number of blocks of every token, one after the other, by the paper's equations 5 to 9."""
    field = torch.zeros_like(tokens[0], dtype=torch.float64)
    blocks = torch.zeros(tokens[0].shape[:2], dtype=torch.int64)
    for row in range(field.shape[0]):
        for place in range(field.shape[1]):
            spent = 0.0
            for number, behind in enumerate(tokens, 1):
                token = behind[row, place].double()
                score = float(torch.sigmoid(5 * token[0] - 1))
                last = number == len(tokens) or spent + score >= 0.99
                field[row, place] += ((1 - spent) if last else score) * token
                spent += score
                if last:
                    blocks[row, place] = number
                    break
    return field, blocks


def test_at_one_half_it_is_the_published_method() -> None:
    tokens = some()
    found = totals(tokens[:-1])
    field, blocks = published(tokens)
    assert torch.equal(1 + sum((~halted(total)).long() for total in found), blocks)
    assert len(blocks.unique()) == 4
    # What is behind a block counts only for tokens that it computed.
    assert torch.allclose(mean_field(tokens, found).double(), field, atol=1e-6)


def test_nothing_halts_at_0_and_everything_at_1() -> None:
    tokens = some()
    tokens[0][0, 0, 0] = 1e4  # its score is 1
    for total in totals(tokens[:-1], torch.tensor(0.0)):
        assert torch.equal(total, torch.zeros(3, 6))
    assert torch.equal(mean_field(tokens, totals(tokens[:-1], torch.tensor(0.0))), tokens[-1])
    assert all(bool(halted(total).all()) for total in totals(tokens[:-1], torch.tensor(1.0)))
    assert torch.equal(mean_field(tokens, totals(tokens[:-1], torch.tensor(1.0))), tokens[0])


def test_a_larger_tau_halts_no_token_later() -> None:
    tokens = some()
    counts = [
        torch.stack([halted(total) for total in totals(tokens[:-1], torch.tensor(tau))]).sum(0)
        for tau in (0.1, 0.3, 0.5, 0.7, 0.9)
    ]
    assert all(bool((more >= fewer).all()) for fewer, more in itertools.pairwise(counts))
    assert int(counts[-1].sum()) > int(counts[0].sum())


def test_scores_stop_where_a_token_has_halted_and_nan_never_halts() -> None:
    before = torch.tensor([[0.2, 1.5, torch.nan]])
    total = halting_total(torch.zeros(1, 3, 4), before, GATE, HALF)
    assert total[0, 1] == 1.5
    assert total[0, 0] == pytest.approx(0.2 + torch.sigmoid(torch.tensor(-1.0)).item())
    assert halted(total).tolist() == [[False, True, False]]


def test_halted_tokens_are_kept_and_no_keys() -> None:
    total = torch.tensor([[0.0, 2.0, 0.5], [2.0, 2.0, 2.0]])
    old, new = torch.zeros(2, 3, 4), torch.ones(2, 3, 4)
    assert keep_halted(new, old, total)[..., 0].tolist() == [[1, 0, 1], [0, 0, 0]]
    keys = live_keys(total)
    assert keys.shape == (2, 1, 1, 3)
    assert keys[:, 0, 0].tolist() == [[True, False, True], [True, True, True]]  # a row without keys would be NaN
    allowed = torch.tensor([True, True, False]).expand(2, 1, 3, 3)
    assert mask_keys(allowed, keys)[0, 0, 0].tolist() == [True, False, False]
    weights = mask_keys(torch.zeros(2, 4, 3, 3, dtype=torch.bfloat16), keys).softmax(-1)
    assert weights[0, 0, 0].tolist() == [0.5, 0.0, 0.5]


def test_gradients_reach_scores_and_tokens() -> None:
    tokens = [value.requires_grad_() for value in some()]
    found = totals(tokens[:-1])  # type: ignore[arg-type]
    mean_field(tokens, found).square().sum().backward()
    for number, behind in enumerate(tokens):
        computed = torch.ones(3, 6, dtype=torch.bool) if not number else ~halted(found[number - 1])
        assert behind.grad is not None
        assert bool((behind.grad.abs().sum(-1) > 0).eq(computed).all())


@pytest.mark.parametrize("length", [1, 5])
def test_tokens_are_taken_and_put_back(length: int) -> None:
    total = torch.tensor([[0.0, 2.0, 0.5, 2.0, 0.1], [2.0, 2.0, 2.0, 2.0, 0.3]])[:, :length]
    rows = tokens_that_stay(total)
    assert rows.tolist() == ([[0, 2, 4], [4, 0, 1]] if length > 1 else [[0, 0], [0, 0]])
    x = torch.arange(2 * length * 3.0).view(2, length, 3)
    taken = take_tokens(x, rows, [1])
    assert torch.equal(taken, torch.stack([x[row, rows[row]] for row in range(2)]))
    assert torch.equal(put_tokens(x, rows, taken), x)
    assert torch.equal(put_tokens(x, rows, taken + 1)[0, rows[0]], taken[0] + 1)
    bias = torch.randn(1, 4, length, length)
    picked = take_tokens(bias, rows, [2, 3])
    assert torch.equal(picked, torch.stack([bias[0][:, row][:, :, row] for row in rows]))


def test_wrong_arguments_are_refused() -> None:
    x, total, rows = torch.zeros(2, 3, 4), torch.zeros(2, 3), torch.zeros(2, 2, dtype=torch.int64)
    keys = live_keys(total)
    for call in (
        lambda: halting_total(x[0], None, GATE, HALF),
        lambda: halting_total(x, None, GATE[:1], HALF),
        lambda: halting_total(x, None, GATE, GATE),
        lambda: halting_total(x, x, GATE, HALF),
        lambda: keep_halted(x, x[:1], total),
        lambda: keep_halted(x.long(), x, total),
        lambda: live_keys(x),
        lambda: mask_keys(total.long(), keys),
        lambda: mask_keys(total, total),
        lambda: mean_field([x, x], [total, total]),
        lambda: tokens_that_stay(x),
        lambda: take_tokens(x, total, [1]),
        lambda: put_tokens(x, rows, x.double()),
    ):
        with pytest.raises(UsageError, match="must be"):
            call()

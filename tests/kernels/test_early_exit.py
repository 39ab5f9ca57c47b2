"""The operators of early exits against their definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from surgeon.errors import UsageError
from surgeon.kernels.early_exit import exit_or, leaves, rows_that_stay


def some(rows: int = 64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return 3 * torch.randn(rows, 5, generator=generator), torch.randn(rows, 5, generator=generator)


def test_a_sample_leaves_if_the_others_have_less_than_tau() -> None:
    logits, rest = some()
    for tau in (0.05, 0.3, 0.6):
        want = 1 - logits.double().softmax(-1).amax(-1) < tau
        assert 0 < int(want.sum()) < len(want)
        assert torch.equal(leaves(logits, torch.tensor(tau)), want)
        assert torch.equal(exit_or(logits, rest, torch.tensor(tau)), torch.where(want[:, None], logits, rest))
        assert torch.equal(rows_that_stay(logits, torch.tensor(tau)), (~want).nonzero()[:, 0])


def test_nothing_leaves_at_0_and_everything_at_1() -> None:
    logits, rest = some()
    logits[0, 0] = 1e4  # its probability is 1
    assert torch.equal(exit_or(logits, rest, torch.tensor(0.0)), rest)
    assert torch.equal(exit_or(logits, rest, torch.tensor(1.0)), logits)
    assert rows_that_stay(logits, torch.tensor(1.0)).shape == (0,)
    assert rows_that_stay(logits[:0], torch.tensor(0.5)).shape == (0,)


def test_nan_never_leaves() -> None:
    logits, rest = some()
    logits[3, 1] = torch.nan
    assert torch.equal(exit_or(logits, rest, torch.tensor(1.0))[3], rest[3])
    assert rows_that_stay(logits, torch.tensor(1.0)).tolist() == [3]


def test_the_gradient_goes_where_the_answer_comes_from() -> None:
    logits, rest = (value.requires_grad_() for value in some())
    gone = leaves(logits, torch.tensor(0.3))
    exit_or(logits, rest, torch.tensor(0.3)).sum().backward()
    assert torch.equal(logits.grad, gone[:, None].float().expand_as(logits))  # type: ignore[arg-type]
    assert torch.equal(rest.grad, (~gone)[:, None].float().expand_as(rest))  # type: ignore[arg-type]


def test_the_answer_has_the_dtype_of_the_rest() -> None:
    logits, rest = some()
    assert exit_or(logits, rest.bfloat16(), torch.tensor(0.5)).dtype == torch.bfloat16


def test_wrong_arguments_are_refused() -> None:
    logits, rest = some()
    tau = torch.tensor(0.5)
    for call in (
        lambda: exit_or(logits[0], rest, tau),
        lambda: exit_or(logits, rest[:, :4], tau),
        lambda: exit_or(logits, rest.long(), tau),
        lambda: exit_or(logits, rest, tau.reshape(1)),
        lambda: rows_that_stay(logits.long(), tau),
        lambda: rows_that_stay(logits, torch.tensor(1)),
    ):
        with pytest.raises(UsageError, match="must be"):
            call()

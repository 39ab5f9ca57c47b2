"""Which tokens are padding: masks that fit, and what is said of those that do not."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor

from surgeon.data.batch import Batch
from surgeon.data.padding import real_tokens, token_mask, warn_of_masks

MASK = torch.tensor([[1, 1, 1], [1, 0, 0]])


def batch(**masks: Tensor) -> Batch:
    return Batch(kwargs={"input_ids": torch.zeros(2, 3, dtype=torch.int64), **masks})


@pytest.mark.parametrize(
    ("given", "lead", "want"),
    [
        (batch(attention_mask=MASK), (2, 3), MASK.bool()),
        (batch(attention_mask=MASK.bool()), (2, 3), MASK.bool()),
        (batch(attention_mask=MASK.float()), (2, 3), MASK.bool()),
        (batch(attention_mask=MASK), (6,), MASK.bool().flatten()),
        (batch(attention_mask=MASK), (2, 5), None),
        (batch(attention_mask=MASK), (2,), None),
        (batch(attention_mask=torch.ones_like(MASK)), (2, 3), None),
        (batch(), (2, 3), None),
        (batch(attention_mask=torch.ones(2, 5), decoder_attention_mask=MASK), (2, 3), MASK.bool()),
        (batch(attention_mask=torch.ones(2, 1, 3, 3)), (2, 3), None),
        (batch(src_key_padding_mask=MASK == 0), (2, 3), MASK.bool()),
        (batch(key_padding_mask=torch.zeros(2, 3).masked_fill(MASK == 0, -torch.inf)), (6,), MASK.bool().flatten()),
        (batch(src_key_padding_mask=torch.zeros(2, 3, dtype=torch.bool)), (2, 3), None),
        (batch(padding=MASK == 0), (2, 3), None),
    ],
)
def test_token_mask(given: Batch, lead: tuple[int, ...], want: Tensor | None) -> None:
    found = token_mask(given, lead)
    assert (found is None) == (want is None)
    if want is not None:
        assert found is not None
        assert torch.equal(found, want)


def test_real_tokens_of_padded_and_flattened_values() -> None:
    values = torch.arange(12.0).view(2, 3, 2)
    want = values.view(6, 2)[[0, 1, 2, 3]]
    assert torch.equal(real_tokens(batch(attention_mask=MASK), values), want)
    assert torch.equal(real_tokens(batch(attention_mask=MASK), values.view(6, 2)), want)
    assert torch.equal(real_tokens(batch(), values), values.view(6, 2))
    assert torch.equal(real_tokens(batch(), values.view(6, 2)), values.view(6, 2))


# --- masks that do not tell -------------------------------------------------------------------------------------------

LONGER = torch.tensor([[1, 1, 1], [1, 1, 0]])


@pytest.mark.parametrize(
    ("given", "leads", "words"),
    [
        (
            batch(src_key_padding_mask=MASK == 0),
            [(3, 2), (2,)],
            "Padding counts as tokens: src_key_padding_mask is [2, 3], which does not fit any layer's input, [3, 2, d]",
        ),
        (
            batch(attention_mask=MASK, decoder_attention_mask=LONGER),
            [(2, 3)],
            "attention_mask and decoder_attention_mask differ, and both fit layers with inputs of [2, 3]. attention",
        ),
        (
            batch(attention_mask=MASK, decoder_attention_mask=LONGER),
            [(6,)],
            "attention_mask and decoder_attention_mask",
        ),
        (batch(attention_mask=MASK, decoder_attention_mask=MASK), [(2, 3)], ""),
        (batch(attention_mask=MASK, decoder_attention_mask=torch.ones(2, 4)), [(2, 3), (2, 4)], ""),
        (batch(attention_mask=MASK), [(2, 3), (2, 5)], ""),  # images beside text
        (batch(attention_mask=MASK), [(2,)], ""),  # pooled
        (batch(attention_mask=torch.ones(2, 3)), [(3, 2)], ""),  # nothing is padding
        (batch(), [(3, 2)], ""),
    ],
)
def test_masks_that_do_not_tell_are_named(
    given: Batch, leads: list[tuple[int, ...]], words: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="surgeon"):
        assert warn_of_masks(given, leads) == bool(words)
    assert [message[: len(words)] for message in caplog.messages] == ([words] if words else [])

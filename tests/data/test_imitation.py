"""What the answer of a model is, and how far two answers are apart, against values worked out by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_outputs import (
    BaseModelOutputWithPooling,
    QuestionAnsweringModelOutput,
    Seq2SeqLMOutput,
    SequenceClassifierOutput,
)

from surgeon.data.batch import Batch
from surgeon.data.imitation import AgreementMeter, answer, divergence, made_for
from surgeon.errors import UsageError

GENERATOR = torch.Generator().manual_seed(0)


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=GENERATOR)


class Pair(NamedTuple):
    logits: Tensor
    boxes: Tensor


V, W = noise(2, 5, 3), noise(2, 4)


@pytest.mark.parametrize(
    ("outputs", "task", "expected"),
    [
        (V, None, [(V, False)]),
        (V, "causal-lm", [(V, True)]),
        (V, "feature-extraction", [(V, False)]),
        ((V, W), "classification", [(V, True)]),
        ((V, W), None, [(V, False), (W, False)]),
        ({"x": [V, (W,)]}, None, [(V, False), (W, False)]),
        (Pair(V, W), None, [(V, True), (W, False)]),
        (SimpleNamespace(logits=W), None, [(W, True)]),
        (SequenceClassifierOutput(loss=V.sum(), logits=W, hidden_states=(V, V)), None, [(W, True)]),
        (BaseModelOutputWithPooling(last_hidden_state=V, pooler_output=W), None, [(V, False), (W, False)]),
        (QuestionAnsweringModelOutput(start_logits=W, end_logits=W + 1), None, [(W, True), (W + 1, True)]),
        (Seq2SeqLMOutput(logits=V, encoder_last_hidden_state=W), None, [(V, True)]),
        ({"hidden_states": (V, W)}, None, [(V, False), (W, False)]),
        ({"logits": W[:, :1], "ids": torch.ones(2, dtype=torch.long)}, None, [(W[:, :1], False)]),  # a regression
    ],
)
def test_the_answer_of_any_output(outputs: Any, task: str | None, expected: list[tuple[Tensor, bool]]) -> None:
    found = answer(outputs, task)
    assert [part.logits for part in found] == [logits for _, logits in expected]
    assert all(torch.equal(part.values, values) for part, (values, _) in zip(found, expected, strict=True))


def test_outputs_without_numbers_cannot_be_imitated() -> None:
    with pytest.raises(UsageError, match="a dict, has no floating tensor to imitate"):
        answer({"ids": torch.ones(2, dtype=torch.long)})


@pytest.mark.parametrize(
    ("task", "of_class", "expected"),
    [
        (None, None, "classification"), ("imitate", None, None), ("imitate", "causal-lm", "causal-lm"),
        (None, "feature-extraction", None), ("classification", None, "classification"),
    ],
)  # fmt: skip
def test_what_outputs_without_names_are(task: str | None, of_class: str | None, expected: str | None) -> None:
    assert made_for(task, of_class) == expected


def test_divergence_of_logits_and_of_vectors_without_padding() -> None:
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    batch, real = Batch((), {"input_ids": mask, "attention_mask": mask}), mask.bool()
    a, b = noise(2, 5, 3), noise(2, 5, 3)
    p, q = a[real].softmax(-1), b[real].softmax(-1)
    by_hand = (p * (p.log() - q.log())).sum(-1).mean()
    torch.testing.assert_close(divergence({"logits": a}, {"logits": b}, batch), by_hand)
    square = (a - b)[real].square().sum() / a[real].square().sum()
    torch.testing.assert_close(divergence(a, b, batch), square)
    torch.testing.assert_close(divergence(Pair(a, a), Pair(b, b), batch), by_hand + square)
    assert float(divergence(a, a, batch)) == 0.0


def test_agreement_counts_real_tokens_and_knows_samples() -> None:
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    batch = Batch((), {"input_ids": mask, "attention_mask": mask})
    a = F.one_hot(torch.tensor([[0, 1, 2, 0, 1], [0, 1, 2, 0, 1]]), 3).float()
    b = a.clone()
    b[0, 0], b[1, 3] = a[0, 1], a[0, 1]  # the second is padding
    meter = AgreementMeter()
    meter.add({"logits": a}, {"logits": b}, batch)
    top, apart = (scores.quality() for scores in meter.scores())
    assert (top.name, top.unit, top.items, top.samples) == ("top-1 agreement", "tokens", 7, 2)
    assert top.value == pytest.approx(6 / 7)
    by_hand = F.kl_div(a[0, 1].log_softmax(-1), a[0, 0].softmax(-1), reduction="sum") / 7
    assert (apart.name, apart.value) == ("KL divergence", pytest.approx(float(by_hand)))
    assert not apart.higher_is_better


def test_agreement_of_vectors_is_their_cosine() -> None:
    batch = Batch((torch.ones(2, 1),))
    meter = AgreementMeter()
    meter.add(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[3.0, 0.0], [1.0, 1.0]]), batch)
    (found,) = (scores.quality() for scores in meter.scores())
    assert (found.name, found.unit, found.samples) == ("cosine", "samples", 2)
    assert found.value == pytest.approx((1 + 0.5**0.5) / 2)


def test_single_numbers_are_compared_by_their_error() -> None:
    batch = Batch((torch.ones(2, 1),))
    meter = AgreementMeter()
    meter.add(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 2.0]), batch)
    (found,) = (scores.quality() for scores in meter.scores())
    assert (found.name, found.value) == ("squared error", pytest.approx(0.1))


def test_nan_does_not_agree() -> None:
    batch = Batch((torch.ones(2, 1),))
    meter = AgreementMeter()
    broken = torch.tensor([[torch.nan, 0.0], [1.0, 0.0]])
    meter.add({"logits": torch.tensor([[1.0, 0.0], [1.0, 0.0]])}, {"logits": broken}, batch)
    assert meter.scores()[0].quality().value == 0.5

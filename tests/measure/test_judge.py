"""A model is judged by its task and by its agreement with the dense model, on the same samples."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from surgeon.data.batch import Batch
from surgeon.errors import DataError
from surgeon.measure.judge import Criteria, judge

X = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
BATCHES = [Batch((x,), {}, y) for x, y in zip(X.split(8), (X[:, 0] > 0).long().split(8), strict=True)]


def linear(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 2), nn.Dropout(0.9))


def test_a_model_is_compared_with_the_dense_one() -> None:
    dense, other = linear(0), linear(1)
    before = judge(dense, BATCHES, Criteria("classification"))
    assert before.agreement == ()
    assert before.quality is not None
    assert before.quality.change is None
    assert before.first is before.quality
    after = judge(
        other, BATCHES, Criteria("classification", outputs="classification"), dense=dense, scores=before.scores
    )
    with torch.no_grad():
        some, others = (model.eval()(X).argmax(-1) for model in (dense, other))
    assert after.quality is not None
    assert after.quality.change is not None
    assert after.quality.change.value == pytest.approx(after.quality.value - before.quality.value)
    assert [quality.name for quality in after.agreement] == ["top-1 agreement", "KL divergence"]
    assert after.agreement[0].value == pytest.approx(float((some == others).float().mean()))


def test_a_model_agrees_with_itself_and_no_labels_are_needed() -> None:
    model = linear(0).train()
    unlabelled = [Batch(batch.args) for batch in BATCHES]
    verdict = judge(model, unlabelled, Criteria(None), dense=model)
    (cosine,) = verdict.agreement
    assert (cosine.name, cosine.samples) == ("cosine", 40)
    assert cosine.value == pytest.approx(1.0)
    assert verdict.first is cosine
    assert model.training
    with pytest.raises(DataError, match=r"needs labels, .* imitate the dense model, which needs none: task='imitate'"):
        judge(model, unlabelled, Criteria("classification"))

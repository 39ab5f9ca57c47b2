"""Training for the dense model's outputs alone, for every structure of outputs, without labels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from surgeon.data.batch import Batch
from surgeon.data.data import Data
from surgeon.data.imitation import divergence
from surgeon.errors import UsageError
from surgeon.measure.judge import Criteria, judge
from surgeon.passes import Lower, Moeify, Recover, Sparsify, SwapActivation
from surgeon.surgery.pipeline import Pipeline
from tests.small_models import classifier, stack, tokens, vectors


class Dressed(nn.Module):
    """A model whose output comes in some structure."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.inner, self.form = stack("gelu"), form

    def forward(self, x: Tensor) -> Any:
        y = self.inner(x)
        return {"tensor": y, "tuple": (y, y * 2), "dict": {"embeds": y, "kept": y > 0}, "logits": {"logits": y}}[
            self.form
        ]


def data(seed: int = 0) -> list[Any]:
    return [vectors(8, seed=seed + number) for number in range(4)]


@pytest.mark.parametrize("form", ["tensor", "tuple", "dict", "logits"])
def test_any_output_is_imitated(form: str) -> None:
    model = Dressed(form).eval()
    batches = [Batch.from_any(item) for item in data(9)]
    apart = {}
    for steps in (1, 100):
        passes = [SwapActivation(), Sparsify(steps=steps, lr=3e-3, alpha=0.0)]
        surgery = Pipeline(passes).run(model, inputs=vectors(), data=Data.of(data(), task="imitate"))
        fit = surgery.reports[1].fit
        assert fit is not None
        assert ("divergence" in fit.losses[0][1], "task loss" in fit.losses[0][1]) == (True, False)
        with torch.no_grad():
            pairs = [(model(**batch.kwargs), surgery.graph.eval()(**batch.kwargs), batch) for batch in batches]
        apart[steps] = float(torch.stack([divergence(*pair) for pair in pairs]).mean())
    assert apart[100] < 0.3 * apart[1]
    verdict = judge(surgery.graph, batches, Criteria(None), dense=model)
    assert [quality.name for quality in verdict.agreement] == (
        ["top-1 agreement", "KL divergence"] if form == "logits" else ["cosine"]
    )
    assert verdict.first.value > 0.8
    assert verdict.first.samples == 32


def test_experts_learn_to_be_skipped_without_labels() -> None:
    model, inputs = classifier("relu", layers=1, dropout=0.0), tokens(8)
    passes = [Moeify(experts=4, steps=4), Recover(steps=4), Lower()]
    surgery = Pipeline(passes).run(model, inputs=inputs, data=Data.of([inputs], task="imitate"))
    fit = surgery.reports[1].fit
    assert fit is not None
    assert set(fit.losses[0][1]) == {"divergence", "router loss"}


def test_a_model_without_a_head_imitates_by_itself() -> None:
    torch.manual_seed(0)
    model = transformers.BertModel(
        transformers.BertConfig(
            num_hidden_layers=1, num_attention_heads=2, hidden_size=16, intermediate_size=32, vocab_size=20
        )
    ).eval()
    ids = torch.randint(5, 20, (4, 6))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    surgery = Pipeline([Sparsify(steps=2)]).run(model, data=[batch])
    fit = surgery.reports[0].fit
    assert fit is not None
    assert "divergence" in fit.losses[0][1]


def test_a_loss_of_ones_own_is_not_replaced() -> None:
    given = Data.of(data(), task="imitate", loss=lambda outputs, batch: outputs.square().mean())
    surgery = Pipeline([Sparsify(steps=1)]).run(stack("relu"), inputs=vectors(), data=given)
    fit = surgery.reports[0].fit
    assert fit is not None
    assert "task loss" in fit.losses[0][1]


def test_without_a_task_imitation_is_offered() -> None:
    with pytest.raises(UsageError, match="The task imitate needs no labels"):
        Pipeline([Sparsify(steps=1)]).run(stack("relu"), inputs=vectors(), data=data())

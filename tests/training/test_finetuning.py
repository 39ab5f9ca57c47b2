"""Fine-tuning: what is in the loss, and what it cannot do without."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import surgeon
from surgeon.data.batch import Batch
from surgeon.data.data import Data
from surgeon.errors import UsageError
from surgeon.passes import Sparsify, SwapActivation
from surgeon.surgery.pipeline import Pipeline
from surgeon.surgery.surgery import Surgery
from surgeon.training.finetuning import finetune
from surgeon.training.loop import FitReport, RunSettings
from tests.small_models import labelled_vectors, stack, vectors

DATA = labelled_vectors(4)


def test_the_weight_of_the_layer_error_is_in_the_loss(monkeypatch: Any) -> None:
    original = surgeon.trace(stack("gelu"), vectors())
    swapped = Pipeline([SwapActivation()]).run(original, inputs=vectors()).graph
    found: dict[float, Any] = {}

    def evaluated(parameters: Any, loss: Any, *args: Any, **options: Any) -> None:
        torch.manual_seed(0)  # dropout
        total, shown = loss(Batch.from_any(DATA[0]), 0.0)
        found[weight] = total.item(), shown

    monkeypatch.setattr("surgeon.training.finetuning.fit", evaluated)
    plan, settings = SwapActivation(steps=1).plan(), RunSettings(original=original)
    for weight in (0.0, 1.0, 3.0):
        finetune(swapped, Data(DATA), plan, settings, "test", distill=1.0, distill_layers=weight)
    error = found[1.0][1]["layer error"]
    assert error > 1e-4
    assert "layer error" not in found[0.0][1]
    assert found[1.0][0] - found[0.0][0] == pytest.approx(error, rel=1e-3)
    assert found[3.0][0] - found[0.0][0] == pytest.approx(3 * error, rel=1e-3)


def last_fit(surgery: Surgery) -> FitReport:
    fit = surgery.reports[-1].fit
    assert fit is not None
    return fit


def test_a_share_of_the_loss_goes_to_each(traces: Any) -> None:
    (first, _), graph = DATA[0], traces("stack:relu")
    surgery = Pipeline([Sparsify(distill=0.25, steps=1, alpha=0.0)]).run(graph, inputs=first, data=DATA)
    assert {"task loss", "divergence", "square Hoyer", "active"} == set(last_fit(surgery).losses[0][1])


@pytest.mark.parametrize("options", [{"distill": 0.5}, {"distill_layers": 1.0}])
def test_a_teacher_needs_a_pipeline(traces: Any, options: Any) -> None:
    with pytest.raises(UsageError, match=r"sparsify: there is no model before the passes to distill from\. Run it in"):
        Sparsify(**options, steps=1).apply(traces("stack:relu"), data=DATA)


def test_a_model_with_every_parameter_frozen_is_refused() -> None:
    graph = surgeon.trace(stack("relu").requires_grad_(False), vectors())
    with pytest.raises(UsageError, match="the fit: every parameter of the model is frozen"):
        finetune(graph, Data(DATA), SwapActivation(steps=1).plan(), RunSettings(), "fit", label="the fit")

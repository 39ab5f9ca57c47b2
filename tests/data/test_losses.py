"""Losses and qualities against values worked out by hand."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

import surgeon
from surgeon.data.batch import Batch
from surgeon.data.data import Data
from surgeon.data.losses import QualityMeter, evaluate, guessed_task, logits_of, task_loss
from surgeon.errors import DataError, UsageError
from surgeon.models.tasks import TASKS

FLAT = ("class", "next-token", "token", "tag")  # a class for each sample or each token


def lm_batch() -> tuple[Tensor, Batch]:
    torch.manual_seed(0)
    ids = torch.randint(1, 7, (2, 5))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    return torch.randn(2, 5, 7), Batch((), {"input_ids": ids, "attention_mask": mask}, ids)


def test_task_that_labels_look_like() -> None:
    logits, labels = torch.zeros(2, 4), torch.tensor([0, 3])
    assert guessed_task(logits, labels) == "classification"
    assert guessed_task(logits, labels.float()) is None
    assert guessed_task(logits, torch.zeros(2, 4, dtype=torch.long)) is None
    assert guessed_task(torch.zeros(2, 5, 4), labels) is None
    assert guessed_task(torch.zeros(3, 4), labels) is None


def test_logits_of() -> None:
    logits = torch.zeros(1)
    outputs = [
        logits,
        {"logits": logits},
        (logits, None),
        SimpleNamespace(logits=logits),
        CausalLMOutput(logits=logits),
    ]
    assert all(logits_of(output) is logits for output in outputs)
    with pytest.raises(UsageError, match="output is a dict with hidden, which has no logits"):
        logits_of({"hidden": logits})
    with pytest.raises(UsageError, match="output is a tuple, which has no logits"):
        logits_of(())


def test_causal_loss_shifts_and_leaves_out_padding() -> None:
    logits, batch = lm_batch()
    ids = batch.kwargs["input_ids"]
    by_hand = [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1)]  # (row, position that predicts the next real token)
    expected = torch.stack([-logits[r, t].log_softmax(-1)[ids[r, t + 1]] for r, t in by_hand])
    loss = task_loss("causal-lm")(CausalLMOutput(logits=logits), batch)
    torch.testing.assert_close(loss, expected.mean())
    meter = QualityMeter("causal-lm")
    meter.add(logits, batch)
    assert meter.result().items == 6
    assert meter.result().value == pytest.approx(float(expected.mean()))
    assert not meter.result().higher_is_better


def test_causal_labels_default_to_the_input() -> None:
    logits, batch = lm_batch()
    loss = task_loss("causal-lm")
    assert torch.equal(loss(logits, Batch((), batch.kwargs)), loss(logits, batch))
    ignored = batch.labels.clone()
    ignored[0] = -100
    assert not torch.equal(loss(logits, Batch((), batch.kwargs, ignored)), loss(logits, batch))


def test_mask_of_another_shape_does_not_hide_labels() -> None:
    logits, batch = lm_batch()
    wide = {**batch.kwargs, "attention_mask": torch.zeros(2, 1, 5, 5)}
    plain = {"input_ids": batch.kwargs["input_ids"]}
    loss = task_loss("causal-lm")
    assert torch.equal(loss(logits, Batch((), wide)), loss(logits, Batch((), plain)))


def test_masked_loss() -> None:
    logits, batch = lm_batch()
    labels = torch.full((2, 5), -100)
    labels[0, 2], labels[1, 0] = 3, 6
    expected = -(logits[0, 2].log_softmax(-1)[3] + logits[1, 0].log_softmax(-1)[6]) / 2
    torch.testing.assert_close(task_loss("masked-lm")(logits, Batch((), batch.kwargs, labels)), expected)
    nothing = task_loss("masked-lm")(logits.requires_grad_(), Batch((), batch.kwargs, torch.full((2, 5), -100)))
    nothing.backward()
    assert nothing.item() == 0


def test_classification_loss_in_half_precision_is_float32() -> None:
    logits, labels = torch.randn(4, 3).bfloat16(), torch.tensor([0, 2, 1, 1])
    loss = task_loss("classification")(logits, Batch((logits,), {}, labels))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, F.cross_entropy(logits.float(), labels))
    assert torch.equal(task_loss("classification")(logits, Batch((logits,), {}, labels.int())), loss)


def test_accuracy_counts_samples_and_takes_nan_for_wrong() -> None:
    meter = QualityMeter("sequence-classification")
    logits = torch.eye(3)
    meter.add(logits, Batch((logits,), {}, torch.tensor([0, 1, 1])))
    broken = torch.tensor([[math.nan, 1.0, 2.0]])  # argmax takes NaN for the largest
    meter.add(broken, Batch((logits,), {}, torch.tensor([0])))
    result = meter.result()
    assert (result.name, result.value, result.higher_is_better, result.items) == ("accuracy", 0.5, True, 4)
    assert str(result) == "accuracy 0.5"


def test_nan_loss_is_reported() -> None:
    logits, batch = lm_batch()
    meter = QualityMeter("causal-lm")
    meter.add(logits * math.nan, batch)
    assert math.isnan(meter.result().value)


@pytest.mark.parametrize("task", [task for task, known in TASKS.items() if known.loss in FLAT])
def test_labels_that_do_not_fit(task: str) -> None:
    classifies = TASKS[task].loss == "class"
    logits = torch.zeros(2, 3) if classifies else torch.zeros(2, 5, 3)
    fitting = torch.zeros(logits.shape[:-1], dtype=torch.long)
    loss = task_loss(task)

    def attempt(labels: Tensor | None) -> None:
        loss(logits, Batch((logits,), {}, labels))

    attempt(fitting)
    with pytest.raises(DataError, match=f"{task} needs labels, but the batch has none"):
        attempt(None)
    for dtype in (torch.float32, torch.complex64, torch.bool):
        with pytest.raises(DataError, match=rf"needs integer labels, not {dtype}"):
            attempt(fitting.to(dtype))
    with pytest.raises(DataError, match=r"do not match logits"):
        attempt(fitting[:1])
    with pytest.raises(DataError, match=r"do not match logits"):  # of another task
        loss(logits.unsqueeze(1), Batch((logits,), {}, fitting.unsqueeze(1)))
    with pytest.raises(DataError, match="labels range from 0 to 3, but the model has 3 classes"):
        attempt(torch.where(torch.arange(fitting.numel()).view(fitting.shape) == fitting.numel() - 1, 3, 0))
    with pytest.raises(DataError, match="labels range from -1 to -1"):
        attempt(fitting - 1)


def test_unknown_task() -> None:
    for make in (task_loss, QualityMeter):
        with pytest.raises(UsageError, match=r"No task 'poetry'. Known: causal-lm"):
            make("poetry")


def test_evaluate_weighs_batches_by_size_and_restores_the_model() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.9))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(2))
        model[0].bias.zero_()
    model.train()
    model[0].eval()
    grads: list[bool] = []
    model.register_forward_hook(lambda *_: grads.append(torch.is_grad_enabled() or model.training))
    data = Data.of([(torch.eye(2), torch.tensor([0, 1])), (torch.eye(2)[:1], torch.tensor([1]))])
    result = evaluate(model, data.train, "classification")
    assert result.value == pytest.approx(2 / 3)
    assert result.items == 3
    assert grads == [False, False]
    assert [module.training for module in model.modules()] == [True, False, True]


def test_evaluate_restores_the_dropout_of_a_graph() -> None:
    graph = surgeon.trace(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)), torch.eye(2)).train()
    evaluate(graph, [Batch((torch.eye(2),), {}, torch.tensor([0, 1]))], "classification")
    assert graph.training
    assert "dropout.default(linear, 0.5, True)" in graph.code


def test_evaluate_moves_batches_to_the_device_of_the_model() -> None:
    devices: list[Any] = []

    class Recorded(Batch):
        def to(self, device: Any = None, dtype: torch.dtype | None = None) -> Batch:
            devices.append(device)
            return super().to(device, dtype)

    batch = Recorded((torch.eye(2),), {}, torch.tensor([0, 1]))
    evaluate(nn.Linear(2, 2), [batch], "classification")
    evaluate(nn.Linear(2, 2), [batch], "classification", device="cpu")
    evaluate(nn.Identity(), [batch], "classification")
    assert devices == [torch.device("cpu"), "cpu", torch.device("cpu")]


def test_evaluate_restores_the_model_after_an_error() -> None:
    model = nn.Linear(2, 2).train()
    with pytest.raises(DataError, match="needs labels"):
        evaluate(model, [Batch((torch.eye(2),))], "classification")
    assert model.training


def test_evaluate_without_labelled_items() -> None:
    with pytest.raises(DataError, match="no labelled item"):
        evaluate(nn.Linear(2, 2), [], "classification")


def test_evaluate_of_hugging_face_model() -> None:
    config = transformers.GPT2Config(
        n_layer=1, n_head=1, n_embd=4, vocab_size=7, n_positions=8, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config)
    _, batch = lm_batch()
    assert evaluate(model, [batch, batch], "causal-lm").items == 12

"""The loss and the quality measure of each task.

| task | labels | quality |
| --- | --- | --- |
| causal-lm | int64 `[B, T]`, by default the input ids; each position predicts the next | loss per token |
| masked-lm | int64 `[B, T]`, -100 where nothing is predicted | loss per token |
| sequence-classification, image-classification, classification | int64 `[B]` | accuracy |

Logits are `[B, T, V]` for language models and `[B, C]` for classification. Loss per token is in nats.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgeon.collective import everywhere
from surgeon.data.batch import Batch
from surgeon.errors import DataError, UsageError
from surgeon.models.tasks import TASKS
from surgeon.processes import count

IGNORED = -100

Loss = Callable[[Any, Batch], Tensor]


@dataclass(frozen=True)
class Quality:
    """How well a model does on some data.

    name: "accuracy" (0 to 1) or "loss per token" (nats).
    value: the mean over `items`, which are samples for accuracy and predicted tokens for a language model. NaN logits
        count as a wrong class, and they make the loss NaN.
    """

    name: str
    value: float
    higher_is_better: bool
    items: int

    def __str__(self) -> str:
        return f"{self.name} {self.value:.4g}"


def guessed_task(outputs: Any, labels: Tensor | None) -> str | None:
    """Guess the task from a model's outputs and labels: "classification", or None.

    Args:
        outputs: the model's outputs for a batch. A classifier gives logits [B, C].
        labels: the labels of the batch. A classifier has integers [B].
    """
    if labels is None or labels.is_floating_point() or labels.dim() != 1:
        return None
    logits = logits_of(outputs)
    return "classification" if logits.dim() == 2 and len(logits) == len(labels) else None


def logits_of(outputs: Any) -> Tensor:
    """Return the logits: the output tensor itself, `logits` of an object or a dict, or the first item of a tuple.

    Raises:
        UsageError: the outputs contain no logits.
    """
    found = outputs
    if isinstance(outputs, Mapping):
        found = outputs.get("logits")
    elif isinstance(outputs, tuple | list):
        found = outputs[0] if outputs else None
    elif not isinstance(outputs, Tensor):
        found = getattr(outputs, "logits", None)
    if isinstance(found, Tensor):
        return found
    fields = f" with {', '.join(map(str, outputs))}" if isinstance(outputs, Mapping) else ""
    raise UsageError(
        f"The model's output is a {type(outputs).__name__}{fields}, which has no logits. Pass your own loss: "
        "surgeon.Data(batches, loss=...)."
    )


def task_loss(task: str) -> Loss:
    """Return the training loss of a task: mean cross entropy over samples, or over predicted tokens.

    Returns:
        A function of the model's outputs and the batch that returns a scalar, in float32.

    Raises:
        UsageError: there is no such task.
    """
    _known(task)

    def loss(outputs: Any, batch: Batch) -> Tensor:
        logits, labels = _aligned(outputs, batch, task)
        total = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
        return everywhere(total) / everywhere((labels != IGNORED).sum()).clamp(min=1)

    return loss


def over_processes(loss: Loss) -> Loss:
    """Return a loss that is a mean over samples as one of the whole batch, of which each process has a part."""
    if count() == 1 or getattr(loss, "__module__", None) == __name__:
        return loss

    def whole(outputs: Any, batch: Batch) -> Tensor:
        value = loss(outputs, batch)
        return everywhere(value * batch.size) / everywhere(value.new_tensor(batch.size))

    return whole


class QualityMeter:
    """Adds up a task's quality batch by batch."""

    def __init__(self, task: str) -> None:
        _known(task)
        self.task = task
        self._total = 0.0
        self._items = 0

    def add(self, outputs: Any, batch: Batch) -> None:
        """Count one batch.

        Raises:
            DataError: the labels are missing or do not match the logits.
        """
        logits, labels = _aligned(outputs, batch, self.task)
        if TASKS[self.task].classifies:
            # argmax treats NaN as the largest value.
            correct = (logits.argmax(-1) == labels) & ~logits.isnan().any(-1)
            self._total += int(correct.sum())
        else:
            self._total += float(F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum"))
        self._items += int((labels != IGNORED).sum())

    def result(self) -> Quality:
        """Return the mean over everything added.

        Raises:
            DataError: no labelled item was added.
        """
        if not self._items:
            raise DataError("The evaluation data has no labelled item, so quality cannot be measured.")
        classifies = TASKS[self.task].classifies
        name = "accuracy" if classifies else "loss per token"
        return Quality(name, self._total / self._items, classifies, self._items)


def evaluate(
    model: nn.Module, batches: Iterable[Batch], task: str, *, device: torch.device | str | None = None
) -> Quality:
    """Measure a model on labelled batches, in evaluation mode and without gradients.

    Args:
        model: called as `model(*batch.args, **batch.kwargs)`. Its training mode is restored afterwards.
        batches: each batch is moved to `device`, by default the device of the model's first parameter.
        task: one of `TASKS`.

    Raises:
        DataError: labels are missing or do not match the model's logits, or there are no batches.
        UsageError: there is no such task, or the model gives no logits.
    """
    meter = QualityMeter(task)
    if device is None:
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            for batch in batches:
                moved = batch.to(device)
                meter.add(model(*moved.args, **moved.kwargs), moved)
    finally:
        if modes[model]:
            model.train()
        for module, training in modes.items():  # parts of the model may be frozen in evaluation mode
            module.training = training
    return meter.result()


def _known(task: str) -> None:
    if task not in TASKS:
        raise UsageError(f"No task '{task}'. Known: {', '.join(TASKS)}.")


def _aligned(outputs: Any, batch: Batch, task: str) -> tuple[Tensor, Tensor]:
    """Return matching logits, float32 `[N, C]`, and labels, int64 `[N]`. Ignored labels are -100."""
    logits = logits_of(outputs)
    labels = batch.labels
    if labels is None and task == "causal-lm":
        labels = batch.kwargs.get("input_ids")
    if labels is None:
        raise DataError(f"{task} needs labels, but the batch has none. Give (inputs, labels) or a 'labels' column.")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise DataError(f"{task} needs integer labels, not {labels.dtype}.")
    if logits.shape[:-1] != labels.shape or labels.dim() != (1 if TASKS[task].classifies else 2):
        raise DataError(
            f"{task}: labels {tuple(labels.shape)} do not match logits {tuple(logits.shape)}. "
            + (
                "Expected [B] and [B, classes]."
                if TASKS[task].classifies
                else "Expected [B, T] and [B, T, vocabulary]."
            )
        )
    if task == "causal-lm":
        mask = batch.kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.shape == labels.shape:
            labels = labels.masked_fill(mask == 0, IGNORED)
        logits, labels = logits[:, :-1], labels[:, 1:]
    classes = logits.shape[-1]
    logits, labels = logits.reshape(-1, classes).float(), labels.reshape(-1).long()
    # On a GPU this check would wait for the device at every step. There the kernel itself asserts the range.
    if labels.device.type == "cpu":
        kept = labels[labels != IGNORED]
        low, high = (int(kept.min()), int(kept.max())) if kept.numel() else (0, 0)
        if low < 0 or high >= classes:
            raise DataError(f"{task}: labels range from {low} to {high}, but the model has {classes} classes.")
    return logits, labels

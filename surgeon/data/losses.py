"""The loss and the quality measure of each task.

| loss of the task | labels | logits | quality |
| --- | --- | --- | --- |
| class | int64 `[B]` | `[B, C]` | accuracy |
| next-token | int64 `[B, T]`, by default the input ids; shifted by the loss | `[B, T, V]` | loss per token |
| token | int64 `[B, T]`, -100 where nothing is predicted | `[B, T, V]` | loss per token |
| tag | int64 `[B, T]`, -100 where no token starts a word | `[B, T, C]` | accuracy |
| span | int64 `[B, 2]`: first and last token, -100 if unknown | start and end, `[B, T]` each | exact match |
| ctc | int64 `[B, T]`, -100 for padding | `[B, frames, V]` | loss per token |
| imitation | none | any output (`surgeon.data.imitation`) | agreement |

Loss per token is in nats. transformers has the same losses (`LOSS_MAPPING`), but only their means over a batch. Here
the losses of samples are needed too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgeon.collective import everywhere
from surgeon.data.batch import Batch
from surgeon.data.quality import Kind, Quality, Scores
from surgeon.errors import DataError, UsageError
from surgeon.models.tasks import TASKS, LossKind, find_task
from surgeon.processes import count

IGNORED = -100

Loss = Callable[[Any, Batch], Tensor]

_PER_TOKEN = Kind("loss per token", higher_is_better=False, unit="tokens")
KINDS: dict[LossKind, Kind] = {
    "class": Kind("accuracy", share=True),
    "tag": Kind("accuracy", unit="tokens", share=True),
    "span": Kind("exact match", share=True),
    "next-token": _PER_TOKEN,
    "token": _PER_TOKEN,
    "ctc": _PER_TOKEN,
}
"""The quality of tasks with labels."""


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
    return outputs if isinstance(outputs, Tensor) else _field(outputs, "logits", 0)


def _field(outputs: Any, name: str, place: int) -> Tensor:
    """Return one tensor of the outputs, by its name or its place in a tuple."""
    if isinstance(outputs, Mapping):
        found = outputs.get(name)
    elif isinstance(outputs, tuple | list):
        found = outputs[place] if place < len(outputs) else None
    else:
        found = getattr(outputs, name, None)
    if isinstance(found, Tensor):
        return found
    fields = f" with {', '.join(map(str, outputs))}" if isinstance(outputs, Mapping) else ""
    raise UsageError(
        f"The model's output is a {type(outputs).__name__}{fields}, which has no {name}. Pass your own loss: "
        "surgeon.Data(batches, loss=...), or imitate the dense model, which needs none: task='imitate'."
    )


def task_loss(task: str, *, blank: int = 0) -> Loss | None:
    """Return the training loss of a task: mean cross entropy over samples, or over predicted tokens.

    blank: for ctc, the id that stands for no token.

    Returns:
        A function of the model's outputs and the batch that returns a scalar, in float32. None for a task without
        labels, which imitates the dense model.

    Raises:
        UsageError: there is no such task.
    """
    if _loss_kind(task) == "imitation":
        return None

    def loss(outputs: Any, batch: Batch) -> Tensor:
        totals, items = sample_losses(outputs, batch, task, blank=blank)
        return everywhere(totals.sum()) / everywhere(items.sum()).clamp(min=1)

    return loss


def is_task_loss(loss: Loss) -> bool:
    """Whether `task_loss` made this loss, and not the user."""
    return getattr(loss, "__module__", None) == __name__


def over_processes(loss: Loss) -> Loss:
    """Return a loss that is a mean over samples as one of the whole batch, of which each process has a part."""
    if count() == 1 or is_task_loss(loss):
        return loss

    def whole(outputs: Any, batch: Batch) -> Tensor:
        value = loss(outputs, batch)
        return everywhere(value * batch.size) / everywhere(value.new_tensor(batch.size))

    return whole


def blank_of(config: Any) -> int:
    """Return the id that stands for no token in ctc: the padding token of the model's config."""
    padding = getattr(config, "pad_token_id", None)
    return padding if isinstance(padding, int) else 0


def sample_losses(
    outputs: Any, batch: Batch, task: str, *, blank: int = 0, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Return the loss of each sample, float32 [B], and the number of its predictions, int64 [B].

    label_smoothing: share of the wanted probability that all classes get equally. ctc has none.

    Raises:
        DataError: the labels are missing or do not match the logits.
    """
    if TASKS[task].loss == "ctc":
        return _ctc_losses(outputs, batch, task, blank)
    logits, labels = _aligned(outputs, batch, task)
    flat = F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none", label_smoothing=label_smoothing
    )
    return flat.view_as(labels).sum(1), (labels != IGNORED).sum(1)


class QualityMeter:
    """Adds up the quality of a task with labels batch by batch."""

    def __init__(self, task: str, *, blank: int = 0) -> None:
        """task: one with labels. blank: as in `task_loss`.

        Raises:
            UsageError: there is no such task, or it has no labels.
        """
        kind = _loss_kind(task)
        if kind == "imitation":
            raise UsageError(f"{task} has no labels. Its quality is the agreement with the dense model.")
        self.task, self.kind, self._blank = task, KINDS[kind], blank
        self._parts: list[tuple[Tensor, Tensor]] = []

    def add(self, outputs: Any, batch: Batch) -> None:
        """Count one batch.

        Raises:
            DataError: the labels are missing or do not match the logits.
        """
        if not self.kind.share:
            self._parts.append(sample_losses(outputs, batch, self.task, blank=self._blank))
            return
        logits, labels = _aligned(outputs, batch, self.task)
        # argmax treats NaN as the largest value.
        correct = (logits.argmax(-1) == labels) & ~logits.isnan().any(-1)
        known = labels != IGNORED
        if TASKS[self.task].loss == "span":  # both ends, or it is another answer
            correct, known = correct.all(1, keepdim=True), known.all(1, keepdim=True)
        self._parts.append(((correct & known).sum(1), known.sum(1)))

    def scores(self) -> Scores:
        """Return the scores of everything added.

        Raises:
            DataError: no labelled item was added.
        """
        if not any(bool(items.any()) for _, items in self._parts):
            raise DataError("The evaluation data has no labelled item, so quality cannot be measured.")
        return Scores.joined(self.kind, self._parts)

    def result(self) -> Quality:
        """Return the mean over everything added, with its interval. Raises DataError as `scores`."""
        return self.scores().quality()


def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    task: str,
    *,
    device: torch.device | str | None = None,
    blank: int = 0,
) -> Quality:
    """Measure a model on labelled batches, in evaluation mode and without gradients.

    Args:
        model: called as `model(*batch.args, **batch.kwargs)`. Its training mode is restored afterwards.
        batches: each batch is moved to `device`, by default the device of the model's first parameter.
        task: one of `TASKS`, with labels. blank: as in `task_loss`.

    Raises:
        DataError: labels are missing or do not match the model's logits, or there are no batches.
        UsageError: there is no such task, or the model gives no logits.
    """
    meter = QualityMeter(task, blank=blank)
    with evaluating(model):
        for batch in batches:
            moved = batch.to(device_of(model) if device is None else device)
            meter.add(model(*moved.args, **moved.kwargs), moved)
    return meter.result()


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model's first parameter; the CPU if it has none."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run a model in evaluation mode and without gradients, and restore the modes of all its modules afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        if modes[model]:
            model.train()
        for module, training in modes.items():  # parts of the model may be frozen in evaluation mode
            module.training = training


def _loss_kind(task: str) -> LossKind:
    return find_task(task).loss


def _labels_of(batch: Batch, task: str) -> Tensor:
    labels = batch.labels
    if labels is None and TASKS[task].loss == "next-token":
        labels = batch.kwargs.get("input_ids")
    if labels is None:
        raise DataError(
            f"{task} needs labels, but the batch has none. Give (inputs, labels) or an entry 'labels', or imitate the "
            "dense model, which needs none:",
            python="task='imitate'.",
            command="--task imitate.",
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise DataError(f"{task} needs integer labels, not {labels.dtype}.")
    return labels


def _aligned(outputs: Any, batch: Batch, task: str) -> tuple[Tensor, Tensor]:
    """Return matching logits, float32 `[B, N, C]`, and labels, int64 `[B, N]`. Ignored labels are -100."""
    labels, loss = _labels_of(batch, task), TASKS[task].loss
    if loss == "span":
        logits = torch.stack(
            [_field(outputs, name, place) for place, name in enumerate(("start_logits", "end_logits"))], 1
        )
        if labels.shape != logits.shape[:2]:
            raise DataError(
                f"{task}: labels {tuple(labels.shape)} do not match logits {tuple(logits.shape)}. Expected [B, 2] and "
                "twice [B, T]."
            )
    else:
        logits = logits_of(outputs)
        if logits.shape[:-1] != labels.shape or labels.dim() != (1 if loss == "class" else 2):
            expected = "[B] and [B, classes]" if loss == "class" else "[B, T] and [B, T, vocabulary]"
            raise DataError(
                f"{task}: labels {tuple(labels.shape)} do not match logits {tuple(logits.shape)}. Expected {expected}."
            )
        if loss == "class":
            logits, labels = logits.unsqueeze(1), labels.unsqueeze(1)
    if loss == "next-token":
        mask = batch.kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.shape == labels.shape:
            labels = labels.masked_fill(mask == 0, IGNORED)
        logits, labels = logits[:, :-1], labels[:, 1:]
    logits, labels = logits.float(), labels.long()
    classes = logits.shape[-1]
    # On a GPU this check would wait for the device at every step. There the kernel itself asserts the range.
    if labels.device.type == "cpu":
        kept = labels[labels != IGNORED]
        low, high = (int(kept.min()), int(kept.max())) if kept.numel() else (0, 0)
        if low < 0 or high >= classes:
            raise DataError(f"{task}: labels range from {low} to {high}, but the model has {classes} classes.")
    return logits, labels


def _ctc_losses(outputs: Any, batch: Batch, task: str, blank: int) -> tuple[Tensor, Tensor]:
    """Return CTC losses [B] and label lengths [B]. Frames of padding are left out, in proportion to the mask."""
    logits, labels = logits_of(outputs), _labels_of(batch, task)
    if logits.dim() != 3 or labels.dim() != 2 or len(logits) != len(labels):
        raise DataError(
            f"{task}: labels {tuple(labels.shape)} do not match logits {tuple(logits.shape)}. Expected [B, T] and "
            "[B, frames, vocabulary]."
        )
    lengths, frames = (labels != IGNORED).sum(1), torch.full_like(labels[:, 0], logits.shape[1])
    mask = batch.kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        frames = (mask.sum(1) * logits.shape[1]) // mask.shape[1]
    if labels.device.type == "cpu" and bool((frames < lengths).any()):
        worst = int((lengths - frames).argmax())
        raise DataError(
            f"{task}: a text of {int(lengths[worst])} tokens is longer than its sound, which is {int(frames[worst])} "
            "frames. Leave such samples out."
        )
    scores = logits.float().log_softmax(-1).transpose(0, 1)
    losses = F.ctc_loss(scores, labels.clamp(min=0), frames, lengths, blank=blank, reduction="none")
    return losses, lengths

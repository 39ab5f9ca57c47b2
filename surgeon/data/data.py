"""Data to fit on and to measure quality on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from surgeon.data.batch import Batches
from surgeon.data.losses import Loss, task_loss
from surgeon.errors import UsageError


@dataclass(frozen=True)
class Data:
    """Data to fit on and, optionally, other data to measure quality on.

    train, eval: batches that can be read repeatedly, in any form that `Batch.from_any` takes. Reading gives `Batch`
        objects.
    task: one of `surgeon.models.tasks.TASKS`, or None if unknown. "imitate" trains for the outputs of the dense model,
        the model before the first pass, and needs no labels.
    description: one line for people.
    fingerprint: identifies this data in recipes. For files it is a hash of their contents and of how they are read. For
        Python objects it is only their type, because hashing the contents would mean reading all of them.
    loss: a function of the model's outputs and a `surgeon.data.batch.Batch` that returns a scalar, a mean over the
        batch's samples. The default is the task's loss; None if the task imitates.

    Raises:
        DataError: the batches can be read only once, or are none.
        UsageError: there is no such task, or the loss is no function.
    """

    train: Iterable[Any]
    eval: Iterable[Any] | None = None
    task: str | None = None
    description: str = ""
    fingerprint: str = ""
    loss: Loss | None = None

    def __post_init__(self) -> None:
        kind = f"{type(self.train).__module__}.{type(self.train).__qualname__}"
        fill = {
            "train": self.train if isinstance(self.train, Batches) else Batches(self.train),
            "eval": self.eval if self.eval is None or isinstance(self.eval, Batches) else Batches(self.eval),
            "description": self.description or kind,
            "fingerprint": self.fingerprint or f"python:{kind}",
            "loss": task_loss(self.task) if self.loss is None and self.task is not None else self.loss,
        }
        if self.loss is not None and not callable(self.loss):
            raise UsageError(f"loss is {self.loss!r}, but must be a function of the model's outputs and a batch.")
        for name, value in fill.items():
            object.__setattr__(self, name, value)

    @classmethod
    def of(cls, obj: Any, *, loss: Loss | None = None, task: str | None = None) -> Data:
        """Make `Data` from `Data`, a DataLoader, or any object that gives batches each time it is iterated over.

        A DataLoader of a tokenised `datasets.Dataset` (in format "torch", or with a collator) gives batches: dicts of
        tensors with the model's inputs, and labels under "labels" or "label" if there are any.

        Raises:
            DataError: it can be read only once, or does not give batches.
            UsageError: there is no such task.
        """
        if not isinstance(obj, Data):
            return cls(obj, task=task, loss=loss)
        if loss is None and task is None:
            return obj
        task = task or obj.task
        own = obj.loss if task == obj.task else None  # another task's loss would not fit
        return cls(obj.train, obj.eval, task, obj.description, obj.fingerprint, loss or own)

"""The table of tasks, and how to find a model's task from its class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Task:
    """A task by its name on the command line.

    auto_class: the transformers class that loads a model with the task's head; None if there is none.
    endings: the endings of the names of classes made for this task.
    classifies: whether the model predicts one class for each sample, rather than one token for each position.
    """

    auto_class: str | None
    endings: tuple[str, ...]
    classifies: bool


TASKS = {
    "causal-lm": Task("AutoModelForCausalLM", ("ForCausalLM", "LMHeadModel"), False),
    "masked-lm": Task("AutoModelForMaskedLM", ("ForMaskedLM",), False),
    "sequence-classification": Task("AutoModelForSequenceClassification", ("ForSequenceClassification",), True),
    "image-classification": Task("AutoModelForImageClassification", ("ForImageClassification",), True),
    "classification": Task(None, (), True),
}
HEADS = {name: task.auto_class for name, task in TASKS.items() if task.auto_class is not None}
"""Task → the transformers class that loads a model with its head."""


def task_of(model: Any) -> str | None:
    """Return the task that a model was made for, or None if its class does not tell.

    Args:
        model: a Hugging Face model, its config, which names the model's class, or any other module.
    """
    config = getattr(model, "config", model)
    names = [type(model).__name__, *(getattr(config, "architectures", None) or ())]
    return next((task for name in names for task, known in TASKS.items() if name.endswith(known.endings)), None)

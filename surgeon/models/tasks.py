"""The table of tasks, and how to find a model's task from its class."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Literal

from surgeon.errors import UsageError

LossKind = Literal["class", "next-token", "token", "tag", "span", "ctc", "imitation"]


@dataclass(frozen=True)
class Task:
    """A task by its name on the command line.

    auto_class: the transformers class that loads a model with the task's head; None if there is none.
    loss: what is predicted. class: one class for each sample. next-token, token: a token at each position. tag: one
        class for each token. span: first and last token of an answer. ctc: a text without its places in the sound.
        imitation: the outputs of the dense model, so that no labels are needed.
    endings: the endings of the names of classes made for this task.
    classes: names of transformers' tables of classes for this task, where endings do not tell.
    """

    auto_class: str | None
    loss: LossKind
    endings: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()


IMITATE = "imitate"
# The first task that fits a class is taken.
TASKS = {
    "causal-lm": Task("AutoModelForCausalLM", "next-token", ("ForCausalLM", "LMHeadModel")),
    "masked-lm": Task("AutoModelForMaskedLM", "token", ("ForMaskedLM",)),
    "seq2seq-lm": Task("AutoModelForSeq2SeqLM", "token", (), ("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",)),
    "audio-classification": Task(
        "AutoModelForAudioClassification", "class", ("ForAudioClassification",),
        ("MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES",),
    ),
    "sequence-classification": Task("AutoModelForSequenceClassification", "class", ("ForSequenceClassification",)),
    "token-classification": Task("AutoModelForTokenClassification", "tag", ("ForTokenClassification",)),
    "question-answering": Task("AutoModelForQuestionAnswering", "span", ("ForQuestionAnswering",)),
    "image-classification": Task("AutoModelForImageClassification", "class", ("ForImageClassification",)),
    "ctc": Task("AutoModelForCTC", "ctc", ("ForCTC",)),
    "speech-seq2seq": Task("AutoModelForSpeechSeq2Seq", "token", (), ("MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",)),
    "feature-extraction": Task(
        "AutoModel", "imitation", (), ("MODEL_MAPPING_NAMES", "MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES")
    ),
    "classification": Task(None, "class"),
    IMITATE: Task(None, "imitation"),
}  # fmt: skip
HEADS = {name: task.auto_class for name, task in TASKS.items() if task.auto_class is not None}
"""Task → the transformers class that loads a model with its head."""


def needs_labels(task: str | None) -> bool:
    """Whether the task is known and learns from labels. The others imitate the dense model.

    Raises:
        UsageError: there is no such task.
    """
    return task is not None and find_task(task).loss != "imitation"


def find_task(name: str) -> Task:
    """Return the task of this name.

    Raises:
        UsageError: there is no such task.
    """
    if name not in TASKS:
        raise UsageError(f"No task '{name}'. Known: {', '.join(TASKS)}.")
    return TASKS[name]


def task_of(model: Any) -> str | None:
    """Return the task that a model was made for, or None if its class does not tell.

    Args:
        model: a Hugging Face model, its config, which names the model's class, or any other module.
    """
    config = getattr(model, "config", model)
    names = [*(kind.__name__ for kind in type(model).__mro__), *(getattr(config, "architectures", None) or ())]
    tables = hasattr(config, "model_type")
    return next(
        (
            task
            for name in names
            for task, known in TASKS.items()
            if name.endswith(known.endings) or (tables and name in _classes(known.classes))
        ),
        None,
    )


@functools.cache
def _classes(tables: tuple[str, ...]) -> frozenset[str]:
    from transformers.models.auto import modeling_auto

    values = [value for table in tables for value in getattr(modeling_auto, table).values()]
    return frozenset(name for value in values for name in (value if isinstance(value, tuple | list) else (value,)))

"""Find the columns of a dataset that hold texts, labels, images and sounds, and read texts from them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from surgeon.data.classes import Classes
from surgeon.errors import DataError, UsageError

log = logging.getLogger("surgeon")

TEXT = ("text", "sentence", "content", "review", "document", "article", "dialogue", "source", "question", "prompt")
TARGET = ("target", "summary", "highlights", "translation", "output", "answer", "transcription", "sentence", "text")
WORDS, TAGS = ("tokens", "words", "text"), ("ner_tags", "tags", "pos_tags", "labels", "label")
IMAGE, SOUND = ("image", "img", "picture"), ("audio", "speech", "sound", "file")
_LABEL = ("label", "labels", "target", "class", "category", "intent")


@dataclass(frozen=True)
class ReadOptions:
    """The options of `surgeon.data.files.load_data` that say how rows become features.

    imitates: labels are not needed. They are read if there are any, to measure the task's own quality too.
    """

    spec: str
    tokenizer: Any | None = None
    processor: Any | None = None
    config: Any | None = None
    text: str | None = None
    label: str | None = None
    max_length: int = 128
    imitates: bool = False

    @property
    def text_tokenizer(self) -> Any:
        """The tokenizer. Raises UsageError if there is none."""
        if self.tokenizer is None:
            raise UsageError(
                f"{self.spec} is text, but the model has no tokenizer.",
                python="Give a tokenizer, or batches of token ids.",
                command="Give batches of token ids with --data module:function.",
            )
        return self.tokenizer


def find_column(splits: Sequence[Any], given: str | None, usual: Sequence[str], spec: str, what: str) -> str:
    """Return the column that is given, else the first of the usual ones. All splits must have it.

    what: is in the column. The option `label` names the column of a label, `text` every other.

    Raises:
        DataError: there is no such column.
    """
    names = splits[0].column_names
    found = given if given is not None else next((name for name in usual if name in names), None)
    asked = f"column '{found}'" if found is not None else f"{what} column"
    for number, rows in enumerate(splits):
        if found is None or found not in rows.column_names:
            where = spec if number == 0 else f"The split of {spec} to evaluate on"
            have = ", ".join(rows.column_names)
            option = "label" if what == "label" else "text"
            raise DataError(
                f"{where} has no {asked}. Its columns: {have}.",
                python=f"Name the {what} column with {option}=.",
                command=f"Name the {what} column with --{option}.",
            )
    assert found is not None
    return found


def find_label(
    splits: Sequence[Any], options: ReadOptions, usual: Sequence[str], *, taken: Sequence[str]
) -> str | None:
    """Return the column of the labels; None for an imitation without one. taken: columns that are something else."""
    usual = [name for name in usual if name not in taken]
    if options.imitates and options.label is None and not set(usual) & set(splits[0].column_names):
        return None
    return find_column(splits, options.label, usual, options.spec, "label")


def find_texts(splits: Sequence[Any], options: ReadOptions, usual: Sequence[str] = TEXT) -> list[str]:
    """Return the column of the text, or the two columns of pairs that `--text a,b` names."""
    given = options.text
    if given is not None and given not in splits[0].column_names and given.count(",") == 1:
        return [find_column(splits, name.strip(), usual, options.spec, "text") for name in given.split(",")]
    return [find_column(splits, given, usual, options.spec, "text")]


def find_classes(splits: Sequence[Any], options: ReadOptions, *, taken: Sequence[str] = ()) -> Classes | None:
    """Learn the classes of the labels; None for an imitation whose data has no labels that the model knows.

    Raises:
        DataError: as `Classes`, where labels are needed or their column was named.
    """
    column = find_label(splits, options, _LABEL, taken=taken)
    if column is None:
        return None
    try:
        classes = Classes(options.spec, column, splits, options.config)
        for rows in splits:
            classes.labels(rows)
    except DataError as error:
        if not options.imitates or options.label is not None:
            raise
        log.warning("The labels are left out, since imitation needs none: %s", error)
        return None
    return classes


def read_texts(rows: Any, columns: Sequence[str], spec: str) -> tuple[list[int], list[list[str]]]:
    """Return the numbers of the rows that have texts, and these texts, a list for each column.

    Raises:
        DataError: a cell is not text.
    """
    cells = [list(rows[column]) for column in columns]
    for column, texts in zip(columns, cells, strict=True):
        for index, text in enumerate(texts):
            if not isinstance(text, str | None):
                kind = type(text).__name__
                raise DataError(f"{spec}, row {index}: column '{column}' contains {kind} values, not text.")
    kept = [
        index for index, texts in enumerate(zip(*cells, strict=True)) if all(text and text.strip() for text in texts)
    ]
    skipped = len(rows) - len(kept)
    if skipped:
        log.warning("%s: %d of %d rows have no text and are left out.", spec, skipped, len(rows))
    return kept, [[texts[index] for index in kept] for texts in cells]

"""Features of texts in which something is marked: a tag on every word, or the answer to a question."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from surgeon.data.classes import Classes
from surgeon.data.columns import TAGS, WORDS, ReadOptions, find_column, find_label, read_texts
from surgeon.data.losses import IGNORED
from surgeon.data.tokens import WORDS_OF, Features, padding_collator, table, tokenised
from surgeon.errors import DataError, UsageError


def tag_features(options: ReadOptions, splits: Sequence[Any], chosen: Sequence[Any]) -> Features:
    """Cut words into tokens. The first token of each word has the word's tag, labels int64 `[B, T]`, others -100.

    Words and tags are lists, or texts in which spaces divide them.
    """
    from transformers import DataCollatorForTokenClassification

    if not options.text_tokenizer.is_fast:
        raise UsageError("token-classification needs a fast tokenizer, which knows the word of each token.")
    column = find_column(splits, options.text, WORDS, options.spec, "text")
    label = find_label(splits, options, TAGS, taken=[column])
    classes = None if label is None else _tag_classes(splits, label, options)
    made = []
    for rows in chosen:
        words = [_listed(value, column, index, options.spec) for index, value in enumerate(rows[column])]
        features = tokenised(options, [words], is_split_into_words=True)
        places = features.pop(WORDS_OF)
        if classes is not None and label is not None:
            found = iter(classes.labels(_flat_tags(rows, label, options)))
            tags = [[next(found) for _ in _listed(v, label, i, options.spec)] for i, v in enumerate(rows[label])]
            _check_counts(words, tags, options.spec)
            features["labels"] = [_first_tokens(place, row) for place, row in zip(places, tags, strict=True)]
        made.append(table(features))
    return Features(made, DataCollatorForTokenClassification(options.text_tokenizer), by_length=True)


def _listed(value: Any, column: str, index: int, spec: str) -> list[Any]:
    found = value.split() if isinstance(value, str) else value
    if not isinstance(found, list) or not found:
        raise DataError(f"{spec}, row {index}: column '{column}' holds no words or tags, but {value!r}.")
    return found


def _flat_tags(rows: Any, column: str, options: ReadOptions) -> Any:
    """Return the tags of all rows, one under the other, with the names that the dataset declares for them."""
    import datasets

    values = [tag for i, value in enumerate(rows[column]) for tag in _listed(value, column, i, options.spec)]
    inner = getattr(rows.features[column], "feature", None)
    features = datasets.Features({column: inner}) if isinstance(inner, datasets.ClassLabel) else None
    return datasets.Dataset.from_dict({column: values}, features=features)


def _tag_classes(splits: Sequence[Any], column: str, options: ReadOptions) -> Classes | None:
    try:
        flat = [_flat_tags(rows, column, options) for rows in splits]
        return Classes(f"{options.spec} (tags of all rows in a line)", column, flat, options.config)
    except DataError:
        if options.imitates and options.label is None:
            return None
        raise


def _check_counts(words: Sequence[Any], tags: Sequence[Any], spec: str) -> None:
    for index, (some, others) in enumerate(zip(words, tags, strict=True)):
        if len(some) != len(others):
            raise DataError(f"{spec}, row {index}: {len(some)} words have {len(others)} tags.")


def _first_tokens(words: Sequence[int | None], tags: Sequence[int]) -> list[int]:
    return [
        tags[word] if word is not None and (place == 0 or words[place - 1] != word) else IGNORED
        for place, word in enumerate(words)
    ]


def answer_features(options: ReadOptions, splits: Sequence[Any], chosen: Sequence[Any]) -> Features:
    """Read questions and the texts that answer them, with the first and last token of each answer.

    Answers are texts that stand in the context, or have the form of SQuAD. An answer that is cut off or missing is
    ignored.
    """
    text = options.text or "question,context"
    question, context = (find_column(splits, name.strip(), (), options.spec, "text") for name in _two(text))
    if not options.text_tokenizer.is_fast:
        raise UsageError("question-answering needs a fast tokenizer, which knows the place of each token.")
    label = find_label(splits, options, ("answers", "answer"), taken=[question, context])
    made = []
    for rows in chosen:
        kept, texts = read_texts(rows, [question, context], options.spec)
        features = tokenised(options, texts, truncation="only_second", return_offsets_mapping=True)
        places, parts = features.pop("offset_mapping"), features.pop(WORDS_OF)
        if label is not None:
            spans = [_span(rows[label][row], texts[1][number], row, options.spec) for number, row in enumerate(kept)]
            ends = [_ends(place, part, span) for place, part, span in zip(places, parts, spans, strict=True)]
            features |= {"start_positions": [start for start, _ in ends], "end_positions": [end for _, end in ends]}
        made.append(table(features))
    return Features(made, padding_collator(options, made), by_length=True)


def _two(text: str) -> list[str]:
    if text.count(",") != 1:
        raise UsageError(
            f"question-answering reads two columns, but the text is '{text}'.",
            python="Give text='question,context'.",
            command="Give --text question,context.",
        )
    return text.split(",")


def _span(answer: Any, context: str, row: int, spec: str) -> tuple[int, int] | None:
    """Return the first character of an answer in its context, and the first after it; None if there is no answer."""
    start = None
    if isinstance(answer, dict):  # SQuAD: lists of texts and of their first characters
        texts, starts = list(answer.get("text") or ()), list(answer.get("answer_start") or ())
        answer, start = (texts[0], int(starts[0])) if texts and starts else (None, None)
    if not answer:
        return None
    if not isinstance(answer, str):
        raise DataError(f"{spec}, row {row}: an answer is a {type(answer).__name__}, not a text.")
    start = context.find(answer) if start is None else start
    if start < 0 or context[start : start + len(answer)] != answer:
        raise DataError(f"{spec}, row {row}: the answer {answer!r} does not stand in its context.")
    return start, start + len(answer)


def _ends(
    places: Sequence[tuple[int, int]], parts: Sequence[int | None], span: tuple[int, int] | None
) -> tuple[int, int]:
    """Return the first and last token of a span of characters in the second text; -100 if it is not all there."""
    if span is None:
        return IGNORED, IGNORED
    inside = [
        token
        for token, ((start, end), part) in enumerate(zip(places, parts, strict=True))
        if part == 1 and start < span[1] and end > span[0]
    ]
    whole = bool(inside) and places[inside[-1]][1] >= span[1]
    return (inside[0], inside[-1]) if whole else (IGNORED, IGNORED)

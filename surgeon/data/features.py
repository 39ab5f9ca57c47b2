"""Turn the rows of a dataset into features, and features into batches, with transformers' own collators."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch

from surgeon.data.columns import (
    TARGET,
    TEXT,
    ReadOptions,
    find_classes,
    find_column,
    find_label,
    find_texts,
    read_texts,
)
from surgeon.data.losses import IGNORED
from surgeon.data.marks import answer_features, tag_features
from surgeon.data.media import ImageReader, SoundReader, takes_sound
from surgeon.data.tokens import Collate, Features, check_ids, padding_collator, table, target_ids, tokenised
from surgeon.errors import DataError, UsageError
from surgeon.models.example_inputs import token_fields
from surgeon.models.hugging_face import blaming, quiet_transformers
from surgeon.models.tasks import HEADS, IMITATE, task_of


def make_features(task: str, options: ReadOptions, splits: Sequence[Any], chosen: Sequence[Any]) -> Features:
    """Make the features of a task.

    Args:
        task: one of `READABLE`. To imitate, the inputs are those of the model's own task.
        splits: all rows, from which classes are learned. chosen: the rows to use, for each split.

    Raises:
        DataError: a column is missing or does not hold what it should. UsageError: the model lacks a part.
    """
    if task == IMITATE:
        task = task_of(options.config) or "feature-extraction"
    return _MAKERS[task](options, splits, chosen)


# --- texts ------------------------------------------------------------------------------------------------------------


def _chunks(options: ReadOptions, splits: Sequence[Any], chosen: Sequence[Any]) -> Features:
    """Join texts with an end-of-text token after each, and cut them into chunks of `max_length`; drop the rest.

    The ids, int64 `[B, T]`, are both inputs and labels. If the text is too short for a chunk, it is one shorter chunk.
    """
    from transformers import default_data_collator

    tokenizer, column = options.text_tokenizer, find_column(splits, options.text, TEXT, options.spec, "text")
    made = []
    for rows in chosen:
        _, (texts,) = read_texts(rows, [column], options.spec)
        with blaming("tokenizer"):
            parts = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        ids = list(chain.from_iterable([*part, *end] for part in parts))
        size = min(options.max_length, len(ids))
        count = len(ids) // size if size >= 2 else 0
        flat = torch.tensor(ids[: count * size], dtype=torch.long).view(count, max(size, 1))
        check_ids(flat, options)
        fill = {"attention_mask": torch.ones_like(flat), "token_type_ids": torch.zeros_like(flat), "input_ids": flat}
        columns = {name: fill[name].tolist() for name in token_fields(tokenizer, options.config)}
        made.append(table(columns | {"labels": flat.tolist()}))
    return Features(made, default_data_collator, unit="chunks of text")


def _masked(options: ReadOptions, splits: Sequence[Any], chosen: Sequence[Any]) -> Features:
    """Truncate texts to `max_length` tokens. 15% of the tokens, drawn again for each batch, are to be predicted."""
    from transformers import DataCollatorForLanguageModeling

    if options.text_tokenizer.mask_token is None:
        raise UsageError("masked-lm needs a tokenizer with a mask token, but the model's tokenizer has none.")
    columns = find_texts(splits, options)
    made = [
        table(tokenised(options, read_texts(rows, columns, options.spec)[1], return_special_tokens_mask=True))
        for rows in chosen
    ]
    return Features(made, DataCollatorForLanguageModeling(options.text_tokenizer), by_length=True)


def _text_classes(options: ReadOptions, splits: Sequence[Any], chosen: Sequence[Any]) -> Features:
    """Truncate texts or pairs of texts to `max_length` tokens, each with its class, labels int64 `[B]`."""
    columns = find_texts(splits, options)
    classes = find_classes(splits, options, taken=columns)
    made = []
    for rows in chosen:
        labels = None if classes is None else classes.labels(rows)
        kept, texts = read_texts(rows, columns, options.spec)
        features = tokenised(options, texts)
        made.append(table(features if labels is None else features | {"labels": [labels[index] for index in kept]}))
    return Features(made, padding_collator(options, made), by_length=True)


def _texts(options: ReadOptions, splits: Sequence[Any], chosen: Sequence[Any]) -> Features:
    """Truncate texts or pairs of texts to `max_length` tokens, without labels."""
    columns = find_texts(splits, options)
    made = [table(tokenised(options, read_texts(rows, columns, options.spec)[1])) for rows in chosen]
    return Features(made, padding_collator(options, made), by_length=True)


def _texts_to_texts(options: ReadOptions, splits: Sequence[Any], chosen: Sequence[Any]) -> Features:
    """Read texts and what they become: labels and the decoder's inputs, int64 `[B, T]`.

    An imitation without targets lets the decoder read the text itself.
    """
    from transformers import DataCollatorForSeq2Seq

    (column,) = find_texts(splits, options)[:1]
    target = find_label(splits, options, TARGET, taken=[column])
    made = []
    for rows in chosen:
        _, texts = read_texts(rows, [column] if target is None else [column, target], options.spec)
        made.append(table(tokenised(options, texts[:1]) | {"labels": target_ids(options, texts[-1])}))
    collate = DataCollatorForSeq2Seq(options.text_tokenizer, _without_weights(options.config))
    return Features(made, collate if target is not None else _unlabelled(collate), by_length=True)


def _without_weights(config: Any) -> Any:
    """Return the model on the meta device: it knows how labels become the decoder's inputs."""
    import transformers

    with quiet_transformers(), torch.device("meta"):
        return getattr(transformers, HEADS["seq2seq-lm"]).from_config(config)


def _unlabelled(collate: Any) -> Collate:
    def without(samples: Any) -> Mapping[str, Any]:
        return {name: value for name, value in collate(samples).items() if name != "labels"}

    return without


# --- images and sounds ------------------------------------------------------------------------------------------------


def _media_classes(reader: Any) -> Callable[..., Features]:
    def make(options: ReadOptions, splits: Sequence[Any], chosen: Sequence[Any]) -> Features:
        media = reader(options, splits)
        classes = find_classes(splits, options, taken=[media.column])
        made = [media.rows(rows) for rows in chosen]
        if classes is not None:
            made = [table.add_column("labels", classes.labels(rows)) for table, rows in zip(made, chosen, strict=True)]
        return Features(made, _with_labels(media))

    return make


def _with_labels(media: Any) -> Collate:
    def collate(samples: Sequence[dict[str, Any]]) -> Mapping[str, Any]:
        batch = dict(media(samples))
        if "labels" in samples[0]:
            batch["labels"] = torch.tensor([sample["labels"] for sample in samples])
        return batch

    return collate


def _media(options: ReadOptions, splits: Sequence[Any], chosen: Sequence[Any]) -> Features:
    media = (SoundReader if takes_sound(options.processor) else ImageReader)(options, splits)
    return Features([media.rows(rows) for rows in chosen], media)


def _transcribed(task: str) -> Callable[..., Features]:
    """Sounds with their texts as labels, int64 `[B, T]`, -100 for padding; with a decoder also its inputs."""

    def make(options: ReadOptions, splits: Sequence[Any], chosen: Sequence[Any]) -> Features:
        media = SoundReader(options, splits)
        target = find_label(splits, options, TARGET, taken=[media.column])
        decoder = getattr(options.config, "decoder", options.config) if task == "speech-seq2seq" else None
        if target is None:
            if decoder is not None:
                raise DataError(
                    f"{options.spec} has no text for the decoder to read.",
                    python="Name its column with label=.",
                    command="Name its column with --label.",
                )
            return Features([media.rows(rows) for rows in chosen], media)
        made = []
        for rows in chosen:
            kept, (texts,) = read_texts(rows, [target], options.spec)
            ids = target_ids(options, texts)
            if decoder is not None:  # the decoder's first input is not predicted
                start = decoder.decoder_start_token_id
                ids = [row[1:] if row[0] == start else row for row in ids]
            made.append(media.rows(rows).select(kept).add_column("labels", ids))
        return Features(made, _with_texts(media, decoder))

    return make


def _with_texts(media: Any, decoder: Any) -> Collate:
    """Collate sounds and the ids of their texts. decoder: the config of the decoder that reads them, or None."""
    from torch.nn.utils.rnn import pad_sequence
    from transformers.models.whisper.modeling_whisper import shift_tokens_right

    def collate(samples: Sequence[dict[str, Any]]) -> Mapping[str, Any]:
        rows = [torch.tensor(sample["labels"]) for sample in samples]
        labels = pad_sequence(rows, batch_first=True, padding_value=IGNORED)
        batch = {**media(samples), "labels": labels}
        if decoder is not None:
            start = decoder.decoder_start_token_id
            batch["decoder_input_ids"] = shift_tokens_right(labels, decoder.pad_token_id, start)
        return batch

    return collate


def _extraction(options: ReadOptions, splits: Sequence[Any], chosen: Sequence[Any]) -> Features:
    """Whatever the model reads, without labels: texts if it has a tokenizer, else images or sounds."""
    has_media = options.processor is not None or hasattr(options.config, "image_size")
    return (_media if options.tokenizer is None and has_media else _texts)(options, splits, chosen)


_MAKERS: dict[str, Callable[[ReadOptions, Sequence[Any], Sequence[Any]], Features]] = {
    "causal-lm": _chunks,
    "masked-lm": _masked,
    "sequence-classification": _text_classes,
    "token-classification": tag_features,
    "question-answering": answer_features,
    "seq2seq-lm": _texts_to_texts,
    "image-classification": _media_classes(ImageReader),
    "audio-classification": _media_classes(SoundReader),
    "ctc": _transcribed("ctc"),
    "speech-seq2seq": _transcribed("speech-seq2seq"),
    "feature-extraction": _extraction,
}
READABLE = (*_MAKERS, IMITATE)
"""The tasks whose data can be read from files."""

"""Tokenise texts, and what samples look like that are ready to be batched."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from surgeon.data.columns import ReadOptions
from surgeon.errors import DataError, UsageError
from surgeon.models.example_inputs import token_fields
from surgeon.models.hugging_face import blaming

Columns = dict[str, Sequence[Any]]
Collate = Callable[[Any], Mapping[str, Any]]


@dataclass(frozen=True)
class Features:
    """Samples that are ready to be batched.

    splits: a `datasets.Dataset` for each split. collate: makes a dict of tensors from a list of its rows.
    by_length: whether samples differ in length, so that those of like length go together. unit: what a sample is.
    """

    splits: list[Any]
    collate: Collate
    by_length: bool = False
    unit: str = "samples"


def table(columns: Mapping[str, Sequence[Any]]) -> Any:
    """Return a `datasets.Dataset` of these columns."""
    import datasets

    return datasets.Dataset.from_dict({name: list(values) for name, values in columns.items()})


WORDS_OF = "words of the tokens"
"""The column with the word, or the text, that each token is in."""


def tokenised(options: ReadOptions, texts: Sequence[Sequence[Any]], **more: Any) -> Columns:
    """Return token ids and masks of texts or pairs, cut to `max_length` tokens, and what else was asked for.

    Raises:
        DataError: a text has no token. UsageError: the tokenizer is not the model's.
    """
    tokenizer = options.text_tokenizer
    if not texts[0]:
        return dict.fromkeys(token_fields(tokenizer, options.config), ())
    with blaming("tokenizer"):
        rows = tokenizer(*map(list, texts), **{"truncation": True, "max_length": options.max_length, **more})
    lengths = [len(row) for row in rows["input_ids"]]
    if 0 in lengths:
        where = lengths.index(0)
        raise DataError(f"{options.spec}: the tokenizer gives no token for {tuple(text[where] for text in texts)}.")
    check_ids(torch.tensor(list(chain.from_iterable(rows["input_ids"]))), options)
    names = [*token_fields(tokenizer, options.config), *("special_tokens_mask", "offset_mapping")]
    found: Columns = {name: rows[name] for name in names if name in rows}
    if "is_split_into_words" in more:
        found[WORDS_OF] = [rows.word_ids(number) for number in range(len(lengths))]
    elif "return_offsets_mapping" in more:
        found[WORDS_OF] = [rows.sequence_ids(number) for number in range(len(lengths))]
    return found


def check_ids(ids: Tensor, options: ReadOptions) -> None:
    """Refuse ids, int64 of any shape, that the model has no embeddings for. Raises UsageError."""
    vocabulary = getattr(options.config, "vocab_size", None)
    if vocabulary is not None and ids.numel() and int(ids.max()) >= vocabulary:
        raise UsageError(
            f"The tokenizer gives id {int(ids.max())}, but the model has only {vocabulary} embeddings: they do not "
            "belong together."
        )


def padding_collator(options: ReadOptions, made: Sequence[Any]) -> Collate:
    """Pad a batch to its longest text. A tokenizer that cannot needs texts of one length."""
    from transformers import DataCollatorWithPadding, default_data_collator

    if options.text_tokenizer.pad_token_id is not None:
        return DataCollatorWithPadding(options.text_tokenizer)
    if len({len(ids) for table in made for ids in table["input_ids"]}) > 1:
        raise UsageError(
            "The tokenizer has no padding token, but the texts differ in length. "
            "Set pad_token in tokenizer_config.json and pad_token_id in config.json."
        )
    return default_data_collator


def target_ids(options: ReadOptions, texts: list[str]) -> list[list[int]]:
    """Return the ids of texts that the model is to write, cut to `max_length` tokens. Raises UsageError."""
    with blaming("tokenizer"):
        made = options.text_tokenizer(text_target=texts, truncation=True, max_length=options.max_length)["input_ids"]
    check_ids(torch.tensor(list(chain.from_iterable(made))), options)
    return list(made)

"""Turn the rows of a dataset into batches. The sampler of a task defines a sample, and how samples form a batch."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from surgeon.data.batch import Batch
from surgeon.data.classes import Classes
from surgeon.data.losses import IGNORED
from surgeon.errors import DataError, UsageError
from surgeon.models.example_inputs import token_fields
from surgeon.models.hugging_face import blaming

log = logging.getLogger("surgeon")

_TEXT = ("text", "sentence", "content", "review", "document", "question", "prompt")
_IMAGE = ("image", "img", "picture")
_LABEL = ("label", "labels", "target", "class", "category", "intent")


@dataclass(frozen=True)
class SampleOptions:
    """The options of `surgeon.data.files.load_data` that samplers need."""

    spec: str
    tokenizer: Any | None = None
    processor: Any | None = None
    config: Any | None = None
    text: str | None = None
    label: str | None = None
    max_length: int = 128


class Sampler(Protocol):
    """Makes samples and batches. It is built with all splits, because classes must be known before the first sample."""

    def __init__(self, options: SampleOptions, splits: Sequence[Any]) -> None: ...

    def samples(self, rows: Any) -> Sequence[Any]:
        """Return the samples of a split."""
        ...

    def collate(self, samples: Sequence[Any], generator: torch.Generator) -> Batch:
        """Make a batch of samples. All its randomness comes from `generator`."""
        ...

    def lengths(self, samples: Sequence[Any]) -> Sequence[int] | None:
        """Return the approximate length of each sample, so that a batch has similar lengths; None if all are equal."""
        ...


class CausalSampler:
    """Joins texts with an end-of-text token after each, and cuts them into chunks of `max_length`; drops the rest."""

    def __init__(self, options: SampleOptions, splits: Sequence[Any]) -> None:
        self.options = options
        self.tokenizer = _tokenizer(options)
        self.fields = token_fields(self.tokenizer, options.config)
        self.column = _column(splits, options.text, _TEXT, options.spec, "text")

    def samples(self, rows: Any) -> Sequence[Tensor]:
        """Return chunks of ids, int64 `[max_length]`. If the text is too short for a chunk, it is one shorter chunk."""
        end = self.tokenizer.eos_token_id
        ids: list[int] = []
        for (text,) in _texts(rows, [self.column], self.options.spec):
            with blaming("tokenizer"):
                ids += self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            if end is not None:
                ids.append(end)
        size = min(self.options.max_length, len(ids))
        if size < 2:
            return []
        flat = torch.tensor(ids)
        _check_ids(flat, self.options)
        return list(flat[: len(flat) // size * size].view(-1, size))

    def collate(self, samples: Sequence[Tensor], generator: torch.Generator) -> Batch:
        """Use the ids, int64 `[B, T]`, as both inputs and labels. The loss shifts them."""
        ids = torch.stack(list(samples))
        make = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
        return Batch((), {name: make[name] for name in self.fields}, ids)

    def lengths(self, samples: Sequence[Any]) -> None:
        """All are alike."""


class MaskedSampler:
    """Truncates texts to `max_length` tokens. 15% of the tokens, drawn again for each batch, are to be predicted."""

    def __init__(self, options: SampleOptions, splits: Sequence[Any]) -> None:
        from transformers import DataCollatorForLanguageModeling

        self.options = options
        self.tokenizer = _tokenizer(options)
        if self.tokenizer.mask_token is None:
            raise UsageError("masked-lm needs a tokenizer with a mask token, but the model's tokenizer has none.")
        self.columns = _columns(splits, options)
        self.masker: Any = DataCollatorForLanguageModeling(self.tokenizer)

    def samples(self, rows: Any) -> Sequence[tuple[str, ...]]:
        """Return texts, or pairs of texts."""
        return _texts(rows, self.columns, self.options.spec)

    def collate(self, samples: Sequence[tuple[str, ...]], generator: torch.Generator) -> Batch:
        """Make padded ids and mask, int64 `[B, T]`. Labels are -100 except at the tokens to predict."""
        encoded = _encode(samples, self.tokenizer, self.options)
        self.masker.generator = generator
        with blaming("tokenizer"):
            special = [
                self.tokenizer.get_special_tokens_mask(row, already_has_special_tokens=True)
                for row in encoded["input_ids"].tolist()
            ]
            ids, labels = self.masker.torch_mask_tokens(encoded["input_ids"], torch.tensor(special))
        if "attention_mask" in encoded:
            labels = labels.masked_fill(encoded["attention_mask"] == 0, IGNORED)
        return Batch((), encoded | {"input_ids": ids}, labels)

    def lengths(self, samples: Sequence[tuple[str, ...]]) -> list[int]:
        """Characters."""
        return [sum(map(len, texts)) for texts in samples]


class TextClassSampler:
    """Truncates texts or pairs of texts to `max_length` tokens. Each has a class."""

    def __init__(self, options: SampleOptions, splits: Sequence[Any]) -> None:
        self.options = options
        self.tokenizer = _tokenizer(options)
        self.columns = _columns(splits, options)
        self.classes = _classes(options, splits)

    def samples(self, rows: Any) -> Sequence[tuple[tuple[str, ...], int]]:
        """Return texts with their classes."""
        labels = self.classes.labels(rows)
        return _texts(rows, self.columns, self.options.spec, labels)

    def collate(self, samples: Sequence[tuple[tuple[str, ...], int]], generator: torch.Generator) -> Batch:
        """Make ids and mask, int64 `[B, T]`, padded to the longest text, and labels, int64 `[B]`."""
        encoded = _encode([text for text, _ in samples], self.tokenizer, self.options)
        return Batch((), encoded, torch.tensor([label for _, label in samples]))

    def lengths(self, samples: Sequence[tuple[tuple[str, ...], int]]) -> list[int]:
        """Characters."""
        return [sum(map(len, texts)) for texts, _ in samples]


class ImageClassSampler:
    """Reads images with their classes. Images are decoded when they are needed."""

    def __init__(self, options: SampleOptions, splits: Sequence[Any]) -> None:
        self.options = options
        self.column = _column(splits, options.text, _IMAGE, options.spec, "image")
        self.classes = _classes(options, splits)
        channels = getattr(options.config, "num_channels", 3)
        self.mode = "L" if channels == 1 else "RGB"
        size = getattr(options.config, "image_size", None)
        if options.processor is None and size is None:
            raise UsageError("image-classification needs an image processor, or a config with an image_size.")
        self.size = (size, size) if isinstance(size, int) or size is None else tuple(size)

    def samples(self, rows: Any) -> Sequence[tuple[Any, int, int]]:
        """Return (rows, row number, class) for each image."""
        return [(rows, index, label) for index, label in enumerate(self.classes.labels(rows))]

    def collate(self, samples: Sequence[tuple[Any, int, int]], generator: torch.Generator) -> Batch:
        """Make pixels, float32 `[B, C, H, W]`, and labels, int64 `[B]`."""
        images = [self._image(rows, index) for rows, index, _ in samples]
        if self.options.processor is not None:
            with blaming("processor"):
                pixels = self.options.processor(images=images, return_tensors="pt")["pixel_values"]
        else:
            pixels = torch.stack([self._pixels(image) for image in images])
        return Batch((), {"pixel_values": pixels}, torch.tensor([label for _, _, label in samples]))

    def _image(self, rows: Any, index: int) -> Any:
        from PIL import Image

        try:
            image = rows[index][self.column]
        except Exception as error:  # a damaged file, found when it is decoded
            raise DataError(f"{self.options.spec}: the image of row {index} cannot be read: {error}") from error
        if not isinstance(image, Image.Image):
            raise DataError(
                f"{self.options.spec}, row {index}: column '{self.column}' contains {type(image).__name__} values, "
                "not images."
            )
        return image.convert(self.mode)

    def _pixels(self, image: Any) -> Tensor:
        import numpy as np

        height, width = self.size
        pixels = torch.from_numpy(np.array(image.resize((width, height)))).float() / 255
        return pixels.unsqueeze(0) if self.mode == "L" else pixels.permute(2, 0, 1)

    def lengths(self, samples: Sequence[Any]) -> None:
        """All are alike."""


SAMPLERS: dict[str, type[Sampler]] = {
    "causal-lm": CausalSampler,
    "masked-lm": MaskedSampler,
    "sequence-classification": TextClassSampler,
    "image-classification": ImageClassSampler,
}


# --- columns and text -------------------------------------------------------------------------------------------------


def _column(splits: Sequence[Any], given: str | None, usual: Sequence[str], spec: str, what: str) -> str:
    """Return the column that is given, else the first of the usual ones. All splits must have it."""
    names = splits[0].column_names
    found = given if given is not None else next((name for name in usual if name in names), None)
    asked = f"column '{found}'" if found is not None else f"{what} column"
    for number, rows in enumerate(splits):
        if found is None or found not in rows.column_names:
            where = spec if number == 0 else f"The split of {spec} to evaluate on"
            have = ", ".join(rows.column_names)
            raise DataError(f"{where} has no {asked}. Its columns: {have}. Name the {what} column.")
    assert found is not None
    return found


def _columns(splits: Sequence[Any], options: SampleOptions) -> list[str]:
    given = options.text
    if given is not None and given not in splits[0].column_names and given.count(",") == 1:
        return [_column(splits, name.strip(), _TEXT, options.spec, "text") for name in given.split(",")]
    return [_column(splits, given, _TEXT, options.spec, "text")]


def _classes(options: SampleOptions, splits: Sequence[Any]) -> Classes:
    column = _column(splits, options.label, _LABEL, options.spec, "label")
    return Classes(options.spec, column, splits, options.config)


def _texts(rows: Any, columns: Sequence[str], spec: str, labels: Sequence[int] | None = None) -> list[Any]:
    """Return the texts of the columns, with labels if given. Rows with an empty text are left out."""
    kept: list[Any] = []
    for index, texts in enumerate(zip(*(rows[column] for column in columns), strict=True)):
        for column, text in zip(columns, texts, strict=True):
            if not isinstance(text, str | None):
                kind = type(text).__name__
                raise DataError(f"{spec}, row {index}: column '{column}' contains {kind} values, not text.")
        if all(text and not text.isspace() for text in texts):
            kept.append(texts if labels is None else (texts, labels[index]))
    skipped = len(rows) - len(kept)
    if skipped:
        log.warning("%s: %d of %d rows have no text and are left out.", spec, skipped, len(rows))
    return kept


def _tokenizer(options: SampleOptions) -> Any:
    if options.tokenizer is None:
        raise UsageError(
            f"{options.spec} is text, but the model has no tokenizer. Give token ids with --data module:function."
        )
    return options.tokenizer


def _encode(texts: Sequence[tuple[str, ...]], tokenizer: Any, options: SampleOptions) -> dict[str, Tensor]:
    """Make token ids and masks, `[B, T]`, padded to the longest text of the batch."""
    with blaming("tokenizer"):
        encoded = _padded(texts, tokenizer, options)
    _check_ids(encoded["input_ids"], options)
    return encoded


def _padded(texts: Sequence[tuple[str, ...]], tokenizer: Any, options: SampleOptions) -> dict[str, Tensor]:
    rows = tokenizer(*map(list, zip(*texts, strict=True)), truncation=True, max_length=options.max_length)
    lengths = [len(row) for row in rows["input_ids"]]
    if 0 in lengths:
        raise DataError(f"{options.spec}: the tokenizer gives no token for {texts[lengths.index(0)]!r}.")
    if tokenizer.pad_token_id is None and len(set(lengths)) > 1:
        raise UsageError(
            "The tokenizer has no padding token, but the texts differ in length. "
            "Set pad_token in tokenizer_config.json and pad_token_id in config.json."
        )
    kept = {name: rows[name] for name in token_fields(tokenizer, options.config)}
    if tokenizer.pad_token_id is None:
        return {name: torch.tensor(values) for name, values in kept.items()}
    return dict(tokenizer.pad(kept, return_tensors="pt"))


def _check_ids(ids: Tensor, options: SampleOptions) -> None:
    vocabulary = getattr(options.config, "vocab_size", None)
    if vocabulary is not None and int(ids.max()) >= vocabulary:
        raise UsageError(
            f"The tokenizer gives id {int(ids.max())}, but the model has only {vocabulary} embeddings: they do not "
            "belong together."
        )

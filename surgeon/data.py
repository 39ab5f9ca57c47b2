"""Read data for fitting and evaluation from files, folders, or a function the user names.

Everything is read into memory once. Order, held-out samples and masking depend on the seed alone, not on torch's global
random state.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from surgeon.batch import Batch, Batches, Data
from surgeon.checkpoint import sha256_of
from surgeon.errors import DataError, UsageError
from surgeon.inputs import token_fields
from surgeon.losses import IGNORED, task_of
from surgeon.user_function import call_spec, is_spec

__all__ = ["Batch", "Batches", "Data", "load_data"]

log = logging.getLogger("surgeon")

_COLUMNS = {
    "text": ("text", "sentence", "content", "review", "document", "question", "prompt"),
    "image": ("image", "img", "picture"),
    "label": ("label", "labels", "target", "class", "category", "intent"),
}
_EVALUATION = ("validation", "valid", "dev", "eval", "test")  # public test splits often come without labels
_READERS: dict[str, tuple[str, dict[str, str]]] = {
    ".json": ("from_json", {}),
    ".jsonl": ("from_json", {}),
    ".csv": ("from_csv", {}),
    ".tsv": ("from_csv", {"sep": "\t"}),
    ".parquet": ("from_parquet", {}),
    ".txt": ("from_text", {}),
}

Collate = Callable[[list[Any], torch.Generator], Batch]


def load_data(
    spec: str,
    *,
    tokenizer: Any | None = None,
    processor: Any | None = None,
    config: Any | None = None,
    text: str | None = None,
    label: str | None = None,
    task: str | None = None,
    batch_size: int = 16,
    max_length: int = 128,
    seed: int = 0,
    eval_fraction: float = 0.1,
    limit: int | None = None,
) -> Data:
    """Read data and prepare it for a Hugging Face model.

    A split named "train" is trained on and "validation" or "test" measured on; a single split is divided.

    Args:
        spec: a file (JSON, JSONL, CSV, TSV, Parquet, or text with one sample per line), a folder that `datasets` can read
            (such files, one folder of images per class, or a saved dataset), or `module:function`, called without arguments
            for `Data`, batches, or a dataset.
        tokenizer, processor, config: those of the model. Without a processor images are resized to the config's size and
            scaled to 0..1.
        text: the column with the text or the image; two text columns, "premise,hypothesis", are read as pairs.
        label: the column with the class: integers, or names looked up in `config.label2id`.
        task: "causal-lm", "masked-lm", "sequence-classification" or "image-classification"; by default the config's.
        batch_size: samples (for causal-lm: chunks of `max_length` tokens) in a batch; the last one may be smaller.
        max_length: tokens after which texts are cut. For causal-lm the texts are joined and cut into chunks.
        seed: of the order (another one in each epoch), the division and the masking.
        eval_fraction: share to hold out where there is one split only, 0 to hold out nothing.
        limit: read at most so many rows of each split: the first ones for causal-lm, else random ones.

    Raises:
        DataError: there is no such file, column or label; it holds nothing; labels are missing, not finite or out of range.
        UsageError: an option does not make sense, or the task needs a tokenizer that was not given.
    """
    if batch_size < 1 or max_length < 2 or not 0 <= eval_fraction < 1 or (limit is not None and limit < 1):
        raise UsageError(
            f"Cannot read data with batch_size={batch_size}, max_length={max_length}, eval_fraction={eval_fraction}, "
            f"limit={limit}: at least 1, 2, 0 (and below 1) and 1."
        )
    found, origin = _read(spec)
    task = task or (task_of(config) if config is not None else None)
    if not isinstance(found, Mapping):
        data = Data.of(found, task=task)
        return Data(data.train, data.eval, data.task, f"{spec}: {data.description}", f"python:{spec}", data.loss)
    if task not in _PREPARE:
        known = ", ".join(_PREPARE)
        raise UsageError(f"{spec}: which task is this data for? {f'Not {task!r}. ' if task else ''}Give one of {known}.")
    options = _Options(spec, tokenizer, processor, config, text, label, batch_size, max_length, seed)
    train, held = _split(found, spec)
    columns, collate = _PREPARE[task](train if held is None else _same_columns(train, held), options)
    subsets = [_limited(part, limit, seed, task) for part in (train, held) if part is not None]
    samples = [columns(part) for part in subsets]
    if held is None:
        samples = _hold_out(samples[0], eval_fraction, seed)
    if not samples[0]:
        raise DataError(f"{spec} holds no sample to train on.")
    loaders = [
        Batches(_Loader(part, collate, batch_size, seed, shuffle=not number)) for number, part in enumerate(samples) if part
    ]
    kind = "chunks" if task == "causal-lm" else "samples"
    described = f"{spec}: {len(samples[0])} training {kind}, {len(samples[1]) if len(loaders) > 1 else 'no'} for evaluation"
    settings = [origin, task, text, label, batch_size, max_length, seed, eval_fraction, limit]
    fingerprint = hashlib.sha256(json.dumps(settings).encode()).hexdigest()
    return Data(loaders[0], loaders[1] if len(loaders) > 1 else None, task, described, fingerprint)

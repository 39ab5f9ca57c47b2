"""Read data for fitting and evaluation from files, folders, or a function that the user names.

All data is read into memory once. The order, the held-out samples and the masking depend only on the seed, not on
torch's global random state.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from surgeon.data.batch import Batch, Batches
from surgeon.data.columns import ReadOptions
from surgeon.data.data import Data
from surgeon.data.features import READABLE, make_features
from surgeon.data.losses import blank_of, task_loss
from surgeon.data.tables import READERS, read_table
from surgeon.data.tokens import Collate
from surgeon.errors import DataError, SurgeonError, UsageError
from surgeon.models.tasks import IMITATE, task_of
from surgeon.models.user_function import call_spec, is_spec
from surgeon.models.weight_files import sha256_of

__all__ = ["Batch", "Batches", "Data", "load_data"]

log = logging.getLogger("surgeon")

_EVALUATION = ("validation", "valid", "dev", "eval", "test")  # public test splits often come without labels


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

    The model is fitted on the split "train" and measured on "validation" or "test". A single split is divided.

    Args:
        spec: a file, a folder or `module:function`. A file is JSON, JSONL, CSV, TSV, Parquet, or text with one sample
            per line. A folder is one that `datasets` can read: such files, one folder of images or sounds per class, or
            a saved dataset. A function is called without arguments and returns `Data`, batches, or a dataset.
        tokenizer, processor, config: those of the model. Without a processor images are resized to the config's size
            and scaled to 0..1.
        text: the column with the text, the words, the image or the sound. Two columns, "premise,hypothesis" or
            "question,context", are read as pairs.
        label: the column with the class (numbers, or names: `surgeon.data.classes` has the rule), the tags of words,
            the answer, or the text to write.
        task: one of `surgeon.data.features.READABLE`, by default the config's. "imitate" reads what the model's own
            task reads, and labels only if there are any.
        batch_size: samples (for causal-lm: chunks of `max_length` tokens) in a batch. The last batch may be smaller.
        max_length: the number of tokens to which texts are truncated, or that of the model's positions if it has fewer.
            For causal-lm the texts are joined and cut into chunks of this length.
        seed: seed of the order, which changes with each epoch, the division and the masking.
        eval_fraction: share of a single split to hold out; 0 holds out nothing.
        limit: the most rows to read from each split: the first ones for causal-lm, else random ones.

    Raises:
        DataError: there is no such file, column or label, there is no data, or labels are missing, not finite or out of
            range.
        UsageError: an option is out of range, or the task needs a tokenizer that was not given.
    """
    _check_range("batch_size", batch_size, batch_size >= 1, "at least 1")
    _check_range("max_length", max_length, max_length >= 2, "at least 2")
    _check_range("eval_fraction", eval_fraction, 0 <= eval_fraction < 1, "at least 0 and below 1")
    _check_range("limit", limit, limit is None or limit >= 1, "at least 1")
    found, origin = _read(spec)
    task = task or (task_of(config) if config is not None else None)
    if not isinstance(found, Mapping):
        data = Data.of(found, task=task)
        return Data(data.train, data.eval, data.task, f"{spec}: {data.description}", f"python:{spec}", data.loss)
    if task not in READABLE:
        wrong = f"files cannot be read for the task {task!r}" if task else "the task is unknown"
        tasks = ", ".join(READABLE)
        raise UsageError(
            f"{spec}: {wrong}.", python=f"Give task=, one of {tasks}.", command=f"Give --task, one of {tasks}."
        )
    splits = _splits(found, spec)
    own = task_of(config) if task == IMITATE else task
    chosen = [_limited(split, limit, seed, in_order=own == "causal-lm") for split in splits]
    positions = getattr(config, "max_position_embeddings", None)
    if isinstance(positions, int) and 2 <= positions < max_length:
        log.info("Texts are cut after %d tokens instead of %d: the model has no more positions.", positions, max_length)
        max_length = positions
    options = ReadOptions(spec, tokenizer, processor, config, text, label, max_length, task == IMITATE)
    with _quiet_datasets(spec):
        features = make_features(task, options, splits, chosen)
        parts = features.splits
        if len(parts) == 1:
            parts = _hold_out(parts[0], eval_fraction, seed)
    if not len(parts[0]):
        raise DataError(f"{spec} contains no samples to train on.")
    train, held = parts[0], parts[1] if len(parts) > 1 and len(parts[1]) else None
    counts = f"{len(train)} {features.unit} to train on, {len(held) if held is not None else 'none'} to evaluate on"
    settings = [origin, task, text, label, batch_size, max_length, seed, eval_fraction, limit]

    def batches(rows: Any, *, shuffle: bool) -> Batches:
        lengths = list(map(len, rows["input_ids"])) if features.by_length else None
        return Batches(Loader(rows, features.collate, batch_size, seed, lengths=lengths, shuffle=shuffle))

    return Data(
        batches(train, shuffle=True),
        None if held is None else batches(held, shuffle=False),
        task,
        f"{spec}: {counts}",
        hashlib.sha256(json.dumps(settings).encode()).hexdigest(),
        task_loss(task, blank=blank_of(config)),
    )


class Loader:
    """Batches of a dataset's rows, in a different order in each epoch if shuffled.

    The order and the masking of an epoch depend only on the seed and the epoch's number, so that a resumed fit sees the
    batches that it would have seen. Without shuffling every epoch is the same. Rows of similar length share a batch, so
    that there is little padding: they are sorted by length within windows of many batches.
    """

    WINDOW = 50  # batches

    def __init__(
        self,
        rows: Any,
        collate: Collate,
        batch_size: int,
        seed: int,
        *,
        lengths: list[int] | None = None,
        shuffle: bool,
    ) -> None:
        self.rows, self.collate, self.lengths = rows, collate, lengths
        self.batch_size, self.seed, self.shuffle = batch_size, seed, shuffle
        self.epoch = 0

    def __iter__(self) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        self.epoch += self.shuffle
        if hasattr(self.collate, "generator"):  # of the masking
            self.collate.generator = generator
        batches = self._batches(generator)
        loader = DataLoader(self.rows, batch_sampler=batches, collate_fn=self.collate, generator=generator)
        return map(Batch.from_any, loader)

    def _batches(self, generator: torch.Generator) -> list[list[int]]:
        """Return the numbers of the rows of each batch."""
        count, size = len(self.rows), self.batch_size
        if self.lengths is not None:
            from transformers import trainer_pt_utils  # it imports much

            group: Any = trainer_pt_utils.get_length_grouped_indices  # not annotated
            order = group(self.lengths, size, self.WINDOW, generator)
        elif self.shuffle:
            order = torch.randperm(count, generator=generator).tolist()
        else:
            order = list(range(count))
        batches = [order[start : start + size] for start in range(0, count, size)]
        if self.lengths is None or not self.shuffle:
            return batches
        # They come with the long ones first, which would be trained on first.
        return [batches[place] for place in torch.randperm(len(batches), generator=generator).tolist()]

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch_size)


def _check_range(name: str, value: float | None, fits: bool, limits: str) -> None:
    """Refuse a value out of range."""
    if not fits:
        option = name.replace("_", "-")
        text = f"must be {limits}."
        raise UsageError(python=f"{name} is {value}, but {text}", command=f"--{option} is {value}, but {text}")


def _splits(found: Mapping[str, Any], spec: str) -> list[Any]:
    """Return the split to train on and, if there is one, the split to evaluate on."""
    if len(found) == 1:
        return list(found.values())
    if "train" not in found:
        raise DataError(f"{spec} has the splits {', '.join(found)}, but none is named 'train'. Rename one of them.")
    held = next((found[name] for name in _EVALUATION if name in found), None)
    return [found["train"]] if held is None else [found["train"], held]


def _limited(rows: Any, limit: int | None, seed: int, *, in_order: bool) -> Any:
    """Return at most `limit` rows: the first, because lines of a text belong together, or random ones of a table."""
    if limit is None or limit >= len(rows):
        return rows
    if in_order:
        return rows.select(range(limit))
    chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:limit]
    return rows.select(chosen.sort().values.tolist())


def _hold_out(rows: Any, fraction: float, seed: int) -> list[Any]:
    """Return the rows to train on and those to hold out, at least one of several."""
    count = len(rows)
    held = max(1, round(count * fraction)) if fraction and count > 1 else 0
    if fraction and not held:
        log.warning("There is too little data to hold out a part, so quality cannot be measured.")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return [rows.select(sorted(part)) for part in (order[held:], order[:held])]


# --- reading ----------------------------------------------------------------------------------------------------------


def _read(spec: str) -> tuple[Any, str]:
    """Return what `spec` names, and a text that identifies it. Datasets are returned as a dict of splits."""
    path = Path(spec)
    if path.is_file():
        return {"train": _read_file(path)}, sha256_of([path])
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        if not files:
            raise DataError(f"{spec} is an empty folder.")
        return _read_folder(path), sha256_of(files, path)
    if not is_spec(spec):
        raise DataError(f"No file or folder '{spec}', and it is not module:function. Data is not downloaded.")
    import datasets

    made = call_spec(spec, DataError)
    if isinstance(made, datasets.Dataset):
        made = {"train": made}
    elif isinstance(made, datasets.IterableDataset | datasets.IterableDatasetDict):
        raise DataError(f"{spec} returns a streaming dataset. Load it into memory (streaming=False).")
    return made, f"python:{spec}"


def _read_file(path: Path) -> Any:
    with _quiet_datasets(str(path)) as cache:
        return read_table(path, cache)


def _read_folder(path: Path) -> Mapping[str, Any]:
    import datasets

    with _quiet_datasets(str(path)) as cache:
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            saved = datasets.load_from_disk(str(path), keep_in_memory=True)
            return saved if isinstance(saved, Mapping) else {"train": saved}
        builder = datasets.load_dataset_builder(str(path), cache_dir=cache)
        splits = {name: [Path(file) for file in files] for name, files in (builder.config.data_files or {}).items()}
        if all(file.suffix in READERS for files in splits.values() for file in files):
            return {
                str(name): datasets.concatenate_datasets([read_table(file, cache) for file in files])
                for name, files in splits.items()
            }
        if builder.name == "audiofolder":
            return {str(name): _sounds(files, cache) for name, files in splits.items()}
        found = datasets.load_dataset(str(path), cache_dir=cache, keep_in_memory=True)
        return {str(name): _with_cells(rows, splits[name], cache) for name, rows in found.items()}


def _sounds(files: Sequence[Path], cache: str) -> Any:
    """Return the paths of sounds, with the cells of their metadata.csv, else with the folder of each as its label.

    `datasets` would need torchcodec for it, which needs ffmpeg.
    """
    import datasets

    tables = [file for file in files if file.stem == "metadata"]
    if not tables:
        columns = {"audio": list(map(str, files)), "label": [file.parent.name for file in files]}
        return datasets.Dataset.from_dict(columns if len(set(columns["label"])) > 1 else {"audio": columns["audio"]})
    parts = []
    for file in tables:
        rows = read_table(file, cache)
        if "file_name" not in rows.column_names:
            raise DataError(f"{file} has no column 'file_name'. Its columns: {', '.join(rows.column_names)}.")
        paths = [str(file.parent / name) for name in rows["file_name"]]
        parts.append(rows.remove_columns("file_name").add_column("audio", paths))
    return datasets.concatenate_datasets(parts)


def _with_cells(rows: Any, files: Sequence[Path], cache: str) -> Any:
    """Give the rows of an image folder the cells of its metadata.csv, which `datasets` reads by guessing."""
    import datasets

    tables = [read_table(file, cache) for file in files if file.name == "metadata.csv"]
    if not tables:
        return rows
    cells = datasets.concatenate_datasets(tables)
    for name in set(cells.column_names) & set(rows.column_names):
        pairs = zip(rows[name], cells[name], strict=True)
        if any(isinstance(guessed, str) and guessed != cell for guessed, cell in pairs):
            raise DataError("the rows of several metadata.csv do not have the order of the images. Merge the files.")
        rows = rows.remove_columns(name).add_column(name, list(cells[name]))
    return rows


@contextlib.contextmanager
def _quiet_datasets(origin: str) -> Iterator[str]:
    """Silence `datasets`, give it a temporary cache, and turn its exceptions into a DataError."""
    import datasets

    verbosity, bars = datasets.logging.get_verbosity(), datasets.is_progress_bar_enabled()
    datasets.logging.set_verbosity(logging.CRITICAL)  # an error is raised anyway
    datasets.disable_progress_bars()
    try:
        with tempfile.TemporaryDirectory() as cache:
            yield cache
    except SurgeonError:
        raise
    except Exception as error:
        reason = str(error.__cause__ or error).strip() or type(error).__name__
        if "corresponds to no data" in reason:  # the message of `datasets` for a file without rows
            reason = "it has no rows"
        raise DataError(f"{origin} cannot be read: {reason}") from error
    finally:
        datasets.logging.set_verbosity(verbosity)
        if bars:
            datasets.enable_progress_bars()

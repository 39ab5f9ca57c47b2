"""Load a Hugging Face directory, and report weights that are new or unused and files that are damaged."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgeon.errors import LoadError, SurgeonError, first_line
from surgeon.models.tasks import HEADS
from surgeon.models.weight_files import check_safetensors, check_torch_file

_WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json"),
    *("tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
)
_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


@dataclass(frozen=True)
class Directory:
    """The contents of a directory. The tokenizer and the processor are None if the directory has none.

    files: the weight files. notes: what a user should know about the model, one sentence each.
    """

    model: Any
    tokenizer: Any | None
    processor: Any | None
    files: list[Path]
    notes: tuple[str, ...]


def load_directory(path: Path, task: str | None) -> Directory:
    """Load a directory that has a `config.json`, without running code from it.

    Args:
        task: the head to load it with, one of `HEADS`; by default the one in its config.

    Raises:
        LoadError: the directory is incomplete or damaged, or its class is not in transformers.
    """
    files = _weight_files(path)
    config = read_config(path)
    with quiet_transformers():
        try:
            model, info = model_class(config, task).from_pretrained(
                path, local_files_only=True, trust_remote_code=False, output_loading_info=True
            )
        except SurgeonError:
            raise
        except Exception as error:  # transformers raises exceptions of many types
            raise LoadError(f"{path} cannot be loaded: {first_line(error)}") from error
    notes = _loading_notes(path, model, info)
    tokenizer, tokenizer_notes = _part(path, _TOKENIZER_FILES, ("AutoTokenizer",))
    processor, processor_notes = _part(path, _PROCESSOR_FILES, ("AutoImageProcessor", "AutoFeatureExtractor"))
    return Directory(model, tokenizer, processor, files, (*notes, *tokenizer_notes, *processor_notes))


def companions(path: Path) -> tuple[Any | None, Any | None, Any | None]:
    """Load the config, tokenizer and processor that were saved with a surgery. Each is None if it was not saved."""
    import transformers

    def part(file: str, loader: str) -> Any | None:
        if not (path / file).is_file():
            return None
        return getattr(transformers, loader).from_pretrained(path, local_files_only=True, trust_remote_code=False)

    with quiet_transformers():
        config = part("config.json", "AutoConfig")
        if config is None:
            return None, None, None
        return config, part("tokenizer_config.json", "AutoTokenizer"), part("preprocessor_config.json", "AutoProcessor")


def read_config(path: Path) -> Any:
    """Read a `config.json`, or the one in a directory.

    Raises:
        LoadError: the config is damaged, or transformers does not have its model type.
    """
    import transformers

    with quiet_transformers():
        try:
            return transformers.AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        except Exception as error:
            raise LoadError(f"{path}: cannot read config.json: {first_line(error)}") from error


def model_class(config: Any, task: str | None) -> Any:
    """Return the class for a config's weights: the task's class, the class the config names, or `AutoModel`.

    Raises:
        LoadError: transformers has no class of the name in the config.
    """
    import transformers

    if task is not None:
        return getattr(transformers, HEADS[task])
    names = getattr(config, "architectures", None)
    if not names:
        return transformers.AutoModel
    found = getattr(transformers, names[0], None)
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise LoadError(
            f"config.json names the class {names[0]}, which transformers {transformers.__version__} does not have. "
            "Code from model directories is never run. Build the model in Python and give module:function."
        )
    return found


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence the warnings and progress bars of transformers. Errors and notes report what matters."""
    from transformers.utils import logging

    hf_logging: Any = logging  # not annotated
    verbosity, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()


def _weight_files(path: Path) -> list[Path]:
    """Return the weight files of a Hugging Face directory. Each must exist and have a valid header."""
    name = next((name for name in _WEIGHT_FILES if (path / name).is_file()), None)
    if name is None:
        raise LoadError(f"{path} has a config.json but no weights. It needs one of {', '.join(_WEIGHT_FILES)}.")
    files = [path / name]
    if name.endswith(".index.json"):
        try:
            shards = sorted(set(json.loads(files[0].read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise LoadError(f"{files[0]} is damaged: it does not list the weight files.") from error
        files = [path / shard for shard in shards]
    for file in files:
        if not file.is_file():
            raise LoadError(f"The weight file {file.name}, which {name} lists, is missing from {path}.")
        if file.suffix == ".safetensors":
            check_safetensors(file)
        else:
            check_torch_file(file)
    return files


def _loading_notes(path: Path, model: Any, info: Mapping[str, Any]) -> tuple[str, ...]:
    """Note which weights are new or unused, and refuse a model whose body is incomplete.

    A new task needs a new head, and checkpoints of language models often have no pooler. Any other missing weight would
    leave random weights inside the model.
    """
    missing = sorted(info["missing_keys"])
    prefix = model.base_model_prefix + "."
    headless = model.base_model is model
    body = [name for name in missing if (headless or name.startswith(prefix)) and "pooler" not in name]
    if body:
        raise LoadError(f"{path}: the weight files are incomplete. They do not contain {some(body)}.")
    notes = []
    if missing:
        notes.append(f"{some(missing)} {'is' if len(missing) == 1 else 'are'} newly initialised.")
    if unused := sorted(info["unexpected_keys"]):
        notes.append(f"{type(model).__name__} does not use {some(unused)} from the weight files.")
    return tuple(notes)


def _part(path: Path, files: tuple[str, ...], loaders: tuple[str, ...]) -> tuple[Any | None, tuple[str, ...]]:
    """Load the tokenizer or processor of a directory, with a note if its files exist but cannot be loaded."""
    import transformers

    present = [name for name in files if (path / name).is_file()]
    if not present:
        return None, ()
    reason = ""
    with quiet_transformers():
        for name in loaders:
            try:
                loader = getattr(transformers, name)
                return loader.from_pretrained(path, local_files_only=True, trust_remote_code=False), ()
            except Exception as error:
                reason = reason or first_line(error)
    return None, (f"{present[0]} exists but cannot be loaded: {reason}.",)


def some(names: list[str], limit: int = 3) -> str:
    """Join the first names of a list, and say how many more there are."""
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")

"""Load a Hugging Face directory, and report weights that are new or unused and files that are damaged."""

from __future__ import annotations

import contextlib
import difflib
import json
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from surgeon.errors import LoadError, SurgeonError, UsageError, first_line, some
from surgeon.models.tasks import HEADS
from surgeon.models.weight_files import check_safetensors, check_torch_file, read_safetensors, read_torch_file
from surgeon.models.weight_names import best_fit

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


def is_pretrained(model: Any) -> bool:
    """Whether a model is one of transformers. This does not import transformers."""
    return any(base.__name__ == "PreTrainedModel" for base in type(model).__mro__)


def load_directory(path: Path, task: str | None) -> Directory:
    """Load a directory that has a `config.json`, without running code from it.

    Args:
        task: the head to load it with, one of `HEADS`; by default the one in its config.

    Raises:
        LoadError: the directory is incomplete or damaged, holds an adapter or weights that do not fit its config, or
            its class is not in transformers.
    """
    files = weight_files(path)
    config = read_config(path)
    with quiet_transformers():
        try:
            model, info = model_class(config, task).from_pretrained(
                path,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused below, by name
            )
        except SurgeonError:
            raise
        except Exception as error:  # transformers raises exceptions of many types
            raise LoadError(f"{path} cannot be loaded as its config.json says: {first_line(error)}.") from error
    unwrapped = _unwrap(files, model, info)
    notes = (*unwrapped, *_loading_notes(path, model, info))
    tokenizer, tokenizer_notes = _part(path, _TOKENIZER_FILES, ("AutoTokenizer",))
    processor, processor_notes = _part(path, _PROCESSOR_FILES, ("AutoImageProcessor", "AutoFeatureExtractor"))
    return Directory(model, tokenizer, processor, files, (*notes, *tokenizer_notes, *processor_notes))


def companions(path: Path) -> tuple[Any | None, Any | None, Any | None, Any | None]:
    """Load what was saved with a surgery: config, tokenizer, processor and generation config. None if it was not saved.

    Raises:
        LoadError: a file of theirs is damaged.
    """
    if not (path / "config.json").is_file():
        return None, None, None, None
    import transformers

    def part(file: str, loader: str) -> Any | None:
        if not (path / file).is_file():
            return None
        try:
            options = {} if loader == "GenerationConfig" else {"trust_remote_code": False}
            return getattr(transformers, loader).from_pretrained(path, local_files_only=True, **options)
        except Exception as error:
            raise LoadError(
                f"{path}: cannot read {file} or a file beside it: {first_line(error)}. Save the surgery again, or copy "
                "the files of the original model there."
            ) from error

    with quiet_transformers():
        config = part("config.json", "AutoConfig")
        tokenizer = part("tokenizer_config.json", "AutoTokenizer")
        processor = part("preprocessor_config.json", "AutoProcessor")
        return config, tokenizer, processor, part("generation_config.json", "GenerationConfig")


def read_config(path: Path) -> Any:
    """Read a `config.json`, or the one in a directory.

    Raises:
        LoadError: the config is damaged, or transformers does not have its model type.
    """
    import transformers

    settings = read_json(path / "config.json" if path.is_dir() else path)
    with quiet_transformers():
        try:
            return transformers.AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        except Exception as error:
            reason = _unknown_type(settings) or f"{first_line(error)}."
            raise LoadError(f"{path}: cannot read config.json: {reason}") from error


def _unknown_type(settings: Any) -> str | None:
    """Say why transformers does not know the model type of a config, or None if it does."""
    import transformers

    kind = settings.get("model_type") if isinstance(settings, dict) else None
    if not isinstance(kind, str) or not kind:
        return "it has no model_type, which says what kind of model it is, for example bert or gpt2."
    if kind in transformers.CONFIG_MAPPING:
        return None
    close = difflib.get_close_matches(kind, list(transformers.CONFIG_MAPPING), n=1)
    return (
        f"transformers {transformers.__version__} does not know the model type '{kind}'. "
        + (f"Did you mean '{close[0]}'? Else install" if close else "Install")
        + " a version that does, or build the model in Python and give module:function. "
        "Code from model directories is never run."
    )


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
    if not isinstance(names, list) or not isinstance(names[0], str):
        raise LoadError(f"config.json gives {names!r} as architectures, which is not a list of class names.")
    found = getattr(transformers, names[0], None)
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel) and found.config_class):
        raise LoadError(
            f"config.json names the class {names[0]}, which transformers {transformers.__version__} does not have. "
            "Code from model directories is never run. Build the model in Python and give module:function."
        )
    return found


@contextlib.contextmanager
def blaming(part: str) -> Iterator[None]:
    """Turn any exception of a tokenizer or processor into an error that says where to look.

    Raises:
        UsageError: it failed on ordinary inputs. part: "tokenizer" or "processor".
    """
    file = "tokenizer_config.json" if part == "tokenizer" else "preprocessor_config.json"
    try:
        yield
    except SurgeonError:
        raise
    except Exception as error:
        raise UsageError(
            f"The model's {part} fails on ordinary inputs: {first_line(error)}. Compare {file} and the files beside it "
            "with those of the original model."
        ) from error


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


def weight_files(path: Path) -> list[Path]:
    """Return the weight files of a Hugging Face directory. Each must exist and have a valid header."""
    name = next((name for name in _WEIGHT_FILES if (path / name).is_file()), None)
    if name is None:
        raise LoadError(f"{path} has a config.json but no weights. It needs one of {', '.join(_WEIGHT_FILES)}.")
    files = [path / name]
    if name.endswith(".index.json"):
        files = [path / shard for shard in _shards(files[0])]
    for file in files:
        if not file.is_file():
            raise LoadError(f"The weight file {file.name}, which {name} lists, is missing from {path}.")
        if file.suffix == ".safetensors":
            check_safetensors(file)
        else:
            check_torch_file(file)
    return files


def _shards(index: Path) -> list[str]:
    content = read_json(index)
    names = content.get("weight_map") if isinstance(content, dict) else None
    shards = list(names.values()) if isinstance(names, dict) else []
    # Only names of files beside the index: a path could lead out of the directory.
    if not shards or not all(isinstance(shard, str) and shard and shard == Path(shard).name for shard in shards):
        raise LoadError(f"{index} is damaged: it does not list the weight files.")
    if not isinstance(content.get("metadata"), dict):
        raise LoadError(f"{index} is damaged: it has no metadata.")
    return sorted(set(shards))


def read_json(path: Path) -> Any:
    """Read a JSON file of a model.

    Raises:
        LoadError: it is not JSON in UTF-8, or is nested too deeply.
    """
    try:
        return json.loads(path.read_bytes().decode())
    except UnicodeDecodeError as error:
        raise LoadError(f"{path.parent}: cannot read {path.name}: it is not UTF-8 at byte {error.start}.") from error
    except RecursionError as error:
        raise LoadError(f"{path.parent}: cannot read {path.name}: its values are nested too deeply.") from error
    except ValueError as error:
        raise LoadError(f"{path.parent}: cannot read {path.name}: it is not JSON: {first_line(error)}.") from error


def _body(model: Any, names: Iterable[str]) -> list[str]:
    """Return the names that belong to the body of a model, without its head and pooler, sorted."""
    prefix = model.base_model_prefix + "."
    headless = model.base_model is model
    return sorted(n for n in names if (headless or n.startswith(prefix)) and "pooler" not in n)


def _unwrap(files: list[Path], model: Any, info: dict[str, Any]) -> tuple[str, ...]:
    """Load weights that were saved from inside a wrapper, which transformers does not recognise. Corrects `info`."""
    if not _body(model, info["missing_keys"]):
        return ()
    state: dict[str, Tensor] = {}
    for file in files:
        state |= read_safetensors(file) if file.suffix == ".safetensors" else read_torch_file(file)
    fit = best_fit(state, model)
    if fit.problems:
        return ()
    model.load_state_dict(fit.state, strict=False)
    info.update(missing_keys=set(), unexpected_keys=set())
    return fit.notes


def _loading_notes(path: Path, model: Any, info: Mapping[str, Any]) -> tuple[str, ...]:
    """Note which weights are new or unused, and refuse a model with weights of another shape or an incomplete body.

    A new task needs a new head, and checkpoints of language models often have no pooler. Any other missing weight would
    leave random weights inside the model.
    """
    misfits = [
        f"{name} {tuple(found)} instead of {tuple(wanted)}" for name, found, wanted in sorted(info["mismatched_keys"])
    ]
    if misfits:
        raise LoadError(
            f"{path}: {len(misfits)} of the weights do not have the shapes that config.json asks for: "
            f"{some(misfits)}. "
            "Give the config.json that was saved with these weights."
        )
    missing = sorted(info["missing_keys"])
    if body := _body(model, missing):
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

"""Load the model a user names on the command line, without downloading and without running code that a file holds."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from surgeon.checkpoint import (
    check_safetensors,
    check_torch_file,
    read_program,
    read_safetensors,
    read_torch_file,
    sha256_of,
)
from surgeon.errors import LoadError, SurgeonError
from surgeon.user_function import call_spec, is_spec

Kind = Literal["hf", "pickle", "pt2", "state_dict", "artifact", "python"]

TASK_CLASSES = {
    "causal-lm": "AutoModelForCausalLM",
    "masked-lm": "AutoModelForMaskedLM",
    "sequence-classification": "AutoModelForSequenceClassification",
    "image-classification": "AutoModelForImageClassification",
}
# For a state dict whose config names no class, the one with the most similar names; of equals, the first.
_HEADS = (
    *("AutoModelForMaskedLM", "AutoModelForCausalLM", "AutoModelForSeq2SeqLM"),
    *("AutoModelForSequenceClassification", "AutoModelForImageClassification", "AutoModel"),
)
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
_WRAPPERS = ("state_dict", "model_state_dict", "model")


@dataclass(frozen=True)
class Source:
    """A loaded model and what came with it.

    path: what the user gave.
    kind: "hf" a Hugging Face directory; "pickle" a module written by `torch.save`; "pt2" an exported program;
        "state_dict" weights filled into `arch`; "python" the return value of a function; "artifact" a directory written
        by surgeon.
    model: a module (an `ExportedProgram` for "pt2"), on the CPU; None for an artifact, which `surgeon.artifact` loads.
    tokenizer, processor, config: those of a Hugging Face model, None where it has none.
    sha256: of the weight file; of names and hashes where there are several; of names and values where there is no file.
    notes: what a user should know about the model, one sentence each.
    """

    path: Path
    kind: Kind
    model: nn.Module | ExportedProgram | None
    tokenizer: Any | None
    processor: Any | None
    config: Any | None
    sha256: str
    notes: tuple[str, ...] = ()


def load_model(
    path: str | Path, *, trust_pickle: bool = False, arch: str | None = None, task: str | None = None
) -> Source:
    """Load a model from a path, or from a function written `module:function` or `file.py:function`.

    Nothing is downloaded, nothing under `path` is changed, and code held by a model file is never run unless
    `trust_pickle` is set. Code the user names (`module:function`) is run.

    Args:
        path: a Hugging Face directory, a directory written by surgeon, a `.pt2`, `.pt`, `.pth`, `.bin` or
            `.safetensors` file, or a function without arguments that returns a module.
        trust_pickle: unpickle whole modules, which runs the code they name.
        arch: what a state dict belongs to: a Hugging Face directory or `config.json`, a transformers model type such as
            "gpt2" (its default sizes), or `module:function`.
        task: the head to load a Hugging Face model with, one of `TASK_CLASSES`; by default the one in its config.

    Raises:
        LoadError: the path is missing, damaged, not a model, or would run code; the message says what to try.
    """
    if task is not None and task not in TASK_CLASSES:
        raise LoadError(f"No task '{task}'. Known: {', '.join(TASK_CLASSES)}.")
    text, path = str(path), Path(path)
    if not path.exists():
        if is_spec(text):
            return _from_function(text)
        raise LoadError(
            f"No file or directory '{text}'. Models are not downloaded: give the directory of one on disk, "
            f"for example after `hf download {text} --local-dir {path.name or 'model'}`."
        )
    try:
        if path.is_dir():
            return _from_directory(path, task)
        return _from_file(path, trust_pickle, arch, task)
    except OSError as error:
        raise LoadError(f"{text} cannot be read: {error}") from error


def check_finite(model: nn.Module | ExportedProgram) -> None:
    """Refuse a model with NaN or infinite weights.

    Raises:
        LoadError: names the first such parameter, how many of its values are affected, and how many parameters are.
    """
    bad = [(name, parameter) for name, parameter in model.named_parameters() if not parameter.isfinite().all()]
    if bad:
        name, first = bad[0]
        raise LoadError(
            f"{name} has {int((~first.isfinite()).sum())} of {first.numel()} values that are NaN or infinite; "
            f"parameters affected: {len(bad)}. "
            "The weights are damaged, or the training that made them diverged."
        )


# --- files and directories --------------------------------------------------------------------------------------------


def _from_directory(path: Path, task: str | None) -> Source:
    if (path / "surgery.json").is_file():
        weights = [file for file in [path / "model.pt2"] if file.is_file()]
        return Source(path, "artifact", None, None, None, None, sha256_of(weights))
    if not (path / "config.json").is_file():
        raise LoadError(f"{path} is not a model directory: it has neither config.json (Hugging Face) nor surgery.json.")
    files = _weight_files(path)
    config = _hf_config(path)
    with quiet_transformers():
        try:
            model, info = _hf_class(config, task).from_pretrained(
                path, local_files_only=True, trust_remote_code=False, output_loading_info=True
            )
        except SurgeonError:
            raise
        except Exception as error:  # transformers raises what it likes
            raise LoadError(f"{path} cannot be loaded: {_first_line(error)}") from error
    notes = _loading_notes(path, model, info)
    tokenizer, tokenizer_notes = _hf_part(path, _TOKENIZER_FILES, ("AutoTokenizer",))
    processor, processor_notes = _hf_part(path, _PROCESSOR_FILES, ("AutoImageProcessor", "AutoFeatureExtractor"))
    all_notes = (*notes, *tokenizer_notes, *processor_notes)
    return Source(path, "hf", model, tokenizer, processor, model.config, sha256_of(files), all_notes)


def _from_file(path: Path, trust_pickle: bool, arch: str | None, task: str | None) -> Source:
    match path.suffix:
        case ".pt2":
            program = read_program(path, trust_pickle=trust_pickle)
            return Source(path, "pt2", program, None, None, None, sha256_of([path]))
        case ".safetensors":
            return _from_state_dict(path, read_safetensors(path), arch, task, ())
        case ".pt" | ".pth" | ".bin":
            content = read_torch_file(path, trust_pickle=trust_pickle)
        case suffix:
            raise LoadError(
                f"{path.name}: cannot load {suffix or 'such'} files. A model is a directory with config.json, a .pt2, "
                ".pt, .pth, .bin or .safetensors file, or module:function."
            )
    if isinstance(content, nn.Module):
        config = getattr(content, "config", None)
        return Source(path, "pickle", content, None, None, config, sha256_of([path]))
    if _is_state_dict(content):
        return _from_state_dict(path, content, arch, task, ())
    for key in _WRAPPERS:
        if isinstance(content, Mapping) and _is_state_dict(content.get(key)):
            return _from_state_dict(path, content[key], arch, task, (f"The weights are those under '{key}'.",))
    raise LoadError(f"{path.name} holds a {type(content).__name__}, neither a module nor a state dict.")


def _from_function(spec: str) -> Source:
    model = call_spec(spec, LoadError)
    if not isinstance(model, nn.Module):
        raise LoadError(f"{spec} returned a {type(model).__name__}, not a torch.nn.Module.")
    return Source(Path(spec), "python", model, None, None, getattr(model, "config", None), _sha256_of_values(model))


def _sha256_of_values(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


# --- Hugging Face directories -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers from writing warnings and progress bars; what matters is raised or noted instead."""
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
    """The weight files of a Hugging Face directory, each present and whole as far as its header tells."""
    name = next((name for name in _WEIGHT_FILES if (path / name).is_file()), None)
    if name is None:
        raise LoadError(f"{path} has a config.json but no weights: none of {', '.join(_WEIGHT_FILES)}.")
    files = [path / name]
    if name.endswith(".index.json"):
        try:
            shards = sorted(set(json.loads(files[0].read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise LoadError(f"{files[0]} is damaged: it does not list the weight files.") from error
        files = [path / shard for shard in shards]
    for file in files:
        if not file.is_file():
            raise LoadError(f"{path} lacks the weight file {file.name}, which {name} lists.")
        if file.suffix == ".safetensors":
            check_safetensors(file)
        else:
            check_torch_file(file)
    return files


def _hf_config(path: Path) -> Any:
    import transformers

    with quiet_transformers():
        try:
            return transformers.AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        except Exception as error:
            raise LoadError(f"{path}: config.json cannot be read: {_first_line(error)}") from error


def _hf_class(config: Any, task: str | None) -> Any:
    """The class to load a config's weights with: the task's, the one the config names, or the one without a head."""
    import transformers

    if task is not None:
        return getattr(transformers, TASK_CLASSES[task])
    names = getattr(config, "architectures", None)
    if not names:
        return transformers.AutoModel
    found = getattr(transformers, names[0], None)
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise LoadError(
            f"config.json names the class {names[0]}, which transformers {transformers.__version__} does not have. "
            "Code from model directories is never run: build the model in Python and give module:function."
        )
    return found


def _loading_notes(path: Path, model: Any, info: Mapping[str, Any]) -> tuple[str, ...]:
    """Say which weights are new or unused, and refuse a model whose body is not all there.

    A new head is what a new task asks for, and checkpoints of language models often lack the pooler. Anything else that
    is missing would be random weights in the middle of the model.
    """
    missing = sorted(info["missing_keys"])
    prefix = model.base_model_prefix + "."
    headless = model.base_model is model
    body = [name for name in missing if (headless or name.startswith(prefix)) and "pooler" not in name]
    if body:
        raise LoadError(f"{path}: the weights of {_some(body)} are missing from the weight files.")
    notes = []
    if missing:
        notes.append(f"{_some(missing)} {'is' if len(missing) == 1 else 'are'} newly initialised.")
    if unused := sorted(info["unexpected_keys"]):
        notes.append(f"{type(model).__name__} does not use {_some(unused)} of the weight files.")
    return tuple(notes)


def _hf_part(path: Path, files: tuple[str, ...], loaders: tuple[str, ...]) -> tuple[Any | None, tuple[str, ...]]:
    """Load the tokenizer or processor of a directory, with a note if its files are there but cannot be loaded."""
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
                reason = reason or _first_line(error)
    return None, (f"{present[0]} is there but cannot be loaded: {reason}.",)


# --- state dicts ------------------------------------------------------------------------------------------------------


def _is_state_dict(content: object) -> bool:
    return isinstance(content, Mapping) and bool(content) and all(isinstance(v, Tensor) for v in content.values())


def _from_state_dict(
    path: Path, state: Mapping[str, Tensor], arch: str | None, task: str | None, notes: tuple[str, ...]
) -> Source:
    if arch is None:
        raise LoadError(f"{path.name} is a state dict, not a model. Give --arch gpt2.")
    state = dict(state)
    for prefix in ("module.", "_orig_mod."):  # added by DistributedDataParallel and torch.compile
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
            notes = (*notes, f"The prefix '{prefix}' was dropped from the weights' names.")
    skeleton, build = _from_arch(arch, state, task)
    _check_fit(skeleton, state, path, arch)
    model = build()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in state:  # keep the precision of the file
                parameter.data = parameter.data.to(state[name].dtype)
    model.load_state_dict(state, strict=False)
    config = getattr(model, "config", None)
    return Source(path, "state_dict", model.eval(), None, None, config, sha256_of([path]), notes)


def _from_arch(arch: str, state: Mapping[str, Tensor], task: str | None) -> tuple[nn.Module, Callable[[], nn.Module]]:
    """The module that `arch` names, without values, and a function that builds it with values."""
    import transformers

    if is_spec(arch):
        model = call_spec(arch, LoadError)
        if not isinstance(model, nn.Module):
            raise LoadError(f"--arch {arch} returned a {type(model).__name__}, not a torch.nn.Module.")
        return model, lambda: model
    if Path(arch).exists():
        config = _hf_config(Path(arch))
    elif arch in transformers.CONFIG_MAPPING:
        config = transformers.AutoConfig.for_model(arch)
    else:
        close = difflib.get_close_matches(arch, list(transformers.CONFIG_MAPPING), n=1)
        hint = f" Did you mean '{close[0]}'?" if close else ""
        raise LoadError(
            f"No architecture '{arch}'.{hint} --arch takes a transformers model type, a config.json or its directory, "
            "or module:function."
        )
    if task is not None or config.architectures:
        heads = [_hf_class(config, task)]
    else:
        heads = [getattr(transformers, name) for name in _HEADS]
    fitting: dict[Any, nn.Module] = {}
    with quiet_transformers():
        for head in heads:
            make = head.from_config if hasattr(head, "from_config") else head._from_config
            # A model type has some of the heads only, and transformers says so with ValueError.
            with contextlib.suppress(ValueError), torch.device("meta"):
                fitting[make] = make(config)
    if not fitting:
        raise LoadError(f"--arch {arch}: transformers has no {heads[0].__name__} for it.")
    best = min(fitting, key=lambda make: len(fitting[make].state_dict().keys() ^ state.keys()))

    def build() -> nn.Module:
        with quiet_transformers():
            model: nn.Module = best(config)
        return model

    return fitting[best], build


def _check_fit(model: nn.Module, state: Mapping[str, Tensor], path: Path, arch: str) -> None:
    """Refuse weights that do not fill `model`. A name may be missing if it is tied to one that is there."""
    own = model.state_dict(keep_vars=True)
    loaded = {id(own[name]) for name in own.keys() & state.keys()}
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    problems = {
        "missing": [name for name, value in own.items() if name not in state and id(value) not in loaded],
        "unexpected": [n for n in state if n not in own and not any(re.search(p, n) for p in ignored)],
        "of another shape": [
            f"{n} {tuple(state[n].shape)} instead of {tuple(own[n].shape)}"
            for n in state
            if n in own and state[n].shape != own[n].shape
        ],
    }
    if any(problems.values()):
        detail = "; ".join(f"{len(names)} {what}: {_some(names)}" for what, names in problems.items() if names)
        raise LoadError(
            f"{path.name} does not fit --arch {arch} ({type(model).__name__}). {detail}. "
            "If the sizes differ, give --arch a config.json that has them."
        )


def _some(names: list[str], limit: int = 3) -> str:
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(".")

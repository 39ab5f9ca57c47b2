"""Load the model that a user names, without downloading anything and without running code from a model file."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from surgeon.directories import restore
from surgeon.errors import LoadError, some
from surgeon.graph.weights import all_finite
from surgeon.models.adapters import ADAPTER, load_adapter
from surgeon.models.hugging_face import load_directory, model_class, quiet_transformers, read_config
from surgeon.models.readiness import check_ready
from surgeon.models.tasks import HEADS
from surgeon.models.user_function import call_spec, is_spec
from surgeon.models.weight_files import read_program, read_safetensors, read_torch_file, sha256_of
from surgeon.models.weight_names import Fit, best_fit, holds_weights, modules_in

Kind = Literal["hf", "pickle", "pt2", "state_dict", "artifact", "python"]

# Tried for a state dict whose config names no class. The class with the most similar names is used, or the first.
_HEADS = (
    *("AutoModelForMaskedLM", "AutoModelForCausalLM", "AutoModelForSeq2SeqLM"),
    *("AutoModelForSequenceClassification", "AutoModelForImageClassification", "AutoModel"),
)
_ARCHITECTURES = (
    "An architecture is a config.json or its directory, a model type of transformers such as bert, or module:function"
)


@dataclass(frozen=True)
class Source:
    """A loaded model and what came with it.

    path: the path or function that the user gave.
    kind: "hf" is a Hugging Face directory, "pickle" a module written by `torch.save`, "pt2" an exported program,
        "state_dict" weights loaded into `arch`, "python" the return value of a function, and "artifact" a directory
        written by surgeon.
    model: a module on the CPU (an `ExportedProgram` for "pt2"). None for a saved surgery, which
        `surgeon.surgery.artifact` loads.
    tokenizer, processor, config: those of a Hugging Face model, None if it has none.
    sha256: the hash of the weight file. Of several files, it is the hash of their names and hashes. Without a file, it
        is the hash of the parameters' names and values. None for a saved surgery, whose record has it.
    notes: what a user should know about the model, one sentence each.
    """

    path: Path
    kind: Kind
    model: nn.Module | ExportedProgram | None
    tokenizer: Any | None
    processor: Any | None
    config: Any | None
    sha256: str | None
    notes: tuple[str, ...] = ()


def load_model(
    path: str | Path, *, trust_pickle: bool = False, arch: str | None = None, task: str | None = None
) -> Source:
    """Load a model from a path, or from a function written `module:function` or `file.py:function`.

    Nothing is downloaded, and nothing under `path` is changed. Code in a model file is never run unless `trust_pickle`
    is set. Code that the user names (`module:function`) is run.

    Args:
        path: a Hugging Face directory, a directory written by surgeon, a `.pt2`, `.pt`, `.pth`, `.bin`,
            `.ckpt`, `.tar` or `.safetensors` file, or a function without arguments that returns a module.
        trust_pickle: unpickle whole modules, which runs the code they name.
        arch: the architecture of a state dict: a Hugging Face directory or `config.json`, a transformers model type
            such as "gpt2" (with its default sizes), or `module:function`.
        task: the head to load a Hugging Face model with, one of `HEADS`; by default the one in its config.

    Raises:
        LoadError: the path is missing, damaged, not a model, or would run code. The message says what to try.
        TraceError: the function's model has weights that cannot be read, as `check_ready` says.
    """
    if task is not None and task not in HEADS:
        raise LoadError(f"No task '{task}'. Known: {', '.join(HEADS)}.")
    text, path = str(path), Path(path)
    restore(path)
    if not path.exists():
        if is_spec(text):
            return _from_function(text)
        raise LoadError(
            f"No file or directory '{text}'. Models are not downloaded automatically. Give a directory on disk, "
            f"for example after `hf download {text} --local-dir {path.name or 'model'}`."
        )
    try:
        if path.is_dir():
            return _from_directory(path, task)
        return _from_file(path, trust_pickle, arch, task)
    except OSError as error:
        raise LoadError(f"{text} cannot be read: {error}") from error


@torch.no_grad()  # weights made in inference mode refuse to be recorded
def check_finite(model: nn.Module | ExportedProgram) -> None:
    """Refuse a model with NaN or infinite weights.

    Raises:
        LoadError: a weight is not finite. The message names the first such parameter and counts the affected ones.
        TraceError, UsageError: as `surgeon.models.readiness.check_ready`, since only weights in memory can be read.
    """
    if not isinstance(model, ExportedProgram):
        check_ready(model)
    bad = [(name, parameter) for name, parameter in model.named_parameters() if not all_finite(parameter)]
    if bad:
        name, first = bad[0]
        raise LoadError(
            f"{int((~first.isfinite()).sum())} of the {first.numel()} values of {name} are NaN or infinite. "
            f"Parameters affected: {len(bad)}. The file is damaged, or the training diverged."
        )


# --- files and directories --------------------------------------------------------------------------------------------


def _from_directory(path: Path, task: str | None) -> Source:
    if (path / "surgery.json").is_file():
        return Source(path, "artifact", None, None, None, None, None)
    if (path / ADAPTER).is_file():
        adapted = load_adapter(path, task)
        digest = sha256_of(adapted.files)
        config = adapted.model.config
        return Source(path, "hf", adapted.model, adapted.tokenizer, adapted.processor, config, digest, adapted.notes)
    if not (path / "config.json").is_file():
        raise LoadError(f"{path} is not a model directory: it has neither config.json (Hugging Face) nor surgery.json.")
    made = load_directory(path, task)
    digest = sha256_of(made.files)
    return Source(path, "hf", made.model, made.tokenizer, made.processor, made.model.config, digest, made.notes)


def _from_file(path: Path, trust_pickle: bool, arch: str | None, task: str | None) -> Source:
    match path.suffix:
        case ".pt2":
            program = read_program(path, trust_pickle=trust_pickle)
            return Source(path, "pt2", program, None, None, None, sha256_of([path]))
        case ".safetensors":
            return _from_state_dict(path, read_safetensors(path), arch, task)
        case ".pt" | ".pth" | ".bin" | ".ckpt" | ".tar":
            content = read_torch_file(path, trust_pickle=trust_pickle)
        case ".json" if path.name in ("config.json", "surgery.json"):
            raise LoadError(f"{path} says what a model is, and has no weights. Give its directory: {path.parent}.")
        case suffix:
            raise LoadError(
                f"{path.name}: cannot load {f'{suffix} files' if suffix else 'a file without a suffix'}. A model is a "
                "directory with config.json, a .pt2, .pt, .pth, .bin, .ckpt, .tar or .safetensors file, or "
                "module:function."
            )
    modules = list(modules_in(content))
    if modules:
        (key, model), *others = modules
        notes = (f"The model was read from the key '{key}'.",) if key else ()
        if others:
            names = some([repr(name) for name, _ in others])
            notes = (*notes, f"The file holds other models, which were not used: {names}.")
        return Source(path, "pickle", model, None, None, getattr(model, "config", None), sha256_of([path]), notes)
    if holds_weights(content):
        return _from_state_dict(path, content, arch, task)
    raise LoadError(
        f"{path.name} contains an object of type {type(content).__name__}. A model file holds a module or a state dict."
    )


def _from_function(spec: str) -> Source:
    model = call_spec(spec, LoadError)
    if not isinstance(model, nn.Module):
        raise LoadError(f"{spec} returned a {type(model).__name__}, not a torch.nn.Module.")
    check_ready(model)
    return Source(Path(spec), "python", model, None, None, getattr(model, "config", None), _sha256_of_values(model))


def _sha256_of_values(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


# --- state dicts ------------------------------------------------------------------------------------------------------


def _from_state_dict(path: Path, content: Any, arch: str | None, task: str | None) -> Source:
    if arch is None:
        raise _needs_arch(path)
    fit, build = _from_arch(arch, content, task)
    if fit.problems:
        detail = "; ".join(f"{len(names)} {what}: {some(names)}" for what, names in fit.problems.items())
        raise LoadError(
            f"{path.name} does not fit the architecture {arch} ({fit.model}). {detail}. "
            "If the sizes differ, give a config.json that has them.",
        )
    model = build()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in fit.state:  # keep the precision of the file
                parameter.data = parameter.data.to(fit.state[name].dtype)
    model.load_state_dict(fit.state, strict=False)
    config = getattr(model, "config", None)
    return Source(path, "state_dict", model.eval(), None, None, config, sha256_of([path]), fit.notes)


def _needs_arch(path: Path) -> LoadError:
    """What to do about weights alone: they may lie in a directory that says what they are for."""
    what = f"{path.name} has weights alone, not a model."
    directory = path.parent
    if (directory / "surgery.json").is_file() or (directory / ADAPTER).is_file():
        return LoadError(f"{what} Give its directory: {directory}.")
    if (directory / "config.json").is_file():
        config = directory / "config.json"
        return LoadError(
            f"{what} Give its directory, {directory}, which has a config.json,",
            python=f"or arch='{config}'.",
            command=f"or --arch {config}.",
        )
    return LoadError(
        what,
        python=f"Name their architecture with arch=. {_ARCHITECTURES}.",
        command=f"Name their architecture with --arch. {_ARCHITECTURES}.",
    )


def _from_arch(arch: str, content: Any, task: str | None) -> tuple[Fit, Callable[[], nn.Module]]:
    """Return how the weights fit the module that `arch` names, and a function that builds the module with values."""
    import transformers

    if is_spec(arch):
        model = call_spec(arch, LoadError)
        if not isinstance(model, nn.Module):
            raise LoadError(f"{arch} returned a {type(model).__name__}, not a torch.nn.Module.")
        return best_fit(content, model), lambda: model
    if Path(arch).exists():
        config = read_config(Path(arch))
    elif arch in transformers.CONFIG_MAPPING:
        config = transformers.AutoConfig.for_model(arch)
    else:
        close = difflib.get_close_matches(arch, list(transformers.CONFIG_MAPPING), n=1)
        hint = f" Did you mean '{close[0]}'?" if close else ""
        raise LoadError(
            f"No architecture '{arch}'.{hint} {_ARCHITECTURES}.",
        )
    if task is not None or config.architectures:
        heads = [model_class(config, task)]
    else:
        heads = [getattr(transformers, name) for name in _HEADS]
    fits: dict[Any, Fit] = {}
    with quiet_transformers():
        for head in heads:
            make = head.from_config if hasattr(head, "from_config") else head._from_config
            # A model type has only some of the heads. For the others transformers raises ValueError.
            with contextlib.suppress(ValueError), torch.device("meta"):
                fits[make] = best_fit(content, make(config))
    if not fits:
        raise LoadError(f"transformers has no {heads[0].__name__} for the architecture {arch}.")
    best = min(fits, key=lambda make: fits[make].badness)

    def build() -> nn.Module:
        with quiet_transformers():
            model: nn.Module = best(config)
        return model

    return fits[best], build

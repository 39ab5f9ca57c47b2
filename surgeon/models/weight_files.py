"""Read weight files without running code that they may contain.

`torch.save` files are pickles, and unpickling can run any code. A `.pt2` archive is mostly plain data, but its reader
also unpickles the parts that the archive marks as pickled. Every reader here inspects the file first and refuses
pickled code, unless the caller trusts the file.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import pickle
import pickletools
import warnings
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from surgeon.errors import LoadError, first_line

_TRUST = "If you trust it: --trust-pickle."


def sha256_of(paths: Iterable[Path], root: Path | None = None) -> str:
    """Hash files without reading them into memory at once.

    For one file the result is what `sha256sum` prints. For several files it is the hash of their names and hashes,
    sorted by name. Names are relative to `root`; without a root they have no folder.
    """
    digests = {}
    for path in paths:
        with path.open("rb") as file:
            digests[str(path.relative_to(root) if root else path.name)] = hashlib.file_digest(
                file, "sha256"
            ).hexdigest()
    if len(digests) == 1:
        return next(iter(digests.values()))
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def read_torch_file(path: Path, *, trust_pickle: bool = False) -> Any:
    """Return what `torch.save` wrote to `path`, with all tensors on the CPU.

    Raises:
        LoadError: the file was not written by `torch.save`, is damaged or truncated, is TorchScript, contains pickled
            code (without `trust_pickle`), or names a class that cannot be imported.
    """
    check_torch_file(path, trust_pickle=trust_pickle)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols: a user cannot act on these
            return torch.load(path, map_location="cpu", weights_only=not trust_pickle)
    except ModuleNotFoundError as error:
        raise LoadError(
            f"{path.name} needs the Python module '{error.name}', which cannot be imported. "
            "Make it importable, for example with PYTHONPATH=. before the command."
        ) from error
    except AttributeError as error:
        raise LoadError(
            f"{path.name} refers to a class that cannot be found: {error}. A class defined in a script or a notebook "
            "is saved under '__main__'. Define it in a module and save the file again."
        ) from error
    except pickle.UnpicklingError as error:
        if trust_pickle:
            raise _damaged(path, error) from error
        raise LoadError(f"{path.name} holds pickled code, which loading would run. {_TRUST}") from error
    except Exception as error:
        raise _damaged(path, error) from error


def check_torch_file(path: Path, *, trust_pickle: bool = False) -> None:
    """Refuse a file that `torch.save` did not write or that would run code, without loading it.

    Raises:
        LoadError: as in `read_torch_file`. Pickled code in the format used before torch 1.6 is only found by loading.
    """
    if not path.stat().st_size:
        raise LoadError(f"{path.name} is empty.")
    if not zipfile.is_zipfile(path):
        if not _has_legacy_magic(path):
            raise _damaged(path, "it has no torch.save header")
        return
    try:
        with zipfile.ZipFile(path) as archive:
            records = {name.partition("/")[2] for name in archive.namelist()}
    except Exception as error:  # a damaged directory of the archive: BadZipFile, struct.error, ...
        raise _damaged(path, error) from error
    if "constants.pkl" in records:
        raise LoadError(
            f"{path.name} is a TorchScript archive, which contains no Python modules to trace. "
            "Give the model it was made from, or a torch.export program (.pt2)."
        )
    if "data.pkl" not in records:
        raise _damaged(path, "the zip archive has no data.pkl")
    if trust_pickle:
        return
    names = _unsafe_globals(path)
    if names is None or names:
        detail = f" It names {', '.join(names[:3])}." if names else ""
        raise LoadError(f"{path.name} holds pickled code, which loading would run. {_TRUST}{detail}")


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a `.safetensors` file, on the CPU.

    Raises:
        LoadError: the file is damaged or truncated.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError) as error:
        raise LoadError(f"{path.name} is damaged or truncated: {error}") from error
    return tensors


def check_safetensors(path: Path) -> None:
    """Read the header of a `.safetensors` file and compare it with the file's length.

    Raises:
        LoadError: the file is damaged or truncated.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise LoadError(f"{path.name} is damaged or truncated: {error}") from error


def read_program(path: Path, *, trust_pickle: bool = False) -> torch.export.ExportedProgram:
    """Load a `.pt2` file written by `torch.export.save`.

    The operators of rewritten graphs and the output classes of transformers are registered first. A program that uses
    them cannot be read otherwise.

    Raises:
        LoadError: the file is damaged or truncated, is not a `torch.export` archive, contains pickled code (without
            `trust_pickle`), or uses an operator that is not registered.
    """

    import transformers.modeling_outputs  # noqa: F401  registers the output classes with pytree

    import surgeon.kernels.dynamic_k  # noqa: F401  registers surgeon::dynamic_k_ffn

    if not trust_pickle:
        _check_program(path)
    try:
        with _errors_only("torch.export", "torch.export.pt2_archive._package"):
            return torch.export.load(path)
    except Exception as error:
        raise LoadError(f"{path.name} cannot be loaded as a torch.export program: {first_line(error)}") from error


def _check_program(path: Path) -> None:
    """Refuse an archive if reading it would unpickle anything but tensors, or load a compiled library.

    `torch.export.load` unpickles example inputs, opaque constants, weights and constants marked `use_pickle`, and all
    parts of the layout used before torch 2.8. Names that a zip reader could resolve in two ways are refused, because
    torch and this check read the archive with different libraries. The program itself is not examined: a graph may call
    any operator that torch can name.
    """
    from torch.export.pt2_archive.constants import AOTINDUCTOR_DIR, CONSTANTS_DIR, OPAQUE_OBJ_FILENAME_PREFIX

    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            roots = {name.partition("/")[0] for name in names}
            records = {name.partition("/")[2]: name for name in names}
            if "archive_format" not in records or len(roots) != 1 or len(set(names)) != len(names):
                raise LoadError(
                    f"{path.name} is not a torch.export archive in the format of torch {torch.__version__}. "
                    "Export the model again with torch.export.save."
                )
            if any(record.startswith(AOTINDUCTOR_DIR) for record in records):
                raise LoadError(
                    f"{path.name} holds compiled code (AOTInductor). Give the exported program it was compiled from."
                )
            pickled = {record for record in records if record.endswith(".pt")}
            pickled |= {record for record in records if record.startswith(CONSTANTS_DIR + OPAQUE_OBJ_FILENAME_PREFIX)}
            for record in records:
                if record.endswith("_config.json"):
                    folder = record.rpartition("/")[0]
                    entries = json.loads(archive.read(records[record]))["config"].values()
                    pickled |= {f"{folder}/{entry['path_name']}" for entry in entries if entry["use_pickle"]}
            for record in sorted(pickled):
                content = archive.read(records[record])
                if content and _unsafe_globals(io.BytesIO(content)) != []:
                    raise LoadError(f"{path.name} holds pickled code ({record}), which loading would run. {_TRUST}")
    except (zipfile.BadZipFile, KeyError, TypeError, AttributeError, ValueError, EOFError) as error:
        raise LoadError(f"{path.name} is damaged or truncated: {first_line(error)}") from error


def _unsafe_globals(file: Path | io.BytesIO) -> list[str] | None:
    """Return the names in a `torch.save` archive that torch's restricted reader would refuse; None if unknown."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(file))
    except Exception:  # an unknown opcode or layout
        return None


def _has_legacy_magic(path: Path) -> bool:
    """Whether the file starts with the number that `torch.save` wrote before torch 1.6."""
    with path.open("rb") as file:
        head = file.read(64)
    try:
        return any(argument == torch.serialization.MAGIC_NUMBER for _, argument, _ in pickletools.genops(head))
    except ValueError:
        return False


def _damaged(path: Path, reason: object) -> LoadError:
    text = first_line(reason) if isinstance(reason, Exception) else reason
    return LoadError(f"{path.name} was not written by torch.save, or is damaged or truncated: {text}.")


@contextmanager
def _errors_only(*loggers: str) -> Iterator[None]:
    """Stop torch from printing the traceback of an error that is raised anyway."""
    before = {name: logging.getLogger(name).level for name in loggers}
    for name in loggers:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)

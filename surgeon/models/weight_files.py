"""Read weight files without running code that they may contain.

`torch.save` files are pickles, and unpickling can run any code. A `.pt2` archive is taken at its word by its reader in
many more ways (see `surgeon.models.program_guard`). Every reader here inspects the file first and refuses what could
run code, unless the caller trusts the file.
"""

from __future__ import annotations

import gc
import hashlib
import logging
import mmap
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
from surgeon.models.pickles import TRUST, allowing_registered_classes, unsafe_globals

# What is hashed at once. Small parts would each wait for the interpreter's lock, if another thread is busy.
_PART = 1 << 25


def sha256_of(paths: Iterable[Path], root: Path | None = None) -> str:
    """Hash files without reading them into memory at once. Other threads run meanwhile.

    For one file the result is what `sha256sum` prints. For several files it is the hash of their names and hashes,
    sorted by name. Names are relative to `root`; without a root they have no folder.
    """
    digests = {}
    for path in paths:
        digest, size = hashlib.sha256(), path.stat().st_size
        with path.open("rb") as file:
            for start in range(0, size, _PART):
                # Not copied: that would take a third of the time.
                length = min(_PART, size - start)
                with mmap.mmap(file.fileno(), length, offset=start, access=mmap.ACCESS_READ) as part:
                    digest.update(part)
        digests[str(path.relative_to(root) if root else path.name)] = digest.hexdigest()
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
            "Make it importable, for example with PYTHONPATH=. in the environment."
        ) from error
    except AttributeError as error:
        raise LoadError(
            f"{path.name} refers to a class that cannot be found: {error}. A class defined in a script or a notebook "
            "is saved under '__main__'. Define it in a module and save the file again."
        ) from error
    except pickle.UnpicklingError as error:
        if trust_pickle:
            raise _damaged(path, error) from error
        raise LoadError(f"{path.name} holds pickled code, which loading would run.", **TRUST) from error
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
    if (names := unsafe_globals(path)) != []:
        detail = f" It names {', '.join(names[:3])}." if names else ""
        raise LoadError(f"{path.name} holds pickled code, which loading would run.{detail}", **TRUST)


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


def read_program(path: Path, *, trust_pickle: bool = False, checksums: bool = True) -> torch.export.ExportedProgram:
    """Load a `.pt2` file written by `torch.export.save`.

    The operators of rewritten graphs and the output classes of transformers are registered if the program uses them.
    Other operators and classes must be registered before: see `surgeon.models.user_function.import_modules`.

    Args:
        checksums: False leaves out the checksums of the weights, for a caller who compares a hash of the whole file.

    Raises:
        LoadError: the file is damaged or truncated; holds anything that `torch.export.save` does not write, or pickled
            code (without `trust_pickle`); or uses an operator or a class that is not registered.
    """
    from torch.export.pt2_archive._package import load_pt2

    import surgeon.kernels.dynamic_k  # noqa: F401  registers surgeon::dynamic_k_ffn
    from surgeon.models.program_guard import INPUTS, checked_program
    from surgeon.models.program_reader import make_program

    with (
        _no_collection(),
        allowing_registered_classes(),
        checked_program(path, trusted=trust_pickle, checksums=checksums) as (archive, checked),
    ):
        try:
            # Not torch.export.load, which prints the reason of a failure and raises another error.
            with _errors_only("torch.export", "torch.export.pt2_archive._package", "torch._export.serde.serialize"):
                if checked is None:
                    program = load_pt2(path).exported_programs["model"]
                else:
                    program = make_program(checked, archive, INPUTS)
                program.module(check_guards=False)  # its parts fit each other
                return program
        except Exception as error:
            raise LoadError(f"{path.name} cannot be loaded as a torch.export program: {_reason(error)}.") from error


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keep Python from looking for garbage among the many small objects of a program, again and again: it has none."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _reason(error: Exception) -> str:
    """The last line of an error: torch quotes the node with which it failed before it says why."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300].rstrip(".") if lines else type(error).__name__


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

"""Build OpenVINO's extension, once for each version of its source, of OpenVINO and of the compiler."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from functools import cache
from pathlib import Path

from surgeon.kernels.building import (
    BuildError,
    Library,
    check_compiler,
    compile_files,
    compiler_words,
    contents,
    machine,
    run_compiler,
)
from surgeon.kernels.cpu import int8_archive

__all__ = ["BuildError", "built", "directory", "library"]

_HERE = Path(__file__).parent
_NAME = "surgeon_openvino"
# The threads are OpenVINO's own, which its header finds by this name.
_FLAGS = ["-O2", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-DOV_THREAD=OV_THREAD_TBB_ADAPTIVE"]


def _openvino() -> Path:
    """The directory of the installed package, which has headers and libraries.

    Raises:
        BuildError: it is not installed, or without them.
    """
    found = importlib.util.find_spec("openvino")
    if found is None or not found.submodule_search_locations:
        raise BuildError("OpenVINO is not installed. Install it: pip install openvino.")
    path = Path(found.submodule_search_locations[0])
    if not (path / "include" / "openvino" / "openvino.hpp").exists():
        raise BuildError(f"{path} has no headers. Install OpenVINO from its wheel: pip install openvino.")
    return path


def _found(directory: Path, name: str) -> Path:
    file = next(directory.glob(f"{name}.so*"), None)
    if file is None:
        raise BuildError(f"{directory} has no {name}. Install OpenVINO from its wheel: pip install openvino.")
    return file


def _check() -> None:
    check_compiler()
    _openvino()


def _compile(scratch: Path) -> None:
    at = _openvino()
    libraries = [_found(at / "libs", name) for name in ("libopenvino", "libtbb")]
    # As headers of the system: what compilers warn of in them is none of ours.
    flags = [*_FLAGS, "-isystem", str(at / "include")]
    made = [*compile_files(_HERE.glob("*.cpp"), flags, scratch), int8_archive.path(), *libraries]
    # No path is written into it: the process that loads it has these libraries already.
    link = ["-shared", *map(str, made), "-Wl,--no-undefined"]
    run_compiler([*compiler_words(), *link, "-o", str(scratch / f"{_NAME}.so")])


@cache
def _depends() -> tuple[str | bytes, ...]:
    """Everything that the library depends on."""
    try:
        version = importlib.metadata.version("openvino")
    except importlib.metadata.PackageNotFoundError:
        version = ""
    return (*contents([*_HERE.glob("*.cpp"), *int8_archive.files()]), *_FLAGS, version, *machine())


_library = Library(_NAME, "openvino", "the int8 experts for OpenVINO", _depends, _check, _compile)
built, directory, library = _library.built, _library.directory, _library.path

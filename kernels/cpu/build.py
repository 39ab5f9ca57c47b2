"""Build the native kernels, once for each version of their source, of torch and of the compiler."""

from __future__ import annotations

import os
import sys
from functools import cache
from pathlib import Path

import torch

from surgeon.kernels.building import (
    BuildError,
    Library,
    check_compiler,
    compiler,
    compiler_words,
    contents,
    machine,
    run_compiler,
)
from surgeon.kernels.cpu import int8_archive

__all__ = ["BuildError", "built", "directory", "files", "library", "sources"]

_NAME = "surgeon_cpu"
_FLAGS = ["-O2"]


def sources() -> list[Path]:
    """Return the files to compile, besides those of `int8_archive`."""
    here = Path(__file__).parent
    return sorted((*here.glob("*.cpp"), *(here / "linear").glob("*.cpp")))


def files() -> list[Path]:
    """Return all files of the source."""
    here = Path(__file__).parent
    return sorted(file for file in here.rglob("*.*") if file.suffix in (".cpp", ".h", ".inc"))


def _compile(scratch: Path) -> None:
    # In a process of its own, since what torch compiles it also loads.
    command = [sys.executable, str(Path(__file__).resolve()), str(scratch), str(int8_archive.path())]
    program = compiler()
    if len(compiler_words()) > 1:  # torch takes CXX for the name of one program
        script = scratch / "c++"
        script.write_text(f'#!/bin/sh\nexec {program} "$@"\n')
        script.chmod(0o755)
        program = str(script)
    run_compiler(command, os.environ | {"CXX": program})


def _check_tools() -> None:
    check_compiler()
    from torch.utils import cpp_extension

    if not cpp_extension.is_ninja_available():
        raise BuildError("ninja is not installed. Install it: pip install ninja.")


@cache
def _depends() -> tuple[str | bytes, ...]:
    """Everything that the library depends on."""
    return (*contents(files()), *_FLAGS, torch.__version__, *machine())


_library = Library(_NAME, "cpu", "the native CPU kernels", _depends, _check_tools, _compile)
built, directory, library = _library.built, _library.directory, _library.path


if __name__ == "__main__":
    from torch.utils import cpp_extension

    cpp_extension.load(
        name=_NAME,
        sources=[str(source) for source in sources()],
        extra_cflags=_FLAGS,
        extra_ldflags=[sys.argv[2]],
        build_directory=sys.argv[1],
        is_python_module=False,
    )

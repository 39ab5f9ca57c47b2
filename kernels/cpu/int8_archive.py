"""Compile the kernels for experts with 8-bit weights, once for all libraries that have them."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from surgeon.kernels.building import Library, check_compiler, compile_files, contents, machine, run_compiler

_FLAGS = ["-O2", "-std=c++17", "-fPIC", "-fvisibility=hidden"]
_FOLDER = Path(__file__).parent


def files() -> list[Path]:
    """Return all files of the source."""
    here, shared = (_FOLDER / "int8").iterdir(), _FOLDER.iterdir()
    return sorted(file for file in (*here, *shared) if file.suffix in (".cpp", ".h", ".inc"))


def sources() -> list[Path]:
    """Return the files to compile."""
    return sorted((_FOLDER / "int8").glob("*.cpp"))


def _compile(scratch: Path) -> None:
    objects = compile_files(sources(), _FLAGS, scratch)
    run_compiler(["ar", "rcs", str(scratch / "surgeon_int8.a"), *map(str, objects)])


@cache
def _depends() -> tuple[str | bytes, ...]:
    """Everything that the archive depends on."""
    return (*contents(files()), *_FLAGS, *machine())


_library = Library(
    "surgeon_int8", "int8", "the kernels for 8-bit experts", _depends, check_compiler, _compile, suffix=".a"
)
path = _library.path

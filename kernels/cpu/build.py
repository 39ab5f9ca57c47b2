"""Build the native kernels, once for each version of their source, of torch and of the compiler."""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import torch
from filelock import FileLock

log = logging.getLogger("surgeon")

_NAME = "surgeon_cpu"
_FLAGS = ["-O2"]


class BuildError(Exception):
    """The kernels cannot be built; the message says why and what to do."""


def directory() -> Path:
    """Return the directory of the built library, below `SURGEON_CACHE`, by default `~/.cache/surgeon`."""
    root = (
        os.environ.get("SURGEON_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "surgeon"
    )
    return Path(root) / "cpu" / _fingerprint()


def sources() -> list[Path]:
    """Return the files to compile."""
    return sorted(Path(__file__).parent.glob("*.cpp"))


def built() -> bool:
    """Whether the library was built."""
    return _path().is_file()


def library() -> Path:
    """Return the built library, and build it first if necessary. Other processes that want it wait meanwhile.

    It is built in a directory of its own and moved into place, so it is either complete or absent. A build that was
    killed does not block the next one.

    Raises:
        BuildError: the compiler or ninja is missing, the build fails, or the directory cannot be written.
    """
    made = _path()
    if made.is_file():
        return made
    _check_tools()
    try:
        made.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(made.parent / "lock"):  # the system gives it back when its holder ends, however that ends
            if made.is_file():
                return made
            _build(made)
    except OSError as error:
        raise BuildError(
            f"{made.parent} cannot be written ({error}). Set SURGEON_CACHE to another directory."
        ) from error
    return made


def _path() -> Path:
    return directory() / f"{_NAME}.so"


def _build(made: Path) -> None:
    for left in made.parent.glob("build-*"):  # of builds that were killed: only the holder of the lock is here
        shutil.rmtree(left, ignore_errors=True)
    log.warning("Building the native CPU kernels, once for this machine (a minute or two) ...")
    with tempfile.TemporaryDirectory(prefix="build-", dir=made.parent) as scratch:
        _compile(Path(scratch))
        (Path(scratch) / f"{_NAME}.so").replace(made)


def _compile(scratch: Path) -> None:
    # In a process of its own, since what torch compiles it also loads.
    command = [sys.executable, str(Path(__file__).resolve()), str(scratch)]
    compiler = _compiler()
    if len(_command()) > 1:  # torch takes CXX for the name of one program
        program = scratch / "c++"
        program.write_text(f'#!/bin/sh\nexec {compiler} "$@"\n')
        program.chmod(0o755)
        compiler = str(program)
    environment = os.environ | {"CXX": compiler}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        shown = next((line for line in lines if "error:" in line), lines[-1] if lines else f"code {done.returncode}")
        raise BuildError(f"the compiler {_compiler()} failed: {shown}")


def _check_tools() -> None:
    if platform.system() != "Linux":
        raise BuildError(f"they can be built on Linux only, but this is {platform.system()}.")
    if shutil.which(_command()[0]) is None:
        raise BuildError(f"there is no C++ compiler ({_compiler()}). Install one (apt install g++), or set CXX.")
    from torch.utils import cpp_extension

    if not cpp_extension.is_ninja_available():
        raise BuildError("ninja is not installed. Install it: pip install ninja.")


def _compiler() -> str:
    """The command that compiles, such as "ccache g++"."""
    return os.environ.get("CXX", "").strip() or "c++"


def _command() -> list[str]:
    """The words of that command. Text that a shell could not split is one word, which names no program."""
    try:
        return shlex.split(_compiler())
    except ValueError:
        return [_compiler()]


@cache
def _fingerprint() -> str:
    """A hash of everything that the library depends on."""
    found = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.*")):
        if file.suffix in (".cpp", ".h", ".inc"):
            found.update(file.name.encode() + b"\0" + file.read_bytes())
    try:
        version = subprocess.run([*_command(), "--version"], capture_output=True, text=True, check=False).stdout
    except OSError:
        version = ""
    for part in (*_FLAGS, torch.__version__, platform.machine(), platform.libc_ver()[1], version):
        found.update(f"{part}\0".encode())
    return found.hexdigest()[:16]


if __name__ == "__main__":
    from torch.utils import cpp_extension

    cpp_extension.load(
        name=_NAME,
        sources=[str(source) for source in sources()],
        extra_cflags=_FLAGS,
        build_directory=sys.argv[1],
        is_python_module=False,
    )

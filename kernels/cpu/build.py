"""Build the native kernels, once for each version of their source, of torch and of the compiler."""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
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
    """Return the directory of the built library.

    It is below `SURGEON_CACHE`, by default `~/.cache/surgeon`. A user without a home directory has one of their own in
    the directory for temporary files.
    """
    return _root() / "cpu" / _fingerprint()


def _root() -> Path:
    if given := os.environ.get("SURGEON_CACHE"):
        return Path(given)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "surgeon"
    except RuntimeError:  # neither HOME nor an entry in the list of users
        return Path(tempfile.gettempdir()) / f"surgeon-{_user()}"


def sources() -> list[Path]:
    """Return the files to compile."""
    return [file for file in _files() if file.suffix == ".cpp"]


def _files() -> list[Path]:
    """Return all files of the source."""
    here = Path(__file__).parent
    return sorted(file for file in here.rglob("*.*") if file.suffix in (".cpp", ".h", ".inc"))


def built() -> bool:
    """Whether the library was built, is whole, and cannot have been changed by other users."""
    return _usable(_path())


def library() -> Path:
    """Return the built library, and build it first if necessary. Other processes that want it wait meanwhile.

    It is built in a directory of its own and moved into place, so it is either complete or absent. A build that was
    killed does not block the next one. A library that was damaged, or that other users can write, is built again:
    loading it runs its code, and half a library ends the process.

    Raises:
        BuildError: the compiler or ninja is missing, the build fails, or the directory cannot be written or is that of
            another user.
    """
    made = _path()
    if _usable(made):
        return made
    _check_tools()
    try:
        _make_private(made.parent)
        with FileLock(made.parent / "lock"):  # the system gives it back when its holder ends, however that ends
            if not _usable(made):
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
        library, checksum = Path(scratch) / made.name, Path(scratch) / _checksum(made).name
        library.chmod(0o755)
        checksum.write_text(_sha256(library))
        checksum.chmod(0o644)
        checksum.replace(_checksum(made))
        library.replace(made)


# --- whose files are loaded -------------------------------------------------------------------------------------------


def _usable(made: Path) -> bool:
    """Whether the library is there as it was built, in files and directories that no other user can write."""
    parts = (made, _checksum(made), made.parent, made.parent.parent)
    try:
        return all(map(_is_private, parts)) and _checksum(made).read_bytes() == _sha256(made).encode()
    except OSError:
        return False


def _checksum(made: Path) -> Path:
    return made.with_suffix(".sha256")


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _is_private(path: Path) -> bool:
    """Whether a file or directory is the user's own, or the administrator's, and no one else may write it."""
    found = path.lstat()
    return os.name != "posix" or (_is_own(found) and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH))


def _is_own(found: os.stat_result) -> bool:
    return found.st_uid in (_user(), 0) and not stat.S_ISLNK(found.st_mode)


def _user() -> int:
    return os.geteuid() if os.name == "posix" else 0


def _make_private(directory: Path) -> None:
    """Make the directory for the library, and the one above it, such that no other user can write them.

    Raises:
        BuildError: one of them is that of another user. OSError: it cannot be made.
    """
    directory.parent.parent.mkdir(parents=True, exist_ok=True)
    for part in (directory.parent, directory):
        part.mkdir(mode=0o700, exist_ok=True)
        if not _is_own(part.lstat()):
            raise BuildError(
                f"{part} is that of another user, whose code would run. Set SURGEON_CACHE to a directory of your own."
            )
        if not _is_private(part):
            part.chmod(0o700)
            for left in part.iterdir() if part == directory else ():  # another user may have put it there
                shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()


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
    for file in _files():
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

"""Libraries of native code that are built on this machine, once for each version of everything they depend on.

They lie below `SURGEON_CACHE`, by default `~/.cache/surgeon`. A user without a home directory has one of their own in
the directory for temporary files.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from surgeon.directories import cache

log = logging.getLogger("surgeon")


class BuildError(Exception):
    """A library cannot be built; the message says why and what to do."""


@dataclass(frozen=True)
class Library:
    """A library that can be built.

    Attributes:
        name, suffix: of its file. folder: its directory in the cache. what: what is built, in words.
        depends: what it is made of and for, in words that change whenever it does.
        check: raises `BuildError` if something is missing that building needs.
        compile: `compile(scratch)` writes the file into an empty directory; raises `BuildError`.
    """

    name: str
    folder: str
    what: str
    depends: Callable[[], Iterable[str | bytes]]
    check: Callable[[], None]
    compile: Callable[[Path], None]
    suffix: str = ".so"

    def directory(self) -> Path:
        """Return the directory of the built library."""
        found = hashlib.sha256()
        for part in self.depends():
            found.update((part.encode() if isinstance(part, str) else part) + b"\0")
        return cache() / self.folder / found.hexdigest()[:16]

    def built(self) -> bool:
        """Whether the library was built, is whole, and cannot have been changed by other users."""
        return _usable(self._path())

    def path(self) -> Path:
        """Return the built library, and build it first if necessary. Other processes that want it wait meanwhile.

        It is built in a directory of its own and moved into place, so it is either complete or absent. A build that was
        killed does not block the next one. A library that was damaged, or that other users can write, is built again:
        loading it runs its code, and half a library ends the process.

        Raises:
            BuildError: the compiler or another tool is missing, the build fails, or the directory cannot be written or
                is that of another user.
        """
        made = self._path()
        if _usable(made):
            return made
        self.check()
        try:
            _make_private(made.parent)
            with FileLock(made.parent / "lock"):  # the system gives it back when its holder ends, however that ends
                if not _usable(made):
                    self._build(made)
        except OSError as error:
            raise BuildError(
                f"{made.parent} cannot be written ({error}). Set SURGEON_CACHE to another directory."
            ) from error
        return made

    def _path(self) -> Path:
        return self.directory() / f"{self.name}{self.suffix}"

    def _build(self, made: Path) -> None:
        for left in made.parent.glob("build-*"):  # of builds that were killed: only the holder of the lock is here
            shutil.rmtree(left, ignore_errors=True)
        log.warning("Building %s, once for this machine (a minute or two) ...", self.what)
        with tempfile.TemporaryDirectory(prefix="build-", dir=made.parent) as scratch:
            self.compile(Path(scratch))
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


# --- the compiler -----------------------------------------------------------------------------------------------------


def compiler() -> str:
    """The command that compiles, such as "ccache g++"."""
    return os.environ.get("CXX", "").strip() or "c++"


def compiler_words() -> list[str]:
    """The words of that command. Text that a shell could not split is one word, which names no program."""
    try:
        return shlex.split(compiler())
    except ValueError:
        return [compiler()]


def check_compiler() -> None:
    """Raise `BuildError` if there is no compiler, or this is not Linux."""
    if platform.system() != "Linux":
        raise BuildError(f"they can be built on Linux only, but this is {platform.system()}.")
    if shutil.which(compiler_words()[0]) is None:
        raise BuildError(f"there is no C++ compiler ({compiler()}). Install one (apt install g++), or set CXX.")


def run_compiler(command: list[str], environment: dict[str, str] | None = None) -> None:
    """Run a command that compiles; raise `BuildError` with the first error in what it says if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        shown = next((line for line in lines if "error:" in line), lines[-1] if lines else f"code {done.returncode}")
        raise BuildError(f"the compiler {compiler()} failed: {shown}")


def compile_files(sources: Iterable[Path], flags: Sequence[str], scratch: Path) -> list[Path]:
    """Compile source files side by side, and return their object files in the directory `scratch`.

    Raises:
        BuildError: as `run_compiler`.
    """
    objects = {source: scratch / f"{source.stem}.o" for source in sources}

    def one(source: Path) -> None:
        run_compiler([*compiler_words(), *flags, "-c", str(source), "-o", str(objects[source])])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(one, objects))
    return list(objects.values())


def machine() -> list[str]:
    """What every library depends on: the machine, the compiler and the C library."""
    try:
        version = subprocess.run([*compiler_words(), "--version"], capture_output=True, text=True, check=False).stdout
    except OSError:
        version = ""
    return [platform.machine(), platform.libc_ver()[1], version]


def contents(files: Iterable[Path]) -> list[bytes]:
    """The names and contents of source files."""
    return [file.name.encode() + b"\0" + file.read_bytes() for file in files]

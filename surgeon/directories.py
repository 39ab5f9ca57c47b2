"""Replace a directory by a new one so that there is always a whole one under its name, whenever the process is killed.

The new directory is written beside the old one, under a hidden name, and takes its place at the end. Linux exchanges
the names of two directories in one step. Where a file system cannot do that, there are two steps: the old directory is
renamed, then the new one. A process that is killed in between leaves no directory under the name. Then `restore`, which
everything that reads or replaces the directory calls first, gives the old one its name back.

The hidden names hold the process and the machine that wrote them. What a dead process left is removed when the
directory is replaced the next time.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

log = logging.getLogger("surgeon")

Owner = Literal["runs", "dead", "elsewhere"]
_HIDDEN = re.compile(r"(?P<state>new|old)\.(?P<pid>[0-9]+)\.(?P<host>.*)\.[^.]+")
_HERE, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux
_CANNOT_EXCHANGE = {errno.EINVAL, errno.ENOSYS, errno.EXDEV, errno.EOPNOTSUPP, errno.EPERM}

OVERWRITE = {
    "python": "Give another directory, or overwrite=True.",
    "command": "Give another directory with -o, or replace it with --overwrite.",
}
"""What to do about a directory that is there already, for an error."""


def cache() -> Path:
    """Return where built kernels and other things that can be made again are kept: `SURGEON_CACHE`, if it is set."""
    if given := os.environ.get("SURGEON_CACHE"):
        return Path(given)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "surgeon"
    except RuntimeError:  # neither HOME nor an entry in the list of users
        return Path(tempfile.gettempdir()) / f"surgeon-{os.geteuid() if os.name == 'posix' else 0}"


@contextlib.contextmanager
def replaced(directory: Path) -> Iterator[Path]:
    """Yield a new directory, which takes the place of `directory` if the block ends without an error.

    After an error the new directory is removed and the old one is untouched. Parents are made. A link is followed.

    Raises:
        OSError: something cannot be written.
    """
    directory = directory.resolve()
    directory.parent.mkdir(parents=True, exist_ok=True)
    restore(directory)
    _clean(directory)
    fresh = Path(tempfile.mkdtemp(prefix=_prefix(directory, "new"), dir=directory.parent))
    try:
        fresh.chmod(0o755)
        yield fresh
        if not directory.exists():
            fresh.rename(directory)
        elif not _exchange(fresh, directory):
            old = fresh.with_name(_prefix(directory, "old") + fresh.name.rpartition(".")[2])
            directory.rename(old)
            try:
                fresh.rename(directory)
            except OSError:
                old.rename(directory)
                raise
            shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)  # after an exchange this is the old one


def restore(directory: Path) -> None:
    """Give the old directory its name back if a process was killed while it replaced it."""
    if directory.exists():
        return
    for left, state, owner in _left(directory):
        if state == "old" and owner != "runs":
            with contextlib.suppress(OSError):  # another process was faster, or it cannot be written here
                left.rename(directory)
            return


def _prefix(directory: Path, state: Literal["new", "old"]) -> str:
    return f".{directory.name}.{state}.{os.getpid()}.{platform.node()}."


def _left(directory: Path) -> Iterator[tuple[Path, str, Owner]]:
    """Hidden directories for replacing this one, each with its state ("new" or "old") and what became of its owner."""
    start = f".{directory.name}."
    try:
        beside = sorted(directory.parent.iterdir())
    except OSError:
        return
    for path in beside:
        found = _HIDDEN.fullmatch(path.name.removeprefix(start))
        if path.name.startswith(start) and found is not None and path.is_dir():
            yield path, found["state"], _owner(int(found["pid"]), found["host"])


def _clean(directory: Path) -> None:
    for left, _, owner in _left(directory):
        if owner == "dead":
            shutil.rmtree(left, ignore_errors=True)
        elif owner == "elsewhere":
            log.warning("%s was left by a process on another machine. Remove it if that process has ended.", left)


def _owner(pid: int, host: str) -> Owner:
    if host != platform.node() or os.name != "posix":
        return "elsewhere"
    try:
        os.kill(pid, 0)  # sends nothing
    except ProcessLookupError:
        return "dead"
    except OSError:
        pass
    return "runs"


def _exchange(one: Path, other: Path) -> bool:
    """Exchange the names of two directories in one step. False if the system or the file system cannot do that.

    Raises:
        OSError: it can, but it may not.
    """
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if os.name == "posix" else None
    if function is None:
        return False
    if function(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _CANNOT_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(other))

"""A directory is replaced whole, also when the process is killed at any step."""

from __future__ import annotations

import errno
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from surgeon import directories
from surgeon.directories import replaced, restore

# Replace the directory, and die without any cleaning at the given step: when the new one is half written, or before or
# after the renaming number N. `exchange`: whether the file system can exchange names.
DIE = """
import os, sys
from pathlib import Path
from surgeon import directories
place, exchange, step = Path(sys.argv[1]), sys.argv[2] == "True", sys.argv[3]
count = 0

def dying(function):
    def call(*args):
        global count
        count += 1
        if step == f"before {count}":
            os._exit(9)
        result = function(*args)
        if step == f"after {count}":
            os._exit(9)
        return result
    return call

directories._exchange = dying(directories._exchange) if exchange else lambda one, other: False
Path.rename = dying(Path.rename)
with directories.replaced(place) as fresh:
    (fresh / "first").write_text("new")
    if step == "writing":
        os._exit(9)
    (fresh / "second").write_text("new")
"""
RUNS = {
    (True, "writing"): "old",
    (True, "before 1"): "old",
    (True, "after 1"): "new",
    (False, "writing"): "old",
    (False, "before 1"): "old",
    (False, "after 1"): "old",
    (False, "before 2"): "old",
    (False, "after 2"): "new",
}


def write(directory: Path, content: str) -> None:
    with replaced(directory) as fresh:
        (fresh / "first").write_text(content)
        (fresh / "second").write_text(content)


def contents(directory: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in directory.iterdir()}


@pytest.mark.parametrize(("exchange", "step"), RUNS)
def test_killed(tmp_path: Path, exchange: bool, step: str) -> None:
    place = tmp_path / "place"
    write(place, "old")
    command = [sys.executable, "-c", DIE, str(place), str(exchange), step]
    died = subprocess.run(command, check=False, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert died.returncode == 9
    restore(place)
    whole = RUNS[exchange, step]
    assert contents(place) == {"first": whole, "second": whole}
    write(place, "newest")
    assert contents(place) == {"first": "newest", "second": "newest"}
    assert [path.name for path in tmp_path.iterdir()] == ["place"]  # what the dead process left is gone


@pytest.mark.parametrize("exchange", [True, False])
def test_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool) -> None:
    if not exchange:
        monkeypatch.setattr(directories, "_exchange", lambda one, other: False)
    place = tmp_path / "a" / "place"
    for content in ("one", "two", "three"):
        write(place, content)
        assert contents(place) == {"first": content, "second": content}
    with pytest.raises(FileNotFoundError), replaced(place) as fresh:
        (fresh / "first").rename(fresh / "second")
    assert contents(place) == {"first": "three", "second": "three"}
    assert [path.name for path in place.parent.iterdir()] == ["place"]


def test_a_link_stays_one(tmp_path: Path) -> None:
    write(tmp_path / "target", "old")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    write(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert contents(tmp_path / "target") == {"first": "new", "second": "new"}


def test_the_old_one_stays_when_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "place"
    write(place, "old")
    monkeypatch.setattr(directories, "_exchange", lambda one, other: False)
    original = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if Path(target) == place and ".new." in self.name:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return original(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OSError, match="Input/output"):
        write(place, "new")
    assert contents(place) == {"first": "old", "second": "old"}
    assert [path.name for path in tmp_path.iterdir()] == ["place"]


def test_only_what_dead_processes_left_is_removed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    own = f".place.new.{os.getpid()}.{platform.node()}.abc"
    kept = [own, ".place.new.1.another-machine.abc", ".place.notes", ".other.new.99999999.x.abc"]
    for name in kept:
        (tmp_path / name).mkdir()
    write(tmp_path / "place", "new")
    assert {path.name for path in tmp_path.iterdir()} == {*kept, "place"}
    assert "another-machine.abc was left by a process on another machine" in caplog.text


def test_nothing_to_restore(tmp_path: Path) -> None:
    (tmp_path / f".place.old.{os.getpid()}.{platform.node()}.abc").mkdir()  # a running process is replacing it
    restore(tmp_path / "place")
    restore(tmp_path / "no" / "parent")
    assert not (tmp_path / "place").exists()

"""Which built library is loaded: a whole one of the user's own. Nothing is compiled here."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from surgeon.kernels import building

OTHER = 12345  # a user


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> building.Library:
    """A library in a cache of its own, by a compiler that writes how often it ran."""
    made: list[str] = []

    def compile_(scratch: Path) -> None:
        made.append(f"library {len(made)}")
        (scratch / "some.so").write_text(made[-1])

    monkeypatch.setenv("SURGEON_CACHE", str(tmp_path / "cache"))
    return building.Library("some", "folder", "some library", lambda: ["version 1"], lambda: None, compile_)


def test_what_it_depends_on_gives_it_another_directory(library: building.Library) -> None:
    other = replace(library, depends=lambda: ["version 2"])
    assert library.path().parent != other.path().parent
    assert library.path().parent.parent == other.path().parent.parent


def test_built_once(library: building.Library) -> None:
    assert not library.built()
    for _ in range(2):
        assert library.path().read_text() == "library 0"
        assert library.built()
    assert [path.name for path in library.directory().iterdir() if "build-" in path.name] == []


@pytest.mark.parametrize(
    "harm",
    [
        lambda made: made.write_text(""),
        lambda made: made.write_text(made.read_text()[:4]),
        lambda made: made.write_text("x" + made.read_text()[1:]),
        lambda made: made.with_suffix(".sha256").unlink(),
        lambda made: made.with_suffix(".sha256").write_bytes(b"\xff"),
        lambda made: made.chmod(0o777),
        lambda made: made.parent.chmod(0o777),
    ],
    ids=["empty", "truncated", "changed", "no sum", "no text", "file of all", "directory of all"],
)
def test_what_is_damaged_or_open_to_others_is_built_again(library: building.Library, harm: object) -> None:
    made = library.path()
    assert callable(harm)
    harm(made)
    assert not library.built()
    assert library.path().read_text() == "library 1"
    assert library.built()
    for path in (made, made.parent, made.parent.parent):
        assert not path.stat().st_mode & 0o022


def test_a_cache_that_a_group_can_write_is_closed(library: building.Library) -> None:
    """Its group could only exchange whole directories in it, and they would not be the user's."""
    made = library.path()
    made.parent.parent.chmod(0o775)
    assert not library.built()
    assert library.path().read_text() == "library 0"
    assert made.parent.parent.stat().st_mode & 0o777 == 0o700


def test_what_others_put_into_an_open_directory_is_removed(library: building.Library) -> None:
    made = library.path()
    made.parent.chmod(0o777)
    (made.parent / "crossover.json").write_text("{}")
    (made.parent / "folder").mkdir()
    library.path()
    assert {path.name for path in made.parent.iterdir()} <= {made.name, "some.sha256", "lock"}


def test_files_of_another_user_are_not_loaded(library: building.Library, monkeypatch: pytest.MonkeyPatch) -> None:
    made = library.path()
    if os.geteuid() != 0:
        monkeypatch.setattr(building, "_user", lambda: OTHER)
        assert not library.built()
        return
    os.chown(made, OTHER, OTHER)
    assert not library.built()
    assert library.path().read_text() == "library 1"
    os.chown(made.parent, OTHER, OTHER)
    with pytest.raises(building.BuildError, match=r"is that of another user, .* Set SURGEON_CACHE"):
        library.path()


def test_a_link_is_not_followed(library: building.Library, tmp_path: Path) -> None:
    made = library.path()
    made.rename(tmp_path / "elsewhere.so")
    made.symlink_to(tmp_path / "elsewhere.so")
    assert not library.built()
    assert library.path().read_text() == "library 1"
    assert not made.is_symlink()


def test_without_a_home_directory(library: building.Library, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def homeless(self: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("SURGEON_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "expanduser", homeless)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert library.directory().parents[1] == tmp_path / f"surgeon-{os.geteuid()}"


def test_a_compiler_that_no_shell_would_understand_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", 'c++ "')
    with pytest.raises(building.BuildError, match='there is no C\\+\\+ compiler \\(c\\+\\+ "\\)'):
        building.check_compiler()


def test_an_empty_name_of_a_compiler_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, found in (("", "c++"), ("clang++", "clang++")):
        monkeypatch.setenv("CXX", name)
        assert building.compiler() == found
    monkeypatch.delenv("CXX")
    assert building.compiler() == "c++"

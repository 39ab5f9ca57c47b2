"""Which built library is loaded: a whole one of the user's own. Nothing is compiled here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from surgeon.kernels.cpu import build, crossover

OTHER = 12345  # a user


@pytest.fixture
def builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was built, in a cache of its own, by a compiler that writes a few bytes."""
    made: list[str] = []

    def compile_(scratch: Path) -> None:
        made.append(f"library {len(made)}")
        (scratch / f"{build._NAME}.so").write_text(made[-1])

    monkeypatch.setenv("SURGEON_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "_compile", compile_)
    monkeypatch.setattr(build, "_check_tools", lambda: None)
    return made


def test_built_once(builds: list[str]) -> None:
    assert not build.built()
    for _ in range(2):
        assert build.library().read_text() == "library 0"
        assert build.built()
    assert [path.name for path in build.directory().iterdir() if "build-" in path.name] == []


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
def test_what_is_damaged_or_open_to_others_is_built_again(builds: list[str], harm: object) -> None:
    made = build.library()
    assert callable(harm)
    harm(made)
    assert not build.built()
    assert build.library().read_text() == "library 1"
    assert build.built()
    for path in (made, made.parent, made.parent.parent):
        assert not path.stat().st_mode & 0o022


def test_a_cache_that_a_group_can_write_is_closed(builds: list[str]) -> None:
    """Its group could only exchange whole directories in it, and they would not be the user's."""
    made = build.library()
    made.parent.parent.chmod(0o775)
    assert not build.built()
    assert build.library().read_text() == "library 0"
    assert made.parent.parent.stat().st_mode & 0o777 == 0o700


def test_what_others_put_into_an_open_directory_is_removed(builds: list[str]) -> None:
    made = build.library()
    made.parent.chmod(0o777)
    (made.parent / "crossover.json").write_text("{}")
    (made.parent / "folder").mkdir()
    build.library()
    assert {path.name for path in made.parent.iterdir()} <= {made.name, f"{build._NAME}.sha256", "lock"}


def test_files_of_another_user_are_not_loaded(builds: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    made = build.library()
    if os.geteuid() != 0:
        monkeypatch.setattr(build, "_user", lambda: OTHER)
        assert not build.built()
        return
    os.chown(made, OTHER, OTHER)
    assert not build.built()
    assert build.library().read_text() == "library 1"
    os.chown(made.parent, OTHER, OTHER)
    with pytest.raises(build.BuildError, match=r"is that of another user, .* Set SURGEON_CACHE"):
        build.library()


def test_a_link_is_not_followed(builds: list[str], tmp_path: Path) -> None:
    made = build.library()
    made.rename(tmp_path / "elsewhere.so")
    made.symlink_to(tmp_path / "elsewhere.so")
    assert not build.built()
    assert build.library().read_text() == "library 1"
    assert not made.is_symlink()


def test_without_a_home_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def homeless(self: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("SURGEON_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "expanduser", homeless)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert build.directory().parents[1] == tmp_path / f"surgeon-{os.geteuid()}"


DAMAGED = [
    "[",
    "[1]",
    "null",
    "[" * 100_000,
    *(
        json.dumps({"here": value})
        for value in (
            None,
            3,
            "abc",
            [],
            {},
            [3],
            [[False, 8, 8]],
            [[False, 8, 8, 0.5, 1]],
            [[False, 8, 8, "0.5"]],
            [[False, 8, 8, float("nan")]],
            [[False, 8, 8, float("inf")]],
            [[False, 8, 8, -0.5]],
            [[False, 8, 9, 0.5]],
            [[False, 2**70, 8, 0.5]],
            [[0, 8, 8, 0.5]],
            [[False, 8, 8, 0.5], None],
        )
    ),
]


def test_a_damaged_measurement_is_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[object, ...]] = []

    def measure() -> Iterator[tuple[bool, int, int, float]]:
        yield False, 8, 8, 0.75

    monkeypatch.setattr(crossover, "measure", measure)
    monkeypatch.setattr(crossover, "_measured_on", lambda: "here")
    monkeypatch.setattr(crossover, "_give", lambda *values: given.append(values))
    for text in DAMAGED:
        (tmp_path / "crossover.json").write_text(text)
        crossover.load(tmp_path)
        assert given.pop() == (False, 8, 8, 0.75), text
        assert json.loads((tmp_path / "crossover.json").read_text())["here"] == [[False, 8, 8, 0.75]]
    (tmp_path / "crossover.json").write_text(json.dumps({"here": [[False, 8, 8, 0.25]]}))
    crossover.load(tmp_path)
    assert given == [(False, 8, 8, 0.25)]


UNLOADABLE = """
import torch
from pathlib import Path
from surgeon.kernels import cpu
from surgeon.kernels.dynamic_k import dynamic_k_ffn
Path("no_library.so").write_text("text")
cpu.library = lambda: Path("no_library.so").resolve()
x, scores, w = torch.ones(3, 8), torch.ones(3, 2), torch.ones(2, 4, 8)
for _ in range(2):
    print(float(dynamic_k_ffn(x, scores, torch.zeros(3), w, None, None, None, w, None, "relu").sum()))
"""


def test_a_library_that_the_system_refuses_is_told_once(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", UNLOADABLE]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
    assert done.stdout.split() == ["1536.0", "1536.0"]
    assert done.stderr.count("no_library.so cannot be loaded") == 1

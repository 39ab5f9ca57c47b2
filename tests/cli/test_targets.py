"""Where a surgery may be written, checked before the work."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from .harness import NET, Run, left


def test_targets_are_checked_before_the_work(run: Run, tmp_path: Path, shelf: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("x")
    shutil.copytree(shelf / "masked", tmp_path / "done")
    for options, words in (
        (("-o", "file"), "file is a file."),
        (("-o", "mine", "--overwrite"), "mine is not empty and not a saved surgery."),
        (("-o", "done"), "done exists. Give another directory with -o, or replace it with --overwrite."),
        (("-o", "bert/inside"), "bert/inside is the model itself, which is never changed."),
    ):
        result = run("apply", "--passes", "moeify", "bert", *options)
        assert (result.code, result.out) == (2, "")
        assert result.err.startswith(f"error: {words}")  # no "loading": nothing was done
    assert run("apply", "--passes", "lower", "done", "-o", "done", "--overwrite").code == 2
    before = (tmp_path / "done/surgery.json").read_text()
    assert run("-q", "apply", "--passes", "moeify", *NET, "-o", "done", "--overwrite").code == 0
    assert (tmp_path / "done/surgery.json").read_text() != before
    assert left(tmp_path) == {"file", "mine", "done"}


def test_a_directory_that_cannot_be_written_exits_with_4(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("surgeon.jobs.store.os.access", lambda *args: False)
    result = run("apply", "--passes", "moeify", *NET)
    assert (result.code, result.out) == (4, "")
    assert re.match(r"error: Cannot write gelu-surgery: you have no permission to write to /", result.err)


def test_the_demo_is_not_written_over_something_else(run: Run, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("x")
    result = run("demo", "mine")
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("error: mine is not empty and not a saved surgery.")

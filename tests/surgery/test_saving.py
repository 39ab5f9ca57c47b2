"""Saved whole or not at all: directories that are refused, and failures while writing."""

from __future__ import annotations

import errno
import os
import platform
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch

from surgeon.errors import PassError, SaveError
from surgeon.models.source import load_model
from surgeon.moe.site import find_moes
from surgeon.passes import SwapActivation
from surgeon.surgery.artifact import DIFF, MODEL, load
from surgeon.surgery.pipeline import Pipeline
from surgeon.surgery.record import RECORD
from surgeon.surgery.surgery import Surgery
from tests.surgery.forms import listing


def test_an_empty_directory_is_used(surgeries: dict[str, Surgery], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    surgeries["masked"].save(tmp_path / "empty")
    assert listing(tmp_path) == ["empty", f"empty/{DIFF}", f"empty/{MODEL}", f"empty/{RECORD}"]


def test_parents_are_made(surgeries: dict[str, Surgery], tmp_path: Path) -> None:
    assert load(surgeries["masked"].save(tmp_path / "a" / "b" / "c"))


@pytest.mark.parametrize("overwrite", [True, False])
def test_other_content_is_never_overwritten(surgeries: dict[str, Surgery], tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "text.tex").write_text("years of work")
    with pytest.raises(SaveError, match="is not empty and not a saved surgery" if overwrite else "not empty"):
        surgeries["masked"].save(tmp_path / "thesis", overwrite=overwrite)
    assert listing(tmp_path) == ["thesis", "thesis/text.tex"]


def test_a_file_is_not_overwritten(surgeries: dict[str, Surgery], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a")
    with pytest.raises(SaveError, match=r"is a file\. Give a directory"):
        surgeries["masked"].save(tmp_path / "file", overwrite=True)
    assert (tmp_path / "file").read_text() == "a"


def test_a_saved_surgery_is_overwritten_when_asked(surgeries: dict[str, Surgery], tmp_path: Path) -> None:
    place = surgeries["masked"].save(tmp_path / "a")
    with pytest.raises(SaveError, match="exists and is not empty"):
        surgeries["dynamic"].save(place)
    assert {site.form for site in find_moes(load(place))} == {"masked"}
    surgeries["dynamic"].save(place, overwrite=True)
    assert {site.form for site in find_moes(load(place))} == {"dynamic"}
    assert listing(tmp_path) == ["a", f"a/{DIFF}", f"a/{MODEL}", f"a/{RECORD}"]


def test_without_inputs_nothing_can_be_saved(traces: Any, tmp_path: Path) -> None:
    surgery = Pipeline([SwapActivation()]).run(traces("stack:gelu"))
    with pytest.raises(PassError, match="inputs"):
        surgery.save(tmp_path / "a")
    assert listing(tmp_path) == []


def test_no_space(surgeries: dict[str, Surgery], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(100, 90, 10))
    with pytest.raises(SaveError, match=r"Cannot write .*a: No space left.*|.*MB needed"):
        surgeries["masked"].save(tmp_path / "a")
    assert listing(tmp_path) == []


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), RuntimeError("unexpected pos 64 vs 0"), KeyboardInterrupt()],
)
@pytest.mark.parametrize("overwrite", [True, False])
def test_nothing_is_left_when_writing_fails(
    surgeries: dict[str, Surgery],
    saved: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    overwrite: bool,
) -> None:
    place = tmp_path / "a"
    if overwrite:
        shutil.copytree(saved["masked"], place)
    before = listing(tmp_path)

    def fail(program: Any, path: Path) -> None:
        Path(path).write_bytes(b"half of it")
        raise error

    monkeypatch.setattr(torch.export, "save", fail)
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else SaveError):
        surgeries["dynamic"].save(place, overwrite=overwrite)
    assert listing(tmp_path) == before
    if overwrite:
        assert {site.form for site in find_moes(load(place))} == {"masked"}


def test_the_old_one_stays_when_the_new_one_cannot_take_its_place(
    surgeries: dict[str, Surgery], saved: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "a"
    shutil.copytree(saved["masked"], place)

    def fail(one: Path, other: Path) -> bool:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("surgeon.directories._exchange", fail)
    with pytest.raises(SaveError, match="Input/output error"):
        surgeries["dynamic"].save(place, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert {site.form for site in find_moes(load(place))} == {"masked"}


def test_a_surgery_that_was_being_replaced_is_found(saved: dict[str, Path], tmp_path: Path) -> None:
    """Its process was killed after the old one was renamed, on a file system that cannot exchange names."""
    left = tmp_path / f".a.old.99999999.{platform.node()}.x"
    shutil.copytree(saved["masked"], left)
    assert load_model(tmp_path / "a").kind == "artifact"
    (tmp_path / "a").rename(left)
    assert load(tmp_path / "a")


def test_no_permission(surgeries: dict[str, Surgery], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> str:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    with pytest.raises(SaveError, match=r"Cannot write .*Permission denied"):
        surgeries["masked"].save(tmp_path / "a")
    assert listing(tmp_path) == []


def test_a_program_that_differs_is_not_saved(
    surgeries: dict[str, Surgery], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("surgeon.surgery.artifact.relative_error", lambda actual, expected: 0.5)
    with pytest.raises(SaveError, match=r"differs from the graph by 5.0e-01, relative\. Nothing was saved"):
        surgeries["masked"].save(tmp_path / "a")
    assert listing(tmp_path) == []


def test_a_graph_that_cannot_be_exported(
    surgeries: dict[str, Surgery], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise ValueError("not today")

    monkeypatch.setattr(torch.export, "export", fail)
    graph = surgeries["masked"].graph.train()
    with pytest.raises(SaveError, match="cannot be exported: not today"):
        surgeries["masked"].save(tmp_path / "a")
    assert listing(tmp_path) == []
    assert graph.training
    graph.eval()

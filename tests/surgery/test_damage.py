"""Saved surgeries that were damaged or changed are refused, each with what is wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from surgeon.errors import LoadError
from surgeon.models.weight_files import sha256_of
from surgeon.surgery.artifact import DIFF, MODEL, load, load_diff
from surgeon.surgery.record import RECORD


@pytest.fixture
def copy(saved: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved["dynamic"], tmp_path / "copy"))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(bytes(content))


def with_record(copy: Path, **changes: Any) -> None:
    record = json.loads((copy / RECORD).read_text())
    record.update(changes)
    (copy / RECORD).write_text(json.dumps({key: value for key, value in record.items() if value is not ...}))


def retold(copy: Path) -> None:
    """Let the record tell the hash of the damaged model: then torch itself must refuse it."""
    (copy / MODEL).write_bytes((copy / MODEL).read_bytes()[:1000])
    with_record(copy, model_sha256=sha256_of([copy / MODEL]))


DAMAGES: dict[str, tuple[Any, str]] = {
    "model_flipped": (lambda c: flip(c / MODEL), "is damaged or was changed"),
    "model_truncated": (
        lambda c: (c / MODEL).write_bytes((c / MODEL).read_bytes()[:-100]),
        "is damaged or was changed",
    ),
    "model_empty": (lambda c: (c / MODEL).write_bytes(b""), "is damaged or was changed"),
    "model_missing": (lambda c: (c / MODEL).unlink(), f"has no {MODEL}, so the saved surgery is incomplete"),
    "model_no_program": (retold, MODEL),
    "record_missing": (lambda c: (c / RECORD).unlink(), f"is not a saved surgery: it has no {RECORD}"),
    "record_truncated": (lambda c: (c / RECORD).write_text((c / RECORD).read_text()[:100]), "is damaged"),
    "record_binary": (lambda c: (c / RECORD).write_bytes(b"\xff\xfe\x00"), "is damaged"),
    "record_a_list": (lambda c: (c / RECORD).write_text("[1, 2]"), "is damaged"),
    "record_without_schema": (lambda c: (c / RECORD).write_text("{}"), "is damaged"),
    "record_without_key": (lambda c: with_record(c, trace=...), "is damaged: trace: field required"),
    "record_with_wrong_type": (lambda c: with_record(c, trace={}), "is damaged: trace.form: field required"),
    "record_older": (lambda c: with_record(c, schema=1), r"has schema 1, .* Run the surgery again"),
    "record_newer": (lambda c: with_record(c, schema=99), r"has schema 99, but .* reads schema 2\. Update surgeon"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged(copy: Path, damage: str) -> None:
    harm, words = DAMAGES[damage]
    harm(copy)
    with pytest.raises(LoadError, match=words):
        load(copy)


def test_damaged_diff(copy: Path) -> None:
    (copy / DIFF).write_text("{")
    with pytest.raises(LoadError, match=DIFF):
        load_diff(copy)
    (copy / DIFF).write_text("[]")
    with pytest.raises(LoadError, match=DIFF):
        load_diff(copy)
    assert load(copy)  # the graph does not need it


def test_output_modules_of_others_are_not_imported(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "evil.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with_record(copy, output_modules=["evil"])
    assert load(copy)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="not a saved surgery"):
        load(tmp_path / "nowhere")
    (tmp_path / "file").write_text("a")
    with pytest.raises(LoadError):
        load(tmp_path / "file")

"""Saved surgeries that were damaged or changed are refused, each with what is wrong."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from surgeon.errors import LoadError
from surgeon.models.weight_files import sha256_of
from surgeon.surgery.artifact import DIFF, MODEL, load, load_diff
from surgeon.surgery.record import RECORD, read_record


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


def with_text(copy: Path, text: str) -> None:
    (copy / RECORD).write_text(text)


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
    "record_nested": (lambda c: with_text(c, "[" * 100_000), "is damaged: it is nested too deeply"),
    "record_with_a_key_twice": (
        lambda c: with_text(c, (c / RECORD).read_text().replace("{", '{"schema": 2,', 1)),
        "a key stands in it twice",
    ),
    "record_with_infinity": (
        lambda c: with_text(c, (c / RECORD).read_text().replace('"seconds": ', '"seconds": 9e999, "x": ', 1)),
        r"passes\.0\.seconds is not a finite number",
    ),
    "record_older": (lambda c: with_record(c, schema=1), r"has schema 1, .* Run the surgery again"),
    "record_newer": (lambda c: with_record(c, schema=99), r"has schema 99, but .* reads schema 6\. Update surgeon"),
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


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, part in items for place in places(part, (*path, key)))]


OTHERS = [None, True, -1, 2**70, 1.5, float("nan"), float("inf"), "", "x", [], {}, [[1]], {"a": {"b": []}}]


@pytest.mark.parametrize(("file", "read"), [(RECORD, read_record), (DIFF, load_diff)])
def test_any_value_of_another_type(copy: Path, file: str, read: Callable[[Path], object]) -> None:
    """Each value in turn is replaced by others: the file is refused, or reads as well."""
    content, chosen = json.loads((copy / file).read_text()), random.Random(0)
    refused = 0
    for *above, last in places(content)[1:]:
        holder = content
        for key in above:
            holder = holder[key]
        kept = holder[last]
        for other in chosen.sample(OTHERS, 2):
            holder[last] = other
            (copy / file).write_text(json.dumps(content))
            try:
                read(copy)
            except LoadError:
                refused += 1
        holder[last] = kept
    assert refused > 100


@pytest.mark.parametrize(
    "change", [{"dynamic": []}, {"sizes": ""}, {"sizes": "x[batch, 16], 1 <= batch"}, {"sizes": "x[batch"}]
)
def test_inputs_of_another_graph(copy: Path, change: dict[str, object]) -> None:
    trace = json.loads((copy / RECORD).read_text())["trace"]
    with_record(copy, trace=trace | change)
    with pytest.raises(LoadError, match=r"is damaged: trace\.sizes"):
        load(copy)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="not a saved surgery"):
        load(tmp_path / "nowhere")
    (tmp_path / "file").write_text("a")
    with pytest.raises(LoadError):
        load(tmp_path / "file")

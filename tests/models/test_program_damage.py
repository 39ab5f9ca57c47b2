"""Exported programs that were damaged or changed at random: a clear error, or the same output."""

from __future__ import annotations

import json
import random
import re
import zipfile
from collections import Counter
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch

from surgeon.errors import LoadError
from surgeon.models.weight_files import read_program
from surgeon.tracing.trace import from_program
from tests.models.programs import MODEL, packed, records_of, small_program

X = torch.linspace(-1, 1, 15).view(5, 3)
# Put in the place of other values.
VALUES = ["", "__class__", "x", "a b", None, True, -1, 2**70, 1.5, [], {}, [[]], "Infinity", "s99999", "torch.os", "\0"]


@pytest.fixture(scope="module")
def archive() -> bytes:
    return small_program()


def outcome(path: Path) -> str | torch.Tensor:
    """The output of the program, or its refusal. Any other exception fails the test."""
    try:
        program = read_program(path)
    except LoadError:
        return "refused"
    return from_program(program)(X)


@pytest.fixture
def expected(archive: bytes, tmp_path: Path) -> torch.Tensor:
    (tmp_path / "whole.pt2").write_bytes(archive)
    found = outcome(tmp_path / "whole.pt2")
    assert isinstance(found, torch.Tensor)
    return found


def test_single_bits(archive: bytes, expected: torch.Tensor, tmp_path: Path) -> None:
    """A flipped bit is noticed, or it is one that no reader looks at, such as padding."""
    chosen, path = random.Random(0), tmp_path / "model.pt2"
    refused = 0
    for _ in range(250):
        content = bytearray(archive)
        content[chosen.randrange(len(content))] ^= 1 << chosen.randrange(8)
        path.write_bytes(content)
        found = outcome(path)
        refused += isinstance(found, str)
        assert isinstance(found, str) or torch.equal(found, expected)
    assert refused > 200


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, part in items for place in places(part, (*path, key)))]


def changed(content: Any, chosen: random.Random) -> Any:
    """JSON with one value replaced, removed, copied from elsewhere, renamed, or with one letter changed."""
    *above, last = chosen.choice(places(content)[1:])
    *other_above, other = chosen.choice(places(content)[1:])
    holder, source = content, content
    for key in above:
        holder = holder[key]
    for key in other_above:
        source = source[key]
    match chosen.randrange(5):
        case 0:
            holder[last] = chosen.choice(VALUES)
        case 1:
            del holder[last]
        case 2:
            holder[last] = json.loads(json.dumps(source[other]))
        case 3 if isinstance(last, str):
            holder[chosen.choice(["x", last.upper()])] = holder.pop(last)
        case _ if isinstance(text := holder[last], str) and text:
            where = chosen.randrange(len(text))
            holder[last] = text[:where] + chr(chosen.randrange(32, 127)) + text[where + 1 :]
    return content


def test_changed_records(archive: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Records changed with the right checksums: refused, or a program that loads. Nothing else is raised."""
    monkeypatch.chdir(tmp_path)
    chosen, records = random.Random(1), records_of(archive)
    found: Counter[str] = Counter()
    texts = [name for name in records if name.endswith(".json")]
    model = next(name for name in texts if name.endswith(MODEL))
    for number in range(250):
        name = chosen.choice([model, model, *texts, *records])
        made = dict(records)
        if name.endswith(".json") and number % 5:
            made[name] = json.dumps(changed(json.loads(records[name]), chosen)).encode()
        elif number % 2:
            made[name + chosen.choice(["x", "/", ".PT"])] = made.pop(name)
        else:
            content = bytearray(records[name])
            where = chosen.randrange(len(content))
            content[where : where + chosen.randrange(4)] = chosen.randbytes(chosen.randrange(4))
            made[name] = bytes(content)
        (tmp_path / "model.pt2").write_bytes(packed(made))
        try:
            read_program(tmp_path / "model.pt2")
            found["read"] += 1
        except LoadError:
            found["refused"] += 1
    assert found["read"] > 20
    assert found["refused"] > 120
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt2"]


def laid_out_otherwise(archive: bytes) -> dict[str, bytes]:
    """Archives in which two readers could find different records."""
    compressed, commented = BytesIO(), BytesIO()
    with zipfile.ZipFile(compressed, "w", zipfile.ZIP_DEFLATED) as zipped:
        for name, content in records_of(archive).items():
            zipped.writestr(name, content)
    with zipfile.ZipFile(commented, "w") as zipped:
        zipped.comment = b"a comment"
        for name, content in records_of(archive).items():
            zipped.writestr(name, content)
    apart = {f"b/{name}" if "weight_0" in name else name: content for name, content in records_of(archive).items()}
    return {
        "compressed": compressed.getvalue(),
        "comment": commented.getvalue(),
        "bytes before": b"\0" * 64 + archive,
        "bytes after": archive + b"\0",
        "two archives": archive + packed(records_of(archive)),
        "two folders": packed(apart),
        "empty": b"",
    }


def test_layout(archive: bytes, tmp_path: Path) -> None:
    for case, content in laid_out_otherwise(archive).items():
        (tmp_path / "model.pt2").write_bytes(content)
        with pytest.raises(LoadError, match=re.compile("damaged")) as error:
            read_program(tmp_path / "model.pt2", trust_pickle=True)
        assert str(error.value).startswith("model.pt2"), case

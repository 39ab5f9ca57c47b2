"""Files of rows: a cell is what the file holds, in every format, and damage is named with its place."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from surgeon.data.files import load_data
from surgeon.data.tables import read_table
from surgeon.errors import DataError


def read(path: Path) -> dict[str, list[Any]]:
    return dict(read_table(path, str(path.parent)).to_dict())


WORDS = ["null", "NA", "nan", "None", "", "007", "1.0", "true", "2020-01-01", 'a "b"', "a,b", "a\nb", "é"]


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "json", "parquet"])
def test_cells_are_what_the_file_holds(tmp_path: Path, suffix: str) -> None:
    import datasets

    path = tmp_path / f"a.{suffix}"
    if suffix in ("csv", "tsv"):
        mark = "," if suffix == "csv" else "\t"
        quoted = ['"' + word.replace('"', '""') + '"' for word in WORDS]
        path.write_bytes(("\r\n".join([f"text{mark}label", *(f"{word}{mark}NA" for word in quoted)]) + "\n").encode())
    else:
        rows = datasets.Dataset.from_list([{"text": word, "label": "NA"} for word in WORDS])
        if suffix == "parquet":
            rows.to_parquet(path)
        else:
            rows.to_json(path, lines=suffix == "jsonl")
    assert read(path) == {"text": WORDS, "label": ["NA"] * len(WORDS)}


def test_cells_without_quotes(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("\ufefftext,label\n\nnull,1\n,\n007,x", encoding="utf-8")
    assert read(tmp_path / "a.csv") == {"text": ["null", "", "007"], "label": ["1", "", "x"]}


def test_rows_of_folders_are_read_alike(tmp_path: Path, tokenizer: Any, config: Any) -> None:
    config.id2label, config.label2id = {0: "None", 1: "NA", 2: "a"}, {"None": 0, "NA": 1, "a": 2}
    (tmp_path / "train.csv").write_text("text,label\na,None\na b,NA\n")
    (tmp_path / "test.csv").write_text("text,label\na b,NA\n")
    data = load_data(str(tmp_path), tokenizer=tokenizer, config=config)
    batches = [*data.train, *data.eval]
    assert sum(batch.size for batch in batches) == 3
    assert all((batch.kwargs["attention_mask"].sum(1) - 3).tolist() == batch.labels.tolist() for batch in batches)


def test_lines_of_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffnull\r\n\r\nb\u2028c\n".encode())
    assert read(tmp_path / "a.txt") == {"text": ["null", "", "b\u2028c"]}


def test_json_columns(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"text": "a"}\n{"text": "b", "meta": {"x": 1}}\n{"text": "c", "meta": [2, "y"]}')
    assert read(tmp_path / "a.json") == {"text": ["a", "b", "c"], "meta": [None, '{"x": 1}', '[2, "y"]']}


DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "text,label\na,1\nb,c,1\n", r"the row that ends in line 3 has 3 cells, but the header has 2"),
        ("a.csv", "text,label\na,1\nb\n", r"the row that ends in line 3 has 1 cells, but the header has 2"),
        ("a.csv", 'text,label\na,1\n"b"c,1\n', r"line 3: ',' expected after '\"'"),
        ("a.csv", 'text,label\na,1\n"b,1\n', r"line 3: unexpected end of data"),
        ("a.csv", "text,text\na,1\n", r"two columns are called 'text'"),
        ("a.tsv", "text\tlabel\n\n", r"it has no rows"),
        (
            "a.txt",
            "a\nb\xe9\n",
            r"not UTF-8. Line 2 has the byte 0xe9 at position 3 .* iconv -f latin1 -t utf-8 a.txt",
        ),
        ("a.jsonl", '{"text": "\xe9"}\n', r"not UTF-8. Line 1 has the byte 0xe9 at position 10"),
        ("a.jsonl", '{"text": "a"}\n\n{"text": }\n', r"line 3: Expecting value"),
        ("a.jsonl", '{"text": "a"}\n[1]\n', r"row 1 is a list, not an object of named columns"),
        pytest.param("a.jsonl", f'{{"text": {DEEP}}}', r"line 1: values are nested too deeply", id="deep lines"),
        pytest.param("a.json", DEEP, r"values are nested too deeply", id="deep"),
        ("a.json", "3", r"row 0 is a int, not an object of named columns"),
        ("a.jsonl", '{"text": "\\ud800"}', r"column 'text' holds text that is not Unicode"),
    ],
)
def test_damage_is_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(DataError, match=message):
        read(tmp_path / name)


def test_other_encodings(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\na,1\n", encoding="utf-16")
    with pytest.raises(DataError, match=r"iconv -f utf-16 -t utf-8 a\.csv"):
        read(tmp_path / "a.csv")


def test_long_cells(tmp_path: Path) -> None:
    limit = csv.field_size_limit()
    (tmp_path / "a.csv").write_text(f"text,label\n{'a' * (limit + 1)},1\n")
    assert len(read(tmp_path / "a.csv")["text"][0]) == limit + 1
    assert csv.field_size_limit() == limit

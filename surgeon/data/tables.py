"""Read a file of rows. A cell of text stays the text that the file holds.

Libraries guess: pandas takes "NA", "None" and "null" for missing, "007" for a number, and the first cell of a row that
is too long for its index. Arrow takes a column of dates for points in time. Nothing is guessed here, so that a table is
the same in all formats.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from surgeon.errors import DataError

Columns = dict[str, list[Any]]


def read_table(path: Path, cache: str) -> Any:
    """Read a file of rows as a `datasets.Dataset`.

    All cells of CSV and TSV files are text. A JSON column that mixes types is text, its numbers as JSON writes them.

    Args:
        cache: a folder that `datasets` may write to.

    Raises:
        DataError: the file is not of a known kind, is empty, not in UTF-8, or damaged. The message names the line.
    """
    import datasets

    if path.suffix not in READERS:
        kind = f"{path.suffix} files" if path.suffix else "a file without a suffix"
        raise DataError(f"{path.name}: cannot read {kind}. Known: {', '.join(READERS)}.")
    if not path.stat().st_size:
        raise DataError(f"{path.name} is empty.")
    reader = READERS[path.suffix]
    if reader is None:
        return datasets.Dataset.from_parquet(str(path), cache_dir=cache, keep_in_memory=True)
    columns = reader(_text(path), path)
    if not any(columns.values()):
        raise DataError(f"{path} cannot be read: it has no rows.")
    return datasets.Dataset.from_dict(columns)


def _text(path: Path) -> str:
    """Decode a file from UTF-8, with or without a byte-order mark."""
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        encoding = "utf-16" if content.startswith((b"\xff\xfe", b"\xfe\xff")) else "latin1"
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path} cannot be read: it is not UTF-8. Line {line} has the byte 0x{content[error.start]:02x} at "
            f"position {error.start} of the file. Convert it, for example with: "
            f"iconv -f {encoding} -t utf-8 {path.name} > utf8-{path.name}"
        ) from error


def _lines(text: str, path: Path) -> Columns:
    lines = io.StringIO(text, newline=None).read().split("\n")
    return {"text": lines[:-1] if not lines[-1] else lines}


def _separated(mark: str) -> Callable[[str, Path], Columns]:
    def read(text: str, path: Path) -> Columns:
        limit = csv.field_size_limit(sys.maxsize)
        try:
            reader = csv.reader(io.StringIO(text, newline=""), delimiter=mark, strict=True)
            header = next((row for row in reader if row), [])
            twice = sorted({name for name in header if header.count(name) > 1})
            if twice:
                raise DataError(f"{path} cannot be read: two columns are called '{twice[0]}'.")
            rows = []
            for row in reader:
                if row and len(row) != len(header):
                    raise DataError(
                        f"{path} cannot be read: the row that ends in line {reader.line_num} has {len(row)} cells, but "
                        f"the header has {len(header)}. A cell with the separator or a line break needs quotes."
                    )
                if row:
                    rows.append(row)
        except csv.Error as error:
            raise DataError(f"{path} cannot be read: line {reader.line_num}: {error}") from error
        finally:
            csv.field_size_limit(limit)
        return {name: [row[place] for row in rows] for place, name in enumerate(header)}

    return read


def _json(text: str, path: Path) -> Columns:
    try:
        content = json.loads(text)
    except ValueError as error:
        if not str(error).startswith("Extra data"):
            raise _not_json(path, error) from error
        return _json_lines(text, path)
    except RecursionError as error:
        raise _not_json(path, error) from error
    return _json_columns(content if isinstance(content, list) else [content], path)


def _json_lines(text: str, path: Path) -> Columns:
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise _not_json(path, error, f"line {number}: ") from error
    return _json_columns(rows, path)


def _not_json(path: Path, error: Exception, where: str = "") -> DataError:
    reason = "values are nested too deeply" if isinstance(error, RecursionError) else str(error)
    return DataError(f"{path} cannot be read: {where}{reason}")


def _json_columns(rows: Iterable[Any], path: Path) -> Columns:
    rows = list(rows)
    wrong = next((number for number, row in enumerate(rows) if not isinstance(row, dict)), None)
    if wrong is not None:
        raise DataError(
            f"{path} cannot be read: row {wrong} is a {type(rows[wrong]).__name__}, not an object of named columns."
        )
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: _of_one_type([row.get(name) for row in rows], name, path) for name in names}


def _of_one_type(values: list[Any], name: str, path: Path) -> list[Any]:
    """Return a column that Arrow can hold: the values, or as text if their types differ."""
    import datasets

    try:
        datasets.Dataset.from_dict({name: values})
    except UnicodeEncodeError as error:  # an escape of half a character, "\ud800"
        raise DataError(f"{path} cannot be read: column '{name}' holds text that is not Unicode: {error}") from error
    except Exception:  # Arrow raises many types
        return [value if isinstance(value, str | None) else json.dumps(value) for value in values]
    return values


READERS: dict[str, Callable[[str, Path], Columns] | None] = {
    ".json": _json,
    ".jsonl": _json_lines,
    ".csv": _separated(","),
    ".tsv": _separated("\t"),
    ".parquet": None,  # typed already
    ".txt": _lines,
}
"""The reader of each kind of file, by its suffix."""

"""Write results to files: numbers as JSON, pictures, and what else a command has."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from surgeon.errors import SaveError, UsageError
from surgeon.json_values import to_json
from surgeon.render.style import PICTURES

KINDS = {".json": "numbers", **PICTURES}


def check_files(files: Sequence[Path] | None, kinds: Mapping[str, str] = KINDS) -> None:
    """Refuse files that cannot be written, before anything is measured.

    kinds: what is written to files by the ends of their names, in words.

    Raises:
        UsageError: the name has another end.
        SaveError: there is no such directory, no permission to write to it, or the file is a directory.
    """
    for file in files or ():
        if file.suffix not in kinds:
            *first, last = [f"{end} ({what})" for end, what in kinds.items()]
            listed = f"{', '.join(first)} or {last}" if first else last
            raise UsageError(f"Cannot write {file}: give a name that ends in {listed}.")
        if not os.access(file.parent, os.W_OK | os.X_OK):
            raise SaveError(f"Cannot write {file}: {file.parent} does not exist or cannot be written to.")
        if file.is_dir():
            raise SaveError(f"Cannot write {file}: it is a directory.")


def write_result(result: object, file: Path, draw: Callable[[Path], None]) -> None:
    """Write a result to a `.json` file, or have it drawn to a file of another kind.

    The file appears whole or not at all.

    Raises:
        SaveError: the file cannot be written.
    """
    fresh = file.with_name(f".{file.stem}.{os.getpid()}{file.suffix}")
    try:
        try:
            if file.suffix == ".json":
                fresh.write_text(json.dumps(to_json(result), indent=1), encoding="utf-8")
            else:
                draw(fresh)
            fresh.replace(file)
        finally:
            fresh.unlink(missing_ok=True)
    except OSError as error:
        raise SaveError(f"Cannot write {file}: {error.strerror or error}.") from error

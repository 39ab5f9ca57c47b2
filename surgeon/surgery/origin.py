"""The file or directory that a model came from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Origin:
    """Where a model came from, for the record and for the files that are saved beside it.

    path, kind, sha256: of the input file or directory; None for a model made in Python. notes: remarks from loading it.
    """

    path: str | None = None
    kind: str = "module"
    sha256: str | None = None
    config: Any = None
    tokenizer: Any = None
    processor: Any = None
    notes: tuple[str, ...] = ()

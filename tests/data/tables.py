"""Words that the tokenizer knows, and small tables of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c", "d", "e"]
PAD, CLS, SEP, MASK = 0, 2, 3, 4


def write_lines(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rows(count: int) -> list[dict[str, Any]]:
    return [{"text": " ".join("abcde"[: 1 + index % 5]), "label": index % 3} for index in range(count)]


def texts(batches: Any) -> list[list[list[int]]]:
    return [batch.kwargs["input_ids"].tolist() for batch in batches]

"""Results as plain JSON values."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

# What a field's metadata is if the field is only for Python.
NOT_IN_JSON = {"json": False}

_VERSIONS = {"compile": 2, "explain": 2, "export": 2, "inspect": 2, "tune": 2}
"""Of the answers in JSON that are not the first. Fields may be added without a new version."""


def schema_name(command: str) -> str:
    """The name of the schema of a command's answer: `surgeon.bench-layer.v1`."""
    return f"surgeon.{command.replace(' ', '-')}.v{_VERSIONS.get(command, 1)}"


SCHEMAS = Path(__file__).parent / "schemas"


def schemas() -> dict[str, Path]:
    """The file of each schema, by the name of its command, and that of errors."""
    return {file.stem.replace("-", " "): file for file in sorted(SCHEMAS.glob("*.json"))}


class Plain:
    """A result that programs can read: what `surgeon ... --output json` prints of it."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values: dicts, lists, texts, numbers. Numbers that are not finite are None."""
        made: dict[str, Any] = to_json(self)
        return made


def to_json(value: Any) -> Any:
    """Convert to plain JSON values.

    Dataclasses become objects without the fields whose metadata is `NOT_IN_JSON`, paths become strings, and numbers
    that are not finite become null.

    Raises:
        TypeError: there is no such form of it.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [item.name for item in dataclasses.fields(value) if item.metadata.get("json", True)]
        return {name: to_json(getattr(value, name)) for name in fields}
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [to_json(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value.value if isinstance(value, Enum) else value
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")

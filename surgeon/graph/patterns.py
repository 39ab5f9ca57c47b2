"""Patterns that choose modules by path. Where each pattern has a value, the first pattern that matches counts."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from typing import TypeVar

Value = TypeVar("Value")


def matches(patterns: Iterable[str], *paths: str) -> bool:
    """Whether one of the patterns matches one of the paths of a module.

    A pattern is a path with the wildcards `*`, `?` and `[abc]`, as in file names; `*` matches dots too. A path always
    matches itself, whatever characters it contains.
    """
    return any(path == pattern or fnmatch.fnmatchcase(path, pattern) for pattern in patterns for path in paths)


def first_fit(values: Mapping[str, Value], *paths: str) -> Value | None:
    """Return the value of the first pattern that matches one of the paths (see `matches`), or None."""
    return next((value for pattern, value in values.items() if matches([pattern], *paths)), None)

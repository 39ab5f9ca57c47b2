"""Patterns that choose modules by path. Wherever several are given with a value each, the first that fits counts."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from typing import TypeVar

Value = TypeVar("Value")


def matches(patterns: Iterable[str], *paths: str) -> bool:
    """Whether one of the patterns fits one of the paths that a thing goes by.

    A pattern is a path, with `*`, `?` and `[abc]` as in file names; `*` stands for dots too. A path fits itself,
    whatever characters it has.
    """
    return any(path == pattern or fnmatch.fnmatchcase(path, pattern) for pattern in patterns for path in paths)


def first_fit(values: Mapping[str, Value], *paths: str) -> Value | None:
    """The value of the first pattern that fits one of the paths (see `matches`), None if none does."""
    return next((value for pattern, value in values.items() if matches([pattern], *paths)), None)

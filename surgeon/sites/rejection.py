"""Candidates that were refused."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rejection:
    """A candidate that was refused: where, and the first condition that failed."""

    path: str
    reason: str
    node: str = ""

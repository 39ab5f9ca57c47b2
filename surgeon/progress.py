"""How far a long piece of work is."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Progress:
    """A moment of a long piece of work: what is done, how far it is, and the latest values worth showing."""

    what: str
    done: int
    total: int
    values: dict[str, float] = field(default_factory=dict)

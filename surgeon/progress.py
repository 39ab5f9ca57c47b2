"""Progress of a long piece of work."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Progress:
    """One report on long work: its name, the steps done and in total, and the latest values to show."""

    what: str
    done: int
    total: int
    values: dict[str, float] = field(default_factory=dict)

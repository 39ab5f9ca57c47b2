"""What sites have in common: a place, and a few words that say what is there."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import TypeAlias

Fact: TypeAlias = int | float | str | bool | None
Facts: TypeAlias = Mapping[str, Fact]
"""What is there, for programs: `{"kind": "ffn", "d_in": 384, "hidden": 1536, "d_out": 384, "activation": "gelu"}`."""


def was_and_is(before: Facts, after: Facts) -> dict[str, tuple[Fact, Fact]]:
    """Return each fact as it was and as it is; None where there is no such fact."""
    return {name: (before.get(name), after.get(name)) for name in (*before, *(after.keys() - before.keys()))}


class Described:
    """A part of a model that is shown by its place and a few words. Its fields are nodes and tensors, too long to show.

    path: where it is, such as `encoder.layer.0`.
    """

    path: str

    @property
    @abstractmethod
    def describe(self) -> str:
        """What is there, such as `FFN 384→1536→384 gelu`."""

    @property
    @abstractmethod
    def facts(self) -> Facts:
        """What is there, for programs. The first fact is its kind."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.path}: {self.describe}>"

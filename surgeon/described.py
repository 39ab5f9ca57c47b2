"""What sites have in common: a place, and a few words that say what is there."""

from __future__ import annotations

from abc import abstractmethod


class Described:
    """A part of a model that is shown by its place and a few words. Its fields are nodes and tensors, too long to show.

    path: where it is, such as `encoder.layer.0`.
    """

    path: str

    @property
    @abstractmethod
    def describe(self) -> str:
        """What is there, such as `FFN 384→1536→384 gelu`."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.path}: {self.describe}>"

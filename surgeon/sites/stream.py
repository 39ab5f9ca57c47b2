"""A residual stream as a site: the values that layers add to, and that every layer reads through a norm."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.fx import Node

from surgeon.described import Described, Facts
from surgeon.sites.linear import Linear
from surgeon.sites.norms import Norm


@dataclass(frozen=True, eq=False)
class Reader:
    """A linear layer that reads the stream through a norm, or as it is (None)."""

    norm: Norm | None
    linear: Linear


@dataclass(frozen=True, eq=False)
class Writer:
    """A linear layer that writes into the stream. scaled: what multiplies its channels by gain [d], float64."""

    linear: Linear
    gain: Tensor | None = None
    scaled: Node | None = None


@dataclass(frozen=True, eq=False)
class Table:
    """A parameter whose dimension `axis` is that of the stream's channels: an embedding, a position, a convolution.

    user: the node that reads it. node: the `get_attr` node.
    """

    user: Node
    node: Node
    axis: int


@dataclass(frozen=True, eq=False, repr=False)
class Stream(Described):
    """A residual stream of values [..., width]. centred: its norms are LayerNorms, else RMSNorms."""

    path: str
    width: int
    centred: bool
    norms: tuple[Norm, ...]
    readers: tuple[Reader, ...]
    writers: tuple[Writer, ...]
    tables: tuple[Table, ...]

    @property
    def output(self) -> Node:
        """What the last of its readers computes."""
        return max(reader.linear.output for reader in self.readers)

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Every linear layer that reads or writes it."""
        both = [*(reader.linear for reader in self.readers), *(writer.linear for writer in self.writers)]
        return tuple(dict.fromkeys(both))

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds of its linear layers for one token."""
        return sum(linear.in_features * linear.out_features for linear in self.linears)

    @property
    def describe(self) -> str:
        """`stream of width 384, 12 LayerNorms`."""
        kind = "LayerNorm" if self.centred else "RMSNorm"
        return f"stream of width {self.width}, {len(self.norms)} {kind}{'s' * (len(self.norms) > 1)}"

    @property
    def facts(self) -> Facts:
        """What is there, for programs."""
        kind = "LayerNorm" if self.centred else "RMSNorm"
        return {"kind": "stream", "width": self.width, "norms": len(self.norms), "norm": kind}

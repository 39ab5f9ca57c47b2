"""A standalone linear layer as a site."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from surgeon.described import Described, Facts
from surgeon.sites.linear import Linear


@dataclass(frozen=True, eq=False, repr=False)
class LinearSite(Described):
    """A standalone linear layer and every place that executes it."""

    path: str
    calls: tuple[Linear, ...]

    @property
    def output(self) -> Node:
        """Its value in the last of its executions."""
        return self.calls[-1].output

    @property
    def d_in(self) -> int:
        """Input width."""
        return self.calls[0].in_features

    @property
    def d_out(self) -> int:
        """Output width."""
        return self.calls[0].out_features

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds for one token."""
        return self.d_in * self.d_out

    @property
    def describe(self) -> str:
        """`linear 384→384`."""
        return f"linear {self.d_in}→{self.d_out}"

    @property
    def facts(self) -> Facts:
        """What is there, for programs."""
        return {"kind": "linear", "d_in": self.d_in, "d_out": self.d_out}

"""What stands between the linear layers of a feed-forward layer, as data: activation, gate, scales and constants."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor
from torch.fx import Node

Halves = Literal["first", "second", "even", "odd"]
Place = Literal["after", "z", "first"]
How = Literal["times", "over", "unless"]
# Where the gate can lie among the outputs of one linear that computes gate and up together.
HALVES: dict[Halves, Callable[[int], slice]] = {
    "first": lambda h: slice(0, h),
    "second": lambda h: slice(h, 2 * h),
    "even": lambda h: slice(0, 2 * h, 2),
    "odd": lambda h: slice(1, 2 * h, 2),
}
OTHER: dict[Halves, Halves] = {"first": "second", "second": "first", "even": "odd", "odd": "even"}


def half(rows: Tensor, which: Halves) -> Tensor:
    """Return the rows of one half of a fused linear layer, [2h, ...] → [h, ...]."""
    return rows[HALVES[which](rows.shape[0] // 2)]


def other_half(rows: Tensor, which: Halves) -> Tensor:
    """Return the rows of the other half, [2h, ...] → [h, ...]."""
    return half(rows, OTHER[which])


@dataclass(frozen=True)
class Factor:
    """A constant that every neuron is multiplied by ("times"), divided by ("over"), or set to zero by ("unless").

    at: "after" the activation; before it, at "z"; or at all outputs of the "first" linear, if that is fused. formula:
    how the constant `node` is computed.
    """

    at: Place
    how: How
    formula: str
    node: Node = field(compare=False)

    def scale(self, values: Tensor, constant: Tensor) -> Tensor:
        """Apply it to values [..., n], given the value of the constant. The dtype stays."""
        return by(values, constant, self.how)


@dataclass(frozen=True)
class Slopes:
    """The slopes of a PReLU for negative values: the constant `node`, computed by `formula`."""

    formula: str
    node: Node = field(compare=False)


@dataclass(frozen=True)
class Nonlinearity:
    """hidden = output_scale · act(input_scale · z), multiplied by `up` if gated, and by constants at their places.

    gate_leaf: the index of the leaf that holds z. fused: the half of that leaf that is z, if it holds both z and up.
    slopes: those of a PReLU, which is relu(z) - slope · relu(-z). Its activation is "relu".
    """

    activation: str
    gated: bool = False
    gate_leaf: int = 0
    fused: Halves | None = None
    input_scale: float = 1.0
    output_scale: float = 1.0
    factors: tuple[Factor, ...] = ()
    slopes: Slopes | None = None

    @property
    def constants(self) -> tuple[Node, ...]:
        """The constants that it is computed with."""
        slopes = () if self.slopes is None else (self.slopes.node,)
        return (*(factor.node for factor in self.factors), *slopes)


def by(values: Tensor, constant: Tensor, how: How) -> Tensor:
    """Multiply or divide values [..., n] by a constant, or set them to zero where it is true."""
    number = constant.reshape(-1).to(values)
    if how == "unless":
        return values * (1 - number)
    return values / number if how == "over" else values * number

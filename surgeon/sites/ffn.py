"""The places a pass can operate on: feed-forward layers, standalone linear layers, and candidates that were refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor, nn
from torch.fx import GraphModule, Node

from surgeon.kernels.activations import ACTIVATIONS
from surgeon.sites.linear import Linear
from surgeon.sites.nonlinearity import HALVES, Halves, Nonlinearity, half, other_half

_MaybeTensor = TypeVar("_MaybeTensor", bound=Tensor | None)

# Where a graph's metadata has the layers that a pass put in place of linear ones.
_PROJECTIONS = "projections"


class IdentityModule(nn.Module):
    """A module that a pass puts in, returns its input, and is looked through where layers are searched for."""

    def forward(self, x: Tensor) -> Tensor:
        """X as it is."""
        return x


def mark_projection(graph: GraphModule, path: str) -> None:
    """Remember that the feed-forward layer at `path` stands in for a linear layer, in this graph and its forks."""
    # A new tuple: forks share what is in their metadata.
    graph.meta[_PROJECTIONS] = (*projections(graph), path)


def projections(graph: GraphModule) -> tuple[str, ...]:
    """The paths that were marked, those included whose layer has become something else since."""
    return tuple(graph.meta.get(_PROJECTIONS, ()))


@dataclass(frozen=True, eq=False)
class LayerCall:
    """One execution of a feed-forward layer: x → first linears → cone → second linear.

    first: (gate, up) if gated with two linears, else the single first linear.
    """

    first: tuple[Linear, ...]
    cone: tuple[Node, ...]
    down: Linear

    @property
    def x(self) -> Node:
        """The input, [..., d_in]."""
        return self.first[0].input

    @property
    def output(self) -> Node:
        """The output, [..., d_out]."""
        return self.down.output


@dataclass(frozen=True)
class FFNWeights:
    """A feed-forward layer's weights with one row per neuron, h the hidden width.

    w1 [h, d_in], b1 [h] | None: the linear whose output is not activated if gated, the first linear otherwise.
    gate [h, d_in] | None, b_gate [h] | None: the activated linear of a gated layer.
    w2 [h, d_out], b2 [d_out] | None. Scales found between the linears are folded in.
    """

    w1: Tensor
    b1: Tensor | None
    gate: Tensor | None
    b_gate: Tensor | None
    w2: Tensor
    b2: Tensor | None


@dataclass(frozen=True, eq=False)
class FFN:
    """A feed-forward layer: down(act(first x)), or down(act(gate x) · (up x)) if gated.

    calls: every execution; several if the model uses the same weights at several places (ALBERT).
    fused: which half of the single first linear is the gate, if it computes gate and up together.
    dropout: the largest dropout probability between the linears.
    is_projection: whether a pass put it in place of a linear layer, such as an attention projection.
    """

    path: str
    calls: tuple[LayerCall, ...]
    nonlinearity: Nonlinearity
    hidden: int
    dropout: float = 0.0
    is_projection: bool = False

    @property
    def activation(self) -> str:
        """Name in `surgeon.kernels.activations.ACTIVATIONS`."""
        return self.nonlinearity.activation

    @property
    def gated(self) -> bool:
        """Whether the activated values are multiplied by a second linear of the input."""
        return self.nonlinearity.gated

    @property
    def fused(self) -> Halves | None:
        """Which outputs of the single first linear are the gate; None if gate and up are two layers."""
        return self.nonlinearity.fused

    @property
    def d_in(self) -> int:
        """Input width."""
        return self.calls[0].first[0].in_features

    @property
    def d_out(self) -> int:
        """Output width."""
        return self.calls[0].down.out_features

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds for one token."""
        return self.hidden * (self.d_in * (2 if self.gated else 1) + self.d_out)

    @property
    def describe(self) -> str:
        """`FFN 384→1536→384 gelu`."""
        kind = "gated FFN" if self.gated else "FFN"
        return f"{kind} {self.d_in}→{self.hidden}→{self.d_out} {self.activation}"

    def parameters(self, graph: GraphModule) -> int:
        """Numbers in the weights and biases."""
        found = self.weights(graph)
        return sum(value.numel() for value in vars(found).values() if value is not None)

    def activations(self, z: Tensor) -> Tensor:
        """The activated values, [..., h], of what the first linear gives (the gate's in a gated layer)."""
        found = self.nonlinearity
        if found.fused is not None:
            z = z[..., HALVES[found.fused](self.hidden)]
        return ACTIVATIONS[found.activation].fn(z * found.input_scale)

    def weights(self, graph: GraphModule) -> FFNWeights:
        """The weights, one row per neuron (views of the parameters where nothing is folded in)."""
        first, down, found = self.calls[0].first, self.calls[0].down, self.nonlinearity
        w2 = down.weight_rows(graph).t()
        if found.output_scale != 1.0:
            w2 = w2 * found.output_scale
        rows, bias = first[0].weight_rows(graph), first[0].bias_vector(graph)
        gate, b_gate = _scaled(rows, found.input_scale), _scaled(bias, found.input_scale)
        b2 = down.bias_vector(graph)
        if not found.gated:
            return FFNWeights(gate, b_gate, None, None, w2, b2)
        up: Tensor
        up_bias: Tensor | None
        if found.fused is not None:
            up, up_bias = other_half(rows, found.fused), None if bias is None else other_half(bias, found.fused)
            gate, b_gate = half(gate, found.fused), None if b_gate is None else half(b_gate, found.fused)
        else:
            up, up_bias = first[1].weight_rows(graph), first[1].bias_vector(graph)
        return FFNWeights(up, up_bias, gate, b_gate, w2, b2)


def _scaled(value: _MaybeTensor, scale: float) -> _MaybeTensor:
    return value if value is None or scale == 1.0 else value * scale  # type: ignore[return-value]

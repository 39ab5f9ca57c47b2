"""A feed-forward layer as a site: where it is executed, its weights and its activation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from surgeon.described import Described, Facts
from surgeon.graph.traced import tensor_of
from surgeon.graph.walk import walk_sources
from surgeon.kernels.activations import ACTIVATIONS
from surgeon.sites.constants import evaluate
from surgeon.sites.linear import Linear
from surgeon.sites.nonlinearity import HALVES, Halves, Nonlinearity, half, other_half

_MaybeTensor = TypeVar("_MaybeTensor", bound=Tensor | None)

# Key in a graph's metadata for the layers that a pass put in place of linear layers.
_PROJECTIONS = "projections"


class IdentityModule(nn.Module):
    """A module that a pass inserts and that returns its input. The search for layers looks through it."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x unchanged."""
        return x


def mark_projection(graph: GraphModule, path: str) -> None:
    """Record that the feed-forward layer at `path` replaces a linear layer, in this graph and its later forks."""
    # Make a new tuple, because forks share the values of their metadata.
    graph.meta[_PROJECTIONS] = (*projections(graph), path)


def projections(graph: GraphModule) -> tuple[str, ...]:
    """Return all marked paths, including those whose layer was replaced again later."""
    return tuple(graph.meta.get(_PROJECTIONS, ()))


@dataclass(frozen=True, eq=False)
class LayerCall:
    """One execution of a feed-forward layer: x → first linears → cone → second linear.

    first: (gate, up) if the layer is gated by two linears, else the single first linear.
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
    """A feed-forward layer's weights with one row per neuron. h is the hidden width.

    w1 [h, d_in], b1 [h] | None: the up linear of a gated layer, whose output is not activated; else the first linear.
    gate [h, d_in] | None, b_gate [h] | None: the activated linear of a gated layer.
    w2 [h, d_out], b2 [d_out] | None. Scales found between the linears are folded in.
    """

    w1: Tensor
    b1: Tensor | None
    gate: Tensor | None
    b_gate: Tensor | None
    w2: Tensor
    b2: Tensor | None


@dataclass(frozen=True, eq=False, repr=False)
class FFN(Described):
    """A feed-forward layer: down(act(first x)), or down(act(gate x) · (up x)) if gated.

    calls: every execution; several if the model uses the same weights in several places (ALBERT).
    hidden: the hidden width. dropout: the largest dropout probability between the linears.
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
        """Which outputs of the single first linear are the gate; None if gate and up are separate layers."""
        return self.nonlinearity.fused

    @property
    def neurons(self) -> int:
        """The number of neurons that its weights have: twice the hidden width for a PReLU."""
        return self.hidden * (1 if self.nonlinearity.slopes is None else 2)

    @property
    def output(self) -> Node:
        """Its value in the last of its executions."""
        return self.calls[-1].output

    @property
    def linears(self) -> tuple[Linear, ...]:
        """The linear layers whose weights it has."""
        return (*self.calls[0].first, self.calls[0].down)

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
        activation = self.activation if self.nonlinearity.slopes is None else "prelu"
        return f"{kind} {self.d_in}→{self.hidden}→{self.d_out} {activation}"

    @property
    def facts(self) -> Facts:
        """What is there, for programs."""
        activation = self.activation if self.nonlinearity.slopes is None else "prelu"
        widths = {"d_in": self.d_in, "hidden": self.hidden, "d_out": self.d_out}
        return {"kind": "ffn", **widths, "activation": activation, "gated": self.gated}

    def parameters(self, graph: GraphModule) -> int:
        """Count the numbers in the weights, the biases and the parameters in between."""
        found = [node for linear in self.linears for node in (linear.weight, linear.bias) if node is not None]
        for constant in self.nonlinearity.constants:
            found += [node for node in walk_sources(constant) if isinstance(tensor_of(graph, node), nn.Parameter)]
        tensors = {node.target: tensor_of(graph, node) for node in found}
        return sum(tensor.numel() for tensor in tensors.values() if tensor is not None)

    def activations(self, graph: GraphModule, z: Tensor) -> Tensor:
        """Apply the activation to z [..., h], the output of the first linear or of the gate: [..., h], in z's dtype.

        z has 2 h columns where gate and up are one linear.
        """
        found = self.nonlinearity
        z = self._scaled(graph, "first", z)
        if found.fused is not None:
            z = z[..., HALVES[found.fused](self.hidden)]
        z = self._scaled(graph, "z", z) * found.input_scale
        a = ACTIVATIONS[found.activation].fn(z)
        return a if found.slopes is None else a - evaluate(graph, found.slopes.node).reshape(-1) * F.relu(-z)

    def _scaled(self, graph: GraphModule, at: str, values: _MaybeTensor) -> _MaybeTensor:
        """Multiply values [..., n] by the constants at a place."""
        for factor in self.nonlinearity.factors:
            if factor.at == at and values is not None:
                values = factor.scale(values, evaluate(graph, factor.node))  # type: ignore[assignment]
        return values

    def weights(self, graph: GraphModule) -> FFNWeights:
        """Return the weights with one row per neuron. They are views of the parameters where no scale is folded in.

        Every neuron of a PReLU becomes two neurons of a ReLU, for positive and for negative values of z.
        """
        first, down, found = self.calls[0].first, self.calls[0].down, self.nonlinearity
        w2 = self._scaled(graph, "after", down.weight_rows(graph)).t()
        if found.output_scale != 1.0:
            w2 = w2 * found.output_scale
        b2 = down.bias_vector(graph)
        rows, bias = self._row_scaled(graph, "first", first[0].weight_rows(graph), first[0].bias_vector(graph))
        gate, b_gate, up, up_bias = rows, bias, None, None
        if found.fused is not None:
            gate, b_gate = half(rows, found.fused), None if bias is None else half(bias, found.fused)
            up, up_bias = other_half(rows, found.fused), None if bias is None else other_half(bias, found.fused)
        elif found.gated:
            up, up_bias = first[1].weight_rows(graph), first[1].bias_vector(graph)
        gate, b_gate = self._row_scaled(graph, "z", gate, b_gate)
        if found.input_scale != 1.0:
            gate, b_gate = gate * found.input_scale, None if b_gate is None else b_gate * found.input_scale
        if found.slopes is not None:
            slopes = evaluate(graph, found.slopes.node).reshape(-1, 1).to(w2)
            w2, gate = torch.cat([w2, -slopes * w2]), torch.cat([gate, -gate])
            b_gate = None if b_gate is None else torch.cat([b_gate, -b_gate])
            up = None if up is None else torch.cat([up, up])
            up_bias = None if up_bias is None else torch.cat([up_bias, up_bias])
        if up is None:
            return FFNWeights(gate, b_gate, None, None, w2, b2)
        return FFNWeights(up, up_bias, gate, b_gate, w2, b2)

    def _row_scaled(
        self, graph: GraphModule, at: str, rows: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        return self._scaled(graph, at, rows.t()).t(), self._scaled(graph, at, bias)

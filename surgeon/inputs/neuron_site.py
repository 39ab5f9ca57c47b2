"""A gated layer that skips neurons, in a graph or in a model: its place, its form and its cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

import surgeon.kernels.sparse_neurons  # noqa: F401  (it registers the ops)
from surgeon.described import Facts
from surgeon.inputs.calibration import neuron_levels
from surgeon.inputs.neurons import SparseNeurons, SparseNeuronsShape
from surgeon.inputs.site import Skipping
from surgeon.kernels.sparse_linear import kept
from surgeon.kernels.sparse_neurons import NeuronsCall, gates

masked_neurons = torch.ops.surgeon.masked_neurons.default
sparse_neurons = torch.ops.surgeon.sparse_neurons.default

_PARAMETERS = ("gate", "b_gate", "w1", "b1", "w2", "b2")
_BUFFERS = ("scale", "centre", "levels", "tau")


@dataclass(frozen=True, eq=False, repr=False)
class SparseNeuronsSite(Skipping):
    """A gated layer that skips the neurons whose gate is near zero.

    path: the module path of its tensors, `encoder.layer.0.mlp.neurons`. layer: its module, in a graph one that holds
    the graph's tensors. Other fields as in `surgeon.inputs.site.SparseLinearSite`.
    """

    layer: SparseNeurons

    unit = "neurons"

    @property
    def d_in(self) -> int:
        """Width of the input."""
        return self.layer.shape.d_in

    @property
    def d_out(self) -> int:
        """Width of the output."""
        return self.layer.shape.d_out

    @property
    def widths(self) -> tuple[int, ...]:
        """Input, neurons and output."""
        return self.d_in, self.neurons, self.d_out

    @property
    def neurons(self) -> int:
        """Number of neurons."""
        return self.layer.shape.neurons

    @property
    def gate_multiply_adds(self) -> int:
        """Multiply-adds of the gate for one token, which the dense layer has too."""
        return self.layer.gate.numel()

    @property
    def router_parameters(self) -> int:
        """Multiply-adds for one token that are never skipped: the gate takes a router's place."""
        return self.gate_multiply_adds

    @property
    def expert_multiply_adds(self) -> int:
        """Multiply-adds of one neuron for one token, without its gate."""
        return self.d_in + self.d_out

    @property
    def costs(self) -> list[int]:
        """Multiply-adds of each neuron for one token, without its gate."""
        return [self.expert_multiply_adds] * self.neurons

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds for one token when every neuron is computed."""
        return sum(self.costs) + self.router_parameters

    @property
    def parameters(self) -> int:
        """The number of its parameters."""
        return sum(parameter.numel() for parameter in self.layer.parameters())

    @property
    def describe(self) -> str:
        """`768→3072 neurons→768 silu`."""
        return self.layer.shape.describe

    @property
    def facts(self) -> Facts:
        """What is there, for programs."""
        widths = {"d_in": self.d_in, "hidden": self.neurons, "d_out": self.d_out}
        return {"kind": "skips-neurons", **widths, "activation": self.layer.shape.activation, "gated": True}

    def _gates(self, x: Tensor) -> Tensor:
        return gates(x, self.layer.gate, self.layer.b_gate, self.layer.shape.activation)

    def kept(self, x: Tensor) -> Tensor:
        """Return which neurons tokens x [..., d_in] keep, bool [..., h]."""
        return kept(self._gates(x), self.scale, None, self.levels, self.tau)

    def levels_on(self, x: Tensor) -> Tensor:
        """Return the quantiles of the scores of tokens x [N, d_in], float32 [257]."""
        return neuron_levels(self._gates(x), self.scale, centred=self.centre is not None)


_FORMS: dict[Any, Literal["masked", "dynamic"]] = {masked_neurons: "masked", sparse_neurons: "dynamic"}


def find_sparse_neurons(model: nn.Module) -> list[SparseNeuronsSite]:
    """Return every layer that skips neurons, in topological order of a graph or in the order of the modules."""
    if not isinstance(model, GraphModule):
        return [
            _site(path, "module", (), module)
            for path, module in model.named_modules()
            if isinstance(module, SparseNeurons)
        ]
    found: dict[str, list[Node]] = {}
    for node in model.graph.nodes:
        if node.op == "call_function" and node.target in _FORMS:
            levels = NeuronsCall(*node.args).levels
            assert isinstance(levels, Node)
            found.setdefault(str(levels.target).rpartition(".")[0], []).append(node)
    return [_site(path, _FORMS[nodes[0].target], nodes, _layer(model, path, nodes)) for path, nodes in found.items()]


def _site(
    path: str, form: Literal["masked", "dynamic", "module"], nodes: Any, layer: SparseNeurons
) -> SparseNeuronsSite:
    return SparseNeuronsSite(path, form, tuple(nodes), layer.tau, layer.levels, layer.scale, layer.centre, layer)


def _layer(graph: GraphModule, path: str, nodes: list[Node]) -> SparseNeurons:
    """The module of a layer of a graph. It has the graph's tensors."""
    holder, call = graph.get_submodule(path), NeuronsCall(*nodes[0].args)  # type: ignore[arg-type]
    tensors: dict[str, Any] = {name: getattr(holder, name, None) for name in (*_PARAMETERS, *_BUFFERS)}
    (neurons, d_in), d_out = tensors["w1"].shape, tensors["w2"].shape[1]
    biases = tuple(name for name in ("b1", "b_gate", "b2") if tensors[name] is not None)
    shape = SparseNeuronsShape(
        d_in, d_out, neurons, call.activation, biases, tensors["scale"] is not None, tensors["centre"] is not None
    )
    made = SparseNeurons(shape, device="meta", dtype=None)
    for name, tensor in tensors.items():
        setattr(made, name, tensor)
    return made

"""Put converted layers that skip nothing back into their dense form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg

from surgeon.described import Facts, was_and_is
from surgeon.dynamic.site import DynamicSite, can_be_dense
from surgeon.exits.halting import HaltSite
from surgeon.exits.site import ExitSite
from surgeon.graph.edit import emit, get_attr
from surgeon.graph.holder import mark_holders, parameters_only
from surgeon.graph.traced import TracedGraph, aten, free_target, is_call
from surgeon.inputs.neuron_site import SparseNeuronsSite
from surgeon.inputs.rebuild import dense_weights
from surgeon.inputs.site import SparseLinearSite
from surgeon.kernels.activations import ACTIVATIONS
from surgeon.kernels.sparse_linear import LinearCall
from surgeon.moe.rebuild import joined_weights
from surgeon.moe.site import MoESite
from surgeon.passes.base import Pass
from surgeon.passes.contract import SiteKind
from surgeon.passes.report import SiteChange
from surgeon.sites.ffn import FFNWeights
from surgeon.sites.rejection import Rejection


@dataclass(frozen=True, kw_only=True)
class Densify(Pass[DynamicSite]):
    """Put each layer whose tau is 0 back into its dense form, without router and selection.

    The neurons of the experts become one feed-forward layer again, in the order of the experts. A linear layer that
    skips inputs, or a gated layer that skips neurons, gets the weights and the bias that it has at tau 0. It runs
    before quantize, and before or after lower. `surgeon tune --densify` finds the layers that are better dense.
    """

    name: ClassVar[str] = "densify"
    works_on: ClassVar[SiteKind] = "dynamic"
    preserves: ClassVar[bool] = True

    def match(self, graph: GraphModule, site: DynamicSite) -> Rejection | None:
        if isinstance(site, ExitSite | HaltSite):
            return Rejection("early-exit", f"{site.leaving} there, and it took the place of no layer")
        if float(site.tau):
            return Rejection("skips", f"it skips at its tau, which is {float(site.tau):g} and not 0")
        if not can_be_dense(site):
            return Rejection("unusable-weights", f"its experts are stored in {site.shown_form}: run densify first")
        return None

    @torch.no_grad()
    def rewrite(self, graph: TracedGraph, site: DynamicSite, seen: None) -> SiteChange:
        assert not isinstance(site, ExitSite | HaltSite)
        target = free_target(graph, site.path.rpartition(".")[0], "dense")
        graph.add_submodule(target, nn.Module())
        # It loses what is not needed any more, and the module itself belongs to other copies of the graph too.
        graph.set_submodule(site.path, parameters_only(graph.get_submodule(site.path)))
        before = {id(parameter) for parameter in graph.parameters()}
        make, words, cost, facts = self._form(graph, site, target)
        mark_holders(graph)
        output = ""
        for node in site.nodes:
            with graph.graph.inserting_before(node):
                value = make(node)
            node.replace_all_uses_with(value)
            graph.graph.erase_node(node)
            output = value.name
        made = sum(parameter.numel() for parameter in graph.parameters() if id(parameter) not in before)
        return SiteChange(
            site.path,
            site.describe,
            words,
            (_parameters(graph, site), made or site.multiply_adds),
            (site.multiply_adds, cost),
            (site.output.name, output),
            made=(target,) if made else (),
            facts=was_and_is(site.facts, facts),
        )

    def _form(
        self, graph: TracedGraph, site: MoESite | SparseLinearSite | SparseNeuronsSite, target: str
    ) -> tuple[Callable[[Node], Node], str, int, Facts]:
        """Add the dense layer's parameters.

        Returns:
            What makes its nodes, what it is in words, its multiply-adds, and what it is for programs.
        """
        if isinstance(site, SparseLinearSite):
            facts: Facts = {"kind": "linear", "d_in": site.d_in, "d_out": site.d_out}
            return _linear(graph, site, target), f"linear {site.d_in}→{site.d_out}", site.multiply_adds, facts
        if isinstance(site, MoESite):
            weights, activation, cost = joined_weights(graph, site), site.activation, sum(site.costs)
        else:
            weights, activation, cost = site.layer.dense(), site.layer.shape.activation, site.multiply_adds
        hidden, gated = len(weights.w1), weights.gate is not None
        words = f"{'gated ' * gated}FFN {site.d_in}→{hidden}→{site.d_out} {activation}"
        widths = {"d_in": site.d_in, "hidden": hidden, "d_out": site.d_out}
        facts = {"kind": "ffn", **widths, "activation": activation, "gated": gated}
        return _ffn(graph, weights, activation, target), words, cost, facts


def _parameters(graph: TracedGraph, site: MoESite | SparseLinearSite | SparseNeuronsSite) -> int:
    if isinstance(site, MoESite):
        return sum(parameter.numel() for parameter in graph.get_submodule(site.path).parameters())
    return site.parameters


def _ffn(graph: TracedGraph, weights: FFNWeights, activation: str, target: str) -> Callable[[Node], Node]:
    _put(graph, f"{target}.up", weights.w1, weights.b1)
    _put(graph, f"{target}.down", weights.w2.t(), weights.b2)
    if weights.gate is not None:
        _put(graph, f"{target}.gate", weights.gate, weights.b_gate)

    def make(node: Node) -> Node:
        x = node.args[0]
        assert isinstance(x, Node)

        def linear(name: str, value: Node) -> Node:
            path = f"{target}.{name}"
            tensors = [get_attr(graph, f"{path}.{part}") for part, _ in graph.get_submodule(path).named_parameters()]
            return emit(graph, aten.linear.default, value, *tensors, path=path)

        known, up = ACTIVATIONS[activation], linear("up", x)
        if weights.gate is None:
            return linear("down", _activated(graph, known.fn, up, target))
        gate = _activated(graph, known.fn, linear("gate", x), target)
        if known.up is not None:
            up = _activated(graph, known.up.fn, up, target)
        return linear("down", emit(graph, aten.mul.Tensor, gate, up, path=target))

    return make


def _activated(graph: TracedGraph, fn: Callable[[Tensor], Tensor], z: Node, path: str) -> Node:
    """Add the ATen ops of an activation, and return its value."""
    values: dict[Any, Any] = {}
    for node in make_fx(lambda z: fn(z))(torch.zeros(1)).graph.nodes:  # make_fx wants one argument
        if node.op == "output":
            break
        values[node] = z
        if node.op == "call_function":
            args: Any = map_arg(node.args, values.__getitem__)
            values[node] = emit(graph, node.target, *args, path=path, options=node.kwargs)
    result: Node = values[node.args[0]]
    return result


def _linear(graph: TracedGraph, site: SparseLinearSite, target: str) -> Callable[[Node], Node]:
    """The weight keeps its name, unless `lower` stored it the other way round."""
    call = LinearCall(*site.nodes[0].args)  # type: ignore[arg-type]
    weight, bias = dense_weights(graph, site)
    stored: object = call.weight
    assert isinstance(stored, Node)
    own_weight = site.form == "dynamic" and not is_call(stored, aten.t.default)
    _put(graph, target, weight if own_weight else None, None if call.bias is None or site.centre is None else bias)

    def make(node: Node) -> Node:
        given = LinearCall(*node.args)  # type: ignore[arg-type]
        names = dict(graph.get_submodule(target).named_parameters())
        tensors = [
            get_attr(graph, f"{target}.{name}") if name in names else old
            for name, old in (("weight", given.weight), ("bias", given.bias))
        ]
        return emit(graph, aten.linear.default, given.x, *tensors, path=target)

    return make


def _put(graph: TracedGraph, path: str, weight: Tensor | None, bias: Tensor | None) -> None:
    holder = nn.Module()
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None:
            holder.register_parameter(name, nn.Parameter(value.detach().clone(memory_format=torch.contiguous_format)))
    graph.add_submodule(path, holder)

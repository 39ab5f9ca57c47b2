"""A converted feed-forward layer in a graph: its place, its form and its cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor
from torch.fx import GraphModule, Node

from surgeon.graph.traced import aten, is_call, tensor_key, tensor_of
from surgeon.graph.walk import walk_sources
from surgeon.kernels.experts import Experts
from surgeon.moe.module import MoE
from surgeon.moe.ops import dynamic_k_ffn, masked_ffn


@dataclass(frozen=True, eq=False)
class MoESite:
    """A converted feed-forward layer in a graph.

    path: the module path of the expert weights, `encoder.layer.0.moe`. nodes: every execution of the layer.
    form: "module" (one `call_module` node), "masked" (reference op) or "dynamic" (the op that skips experts).
    shared: the number of experts that always run. rule: one of `kernels.selection.RULES`.
    router_parameters: the number of weights in the router's matrices. A trunk that several layers share is counted for
    the first of them.
    """

    path: str
    form: Literal["module", "masked", "dynamic"]
    nodes: tuple[Node, ...]
    weights: Experts
    activation: str
    shared: int
    router_parameters: int
    tau: Tensor
    rule: str

    @property
    def w1(self) -> Tensor:
        """The first linear's weights, [E, s, d_in]."""
        return self.weights.w1

    @property
    def routed(self) -> Experts:
        """The weights of the experts that the router scores."""
        return self.weights.after(self.shared)

    @property
    def experts(self) -> int:
        """Number of experts."""
        return int(self.w1.shape[0])

    @property
    def expert_multiply_adds(self) -> int:
        """Multiply-adds of one expert for one token."""
        size, d_in = self.w1.shape[1:]
        return int(size * (d_in * (2 if self.weights.gate is not None else 1) + self.weights.w2.shape[2]))

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds for one token when every expert runs. The router is included: one multiply-add per weight."""
        return self.experts * self.expert_multiply_adds + self.router_parameters

    @property
    def describe(self) -> str:
        """`48 experts × 32`, `1 expert × 8`, and the number of experts that always run."""
        always = f", {self.shared} of them always on" if self.shared else ""
        return f"{self.experts} expert{'s' * (self.experts != 1)} × {self.w1.shape[1]}{always}"


def find_moes(graph: GraphModule) -> list[MoESite]:
    """Return every mixture of experts in the graph, in topological order."""
    found: dict[str, list[Node]] = {}
    forms: dict[str, Literal["module", "masked", "dynamic"]] = {}
    for node in graph.graph.nodes:
        if node.op == "call_module" and isinstance(graph.get_submodule(str(node.target)), MoE):
            path, form = str(node.target), "module"
        elif node.op == "call_function" and node.target in (dynamic_k_ffn, masked_ffn):
            w1 = node.args[3]
            assert isinstance(w1, Node)
            path, form = str(w1.target).rpartition(".")[0], "dynamic" if node.target is dynamic_k_ffn else "masked"
        else:
            continue
        found.setdefault(path, []).append(node)
        forms[path] = form  # type: ignore[assignment]
    counted: set[tuple[object, ...]] = set()
    return [_site(graph, path, forms[path], nodes, counted) for path, nodes in found.items()]


def _site(
    graph: GraphModule,
    path: str,
    form: Literal["module", "masked", "dynamic"],
    nodes: list[Node],
    counted: set[tuple[object, ...]],
) -> MoESite:
    module: Any = graph.get_submodule(path)
    if form == "module":
        router = [parameter for parameter in module.router.parameters() if parameter.dim() == 2]
        activation, shared, rule = module.activation, module.shared, module.rule
    else:
        scores, threshold, activation = nodes[0].args[1], nodes[0].args[2], str(nodes[0].args[9])
        read = [tensor_of(graph, node) for node in router_nodes(nodes[0])]
        router, shared = [tensor for tensor in read if tensor is not None and tensor.dim() == 2], 0
        assert isinstance(scores, Node)
        assert isinstance(threshold, Node)
        if is_call(scores, aten.constant_pad_nd.default):
            shared = scores.args[1][0]  # type: ignore[index]
        rule = str(threshold.args[2])
    fresh = {tensor_key(weight): weight.numel() for weight in router if tensor_key(weight) not in counted}
    counted.update(fresh)
    weights = Experts(*(getattr(module, name, None) for name in Experts._fields))  # type: ignore[arg-type]
    return MoESite(path, form, tuple(nodes), weights, str(activation), shared, sum(fresh.values()), module.tau, rule)


def router_nodes(node: Node) -> list[Node]:
    """Return the nodes between the input and the scores of an expert layer in op form, including parameters."""
    x, scores = node.args[0], node.args[1]
    assert isinstance(scores, Node)

    def between(source: Node) -> bool:
        return source is not x and source.op in ("get_attr", "call_function")

    return [source for source in walk_sources(scores, between) if between(source)]

"""A converted feed-forward layer in a graph or in a model: its place, its form and its cost."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn
from torch.fx import GraphModule, Node

from surgeon.described import Described, Facts
from surgeon.errors import UsageError
from surgeon.graph.given import check_model
from surgeon.graph.traced import aten, is_call, tensor_key, tensor_of
from surgeon.graph.walk import walk_sources
from surgeon.kernels.experts import Experts
from surgeon.kernels.int8_arguments import Int8Call
from surgeon.kernels.panels import FLOAT8, Int8Experts
from surgeon.moe.filling import filling_of, neurons_of_experts
from surgeon.moe.int8 import Int8MoE
from surgeon.moe.module import MoE
from surgeon.moe.ops import dynamic_k_ffn, masked_ffn, routed_ffn_int8


@dataclass(frozen=True, eq=False, repr=False)
class MoESite(Described):
    """A converted feed-forward layer in a graph, or in a model that is not a graph.

    path: the module path of the expert weights, `encoder.layer.0.moe`. nodes: every execution of the layer in a graph.
    form: "module" (one `call_module` node), "masked" (reference op), "dynamic" (the op that skips experts) or "int8"
    (the op that routes and skips, with weights of 8 or 4 bits). stored: the weights, of an int8 layer as panels.
    shared: the number of experts that always run. rule: one of `surgeon.kernels.selection.RULES`.
    router_parameters: the number of weights in the router's matrices. A trunk that several layers share is counted for
    the first of them. filling: how many neurons fill experts up to the common size. They never fire and do not count.
    """

    path: str
    form: Literal["module", "masked", "dynamic", "int8"]
    nodes: tuple[Node, ...]
    stored: Experts | Int8Experts
    activation: str
    shared: int
    router_parameters: int
    tau: Tensor
    rule: str
    filling: int = 0
    x_scale: Tensor | None = None

    unit = "experts"
    # A gate belongs to its neurons, and is skipped with them.
    gate_multiply_adds = 0

    @property
    def weights(self) -> Experts:
        """The experts' weights; in an int8 layer the numbers that they stand for, made anew at every use."""
        if isinstance(self.stored, Int8Experts):
            return self.stored.floats(self.x_scale, self.d_in)
        return self.stored

    @property
    def d_in(self) -> int:
        """Width of the input."""
        if isinstance(self.stored, Int8Experts):
            assert self.x_scale is not None
            return len(self.x_scale)
        return int(self.stored.w1.shape[2])

    @property
    def d_out(self) -> int:
        """Width of the output."""
        return len(self.stored.y_scale) if isinstance(self.stored, Int8Experts) else int(self.stored.w2.shape[2])

    @property
    def shown_form(self) -> str:
        """The form, "int4" or "fp8" for an int8 layer with such weights."""
        if isinstance(self.stored, Int8Experts):
            return "int4" if self.stored.w1_group is not None else "fp8" if self.stored.float8 else "int8"
        return self.form

    @property
    def skips(self) -> bool:
        """Whether experts that are not selected are not computed."""
        return self.form in ("dynamic", "int8")

    @property
    def counts_skipped(self) -> bool:
        """Whether the multiply-adds that a counter sees include experts that are skipped: those forms compute all."""
        return not self.skips

    @property
    def output(self) -> Node:
        """Its value in the last of its executions."""
        return self.nodes[-1]

    @property
    def routed(self) -> Experts:
        """The weights of the experts that the router scores."""
        return self.weights.after(self.shared)

    @property
    def experts(self) -> int:
        """Number of experts."""
        return self._rows[0]

    @property
    def _rows(self) -> tuple[int, int]:
        experts, size = (self.stored.w1_scale if isinstance(self.stored, Int8Experts) else self.stored.w1).shape[:2]
        return int(experts), int(size)

    @property
    def size(self) -> int:
        """Number of neurons of an expert, filling included."""
        return self._rows[1]

    @property
    def neuron_multiply_adds(self) -> int:
        """Multiply-adds of one neuron for one token."""
        return self.d_in * (2 if self.stored.gate is not None else 1) + self.d_out

    @property
    def expert_multiply_adds(self) -> int:
        """Multiply-adds of one expert without filling, for one token."""
        return self.size * self.neuron_multiply_adds

    @property
    def costs(self) -> list[int]:
        """Multiply-adds of each expert for one token. Filling does not count."""
        neurons = neurons_of_experts(self.experts, self.size, self.filling)
        return [count * self.neuron_multiply_adds for count in neurons]

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds for one token when every expert runs. The router is included: one multiply-add per weight."""
        return sum(self.costs) + self.router_parameters

    @property
    def describe(self) -> str:
        """`48 experts × 32`, `1 expert × 8`, and how many experts always run and how many neurons are filling."""
        always = f", {self.shared} of them always on" if self.shared else ""
        last = "the last one" if self.filling < self.size else "the last ones"
        filled = f", {self.filling} neuron{'s' * (self.filling != 1)} fill{'s' * (self.filling == 1)} up {last}"
        return f"{self.experts} expert{'s' * (self.experts != 1)} × {self.size}{always}{filled if self.filling else ''}"

    @property
    def facts(self) -> Facts:
        """What is there, for programs."""
        widths = {"d_in": self.d_in, "d_out": self.d_out, "experts": self.experts, "expert_size": self.size}
        always = {"always_on": self.shared, "filling": self.filling}
        gated = self.stored.gate is not None
        return {"kind": "experts", **widths, **always, "activation": self.activation, "gated": gated}


_FORMS: dict[Any, str] = {dynamic_k_ffn: "dynamic", masked_ffn: "masked", routed_ffn_int8: "int8"}
W1_OF_INT8 = Int8Call._fields.index("w1")


def find_moes(model: nn.Module) -> list[MoESite]:
    """Return every mixture of experts in a graph, in topological order, or in a model, in the order of its modules.

    Raises:
        UsageError: it is neither a graph nor a model.
    """
    check_model(model)
    if isinstance(model, GraphModule):
        return _in_graph(model)
    counted: set[tuple[object, ...]] = set()
    found = []
    for path, module in model.named_modules():
        if isinstance(module, MoE):
            stored: Experts | Int8Experts = module.weights
            size, x_scale = _router_size(module.router.parameters(), counted), None
        elif isinstance(module, Int8MoE):
            stored, size, x_scale = module.experts, _int8_router_size(module, counted), module.x_scale
        else:
            continue
        found.append(
            MoESite(
                path, module.form, (), stored, module.activation, module.shared, size, module.tau, module.rule,
                module.filling, x_scale,
            )
        )  # fmt: skip
    return found


def refuse_float8(model: nn.Module, engine: str) -> None:
    """Refuse a graph or model whose experts have weights in float8, for an engine that has no kernels for them.

    Raises:
        UsageError: it has such experts.
    """
    # No other weights are in float8: `surgeon.models.readiness` refuses them.
    if any(parameter.dtype == FLOAT8 for parameter in model.parameters()):
        raise UsageError(
            f"{engine} has no kernels for experts in float8. Quantise the surgery from before quantize again, with "
            "weights=int8 or int4."
        )


def _in_graph(graph: GraphModule) -> list[MoESite]:
    found: dict[str, list[Node]] = {}
    forms: dict[str, Literal["module", "masked", "dynamic", "int8"]] = {}
    for node in graph.graph.nodes:
        if node.op == "call_module" and isinstance(graph.get_submodule(str(node.target)), MoE):
            path, form = str(node.target), "module"
        elif node.op == "call_function" and node.target in _FORMS:
            w1 = node.args[W1_OF_INT8 if node.target is routed_ffn_int8 else 3]
            assert isinstance(w1, Node)
            path, form = str(w1.target).rpartition(".")[0], _FORMS[node.target]
        else:
            continue
        found.setdefault(path, []).append(node)
        forms[path] = form  # type: ignore[assignment]
    counted: set[tuple[object, ...]] = set()
    return [_site(graph, path, forms[path], nodes, counted) for path, nodes in found.items()]


def _site(
    graph: GraphModule,
    path: str,
    form: Literal["module", "masked", "dynamic", "int8"],
    nodes: list[Node],
    counted: set[tuple[object, ...]],
) -> MoESite:
    module: Any = graph.get_submodule(path)
    router: list[Tensor]
    if form == "module":
        router = list(module.router.parameters())
        activation, shared, rule = module.activation, module.shared, module.rule
    elif form == "int8":
        call = Int8Call(*nodes[0].args)  # type: ignore[arg-type]
        activation, shared, rule = call.activation, call.shared, call.rule
        stored = Int8Experts(*(getattr(module, name, None) for name in Int8Experts._fields))  # type: ignore[arg-type]
        size = _int8_router_size(module, counted)
        return MoESite(
            path, form, tuple(nodes), stored, activation, shared, size, module.tau, rule, filling_of(graph, path),
            module.x_scale,
        )  # fmt: skip
    else:
        scores, threshold, activation = nodes[0].args[1], nodes[0].args[2], str(nodes[0].args[9])
        read = [tensor_of(graph, node) for node in router_nodes(nodes[0])]
        router, shared = [tensor for tensor in read if tensor is not None], 0
        assert isinstance(scores, Node)
        assert isinstance(threshold, Node)
        if is_call(scores, aten.constant_pad_nd.default):
            shared = scores.args[1][0]  # type: ignore[index]
        rule = str(threshold.args[2])
    weights = Experts(*(getattr(module, name, None) for name in Experts._fields))  # type: ignore[arg-type]
    return MoESite(
        path, form, tuple(nodes), weights, str(activation), shared, _router_size(router, counted), module.tau, rule,
        filling_of(graph, path),
    )  # fmt: skip


def _int8_router_size(module: nn.Module, counted: set[tuple[object, ...]]) -> int:
    """The same for a layer with 8-bit weights. What fills up panels does not count."""
    trunk, last, x_scale = getattr(module, "fc1", None), module.fc2, module.x_scale
    assert isinstance(last, Tensor)
    assert isinstance(x_scale, Tensor)
    size = _router_size([last], counted)
    return size if trunk is None else size + last.shape[1] * len(x_scale)


def _router_size(weights: Iterable[Tensor], counted: set[tuple[object, ...]]) -> int:
    """Count the numbers in a router's matrices, without those that an earlier layer has counted."""
    fresh = {tensor_key(weight): weight.numel() for weight in weights if weight.dim() == 2}
    size = sum(count for key, count in fresh.items() if key not in counted)
    counted.update(fresh)
    return size


def router_nodes(node: Node) -> list[Node]:
    """Return the nodes between the input and the scores of an expert layer in op form, including parameters."""
    x, scores = node.args[0], node.args[1]
    assert isinstance(scores, Node)

    def between(source: Node) -> bool:
        return source is not x and source.op in ("get_attr", "call_function")

    return [source for source in walk_sources(scores, between) if between(source)]

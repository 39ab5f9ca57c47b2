"""Make the module of an expert layer that is in op form in a graph: what `lower` does, backwards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor, nn
from torch.fx import GraphModule, Node

from surgeon.graph.traced import aten, is_call, tensor_of
from surgeon.kernels.experts import Experts
from surgeon.kernels.int8_arguments import Int8Call
from surgeon.kernels.scores import HIDDEN, OUTPUT, Hidden, Output, neuron_size
from surgeon.moe.filling import unfilled
from surgeon.moe.int8 import TENSORS, Int8MoE
from surgeon.moe.module import SKIPPED_MEAN, MoE, MoEShape, output_bias
from surgeon.moe.site import MoESite
from surgeon.sites.ffn import FFNWeights


def moe_module(graph: GraphModule, site: MoESite) -> MoE | Int8MoE:
    """Return a layer of a graph as a module of its own, with the same knobs. It shares the graph's tensors.

    Raises:
        ValueError: the router in the graph is not one that `moeify` makes.
    """
    if site.form == "module":
        module = graph.get_submodule(site.path)
        assert isinstance(module, MoE)
        return _filled(module.shape, _tensors(module), module.tau)
    if site.form == "int8":
        return _int8(graph, site)
    scores, bias = site.nodes[0].args[1], site.nodes[0].args[8]
    assert isinstance(scores, Node)
    functions, parts = _router(graph, scores, site)
    holder = graph.get_submodule(site.path)
    tensors = {name: getattr(holder, name, None) for name in (*Experts._fields, "b2", SKIPPED_MEAN)}
    if bias is None:
        tensors["b2"] = None
    tensors |= {f"router.{name}": tensor for name, tensor in parts.items()}
    width = None if "fc1.weight" not in parts else len(parts["fc1.weight"])
    return _filled(_shape(site, tensors, width, "fc2.bias" in parts, *functions), tensors, site.tau)


def joined_weights(graph: GraphModule, site: MoESite) -> FFNWeights:
    """Return the weights of a layer's experts as those of one layer, with its neurons in the order of the experts."""
    holder = graph.get_submodule(site.path)
    parts: dict[str, Any] = {
        name: None if part is None else unfilled(part, site.filling) for name, part in site.weights._asdict().items()
    }
    return FFNWeights(**parts, b2=output_bias(holder))


def _int8(graph: GraphModule, site: MoESite) -> Int8MoE:
    call, holder = Int8Call(*site.nodes[0].args), graph.get_submodule(site.path)  # type: ignore[arg-type]
    tensors: dict[str, Tensor | None] = {name: getattr(holder, name, None) for name in (*TENSORS, SKIPPED_MEAN)}
    fc2 = tensors["fc2"]
    assert fc2 is not None
    width = None if tensors["fc1"] is None else fc2.shape[1]
    functions = cast(Hidden, call.hidden), cast(Output, call.output)
    shape = _shape(site, tensors, width, tensors["fc2_bias"] is not None, *functions)
    return Int8MoE.with_tensors(shape, tensors, site.tau)


def _shape(
    site: MoESite,
    tensors: Mapping[str, Tensor | None],
    router_width: int | None,
    router_bias: bool,
    router_hidden: Hidden,
    router_output: Output,
    router_activation: str | None = None,
) -> MoEShape:
    assert site.form != "module"
    return MoEShape(
        d_in=site.d_in,
        d_out=site.d_out,
        experts=site.experts,
        size=site.size,
        activation=site.activation,
        gated=tensors["gate"] is not None,
        biases=tuple(name for name in ("b1", "b_gate", "b2") if tensors[name] is not None),
        shared=site.shared,
        rule=site.rule,
        form=site.form,
        filling=site.filling,
        compensated=tensors[SKIPPED_MEAN] is not None,
        router_width=router_width,
        router_bias=router_bias,
        router_hidden=router_hidden,
        router_output=router_output,
        router_activation=router_activation,
    )


def _tensors(module: MoE) -> dict[str, Tensor | None]:
    return dict(module.named_parameters(remove_duplicate=False)) | {SKIPPED_MEAN: getattr(module, SKIPPED_MEAN, None)}


def _filled(shape: MoEShape, tensors: dict[str, Any], tau: Tensor) -> MoE:
    made = MoE.empty(shape, device="meta", dtype=None)
    for name, tensor in tensors.items():
        if tensor is not None:
            owner, _, field = name.rpartition(".")
            setattr(made.get_submodule(owner), field, tensor)
    made.tau = tau
    return made


def _router(
    graph: GraphModule, scores: Node, site: MoESite
) -> tuple[tuple[Hidden, Output, str | None], dict[str, nn.Parameter]]:
    """Return the functions of a router in op form (hidden, output, activation), and its parameters, named as there."""
    if is_call(scores, aten.constant_pad_nd.default):
        scores = cast(Node, scores.args[0])
    parts: dict[str, nn.Parameter] = {}
    if is_call(scores, neuron_size):
        first, up, activation = scores.args
        _linear(graph, cast(Node, first), "fc2", parts, site)
        if up is not None:
            _linear(graph, cast(Node, up), "up", parts, site)
        return ("relu", "abs", str(activation)), parts
    output = next((name for name, (op, *rest) in OUTPUT.items() if _is(scores, op, rest)), None)
    if output is None:
        raise ValueError(f"the router of {site.path} ends in {scores.target}, which no router of surgeon's does")
    x = _linear(graph, cast(Node, scores.args[0]), "fc2", parts, site)
    hidden: Hidden = "relu"
    if x is not site.nodes[0].args[0]:
        found = next((name for name, op in HIDDEN.items() if is_call(x, op)), None)
        if found is None:
            raise ValueError(
                f"the trunk of the router of {site.path} ends in {x.target}, which no router of surgeon's does"
            )
        hidden = cast(Hidden, found)
        _linear(graph, cast(Node, x.args[0]), "fc1", parts, site)
    return (hidden, output, None), parts


def _is(node: Node, op: Any, rest: list[Any]) -> bool:
    return is_call(node, op) and list(node.args[1:]) == rest


def _linear(graph: GraphModule, node: Node, name: str, parts: dict[str, nn.Parameter], site: MoESite) -> Node:
    """Add the parameters of a linear layer in op form to `parts`, and return its input."""
    if not is_call(node, aten.linear.default):
        raise ValueError(f"the router of {site.path} has {node.target} in place of a linear layer")
    for field, source in zip(("weight", "bias"), node.args[1:], strict=False):
        tensor = None if source is None else tensor_of(graph, cast(Node, source))
        if tensor is not None:
            parts[f"{name}.{field}"] = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor)
    return cast(Node, node.args[0])

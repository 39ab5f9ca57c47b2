"""A graph with 8-bit experts, from one with float experts."""

from __future__ import annotations

import torch
from torch.fx import Node

from surgeon.graph.traced import TracedGraph, fork, tensor_of
from surgeon.kernels.experts import Experts
from surgeon.kernels.int8 import Int8Experts, pack, quantise_trunk
from surgeon.moe.ops import dynamic_k_ffn, masked_ffn


def quantised(graph: TracedGraph) -> TracedGraph:
    made = fork(graph).eval()
    for node in list(made.graph.nodes):
        if node.target not in (dynamic_k_ffn, masked_ffn):
            continue
        x, scores, threshold, *tensors, activation = node.args
        w1, b1, gate, b_gate, w2, b2 = (None if t is None else tensor_of(made, t) for t in tensors)
        int8 = Int8Experts.of(Experts(w1, b1, gate, b_gate, w2))
        second, hidden = scores.args[0], scores.args[0].args[0]
        first = hidden.args[0]
        trunk, trunk_scale = quantise_trunk(tensor_of(made, first.args[1]))
        _, tau, rule = threshold.args
        with made.graph.inserting_before(node):

            def held(name: str, value: torch.Tensor | None, node: Node = node) -> Node | None:
                if value is None:
                    return None
                made.register_buffer(f"{node.name}_{name}", value.detach().clone())
                return made.graph.get_attr(f"{node.name}_{name}")

            new = made.graph.call_function(
                torch.ops.surgeon.routed_ffn_int8.default,
                (
                    x, tau, rule, 0, None, held("fc1", pack(trunk)), held("fc1_scale", trunk_scale),
                    held("fc1_bias", tensor_of(made, first.args[2])), held("fc2", tensor_of(made, second.args[1])),
                    held("fc2_bias", tensor_of(made, second.args[2])), "relu", "softplus",
                    *(held(name, value) for name, value in int8._asdict().items()), held("b2", b2), activation,
                ),
            )  # fmt: skip
        new.meta.update(node.meta)
        node.replace_all_uses_with(new)
        made.graph.erase_node(node)
    made.graph.eliminate_dead_code()
    made.recompile()
    return made

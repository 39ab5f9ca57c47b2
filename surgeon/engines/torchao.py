"""Graphs whose linears torchao quantises."""

from __future__ import annotations

import importlib

from torch import nn

from surgeon.engines.installed import installed, silent
from surgeon.graph.traced import TracedGraph, aten, fork, tensor_of

_CONFIGS = {"int8": "Int8DynamicActivationInt8WeightConfig", "int8-weights": "Int8WeightOnlyConfig"}
LINEARS = tuple(_CONFIGS)
"""int8: 8-bit weights, and inputs with a scale for each token. int8-weights: the weights alone."""


def quantised(graph: TracedGraph, linears: str) -> TracedGraph:
    """Return the graph with the weights of its linears quantised; those of a head of few classes are left.

    linears: one of `LINEARS`.

    Raises:
        UsageError: torchao is not installed.
    """
    installed("torchao")
    with silent():
        quantization = importlib.import_module("torchao.quantization")
        config = getattr(quantization, _CONFIGS[linears])()
        made = fork(graph).eval()
        for node in made.graph.nodes:
            if node.op != "call_function" or node.target != aten.linear.default:
                continue
            weight = tensor_of(made, node.args[1])
            if weight is None or weight.shape[0] < 16:  # a head of few classes
                continue
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            linear.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
            quantization.quantize_(linear, config)
            name = f"{node.name}_quantised"
            made.register_parameter(name, linear.weight)
            with made.graph.inserting_before(node):
                replacement = made.graph.get_attr(name)
            node.args = (node.args[0], replacement, *node.args[2:])
            node.target = nn.functional.linear  # torchao's weights know this function, and not the operator
        made.recompile()
    return made

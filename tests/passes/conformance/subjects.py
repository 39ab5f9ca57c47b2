"""Every pass of the table with small options, and what a user could notice about a graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn

from surgeon.graph.traced import TracedGraph
from surgeon.passes import Moeify, Pass
from surgeon.passes.registry import all_passes


@dataclass(frozen=True)
class Subject:
    """A pass with small options, the graph it runs on, and what it is fitted with."""

    make: Callable[[], Pass[Any]]
    kind: str = "gelu"
    first: tuple[Pass[Any], ...] = ()
    options: dict[str, Any] = field(default_factory=dict)


SUBJECTS = {
    "swap-activation": Subject(
        lambda: all_passes()["swap-activation"](steps=2), options={"to": "silu", "only": ["blocks.*"]}
    ),
    "sparsify": Subject(lambda: all_passes()["sparsify"](steps=2, lr=1e-3), options={"alpha": 0.5, "steps": 7}),
    "mlpify": Subject(lambda: all_passes()["mlpify"](steps=2), options={"cost_factor": 0.5, "skip": ["blocks.0.*"]}),
    "moeify": Subject(
        lambda: all_passes()["moeify"](experts=4, router_width=8, steps=2),
        "gated",
        options={"experts": {"*.0.*": 8, "*": 4}, "clip": None, "share_trunk": False},
    ),
    "recover": Subject(
        lambda: all_passes()["recover"](steps=2, lr=1e-3),
        "gated",
        (Moeify(experts=4, router_width=8),),
        {"tau": 0.5, "distill": 0.25},
    ),
    "lower": Subject(
        lambda: all_passes()["lower"](), "gated", (Moeify(experts=4, router_width=8),), {"only": ["blocks.1.*"]}
    ),
}
names = pytest.mark.parametrize("name", SUBJECTS)
fits = pytest.mark.parametrize("name", [name for name, cls in all_passes().items() if cls.trains])


def state_of(module: nn.Module) -> dict[str, Any]:
    """Everything a user could notice about a model's weights and modes."""
    tensors = dict([*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)])
    return {
        "values": {name: tensor.detach().clone() for name, tensor in tensors.items()},
        "objects": {name: id(tensor) for name, tensor in tensors.items()},
        "requires_grad": {name: tensor.requires_grad for name, tensor in tensors.items()},
        "grads": {name: tensor.grad is None for name, tensor in tensors.items() if tensor.is_leaf},
        "training": {name: part.training for name, part in module.named_modules()},
    }


def assert_same_state(before: dict[str, Any], after: dict[str, Any]) -> None:
    for key in ("objects", "requires_grad", "grads", "training"):
        assert before[key] == after[key], key
    for name, value in before["values"].items():
        assert torch.equal(value, after["values"][name]), name


def node_texts(graph: TracedGraph) -> list[str]:
    return [node.format_node() or "" for node in graph.graph.nodes]

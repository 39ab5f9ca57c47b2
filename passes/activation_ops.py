"""Write the activations that a pass can put into a graph as ATen ops."""

from __future__ import annotations

from collections.abc import Callable

from torch.fx import Node

from surgeon.graph.traced import aten

Emit = Callable[..., Node]


# Each target activation and how to emit it.
TARGETS: dict[str, Callable[[Emit, Node], Node]] = {
    "relu": lambda step, z: step(aten.relu.default, z),
    "relu2": lambda step, z: step(aten.square.default, step(aten.relu.default, z)),
    "gelu": lambda step, z: step(aten.gelu.default, z),
    "silu": lambda step, z: step(aten.silu.default, z),
}

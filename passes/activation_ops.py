"""How each activation that a pass can put in is written in ATen ops."""

from __future__ import annotations

from collections.abc import Callable

from torch.fx import Node

from surgeon.graph.traced import aten

Emit = Callable[..., Node]


# How each target activation is written in ATen ops.
TARGETS: dict[str, Callable[[Emit, Node], Node]] = {
    "relu": lambda step, z: step(aten.relu.default, z),
    "relu2": lambda step, z: step(aten.square.default, step(aten.relu.default, z)),
    "gelu": lambda step, z: step(aten.gelu.default, z),
    "silu": lambda step, z: step(aten.silu.default, z),
}

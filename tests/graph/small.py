"""A graph small enough to name its nodes."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

import surgeon
from tests.small_models import Function

X = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))


def small() -> Any:
    torch.manual_seed(0)
    return surgeon.trace(Function(lambda m, x: m.b(F.relu(m.a(x))), a=(6, 8), b=(8, 6)), X)


def node(graph: Any, name: str) -> Any:
    return next(n for n in graph.graph.nodes if n.name == name)

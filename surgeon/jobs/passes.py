"""Show what a pass changes in a small model."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgeon.passes.base import Pass
from surgeon.passes.moeify import Moeify
from surgeon.passes.report import PassDiff
from surgeon.passes.sparsify_inputs import SparsifyInputs
from surgeon.surgery.pipeline import Pipeline


class _Classifier(nn.Module):
    """Two blocks, and classes from the first token."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Example() for _ in range(2))
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, 64] → [B, 10]."""
        for block in self.blocks:
            x = block(x)
        return self.head(x[:, 0])  # type: ignore[no-any-return]


class _Example(nn.Module):
    """A projection and a feed-forward layer."""

    def __init__(self, mlp: nn.Module | None = None) -> None:
        super().__init__()
        self.query = nn.Linear(64, 64)
        self.norm = nn.LayerNorm(64)
        self.mlp = mlp or nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))

    def forward(self, x: Tensor) -> Tensor:
        """[..., 64] → [..., 64]."""
        return x + self.mlp(self.norm(self.query(x)))  # type: ignore[no-any-return]


class _Stream(nn.Module):
    """A stream that a projection and a feed-forward layer write, and that norms read."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mlp = nn.Linear(64, 64), nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
        self.norm, self.last_norm, self.head = nn.LayerNorm(64), nn.LayerNorm(64), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, 64] → [B, T, 10]."""
        x = self.embed(x)
        return self.head(self.last_norm(x + self.mlp(self.norm(x))))  # type: ignore[no-any-return]


class _Gated(nn.Module):
    """A gated feed-forward layer."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(64, 192), nn.Linear(64, 192), nn.Linear(192, 64)

    def forward(self, x: Tensor) -> Tensor:
        """[..., 64] → [..., 64]."""
        return self.down(F.silu(self.gate(x)) * self.up(x))  # type: ignore[no-any-return]


def example_of(kind: type[Pass[Any]]) -> PassDiff:
    """What a pass changes in a small model, without data. If it changes no plain layer, the model has a gated one."""
    first: dict[str, list[Pass[Any]]] = {"moe": [Moeify()], "dynamic": [Moeify(), SparsifyInputs(tau=0.5)]}
    passes = [*first.get(kind.works_on, []), kind()]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        plain = {"block": _Classifier, "stream": _Stream}.get(kind.works_on, _Example)()
        gated, inputs = _Example(_Gated()), torch.randn(2, 4, 64)
    for model in (plain, gated):
        found = Pipeline(passes).run(model.eval(), inputs=inputs, dry_run=True).diff().passes[-1]
        if found.report.matched:
            break
    return found

"""Show what a pass changes in a small model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from surgeon.passes.base import Pass
from surgeon.passes.moeify import Moeify
from surgeon.passes.report import PassDiff
from surgeon.surgery.pipeline import Pipeline


class _Example(nn.Module):
    """A projection and a feed-forward layer."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(64, 64)
        self.norm = nn.LayerNorm(64)
        self.mlp = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))

    def forward(self, x: Tensor) -> Tensor:
        """[..., 64] → [..., 64]."""
        return x + self.mlp(self.norm(self.query(x)))  # type: ignore[no-any-return]


def example_of(kind: type[Pass[Any]]) -> PassDiff:
    """What a pass changes in a small model, without data."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, inputs = _Example().eval(), torch.randn(2, 4, 64)
    passes: list[Pass[Any]] = [Moeify()] if kind.works_on in ("moe", "dynamic") else []
    return Pipeline([*passes, kind()]).run(model, inputs=inputs, dry_run=True).diff().passes[-1]

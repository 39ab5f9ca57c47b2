"""Linear layers to replace: one alone, and those of an attention."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import surgeon
from surgeon.graph.ownership import own_parameters
from tests.small_models import WIDTH, Function


@functools.cache
def _one_layer(d_in: int, d_out: int, bias: bool) -> tuple[surgeon.TracedGraph, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(2, 5, d_in)
    return surgeon.trace(Function(lambda m, x: torch.softmax(m.a(x), -1), a=(d_in, d_out, bias)), x), x


def one_layer(d_in: int = 6, d_out: int = 6, bias: bool = True) -> tuple[surgeon.TracedGraph, Tensor]:
    """A linear layer `a` in front of a softmax, with parameters of its own, and inputs for it."""
    graph, x = _one_layer(d_in, d_out, bias)
    graph = surgeon.graph.traced.fork(graph)
    own_parameters(graph)
    return graph, x


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


class Timm(nn.Module):
    """Attention as in timm's VisionTransformer."""

    def __init__(self, heads: int = 2) -> None:
        super().__init__()
        self.qkv, self.proj, self.heads = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), heads

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        return self.proj(attend(q, k, v).transpose(1, 2).reshape(batch, length, width))

"""FFNs, attention, inputs and a language model that the whole plain-torch models are made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .body import DOWN, HIDDEN, TOKENS, UP, WIDTH, Block, Body, randomize, sequence
from .case import Case, Inputs, Registry

PAIR = {"up": UP, "down": DOWN}
SWIGLU = {"gate": UP, **PAIR}
HEADS, VOCABULARY = 4, 11


def model(
    registry: Registry,
    *required: str,
    inputs: Callable[[int], Inputs] = sequence,
    half: torch.dtype | None = None,
    **fields: Any,
) -> Callable[[Callable[[], nn.Module]], Callable[[], nn.Module]]:
    """Register the decorated function, which builds a model, as a case; `half` is a dtype to convert the model to."""

    def register(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        def finished() -> nn.Module:
            built = randomize(build())
            return (built if half is None else built.to(half)).eval()

        registry.add(Case(name=build.__name__, build=finished, inputs=inputs, required=required, **fields))
        return build

    return register


def relu_ffn(d_in: int = WIDTH, hidden: int = HIDDEN, d_out: int | None = None) -> Body:
    """Return `down(relu(up x))`."""
    return Body(lambda m, x: m.down(F.relu(m.up(x))), up=(d_in, hidden), down=(hidden, d_out or d_in))


def gelu_ffn() -> Body:
    """Return `drop(down(drop(gelu(up x))))`."""
    return Body(lambda m, x: m.drop(m.down(m.drop(F.gelu(m.up(x))))), **PAIR, drop=lambda: nn.Dropout(0.1))


def swiglu_ffn() -> Body:
    """Return `down(silu(gate x) · up x)`."""
    return Body(lambda m, x: m.down(F.silu(m.gate(x)) * m.up(x)), **SWIGLU)


def attention() -> Body:
    """Return causal self-attention with one fused projection."""

    def forward(m: Any, x: Tensor) -> Tensor:
        shape = (*x.shape[:-1], HEADS, WIDTH // HEADS)
        q, k, v = (part.view(shape).transpose(1, 2) for part in m.qkv(x).chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=0.1 if m.training else 0.0)
        return m.out(y.transpose(1, 2).flatten(2))

    return Body(forward, qkv=(WIDTH, 3 * WIDTH), out=(WIDTH, WIDTH))


def rows(batch: int) -> Inputs:
    """Return one vector for each sample, [batch, WIDTH]."""
    return (torch.randn(batch, WIDTH),)


def images(batch: int) -> Inputs:
    """Return channels-last feature maps, [batch, 3, 4, WIDTH]."""
    return (torch.randn(batch, 3, 4, WIDTH),)


def tokens(batch: int) -> Inputs:
    """Return token ids, [batch, TOKENS], as a keyword argument."""
    return {"ids": torch.randint(0, VOCABULARY, (batch, TOKENS))}


class Language(nn.Module):
    """A causal language model; `tied` gives the head the embedding's weight."""

    def __init__(self, ffn: Callable[[], nn.Module], *, tied: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Parameter(torch.randn(TOKENS, WIDTH) * 0.1)
        self.blocks = nn.ModuleList(Block(attn=attention(), ffn=ffn()) for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.embed(ids) + self.positions[: ids.shape[1]]
        if mask is not None:
            x = x * mask.unsqueeze(-1)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

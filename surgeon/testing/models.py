"""Small models for tests of passes: feed-forward layers of several kinds, and stacks of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, HIDDEN, CLASSES = 16, 32, 3
Inputs = dict[str, Tensor]


class Plain(nn.Module):
    """fc2(dropout(act(fc1 x)))."""

    def __init__(
        self,
        d_in: int = WIDTH,
        hidden: int = HIDDEN,
        d_out: int | None = None,
        act: Callable[[Tensor], Tensor] = F.gelu,
        bias: bool = True,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(d_in, hidden, bias=bias)
        self.fc2 = nn.Linear(hidden, d_in if d_out is None else d_out, bias=bias)
        self.dropout = nn.Dropout(dropout)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, d] → [B, T, d]."""
        output: Tensor = self.fc2(self.dropout(self.act(self.fc1(x))))
        return output


class Gated(nn.Module):
    """down(act(gate x) · up x)."""

    def __init__(
        self,
        d_in: int = WIDTH,
        hidden: int = HIDDEN,
        act: Callable[[Tensor], Tensor] = F.silu,
        bias: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.gate = nn.Linear(d_in, hidden, bias=bias)
        self.up = nn.Linear(d_in, hidden, bias=bias)
        self.down = nn.Linear(hidden, d_in, bias=bias)
        self.dropout = nn.Dropout(dropout)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, d] → [B, T, d]."""
        output: Tensor = self.down(self.dropout(self.act(self.gate(x)) * self.up(x)))
        return output


class Fused(nn.Module):
    """A gated layer with gate and up in one matrix, the gate first."""

    def __init__(
        self, d_in: int = WIDTH, hidden: int = HIDDEN, act: Callable[[Tensor], Tensor] = F.silu, bias: bool = True
    ) -> None:
        super().__init__()
        self.gate_up = nn.Linear(d_in, 2 * hidden, bias=bias)
        self.down = nn.Linear(hidden, d_in, bias=bias)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, d] → [B, T, d]."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        output: Tensor = self.down(self.act(gate) * up)
        return output


class StackLayer(nn.Module):
    """x + softmax(mix x), then x + dropout(feed-forward)."""

    def __init__(self, ffn: nn.Module) -> None:
        super().__init__()
        self.mix, self.norm, self.ffn = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), ffn
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, d] → [B, T, d]."""
        x = x + torch.softmax(self.mix(x), -1)
        output: Tensor = x + self.dropout(self.ffn(self.norm(x)))
        return output


class Attention(nn.Module):
    """Two heads of attention."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, d] → [B, T, d]."""
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        output: Tensor = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return output


class PreNormLayer(nn.Module):
    """x + attention(norm(x)), then x + dropout(feed-forward(norm(x)))."""

    def __init__(self, ffn: nn.Module) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(WIDTH), Attention()
        self.norm2, self.ffn, self.dropout = nn.LayerNorm(WIDTH), ffn, nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, d] → [B, T, d]."""
        x = x + self.attention(self.norm1(x))
        output: Tensor = x + self.dropout(self.ffn(self.norm2(x)))
        return output


class PreNorm(nn.Module):
    """A transformer in which norms alone read the stream: [B, T, d] → [B, 3]."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(PreNormLayer(Plain()) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, d] → [B, 3]."""
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        output: Tensor = self.head(self.norm(x).mean(1))
        return output


class Stack(nn.Module):
    """A classifier of vectors without attention, fast to trace and to save: [B, T, d] → [B, 3]."""

    def __init__(self, *ffns: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(map(StackLayer, ffns))
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, d] → [B, 3]."""
        for block in self.blocks:
            x = block(x)
        output: Tensor = self.head(x.mean(1))
        return output


def feed_forward(kind: str, dropout: float = 0.1) -> nn.Module:
    """A feed-forward layer of one kind."""
    match kind:
        case "gelu":
            return Plain(dropout=dropout)
        case "relu":
            return Plain(act=F.relu, dropout=dropout)
        case "biasless":
            return Plain(act=F.relu, bias=False, dropout=dropout)
        case "gated":
            return Gated(dropout=dropout)
        case "fused":
            return Fused()
    raise KeyError(kind)


def stack(kind: str = "gelu", layers: int = 2) -> Stack | PreNorm:
    """A `Stack` in evaluation mode. Its feed-forward layers are of one kind, or a single layer ("shared").

    Of the kind "pre-norm" it is a `PreNorm`, whose norms have gains and biases.
    """
    torch.manual_seed(0)
    if kind == "pre-norm":
        model = PreNorm(layers).eval()
        for norm in (part for part in model.modules() if isinstance(part, nn.LayerNorm)):
            nn.init.normal_(norm.weight, 1.0, 0.2)
            nn.init.normal_(norm.bias, 0.0, 0.2)
        return model
    if kind == "shared":
        return Stack(*[feed_forward("relu")] * layers).eval()
    return Stack(*(feed_forward(kind) for _ in range(layers))).eval()


def vectors(batch: int = 3, length: int = 5, seed: int = 0) -> Inputs:
    """Inputs for a `Stack`."""
    return {"x": torch.randn(batch, length, WIDTH, generator=torch.Generator().manual_seed(seed))}


def labelled_vectors(batches: int = 2) -> list[tuple[Inputs, Tensor]]:
    """Training data for a `Stack`."""
    return [(vectors(8, seed=number), torch.arange(8) % CLASSES) for number in range(batches)]

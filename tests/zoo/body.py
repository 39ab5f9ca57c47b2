"""Modules written as a function of (module, input), and the residual stack that the plain-torch cases live in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

TOKENS, WIDTH, HIDDEN, OUTPUTS = 5, 16, 24, 7
"""Sizes of the plain-torch models: all different, so that no axis can be taken for another by its size."""

UP, DOWN, FUSED = (WIDTH, HIDDEN), (HIDDEN, WIDTH), (WIDTH, 2 * HIDDEN)
"""Arguments of the linear layers of an FFN."""

SITES = ("blocks.0.ffn", "blocks.1.ffn")
"""Where the two FFNs of a `Stack` lie."""

Part = nn.Module | Tensor | tuple[Any, ...] | Callable[[], Any] | object


class Body(nn.Module):
    """A module made of named parts and of a function `forward(module, *inputs)`.

    A part is a tuple (the arguments of an `nn.Linear`), a callable that returns the part, or a value. Parameters and
    modules are registered as such, other tensors become buffers.
    """

    def __init__(self, forward: Callable[..., Any], **parts: Part) -> None:
        super().__init__()
        self.compute = forward
        for name, part in parts.items():
            if isinstance(part, tuple):
                value: Any = nn.Linear(*part)
            else:
                value = part() if callable(part) and not isinstance(part, nn.Module) else part
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.compute(self, *args, **kwargs)


def weight(*shape: int) -> Callable[[], nn.Parameter]:
    """Return a factory of a parameter with standard deviation 0.2."""
    return lambda: nn.Parameter(torch.randn(*shape) * 0.2)


def randomize(model: nn.Module) -> nn.Module:
    """Draw biases, norms and scales at random too, so that one forgotten, swapped or doubled is seen in the output."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() < 2 and parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


class Block(nn.Module):
    """`x + body(norm(x))`, one pre-norm residual branch for each body, named as given."""

    def __init__(self, **bodies: nn.Module) -> None:
        super().__init__()
        self.order = tuple(bodies)
        for name, body in bodies.items():
            setattr(self, f"{name}_norm", nn.LayerNorm(WIDTH))
            setattr(self, name, body)

    def forward(self, x: Tensor) -> Tensor:
        for name in self.order:
            x = x + getattr(self, name)(getattr(self, f"{name}_norm")(x))
        return x


class Stack(nn.Module):
    """Blocks between a normalised input and a linear head: [batch, TOKENS, WIDTH] to [batch, TOKENS, OUTPUTS]."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def sequence(batch: int) -> tuple[Tensor, ...]:
    """Return a batch of token vectors, [batch, TOKENS, WIDTH]."""
    return (torch.randn(batch, TOKENS, WIDTH),)

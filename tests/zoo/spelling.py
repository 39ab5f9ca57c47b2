"""One FFN spelled by a function, placed twice in a small model: `blocks.0.ffn` and `blocks.1.ffn`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .body import SITES, Block, Body, Stack, randomize, sequence
from .case import Case, Registry
from .functions import Function


def spell(
    registry: Registry,
    name: str,
    forward: Function,
    activation: str | None,
    *,
    required: bool = True,
    gated: bool = False,
    gain: float = 1.0,
    tolerance: float = 1e-4,
    note: str = "",
    untraceable: str = "",
    **parts: Any,
) -> None:
    """Register `forward(module, x)` as an FFN made of `parts`.

    With `required=False` it may be found or refused, and only the outputs are compared. `gain` multiplies the first
    weight, so that the hidden values leave the range in which two activations agree.
    """

    def build() -> nn.Module:
        model = randomize(Stack(Block(ffn=Body(forward, **parts)), Block(ffn=Body(forward, **parts))))
        with torch.no_grad():
            for path in SITES:
                for parameter in list(model.get_submodule(path).parameters())[:1]:
                    parameter.mul_(gain)
        return model.eval()

    registry.add(
        Case(
            name=name,
            build=build,
            inputs=sequence,
            required=SITES if required else (),
            exact=required,
            activation=activation,
            gated=gated if required else None,
            tolerance=tolerance,
            untraceable=untraceable,
            note=note,
        )
    )


def ffn(registry: Registry, activation: str | None, **options: Any) -> Callable[[Function], Function]:
    """Register the decorated function under its own name; see `spell`."""

    def register(forward: Function) -> Function:
        spell(registry, forward.__name__, forward, activation, **options)
        return forward

    return register

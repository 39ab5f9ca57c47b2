"""What a method to compute a feed-forward layer offers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from surgeon.bench.layer import Problem


class UnavailableError(Exception):
    """A method cannot compute this layer; the message says why."""


@dataclass(frozen=True)
class Method:
    """A method to compute the layer. prepare: returns the call to be timed, or raises `UnavailableError`.

    every: the result is that of all experts. around: a context for each call, which is not timed. waits: the host needs
    the selected pairs, so on a GPU it waits for them. mask: the experts [N, E] that run, of a method that selects them
    itself; None: those of the problem. packages: what has to be installed, for the method of another engine.
    """

    summary: str
    prepare: Callable[[Problem], Callable[[], Tensor]]
    every: bool = False
    around: Callable[[Problem], AbstractContextManager[None]] = lambda problem: nullcontext()
    waits: bool = False
    mask: Callable[[Problem], Tensor] | None = None
    packages: tuple[str, ...] = ()


def dense_ffn(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    gate: Tensor | None,
    b_gate: Tensor | None,
    w2: Tensor,
    b2: Tensor,
    act: Callable[[Tensor], Tensor],
) -> Tensor:
    """The dense layer as in a model, with weights [d_out, d_in]."""
    h = F.linear(x, w1, b1)
    h = act(h) if gate is None else act(F.linear(x, gate, b_gate)) * h
    return F.linear(h, w2, b2)

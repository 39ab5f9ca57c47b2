"""The native kernels as a backend: for the first call on a processor, which loads them.

Once they are loaded they stand in PyTorch's dispatcher, which takes calls on a processor to them without coming here.
What they do not have, they hand on to `surgeon::dynamic_k_ffn_torch`; gradients are the other backends'.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from surgeon.kernels.backends import Backend, Call, say_once
from surgeon.kernels.cpu import loaded, ready


def _takes(call: Call) -> bool:
    return call.x.device.type == "cpu" and ready()


def _forward(call: Call) -> Tensor:
    x, scores, threshold, experts, b2, activation = call
    y: Tensor = torch.ops.surgeon.dynamic_k_ffn(x, scores, threshold, *experts, b2, activation)
    return y


BACKEND = Backend(_takes, _forward)


def say_if_unknown(call: Call) -> None:
    """Warn, once for each, of an activation that keeps the native kernels from a call they would otherwise take."""
    if call.x.device.type == "cpu" and loaded() and call.activation not in _activations():
        known = ", ".join(_activations())
        say_once("the native kernels", f"they know the activations {known}, not {call.activation}")


@cache
def _activations() -> tuple[str, ...]:
    return tuple(torch.ops.surgeon.cpu_activations())
